"""KFAC against the exact Fisher matrix, from every sample's Jacobian, where the two are equal.

A Gaussian likelihood of variance 1 has the Fisher block E[J' J]. In a network that is linear in its
input, g = -J_out' e / n holds the target's noise alone: over all pairs of an input and a noise with
mean e e' = I the mean of g g' (x) x x' is that of g g' times that of x x', without rounding aside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import KFAC, PreconditionedOptimizer


def signs(outputs: int) -> Tensor:
    """Noises of mean e e' = I: all signs."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=outputs))).double()


def sampled_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Mean squared error to all targets that the model itself predicts, one noise a sample."""
    noise = signs(model(x).shape[-1])
    out = model(x.repeat_interleave(len(noise), 0))
    noise = noise.repeat(len(x), 1).reshape(len(out), *[1] * (out.dim() - 2), -1)
    return ((out - (out + noise).detach()) ** 2).sum() / 2 / out[..., 0].numel()


def fisher(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """Mean J' J of one layer's [W | b], flattened row by row, over all vectors of outputs."""
    parameters = list(layer.parameters())
    total, count = torch.zeros(()).double(), 0
    for sample in x:
        out = model(sample[None])
        for vector in out.reshape(-1, out.shape[-1]):
            rows = []
            for component in vector:
                slopes = torch.autograd.grad(component, parameters, retain_graph=True)
                rows.append(torch.cat([s.reshape(len(s), -1) for s in slopes], 1).flatten())
            jacobian = torch.stack(rows)
            total = total + jacobian.t() @ jacobian
            count += 1
    return total / count


def factors(optimizer: PreconditionedOptimizer, name: str) -> tuple[Tensor, Tensor]:
    """Running R and L (blocks, n, n) of a layer, over rows or samples."""
    statistics = optimizer.state_dict()['precond']['layers'][f'{name}.weight']['statistics']
    return tuple(
        statistics[key if key in statistics else f'{key}_reduced']
        for key in ('input_moment', 'gradient_moment')
    )


def capture(model: nn.Module, x: Tensor, **settings: Any) -> KFAC:
    """The factors of one step on sampled targets, which lr=0 makes leave the weights alone."""
    optimizer = KFAC(
        model,
        **{
            **dict(lr=0.0, momentum=0.0, scaling='none', stat_interval=2, refresh_interval=2),
            **settings,
        },
        settings='published',
    )
    sampled_loss(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def deep(*widths: int, bias: bool = True) -> Callable[[], nn.Sequential]:
    return lambda: nn.Sequential(
        *(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(widths))
    )


class Pooled(nn.Module):
    """One layer shared over positions, the mean of its outputs, and a linear head."""

    def __init__(self, layer: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.weight.shape[0], 4) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.head(
            x.mean((2, 3)) if isinstance(self.layer, nn.Conv2d) else x.flatten(1, -2).mean(1)
        )


class Dense(nn.Module):
    """Two pointwise convolutions, an output vector at each pixel (last, as a token's)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).movedim(1, -1)


def build(make: Callable[[], nn.Module], *shape: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make().double(), torch.randn(shape).double() + 0.3


def compare(model: nn.Module, optimizer: KFAC, name: str, x: Tensor) -> None:
    """Each block of L (x) R is the layer's diagonal block of the Fisher matrix."""
    exact = fisher(model, model.get_submodule(name), x)
    right, left = factors(optimizer, name)
    size = right.shape[1] * left.shape[1]
    assert len(exact) == len(right) * size
    for k in range(len(right)):
        block = exact[k * size : (k + 1) * size, k * size : (k + 1) * size]
        torch.testing.assert_close(torch.kron(left[k], right[k]), block, rtol=1e-10, atol=1e-13)


# Inputs (samples, [positions,] features); the loss is the mean over all rows.
ROWS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    'one layer': (deep(3, 4), (6, 3)),
    'one layer, no bias': (deep(3, 2, bias=False), (5, 3)),
    'deep': (deep(3, 2, 2, 4), (7, 3)),
    'deep, no bias': (deep(3, 2, 2, 3, bias=False), (5, 3)),
    'wide': (deep(2, 5, 3), (4, 2)),
    'tokens': (deep(3, 2, 3), (3, 4, 3)),
    'tokens in two dimensions': (deep(2, 2, 2), (2, 2, 3, 2)),
    'pixels': (Dense, (2, 3, 2, 3)),
}


@pytest.mark.parametrize('case', ROWS)
def test_expand_is_the_fisher_block_where_rows_are_independent(case: str) -> None:
    model, x = build(ROWS[case][0], *ROWS[case][1])
    optimizer = capture(model, x)
    assert len(optimizer.curvature.layers) == len(list(model.children()))
    for name, _ in model.named_children():
        compare(model, optimizer, name, x)


@pytest.mark.parametrize('case', ['one layer', 'deep'])
def test_without_positions_the_reductions_are_equal(case: str) -> None:
    model, x = build(ROWS[case][0], *ROWS[case][1])
    optimizers = [capture(model, x, reduction=name) for name in ('expand', 'reduce')]
    for name, _ in model.named_children():
        for a, b in zip(*(factors(optimizer, name) for optimizer in optimizers), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


POOLED = [
    pytest.param(lambda: nn.Linear(3, 2, bias=False), (4, 3, 3), id='tokens, no bias'),
    pytest.param(lambda: nn.Linear(3, 2), (4, 3, 3), id='tokens'),
    pytest.param(lambda: nn.Linear(2, 3), (3, 2, 3, 2), id='tokens in two dimensions'),
    pytest.param(lambda: nn.Conv2d(2, 3, 2), (4, 2, 3, 4), id='conv'),
    pytest.param(
        lambda: nn.Conv2d(2, 2, 3, stride=2, padding=1, dilation=1, bias=False),
        (5, 2, 4, 5),
        id='strided conv',
    ),
    pytest.param(
        lambda: nn.Conv2d(4, 4, 2, groups=2, dilation=2, padding=1), (3, 4, 4, 4), id='grouped conv'
    ),
    pytest.param(
        lambda: nn.Conv2d(3, 3, 3, groups=3, padding='same'), (3, 3, 4, 3), id='depthwise conv'
    ),
]


@pytest.mark.parametrize('make, shape', POOLED)
def test_reduce_is_the_fisher_block_before_mean_pooling(make: Any, shape: tuple[int, ...]) -> None:
    model, x = build(lambda: Pooled(make()), *shape)
    optimizer = capture(model, x, reduction='reduce')
    compare(model, optimizer, 'layer', x)
    compare(model, optimizer, 'head', x)


def test_expand_is_not_before_mean_pooling() -> None:
    model, x = build(lambda: Pooled(nn.Conv2d(2, 3, 2)), 4, 2, 3, 4)
    optimizer = capture(model, x)
    with pytest.raises(AssertionError, match='not close'):
        compare(model, optimizer, 'layer', x)
    compare(model, optimizer, 'head', x)


TINY = [dict(damping=1e-24), dict(damping_form='relative', damping=1e-13)]


def check_direction(model: nn.Module, x: Tensor, **settings: Any) -> None:
    """The step is minus the inverse of each layer's Fisher block times its gradient."""
    optimizer = capture(model, x, **settings)
    for group in optimizer.param_groups:
        group['lr'] = 0.5
    generator = torch.Generator().manual_seed(1)
    out = model(x)
    (out * torch.randn(out.shape, generator=generator).double()).sum().backward()
    expected = {}
    for layer in model.children():
        exact, blocks = fisher(model, layer, x), getattr(layer, 'groups', 1)
        gradient = torch.cat([p.grad.reshape(len(p), -1) for p in layer.parameters()], 1)
        pieces = gradient.chunk(blocks)
        size = pieces[0].numel()
        solved = [
            torch.linalg.solve(
                exact[k * size : (k + 1) * size, k * size : (k + 1) * size], piece.flatten()
            ).reshape(piece.shape)
            for k, piece in enumerate(pieces)
        ]
        before = [p.detach().reshape(len(p), -1) for p in layer.parameters()]
        expected[layer] = torch.cat(before, 1) - 0.5 * torch.cat(solved)
    optimizer.step()
    for layer, wanted in expected.items():
        found = torch.cat([p.detach().reshape(len(p), -1) for p in layer.parameters()], 1)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('settings', TINY, ids=['pi', 'relative'])
@pytest.mark.parametrize(
    'case', ['one layer', 'one layer, no bias', 'deep', 'deep, no bias', 'tokens', 'pixels']
)
def test_undamped_the_step_is_the_natural_gradient(case: str, settings: dict[str, Any]) -> None:
    check_direction(*build(ROWS[case][0], *ROWS[case][1]), **settings)


@pytest.mark.parametrize('settings', TINY, ids=['pi', 'relative'])
@pytest.mark.parametrize('groups', [1, 2])
def test_reduced_it_is_before_mean_pooling(groups: int, settings: dict[str, Any]) -> None:
    make = lambda: Pooled(nn.Conv2d(2, 2, 2, groups=groups, dilation=2))
    check_direction(*build(make, 12, 2, 4, 3), reduction='reduce', **settings)


def test_one_undamped_step_solves_least_squares() -> None:
    """The Fisher matrix of a linear model is its loss's Hessian: Newton's step."""
    model, x = build(deep(3, 4), 9, 3)
    optimizer = capture(model, x, damping=1e-24)
    optimizer.param_groups[0]['lr'] = 1.0
    target = torch.randn(9, 4).double()
    for _ in range(2):
        model.zero_grad()
        (((model(x) - target) ** 2).sum() / 2 / len(x)).backward()
        if optimizer.t == 1:
            optimizer.step()
    assert model[0].weight.grad.norm() < 1e-10 and model[0].bias.grad.norm() < 1e-10


def test_the_clipped_step_changes_the_output_by_the_bound() -> None:
    """Undamped, the clip makes the quadratic form of the step with the factors its bound."""
    model, x = build(deep(3, 2, 2, 4), 7, 3)
    optimizer = capture(model, x, damping=1e-24, scaling='kl_clip', kl_clip=1e-4)
    blocks = [fisher(model, layer, x) for layer in model]
    before = [torch.cat([layer.weight, layer.bias[:, None]], 1).detach() for layer in model]
    optimizer.param_groups[0]['lr'] = 0.7
    model(x).square().sum().backward()
    optimizer.step()
    moved = [
        (torch.cat([layer.weight, layer.bias[:, None]], 1).detach() - old).flatten()
        for layer, old in zip(model, before, strict=True)
    ]
    change = sum(v @ block @ v for v, block in zip(moved, blocks, strict=True))
    assert float(change) == pytest.approx(1e-4, rel=1e-6)
