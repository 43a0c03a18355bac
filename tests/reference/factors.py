"""Second moments by brute force, in float64: one row at a time, by differentiating.

An input row x of a layer is d out[position, channel] / d weight[channel]: the layer is linear in
its weight. A gradient row g is d loss / d out, read from a zero that is added to the output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from types import TracebackType

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module], Tensor]


def plain_copy(module: nn.Module) -> nn.Module:
    """A float64 copy without any hook."""
    module = copy.deepcopy(module).double()
    for child in module.modules():
        for hooks in (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks):
            hooks.clear()
    return module


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def blocks_of(module: nn.Module) -> int:
    return module.groups if isinstance(module, nn.Conv2d) else 1


def channels_first(out: Tensor, conv: bool) -> Tensor:
    """(o, positions) of a layer's output, of any number of dimensions."""
    moved = out.movedim(-3 if conv else -1, 0)
    return moved.reshape(len(moved), moved[0].numel())


def input_rows(module: nn.Module, inputs: Tensor, joint: bool) -> Tensor:
    """Input rows (blocks, rows, i): the Jacobian of every output position, one by one.

    Args:
        module: A Linear or Conv2d.
        inputs: Its input.
        joint: Whether the bias belongs to the row (then its own derivative comes last).
    """
    layer = plain_copy(module).requires_grad_(True)
    out = channels_first(layer(inputs.detach().double()), is_conv(module))
    blocks, rows = blocks_of(module), []
    wanted = [layer.weight, layer.bias] if joint else [layer.weight]
    for channel in range(0, len(out), len(out) // blocks):
        for position in range(out.shape[1]):
            slopes = torch.autograd.grad(out[channel, position], wanted, retain_graph=True)
            rows.append(torch.cat([slope[channel].flatten() for slope in slopes]))
    width = layer.weight[0].numel() + joint
    return torch.stack(rows).reshape(blocks, -1, width) if rows else out.new_zeros(blocks, 0, width)


def gradient_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """Gradient rows (blocks, rows, o)."""
    columns = channels_first(gradient.double(), is_conv(module))
    blocks = blocks_of(module)
    split = len(columns) // blocks
    return torch.stack([columns[b * split : (b + 1) * split].t() for b in range(blocks)])


def second_moment(rows: Tensor) -> Tensor:
    """Sum of the outer products of rows (blocks, rows, n): (blocks, n, n)."""
    total = rows.new_zeros(len(rows), rows.shape[2], rows.shape[2])
    for block, matrix in enumerate(rows):
        for row in matrix:
            total[block] += torch.outer(row, row)
    return total


class Recorder:
    """Notes inputs and output gradients of every call of some modules, within a `with` block.

    Each module's forward gets a zero added, in which the loss is differentiated.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self.calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def __enter__(self) -> Recorder:
        for module in self.modules:
            module.forward = self._noting(module, type(module).forward)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for module in self.modules:
            del module.forward

    def _noting(self, module: nn.Module, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noting(inputs: Tensor) -> Tensor:
            out = forward(module, inputs)
            probe = torch.zeros_like(out, requires_grad=True)
            self.calls.append((module, inputs.detach().clone(), probe))
            return out + probe

        return noting


def all_rows(
    model: nn.Module, losses: list[Loss], weight: nn.Parameter, joint: bool
) -> tuple[Tensor, Tensor]:
    """Input rows (blocks, rows, i) and gradient rows (blocks, rows, o) of one weight.

    Args:
        model: A plain float64 model.
        losses: Each runs the model forward; the step's loss is their sum.
        weight: The weight of one or several modules of the model.
        joint: Whether the bias is preconditioned with it.
    """
    modules = [m for m in model.modules() if getattr(m, 'weight', None) is weight]
    blocks, out = blocks_of(modules[0]), len(weight) // blocks_of(modules[0])
    right = [weight.new_zeros(blocks, 0, weight[0].numel() + joint)]
    left = [weight.new_zeros(blocks, 0, out)]
    for loss in losses:
        with Recorder(modules) as recorder:
            value = loss(model)
        probes = [probe for _, _, probe in recorder.calls]
        if not probes:
            continue
        slopes = torch.autograd.grad(value, probes, allow_unused=True)
        for (module, inputs, _), slope in zip(recorder.calls, slopes, strict=True):
            if slope is not None:
                right.append(input_rows(module, inputs, joint))
                left.append(gradient_rows(module, slope))
    return torch.cat(right, 1).detach(), torch.cat(left, 1).detach()


def measure(
    model: nn.Module, losses: list[Loss], weight: nn.Parameter, joint: bool
) -> tuple[Tensor, Tensor, int]:
    """R = sum x'x / rows and L = sum g'g over `all_rows`, and the rows."""
    right, left = all_rows(model, losses, weight, joint)
    count = right.shape[1]
    return second_moment(right) / max(1, count), second_moment(left), count
