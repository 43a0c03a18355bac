"""SGDPH beyond its golden trajectory: the diagonal, graphs, ranks, refusals."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.runner.checkpoint import load_state_dict
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmprecond.optimizers import SGDPH, WeightNormConv2d, weight_norm
from tests.support.classifier import Classifier, batch, build
from tests.support.distributed import leave
from tests.support.errors import refused
from tests.support.networks import ConvNet, squared_error

OPTIMIZER = dict(type='SGDPH', lr=0.05, momentum=0.9, weight_decay=1e-3)


def images(seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 3, 6, 6, generator=generator).double(),
        torch.randint(0, 10, (count,), generator=generator),
    )


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet().double()


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    x, y = images(seed)
    return squared_error(model(x), y)


def diagonals(optimizer: SGDPH, model: nn.Module) -> dict[str, Tensor]:
    return {
        name: optimizer.state[p]['hessian']
        for name, p in model.named_parameters()
        if 'hessian' in optimizer.state[p]
    }


def full_block(model: nn.Module, name: str) -> Tensor:
    """The parameter's block of the Hessian, entry by entry."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(value: Tensor) -> Tensor:
        x, y = images(0)
        out = torch.func.functional_call(model, parameters | {name: value}, (x,))
        return squared_error(out, y)

    return torch.autograd.functional.hessian(loss, parameters[name])


class Scales(nn.Module):
    """Two vectors that act channel by channel on the outputs of a separable loss, and a last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.norm = nn.Linear(5, 4), nn.LayerNorm(4)
        self.last = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.inner(x))) + self.last


def test_the_diagonal_is_exact_where_channels_do_not_meet_again() -> None:
    model, x = Scales().double(), torch.randn(7, 5).double()
    optimizer = SGDPH(model, lr=0.1, hessian_decay=0.0, refresh='all', probes=1)

    def loss(scale: Tensor) -> Tensor:
        values = {n: p.detach() for n, p in model.named_parameters()} | {'norm.weight': scale}
        return (torch.func.functional_call(model, values, (x,)) ** 4).mean()

    wanted = torch.autograd.functional.hessian(loss, model.norm.weight.detach())
    assert (wanted - wanted.diag().diag()).abs().max() < 1e-12  # the block is diagonal
    optimizer.refresh = 'round_robin'
    for _ in range(4):  # inner.bias, norm.weight, norm.bias, last
        with torch.no_grad():
            before = {n: p.clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        (model(x) ** 4).mean().backward(create_graph=True)
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name])
    found = optimizer.state[model.norm.weight]['hessian']
    torch.testing.assert_close(found, wanted.diag().abs(), rtol=1e-10, atol=0)


@pytest.mark.parametrize('name', ['bn1.weight', 'bn1.bias', 'conv2.bias'])
def test_elsewhere_it_is_a_row_sum(name: str) -> None:
    model = conv_net()
    block = full_block(model, name)
    optimizer = SGDPH(model, lr=0.0, hessian_decay=0.0, momentum=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model).backward(create_graph=True)
        optimizer.step()
    torch.testing.assert_close(
        diagonals(optimizer, model)[name], block.sum(1).abs(), rtol=1e-8, atol=1e-12
    )
    assert (block.diag().abs() - block.sum(1).abs()).abs().max() > 1e-3  # and not the diagonal


def test_a_second_derivative_that_is_not_finite_stays_out_of_the_average() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
    optimizer = SGDPH([weight, nn.Parameter(torch.zeros(2))], lr=0.0, refresh='all', probes=1)

    def step() -> Tensor:
        optimizer.zero_grad()
        (weight.abs() ** 1.5).sum().backward(create_graph=True)
        optimizer.step()
        return optimizer.state[weight]['hessian'].clone()

    before = step()
    with torch.no_grad():
        weight[1] = 0.0  # the gradient is 0, the second derivative infinite
    after = step()
    assert after[1] == before[1] > 0
    assert after[0] > before[0] and after[2] > before[2]


def test_all_at_once_estimates_the_row_sums() -> None:
    model = conv_net()
    wanted = full_block(model, 'bn1.weight').sum(1).abs()
    optimizer = SGDPH(model, lr=0.0, hessian_decay=0.0, refresh='all', probes=400)
    loss_of(model).backward(create_graph=True)
    optimizer.step()
    found = diagonals(optimizer, model)['bn1.weight']
    assert (found - wanted).norm() < 0.2 * wanted.norm()


def test_an_interval_needs_a_graph_on_its_steps_alone() -> None:
    model = conv_net()
    optimizer = SGDPH(model, lr=0.01, refresh='all', interval=3)
    wanted = []
    for step in range(7):
        wanted.append(optimizer.needs_graph)
        optimizer.zero_grad()
        loss_of(model, step).backward(create_graph=optimizer.needs_graph)
        optimizer.step()
        assert all(p.grad is not None and not p.grad.requires_grad for p in model.parameters())
    assert wanted == [True, False, False, True, False, False, True]


@pytest.mark.parametrize('refresh, interval', [('round_robin', 1), ('round_robin', 3), ('all', 2)])
def test_a_cycle_refreshes_every_vector_once(refresh: str, interval: int) -> None:
    model = conv_net()
    optimizer = SGDPH(model, lr=0.01, refresh=refresh, interval=interval, probes=1)
    length = interval * (len(optimizer.vectors) if refresh == 'round_robin' else 1)
    for step in range(2 * length + 1):
        optimizer.zero_grad()
        loss_of(model, step).backward(create_graph=optimizer.needs_graph)
        optimizer.step()
        assert optimizer.rule.cycle == (step + 1) // length + 1  # the last step counts as the next


def test_memory_stays_flat_over_200_steps() -> None:
    wrapper_model = Classifier()
    wrapper = build(wrapper_model, optimizer=OPTIMIZER)
    counts = []
    gc.collect()
    gc.disable()
    try:
        for step in range(200):
            wrapper_model.train_step(batch(), wrapper)
            if step % 50 == 9:
                counts.append(sum(type(o) is Tensor for o in gc.get_objects()))
    finally:
        gc.enable()
    assert max(counts) - min(counts) <= 4, counts


def test_resume_continues_bit_for_bit() -> None:
    whole, broken = conv_net(), conv_net()
    for model, stop in ((whole, 9), (broken, 5)):
        optimizer = SGDPH(model, lr=0.01, weight_decay=1e-3)
        for step in range(stop):
            optimizer.zero_grad()
            loss_of(model, step).backward(create_graph=True)
            optimizer.step()
    resumed = SGDPH(broken, lr=0.01, weight_decay=1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(5, 9):
        resumed.zero_grad()
        loss_of(broken, step).backward(create_graph=True)
        resumed.step()
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), broken.parameters(), strict=True)
    )


def train_two(rank: int, folder: str) -> None:
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(
        run_classifier(DistributedDataParallel, slice(4 * rank, 4 * rank + 4)),
        f'{folder}/{rank}.pt',
    )
    leave()


class Smooth(Classifier):
    """Without batch statistics, which differ between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)


def run_classifier(wrap: Any, half: slice) -> dict[str, Tensor]:
    from mmengine.model import MMDistributedDataParallel

    torch.manual_seed(0)
    model = Smooth().double()
    wrapped = MMDistributedDataParallel(model, device_ids=None) if wrap else model
    wrapper = build(wrapped, optimizer=OPTIMIZER, accumulative_counts=2)
    for step in range(8):
        data = batch(8, step)
        wrapped.train_step(
            dict(inputs=data['inputs'][half].double(), data_samples=data['data_samples'][half]),
            wrapper,
        )
    return {name: p.detach() for name, p in model.named_parameters()}


def test_two_ranks_equal_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(train_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    joint = run_classifier(None, slice(None))
    for name, value in joint.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)


def test_weight_norm_gives_lengths_that_count_as_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, bias=False),
        nn.Flatten(),
        nn.Linear(20, 10),
    )
    plain = model.double()(images(0)[0])
    refused(ValueError, lambda: SGDPH(model[:3], lr=0.1), 'no 1-D parameter', 'weight_norm(model)')
    torch.testing.assert_close(weight_norm(model)(images(0)[0]), plain)
    optimizer = SGDPH(model, lr=0.01)
    assert [tuple(p.shape) for p in optimizer.vectors] == [(4, 1, 1, 1), (5, 1, 1, 1), (10,)]
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward(create_graph=True)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_lengths_survive_copies_and_plain_checkpoints_load() -> None:
    """As EMA copies a model, and as a model trained without weight norm is taken over."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False))
    for normed in (
        weight_norm(copy.deepcopy(plain)),
        nn.Sequential(WeightNormConv2d(3, 4, 3), nn.ReLU(), WeightNormConv2d(4, 2, 3, bias=False)),
    ):
        load_state_dict(normed, plain.state_dict(), strict=True)
        x = images(0)[0].float()
        torch.testing.assert_close(normed(x), plain(x))
        twin = copy.deepcopy(normed)
        assert len(SGDPH(twin, lr=0.1).vectors) == len(SGDPH(normed, lr=0.1).vectors) == 3
        twin.load_state_dict(normed.state_dict())
        torch.testing.assert_close(twin(x), plain(x))


def test_a_missing_graph_is_one_line() -> None:
    model = conv_net()
    optimizer = SGDPH(model, lr=0.1)
    loss_of(model).backward()
    refused(ValueError, optimizer.step, 'loss.backward(create_graph=True)', 'needs_graph')


def test_mixed_precision_is_refused() -> None:
    refused(
        ValueError,
        lambda: build(Classifier(), type='AmpOptimWrapper', optimizer=OPTIMIZER),
        'float32',
        'without --amp',
    )


@pytest.mark.parametrize(
    'setting',
    [
        dict(hessian_decay=1.0),
        dict(hessian_lr=-1.0),
        dict(eps=0.0),
        dict(refresh='some'),
        dict(interval=0),
        dict(probes=0),
        dict(momentum=1.0),
        dict(lr=-1.0),
    ],
    ids=str,
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    refused(ValueError, lambda: SGDPH(conv_net(), **{'lr': 0.1, **setting}), next(iter(setting)))


def test_what_cannot_be_differentiated_twice_is_refused_at_start() -> None:
    ops = pytest.importorskip('mmcv.ops')
    model = nn.ModuleDict({'fc': nn.Linear(3, 3), 'pool': ops.RoIAlign(7)})
    refused(ValueError, lambda: SGDPH(model, lr=0.1), 'pool is a RoIAlign', 'one-stage detector')
    refused(
        ValueError,
        lambda: SGDPH(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)), lr=0.1),
        'SyncBatchNorm',
        'torch.nn.BatchNorm2d',
    )
    backbone = pytest.importorskip('mmdet.models.backbones').ResNet(18, with_cp=True)
    refused(ValueError, lambda: SGDPH(backbone, lr=0.1), 'with_cp=False')


def test_cleared_gradients_do_not_count_as_measured() -> None:
    model = conv_net()
    optimizer = SGDPH(model, lr=0.01)
    loss_of(model).backward(create_graph=True)
    optimizer.measure()
    optimizer.zero_grad()
    loss_of(model, 1).backward(create_graph=True)
    optimizer.step()
    assert all(not p.grad.requires_grad for p in model.parameters())


def test_fused_attention_is_refused_with_the_remedy() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(8, 2), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.attention(x, x, x, need_weights=False)[0])

    model = Attends()
    optimizer = SGDPH(model, lr=0.01, refresh='all')
    x = torch.randn(5, 3, 8)
    model(x).square().sum().backward(create_graph=True)
    refused(ValueError, optimizer.step, 'cannot be differentiated twice', 'SDPBackend.MATH')
    optimizer.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        model(x).square().sum().backward(create_graph=True)
    optimizer.step()
