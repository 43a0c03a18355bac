"""Two gloo processes against one, method by method: equal ranks, and the joint batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmprecond.optimizers import (
    FSGD,
    KFAC,
    SGDMBK,
    SKFAC,
    SMAC,
    AdaAct,
    AdaFisher,
    AdamR,
    AdamWBK,
    FAdam,
    NysAct,
    PreconditionedOptimizer,
)
from mmprecond.preconditioners import EigenRotation
from tests.support.distributed import leave
from tests.support.networks import squared_error

STEPS, BATCH = 5, 24
RULE = dict(lr=0.02, weight_decay=1e-3, stat_interval=1, refresh_interval=2)
ADAM = dict(RULE, lr=1e-3, eps=1e-4)
STAR = dict(damping_form='relative', damping=0.01, scaling='norm_recovery')


class Mixed(nn.Module):
    """A strided convolution in groups, tokens, a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3, stride=2, groups=2)
        self.lift = nn.Linear(12, 10)
        self.twice = nn.Linear(10, 10)
        self.head = nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(torch.tanh(self.conv(x)).flatten(2).mT)
        x = x + torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(F.gelu(x).mean(1))


class Branches(Mixed):
    """With a middle layer that one rank alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        if dist.is_initialized() and dist.get_rank():
            x = self.lift(torch.tanh(self.conv(x)).flatten(2).mT)
            return self.head(torch.tanh(self.other(x)).mean(1))
        return super().forward(x)


#: Equal to one process with the joint batch. The columns of both ranks fit: 2 calls x 4 samples
#: a rank, of sides of 10 and more.
JOINT: dict[str, tuple[Callable[..., PreconditionedOptimizer], dict[str, Any], int]] = {
    'AdamR': (AdamR, dict(ADAM, early_refreshes=False), BATCH),
    'AdamR qr Adan': (
        AdamR,
        dict(ADAM, early_refreshes=False, rule='Adan', basis_solver='qr'),
        BATCH,
    ),
    'KFAC expand': (KFAC, RULE, 8),
    'KFAC reduce': (KFAC, dict(RULE, reduction='reduce'), 8),
    'KFAC star': (KFAC, dict(RULE, **STAR), 8),
    'SKFAC reduce': (SKFAC, dict(RULE, reduction='reduce', max_columns=8), 4),
    'FSGD': (FSGD, RULE, 8),
    'FAdam': (FAdam, dict(ADAM, exponent=0.5), 8),
    'SGDMBK': (SGDMBK, RULE, 8),
    'AdamWBK': (AdamWBK, ADAM, 8),
    'SMAC': (SMAC, RULE, 8),
    'AdaAct': (AdaAct, dict(RULE, refresh_interval=1), 8),
    'NysAct': (NysAct, dict(RULE, rank=4), 8),
    'AdaFisher': (AdaFisher, dict(RULE, damping=0.1), 8),
}
#: Whose ranks draw positions of their own, or columns that do not fit.
OWN = {
    'SKFAC': (SKFAC, dict(RULE, max_columns=200), 8),
    'SKFAC overflow': (SKFAC, dict(RULE, max_columns=7, positions=3), 8),
    'SKFAC star': (SKFAC, dict(RULE, max_columns=9, positions=4, **STAR), 8),
}
BRANCHES = {
    f'branches {name}': (JOINT | OWN)[name]
    for name in ('AdamR', 'KFAC reduce', 'SKFAC', 'SKFAC overflow', 'SMAC', 'AdaFisher')
}
ALL = JOINT | OWN | BRANCHES


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.randn(size, 2, 7, 9, generator=generator, dtype=torch.float64) + 0.2,
        torch.randint(0, 6, (size,), generator=generator),
    )


def run(name: str, rank: int | None = None) -> dict[str, Any]:
    """Weights after each step, and the state: of all samples, or as one of two ranks."""
    kind, settings, size = ALL[name]
    torch.manual_seed(3)
    model: nn.Module = (Branches if name in BRANCHES else Mixed)().double()
    wrapped = model
    if rank is not None:
        wrapped = DistributedDataParallel(model, find_unused_parameters=name in BRANCHES)
    optimizer = kind(wrapped, **settings)
    part = slice(None) if rank is None else slice(rank * size // 2, (rank + 1) * size // 2)
    weights = []
    for step in range(STEPS):
        x, y = batch(step, size)
        optimizer.zero_grad()
        squared_error(wrapped(x[part]), y[part]).backward()
        optimizer.step()
        weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return {'weights': weights, 'state': optimizer.state_dict()}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    torch.save({name: run(name, rank) for name in ALL}, f'{folder}/{rank}.pt')
    leave()


@pytest.fixture(scope='module')
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found, all methods in one pair of processes."""
    folder: Path = tmp_path_factory.mktemp('ranks')
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f'{rank}.pt') for rank in (0, 1)]


def distance(a: Any, b: Any) -> float:
    """Largest difference of two nested states of the same keys."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max([distance(a[k], b[k]) for k in a], default=0.0)
    if isinstance(a, (list, tuple)):
        return max([distance(x, y) for x, y in zip(a, b, strict=True)], default=0.0)
    if isinstance(a, Tensor):
        return float((a - b).abs().max())
    assert a == b
    return 0.0


@pytest.mark.parametrize('name', sorted(ALL))
def test_ranks_are_equal_at_every_step(ranks: list[dict[str, Any]], name: str) -> None:
    """In weights, moments, statistics and operators, to the bit.

    SKFAC that draws positions, or has more rows than columns, cannot equal the joint batch: each
    rank draws positions and signs of its own.
    """
    first, second = (found[name] for found in ranks)
    assert distance(first, second) == 0
    assert all(w.isfinite().all() for step in first['weights'] for w in step.values())
    assert distance(first['weights'][0], first['weights'][-1]) > 1e-4


@pytest.mark.parametrize('name', sorted(JOINT))
def test_ranks_are_the_joint_batch(ranks: list[dict[str, Any]], name: str) -> None:
    """In weights, and in the rule's moments: those of AdamR are kept in a basis of its own."""
    theirs, ours = ranks[0][name], run(name)
    for step in range(STEPS):
        assert distance(theirs['weights'][step], ours['weights'][step]) < 1e-9, step
    assert distance(theirs['state']['state'], ours['state']['state']) < 1e-8
    if not name.startswith('SKFAC'):  # the columns of ranks have signs of their own
        layers = [found['state']['precond']['layers'] for found in (theirs, ours)]
        assert layers[0].keys() == layers[1].keys() and len(layers[0]) == 4
        for key in layers[0]:
            for a, b in zip(*(layer[key]['statistics'].values() for layer in layers), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_moments_of_adamr_were_turned(ranks: list[dict[str, Any]]) -> None:
    """All layers have had two bases at least: their moments went from one to the next."""
    assert EigenRotation().rotate_moments
    for name in ('AdamR', 'AdamR qr Adan'):
        state = ranks[0][name]['state']
        assert [entry['refreshes'] for entry in state['precond']['layers'].values()] == [2] * 4
        assert all('exp_avg_sq' in entry for entry in state['state'].values())


def test_columns_of_both_ranks_lie_side_by_side(ranks: list[dict[str, Any]]) -> None:
    """Of 8 columns each rank fills its own half: none falls on another."""
    layers = ranks[0]['SKFAC reduce']['state']['precond']['layers']
    for name, calls in (('lift', 1), ('twice', 2)):
        statistics = layers[f'{name}.weight']['statistics']
        for key in ('input_columns_reduced', 'gradient_columns_reduced'):
            filled = [c for c in range(8) if statistics[key][0, :, c].any()]
            assert filled == ([0, 1, 4, 5] if calls == 1 else list(range(8)))


def test_half_the_batch_alone_moves_differently(ranks: list[dict[str, Any]]) -> None:
    """So that equality with the joint batch says something."""
    for name in ('KFAC expand', 'AdamR'):
        kind, settings, size = ALL[name]
        torch.manual_seed(3)
        model = Mixed().double()
        optimizer = kind(model, **settings)
        x, y = batch(0, size)
        squared_error(model(x[: size // 2]), y[: size // 2]).backward()
        optimizer.step()
        alone = {n: p.detach() for n, p in model.named_parameters()}
        assert distance(alone, ranks[0][name]['weights'][0]) > 1e-6
