"""SOAA: against a slow reference and AdamW, its trust radius, its loss, ranks, resuming."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import SOAA, AdaNKFAC
from tests.reference.soaa import ReferenceSOAA
from tests.support.errors import refused
from tests.support.soaa import HYPER, parameters, step, tensors


def losses(count: int, seed: int = 5) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return [2 * 0.9**t + 0.03 * float(x) for t, x in enumerate(noise)]


@pytest.mark.parametrize('sums', ['global', 'parameter'])
@pytest.mark.parametrize('scale', [3.0, 0.3, 0.01])
def test_every_step_is_the_references(scale: float, sums: str) -> None:
    ours, theirs = parameters(), [p.detach().clone() for p in parameters()]
    half = [dict(params=ours[:2]), dict(params=ours[2:])]  # two groups, one optimizer
    optimizer = SOAA(half, total_steps=15, radius=4.0, sums=sums, **HYPER)
    reference = ReferenceSOAA(theirs, d=4.0, total=15, per_parameter=sums == 'parameter', **HYPER)
    radii = set()
    for t, loss in enumerate(losses(15)):
        gradients = tensors(10 + t, scale)
        step(optimizer, ours, gradients, loss)
        reference.step(gradients, loss)
        radii.add(float(optimizer.radius))
        assert float(optimizer.radius) == pytest.approx(reference.d, rel=1e-9), t
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-11)
    assert len(radii) > 8  # neither always at a bound
    assert bool(reference.fisher_wins) == (scale > 0.1)


def test_groups_have_their_own_rates() -> None:
    ours, theirs = parameters(), parameters()
    one = SOAA([dict(params=ours[:2]), dict(params=ours[2:], lr=0.0)], total_steps=9, **HYPER)
    two = SOAA([dict(params=theirs[:2]), dict(params=theirs[2:])], total_steps=9, **HYPER)
    for t, loss in enumerate(losses(2)):
        step(one, ours, tensors(t), loss)
        step(two, theirs, tensors(t), loss)
    assert torch.equal(ours[3], parameters()[3]) and not torch.equal(theirs[3], parameters()[3])
    assert torch.equal(ours[0], theirs[0])
    first, second = (float(o.state_dict()['trust_region']['predicted']) for o in (one, two))
    assert 0 < first < second  # what does not move reduces nothing


def test_small_gradients_take_adamw_with_its_rate_times_the_radius() -> None:
    """d F < sqrt(v) there, and the decay is not multiplied."""
    ours, theirs = parameters(), parameters()
    optimizer = SOAA(ours, total_steps=12, **HYPER)
    plain = torch.optim.AdamW(theirs, lr=0.01, betas=HYPER['betas'], eps=HYPER['eps'])
    radii = []
    for t, loss in enumerate(losses(12)):
        radii.append(float(optimizer.radius))
        plain.param_groups[0]['lr'] = 0.01 * radii[-1]
        plain.param_groups[0]['weight_decay'] = 0.1 / radii[-1]
        gradients = tensors(10 + t, 1e-3)
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone()
        plain.step()
        step(optimizer, ours, gradients, loss)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert radii[:2] == [10.0, 1.0] and len(set(radii)) > 3


hypothesis = pytest.importorskip('hypothesis')
st = hypothesis.strategies


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    gamma=st.floats(0.01, 0.9),
    total=st.integers(1, 12),
    radius=st.floats(1e-3, 1e3),
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=16),
)
def test_the_radius_keeps_its_bounds(
    gamma: float, total: int, radius: float, values: list[float]
) -> None:
    """Whatever the losses are, past the end of the run too."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SOAA([p], lr=0.1, gamma=gamma, total_steps=total, radius=radius)
    moved = False
    for t, loss in enumerate(values):
        before = float(optimizer.radius)
        step(optimizer, [p], [torch.full((3,), 0.1, dtype=torch.float64)], loss)
        q = min(t / total, 1.0)
        d = float(optimizer.radius)
        if torch.tensor(loss).isfinite() and abs(loss) < 1e100:
            moved = True
        if d != before:
            assert (1 - gamma) ** q * (1 - 1e-12) <= d <= (1 + gamma**q) * (1 + 1e-12)
    if moved and len(values) == 1 and abs(values[0]) < 1e6:  # rounding of more counts as a fall
        assert float(optimizer.radius) == 1.0


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), torch.tensor(float('nan'))], ids=str)
def test_a_loss_that_is_not_finite_leaves_the_radius(
    bad: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = parameters(), parameters()
    one, two = (SOAA(p, total_steps=20, **HYPER) for p in (ours, theirs))
    for t in range(3):
        step(one, ours, tensors(t), losses(3)[t])
        step(two, theirs, tensors(t), losses(3)[t])
    kept = {
        k: v
        for k, v in one.state_dict()['trust_region'].items()
        if k in ('radius', 'loss', 'weight')
    }
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        for t in range(3, 6):
            step(one, ours, tensors(t), bad)
    assert caplog.text.count('is not finite') == 1
    assert kept.items() <= one.state_dict()['trust_region'].items()
    for t in range(6, 9):
        step(one, ours, tensors(t), 1.0)
    assert all(p.isfinite().all() for p in ours) and one.radius.isfinite()
    assert float(one.state_dict()['trust_region']['skipped']) == 3


def test_gradients_that_are_not_finite_leave_the_radius_finite() -> None:
    params = parameters()
    optimizer = SOAA(params, total_steps=20, **HYPER)
    step(optimizer, params, tensors(0), 1.0)
    step(optimizer, params, [g * float('inf') for g in tensors(1)], 1.0)
    step(optimizer, params, tensors(2), 1.0)
    assert all(value.isfinite() for value in optimizer.rule.region.values())


# ---------------------------------------------------------------- the loss, plain PyTorch


def test_a_closure_tells_its_loss() -> None:
    ours, theirs = parameters(), parameters()
    one, two = (SOAA(p, total_steps=20, **HYPER) for p in (ours, theirs))

    def closure() -> Tensor:
        one.zero_grad()
        loss: Any = sum((p**2).sum() for p in ours)
        loss.backward()
        return loss

    for _ in range(4):
        wanted = sum((p**2).sum() for p in theirs)
        step(two, theirs, [2 * p.detach() for p in theirs], wanted)
        assert one.step(closure).item() == wanted.item()
        assert one.loss is None
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert torch.equal(one.radius, two.radius)


def test_a_missing_loss_is_one_line_and_changes_nothing() -> None:
    params = parameters()
    optimizer = SOAA(params, total_steps=20)
    step(optimizer, params, tensors(0), 1.0)
    before = [p.detach().clone() for p in params]
    refused(
        ValueError,
        optimizer.step,
        'optimizer.loss = loss',
        'closure',
        "constructor='PrecondOptimWrapperConstructor'",
    )
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert optimizer.t == 1
    for bad in (torch.ones(2), 'low', [1.0]):
        refused(ValueError, lambda: setattr(optimizer, 'loss', bad), 'loss')


def test_a_missing_length_is_one_line() -> None:
    params = parameters()
    optimizer = SOAA(params)
    refused(ValueError, lambda: step(optimizer, params, tensors(0), 1.0), 'total_steps=...')
    optimizer.plan_steps(7)
    step(optimizer, params, tensors(0), 1.0)
    assert optimizer.total_steps == 7


def test_the_loss_keeps_no_graph() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SOAA([p], total_steps=3)
    optimizer.loss = (p**2).sum()
    assert not optimizer.loss.requires_grad


@pytest.mark.parametrize(
    'setting',
    [
        dict(lr=-1.0),
        dict(betas=(0.9, 1.0)),
        dict(betas=(0.9,)),
        dict(eps=0.0),
        dict(weight_decay=-1.0),
        dict(gamma=0.0),
        dict(gamma=1.0),
        dict(radius=0.0),
        dict(total_steps=0),
        dict(total_steps=1.5),
        dict(sums='layer'),
    ],
    ids=str,
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    refused(ValueError, lambda: SOAA(parameters(), **setting), next(iter(setting)))


@pytest.mark.parametrize('at', [1, 4])
def test_resume_through_a_file(at: int, tmp_path: Path) -> None:
    """With its radius, its average and its predicted reduction, to the bit."""
    whole = parameters()
    optimizer = SOAA(whole, total_steps=9, **HYPER)
    for t, loss in enumerate(losses(9)):
        if t == at:
            torch.save([whole, optimizer.state_dict()], tmp_path / 'state.pt')
        step(optimizer, whole, tensors(t), loss)
    saved, state = torch.load(tmp_path / 'state.pt', weights_only=True)
    assert state['trust_region']['steps'] == at
    resumed = SOAA(saved, total_steps=9, **HYPER)
    resumed.load_state_dict(state)
    for t, loss in list(enumerate(losses(9)))[at:]:
        step(resumed, saved, tensors(t), loss)
    assert all(torch.equal(p, q) for p, q in zip(whole, saved, strict=True))
    assert resumed.rule.region == optimizer.rule.region and resumed.t == optimizer.t == 9


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = SOAA(model, total_steps=9)
    refused(
        ValueError,
        lambda: optimizer.load_state_dict(AdaNKFAC(nn.Linear(3, 2), lr=0.1).state_dict()),
        'another optimizer than SOAA',
    )
