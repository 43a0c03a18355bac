"""Checks of new layer types, preconditioners and rules, in float64.

Each check raises an AssertionError that says what is wrong. The checks need only torch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .curvature import (
    ALL,
    GRADIENT,
    INPUT,
    Capture,
    Layer,
    Moment,
    SampledRows,
    Statistic,
    find_layers,
)
from .curvature.statistic import ReducedRows
from .linalg import named_tensors
from .optimizers import PreconditionedOptimizer, RuleOptimizer
from .preconditioners import Preconditioner
from .rules import SGDM, Rule

#: Number of output elements whose gradient `check_layer` compares.
ELEMENTS = 60


def check_layer(module: nn.Module, *inputs: Tensor, seed: int = 0) -> None:
    """Checks that a layer type pairs the right rows, and that their sums are correct.

    A layer is linear in its weight. The gradient of an output element with respect to the weight
    must therefore be the sum of g x' over the layer's rows. The check compares this sum with
    autograd's gradient, for single output elements. It also compares the second moments of a
    capture, in a backward pass over all inputs, with those of the rows.

    Args:
        module: A small module of a registered class.
        inputs: One or more inputs.
        seed: Seed of the random numbers.

    Raises:
        AssertionError: If something is wrong.
    """
    module = copy.deepcopy(module).double()
    batches = [batch.detach().double() for batch in inputs]
    layers, left_out = find_layers(module, [dict(params=list(module.parameters()))])
    assert layers, f'no layer was found: {[left.reason for left in left_out]}'
    (layer,) = layers.values()
    generator = torch.Generator().manual_seed(seed)
    _check_matrix_form(layer, generator)
    for batch in batches:
        _check_pairs(layer, module, batch, generator)
        _check_samples(layer, module, batch, generator)
    _check_moments(layer, module, batches, generator)


def _random_like(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def _assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(
        actual, expected, rtol=1e-9, atol=1e-11, msg=lambda text: f'{name}: {text}'
    )


def _check_matrix_form(layer: Layer, generator: torch.Generator) -> None:
    tensors = [_random_like(p, generator) for p in layer.parameters]
    matrix = layer.join(*tensors)
    assert tuple(matrix.shape) == layer.shape, (
        f'join makes {tuple(matrix.shape)}, shape says {layer.shape}'
    )
    for tensor, piece in zip(tensors, layer.split(matrix), strict=True):
        assert torch.equal(tensor, piece), 'split is not the inverse of join'


def _paired_rows(
    layer: Layer, module: nn.Module, inputs: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Input rows (b, i, n), with the 1 of a joint bias, and gradient rows (b, o, n)."""
    chunks = [layer.with_ones(rows) for rows in layer.input_rows(module, inputs)]
    return torch.cat(chunks, 2), layer.gradient_rows(module, gradient)


def _check_pairs(
    layer: Layer, module: nn.Module, inputs: Tensor, generator: torch.Generator
) -> None:
    output = module(inputs)
    chosen = torch.randperm(output.numel(), generator=generator)[:ELEMENTS]
    for element in chosen.tolist():
        gradient = torch.zeros_like(output)
        gradient.view(-1)[element] = 1
        expected = torch.autograd.grad(output, layer.parameters, gradient, retain_graph=True)
        right, left = _paired_rows(layer, module, inputs, gradient)
        assert right.shape[2] == left.shape[2], (
            f'{right.shape[2]} input rows and {left.shape[2]} gradient rows'
        )
        _assert_close(
            left @ right.mT,
            layer.join(*expected),
            f'the gradient of output element {element} by the weight',
        )


def _check_samples(
    layer: Layer, module: nn.Module, inputs: Tensor, generator: torch.Generator
) -> None:
    """Checks that reduced rows are means and sums, and that all drawn positions are all rows."""
    gradient = _random_like(module(inputs), generator)
    samples = positions = 0
    if len(layer.row_kinds) > 1:
        samples = layer.sample_count(module, gradient)
        positions = layer.position_count(module, gradient)
    if not samples or not positions:
        return
    right, left = (
        torch.cat(list(layer.input_rows(module, inputs)), 2),
        layer.gradient_rows(module, gradient),
    )
    assert right.shape[2] == samples * positions, (
        f'{right.shape[2]} rows, but {samples} samples of {positions} positions'
    )
    by_sample = [rows.unflatten(2, (samples, positions)) for rows in (right, left)]
    if ReducedRows in layer.row_kinds:
        _assert_close(layer.reduced_input(module, inputs), by_sample[0].mean(3), 'reduced input')
        _assert_close(
            layer.reduced_gradient(module, gradient), by_sample[1].sum(3), 'reduced gradient'
        )
    if SampledRows in layer.row_kinds:
        drawn = torch.randperm(positions, generator=generator)
        _assert_close(
            layer.sampled_input(module, inputs, drawn),
            by_sample[0][..., drawn].flatten(2),
            'sampled input',
        )
        _assert_close(
            layer.sampled_gradient(module, gradient, drawn),
            by_sample[1][..., drawn].flatten(2),
            'sampled gradient',
        )
        _assert_close(
            layer.position_sizes(module, gradient),
            by_sample[1].square().sum((0, 1, 2)),
            'the squared gradient rows at each position',
        )


def _check_moments(
    layer: Layer, module: nn.Module, batches: Sequence[Tensor], generator: torch.Generator
) -> None:
    capture = Capture()
    statistics = (Statistic(INPUT, Moment(), ALL), Statistic(GRADIENT, Moment(), ALL))
    capture.arm({layer: statistics})
    outputs = [module(batch) for batch in batches]
    gradients = [_random_like(output, generator) for output in outputs]
    torch.autograd.backward(outputs, gradients)
    capture.disarm()
    staged = capture.staged[layer]
    pairs = [
        _paired_rows(layer, module, batch, gradient)
        for batch, gradient in zip(batches, gradients, strict=True)
    ]
    assert staged.rows == sum(right.shape[2] for right, _ in pairs), (
        f'{staged.rows} rows were counted, not {sum(right.shape[2] for right, _ in pairs)}'
    )
    for statistic, k in zip(statistics, (0, 1), strict=True):
        total = torch.stack([pair[k] @ pair[k].mT for pair in pairs]).sum(0)
        _assert_close(staged.sums[statistic.key], total, statistic.key)


class _Branches(nn.Module):
    """Linear layers of equal shape, each with its own inputs."""

    def __init__(self, count: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size[1], size[0]) for _ in range(count))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.tanh(layer(rows)).square().mean()
                for layer, rows in zip(self.layers, inputs, strict=True)
            ]
        ).sum()


def _random_batch(step: int, count: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    scales = torch.linspace(0.5, 2, count, dtype=torch.float64)[:, None, None]
    return scales * torch.randn(count, 3 * width, width, generator=generator, dtype=torch.float64)


def check_preconditioner(method: Preconditioner, size: tuple[int, int] = (4, 5)) -> None:
    """Checks that a preconditioner treats the layers of a stack correctly.

    Each layer in a stack must take the same steps as alone. Operators must have the outlined
    shapes. A saved and loaded run must continue bit for bit. A refresh must report exactly those
    layers whose statistics are not finite.

    Args:
        method: The preconditioner. It must work with any rule and have short intervals.
        size: o and i (without bias) of the linear layers.

    Raises:
        AssertionError: If something is wrong.
    """
    steps = 2 * method.refresh_interval + 1
    assert steps <= 50, f'refresh_interval={method.refresh_interval} is too long to check'

    def make(model: nn.Module) -> PreconditionedOptimizer:
        defaults = dict(lr=0.05, momentum=0.5, weight_decay=0.01)
        return PreconditionedOptimizer(
            model, model=model, rule=SGDM(), method=method, defaults=defaults
        )

    def train(
        model: nn.Module,
        optimizer: PreconditionedOptimizer,
        first: int,
        last: int,
        part: slice = slice(None),
    ) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            model(_random_batch(step, 3, size[1])[part]).backward()
            optimizer.step()

    torch.manual_seed(0)
    together = _Branches(3, size).double()
    optimizer = make(together)
    alone = []
    for k in range(3):
        single = _Branches(1, size).double()
        single.layers[0].load_state_dict(together.layers[k].state_dict())
        alone.append(single)
    train(together, optimizer, 0, steps)
    if method.clip is None:  # a clip is over all layers
        for k, single in enumerate(alone):
            train(single, make(single), 0, steps, slice(k, k + 1))
            for stacked, expected in zip(
                together.layers[k].parameters(), single.parameters(), strict=True
            ):
                _assert_close(
                    stacked.detach(),
                    expected.detach(),
                    f'layer {k} in a stack of three and by itself',
                )
    _check_outline(optimizer)
    _check_resume(together, optimizer, make, train, steps)
    _check_failure_report(optimizer)


def _check_outline(optimizer: PreconditionedOptimizer) -> None:
    (stack,) = optimizer.curvature.stacks
    assert len(stack.ready()) == 3, 'after two intervals not every layer has an operator'
    shapes = {name: tuple(t.shape[1:]) for name, t in named_tensors(stack.operators).items()}
    outlined = {name: tuple(t.shape[1:]) for name, t in named_tensors(stack.outline).items()}
    assert shapes == outlined, f'operators are {shapes}, outline says {outlined}'


def _check_resume(model: nn.Module, optimizer: Any, make: Any, train: Any, steps: int) -> None:
    twin = copy.deepcopy(model)
    resumed = make(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, net_optimizer in ((model, optimizer), (twin, resumed)):
        train(net, net_optimizer, steps, 2 * steps)
    for weight, resumed_weight in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(weight, resumed_weight), 'a resumed run departs'


def _check_failure_report(optimizer: PreconditionedOptimizer) -> None:
    (stack,) = optimizer.curvature.stacks
    for name in list(stack.statistics):
        before = stack.statistics[name].clone()
        stack.statistics[name][1] = float('nan')
        _, succeeded = stack.method.refresh(stack.factors([0, 1, 2]), None, None)
        assert succeeded.tolist() == [True, False, True], (
            f'NaN in {name} of layer 1 of three is reported as {succeeded.tolist()}'
        )
        stack.statistics[name].copy_(before)


def check_rule(rule: Rule, **hyper: Any) -> None:
    """Checks a rule on batches of parameters, in a resumed run, and at a learning rate of zero.

    Args:
        rule: The rule.
        hyper: Hyper-parameters in place of the rule's defaults.

    Raises:
        AssertionError: If something is wrong.
    """
    missing = [name for name in rule.hyper if name != 'lr' and name not in rule.defaults]
    assert not missing, f'defaults has no {", ".join(missing)}'
    shapes = [(4, 3), (4, 3), (5,), (2, 3, 2)]

    def make(params: Sequence[Tensor], lr: float = 0.05) -> RuleOptimizer:
        return RuleOptimizer(params, copy.deepcopy(rule), {**rule.defaults, 'lr': lr, **hyper})

    def draw(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def train(
        params: Sequence[Tensor],
        optimizer: RuleOptimizer,
        first: int,
        last: int,
        chosen: Sequence[int] = range(4),
    ) -> None:
        for step in range(first, last):
            gradients = draw(100 + step)
            for p, k in zip(params, chosen, strict=True):
                p.grad = gradients[k]
            optimizer.step()

    together = [nn.Parameter(p) for p in draw(0)]
    optimizer = make(together)
    train(together, optimizer, 0, 4)
    for k in range(4):
        single = [nn.Parameter(draw(0)[k])]
        train(single, make(single), 0, 4, [k])
        _assert_close(
            single[0].detach(), together[k].detach(), f'parameter {k} by itself and in a batch'
        )
    twins = [nn.Parameter(p.detach().clone()) for p in together]
    resumed = make(twins)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(together, optimizer, 4, 7)
    train(twins, resumed, 4, 7)
    for weight, resumed_weight in zip(together, twins, strict=True):
        assert torch.equal(weight, resumed_weight), 'a resumed run departs'
    still = [nn.Parameter(p) for p in draw(0)]
    train(still, make(still, lr=0.0), 0, 2)
    for p, before in zip(still, draw(0), strict=True):
        _assert_close(p.detach(), before, 'at lr=0 a weight')
