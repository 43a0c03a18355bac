"""Linear layers: all leading dimensions of the input are rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from .layer import EVERY_ROW_KIND, Layer
from .statistic import Rows


class LinearLayer(Layer):
    """`nn.Linear`; all leading dimensions of its input are rows."""

    module_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    row_kinds: ClassVar[tuple[type[Rows], ...]] = EVERY_ROW_KIND

    def input_rows(self, module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
        yield inputs.to(self.working_dtype).reshape(-1, inputs.shape[-1]).t()[None]

    def gradient_rows(self, module: nn.Module, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, gradient.shape[-1]).t()[None]

    def reduced_input(self, module: nn.Module, inputs: Tensor) -> Tensor:
        return _split_samples(inputs.to(self.working_dtype)).mean(1).t()[None]

    def reduced_gradient(self, module: nn.Module, gradient: Tensor) -> Tensor:
        return _split_samples(gradient).sum(1).t()[None]

    def sample_count(self, module: nn.Module, gradient: Tensor) -> int:
        return len(_split_samples(gradient))

    def position_count(self, module: nn.Module, gradient: Tensor) -> int:
        return _split_samples(gradient).shape[1]

    def sampled_input(self, module: nn.Module, inputs: Tensor, drawn: Tensor) -> Tensor:
        return self.sampled_gradient(module, inputs, drawn).to(self.working_dtype)

    def sampled_gradient(self, module: nn.Module, gradient: Tensor, drawn: Tensor) -> Tensor:
        return _split_samples(gradient)[:, drawn].flatten(0, 1).t()[None]


def _split_samples(tensor: Tensor) -> Tensor:
    """Reshapes an input or output of a linear layer to (samples, positions, features)."""
    if tensor.dim() <= 2:
        return tensor.reshape(-1, 1, tensor.shape[-1])
    tensor = tensor.flatten(1, -2)
    return tensor if tensor.shape[1] else tensor[:0]
