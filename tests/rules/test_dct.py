"""DCTAdamW: the basis, a slow reference, AdamW at full rank, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmprecond.linalg import cosine_basis
from mmprecond.optimizers import DCTAdamW
from tests.reference.dct import ReferenceDCT, cosines
from tests.support.errors import refused
from tests.support.matrices import draw, parameters, step

SHAPES = ((5, 7), (7, 4), (7, 4), (4, 3, 2, 2), (4, 4), (6,), (), (1, 3))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90))
def test_the_basis_is_orthonormal(size: int) -> None:
    basis = cosine_basis(size, torch.float64)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(size).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(basis, cosines(size), rtol=0, atol=1e-12)


def test_the_basis_is_accurate_in_float32() -> None:
    basis = cosine_basis(1500, torch.float32).double()
    torch.testing.assert_close(basis, cosine_basis(1500, torch.float64), rtol=0, atol=1e-8)
    assert (basis @ basis.mT - torch.eye(1500)).abs().max() < 1e-6


@pytest.mark.parametrize('norm', ['l1', 'l2'])
@pytest.mark.parametrize('feedback', [False, True])
@pytest.mark.parametrize('interval, rotate', [(1, True), (3, True), (2, False)])
@pytest.mark.parametrize('rank', [1, 3])
def test_it_follows_its_reference(
    rank: int, interval: int, rotate: bool, feedback: bool, norm: str
) -> None:
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    optimizer = DCTAdamW(
        ours,
        lr=0.1,
        betas=(0.7, 0.9),
        eps=1e-6,
        weight_decay=0.3,
        rank=rank,
        refresh_interval=interval,
        rotate_subspace=rotate,
        error_feedback=feedback,
        norm=norm,
    )
    reference = ReferenceDCT((0.7, 0.9), 1e-6, rank, interval, rotate, feedback, norm)
    chosen = set()
    for t in range(9):
        values = [draw(*p.shape, seed=100 * t + k) for k, p in enumerate(ours)]
        step(optimizer, ours, values)
        for p, g in zip(theirs, values, strict=True):
            reference.step(p, g, 0.1, 0.3)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-11)
        chosen.add(tuple(optimizer.state[ours[0]]['columns'].tolist()))
    assert len(chosen) > 1  # the subspace did change


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.2]),
    st.booleans(),
    st.integers(0, 99),
)
def test_at_full_rank_it_is_adamw_in_the_basis(
    m: int, n: int, weight_decay: float, feedback: bool, seed: int
) -> None:
    """torch's AdamW on the turned parameter, whatever the rank beyond the smaller side."""
    start, wide = draw(m, n, seed=seed), m < n
    basis = cosines(min(m, n))
    ours = nn.Parameter(start.clone())
    turned = nn.Parameter(basis.mT @ start if wide else start @ basis)
    hyper: dict[str, Any] = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    first = DCTAdamW([ours], rank=50, error_feedback=feedback, **hyper)
    second = torch.optim.AdamW([turned], **hyper)
    for t in range(6):
        g = draw(m, n, seed=seed + 100 + t)
        step(first, [ours], [g])
        step(second, [turned], [basis.mT @ g if wide else g @ basis])
        back = basis @ turned if wide else turned @ basis.mT
        torch.testing.assert_close(ours, back, rtol=0, atol=1e-9)


def test_the_largest_columns_are_chosen() -> None:
    """One column has the larger sum, another the larger square."""
    transform = torch.zeros(8, 6).double()
    transform[:, 1] = 1
    transform[0, 4] = 5
    transform[:, 2] = 0.5
    g = transform @ cosines(6).mT
    for norm, rank, wanted in (('l1', 1, [1]), ('l2', 1, [4]), ('l1', 2, [1, 4])):
        p = nn.Parameter(torch.zeros(8, 6).double())
        optimizer = DCTAdamW([p], lr=0.1, rank=rank, norm=norm)
        step(optimizer, [p], [g])
        assert optimizer.state[p]['columns'].tolist() == wanted
        assert ((p @ cosines(6)).abs().sum(0) > 1e-9).nonzero()[:, 0].tolist() == wanted


@pytest.mark.parametrize('feedback', [False, True])
def test_the_state_is_small(feedback: bool) -> None:
    m, n, r = 48, 64, 5
    model = nn.ModuleList(
        [
            nn.Linear(m, n, bias=False),
            nn.Linear(n, m, bias=False),
            nn.Conv2d(n // 4, m, 2, bias=False),
        ]
    )
    optimizer = DCTAdamW(model, lr=0.1, rank=r, error_feedback=feedback)
    for t in range(2):
        step(
            optimizer,
            list(model.parameters()),
            [draw(*p.shape, seed=t, dtype=torch.float32) for p in model.parameters()],
        )
    for p in model.parameters():
        state = optimizer.state[p]
        kept = [v for v in state.values() if torch.is_tensor(v)]
        assert state['exp_avg'].shape == state['exp_avg_sq'].shape == (n, r)
        assert sum(t.numel() for t in kept) == 2 * n * r + r + feedback * m * n
        assert sum(t.untyped_storage().nbytes() for t in kept) == (
            4 * 2 * n * r + 8 * r + 4 * feedback * m * n
        )
    assert sum(b.numel() for b in optimizer.rule._bases.values()) == m**2  # one for all three


def test_what_is_left_out_is_fed_back() -> None:
    """On a constant gradient every column has its turn; without it the others never move."""
    g, moved = draw(9, 6), {}
    for feedback in (False, True):
        p = nn.Parameter(torch.zeros(9, 6).double())
        optimizer = DCTAdamW([p], lr=0.1, rank=2, error_feedback=feedback)
        for _ in range(40):
            step(optimizer, [p], [g])
        moved[feedback] = int(((p.detach() @ cosines(6)).norm(dim=0) > 1e-6).sum())
    assert moved == {False: 2, True: 6}


def test_large_matrices_take_adamw() -> None:
    large, small, mine = parameters([(32000, 2), (31999, 2), (9, 2)])
    optimizer = DCTAdamW([large, small], lr=0.1, rank=1)
    step(optimizer, [large, small], [draw(32000, 2), draw(31999, 2)])
    assert optimizer.state[large]['exp_avg'].shape == (32000, 2)
    assert optimizer.state[small]['exp_avg'].shape == (31999, 1)
    assert 'its larger side is over max_dim=31999: one of 32000 x 2' in optimizer.table()
    assert '0 matrices' in DCTAdamW([mine], lr=0.1, max_dim=8).table()


@pytest.mark.parametrize(
    'name, value, remedy',
    [
        ('lr', -1.0, 'at least 0'),
        ('betas', 0.9, 'write betas=(0.9, 0.999)'),
        ('eps', -1.0, 'at least 0'),
        ('weight_decay', None, 'give a number'),
        ('rank', 0, 'integer of at least 1'),
        ('rank', 2.0, 'integer of at least 1'),
        ('refresh_interval', 0, 'integer of at least 1'),
        ('max_dim', 0, 'integer of at least 1'),
        ('rotate_subspace', 1, 'neither True nor False'),
        ('norm', 'l3', 'l1, l2'),
        ('error_feedback', None, 'neither True nor False'),
    ],
)
def test_wrong_values(name: str, value: Any, remedy: str) -> None:
    refused(ValueError, lambda: DCTAdamW(parameters(), **{'lr': 0.1, name: value}), name, remedy)
