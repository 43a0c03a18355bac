"""KFAC's statistics against a slow loop over samples, for every kind of input."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmprecond.core import samples
from mmprecond.optimizers import KFAC, PreconditionedOptimizer
from tests.support.samples import CONVS, Scaler, loss_of, positions, slow
from tests.support.trajectories import Convs, batch, make_loss

REDUCTIONS = ['expand', 'reduce']


def statistics(optimizer: PreconditionedOptimizer, name: str = 'weight') -> tuple[Tensor, Tensor]:
    """Running R and L of a layer; after its first sample that sample."""
    kept = optimizer.state_dict()['precond']['layers'][name]['statistics']
    return tuple(
        kept[k if k in kept else f'{k}_reduced'] for k in ('input_moment', 'gradient_moment')
    )


def check(module: nn.Module, reduction: str, *inputs: Tensor, **options: Any) -> None:
    module, inputs = module.double(), tuple(x.double() for x in inputs)
    expected = slow(module, reduction, *inputs)
    optimizer = KFAC(module, lr=0.0, reduction=reduction, **options, settings='published')
    sum(loss_of(module(x)) for x in inputs).backward()
    optimizer.step()
    for ours, theirs in zip(statistics(optimizer), expected, strict=True):
        torch.testing.assert_close(ours, theirs.expand_as(ours), rtol=1e-10, atol=1e-12)
        assert torch.linalg.eigvalsh(ours).min() > -1e-10 * ours.norm()


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(4,), (5, 4), (3, 1, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_linear(shape: tuple[int, ...], bias: bool, reduction: str) -> None:
    torch.manual_seed(0)
    check(nn.Linear(4, 3, bias=bias), reduction, torch.randn(shape))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_tokens_in_other_orders_of_memory(reduction: str, bias: bool) -> None:
    torch.manual_seed(0)
    for x in (
        torch.randn(5, 2, 4).transpose(0, 1),
        torch.randn(4, 2, 5).permute(1, 2, 0),
        torch.randn(2, 4, 3, 5).permute(0, 2, 3, 1),
    ):
        check(nn.Linear(4, 3, bias=bias), reduction, x)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', CONVS)
@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_conv(reduction: str, name: str, bias: bool) -> None:
    torch.manual_seed(0)
    make = lambda: nn.Conv2d(**{'in_channels': 4, 'out_channels': 4, 'bias': bias, **CONVS[name]})
    x = torch.randn(3, 4, 5, 6)
    check(make(), reduction, x)
    check(make(), reduction, x.to(memory_format=torch.channels_last))
    check(make().to(memory_format=torch.channels_last), reduction, x, capture_mb=1e-6)
    check(make(), reduction, torch.randn(3, 7, 5, 12)[:, 2:6, :, ::2])
    check(make(), reduction, torch.randn(4, 6, 5))
    check(make(), reduction, torch.randn(1, 4, 1, 5).expand(2, 4, 5, 5))


@pytest.mark.parametrize('mode', ['reflect', 'circular', 'replicate'])
def test_reduced_inputs_are_padded_as_the_convolution_pads(mode: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode, stride=2).double()
    x = torch.randn(4, 2, 5, 6).double()
    optimizer = KFAC(conv, lr=0.0, reduction='reduce', settings='published')
    loss_of(conv(x)).backward()
    optimizer.step()
    padded = F.unfold(F.pad(x, (1, 1, 1, 1), mode=mode), 3, stride=2).mean(2)
    rows = torch.cat([padded, torch.ones(4, 1).double()], 1)
    torch.testing.assert_close(statistics(optimizer)[0][0], rows.t() @ rows / 4)


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_calls_of_different_sizes_add_up(reduction: str) -> None:
    """Two calls of one module: every call's samples count."""
    torch.manual_seed(0)
    check(
        nn.Conv2d(4, 4, 3, groups=2),
        reduction,
        torch.randn(2, 4, 5, 6),
        torch.randn(3, 4, 3, 4),
        torch.randn(4, 4, 4),
    )
    check(nn.Linear(4, 3, bias=False), reduction, torch.randn(2, 5, 4), torch.randn(3, 4))


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize(
    'make, shape',
    [
        (lambda: nn.Linear(4, 3), (0, 4)),
        (lambda: nn.Linear(4, 3), (0, 7, 4)),
        (lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1), (0, 4, 5, 5)),
    ],
)
def test_an_empty_batch(make: Any, shape: tuple[int, ...], reduction: str) -> None:
    """Alone it leaves no statistic, beside a full one it adds nothing."""
    torch.manual_seed(0)
    full = torch.randn(2, 4) if len(shape) < 4 else torch.randn(2, *shape[1:])
    check(make(), reduction, torch.randn(shape), full)
    module = make()
    optimizer = KFAC(module, lr=0.1, reduction=reduction, settings='published')
    module(torch.randn(shape)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()['precond']['layers'] == {}
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize('reduction', ['expand', 'reduce'])
def test_samples_without_positions_beside_others(reduction: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 3, bias=False).double()
    optimizer = KFAC(module, lr=0.0, reduction=reduction, settings='published')
    full = torch.randn(3, 4).double()
    (loss_of(module(full)) + module(torch.zeros(2, 0, 4).double()).sum()).backward()
    optimizer.step()
    right, _ = statistics(optimizer)
    assert right.isfinite().all()
    torch.testing.assert_close(
        right[0] / right[0].norm(), full.t() @ full / (full.t() @ full).norm()
    )


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_accumulation_is_the_joint_batch(reduction: str) -> None:
    """Micro-batches of unequal size, at every step."""
    model = Convs().double()
    model.norm.eval()
    twin = copy.deepcopy(model)
    settings = dict(lr=0.05, reduction=reduction, stat_interval=1, refresh_interval=1)
    parts, whole = (
        KFAC(model, **settings, settings='published'),
        KFAC(twin, **settings, settings='published'),
    )
    for step in range(3):
        x = batch(step, 5)
        parts.zero_grad(), whole.zero_grad()
        make_loss(x[:2], 5 / 2)(model).backward()
        make_loss(x[2:], 5 / 3)(model).backward()
        make_loss(x)(twin).backward()
        parts.step(), whole.step()
        for name in ('stem', 'depthwise', 'grouped', 'head'):
            for a, b in zip(
                *(statistics(o, f'{name}.weight') for o in (parts, whole)), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def double(sums: Sequence[Tensor]) -> None:
    """The sum over two ranks with equal values."""
    for value in sums:
        value.mul_(2)


@pytest.mark.parametrize('reduction', REDUCTIONS)
def test_two_ranks_are_the_joint_batch(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks with equal shards, each with the mean loss of its own."""
    found = []
    for ranks in (1, 2):
        torch.manual_seed(0)
        module = nn.Conv2d(2, 3, 2).double()
        optimizer = KFAC(module, lr=0.0, reduction=reduction, settings='published')
        x = torch.randn(3, 2, 4, 5).double()
        if ranks == 2:
            monkeypatch.setattr(samples, 'world_size', lambda: 2)
            monkeypatch.setattr(samples, 'sum_over_ranks', double)
            monkeypatch.setattr(samples, 'start_sum', lambda sums: partial(double, sums))
        else:
            x = torch.cat([x, x])
        module(x).pow(4).mean().backward()
        optimizer.step()
        found.append(statistics(optimizer))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize('reduction', ['expand', 'reduce'])
@pytest.mark.parametrize('scale', [256.0, Scaler()], ids=['number', 'scaler'])
def test_the_loss_scale_is_divided_out(scale: Any, reduction: str) -> None:
    found = []
    for given in (None, scale):
        torch.manual_seed(0)
        module = nn.Conv2d(2, 3, 2).double()
        optimizer = KFAC(module, lr=0.0, reduction=reduction, settings='published')
        optimizer.loss_scale = given
        (
            loss_of(module(torch.randn(3, 2, 4, 4).double())) * (1.0 if given is None else 256.0)
        ).backward()
        optimizer.step()
        found.append(statistics(optimizer))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_products_are_at_least_float32(dtype: torch.dtype, reduction: str) -> None:
    """Gradients of 1e-4 have squares that float16 cannot hold; nor sums that overflow it."""
    torch.manual_seed(0)
    module = nn.Linear(6, 4, bias=False).to(dtype)
    x = (100 * torch.randn(8, 3, 6)).to(dtype)
    optimizer = KFAC(module, lr=0.0, reduction=reduction, settings='published')
    (1e-4 * module(x)).sum().backward()
    optimizer.step()
    right, left = statistics(optimizer)
    assert right.dtype == left.dtype == torch.float32
    g = torch.full((24, 4), 1e-4, dtype=dtype).double()
    g, a = (
        (g[:8] * 3, x.double().mean(1)) if reduction == 'reduce' else (g, x.double().reshape(24, 6))
    )
    torch.testing.assert_close(left[0].double(), len(g) * g.t() @ g, rtol=1e-5, atol=0)
    torch.testing.assert_close(right[0].double(), a.t() @ a / len(a), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize('reduction', REDUCTIONS)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('kind', ['conv', 'tokens'])
def test_recomputed_and_changed_in_place(kind: str, bias: bool, reduction: str) -> None:
    """Activation checkpointing and an in-place ReLU leave the statistics as they are."""
    for way in ('plain', 'in place', 'checkpoint'):
        torch.manual_seed(0)
        conv = kind == 'conv'
        module = nn.Conv2d(2, 3, 3, padding=1, bias=bias) if conv else nn.Linear(5, 3, bias=bias)
        x = torch.randn(3, 2, 4, 5).double().requires_grad_()
        plain = copy.deepcopy(module.double())
        out = plain(x)
        (g,) = torch.autograd.grad(loss_of(F.relu(out)), out)
        left = 0.0
        for _, rows in positions(module, x, g):
            rows = rows.sum(1, keepdim=True) if reduction == 'reduce' else rows
            left = left + rows.mT @ rows
        count = 3 if reduction == 'reduce' else g.numel() // 3
        optimizer = KFAC(module, lr=0.0, reduction=reduction, settings='published')
        part = lambda x: F.relu(module(x), inplace=way == 'in place')
        loss_of(
            checkpoint(part, x, use_reentrant=False) if way == 'checkpoint' else part(x)
        ).backward()
        optimizer.step()
        right, found = statistics(optimizer)
        torch.testing.assert_close(right, slow(module, reduction, x.detach())[0])
        torch.testing.assert_close(found, left * count, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('bias', [False, True])
def test_a_sample_is_a_row_of_the_first_dimension(bias: bool) -> None:
    """Permuting a sample's tokens or repeating each token changes nothing under mean pooling."""
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6).double()
    found = []
    for given in (x, x[:, torch.randperm(5)], x.repeat_interleave(2, 1)):
        torch.manual_seed(1)
        module = nn.Linear(6, 3, bias=bias).double()
        optimizer = KFAC(module, lr=0.0, reduction='reduce', settings='published')
        module(given).mean(1).square().sum().backward()
        optimizer.step()
        found.append(statistics(optimizer))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
