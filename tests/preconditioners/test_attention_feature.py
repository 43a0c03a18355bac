"""Optimizer steps on attention: reference directions, dropped blocks and zeros, resuming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import NKFAC, AdaAFOpt, AFOpt, PreconditionedOptimizer
from mmprecond.preconditioners.attention_feature import AttentionFeature, ProjectionMatrix
from tests.reference import attention as oracle
from tests.support.attention import (
    VARIANTS,
    backward,
    block_windows,
    feature_map,
    images,
    loss_of,
    noting,
    randomise,
    shift_window,
    slow_sums,
    swin,
)
from tests.support.states import differences, everything, saved

SHAPE = (5, 4)


# ------------------------------------------------------------------- nothing to learn from


class Residual(nn.Module):
    """A `SwinBlock` whose two branches may be dropped for every sample."""

    def __init__(self) -> None:
        super().__init__()
        kind = pytest.importorskip('mmdet.models.backbones.swin').SwinBlock
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.block = kind(6, 2, 12, window_size=3, shift=True, drop_path_rate=0.5)
        randomise(self.double())

    def forward(self, x: Tensor, dropped: bool) -> Tensor:
        for module in self.block.modules():
            if type(module).__name__ == 'DropPath':
                module.drop_prob = 1 - 1e-9 if dropped else 0.0
        return self.head(self.block(self.stem(x), SHAPE))


def drop_step(
    kind: type[PreconditionedOptimizer],
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any], nn.Module, nn.Module]:
    """Curvature and model before and after a step whose residual branches are all dropped."""
    model = Residual()
    optimizer = kind(model, lr=0.01, momentum=0.0, stat_interval=1, refresh_interval=1, **options)
    torch.manual_seed(0)
    kept: list[Any] = []
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model(feature_map(SHAPE, seed=step), dropped=step == 1)).backward()
        assert bool(model.block.attn.w_msa.qkv.weight.grad.any()) == (step == 0)
        optimizer.step()
        kept.append(copy.deepcopy((optimizer.state_dict()['precond']['layers'], model)))
    assert all(p.isfinite().all() for p in model.parameters())
    return kept[0][0], kept[1][0], kept[0][1], kept[1][1]


@pytest.mark.parametrize('variant', VARIANTS)
def test_a_dropped_block_still_shows_its_attention(variant: str) -> None:
    """AFOpt reads no gradient; a gradient of nothing is a step of nothing."""
    before, after, old, new = drop_step(AFOpt, variant=variant)
    name = 'block.attn.w_msa.qkv.weight'
    for key, value in after[name]['statistics'].items():
        assert value.isfinite().all() and not torch.equal(value, before[name]['statistics'][key])
    for key, p in new.named_parameters():
        assert torch.equal(p, old.get_parameter(key)) == key.startswith('block')


def test_a_dropped_block_tells_nkfac_nothing() -> None:
    """Its gradient moment is zero: neither of its statistics moves."""
    before, after, _, _ = drop_step(NKFAC)
    assert {name.partition('.')[0] for name in before} == {'stem', 'block', 'head'}
    for name in before:
        for key, value in after[name]['statistics'].items():
            still = torch.equal(value, before[name]['statistics'][key])
            assert still == name.startswith('block'), (name, key)


@pytest.mark.parametrize('variant', VARIANTS)
def test_zeros_tell_nothing(variant: str) -> None:
    """Inputs of zeros are all padding: no statistic, and no query to divide by."""
    model = shift_window('mmdet', 1)
    optimizer = AFOpt(model, lr=0.01, variant=variant, stat_interval=1, refresh_interval=1)
    layers = lambda: copy.deepcopy(optimizer.state_dict()['precond']['layers'])
    for step, scale in enumerate((0.0, 1.0, 0.0)):
        before = layers()
        optimizer.zero_grad()
        loss_of(model(scale * feature_map(SHAPE, seed=step), SHAPE)).backward()
        optimizer.step()
        after, name = layers(), 'w_msa.qkv.weight'
        assert (name in after) == (step > 0)
        if step == 2:
            assert differences(after[name]['statistics'], before[name]['statistics']) == []
        assert all(p.isfinite().all() for p in model.parameters())


# ------------------------------------------------------------------- a step, and resuming


@pytest.mark.parametrize('layers', [1, 3])
@pytest.mark.parametrize('heads', [1, 2])
def test_one_matrix_for_all_heads(layers: int, heads: int) -> None:
    gradients = torch.randn(layers, 3 * heads, 4, 5, dtype=torch.float64)
    part = gradients[:, heads:]  # its heads lie between those of other projections
    matrix = torch.randn(layers, 1, 5, 5, dtype=torch.float64)
    found = ProjectionMatrix(matrix).right(part)
    torch.testing.assert_close(found, part @ matrix, rtol=1e-12, atol=1e-12)


def test_the_published_settings_measure_more_windows() -> None:
    published = AttentionFeature(**AttentionFeature.published)
    assert (published.max_windows, AttentionFeature().max_windows) == (256, 64)


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmpretrain'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_a_step_is_the_reference_direction(variant: str, toolbox: str) -> None:
    """qkv by the attention's oracles, proj by G R^-1, everything else by its gradient."""
    model = shift_window(toolbox, 1)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AFOpt(
        model,
        lr=0.5,
        momentum=0.0,
        variant=variant,
        damping=0.03,
        stat_interval=1,
        refresh_interval=1,
    )
    with noting(model.w_msa) as calls:
        loss_of(model(feature_map(SHAPE), SHAPE)).backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        windows = block_windows(model, calls[0], SHAPE)
    optimizer.step()
    step = {name: (old[name] - p.detach()) / 0.5 for name, p in model.named_parameters()}

    weight = old['w_msa.qkv.weight'].view(6, 3, 6)
    found = {name: s / (9 * len(windows)) for name, s in slow_sums(windows).items()}
    matrix = gradient['w_msa.qkv.weight'].view(6, 3, 6)
    expected = oracle.directions(found | {'weight': weight}, matrix, variant, 0.03)
    for number in range(3):
        wanted, own = oracle.part(expected, number), oracle.part(matrix, number)
        wanted = wanted * own.norm() / wanted.norm()
        taken = oracle.part(step['w_msa.qkv.weight'].view(6, 3, 6), number)
        assert (taken - wanted).norm() < 1e-8 * wanted.norm()
        assert (taken - own).norm() > 0.1 * own.norm()

    outputs = calls[0].outputs.flatten(0, 1)
    rows = torch.cat([outputs, torch.ones(len(outputs), 1).double()], 1)
    joint = [
        torch.cat([d['w_msa.proj.weight'], d['w_msa.proj.bias'][:, None]], 1)
        for d in (gradient, step)
    ]
    right = oracle.damped(rows.t() @ rows / len(rows), 0.03)
    wanted = torch.linalg.solve(right, joint[0].t()).t()
    wanted = wanted * joint[0].norm() / wanted.norm()
    assert (joint[1] - wanted).norm() < 1e-8 * wanted.norm()
    for name in ('w_msa.qkv.bias', 'w_msa.relative_position_bias_table'):
        assert torch.allclose(step[name], gradient[name], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize('kind', [AFOpt, AdaAFOpt])
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('at', [1, 2, 5])
def test_a_resumed_run_continues_bit_for_bit(
    kind: type[PreconditionedOptimizer], variant: str, at: int
) -> None:
    """Drop path and sampled windows included."""

    def make(model: nn.Module) -> PreconditionedOptimizer:
        return kind(
            model, lr=0.01, variant=variant, max_windows=3, stat_interval=1, refresh_interval=2
        )

    def train(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)
            optimizer.zero_grad()
            backward(model, images(seed=step).float())
            optimizer.step()

    model = swin(torch.float32, drop_path_rate=0.3)
    optimizer = make(model)
    train(model, optimizer, range(at))
    kept = saved(optimizer.state_dict())
    assert (
        len([s for s in kept['precond']['layers'].values() if 'query_curvature' in s['statistics']])
        == 4
    )
    twin = copy.deepcopy(model)
    resumed = make(twin)
    resumed.load_state_dict(kept)
    for m, o in ((model, optimizer), (twin, resumed)):
        train(m, o, range(at, at + 3))
    assert differences(everything(twin, resumed), everything(model, optimizer)) == []
