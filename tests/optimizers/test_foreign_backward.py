"""Backward passes that are not the step's: saliency maps, penalties, inputs that are optimised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmprecond.optimizers import NKFAC
from tests.support.distributed import leave
from tests.support.every_optimizer import MEASURED, QUICK, Net, images, make, net
from tests.support.states import differences

# ------------------------------------------------------------------- passes that must not count


def saliency(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(5 * model(x), y), x)


def saliency_of_weights(model: nn.Module, x: Tensor, y: Tensor) -> None:
    torch.autograd.grad(F.cross_entropy(5 * model(x), y), list(model.parameters()))


def inputs_alone(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    F.cross_entropy(5 * model(x), y).backward(inputs=[x])


def differentiable(model: nn.Module, x: Tensor, y: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)


def jacobian(model: nn.Module, x: Tensor, y: Tensor) -> None:
    torch.autograd.functional.jacobian(model, x[:1])


def transformed(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """`torch.func`: transforms of a function of the inputs, and of the parameters."""
    torch.func.jacrev(model)(x[:1])
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (one[None],)).square().sum()

    torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:2])


def failing(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """A pass that ends half-way."""

    def stop(_: Tensor) -> None:
        raise KeyError('stop')

    x = x.clone().requires_grad_()
    x.register_hook(stop)
    with pytest.raises(KeyError):
        torch.autograd.grad(F.cross_entropy(5 * model(x), y), x)


def evaluation(model: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        model(x)


FOREIGN = [saliency, saliency_of_weights, inputs_alone, differentiable, jacobian, transformed]
Foreign = Callable[[nn.Module, Tensor, Tensor], None]


def run(
    name: str,
    model: Any,
    optimizer: Any,
    foreign: Foreign | None,
    when: str = '',
    sizes: tuple[int, ...] = (6,),
    steps: range = range(6),
) -> None:
    for step in steps:
        optimizer.zero_grad()
        xs, ys = images(step)
        for x, y in zip(xs.split(sizes), ys.split(sizes), strict=True):
            if foreign and when == 'before':
                foreign(model, x, y)
            loss = F.cross_entropy(model(x), y, reduction='sum') / 6
            if foreign and when == 'between':
                foreign(model, x, y)
            loss.backward()
            if foreign and when == 'after':
                foreign(model, x, y)
        optimizer.step()


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return copy.deepcopy(dict(model=dict(model.state_dict()), state=optimizer.state_dict()))


@cache
def undisturbed(name: str) -> dict[str, Any]:
    """State after a run without foreign passes."""
    return disturbed(name, None, '')


def disturbed(name: str, foreign: Foreign | None, when: str) -> dict[str, Any]:
    model = net()
    optimizer = make(name, model)
    run(name, model, optimizer, foreign, when)
    return state_of(model, optimizer)


@pytest.mark.parametrize('when', ['before', 'between', 'after'])
@pytest.mark.parametrize('foreign', FOREIGN)
@pytest.mark.parametrize('name', [name for name in MEASURED if name in QUICK])
def test_they_leave_no_trace(name: str, foreign: Foreign, when: str) -> None:
    assert differences(undisturbed(name), disturbed(name, foreign, when)) == []


@pytest.mark.slow
@pytest.mark.parametrize('foreign', FOREIGN)
@pytest.mark.parametrize('name', [name for name in MEASURED if name not in QUICK])
def test_nor_with_any_other_method(name: str, foreign: Foreign) -> None:
    assert differences(undisturbed(name), disturbed(name, foreign, 'between')) == []


@pytest.mark.parametrize('checkpointed', [None, False, True])
@pytest.mark.parametrize('when', ['before', 'between', 'after'])
@pytest.mark.parametrize(
    'name, settings',
    [
        ('NKFAC', {}),
        ('KFAC', dict(reduction='sample')),
        ('SKFAC', dict(reduction='sample', max_columns=6)),
        ('NysAct', dict(sketch='columns')),
        ('AdamR', dict(stagger=True)),
        ('MAC', {}),
    ],
)
def test_nor_with_accumulation_checkpointing_and_draws(
    name: str, settings: dict[str, Any], when: str, checkpointed: bool | None
) -> None:
    """Micro-batches of unequal size; what is drawn at random is drawn for the step alone."""
    # Reentrant checkpointing refuses all but a pass without gradients.
    foreign = [evaluation] if checkpointed else [saliency, inputs_alone]
    found = []
    for one in (None, *foreign, *([differentiable] if checkpointed is None else [])):
        model = net(checkpointed=checkpointed)
        kind: Any = type(make(name, net()))
        given = dict(lr=1e-2, stat_interval=2, refresh_interval=4, **settings)
        optimizer = kind(model, **given, settings='published')
        run(name, model, optimizer, one, when, sizes=(4, 2))
        found.append(state_of(model, optimizer))
    assert len(found) > 1
    for other in found[1:]:
        assert differences(found[0], other) == []


@pytest.mark.parametrize('when', ['before', 'between', 'after'])
def test_a_pass_that_fails_leaves_no_trace(when: str) -> None:
    found = []
    for one in (None, failing):
        model = net()
        optimizer = make('NKFAC', model)
        run('NKFAC', model, optimizer, one, when)
        found.append(state_of(model, optimizer))
    assert differences(*found) == []


def test_inputs_that_name_a_weight_count_for_it_alone() -> None:
    model = net()
    optimizer = make('NKFAC', model)
    x, y = images(0)
    F.cross_entropy(model(x), y).backward(inputs=[model.fc2.weight])
    assert {layer.name for layer in optimizer.curvature.capture.staged} == {'fc2.weight'}


# ------------------------------------------------------------------- double backward


def test_a_gradient_penalty_is_measured_as_the_gradient_of_the_whole_loss() -> None:
    """L is of the gradients of loss + penalty by the outputs; R of the inputs, once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)

    def loss(first: Tensor, out: Tensor) -> Tensor:
        value = out.square().sum(1).mean()
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + 0.5 * slope.square().sum()

    optimizer = NKFAC(model, lr=0.1, settings='published')
    first = model[0](x)
    loss(first, model[2](model[1](first))).backward()
    staged = {k.name: v for k, v in optimizer.curvature.capture.staged.items()}
    optimizer.disarm()
    first = model[0](x)
    hidden = model[1](first)
    out = model[2](hidden)
    slopes = torch.autograd.grad(loss(first, out), (first, out))
    for name, rows, slope in (('0.weight', x, slopes[0]), ('2.weight', hidden, slopes[1])):
        assert staged[name].rows == 7
        joint = torch.cat([rows, torch.ones(7, 1).double()], 1)
        torch.testing.assert_close(staged[name].sums['input_moment'][0], (joint.T @ joint).detach())
        torch.testing.assert_close(staged[name].sums['gradient_moment'][0], slope.T @ slope)


# ------------------------------------------------------------------- ranks


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    found = {}
    for foreign in (None, saliency, inputs_alone):
        for accumulate in (False, True):
            torch.manual_seed(0)
            model = Net().double()
            wrapped = DistributedDataParallel(model)
            optimizer = make('NKFAC', wrapped)
            for step in range(5):
                optimizer.zero_grad()
                x, y = images(2 * step + rank)
                if accumulate:
                    with wrapped.no_sync():
                        if foreign:
                            foreign(model, x, y)
                        F.cross_entropy(wrapped(x[:2]), y[:2], reduction='sum').div(6).backward()
                    x, y = x[2:], y[2:]
                loss = F.cross_entropy(wrapped(x), y, reduction='sum') / 6
                if foreign:
                    foreign(model, x, y)
                loss.backward()
                optimizer.step()
            key = foreign.__name__ if foreign else ''
            found[key, accumulate] = state_of(model, optimizer)
    torch.save(found, f'{folder}/{rank}.pt')
    leave()


def test_two_ranks(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f'{rank}.pt', weights_only=False) for rank in range(2)]
    for accumulate in (False, True):
        base = ranks[0]['', accumulate]
        for rank in ranks:
            for key in ('', 'saliency', 'inputs_alone'):
                assert differences(base['model'], rank[key, accumulate]['model']) == []
                assert differences(base, rank[key, accumulate]) == []
