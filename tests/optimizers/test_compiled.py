"""Compiled models: measured as often as eager ones, and compiled in between."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.support.every_optimizer import (
    MEASURED,
    SETTINGS,
    backward,
    images,
    make,
    mostly_slow,
    net,
    train,
)
from tests.support.states import differences

EAGER = 'eager'


pytestmark = pytest.mark.usefixtures('fresh_compiler')


def samples(optimizer: Any) -> dict[str, int]:
    """Samples of each layer so far."""
    layers = optimizer.state_dict().get('precond', {}).get('layers', {})
    return {name: state['samples'] for name, state in layers.items()}


def close(model: nn.Module, other: nn.Module, atol: float = 1e-10) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, msg=lambda text: name + text)


def both(
    name: str, when: str, steps: int = 9, backend: Any = 'aot_eager', **settings: Any
) -> tuple[tuple[nn.Module, Any], tuple[nn.Module, Any]]:
    """An eager and a compiled run: the model is compiled before or after the optimizer is made."""
    plain, inner = net(), net()
    eager = make(name, plain, **settings)
    if when == 'in place':
        inner.compile(backend=backend)
        compiled: Any = inner
        ours = make(name, inner, **settings)
    elif when == 'before':
        compiled = torch.compile(inner, backend=backend)
        ours = make(name, compiled, **settings)
    else:
        ours = make(name, inner, **settings)
        compiled = torch.compile(inner, backend=backend)
    if when == 'used before':
        with torch.no_grad():
            compiled(torch.zeros(6, 3, 8, 8).double())
        compiled(torch.zeros(6, 3, 8, 8).double()).sum().backward()
        inner.zero_grad()
    train(name, plain, eager, range(steps))
    train(name, compiled, ours, range(steps))
    return (plain, eager), (inner, ours)


@pytest.mark.parametrize('name', mostly_slow(SETTINGS))
def test_every_optimizer_measures_a_compiled_model_as_an_eager_one(name: str) -> None:
    (plain, eager), (inner, ours) = both(name, 'before')
    assert samples(ours) == samples(eager)
    if name in MEASURED:
        assert all(count >= 2 for count in samples(ours).values())
    close(inner, plain)


@pytest.mark.parametrize('when', ['in place', 'after', 'used before'])
@pytest.mark.parametrize('name', ['AdamR', 'NKFAC', 'AFOpt'])
@pytest.mark.parametrize('stagger', [False, True])
def test_it_does_not_matter_when_it_is_compiled(name: str, when: str, stagger: bool) -> None:
    (plain, eager), (inner, ours) = both(name, when, stagger=stagger)
    assert samples(ours) == samples(eager) and all(samples(ours).values())
    close(inner, plain)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['AdamR', 'NKFAC', 'MAC'])
def test_inductor(name: str) -> None:
    (plain, eager), (inner, ours) = both(name, 'before', backend='inductor')
    assert samples(ours) == samples(eager) and all(samples(ours).values())
    close(inner, plain, 1e-8)


class Counted:
    """A backend that runs graphs as they are, and counts how often."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.mark.parametrize('name', ['AdamR', 'NKFAC', 'SGDPH'])
def test_between_captures_the_compiled_code_runs(name: str) -> None:
    """One graph, without breaks, that is never compiled again."""
    backend = Counted()
    settings: dict[str, Any] = (
        {} if name == 'SGDPH' else dict(stat_interval=3, refresh_interval=3, early_refreshes=False)
    )
    if name == 'SGDPH':
        settings = dict(interval=3)
    inner = net()
    compiled = torch.compile(inner, backend=backend)
    optimizer = make(name, compiled, **settings)
    seen = []
    for step in range(9):
        before = backend.runs
        train(name, compiled, optimizer, range(step, step + 1))
        seen.append(backend.runs - before)
    due = 2 if name == 'AdamR' else 0  # AdamR counts from 1
    assert seen == [0 if step % 3 == due else 1 for step in range(9)]
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']


def test_a_resumed_run_of_a_compiled_model() -> None:
    whole = both('AdamR', 'before', 9)[1][0]
    inner = net()
    compiled: Any = torch.compile(inner, backend='aot_eager')
    optimizer = make('AdamR', compiled)
    train('AdamR', compiled, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    twin = copy.deepcopy(inner)
    again: Any = torch.compile(twin, backend='aot_eager')
    resumed = make('AdamR', again)
    with torch.no_grad():
        again(torch.zeros(6, 3, 8, 8).double())  # compiled before anything is measured
    resumed.load_state_dict(state)
    train('AdamR', again, resumed, range(3, 9))
    close(twin, whole, 1e-12)


def test_other_models_are_compiled_again_once_it_is_gone() -> None:
    backend = Counted()
    other = torch.compile(nn.Linear(2, 2), backend=backend)
    optimizer = make('NKFAC', net())
    second = make('AdamR', net())
    other(torch.zeros(1, 2))
    assert backend.runs == 0  # the next step measures
    optimizer.disarm()
    second.disarm()
    other(torch.zeros(1, 2))
    assert backend.runs == 1
    optimizer.arm()
    del optimizer
    gc.collect()
    other(torch.zeros(1, 2))
    assert backend.runs == 2


def test_a_users_stance_is_restored() -> None:
    backend = Counted()
    other = torch.compile(nn.Linear(2, 2), backend=backend)
    optimizer = make('NKFAC', net())
    optimizer.disarm()
    with torch.compiler.set_stance('force_eager'):
        optimizer.arm()
        optimizer.disarm()
        other(torch.zeros(1, 2))
    assert backend.runs == 0


def test_states_of_eager_and_compiled_runs_are_interchangeable() -> None:
    (_, eager), (_, ours) = both('NKFAC', 'before')
    assert eager.state_dict()['precond'].keys() == ours.state_dict()['precond'].keys()
    layers = [o.state_dict()['precond']['layers'] for o in (eager, ours)]
    assert layers[0].keys() == layers[1].keys()
    assert not differences(
        {k: v['samples'] for k, v in layers[0].items()},
        {k: v['samples'] for k, v in layers[1].items()},
    )


# Torch's compiler cannot trace an assignment to an attribute of an optimizer, such as SOAA's loss.
@pytest.mark.parametrize('name', mostly_slow([name for name in SETTINGS if name != 'SOAA']))
def test_a_compiled_step_breaks_its_graph_at_the_optimizer(name: str) -> None:
    """A user's function of the whole step, `zero_grad` and `step` included."""
    weights = []
    for compiled in (False, True):
        model = net()
        optimizer = make(name, model)

        def step(x: Any, y: Any, model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            backward(name, optimizer, nn.functional.cross_entropy(model(x), y))
            optimizer.step()

        run: Any = torch.compile(step, backend='aot_eager') if compiled else step
        for seed in range(5):
            run(*images(seed))
        weights.append(model)
    close(*weights)
