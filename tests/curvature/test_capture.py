"""Capture over whole networks: sharing, freezing, checkpointing, accumulation, scales, memory."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.optimizers import NKFAC
from tests.reference.factors import Loss, measure, plain_copy
from tests.support.capture import compare, loss_of
from tests.support.captured_networks import captured, image, same


def against_oracle(model: nn.Module, *losses: Loss, plain_losses: tuple[Loss, ...] = ()) -> None:
    """Captures the sum of the losses and compares every captured layer."""
    plain = plain_copy(model)
    ours = captured(model, lambda _: [loss(model).backward() for loss in losses])
    assert ours
    for name, found in ours.items():
        weight = plain.get_parameter(name)
        joint = plain.get_submodule(name.rpartition('.')[0]).bias is not None
        compare(found, measure(plain, list(plain_losses or losses), weight, joint))


class Net(nn.Module):
    """A convolution before an in-place ReLU, a head shared over levels, a part used on demand."""

    def __init__(self, inplace: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.relu = nn.ReLU(inplace=inplace)
        self.grouped = nn.Conv2d(4, 4, 3, padding='same', groups=2, bias=False)
        self.head = nn.Conv2d(4, 3, 3, padding=1)
        self.extra = nn.Linear(3, 3)

    def forward(self, x: Tensor, extra: bool = True) -> Tensor:
        x = self.relu(self.grouped(self.relu(self.conv(x))))
        levels = [x, F.max_pool2d(x, 2), F.avg_pool2d(x, 2), F.max_pool2d(x, 3)]
        x = torch.cat([self.relu(self.head(level)).flatten(2) for level in levels], 2).mean(2)
        return self.extra(x) if extra else x


@pytest.mark.parametrize('inplace', [True, False])
def test_inplace_activations_and_a_shared_head(inplace: bool) -> None:
    model = Net(inplace).double()
    loss: Loss = lambda m: loss_of(m(image()))
    against_oracle(model, loss)
    assert set(captured(model, lambda _: loss(model).backward())) == {
        'conv.weight',
        'grouped.weight',
        'head.weight',
        'extra.weight',
    }


def test_an_unused_layer_leaves_nothing() -> None:
    model = Net().double()
    found = captured(model, lambda _: loss_of(model(image(), extra=False)).backward())
    assert set(found) == {'conv.weight', 'grouped.weight', 'head.weight'}
    against_oracle(model, lambda m: loss_of(m(image(), extra=False)))


def test_a_call_without_gradient_leaves_nothing() -> None:
    """A detached output is no row of the loss."""
    linear = nn.Linear(3, 2).double()
    loss: Loss = lambda m: m(torch.ones(5, 3).double()).detach().sum() * loss_of(m(x))
    x = torch.randn(4, 3).double()
    assert captured(linear, lambda _: loss(linear).backward())['weight'][2] == 4
    against_oracle(linear, loss)


@pytest.mark.parametrize('frozen', ['conv.weight', 'grouped.weight', 'head.weight'])
def test_a_frozen_weight_is_not_captured(frozen: str) -> None:
    model = Net().double()
    model.get_parameter(frozen).requires_grad_(False)
    found = captured(model, lambda _: loss_of(model(image())).backward())
    assert set(found) == {'conv.weight', 'grouped.weight', 'head.weight', 'extra.weight'} - {frozen}
    against_oracle(model, lambda m: loss_of(m(image())))


def test_a_weight_frozen_later_is_not_captured() -> None:
    model = Net().double()
    optimizer = NKFAC(model, lr=0.1, stat_interval=1, refresh_interval=1, settings='published')
    loss_of(model(image())).backward()
    optimizer.step()
    optimizer.zero_grad()
    model.head.weight.requires_grad_(False)
    before = model.head.weight.clone()
    loss_of(model(image())).backward()
    assert 'head.weight' not in {layer.name for layer in optimizer.curvature.capture.staged}
    optimizer.step()
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize('make', [lambda: nn.Linear(2, 3), lambda: nn.Conv2d(2, 3, 2)])
def test_a_frozen_bias_leaves_the_gradient_moment_as_it_is(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = make().double()
    module.bias.requires_grad_(False)
    x = torch.randn(2, 2, 3, 2).double()
    _, left, rows = captured(module, lambda _: loss_of(module(x)).backward())['weight']
    plain = plain_copy(module)
    _, expected, count = measure(plain, [lambda m: loss_of(m(x))], plain.weight, False)
    assert torch.allclose(left, expected) and rows == count


def test_norm_recovery_is_over_the_trained_parameters() -> None:
    torch.manual_seed(0)
    module = nn.Linear(2, 3).double()
    module.bias.requires_grad_(False)
    before = module.weight.detach().clone()
    optimizer = NKFAC(module, lr=1.0, momentum=0.0, settings='published')
    loss_of(module(torch.randn(9, 2).double() + 1)).backward()
    optimizer.step()
    assert (module.weight - before).norm().item() == pytest.approx(module.weight.grad.norm().item())


def test_a_tied_embedding_is_named() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 5))
    model[3].weight = model[0].weight
    reasons = {one.name: one.reason for one in NKFAC(model, lr=0.1).left_out}
    assert reasons['3'] == 'its weight is also used by a Embedding'


class Tied(nn.Module):
    """Two modules with one weight; `bias` is shared with it or absent."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = make(), make()
        self.second.weight, self.second.bias = self.first.weight, self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize(
    'make',
    [
        lambda: nn.Linear(4, 4),
        lambda: nn.Linear(4, 4, bias=False),
        lambda: nn.Conv2d(4, 4, 2),
        lambda: nn.Conv2d(4, 4, 2, groups=2, bias=False),
    ],
)
def test_modules_that_share_a_weight_are_one_layer(make: Callable[[], nn.Module]) -> None:
    model = Tied(make).double()
    x = torch.randn(2, 4, 5, 4).double()
    against_oracle(model, lambda m: loss_of(m(x)))
    assert len(NKFAC(model, lr=0.1, settings='published').curvature.layers) == 1


def test_accumulated_micro_batches_equal_the_joint_batch() -> None:
    """The 1/k of accumulation stays in, and every nonlinear step comes after the sums."""
    model, x = Net().double(), image(4)

    def joint(_: NKFAC) -> None:
        (model(x) ** 3).mean().backward()

    def micro(_: NKFAC) -> None:
        for part in x.split(2):
            ((model(part) ** 3).mean() / 2).backward()

    same(captured(model, micro), captured(model, joint))


def test_accumulated_micro_batches_give_the_same_weights() -> None:
    weights = []
    for parts in (1, 2, 4):
        model = Net().double()
        optimizer = NKFAC(model, lr=0.1, stat_interval=1, refresh_interval=1, settings='published')
        for step in range(3):
            optimizer.zero_grad()
            for part in image(4, seed=step).split(4 // parts):
                ((model(part) ** 3).mean() / parts).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(weights[1], weights[0], rtol=0, atol=1e-9)
    assert torch.allclose(weights[2], weights[0], rtol=0, atol=1e-9)


def test_unequal_micro_batches_equal_the_joint_batch() -> None:
    model, x = Net().double(), image(5)
    same(
        captured(
            model,
            lambda _: [(model(part) ** 3).sum().div(5).backward() for part in x.split([1, 3, 1])],
        ),
        captured(model, lambda _: (model(x) ** 3).sum().div(5).backward()),
    )


def test_a_micro_batch_without_gradient_counts_its_rows() -> None:
    linear, x = nn.Linear(3, 2).double(), torch.randn(6, 3).double()
    mask = (torch.arange(6) >= 3).double()[:, None]
    loss: Callable[[slice], Tensor] = lambda part: (linear(x[part]) ** 2 * mask[part]).sum() / 6
    same(
        captured(linear, lambda _: [loss(slice(0, 3)).backward(), loss(slice(3, 6)).backward()]),
        captured(linear, lambda _: loss(slice(0, 6)).backward()),
    )


@pytest.mark.parametrize('scale', [1024.0, 2.0**-40, torch.tensor(65536.0)])
def test_the_loss_scale_is_divided_out(scale: Any) -> None:
    model = Net().double()

    def scaled(optimizer: NKFAC) -> None:
        optimizer.loss_scale = scale
        (loss_of(model(image())) * scale).backward()

    same(captured(model, scaled), captured(model, lambda _: loss_of(model(image())).backward()))


def test_the_loss_scale_is_divided_out_before_any_product() -> None:
    """Squares of scaled gradients overflow float32."""
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)

    def scaled(optimizer: NKFAC) -> None:
        optimizer.loss_scale = 2.0**90
        (linear(x).sum() * 2.0**90).backward()

    same(captured(linear, scaled), captured(linear, lambda _: linear(x).sum().backward()), 1e-6)


@pytest.mark.parametrize('enabled', [True, False])
def test_a_grad_scaler_is_read(enabled: bool) -> None:
    model = Net().double()

    def scaled(optimizer: NKFAC) -> None:
        optimizer.loss_scale = scaler = torch.amp.GradScaler('cpu', 512.0, enabled=enabled)
        scaler.scale(loss_of(model(image()))).backward()

    same(captured(model, scaled), captured(model, lambda _: loss_of(model(image())).backward()))


def test_measuring_steps_leave_no_finalizers_and_show_no_warning_again() -> None:
    model = nn.Linear(3, 2)
    optimizer = NKFAC(model, lr=0.1, stat_interval=1, refresh_interval=1)

    def step() -> None:
        warnings.warn('shown once', UserWarning, stacklevel=1)
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter('default')
        step()  # adds the filter, which makes Python forget what it showed
        before = len(weakref.finalize._registry)  # type: ignore[attr-defined]
        shown.clear()
        for _ in range(3):
            step()
    assert len(weakref.finalize._registry) == before  # type: ignore[attr-defined]
    assert len([w for w in shown if 'shown once' in str(w.message)]) <= 1


def test_an_optimizer_that_is_deleted_leaves_no_global_hook() -> None:
    from torch.nn.modules import module as torch_module

    before = len(torch_module._global_forward_pre_hooks)
    model = nn.Linear(3, 2)
    optimizer = copy.deepcopy(NKFAC(model, lr=0.1))
    other = NKFAC(model, lr=0.1)
    assert len(torch_module._global_forward_pre_hooks) > before
    del optimizer, other
    gc.collect()
    assert len(torch_module._global_forward_pre_hooks) == before


@pytest.mark.parametrize('backward', [False, True])
def test_hooks_end_with_an_optimizer_that_is_deleted_within_a_step(backward: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = NKFAC(model, lr=0.1)
    loss = model(torch.randn(5, 4)).sum()
    if backward:
        loss.backward()
    del optimizer, loss
    gc.collect()
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
