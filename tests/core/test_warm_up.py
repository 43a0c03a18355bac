"""Warm-up of the learning rate: damping by the share that it has reached, slopes of gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mmprecond.core.directions import recover_norms
from mmprecond.core.warm_up import WarmUp, share_reached
from mmprecond.optimizers import (
    FSGD,
    MAC,
    NKFAC,
    AdamR,
    AdaNKFAC,
    AFOpt,
    PreconditionedOptimizer,
)
from tests.support.mixed import Net

SETTINGS: dict[str, Any] = dict(lr=0.1, stat_interval=1, refresh_interval=1)
DENSE = dict(solver='cholesky', damping_floor=0.0, momentum=0.0)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def train(optimizer_of: Any, rates: list[float], **groups: Any) -> list[torch.Tensor]:
    model = net()
    optimizer = optimizer_of(model)
    for seed, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group.update(lr=rate, **groups)
        step(model, optimizer, seed)
    return [p.detach().clone() for p in model.parameters()]


def test_the_share_of_the_rate() -> None:
    assert share_reached([dict(lr=0.1)]) == 1
    assert share_reached([dict(lr=0.01, initial_lr=0.1), dict(lr=0.05, initial_lr=0.1)]) == 0.5
    assert share_reached([dict(lr=0.0, initial_lr=0.1)]) == 0
    assert share_reached([dict(lr=0.3, initial_lr=0.1)]) == 1  # a cycle that rises above it
    assert share_reached([dict(lr=0.0, initial_lr=0.0)]) == 1


def test_a_rate_that_falls_has_reached_its_target() -> None:
    """Noam's schedule multiplies a rate of 1 by factors far below 1."""
    model = net()
    optimizer = NKFAC(model, **SETTINGS | dict(lr=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: 0.04 * min((k + 1) / 4, (4 / (k + 1)) ** 0.5)
    )
    seen = []
    for seed in range(6):
        step(model, optimizer, seed)
        scheduler.step()
        seen.append(optimizer.curvature.warm_up.reached)
    assert seen == pytest.approx([0.01, 0.02, 0.03, 0.04, 1.0, 1.0])


def test_a_target_far_above_the_rates_is_no_warm_up_for_good() -> None:
    """Noam's schedule of a transformer rises to 0.0007 of a rate of 1."""
    warm_up = WarmUp()
    for k in range(1, 5000):
        rate = 512**-0.5 * min(k**-0.5, k * 4000**-1.5)
        warm_up.update([dict(lr=rate, initial_lr=1.0)])
        assert warm_up.reached == 0.01 or k > 4000
    assert warm_up.reached == 1


@pytest.mark.parametrize('rate', [0.3, 0.3 * (1 - 1e-12), 0.28, 0.0])
def test_small_dips_end_no_warm_up(rate: float) -> None:
    """Such as those of a decay epoch by epoch, or a rate that is zero for a step."""
    assert share_reached([dict(lr=rate, initial_lr=1.0)], 0.3) == 0.3
    assert share_reached([dict(lr=0.26, initial_lr=1.0)], 0.3) == 1


def test_a_group_without_a_rate_has_no_share() -> None:
    groups = [dict(lr=0.0, initial_lr=0.0), dict(lr=0.2, initial_lr=1.0)]
    assert share_reached(groups) == 0.2


def test_the_target_of_one_cycle_is_its_largest_rate() -> None:
    model = net()
    optimizer = NKFAC(model, **SETTINGS)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=50)
    step(model, optimizer, 0)
    assert optimizer.curvature.warm_up.reached == pytest.approx(1 / 25)


def test_a_calibrated_layer_has_its_damping_in_a_warm_up() -> None:
    """It is inverted once, before the first step; a resumed run does so with the same damping."""
    model, images = net(), torch.randn(40, 6, dtype=torch.float64)
    optimizer = MAC(model, **SETTINGS, damping=0.5)
    optimizer.calibrate_first_layer(images)
    for group in optimizer.param_groups:
        group.update(lr=0.001, initial_lr=0.1)
    step(model, optimizer, 0)
    rows = torch.cat([images, torch.ones(40, 1, dtype=torch.float64)], 1)
    moment = rows.T @ rows / 40
    identity = torch.eye(7, dtype=torch.float64)
    expected = 0.5 * torch.linalg.inv(moment + 0.5 * identity)
    (operator,) = optimizer.curvature.layer('0').operators.values()
    torch.testing.assert_close(operator[0], expected, rtol=1e-10, atol=1e-12)
    resumed = copy.deepcopy(model)
    again = MAC(resumed, **SETTINGS, damping=0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, its in ((model, optimizer), (resumed, again)):
        its.param_groups[0]['lr'] = 0.05
        step(trained, its, 1)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


@pytest.mark.parametrize('share', [0.25, 0.5])
@pytest.mark.parametrize('kind', [NKFAC, FSGD])
def test_damping_is_divided_by_the_share(
    kind: type[PreconditionedOptimizer], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        'mmprecond.core.curvature.recover_norms', lambda batches, _: recover_norms(batches)
    )
    settings = SETTINGS | (DENSE if kind is NKFAC else dict(momentum=0.0))
    rate = 0.1 * share
    warm = train(lambda m: kind(m, damping=0.02, **settings), [rate], initial_lr=0.1)
    plain = train(lambda m: kind(m, damping=0.02 / share**2, **settings), [rate])
    for a, b in zip(warm, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    off = train(lambda m: kind(m, damping=0.02, warm_up=False, **settings), [rate])
    assert not all(map(torch.allclose, warm, off))


@pytest.mark.parametrize('share', [0.01, 0.5, 0.8])
@pytest.mark.parametrize('kind', [NKFAC, AFOpt])
def test_directions_have_the_slope_of_the_gradient(
    kind: type[PreconditionedOptimizer], share: float
) -> None:
    """Or the length that they have at the full rate, if that is less."""
    model = Net().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = kind(model, **SETTINGS, momentum=0.0)
    for group in optimizer.param_groups:
        group.update(lr=0.1 * share, initial_lr=0.1)
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    model(x).square().mean().backward()
    optimizer.step()
    seen = 0
    for layer in optimizer.curvature.layers:
        parts = optimizer.curvature.layers[layer].method.norm_parts(layer)
        moves, gradients = [], []
        for name, p in model.named_parameters():
            if any(p is own for own in layer.parameters):
                moves.append((before[name] - p.detach()) / (0.1 * share))
                gradients.append(p.grad)
        direction, gradient = layer.join(*moves), layer.join(*gradients)
        for d, g in zip(direction.chunk(parts), gradient.chunk(parts), strict=True):
            slope, square = float((d * g).sum()), float(g.square().sum())
            longest = float(d.norm() / g.norm()) * share
            assert longest < 1 + 1e-6 and slope < square * (1 + 1e-6)
            assert abs(slope / square - 1) < 1e-6 or abs(longest - 1) < 1e-6
            seen += 1
    assert seen >= len(optimizer.curvature.layers)


def test_the_largest_share_so_far_counts() -> None:
    """A rate that decays after the warm-up changes no damping."""
    warm = train(lambda m: NKFAC(m, **SETTINGS, **DENSE), [0.1, 0.01, 0.001], initial_lr=0.1)
    plain = train(lambda m: NKFAC(m, **SETTINGS, **DENSE), [0.1, 0.01, 0.001])
    assert all(map(torch.equal, warm, plain))


def test_small_steps_go_along_the_gradient() -> None:
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = NKFAC(model, damping=0.05, **SETTINGS, **DENSE)
    for group in optimizer.param_groups:
        group.update(lr=1e-4, initial_lr=1e4)
    step(model, optimizer, 0)
    cosines = []
    for start, p in zip(before, model.parameters(), strict=True):
        moved, gradient = (start - p).detach().flatten(), p.grad.flatten()
        cosines.append(float(moved @ gradient / (moved.norm() * gradient.norm())))
    assert min(cosines) > 0.9


@pytest.mark.parametrize('kind', [NKFAC, AdaNKFAC, AdamR])
def test_resume_in_and_after_the_warm_up(kind: type[PreconditionedOptimizer]) -> None:
    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: [0.1, 0.3, 0.5, 1.0, 0.4, 0.2, 0.1, 0.1][k]
        )

    for stop in (2, 5):
        straight: list[Any] = []
        model = net()
        optimizer = kind(model, **SETTINGS)
        scheduler = schedule(optimizer)
        for seed in range(7):
            if seed == stop:
                saved = copy.deepcopy(
                    (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
                )
            step(model, optimizer, seed)
            scheduler.step()
        straight = [p.detach().clone() for p in model.parameters()]
        resumed = net()
        again = kind(resumed, **SETTINGS)
        scheduler = schedule(again)
        for part, state in zip((resumed, again, scheduler), saved, strict=True):
            part.load_state_dict(state)
        for seed in range(stop, 7):
            step(resumed, again, seed)
            scheduler.step()
        assert all(map(torch.equal, straight, resumed.parameters()))


def test_checkpoints_from_before_have_reached_the_rate() -> None:
    model = net()
    optimizer = NKFAC(model, **SETTINGS)
    step(model, optimizer, 0)
    state = optimizer.state_dict()
    assert 'reached' not in state['precond']
    optimizer.load_state_dict(state)
    assert optimizer.curvature.warm_up.reached == 1.0
