"""Whole trajectories against a layer-by-layer NKFAC and AdaNKFAC in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import NKFAC, AdaNKFAC, PreconditionedOptimizer
from tests.reference.factors import Loss, plain_copy
from tests.reference.nkfac import ReferenceNKFAC
from tests.support.trajectories import ADAM, SGD, Convs, Tokens, batch, follow, make_loss


def both(
    make: Callable[[], nn.Module], rule: dict[str, Any], **settings: Any
) -> tuple[nn.Module, PreconditionedOptimizer, ReferenceNKFAC]:
    model = make().double()
    kind = AdaNKFAC if 'betas' in rule else NKFAC
    intervals = dict(stat_interval=1, refresh_interval=1)
    reference = ReferenceNKFAC(plain_copy(model), **rule, **{**intervals, **settings})
    return model, kind(model, **rule, **{**intervals, **settings}, settings='published'), reference


@pytest.mark.parametrize('rule', [SGD, ADAM], ids=['NKFAC', 'AdaNKFAC'])
@pytest.mark.parametrize('make', [Convs, Tokens])
def test_every_step_measures_and_refreshes(make: Any, rule: dict[str, Any]) -> None:
    model, optimizer, reference = both(make, rule)
    follow(model, optimizer, reference, lambda t: [make_loss(batch(t, features=make.features))], 6)


@pytest.mark.parametrize(
    'settings',
    [
        dict(stat_interval=2, refresh_interval=4),
        dict(stat_interval=3, refresh_interval=3),
        dict(refresh_interval=2),
        dict(newton_steps=3),
        dict(exact_interval=4),
        dict(solver='cholesky'),
        dict(damping=0.3, stat_decay=0.5),
        dict(damping=1e-5),
        dict(stat_decay=0.0),
    ],
    ids=str,
)
def test_settings(settings: dict[str, Any]) -> None:
    model, optimizer, reference = both(Tokens, SGD, **settings)
    follow(model, optimizer, reference, lambda t: [make_loss(batch(t, features=6))], 13)


def test_momentum_zero_and_no_decay() -> None:
    model, optimizer, reference = both(Tokens, dict(lr=0.05, momentum=0.0))
    follow(model, optimizer, reference, lambda t: [make_loss(batch(t, features=6))], 6)


@pytest.mark.parametrize('make', [Convs, Tokens])
def test_accumulation(make: Any) -> None:
    model, optimizer, reference = both(make, SGD)

    def losses(step: int) -> list[Loss]:
        x = batch(step, 5, make.features)
        return [make_loss(part, 2.0) for part in (x[:2], x[2:])]

    follow(model, optimizer, reference, losses, 4)


@pytest.mark.parametrize(
    'used',
    [lambda t: t >= 1, lambda t: t >= 2, lambda t: t % 3 == 0, lambda t: t % 2 == 1],
    ids=['from 1', 'from 2', '3rd', 'odd'],
)
@pytest.mark.parametrize('stat_interval', [1, 2])
def test_a_layer_used_now_and_then(used: Callable[[int], bool], stat_interval: int) -> None:
    """It joins layers of its shape late, takes the plain rule before, and keeps its schedule."""
    model, optimizer, reference = both(Tokens, SGD, stat_interval=stat_interval, refresh_interval=4)
    follow(
        model,
        optimizer,
        reference,
        lambda t: [make_loss(batch(t, features=6), use_second=used(t))],
        10,
    )


@pytest.mark.parametrize(
    'frozen',
    [['first.weight'], ['third.weight', 'third.bias'], ['second.bias'], ['last.weight']],
    ids=str,
)
def test_frozen_parameters_stay(frozen: list[str]) -> None:
    """A layer with a frozen weight takes the plain rule for its bias."""
    model, optimizer, reference = both(Tokens, SGD)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
        reference.model.get_parameter(name).requires_grad_(False)
    before = {name: model.get_parameter(name).detach().clone() for name in frozen}
    follow(model, optimizer, reference, lambda t: [make_loss(batch(t, features=6))], 5)
    assert all(torch.equal(before[name], model.get_parameter(name)) for name in frozen)


def test_an_empty_batch_among_others() -> None:
    """A call with zero rows beside a full one, and a step with zero rows alone."""
    model, optimizer, reference = both(Tokens, SGD)

    def losses(step: int) -> list[Loss]:
        x = batch(step, features=6)
        empty: Loss = lambda model: model(x[:0]).sum()
        return [empty] if step == 2 else [make_loss(x), empty]

    follow(model, optimizer, reference, losses, 5)


def test_many_layers_of_one_shape_are_each_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refreshed and applied in one batch; also where a refresh is cut into chunks."""
    torch.manual_seed(0)
    make = lambda: nn.Sequential(
        *[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5)], nn.Linear(6, 3)
    )
    for chunk_bytes in (2**29, 1500):
        model, optimizer, reference = both(make, SGD)
        reference.model.load_state_dict(model.state_dict())
        monkeypatch.setattr('mmprecond.core.stack.CHUNK_BYTES', chunk_bytes)
        assert len(optimizer.curvature.stacks) == 2
        follow(model, optimizer, reference, lambda t: [make_loss(batch(t, features=6))], 6)


def test_float32_follows_float64() -> None:
    model = Convs()
    reference = ReferenceNKFAC(plain_copy(model), **SGD)
    optimizer = NKFAC(model, **SGD, stat_interval=1, refresh_interval=1, settings='published')
    for step in range(4):
        optimizer.zero_grad()
        make_loss(batch(step).float())(model).backward()
        optimizer.step()
        reference.step(make_loss(batch(step)))
    theirs = dict(reference.model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), theirs[name], rtol=0, atol=2e-3), name


def test_a_closure_gives_the_same_step() -> None:
    model, optimizer, reference = both(Tokens, SGD)
    for step in range(3):
        loss = make_loss(batch(step, features=6))

        def closure(loss: Loss = loss) -> Tensor:
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            return value

        assert torch.allclose(optimizer.step(closure), loss(reference.model))
        reference.step(loss)
    theirs = dict(reference.model.named_parameters())
    assert all(torch.allclose(p, theirs[name], atol=1e-9) for name, p in model.named_parameters())
