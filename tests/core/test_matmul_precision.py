"""matmul_precision: lower where products can bear it, never where matrices are inverted."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.curvature import Layer
from mmprecond.linalg import (
    Dense,
    LowRank,
    cholesky_inverse,
    low_rank_power,
    map_tensors,
    matmul_precision,
    rounded,
)
from mmprecond.optimizers import NKFAC, AdamR, AFOpt
from mmprecond.preconditioners import EigenRotation, NewtonKronecker
from mmprecond.preconditioners.two_sided import two_sided

LEVELS = {
    ('ieee', 'ieee'): 'highest',
    ('tf32', 'ieee'): 'high',
    ('tf32', 'bf16'): 'medium',
    ('none', 'none'): 'default',
}


def level() -> str:
    if not hasattr(torch.backends.cuda.matmul, 'fp32_precision'):
        return torch.get_float32_matmul_precision()
    backends: Any = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return LEVELS.get(tuple(backend.fp32_precision for backend in backends), 'other')


@pytest.mark.parametrize('units, wanted', [(True, 'medium'), (False, 'high')])
def test_auto_takes_bfloat16_where_the_cpu_has_units(
    units: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mmprecond.linalg.precision.has_bfloat16_units', lambda: units)
    optimizer = NKFAC(nn.Linear(2, 2), lr=0.1)
    with matmul_precision(optimizer.curvature.options.matmul_precision):
        assert level() == wanted
    published = NKFAC(nn.Linear(2, 2), lr=0.1, settings='published')
    assert published.curvature.options.matmul_precision == 'highest'


@pytest.mark.parametrize('chosen', ['highest', 'high', 'medium'])
@pytest.mark.parametrize('kind', [NKFAC, AdamR])
def test_each_part_has_its_own(kind: Any, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.backends.cuda.matmul, 'fp32_precision'):
        pytest.skip('an older torch')
    seen: dict[str, set[str]] = {}

    def spy(owner: type, name: str, part: str) -> None:
        plain = getattr(owner, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(part, set()).add(level())
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, spied)

    method = NewtonKronecker if kind is NKFAC else EigenRotation
    spy(Layer, 'measure', 'statistics')
    spy(method, 'refresh', 'refresh')
    spy(method, 'apply', 'apply')
    spy(method, 'restore', 'apply')
    before = level()
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = kind(
        model,
        lr=0.1,
        stat_interval=1,
        refresh_interval=1,
        matmul_precision=chosen,
        settings='published',
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert seen.pop('apply') >= {chosen}  # AdamR's moments are carried over at a refresh
    assert seen == {'statistics': {chosen}, 'refresh': {'highest'}}
    assert level() == before


def test_the_setting_is_restored_after_an_error() -> None:
    before = level()
    with pytest.raises(RuntimeError), matmul_precision('high'):
        raise RuntimeError
    assert level() == before
    with pytest.raises(ValueError, match='matmul_precision'):
        NKFAC(nn.Linear(2, 2), lr=0.1, matmul_precision='low', settings='published')


def tf32(x: Tensor) -> Tensor:
    """Rounds to 10 bits after the point, as tensor cores do with their factors."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def bf16(x: Tensor) -> Tensor:
    """Rounds to 7 bits after the point."""
    return x.bfloat16().float()


@pytest.mark.parametrize('rounding, error', [(tf32, 1e-4), (bf16, 3e-3)])
@pytest.mark.parametrize('lowrank', [False, True])
def test_rounded_factors_hardly_turn_a_direction(
    lowrank: bool, rounding: Callable[[Tensor], Tensor], error: float
) -> None:
    """Why applying may be 'high' or 'medium': rounded by hand, with a badly conditioned factor."""
    torch.manual_seed(0)
    n = 300
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -2.0
    moment = ((basis * values) @ basis.T).float()[None, None]
    damping = torch.full((1, 1), 0.01)
    if lowrank:
        columns, scale, _ = low_rank_power(moment, None, damping)
        operators = {'input': LowRank(columns, scale)}
    else:
        damped = moment + 0.01 * torch.eye(n)
        operators = {'input': Dense(cholesky_inverse(damped)[0])}
    gradient = torch.randn(20, n, dtype=torch.float64) @ (basis * values.sqrt()) @ basis.T
    gradient = gradient.float()[None, None]
    exact = two_sided(map_tensors(operators, Tensor.double), gradient.double())
    rounded = two_sided(map_tensors(operators, rounding), rounding(gradient))
    assert F.cosine_similarity(rounded.double().flatten(), exact.flatten(), 0) > 1 - error


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize(
    'make', [lambda bias: nn.Linear(700, 9, bias=bias), lambda bias: nn.Conv2d(80, 9, 3, bias=bias)]
)
def test_moments_of_rounded_rows_are_positive(
    make: Callable[[bool], nn.Module], bias: bool
) -> None:
    """Blocks and borders are of the same numbers, whichever way the CPU multiplies."""
    torch.manual_seed(0)
    model = make(bias)
    optimizer = NKFAC(
        model,
        lr=0.1,
        stat_interval=1,
        refresh_interval=1,
        solver='lowrank',
        matmul_precision='medium',
        settings='published',
    )
    x = torch.rand(16, 700) if isinstance(model, nn.Linear) else torch.rand(9, 80, 9, 9)
    model(x + 3).square().mean().backward()
    optimizer.step()
    (member,) = optimizer.curvature.stacks[0].members
    assert member.refreshes == 1
    values = torch.linalg.eigvalsh(
        optimizer.curvature.stacks[0].statistics['input_moment'].double()
    )
    assert values.amin() > -1e-6 * values.amax()


def test_rounding_is_that_of_the_precision() -> None:
    x = torch.randn(50)
    for chosen, wanted in (('highest', x), ('high', x), ('medium', bf16(x))):
        with matmul_precision(chosen):
            assert torch.equal(rounded(x), wanted)
            assert rounded(x.double()).dtype == torch.float64
            assert torch.equal(rounded(x.double()), x.double())


def test_an_older_torch_has_one_setting_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.9 neither backend has a precision of its own."""
    monkeypatch.setattr(torch.backends.cuda, 'matmul', SimpleNamespace(allow_tf32=False))
    monkeypatch.setattr(torch.backends, 'mkldnn', SimpleNamespace())
    named = ['highest']
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: named[-1])
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', named.append)
    model = nn.Linear(4, 3)
    optimizer = NKFAC(
        model,
        lr=0.1,
        stat_interval=1,
        refresh_interval=1,
        matmul_precision='medium',
        settings='published',
    )
    model(torch.randn(5, 4)).square().mean().backward()
    optimizer.step()
    assert 'medium' in named and named[-1] == 'highest'
    assert optimizer.curvature.stacks[0].members[0].refreshes == 1


def test_attention_is_measured_in_full() -> None:
    """Its terms cancel: in bfloat16 a saturated softmax has no positive curvature."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        dict(attention=nn.MultiheadAttention(64, 2, batch_first=True), head=nn.Linear(64, 5))
    )
    with torch.no_grad():
        model['attention'].in_proj_weight[:128] *= 28
    optimizer = AFOpt(
        model,
        lr=1e-3,
        stat_interval=1,
        refresh_interval=1,
        matmul_precision='medium',
        settings='published',
    )
    for _ in range(2):
        optimizer.zero_grad()
        x = torch.randn(16, 64, 64)
        model['head'](model['attention'](x, x, x)[0]).square().mean().backward()
        optimizer.step()
    members = {
        member.layer.name: member
        for stack in optimizer.curvature.stacks
        for member in stack.members
    }
    assert members['attention.in_proj_weight'].refreshes == 2
    for name, statistic in (
        (name, s)
        for stack in optimizer.curvature.stacks
        for name, s in stack.statistics.items()
        if 'curvature' in name
    ):
        values = torch.linalg.eigvalsh(statistic.double())
        assert bool((values.amin(-1) > -1e-4 * values.amax(-1)).all()), name
