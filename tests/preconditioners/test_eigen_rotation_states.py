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
from mmprecond.optimizers import AdamR, AdamWBK, Preconditioned, PreconditionedOptimizer
from mmprecond.preconditioners import EigenRotation
from mmprecond.rules import AdamW, Adan
from tests.reference.factors import plain_copy
from tests.support.errors import refused, warnings_of
from tests.support.rotation import ADAMW, RULES, SECOND, both, entry, equals, run, tokens
from tests.support.states import differences, everything, saved
from tests.support.trajectories import Tokens, follow, make_loss
from tests.support.trajectories import batch as rows


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Tensor]:
    """By how much one step moves each parameter."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, optimizer, range(step, step + 1))
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


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
    optimizer = AdamR(model, lr=1e-3, rotate_moments=rotate, stat_interval=5, refresh_interval=20)
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
    optimizer = AdamR(model, **settings)
    late(model, optimizer, range(at))
    twin = copy.deepcopy(model)
    resumed = AdamR(twin, **settings)
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
    optimizer = AdamR(model, **settings)
    late(model, optimizer, range(2))
    twin = copy.deepcopy(model)
    resumed = AdamR(twin, **settings)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        resumed.load_state_dict(saved(optimizer.state_dict()))
    assert warnings_of(caplog) == []
    late(model, optimizer, range(2, 8)), late(twin, resumed, range(2, 8))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


def test_moments_in_a_basis_that_was_not_saved_are_of_no_use() -> None:
    """A resumed run without curvature takes them for raw ones, which they are not."""
    settings = ADAMW | SECOND | dict(weight_decay=0.0, save_curvature=False)
    model = Tokens().double()
    optimizer = AdamR(model, **settings)
    run(model, optimizer, range(6))
    twin = copy.deepcopy(model)
    resumed = AdamR(twin, **settings)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    moved = stepped(twin, resumed, 6)['first.weight']
    fresh = copy.deepcopy(model)
    anew = stepped(fresh, AdamR(fresh, **settings), 6)['first.weight']
    torch.testing.assert_close(moved, anew, rtol=0, atol=1e-12)


# ------------------------------------------------------------------- failures


def spoil(optimizer: PreconditionedOptimizer, name: str, value: float = float('nan')) -> None:
    """Sets one entry of a layer's running statistic."""
    for stack in optimizer.curvature.stacks:
        for k, slot in enumerate(stack.slots):
            if slot.layer.name == name:
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
    optimizer = AdamR(model, **ADAMW, **SECOND)
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
    optimizer, other = AdamR(model, **settings), AdamR(twin, **settings)
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


# ------------------------------------------------------------------- layers and methods


@pytest.mark.parametrize(
    'frozen',
    [
        pytest.param(
            'third.bias',
            marks=pytest.mark.xfail(
                strict=True,
                reason=('the bias column of the rotated gradient has no moments and is dropped'),
            ),
        ),
        'first.weight',
        'second',
    ],
)
def test_frozen_parameters(frozen: str) -> None:
    """With a frozen bias the direction of G = [G_W | 0], or that of G_W alone, is right."""
    model, optimizer, reference = both(Tokens, **SECOND)
    alone = both(Tokens, overrides={'third.bias': dict(precondition=False)}, **SECOND)[2]
    for net in (model, reference.model, alone.model):
        part = (net.get_submodule if '.' not in frozen else net.get_parameter)(frozen)
        part.requires_grad_(False)
    run(model, optimizer, range(9))
    for step in range(9):
        reference.step(*tokens(step)), alone.step(*tokens(step))
    assert equals(model, reference.model, 1e-9) or equals(model, alone.model, 1e-9)


def mixed(rule: dict[str, Any]) -> list[dict[str, Any]]:
    settings = dict(stat_interval=2, refresh_interval=4)
    return [
        dict(match=dict(name='first'), preconditioner=dict(type='EigenRotation', **settings)),
        dict(match=dict(name='last'), preconditioner=None),
        dict(preconditioner=dict(type=rule, **settings)),
    ]


def preconditioned(
    model: nn.Module, layers: list[dict[str, Any]], **rule: Any
) -> PreconditionedOptimizer:
    return Preconditioned(model, layers=layers, rule=dict(type='AdamW', **ADAMW) | rule)


def test_preconditioned_is_adamr() -> None:
    model, optimizer, _ = both(Tokens, **SECOND)
    twin = plain_copy(model)
    other = preconditioned(twin, [dict(preconditioner=dict(type='EigenRotation', **SECOND))])
    run(model, optimizer, range(9)), run(twin, other, range(9))
    assert equals(model, twin, 0.0)


def test_mixed_methods_each_keep_their_steps() -> None:
    """One counts steps from 1, the other from 0; both work on the same rule."""
    model = Tokens().double()
    optimizer = preconditioned(model, mixed('NewtonKronecker'))
    assert {
        layer.name: type(stack.method).__name__
        for layer, stack in optimizer.curvature.layers.items()
    } == {
        'first.weight': 'EigenRotation',
        'second.weight': 'NewtonKronecker',
        'third.weight': 'NewtonKronecker',
    }
    run(model, optimizer, range(1))
    assert set(optimizer.state_dict()['precond']['layers']) == {'second.weight', 'third.weight'}
    run(model, optimizer, range(1, 6))
    for name, samples, refreshes in (('first.weight', 3, 1), ('second.weight', 3, 2)):
        found = entry(optimizer, name)
        assert (found['samples'], found['refreshes']) == (samples, refreshes)
    # A layer's step depends on its own method alone.
    kept, twin = saved(optimizer.state_dict()), copy.deepcopy(model)
    again = preconditioned(twin, mixed('NewtonKronecker'))
    again.load_state_dict(copy.deepcopy(kept))
    ours = stepped(twin, again, 6)
    for kind, name in (('EigenRotation', 'first.weight'), ('NewtonKronecker', 'second.weight')):
        other = copy.deepcopy(model)
        lone = preconditioned(other, [dict(preconditioner=dict(type=kind, **SECOND))])
        state = copy.deepcopy(kept)
        state['precond']['layers'] = {name: state['precond']['layers'][name]}
        lone.load_state_dict(state)
        torch.testing.assert_close(stepped(other, lone, 6)[name], ours[name], rtol=0, atol=1e-12)


def test_it_does_not_work_with_sgdm() -> None:
    refused(
        ValueError,
        lambda: Preconditioned(
            Tokens(), rule=dict(type='SGDM', lr=0.1), layers=mixed('NewtonKronecker')
        ),
        'EigenRotation',
        'SGDM',
        "rule=dict(type='AdamW'",
    )


# ------------------------------------------------------------------- settings


def test_default_settings() -> None:
    optimizer = AdamR(nn.Linear(3, 2), lr=0.1)
    (method,) = {stack.method for stack in optimizer.curvature.stacks}
    assert (
        method
        == EigenRotation()
        == EigenRotation(
            stat_interval=100,
            refresh_interval=1000,
            basis_eps=0.01,
            basis_solver='eigh',
            rotate_moments=True,
        )
    )
    assert type(optimizer.rule) is AdamW and optimizer.rule.decay == 'decoupled'
    assert optimizer.defaults == dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    adan = AdamR(nn.Linear(3, 2), lr=0.1, rule='Adan')
    assert type(adan.rule) is Adan and adan.defaults['betas'] == (0.98, 0.92, 0.99)


@pytest.mark.parametrize(
    'name, value, remedy',
    [
        ('basis_eps', -0.1, 'at least 0'),
        ('basis_eps', float('nan'), 'give a number'),
        ('basis_solver', 'svd', 'eigh, qr'),
        ('rotate_moments', 1, 'neither True nor False'),
        ('rotate_moments', None, 'neither True nor False'),
        ('rule', 'SGDM', 'AdamW, Adan'),
        ('rule', None, 'AdamW, Adan'),
        ('stat_interval', 0, 'at least 1'),
        ('stat_interval', 300, 'multiple'),
        ('refresh_interval', 150, 'multiple'),
        ('betas', (0.9,), 'betas=(0.9, 0.999)'),
        ('eps', -1.0, 'at least 0'),
        ('max_dim', 0, 'at least 1'),
        ('oversize', 'crop', 'skip, one_sided'),
    ],
)
def test_values_out_of_range(name: str, value: Any, remedy: str) -> None:
    refused(ValueError, lambda: AdamR(nn.Linear(2, 2), **{'lr': 0.1, name: value}), name, remedy)


@pytest.mark.parametrize('key', ['momentum', 'damping', 'stat_decay', 'norm_recovery', 'decay'])
def test_a_left_over_key_says_delete(key: str) -> None:
    refused(
        TypeError,
        lambda: AdamR(nn.Linear(2, 2), lr=0.1, **{key: 0.9}),
        'AdamR',
        key,
        '`_delete_=True`',
        'basis_eps',
    )


def test_a_model_and_its_parameters() -> None:
    refused(
        ValueError,
        lambda: AdamR(nn.Linear(2, 2).parameters(), lr=0.1),
        'AdamR',
        'model=',
        "constructor='PrecondOptimWrapperConstructor'",
    )
