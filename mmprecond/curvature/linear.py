"""Linear layers: all leading dimensions of the input are rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .layer import EVERY_ROW_KIND, Layer
from .statistic import Rows, SampledRows


class LinearLayer(Layer):
    """`nn.Linear`; all leading dimensions of its input are rows.

    Behind a flattened feature map, a row is a patch: channels x positions.

    Args:
        input_positions: Positions of each channel in an input row, which must divide the number of
            inputs. 1: rows are no patches.

    Raises:
        ValueError: If `input_positions` does not divide the number of inputs.
    """

    module_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    row_kinds: ClassVar[tuple[type[Rows], ...]] = EVERY_ROW_KIND

    def __init__(self, *args: Any, input_positions: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self._positions = input_positions
        inputs = self.weight.shape[1]
        if inputs % input_positions:
            raise ValueError(
                f'input_positions={input_positions} does not divide the {inputs} inputs of '
                f'{self.name}; give height times width of the feature map that the layer reads, in '
                'a group or a key of custom_keys that holds this weight alone'
            )

    @property
    def kernel_positions(self) -> int:
        """Positions of the flattened feature map."""
        return self._positions

    def channel_rows(self, module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
        """Chunks (1, c, rows) with the channels' partial trace of the patches' moment."""
        patches = inputs.reshape(-1, inputs.shape[-1] // self._positions, self._positions)
        row_bytes = self.working_dtype.itemsize * inputs.shape[-1]
        for chunk in patches.split(max(1, int(self.capture_mb * 2**20 / row_bytes))):
            yield chunk.to(self.working_dtype).transpose(0, 1).flatten(1)[None]

    def position_rows(self, module: nn.Module, inputs: Tensor) -> Iterator[Tensor]:
        """Rows (1, p, rows) with the positions' partial trace of the patches' moment."""
        yield inputs.to(self.working_dtype).reshape(-1, self._positions).t()[None]

    def sampled_maps(
        self, inputs: Tensor, rows: SampledRows, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """All inputs: a flattened map is one row."""
        return inputs, 1.0

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
