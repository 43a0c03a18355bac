"""Warning of layers that train and are never measured."""

from __future__ import annotations

import logging

from ..checks import first_names
from ..curvature import Layer

logger = logging.getLogger('mmprecond')

#: Captures that a layer with a gradient may miss in a row.
MISSES = 2


def has_gradient(layer: Layer) -> bool:
    """True if the weight has a gradient that is not all zeros; waits for the device."""
    gradient = layer.weight.grad
    return gradient is not None and bool(gradient.any())


class SilenceGuard:
    """Warns of layers that have gradients and were missed by two captures in a row.

    They take the plain rule, which nothing else would tell.
    """

    def __init__(self) -> None:
        self._missed: dict[Layer, int] = {}
        self._replaced: list[Layer] = []
        self._named: set[Layer] = set()

    def note(self, layer: Layer, measured: bool) -> None:
        """Takes the outcome of one capture; a layer without a gradient misses nothing."""
        if measured:
            self._missed[layer] = 0
        elif layer.weight.grad is None and layer.is_replaced:
            self._replaced.append(layer)
        elif has_gradient(layer):
            self._missed[layer] = self._missed.get(layer, 0) + 1

    def excuse(self, layer: Layer) -> None:
        """Leaves out a layer of which another warning told."""
        self._named.add(layer)

    def warn(self) -> None:
        """Names the layers that missed too many captures, once each."""
        if self._replaced and not self._named.issuperset(self._replaced):
            self._named.update(self._replaced)
            logger.warning(
                'the weights of %d layers were replaced after the optimizer was made, which trains '
                'the old ones: %s. Make the optimizer after load_state_dict(assign=True)',
                len(self._replaced),
                first_names(layer.name for layer in self._replaced),
            )
        self._replaced = []
        silent = [
            layer
            for layer, missed in self._missed.items()
            if missed >= MISSES and layer not in self._named
        ]
        if not silent:
            return
        self._named.update(silent)
        logger.warning(
            '%d of the layers have gradients but were not measured by the last %d captures, and '
            'take the plain rule or an old operator: %s. Either gradients are cleared between '
            'backward and step (clear them before the forward pass), or the modules are not called '
            '(their weights are used by torch.func, a copy or an exported program), or the '
            'optimizer was disarmed',
            len(silent),
            MISSES,
            first_names(layer.name for layer in silent),
        )
