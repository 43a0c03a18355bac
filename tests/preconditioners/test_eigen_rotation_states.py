"""AdamR over a run: moments at a new basis, resuming, failures, mixing, settings."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.core import RefreshError
from mmprecond.curvature import INPUT, Factor, Side
from mmprecond.optimizers import SOAP, AdamR, AdamWBK, PreconditionedOptimizer
from mmprecond.preconditioners import EigenRotation
from tests.reference.factors import plain_copy
from tests.support.errors import warnings_of
from tests.support.rotation import (
    ADAMW,
    LATE,
    RULES,
    SECOND,
    both,
    entry,
    equals,
    run,
    stepped,
    tokens,
)
from tests.support.states import differences, everything, saved
from tests.support.trajectories import Tokens, follow, make_loss
from tests.support.trajectories import batch as rows


def joint(model: nn.Module, optimizer: PreconditionedOptimizer, key: str) -> Tensor:
    """One moment of `first` as the matrix [W | b]; its gradient for 'grad'."""
    pieces = [
        p.grad if key == 'grad' else optimizer.state[p][key]
        for p in (model.first.weight, model.first.bias)
    ]
    return torch.cat([pieces[0], pieces[1][:, None]], 1).clone()


def bases(optimizer: PreconditionedOptimizer, name: str = 'first.weight') -> tuple[Tensor, Tensor]:
    operator = entry(optimizer, name)['operator']
    return operator['gradient_moment'][0], operator['input_moment'][0]


# ------------------------------------------------------------------- moments at a new basis


@pytest.mark.parametrize('rule', RULES)
def test_moments_turn_into_a_new_basis(rule: str) -> None:
    """The first moment in the raw space is the moving average of raw gradients."""
    model, optimizer, _ = both(Tokens, RULES[rule], stat_interval=1, refresh_interval=2)
    beta = RULES[rule]['betas'][0]
    run(model, optimizer, range(3))
    for step in range(3, 8):
        u1, u2 = bases(optimizer)
        raw = u1 @ joint(model, optimizer, 'exp_avg') @ u2.mT
        run(model, optimizer, range(step, step + 1))
        v1, v2 = bases(optimizer)
        assert torch.equal(u1, v1) == (step % 2 == 0)
        gradient = joint(model, optimizer, 'grad')
        torch.testing.assert_close(
            v1 @ joint(model, optimizer, 'exp_avg') @ v2.mT,
            beta * raw + (1 - beta) * gradient,
            rtol=0,
            atol=1e-12,
        )
        if rule == 'Adan':
            torch.testing.assert_close(
                v1 @ joint(model, optimizer, 'previous') @ v2.mT, gradient, rtol=0, atol=1e-12
            )


@pytest.mark.parametrize('rotate', [True, False])
def test_the_second_moment_at_the_first_and_later_bases(rotate: bool) -> None:
    """It spreads over the new basis if moments are turned, else it stays where it is."""
    model, optimizer, _ = both(Tokens, rotate_moments=rotate, **SECOND)
    beta = ADAMW['betas'][1]
    run(model, optimizer, range(3))
    old = torch.eye(6).double(), torch.eye(7).double()
    for step in range(3, 9):
        before = joint(model, optimizer, 'exp_avg_sq')
        run(model, optimizer, range(step, step + 1))
        u1, u2 = bases(optimizer)
        square = (u1.mT @ joint(model, optimizer, 'grad') @ u2) ** 2
        if rotate:
            before = ((old[0].mT @ u1) ** 2).mT @ before @ (old[1].mT @ u2) ** 2
        torch.testing.assert_close(
            joint(model, optimizer, 'exp_avg_sq'),
            beta * before + (1 - beta) * square,
            rtol=1e-10,
            atol=1e-18,
        )
        old = u1, u2


def test_the_thesis_form_turns_nothing() -> None:
    """Its first moment goes on in place, whatever the basis."""
    model, optimizer, _ = both(Tokens, rotate_moments=False, stat_interval=1, refresh_interval=2)
    beta = ADAMW['betas'][0]
    run(model, optimizer, range(1))
    for step in range(1, 6):
        before = joint(model, optimizer, 'exp_avg')
        run(model, optimizer, range(step, step + 1))
        u1, u2 = bases(optimizer)
        turned = u1.mT @ joint(model, optimizer, 'grad') @ u2
        torch.testing.assert_close(
            joint(model, optimizer, 'exp_avg'),
            beta * before + (1 - beta) * turned,
            rtol=0,
            atol=1e-12,
        )


@pytest.mark.parametrize('rotate', [True, False])
def test_the_first_basis_brings_no_jump(rotate: bool) -> None:
    """Noise alone: an Adam step has about the same length in any basis."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64, bias=False)
    optimizer = AdamR(
        model, lr=1e-3, rotate_moments=rotate, stat_interval=5, refresh_interval=20, **LATE
    )
    lengths = []
    for _ in range(22):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        (model(torch.randn(256, 64)) * torch.randn(256, 64)).mean().backward()
        optimizer.step()
        lengths.append(float((model.weight.detach() - before).norm()))
    assert max(lengths[19:]) < 3 * max(lengths[10:19]), lengths


# ------------------------------------------------------------------- resuming

KINDS: dict[str, dict[str, Any]] = {
    'eigh': {},
    'qr': dict(basis_solver='qr'),
    'thesis': dict(rotate_moments=False),
    'Adan': RULES['Adan'],
    'one-sided': dict(max_dim=6, oversize='one_sided'),
}


def late(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Uses the layer `second` from step 5 on, in float32."""
    for step in steps:
        optimizer.zero_grad()
        make_loss(rows(step, 12, 6).float(), use_second=step >= 5)(model).backward()
        optimizer.step()


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('at', [2, 3, 4, 5, 7, 8, 11])
def test_a_resumed_run_continues_bit_for_bit(kind: str, at: int) -> None:
    """Saved before, at and after refreshes; those are at the ends of steps 4, 8 and 12."""
    settings = ADAMW | SECOND | KINDS[kind]
    model = Tokens()
    optimizer = AdamR(model, **settings, **LATE)
    late(model, optimizer, range(at))
    twin = copy.deepcopy(model)
    resumed = AdamR(twin, **settings, **LATE)
    kept = saved(optimizer.state_dict())
    resumed.load_state_dict(kept)
    assert differences(resumed.state_dict(), kept) == []
    late(model, optimizer, range(at, 14)), late(twin, resumed, range(at, 14))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


def test_a_run_that_is_resumed_before_its_first_capture_keeps_its_schedule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = ADAMW | dict(stat_interval=3, refresh_interval=6)
    model = Tokens()
    optimizer = AdamR(model, **settings, **LATE)
    late(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    resumed = AdamR(twin, **settings, **LATE)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        resumed.load_state_dict(saved(optimizer.state_dict()))
    assert warnings_of(caplog) == []
    late(model, optimizer, range(2, 8)), late(twin, resumed, range(2, 8))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


def test_moments_in_a_basis_that_was_not_saved_are_of_no_use() -> None:
    """A resumed run without curvature takes them for raw ones, which they are not."""
    settings = ADAMW | SECOND | dict(weight_decay=0.0, save_curvature=False)
    model = Tokens().double()
    optimizer = AdamR(model, **settings, **LATE)
    run(model, optimizer, range(6))
    twin = copy.deepcopy(model)
    resumed = AdamR(twin, **settings, **LATE)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    moved = stepped(twin, resumed, 6)['first.weight']
    fresh = copy.deepcopy(model)
    anew = stepped(fresh, AdamR(fresh, **settings, **LATE), 6)['first.weight']
    torch.testing.assert_close(moved, anew, rtol=0, atol=1e-12)


@pytest.mark.parametrize('kind, count', [(AdamR, 2), (SOAP, 1)])
def test_rotated_moments_of_a_weight_that_is_in_no_layer_now_start_anew(
    kind: type[PreconditionedOptimizer], count: int, caplog: pytest.LogCaptureFixture
) -> None:
    """SOAP rotates the weight alone, AdamR also its bias."""
    settings = dict(lr=0.01, stat_interval=1, refresh_interval=2)
    model = Tokens()
    groups = [
        dict(params=[model.first.weight, model.first.bias], precondition=False),
        dict(params=[p for n, p in model.named_parameters() if not n.startswith('first')]),
    ]
    optimizer = kind(groups, model=model, **settings)
    before = kind([dict(params=g['params']) for g in groups], model=model, **settings)
    late(model, before, range(6))
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        optimizer.load_state_dict(saved(before.state_dict()))
    assert f'start anew (of parameters: {count})' in caplog.text
    assert model.first.weight not in optimizer.state
    assert 'exp_avg' in optimizer.state[model.third.weight]


# ------------------------------------------------------------------- failures


def spoil(optimizer: PreconditionedOptimizer, name: str, value: float = float('nan')) -> None:
    """Sets one entry of a layer's running statistic."""
    for stack in optimizer.curvature.stacks:
        for k, member in enumerate(stack.members):
            if member.layer.name == name:
                stack.statistics['input_moment'][k, 0, 1, 2] = value


@pytest.mark.parametrize('solver', ['eigh', 'qr'])
def test_a_failed_refresh_keeps_the_last_basis(
    solver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The failed layer goes on as if no refresh had been due; others of its shape get theirs."""
    model, optimizer, reference = both(Tokens, basis_solver=solver, **SECOND)
    follow(model, optimizer, reference, tokens, 6)
    old = bases(optimizer), bases(optimizer, 'third.weight')
    spoil(optimizer, 'first.weight')
    for side in sum(reference.sides[reference.model.first.weight], []):
        side.kept = False
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        follow(model, optimizer, reference, lambda t: tokens(6 + t), 5)
    assert all(torch.equal(a, b) for a, b in zip(old[0], bases(optimizer), strict=True))
    assert not any(
        torch.equal(a, b) for a, b in zip(old[1], bases(optimizer, 'third.weight'), strict=True)
    )
    (message,) = warnings_of(caplog)
    assert 'first.weight' in message and 'last good operator' in message
    state = entry(optimizer, 'first.weight')
    assert (state['refreshes'], state['failures']) == (1, 1)


def test_a_failed_first_refresh_leaves_adamw() -> None:
    model = nn.Linear(6, 3).double()
    optimizer = AdamR(model, **ADAMW, **SECOND, **LATE)
    other = plain_copy(model)
    theirs = torch.optim.AdamW(other.parameters(), **ADAMW)
    run(model, optimizer, range(2))
    spoil(optimizer, 'weight')
    run(model, optimizer, range(2, 7)), run(other, theirs, range(7))
    assert equals(model, other) and entry(optimizer, 'weight')['failures'] == 1
    for stack in optimizer.curvature.stacks:  # sound again: the next refresh is the first
        stack.statistics['input_moment'][0, 0] = torch.diag(torch.arange(1.0, 8.0).double())
    run(model, optimizer, range(7, 8))
    assert entry(optimizer, 'weight')['refreshes'] == 1


def test_a_basis_from_the_retry_in_float64_follows_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one from the first attempt does; the failing one would have been another."""
    settings = ADAMW | dict(stat_interval=1, refresh_interval=3)
    model = Tokens()
    twin = copy.deepcopy(model)
    optimizer, other = AdamR(model, **settings, **LATE), AdamR(twin, **settings, **LATE)
    late(model, optimizer, range(3)), late(twin, other, range(3))
    real = EigenRotation.refresh

    def refresh(method: EigenRotation, factors: dict[Side, Factor], *rest: Any) -> Any:
        operator, good = real(method, factors, *rest)
        return operator, good & (factors[INPUT].tensor.dtype == torch.float64)

    late(twin, other, range(3, 6))
    monkeypatch.setattr(EigenRotation, 'refresh', refresh)
    late(model, optimizer, range(3, 6))
    assert entry(optimizer, 'first.weight')['refreshes'] == 2
    for ours, theirs in zip(bases(optimizer), bases(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
    assert equals(model, twin, 1e-3)


@pytest.mark.parametrize('kind', [AdamR, AdamWBK])
def test_an_eigh_that_does_not_converge_is_retried_in_float64(
    kind: type[PreconditionedOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises of finite matrices with many equal eigenvalues, on GPUs above all."""
    model = Tokens()
    solver = dict(solver='eigh') if kind is AdamWBK else {}
    optimizer = kind(model, lr=0.01, stat_interval=1, refresh_interval=1, **solver)
    real = torch.linalg.eigh

    def eigh(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError('linalg.eigh: The algorithm failed to converge')
        return real(matrix)

    monkeypatch.setattr(torch.linalg, 'eigh', eigh)
    late(model, optimizer, range(3))
    assert entry(optimizer, 'first.weight')['refreshes'] == 3


def test_the_third_failure_in_a_row_is_an_error() -> None:
    model, optimizer, _ = both(Tokens, stat_interval=1, refresh_interval=1)
    run(model, optimizer, range(2))
    spoil(optimizer, 'first.weight')
    run(model, optimizer, range(2, 4))
    with pytest.raises(RefreshError, match='first.weight: 3 refreshes') as caught:
        run(model, optimizer, range(4, 5))
    assert '\n' not in str(caught.value)


def test_the_error_of_a_failure_names_settings_that_exist() -> None:
    model, optimizer, _ = both(Tokens, stat_interval=1, refresh_interval=1)
    run(model, optimizer, range(1))
    spoil(optimizer, 'first.weight')
    with pytest.raises(RefreshError) as caught:
        run(model, optimizer, range(1, 4))
    assert '`damping`' not in str(caught.value)
