"""Refreshes shared out over two and four gloo processes, against ranks that do everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmprecond.core.curvature
from mmprecond.core import sharding as module
from mmprecond.distributed import longest_first, shard
from mmprecond.optimizers import (
    FSGD,
    KFAC,
    NKFAC,
    SGDMBK,
    SKFAC,
    AdamR,
    AdaNKFAC,
    PreconditionedOptimizer,
)
from tests.support.distributed import leave
from tests.support.errors import refused
from tests.support.networks import TokenNet, squared_error, token_batches

SOON: dict[str, Any] = dict(stat_interval=1, refresh_interval=2)
METHODS = {
    'NKFAC': lambda model, **s: NKFAC(model, lr=0.05, **SOON, **s),
    'AdaNKFAC': lambda model, **s: AdaNKFAC(model, lr=2e-3, **SOON, **s),
    'FSGD': lambda model, **s: FSGD(model, lr=0.05, **SOON, **s),
    'KFAC': lambda model, **s: KFAC(model, lr=0.05, **SOON, **s),
    'SKFAC': lambda model, **s: SKFAC(
        model, lr=0.05, reduction='reduce', max_columns=12, **SOON, **s
    ),
    'SGDMBK': lambda model, **s: SGDMBK(model, lr=0.05, **SOON, **s),
    'AdamR': lambda model, **s: AdamR(model, lr=2e-3, **SOON, **s),
    'clipped': lambda model, **s: NKFAC(model, lr=0.05, clip_update=0.1, **SOON, **s),
    'kernel': lambda model, **s: NKFAC(
        [dict(params=[p], input_positions=4) for p in model.parameters()],
        model=model,
        lr=0.05,
        input_factor='kernel',
        **SOON,
        **s,
    ),
}
STEPS = 6


def steps(
    optimizer: PreconditionedOptimizer,
    model: nn.Module,
    wrapped: nn.Module,
    first: int,
    rank: int,
    ranks: int,
    last: int = STEPS,
) -> list[Tensor]:
    """Weights after each step from `first` on; each rank has its part of each batch."""
    weights = []
    for x, y in token_batches(STEPS)[first:last]:
        optimizer.zero_grad()
        part = slice(8 // ranks * rank, 8 // ranks * (rank + 1))
        dtype = next(model.parameters()).dtype
        squared_error(wrapped(x[part].to(dtype)), y[part]).backward()
        optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return weights


def make(name: str = '') -> nn.Module:
    """In float64, but for sums whose rounding must not depend on the rank."""
    torch.manual_seed(3)
    return TokenNet().to(torch.float32 if name == 'clipped' else torch.float64)


def worker(rank: int, ranks: int, folder: str, names: list[str], modes: list[str]) -> None:
    """For each method and mode: all steps; then the last two again, from a saved state."""
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/meet{ranks}', rank=rank, world_size=ranks
    )
    torch.set_num_threads(1)
    found = {}
    for name in names:
        for mode in modes if name != 'AdamR' else [m for m in modes if m != 'apply']:
            model = make(name)
            wrapped = DistributedDataParallel(model)
            optimizer = METHODS[name](wrapped, sharding=mode)
            weights = steps(optimizer, model, wrapped, 0, rank, ranks)
            held = {
                stack.owner: sorted(stack.operator_tensors) for stack in optimizer.curvature.stacks
            }
            # As MMEngine does it: the first rank saves alone, all load.
            path = f'{folder}/state{ranks}.pt'
            model = make(name)
            wrapped = DistributedDataParallel(model)
            optimizer = METHODS[name](wrapped, sharding=mode)
            steps(optimizer, model, wrapped, 0, rank, ranks, STEPS - 2)
            partial = optimizer.state_dict()
            if mode == 'apply' and rank:
                try:
                    optimizer.load_state_dict(partial)
                    raise AssertionError('a part of the operators was loaded')
                except ValueError as error:
                    assert 'the first rank saved' in str(error)
            if rank == 0:
                torch.save([model.state_dict(), optimizer.state_dict()], path)
            dist.barrier()
            values, state = torch.load(path)
            model = make(name)
            wrapped = DistributedDataParallel(model)
            model.load_state_dict(values)
            optimizer = METHODS[name](wrapped, sharding=mode)
            optimizer.load_state_dict(state)
            resumed = steps(optimizer, model, wrapped, STEPS - 2, rank, ranks)
            found[name, mode] = weights, held, resumed, state
    torch.save(found, f'{folder}/{rank}_{ranks}.pt')
    leave()


def run(folder: Path, ranks: int, names: list[str], modes: list[str]) -> list[dict[Any, Any]]:
    mp.spawn(worker, args=(ranks, str(folder), names, modes), nprocs=ranks)
    return [torch.load(folder / f'{rank}_{ranks}.pt') for rank in range(ranks)]


@pytest.mark.parametrize(
    ('ranks', 'names'),
    [(2, list(METHODS)), pytest.param(4, ['NKFAC', 'KFAC'], marks=pytest.mark.slow)],
)
def test_shared_work_gives_the_same_weights(tmp_path: Path, ranks: int, names: list[str]) -> None:
    found = run(tmp_path, ranks, names, ['none', 'refresh', 'apply'])
    for (name, mode), (weights, held, resumed, state) in found[0].items():
        plain = found[0][name, 'none'][0]
        for step in range(STEPS):
            for other in found[1:]:
                assert torch.equal(weights[step], other[name, mode][0][step]), (name, mode, step)
            rounding = 1e-11 if weights[step].dtype == torch.float64 else 1e-5
            torch.testing.assert_close(
                weights[step], plain[step], rtol=0, atol=rounding, msg=f'{name} {mode} {step}'
            )
        for step in range(2):
            for other in found:
                assert torch.equal(other[name, mode][2][step], resumed[step])
            torch.testing.assert_close(
                resumed[step],
                weights[STEPS - 2 + step],
                rtol=0,
                atol=rounding,
                msg=f'{name} {mode} resumed',
            )
        assert set(held) == {None} if mode == 'none' else len(held) >= 2  # of the three layers
        for rank, other in enumerate(found):
            for owner, operators in other[name, mode][1].items():
                assert bool(operators) == (mode != 'apply' or owner == rank)
        assert all(entry['operator'] for entry in state['precond']['layers'].values())


def test_a_state_of_two_ranks_serves_one(tmp_path: Path) -> None:
    """The joint batch on one process, from the first rank's checkpoint of shared-out operators."""
    found = run(tmp_path, 2, ['NKFAC'], ['apply'])[0]['NKFAC', 'apply']
    model = make()
    optimizer = METHODS['NKFAC'](model)
    values, state = torch.load(tmp_path / 'state2.pt')
    model.load_state_dict(values)
    optimizer.load_state_dict(state)
    for ours, theirs in zip(
        steps(optimizer, model, model, STEPS - 2, 0, 1), found[0][-2:], strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@given(st.lists(st.floats(0, 1e6), max_size=30), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_no_rank_has_much_more_work(costs: list[float], ranks: int) -> None:
    owners = longest_first(costs, ranks)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
    # Graham's argument: the last job of the fullest rank began when no other rank had less.
    assert max(loads) <= sum(costs) / ranks + max([0.0, *costs]) * (1 - 1 / ranks) + 1e-6
    assert owners == longest_first(costs, ranks) and all(0 <= o < ranks for o in owners)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300)), max_size=40), st.floats(1e-6, 1e-3)
)
@settings(max_examples=100, deadline=None)
def test_buckets_keep_every_tensor_with_its_owner(
    sizes: list[tuple[int, int]], bucket_mb: float
) -> None:
    tensors = [
        torch.full((n,), float(k), dtype=[torch.float32, torch.float64][k % 2])
        for k, (_, n) in enumerate(sizes)
    ]
    owners = [owner for owner, _ in sizes]
    buckets = shard.owner_buckets(owners, tensors, bucket_mb)
    placed = [id(t) for _, bucket in buckets for t in bucket]
    assert sorted(placed) == sorted(map(id, tensors))
    for owner, bucket in buckets:
        assert len({t.dtype for t in bucket}) == 1
        assert all(owners[[id(x) for x in tensors].index(id(t))] == owner for t in bucket)
        total = sum(t.numel() * t.element_size() for t in bucket) / 2**20
        assert total <= bucket_mb or len(bucket) == 1 or total - bucket_mb < 1e-9


def test_an_archive_grows_with_layers_that_come_late() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = NKFAC(model, lr=0.1, stat_interval=1, refresh_interval=10)
    model[0](torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    stack = optimizer.curvature.layers[next(iter(optimizer.curvature.layers))]
    stack.archive, stack.operators = stack.operators, {}  # as if another rank held them
    late = next(layer for layer in optimizer.curvature.layers if not stack.holds(layer))
    sample = {name: held[0].clone() for name, held in stack.statistics.items()}
    stack.merge({late: sample})
    states = dict(stack.export())
    assert states[late]['operator'].keys() == next(iter(states.values()))['operator'].keys()


def test_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        ValueError, lambda: NKFAC(nn.Linear(2, 2), lr=0.1, sharding='zero'), 'sharding', 'refresh'
    )
    refused(
        ValueError,
        lambda: AdamR(nn.Linear(2, 2), lr=0.1, sharding='apply'),
        'EigenRotation',
        "sharding='refresh'",
    )
    model = nn.Linear(2, 2)
    early = NKFAC(model, lr=0.1, sharding='refresh')
    model(torch.randn(3, 2)).square().sum().backward()
    monkeypatch.setattr(module, 'world_size', lambda: 2)
    refused(RuntimeError, early.step, 'init_process_group')


def failing_worker(rank: int, folder: str) -> None:
    """A decomposition that raises on one rank ends both."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    model = make()
    wrapped = DistributedDataParallel(model)
    optimizer = METHODS['NKFAC'](wrapped, sharding='refresh')
    if rank == 1:

        def start(stack: Any, positions: list[int], *_: Any) -> Tensor:
            raise torch.linalg.LinAlgError('no convergence')

        mmprecond.core.curvature.start_refresh = start
    try:
        steps(optimizer, model, wrapped, 0, rank, 2)
        told = 'nothing'
    except (RuntimeError, torch.linalg.LinAlgError) as error:
        told = str(error)
    Path(f'{folder}/told{rank}').write_text(told)
    leave()


def test_an_error_on_one_rank_ends_all(tmp_path: Path) -> None:
    mp.spawn(failing_worker, args=(str(tmp_path),), nprocs=2)
    assert (tmp_path / 'told0').read_text() == (
        'a refresh ended in an error on another rank, whose log has it'
    )
    assert (tmp_path / 'told1').read_text() == 'no convergence'
