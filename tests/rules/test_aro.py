"""ARO: against a slow reference, and what must hold of its rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmprecond.optimizers import ARO
from mmprecond.rules.aro import NORMS, q_factor
from tests.reference.aro import ReferenceARO
from tests.reference.aro import q_factor as reference_factor
from tests.support.errors import refused
from tests.support.matrices import SHAPES, draw, parameters, step


def gradients(t: int, params: list[nn.Parameter], side: str) -> list[Tensor]:
    """The second is zero at first, the fourth never of full rank, but on the right.

    There, more rows than columns and less rank still, the rotation would be as rounding has it.
    """
    found = [draw(*p.shape, seed=100 * t + k) for k, p in enumerate(params)]
    found[1] *= t > 1
    if side != 'right' and len(found) > 3:
        found[3] -= found[3].mean(0)
    return found


@pytest.mark.parametrize('side', ['left', 'right', 'smaller'])
@pytest.mark.parametrize('norm', NORMS)
@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
def test_it_follows_its_reference(norm: str, side: str, weight_decay: float) -> None:
    shapes = SHAPES
    if norm == 'sign':  # small square matrices of signs are often singular
        shapes = ((20, 4), (16, 3)) if side == 'right' else ((4, 20), (3, 4, 2, 2))
    ours, theirs = parameters(shapes), parameters(shapes)
    optimizer = ARO(
        ours,
        lr=0.1,
        momentum=0.8,
        weight_decay=weight_decay,
        betas=(0.7, 0.9),
        eps=1e-6,
        norm=norm,
        side=side,
    )
    reference = ReferenceARO(0.8, (0.7, 0.9), 1e-6, norm, side)
    for t in range(8):
        step(optimizer, ours, gradients(t, ours, side))
        for p, g in zip(theirs, gradients(t, theirs, side), strict=True):
            reference.step(p, g, 0.1, weight_decay)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


sizes = st.integers(1, 8)


@settings(max_examples=60, deadline=None)
@given(
    sizes,
    sizes,
    st.integers(0, 8),
    st.sampled_from(sorted(NORMS)),
    st.sampled_from([1e-30, 1e-8, 1.0, 1e15]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 999),
)
def test_the_rotation_is_orthogonal_and_the_step_has_its_size(
    m: int, n: int, rank: int, norm: str, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """For gradients of any rank and size, zero too."""
    p = nn.Parameter(torch.zeros(m, n, dtype=dtype))
    optimizer = ARO([p], lr=1.0, norm=norm)
    for t in range(4):
        before = p.detach().clone()
        left, right = draw(m, rank, seed=seed + t, dtype=dtype), draw(rank, n, seed=t, dtype=dtype)
        step(optimizer, [p], [scale * (left @ right)])
        r = optimizer.state[p]['rotation']
        eps = 100 * torch.finfo(dtype).eps
        torch.testing.assert_close(r @ r.mT, torch.eye(m, dtype=dtype), rtol=0, atol=eps)
        size = (p - before).square().mean().sqrt().item()
        assert size == pytest.approx(0.2 if rank else 0.0, rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.sets(st.integers(0, 7)), st.integers(0, 999))
def test_the_factor_is_that_of_qr(m: int, n: int, dead: set[int], seed: int) -> None:
    """Q'C is upper triangular, its diagonal not negative; null columns change nothing else."""
    matrix, x = draw(m, n, seed=seed), draw(m, n, seed=seed + 1)
    x[[j for j in dead if j < m]] = 0
    c = matrix @ x.mT
    q = q_factor(matrix[None], x[None])[0]
    torch.testing.assert_close(q.mT @ q, torch.eye(m).double(), rtol=0, atol=1e-12)
    triangle, live = q.mT @ c, x.any(-1)
    assert triangle.diagonal().min() >= -1e-9
    if live.any():
        assert triangle[live][:, live].tril(-1).abs().max() < 1e-9
    torch.testing.assert_close(q, reference_factor(matrix, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize('norm', NORMS)
def test_rounding_is_not_enlarged(norm: str) -> None:
    """A softmax head's gradients have columns that sum to zero, and so have the steps."""
    p = nn.Parameter(torch.zeros(10, 30))
    tall = nn.Parameter(torch.zeros(30, 6))
    optimizer = ARO([p, tall], lr=1.0, norm=norm)
    for t in range(5):
        g = draw(10, 30, seed=t, dtype=torch.float32)
        step(optimizer, [p, tall], [g - g.mean(0), draw(30, 6, seed=t, dtype=torch.float32)])
        assert p.sum(0).abs().max() < 1e-4
    momentum = optimizer.state[tall]['momentum_buffer']
    before = tall.detach().clone()
    step(optimizer, [p, tall], [torch.zeros_like(p), torch.zeros_like(tall)])
    q, _ = torch.linalg.qr(momentum)
    move = tall.detach() - before
    assert (move - q @ (q.mT @ move)).norm() < 1e-4 * move.norm()  # within the momentum's range


def test_without_a_gradient_nothing_moves() -> None:
    p = nn.Parameter(draw(3, 5))
    before = p.detach().clone()
    optimizer = ARO([p], lr=1.0)
    step(optimizer, [p], [torch.zeros(3, 5).double()])
    assert torch.equal(p, before)
    assert torch.equal(optimizer.state[p]['rotation'], torch.eye(3).double())
    optimizer = ARO([p], lr=1.0, momentum=0.0)
    step(optimizer, [p], [draw(3, 5)])
    before, rotation = p.detach().clone(), optimizer.state[p]['rotation'].clone()
    step(optimizer, [p], [torch.zeros(3, 5).double()])
    assert torch.equal(p, before) and torch.equal(optimizer.state[p]['rotation'], rotation)


def test_the_direction_does_not_depend_on_the_gradients_size() -> None:
    a, b = parameters([(4, 6)]), parameters([(4, 6)])
    first, second = ARO(a, lr=0.1), ARO(b, lr=0.1)
    for t in range(4):
        g = draw(4, 6, seed=t)
        step(first, a, [g]), step(second, b, [1e-200 * g])
    torch.testing.assert_close(a[0], b[0])


def test_under_row_norm_a_constant_gradient_leads_to_its_orthogonal_factor() -> None:
    """As the paper has it: the rotation converges, and the step with it to that of Muon."""
    m = draw(4, 9)
    p = nn.Parameter(torch.zeros(4, 9).double())
    optimizer = ARO([p], lr=1.0, momentum=0.0, norm='row_norm')
    for _ in range(3000):
        before = p.detach().clone()
        step(optimizer, [p], [m])
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    wanted = u @ v
    torch.testing.assert_close(
        (before - p).detach(), 0.2 * wanted / wanted.square().mean().sqrt(), rtol=0, atol=1e-6
    )


def test_sides_of_groups() -> None:
    a, b, c = parameters([(3, 6), (3, 6), (6, 3)])
    optimizer = ARO(
        [dict(params=[a]), dict(params=[b], side='right'), dict(params=[c], side='smaller')],
        lr=0.1,
        max_dim=5,
    )
    step(optimizer, [a, b, c], [draw(*p.shape) for p in (a, b, c)])
    assert [
        optimizer.state[p]['rotation'].shape[0] if 'rotation' in optimizer.state[p] else None
        for p in (a, b, c)
    ] == [3, None, 3]
    assert 'exp_avg' in optimizer.state[b]
    assert '1 matrices take AdamW, as its right side is over max_dim=5: one of 3 x 6' in (
        optimizer.table()
    )


@pytest.mark.parametrize(
    'name, value, remedy',
    [
        ('lr', -1.0, 'at least 0'),
        ('momentum', 1.0, 'less than 1'),
        ('momentum', None, 'give a number'),
        ('eps', -1.0, 'at least 0'),
        ('betas', (0.9,), 'write betas=(0.9, 0.95)'),
        ('weight_decay', -1.0, 'at least 0'),
        ('norm', 'muon', 'sinkhorn, row_norm, sign'),
        ('side', 'both', 'left, right, smaller'),
        ('max_dim', 0, 'integer of at least 1'),
    ],
)
def test_wrong_values(name: str, value: Any, remedy: str) -> None:
    refused(ValueError, lambda: ARO(parameters(), **{'lr': 0.1, name: value}), name, remedy)
    if name in ('momentum', 'side'):
        refused(ValueError, lambda: ARO([{'params': parameters(), name: value}], lr=0.1), name)
