"""Calls of a layer's module, and the hooks that observe them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo

if TYPE_CHECKING:
    from .layer import Layer


@dataclass(frozen=True, eq=False)
class Call:
    """One forward call of a layer's module; holds none of its activations.

    Attributes:
        layer: The layer.
        module: The module that was called.
        extra: Further information that the layer needs to read the call.
    """

    layer: Layer
    module: nn.Module
    extra: Any = None


#: Function of a complete call, the tensors to keep, and the output whose gradient is awaited.
Observer = Callable[[Call, tuple[Tensor, ...], Tensor], None]


class Tap:
    """Hook that loses its observer in a deep copy or a pickle of the model."""

    def __init__(self, observe: Callable[..., None] | None) -> None:
        self.observe = observe

    @_disable_dynamo  # a compiled model breaks its graph here on statistics steps
    def __call__(self, *event: Any) -> None:
        if self.observe is not None:
            self.observe(*event)

    def __reduce__(self) -> tuple[type, tuple[None]]:
        return Tap, (None,)
