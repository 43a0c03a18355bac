"""overhead=...: the share of the time that captures and refreshes may take chooses intervals."""

from __future__ import annotations

import copy
import logging
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmprecond.core import overhead
from mmprecond.core.overhead import LONGEST, SHORTEST, Times, choose_intervals
from mmprecond.core.samples import SampleCollector
from mmprecond.optimizers import KFAC, NKFAC, AdaFisher, AdamR, AFOpt, Preconditioned
from mmprecond.preconditioners import NewtonKronecker
from tests.support.distributed import leave
from tests.support.mixed import Net

PLAIN, CAPTURE, REFRESH = 1.0, 0.2, 3.0
STEPS = 50


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the clock of the search; a refresh of NKFAC takes `REFRESH` seconds of it."""
    clock = Clock()
    monkeypatch.setattr(overhead, 'time', clock)
    refresh = NewtonKronecker.refresh

    def slow(method: Any, *args: Any) -> Any:
        clock.now += REFRESH
        return refresh(method, *args)

    monkeypatch.setattr(NewtonKronecker, 'refresh', slow)
    return clock


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()


def train(model: nn.Module, optimizer: Any, steps: range, clock: Clock | None = None) -> list[int]:
    """Trains, moves the clock by the time of an iteration, and returns the steps with captures."""
    captured = []
    for step in steps:
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(step)).double()
        due = bool(optimizer.curvature.due(step))
        captured += [step] * due
        if clock is not None:
            clock.now += PLAIN + CAPTURE * due
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return captured


positive = st.floats(1e-4, 1e3)


@settings(max_examples=500, deadline=None)
@given(plain=positive, capture=st.just(0.0) | positive, refresh=st.just(0.0) | positive)
def test_the_share_is_kept_within_the_bounds(plain: float, capture: float, refresh: float) -> None:
    for share in (0.01, 0.05, 0.5):
        times = Times(plain, capture, refresh)
        captures, refreshes = choose_intervals(times, share)
        assert SHORTEST[0] <= captures <= LONGEST[0]
        assert SHORTEST[1] <= refreshes <= LONGEST[1] and refreshes % captures == 0
        # Where a bound is in the way, nothing is left that could be made longer.
        assert times.share((captures, refreshes)) <= share * 1.001 or (
            captures == LONGEST[0] or refreshes > LONGEST[1] - captures
        )


def test_what_is_chosen() -> None:
    assert choose_intervals(Times(1, 0, 0), 0.05) == SHORTEST
    assert choose_intervals(Times(1, 0.2, 3), 0.05) == (8, 120)  # 0.025 each
    assert choose_intervals(Times(1, 0.01, 3), 0.05) == (5, 65)  # captures leave 0.048
    assert choose_intervals(Times(1, 50, 500), 0.05) == LONGEST


def test_it_measures_and_chooses(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, 'mmprecond')
    model = net()
    optimizer = NKFAC(model, lr=0.01, overhead=0.05, early_refreshes=False)
    assert 'overhead' not in optimizer.state_dict()['precond']
    captured = train(model, optimizer, range(80), clock)
    (method,) = {stack.method for stack in optimizer.curvature.stacks}
    # Two layers of one shape: one refresh of 3 seconds for both.
    assert (method.stat_interval, method.refresh_interval) == (8, 120)
    assert 'a plain iteration takes 1 s, a capture 0.2 s and a refresh 3 s more; at intervals' in (
        caplog.text
    )
    assert 'of 8 and 120 they add 5.0 %' in caplog.text
    assert [step for step in captured if step >= STEPS] == [56, 64, 72]
    assert optimizer.state_dict()['precond']['overhead'] == {
        'share': 0.05,
        'intervals': [8, 120],
    }


def test_a_resumed_run_keeps_what_was_found(clock: Clock) -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.01, overhead=0.05)
    train(model, optimizer, range(STEPS), clock)
    twin = copy.deepcopy(model)
    other = NKFAC(twin, lr=0.01, overhead=0.05)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps = range(STEPS, STEPS + 80)
    assert train(twin, other, steps) == train(model, optimizer, steps)  # the clock stands still
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert (
        other.state_dict()['precond']['overhead'] == optimizer.state_dict()['precond']['overhead']
    )
    # Another share searches again.
    third = NKFAC(copy.deepcopy(model), lr=0.01, overhead=0.1)
    third.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert 'overhead' not in third.state_dict()['precond']


def test_it_can_resume_in_the_middle_of_the_search(clock: Clock) -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.01, overhead=0.05)
    train(model, optimizer, range(7), clock)
    other = NKFAC(model, lr=0.01, overhead=0.05)
    other.load_state_dict(optimizer.state_dict())
    train(model, other, range(7, 7 + STEPS), clock)
    assert other.state_dict()['precond']['overhead']['intervals'][0] == 8


@pytest.mark.parametrize(
    ('setting', 'found'),
    [(dict(stat_interval=4), (4, 2000)), (dict(refresh_interval=140), (10, 140))],
)
def test_given_intervals_stay(
    clock: Clock, setting: dict[str, int], found: tuple[int, int]
) -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.01, overhead=0.045, **setting)
    train(model, optimizer, range(150), clock)
    method = optimizer.curvature.stacks[0].method
    assert (method.stat_interval, method.refresh_interval) == found


@pytest.mark.parametrize(
    ('kind', 'setting', 'found'),
    [
        (NKFAC, dict(stat_interval=20), (20, 80)),  # 0.2 / 20 leaves 0.04 of 0.05 for 3 / 80
        (NKFAC, dict(stat_interval=10), (10, 100)),
        (NKFAC, dict(stat_interval=1), (1, 50)),  # every step captures, which is plain then
        (KFAC, dict(stat_decay=0.0), (5, 65)),  # captures come with refreshes, 3.2 together
        (NKFAC, dict(refresh_interval=2000, early_refreshes=False), (5, 2000)),
    ],
)
def test_the_search_ends_whatever_is_given(
    kind: Any, setting: dict[str, Any], found: tuple[int, int], clock: Clock
) -> None:
    if kind is KFAC:
        refresh = KFAC.preconditioner.refresh

        def slow(method: Any, *args: Any) -> Any:
            clock.now += REFRESH
            return refresh(method, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KFAC.preconditioner, 'refresh', slow)
            optimizer = searched(kind, setting, clock)
    else:
        optimizer = searched(kind, setting, clock)
    method = optimizer.curvature.stacks[0].method
    assert (method.stat_interval, method.refresh_interval) == found


def searched(kind: Any, setting: dict[str, Any], clock: Clock) -> Any:
    """An optimizer after its search."""
    model = net()
    optimizer = kind(model, lr=1e-3, overhead=0.05, **setting)
    train(model, optimizer, range(100), clock)
    assert 'overhead' in optimizer.state_dict()['precond']
    return optimizer


def test_merging_is_a_part_of_a_capture(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes at the end of a step, where it must not fall into the next iteration."""
    finish = SampleCollector.finish

    def slow(collector: Any) -> None:
        clock.now += 1.0 * (collector._pending is not None)
        finish(collector)

    monkeypatch.setattr(SampleCollector, 'finish', slow)
    optimizer = searched(NKFAC, {}, clock)
    # 1.2 / 48 and 3 / 144 of a second.
    assert optimizer.state_dict()['precond']['overhead']['intervals'] == [48, 144]


@pytest.mark.parametrize('steps', [5, STEPS])
def test_copies_hold_no_clock_readings(steps: int, clock: Clock) -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.01, overhead=0.05)
    train(model, optimizer, range(steps), clock)
    search = optimizer.curvature._intervals._search
    assert search is not None and bool(search._steps) == (steps == 5)
    assert pickle.loads(pickle.dumps(search)).__dict__['_steps'] == []


@pytest.mark.parametrize('saved', [None, [7, 50], [0, 0], [True, 4], 'often', {}])
def test_corrupt_intervals_are_measured_anew(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = NKFAC(net(), lr=0.01, overhead=0.05)
    state = optimizer.state_dict()
    state['precond']['overhead'] = {'share': 0.05, 'intervals': saved}
    optimizer.load_state_dict(state)
    assert 'are corrupt; measured anew' in caplog.text
    assert optimizer.curvature.stacks[0].method.stat_interval == 20
    state['precond']['overhead'] = 'often'
    optimizer.load_state_dict(state)


def test_hybrids_and_layer_lists(clock: Clock) -> None:
    for layers in ('AFOpt+NKFAC', [dict(preconditioner=dict(type='NKFAC', stat_interval=4))]):
        model = net()
        rule = dict(type='SGDM', lr=0.01)
        optimizer = Preconditioned(model, rule=rule, layers=layers, overhead=0.05)
        train(model, optimizer, range(STEPS), clock)
        intervals = {stack.method.stat_interval for stack in optimizer.curvature.stacks}
        assert intervals == ({8} if isinstance(layers, str) else {4})


@pytest.mark.parametrize('kind', [AFOpt, AdamR, AdaFisher])
def test_other_methods_search_too(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(overhead, 'time', clock)
    model = net()
    optimizer = kind(model, lr=1e-3, overhead=0.01)
    train(model, optimizer, range(STEPS), clock)
    method = optimizer.curvature.stacks[0].method
    assert (method.stat_interval, method.refresh_interval) == (20, 40)


def test_too_dear_at_any_interval(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.01, overhead=1e-4)
    train(model, optimizer, range(STEPS), clock)
    assert (
        'overhead=0.0001 is exceeded at 200 and 2000, the longest intervals allowed' in caplog.text
    )


def test_stagger_begins_after_the_search(clock: Clock) -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.01, overhead=0.05, stagger=True)
    train(model, optimizer, range(STEPS), clock)
    sizes = {len(optimizer.curvature.due(step)) for step in range(STEPS, STEPS + 8)}
    assert sizes == {0, 1}


def test_mistakes() -> None:
    with pytest.raises(ValueError, match='overhead=5 is out of range'):
        NKFAC(net(), lr=0.1, overhead=5)
    with pytest.raises(ValueError, match='overhead=0.05 chooses intervals, but stat_interval and'):
        NKFAC(net(), lr=0.1, overhead=0.05, stat_interval=5, refresh_interval=25)
    own = dict(type='NKFAC', stat_interval=10, refresh_interval=50)
    parts = dict(attention=own, elsewhere={**own, 'refresh_interval': 100})
    with pytest.raises(ValueError, match='chooses intervals, but stat_interval and'):
        Preconditioned(Net(), rule=dict(type='SGDM', lr=0.1), layers=parts, overhead=0.05)


def test_real_time_chooses_something() -> None:
    model = Net()
    optimizer = NKFAC(model, lr=1e-3, overhead=0.2)
    start = time.perf_counter()
    for step in range(STEPS):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert time.perf_counter() - start < 60
    captures, refreshes = optimizer.state_dict()['precond']['overhead']['intervals']
    assert 5 <= captures <= 200 and 25 <= refreshes <= 2000


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    clock = Clock()
    overhead.time = clock  # type: ignore[assignment,attr-defined]
    model = net()
    optimizer = NKFAC(model, lr=0.01, overhead=0.05)
    for step in range(STEPS):
        due = bool(optimizer.curvature.due(step))
        clock.now += PLAIN + (1 + 3 * rank) * CAPTURE * due  # the second rank would choose others
        optimizer.zero_grad()
        model(torch.randn(20, 6).double()).square().mean().backward()
        optimizer.step()
    torch.save(optimizer.state_dict()['precond']['overhead'], f'{folder}/{rank}.pt')
    leave()


def test_all_ranks_take_the_choice_of_the_first(tmp_path: Path) -> None:
    mp.spawn(worker, (str(tmp_path),), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert first == second == {'share': 0.05, 'intervals': [5, 25]}


def test_times_are_those_of_the_device_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer may be built before the model is moved to a GPU."""
    marks = []

    class Event:
        def __init__(self, **settings: Any) -> None:
            marks.append(self)

        def record(self, stream: Any) -> None: ...

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: None)

    class Layer:
        weight = SimpleNamespace(device=torch.device('cpu'))

    layer: Any = Layer()
    search = overhead.OverheadSearch(0.1, {layer: NewtonKronecker()})
    layer.weight.device = torch.device('cuda')
    search.begin()
    search.end(captured=False, refreshed=False)
    assert len(marks) == 2
