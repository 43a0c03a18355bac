"""Captured factors of every supported layer against row-by-row Jacobians in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

from mmprecond.curvature.conv import Conv2dLayer
from mmprecond.optimizers import NKFAC, PreconditionedOptimizer
from mmprecond.rules import SGDM
from tests.reference.factors import gradient_rows, input_rows, plain_copy, second_moment
from tests.support.capture import CONVS, EMPTY, RawKronecker, compare, geometries, loss_of, staged


def wanted(
    module: nn.Module, *inputs: Tensor, joint: bool | None = None
) -> tuple[Tensor, Tensor, int]:
    """What `staged` should be after `loss_of` of each input."""
    joint = module.bias is not None if joint is None else joint
    right: Any
    left: Any
    plain, right, left, count = plain_copy(module), 0.0, 0.0, 0
    for x in inputs:
        rows = input_rows(module, x, joint)
        out = plain(x.detach().double())
        (gradient,) = torch.autograd.grad(loss_of(out), out)
        right = right + second_moment(rows)
        left = left + second_moment(gradient_rows(module, gradient))
        count += rows.shape[1]
    return right / max(1, count), left, count


def raw_optimizer(model: nn.Module, **options: Any) -> PreconditionedOptimizer:
    method = RawKronecker(**RawKronecker.published | dict(stat_interval=1, refresh_interval=1))
    return PreconditionedOptimizer(
        model,
        model=model,
        rule=SGDM(),
        method=method,
        defaults=dict(lr=0.1, momentum=0.0, weight_decay=0.0),
        **options,
    )


def running(optimizer: PreconditionedOptimizer, name: str = 'weight') -> tuple[Tensor, Tensor]:
    """The running statistics R and L, by the public way."""
    statistics = optimizer.state_dict()['precond']['layers'][name]['statistics']
    return statistics['input_moment'], statistics['gradient_moment']


def check(module: nn.Module, *inputs: Tensor, **options: Any) -> None:
    """Captures one backward pass over the inputs, and merges it, as the oracle does.

    Convolutions of stride 1 both ways: by patches, and by shifted products.
    """
    module, inputs = module.double(), tuple(x.double() for x in inputs)
    right, left, rows = wanted(module, *inputs)
    by_patches = isinstance(module, nn.Conv2d) and module.stride == (1, 1)
    for few in (10**9, 1)[: 1 + by_patches]:
        twin = copy.deepcopy(module)
        optimizer = raw_optimizer(twin, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Conv2dLayer, 'few_rows', few)
            patch.setattr(Conv2dLayer, 'few_channels', 1)
            sum(loss_of(twin(x)) for x in inputs).backward()
        compare(staged(optimizer), (right, left, rows))
        optimizer.step()
        compare((*running(optimizer), rows), (right, left, rows))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(4,), (5, 4), (2, 3, 4), (2, 3, 2, 4)])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    check(nn.Linear(4, 3, bias=bias), torch.randn(shape))


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', CONVS)
def test_conv(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    check(
        nn.Conv2d(**{'in_channels': 4, 'out_channels': 4, 'bias': bias, **CONVS[name]}),
        torch.randn(2, 4, 5, 6),
    )


@pytest.mark.parametrize('name', ['stride', 'same even', 'reflect', 'groups'])
def test_conv_of_one_unbatched_image(name: str) -> None:
    torch.manual_seed(0)
    check(nn.Conv2d(4, 4, **CONVS[name]), torch.randn(4, 6, 5))


@pytest.mark.parametrize('name', ['plain', 'pointwise', 'padding', 'groups', 'not square'])
def test_conv_of_memory_in_other_orders(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 5)
    check(nn.Conv2d(4, 4, **CONVS[name]), x.to(memory_format=torch.channels_last))
    check(nn.Conv2d(4, 4, **CONVS[name]).to(memory_format=torch.channels_last), x)
    check(nn.Conv2d(4, 4, **CONVS[name]), torch.randn(2, 4, 3, 9).permute(0, 3, 1, 2)[:, 2:6])
    check(nn.Conv2d(4, 4, **CONVS[name]), torch.randn(1, 4, 1, 5).expand(2, 4, 4, 5))


@settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(geometries())
def test_conv_of_any_geometry(case: tuple[dict[str, Any], tuple[int, ...], float]) -> None:
    conv, shape, capture_mb = case
    torch.manual_seed(0)
    module, x = nn.Conv2d(**conv), torch.randn(shape)
    with torch.no_grad():
        assume(module(x).numel() <= 250)
    check(module, x, capture_mb=capture_mb)


@pytest.mark.parametrize(
    'module', [nn.Linear(4, 3), nn.Conv2d(4, 3, 2, padding=1), nn.Conv2d(4, 4, 3, groups=2)]
)
def test_calls_of_different_sizes_add_up(module: nn.Module) -> None:
    torch.manual_seed(0)
    sizes = [(2, 3), (1, 5), (3, 4), (1, 3), (2, 6)]
    check(
        module,
        *(
            torch.randn(n, 4, s, s + 1) if isinstance(module, nn.Conv2d) else torch.randn(n, s, 4)
            for n, s in sizes
        ),
    )


@pytest.mark.parametrize('make, shape', EMPTY)
def test_an_empty_call_adds_nothing_to_others(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    full = torch.randn(2, *shape[1:])
    check(make(), torch.randn(shape), full)
    check(make(), full, torch.randn(shape))


def test_nkfac_normalises_and_averages_captures() -> None:
    """Each block by its own Frobenius norm; weight 1 - stat_decay for the new one, from zero."""
    torch.manual_seed(0)
    module = nn.Conv2d(4, 4, 3, groups=2).double()
    optimizer = NKFAC(
        module, lr=0.0, stat_decay=0.7, stat_interval=1, refresh_interval=1, settings='published'
    )
    expected = [0.0, 0.0]
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(2, 4, 5, 5).double()
        loss_of(module(x)).backward()
        optimizer.step()
        for k, sample in enumerate(wanted(module, x)[:2]):
            size = torch.stack([matrix.norm() for matrix in sample])[:, None, None]
            expected[k] = 0.7 * expected[k] + 0.3 * sample / size
        assert all(
            torch.allclose(a, b, rtol=1e-9, atol=1e-12)
            for a, b in zip(running(optimizer), expected, strict=True)
        )


@pytest.mark.parametrize('make, shape', EMPTY)
def test_an_empty_call_alone_leaves_no_statistic(make: Any, shape: tuple[int, ...]) -> None:
    module = make()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = NKFAC(module, lr=0.1, settings='published')
    module(torch.randn(shape)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()['precond']['layers'] == {}
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize('make, shape', EMPTY)
def test_an_empty_call_does_not_age_the_statistic(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = make()
    optimizer = NKFAC(module, lr=0.1, stat_interval=1, refresh_interval=1, settings='published')
    loss_of(module(torch.randn(2, *shape[1:]))).backward()
    optimizer.step()
    before = [s.clone() for s in running(optimizer)]
    optimizer.zero_grad()
    loss_of(module(torch.randn(shape))).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, running(optimizer), strict=True))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_are_formed_in_the_weights_dtype_but_at_least_float32(dtype: torch.dtype) -> None:
    """Gradients of 1e-3 have squares that float16 cannot hold."""
    torch.manual_seed(0)
    module = nn.Linear(6, 4).to(dtype)
    x = torch.randn(8, 6).to(dtype)
    optimizer = NKFAC(module, lr=0.1, settings='published')
    out = module(x)
    (1e-4 * out).sum().backward()
    right, left, rows = staged(optimizer)
    assert right.dtype == left.dtype == torch.promote_types(dtype, torch.float32)
    g = torch.full((8, 4), 1e-4, dtype=dtype).double()
    ones = torch.cat([x.double(), torch.ones(8, 1).double()], 1)
    precise = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.allclose(left[0].double(), g.t() @ g, rtol=precise, atol=0)
    assert torch.allclose(right[0].double(), ones.t() @ ones / 8, rtol=precise, atol=1e-6)
    assert rows == 8


def test_autocast_captures_in_the_weights_dtype() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(6, 4), torch.randn(8, 6)
    optimizer = NKFAC(module, lr=0.1, settings='published')
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    right, left, _ = staged(optimizer)
    ones = torch.cat([x, torch.ones(8, 1)], 1)
    assert right.dtype == left.dtype == torch.float32
    assert torch.allclose(right[0], ones.t() @ ones / 8, rtol=1e-2, atol=1e-2)
    assert torch.allclose(left[0], torch.full((4, 4), 8.0))


@pytest.mark.parametrize(
    'module, shape',
    [(nn.Linear(4, 3), (5, 4)), (nn.Conv2d(4, 3, 3), (2, 4, 5, 5))],
    ids=['linear', 'conv'],
)
def test_an_input_given_by_keyword(module: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = module.double(), torch.randn(shape).double()
    optimizer = NKFAC(module, lr=0.1, settings='published')
    loss_of(module(input=x)).backward()
    compare(staged(optimizer), wanted(module, x))


def relu_of_a_view(out: Tensor) -> Tensor:
    out.flatten(1).relu_()
    return out


def part_overwritten(out: Tensor) -> Tensor:
    out[0] = 0.0
    return out


@pytest.mark.parametrize(
    'change', [torch.relu_, relu_of_a_view, part_overwritten, lambda out: out.mul_(3.0).add_(1.0)]
)
def test_an_output_changed_in_place_afterwards(change: Any) -> None:
    """g is the gradient of what the layer itself returned."""
    torch.manual_seed(0)
    module, x = nn.Conv2d(2, 3, 3).double(), torch.randn(2, 2, 5, 5).double()
    optimizer = NKFAC(module, lr=0.1, settings='published')
    loss_of(change(module(x))).backward()
    plain, probe = plain_copy(module), torch.zeros(2, 3, 3, 3).double().requires_grad_()
    loss_of(change(plain(x) + probe)).backward()
    left = second_moment(gradient_rows(module, probe.grad))
    compare(staged(optimizer), (wanted(module, x)[0], left, 18))


def test_a_hook_of_the_user_that_replaces_the_output_does_not_change_g() -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(4, 3).double(), torch.randn(5, 4).double()
    module.register_forward_hook(lambda module, args, out: 2 * out)
    optimizer = NKFAC(module, lr=0.1, settings='published')
    loss_of(module(x)).backward()
    plain, probe = plain_copy(module), torch.zeros(5, 3).double().requires_grad_()
    loss_of(2 * (plain(x) + probe)).backward()
    compare(
        staged(optimizer),
        (wanted(plain, x)[0], second_moment(gradient_rows(module, probe.grad)), 5),
    )


def test_losses_of_one_forward_pass_add_their_gradients_moments_to_rows_counted_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, x = nn.Linear(4, 3).double(), torch.randn(5, 4).double()
    optimizer = NKFAC(module, lr=0.1, settings='published')
    out = module(x)
    loss_of(out).backward(retain_graph=True)
    for _ in range(2):
        out.sum().backward(retain_graph=True)
    right, left, rows = wanted(module, x)
    compare(staged(optimizer), (right, left + 2 * torch.full((3, 3), 5.0).double(), rows))
    assert not caplog.records
