"""One layer's statistics and operators, to look at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import did_you_mean
from ..curvature import WEIGHT, Layer
from ..linalg import named_tensors
from ..preconditioners import Preconditioner
from .stack import LayerStack


@dataclass(frozen=True)
class LayerView:
    """Copies of one layer's statistics and operators.

    Attributes:
        name: Name of the weight.
        method: The preconditioner with its settings.
        samples: Number of captures merged.
        refreshes: Number of refreshes that succeeded.
        factors: Running statistics (blocks, n, m) by side ('input', 'gradient'). A side whose
            statistic has several tensors has 'input/0', 'input/1', ... A dense second moment is
            n x n; a diagonal or a mean is n x 1.
        operators: Tensors (blocks, n, m) of the operators by name; empty before the first refresh.
    """

    name: str
    method: Preconditioner
    samples: int
    refreshes: int
    factors: Mapping[str, Tensor]
    operators: Mapping[str, Tensor]

    def spectrum(self, side: str) -> Tensor:
        """Eigenvalues (blocks, n) of a factor in descending order, in float64.

        Of a factor that is not symmetric they are its squared singular values, of one with one
        column its entries.

        Args:
            side: A name in `factors`.

        Raises:
            ValueError: If there is no such factor.
        """
        if side not in self.factors:
            raise ValueError(
                f'{self.name} has no factor {side!r}; it has {", ".join(self.factors)}'
            )
        factor = self.factors[side].double()
        rows, columns = factor.shape[-2:]
        if columns == 1:
            return factor[..., 0].sort(-1, descending=True).values
        if rows == columns and _is_symmetric(factor):  # columns of a sketch may be as many as rows
            return torch.linalg.eigvalsh(factor).flip(-1)
        return torch.linalg.svdvals(factor).square()

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws each factor and its eigenvalues.

        Args:
            path: File of the picture, whose suffix chooses the format; None writes no file.

        Returns:
            The figure of matplotlib.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3.2 * len(self.factors)), layout='constrained')
        FigureCanvasAgg(figure)
        figure.suptitle(f'{self.name}: {self.method.title}, {self.samples} captures')
        for row, (side, factor) in zip(
            figure.subplots(len(self.factors), 2, squeeze=False), self.factors.items(), strict=True
        ):
            shown = row[0].imshow(factor[0].abs().log10().cpu().numpy(), aspect='auto')
            row[0].set_title(f'{side}: log10 of the entries, {tuple(factor.shape)}', fontsize=9)
            figure.colorbar(shown, ax=row[0])
            for values in self.spectrum(side).cpu().numpy():
                row[1].semilogy(values.clip(1e-30), linewidth=1)
            row[1].set_title(f'{side}: eigenvalues', fontsize=9)
            row[1].grid(alpha=0.3)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def view_layer(layers: Mapping[Layer, LayerStack], name: str) -> LayerView:
    """Copies what is held of one layer (see `Curvature.layer`)."""
    known = _by_name(layers)
    layer = known.get(name)
    if layer is None:
        raise ValueError(
            f'no layer {name!r} is preconditioned; {did_you_mean(name, known)}'
            'optimizer.table() has all modules'
        )
    stack = layers[layer]
    if not stack.holds(layer):
        raise ValueError(f'{layer.name} has no statistics yet; they come with the first captures')
    position = next(k for k, member in enumerate(stack.members) if member.layer is layer)
    member = stack.members[position]
    factors = {}
    for side, factor in stack.factors([position]).items():
        if side == WEIGHT:
            continue
        for part, tensor in enumerate(factor.tensors):
            key = side.name if len(factor.tensors) == 1 else f'{side.name}/{part}'
            factors[key] = tensor[0].clone()
    operators = named_tensors(stack.operators) if member.refreshes else {}
    held = {key: tensor[position].clone() for key, tensor in operators.items()}
    return LayerView(layer.name, stack.method, member.samples, member.refreshes, factors, held)


def _by_name(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Layers by the names of their weights, and of modules that hold one of these weights."""
    by_module: dict[str, list[Layer]] = {}
    for layer in layers:
        by_module.setdefault(layer.name.rpartition('.')[0], []).append(layer)
    alone = {module: held[0] for module, held in by_module.items() if len(held) == 1}
    return {**alone, **{layer.name: layer for layer in layers}}


def _is_symmetric(factor: Tensor) -> bool:
    return torch.allclose(factor, factor.mT, atol=1e-4 * float(factor.abs().max()))
