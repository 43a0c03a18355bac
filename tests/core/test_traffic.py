"""Messages among ranks: those that are sent are those of the forecast, and travel ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mmprecond.core.sharding import Sharding
from mmprecond.core.traffic import Messages, traffic
from mmprecond.distributed import sum_over_ranks
from mmprecond.optimizers import NKFAC
from tests.support.distributed import leave
from tests.support.mixed import Net

Event = tuple[str, float]


def record(events: list[Event]) -> None:
    """Replaces the functions that send messages by ones that also note them."""

    def noted(name: str, size: Callable[[Any], float]) -> None:
        send = getattr(dist, name)

        def noting(what: Any, *args: Any, **options: Any) -> Any:
            events.append((name, size(what)))
            work = send(what, *args, **options)
            return Noted(work, events) if options.get('async_op') else work

        setattr(dist, name, noting)

    def bytes_of(tensor: Tensor) -> float:
        return tensor.numel() * tensor.element_size()

    for name in ('all_reduce', 'broadcast', 'send', 'recv'):
        noted(name, bytes_of)
    noted('broadcast_object_list', lambda objects: 0.0)


class Noted:
    """A message under way, whose end is noted."""

    def __init__(self, work: Any, events: list[Event]) -> None:
        self.work, self.events = work, events

    def wait(self) -> None:
        self.events.append(('wait', 0.0))
        self.work.wait()


MODES = ('none', 'refresh', 'apply')


def messages_of(rank: int, sharding: str) -> list[list[Event]]:
    """What a rank sends in each of seven steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = NKFAC(
        model,
        lr=0.01,
        stat_interval=2,
        refresh_interval=4,
        sharding=sharding,
        early_refreshes=False,
        solver='cholesky',
    )
    events: list[Event] = []
    record(events)
    precondition = optimizer.curvature.precondition

    def noting(*args: Any) -> Any:
        events.append(('precondition', 0.0))
        return precondition(*args)

    optimizer.curvature.precondition = noting  # type: ignore[method-assign]
    steps = []
    for step in range(7):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2 * step + rank))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for p in model.parameters():
            if p.grad is not None:
                sum_over_ranks([p.grad])
        events.clear()
        optimizer.step()
        steps.append(list(events))
    return steps


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    torch.save({mode: messages_of(rank, mode) for mode in MODES}, f'{folder}/{rank}.pt')
    leave()


@pytest.fixture(scope='module')
def sent(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[Event]]]]:
    """Messages of both ranks by mode, all in one pair of processes."""
    folder = tmp_path_factory.mktemp('ranks')
    mp.spawn(worker, (str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f'{rank}.pt') for rank in range(2)]


def total(events: list[Event]) -> Messages:
    """Number and megabytes of the messages; an object takes two."""
    sizes = [size for name, size in events if name not in ('wait', 'precondition')]
    objects = sum(name == 'broadcast_object_list' for name, _ in events)
    return Messages(len(sizes) + objects, sum(sizes) / 2**20)


@pytest.mark.parametrize('mode', MODES)
def test_the_forecast_counts_the_messages(mode: str, sent: list[Any]) -> None:
    steps = sent[0][mode]
    model = Net()
    optimizer = NKFAC(model, lr=0.01, solver='cholesky')
    layers = optimizer.curvature.layers
    sharding = Sharding(mode, True, ranks=2)
    owners = sharding.assign({layer: stack.method for layer, stack in layers.items()})
    assert mode == 'none' or set(owners.values()) == {0, 1}
    expected = traffic(layers, sharding)
    plain, capture, refresh = (total(steps[k]) for k in (5, 6, 4))
    assert plain == expected.step
    assert capture == expected.step + expected.capture
    assert refresh == expected.step + expected.capture + expected.refresh


@pytest.mark.parametrize('mode', ['none', 'refresh'])
def test_sums_travel_while_directions_are_computed(mode: str, sent: list[Any]) -> None:
    for steps in (found[mode] for found in sent):
        names = [[name for name, _ in step] for step in steps]
        for step, alone in ((2, True), (4, False), (6, True)):  # the refresh of step 4 needs them
            start = names[step].index('all_reduce', 1)  # after the numbers of rows
            needed, used = names[step].index('precondition'), names[step].index('wait', start)
            assert start < needed and (used > needed) == alone
