"""Two gloo processes against one: equal ranks, and the joint batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmprecond.distributed import sum_over_ranks
from mmprecond.optimizers import NKFAC, AdaNKFAC
from tests.support.distributed import leave
from tests.support.networks import TokenNet, squared_error, token_batches

STEPS = 7
SETTINGS = {
    'NKFAC': lambda model: NKFAC(
        model, lr=0.05, weight_decay=1e-3, stat_interval=1, refresh_interval=2
    ),
    'AdaNKFAC': lambda model: AdaNKFAC(
        model, lr=2e-3, weight_decay=0.1, stat_interval=1, refresh_interval=2
    ),
    'fallback': lambda model: NKFAC(model, lr=0.05, stat_interval=1, fallback='gradient'),
}


class Branches(nn.Module):
    """A network whose middle layers depend on the rank: one is unused everywhere but there."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(16, 16)
        self.right = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.right if dist.is_initialized() and dist.get_rank() else self.left
        return self.head(torch.tanh(branch(x)).mean(1))


class Logged(nn.Module):
    """A weight that is used by hand, and whose module one rank also calls, as for its log."""

    def __init__(self) -> None:
        super().__init__()
        self.by_hand = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(x, self.by_hand.weight, self.by_hand.bias))
        if dist.get_rank() == 0:
            with torch.no_grad():
                self.by_hand(x)
        return self.head(hidden.mean(1))


def make(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return kind().double()


def train(rank: int, kind: Callable[[], nn.Module], name: str) -> dict[str, Any]:
    """Weights after each step of a rank on its half of the batches, and the last state."""
    model = make(kind)
    # Built on the wrapped model, as MMEngine does.
    wrapped = DistributedDataParallel(model, find_unused_parameters=kind is Branches)
    optimizer = SETTINGS[name](wrapped)
    weights = []
    for x, y in token_batches(STEPS):
        optimizer.zero_grad()
        half = slice(4 * rank, 4 * rank + 4)
        squared_error(wrapped(x[half]), y[half]).backward()
        optimizer.step()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return {'weights': weights, 'state': optimizer.state_dict()}


def sum_in_buckets(rank: int) -> None:
    tensors = [
        torch.full((k + 1, 300), float(rank + k), dtype=dtype)
        for k in range(5)
        for dtype in (torch.float32, torch.float64)
    ]
    sum_over_ranks(tensors, bucket_mb=0.003)
    for index, tensor in enumerate(tensors):
        assert (tensor == 2 * (index // 2) + 1).all()


#: Model and setting of each run on two ranks.
RUNS: list[tuple[Callable[[], nn.Module], str]] = [
    (TokenNet, 'NKFAC'),
    (TokenNet, 'AdaNKFAC'),
    (Branches, 'NKFAC'),
    (Logged, 'fallback'),
]


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    sum_in_buckets(rank)
    found = {f'{kind.__name__} {name}': train(rank, kind, name) for kind, name in RUNS}
    torch.save(found, f'{folder}/{rank}.pt')
    leave()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found in all runs, in one pair of processes, which also sum in buckets."""
    folder = tmp_path_factory.mktemp('ranks')
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f'{rank}.pt') for rank in (0, 1)]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize('name', ['NKFAC', 'AdaNKFAC'])
def test_two_ranks_equal_the_joint_batch(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (found[f'TokenNet {name}'] for found in ranks)
    model = make(TokenNet)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = SETTINGS[name](model)
    for step, (x, y) in enumerate(token_batches(STEPS)):
        optimizer.zero_grad()
        squared_error(model(x), y).backward()
        optimizer.step()
        joint = {n: p.detach() for n, p in model.named_parameters()}
        assert largest_difference(first['weights'][step], second['weights'][step]) == 0
        assert largest_difference(first['weights'][step], joint) < 1e-12
    assert largest_difference(start, joint) > 1e-3
    for name, ours in optimizer.state_dict()['precond']['layers'].items():
        theirs = first['state']['precond']['layers'][name]
        for kind in ('statistics', 'operator'):
            for key, value in ours[kind].items():
                torch.testing.assert_close(theirs[kind][key], value, rtol=1e-9, atol=1e-12)


def test_ranks_that_use_different_layers_stay_equal(ranks: list[dict[str, Any]]) -> None:
    first, second = (found['Branches NKFAC'] for found in ranks)
    for a, b in zip(first['weights'], second['weights'], strict=True):
        assert largest_difference(a, b) == 0
    layers = first['state']['precond']['layers']
    assert {'left.weight', 'right.weight', 'head.weight'} == set(layers)


def test_ranks_agree_on_what_was_called(ranks: list[dict[str, Any]]) -> None:
    first, second = (found['Logged fallback'] for found in ranks)
    for a, b in zip(first['weights'], second['weights'], strict=True):
        assert largest_difference(a, b) == 0
