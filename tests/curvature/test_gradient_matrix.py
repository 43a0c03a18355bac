"""source='gradient': second moments of the gradient matrix, in all forms, without hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmprecond.core.traffic import traffic
from mmprecond.curvature import (
    GRADIENT,
    INPUT,
    MATRIX,
    Blocks,
    Moment,
    Positions,
    Separable,
    Sketch,
    Statistic,
    find_layers,
    measure_matrix,
)
from mmprecond.optimizers import (
    FSGD,
    NKFAC,
    SGDMBK,
    SOAP,
    AdamR,
    Preconditioned,
    PreconditionedOptimizer,
)
from tests.support.distributed import leave
from tests.support.errors import refused

EVERY: dict[str, Any] = dict(stat_interval=1, refresh_interval=2, source='gradient')
KINDS = [NKFAC, AdamR, FSGD, SGDMBK]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.groups = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.groups(torch.tanh(self.conv(x))))
        return self.head(x.mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def images(step: int, count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(count, 3, 6, 6, generator=generator, dtype=torch.float64)


def train(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        optimizer.step()


def same(first: nn.Module, second: nn.Module, tolerance: float = 1e-12) -> None:
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- the statistics


def layers_of(model: nn.Module) -> dict[str, Any]:
    return find_layers(model, [dict(params=list(model.parameters()))])[0]


@pytest.mark.parametrize('name', ['conv', 'groups', 'head'])
def test_moments_are_products_of_the_gradient_matrix(name: str) -> None:
    layer = layers_of(net())[name]
    gradient = torch.randn(*layer.shape, dtype=torch.float64)
    sides = [Statistic(side, Moment(), MATRIX) for side in (INPUT, GRADIENT)]
    sums = measure_matrix(layer, gradient, sides)
    torch.testing.assert_close(sums['input_moment_matrix'], gradient.mT @ gradient)
    torch.testing.assert_close(sums['gradient_moment_matrix'], gradient @ gradient.mT)


def test_forms_of_patches_are_partial_traces() -> None:
    layer = layers_of(net())['conv']
    gradient = torch.randn(*layer.shape, dtype=torch.float64)
    weight, bias = gradient[0, :, :-1].view(6, 3, 9), gradient[0, :, -1]
    (form,) = [Separable.of(layer)]
    found = measure_matrix(layer, gradient, [Statistic(INPUT, form, MATRIX)])
    channels, positions, ones = found.values()
    torch.testing.assert_close(channels[0], torch.einsum('ocp,odp->cd', weight, weight))
    torch.testing.assert_close(positions[0], torch.einsum('ocp,ocq->pq', weight, weight))
    torch.testing.assert_close(ones[0, 0, 0], bias.square().sum())
    found = measure_matrix(layer, gradient, [Statistic(INPUT, Positions.of(layer), MATRIX)])
    kernel, _ = found.values()
    torch.testing.assert_close(kernel[0], torch.einsum('ocp,ocq->pq', weight, weight) / 3)


def test_blocks_and_sketches_are_those_of_the_moment() -> None:
    layer = layers_of(net())['head']
    gradient = torch.randn(*layer.shape, dtype=torch.float64)
    moment = (gradient.mT @ gradient)[0]
    sketch = Sketch(3)
    statistics = [Statistic(INPUT, Blocks(4), MATRIX)]
    blocks = measure_matrix(layer, gradient, statistics)['input_blocks_matrix']
    torch.testing.assert_close(blocks[0], moment[:4, :4])
    statistic = Statistic(INPUT, sketch, MATRIX)
    found = measure_matrix(layer, gradient, [statistic])['input_sketch_matrix']
    test = sketch.test_matrix(layer, statistic.key, 7)
    torch.testing.assert_close(found, moment @ test)


# ---------------------------------------------------------------- the methods


def test_nkfac_on_gradients_is_its_formula() -> None:
    """One step: both factors normalised, averaged from zero, damped, inverted, the norm kept."""
    model = nn.Linear(5, 4, bias=False).double()
    before = model.weight.detach().clone()
    settings = dict(source='gradient', solver='cholesky', warm_up=False)
    optimizer = NKFAC(model, lr=0.1, momentum=0.0, **settings)
    model(torch.randn(16, 5, dtype=torch.float64)).square().mean().backward()
    assert model.weight.grad is not None
    g = model.weight.grad.clone()
    optimizer.step()
    sides = []
    for moment in (g @ g.mT, g.mT @ g):
        mean = 0.05 * moment / moment.norm()
        mu = max(1e-4, 0.01 * float(torch.linalg.eigvalsh(mean)[-1]))
        sides.append(torch.linalg.inv(mean + mu * torch.eye(len(mean), dtype=mean.dtype)))
    direction = sides[0] @ g @ sides[1]
    direction *= g.norm() / direction.norm()
    torch.testing.assert_close(model.weight, before - 0.1 * direction, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('kind', [NKFAC, FSGD, SGDMBK])  # a basis may depend on rounding
def test_accumulation_is_the_joint_batch(kind: Any) -> None:
    joint, parts = net(), net()
    optimizers = kind(joint, lr=0.01, **EVERY), kind(parts, lr=0.01, **EVERY)
    for step in range(5):
        x = images(step)
        for model, optimizer, pieces in zip(
            (joint, parts), optimizers, ([x], x.split(2)), strict=True
        ):
            optimizer.zero_grad()
            for piece in pieces:
                (model(piece).square().mean() / len(pieces)).backward()
            optimizer.step()
    same(joint, parts, 1e-8)


def test_it_reads_what_no_hook_sees() -> None:
    """Weights used by hand, a scaler, and checkpointing: the gradient alone counts."""
    plain, other = net(), net()
    train(plain, NKFAC(plain, lr=0.01, **EVERY), range(4))
    optimizer = NKFAC(other, lr=0.01, **EVERY)
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        weights = dict(other.named_parameters())
        output = checkpoint(
            lambda x, weights=weights: torch.func.functional_call(other, weights, (x,)),
            images(step),
            use_reentrant=False,
        )
        scaler.scale(output.square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    same(plain, other)


def test_sources_are_mixed_layer_by_layer() -> None:
    model = net()
    layers = [
        dict(match=dict(name='head'), preconditioner=dict(type='NKFAC', source='gradient')),
        dict(preconditioner=dict(type='NKFAC')),
    ]
    optimizer = Preconditioned(model, rule=dict(type='SGDM', lr=0.01), layers=layers)
    train(model, optimizer, range(3))
    keys = {
        layer.name: [statistic.of_matrix for statistic in stack.kept]
        for layer, stack in optimizer.curvature.layers.items()
    }
    assert keys['head.weight'] == [True, True] and keys['conv.weight'] == [False, False]
    assert all(member.refreshes for stack in optimizer.curvature.stacks for member in stack.members)


@pytest.mark.parametrize('kind', [*KINDS, SOAP])
def test_it_resumes_to_the_bit(kind: Any) -> None:
    whole, part = net(), net()
    train(whole, kind(whole, lr=0.01, **EVERY), range(7))
    first = kind(part, lr=0.01, **EVERY)
    train(part, first, range(3))
    second = kind(part, lr=0.01, **EVERY)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(part, second, range(3, 7))
    assert all(map(torch.equal, whole.parameters(), part.parameters()))


def test_a_gradient_that_is_not_finite_is_dropped() -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.0, **EVERY)
    train(model, optimizer, range(2))
    for p in model.parameters():
        p.grad = torch.full_like(p, float('nan'))
    optimizer.step()
    assert optimizer.dropped == 3
    stacks = optimizer.curvature.stacks
    assert all(t.isfinite().all() for stack in stacks for t in stack.statistics.values())


@pytest.mark.parametrize('name', ['KFAC', 'AFOpt'])
def test_methods_without_the_source_say_so(name: str) -> None:
    layers = dict(elsewhere=dict(type=name, source='gradient'))
    refused(
        ValueError,
        lambda: Preconditioned(net(), rule=dict(type='SGDM', lr=0.1), layers=layers),
        "source='gradient' is unknown; choose one of activation",
    )


# ---------------------------------------------------------------- ranks


def worker(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    model = net()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = NKFAC(wrapped, lr=0.01, **EVERY)
    for step in range(4):
        optimizer.zero_grad()
        wrapped(images(step).chunk(2)[rank]).square().mean().backward()
        optimizer.step()
    torch.save(model.state_dict(), f'{folder}/{rank}.pt')
    leave()


def test_ranks_agree_without_messages(tmp_path: Any) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(2)]
    one = net()
    optimizer = NKFAC(one, lr=0.01, **EVERY)
    train(one, optimizer, range(4))
    for name, p in one.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], p, rtol=0, atol=1e-9)
    found = traffic(optimizer.curvature.layers, optimizer.curvature.sharding)
    assert found.capture.megabytes < 1e-3
