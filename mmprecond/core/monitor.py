"""Numerical reports of refreshes, to monitor a run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..curvature import GRADIENT, INPUT, Layer, Moment
from ..linalg import Dense, LowRank, identity_like, largest_eigenvalue
from .stack import LayerStack

Values = dict[str, float]


@dataclass
class RefreshReport:
    """Report of one step's refreshes.

    Attributes:
        step: The step, from 0.
        layers: By weight name, what `describe` found, and 'cosine', between the gradient and the
            direction of this step (not of methods that act after the rule).
        failures: Layers whose refresh failed at this step.
        seconds: Of captures' merging and the refresh.
        megabytes: Held by statistics and operators.
        counts: Layers that are measured, preconditioned (with an operator) and plain.
    """

    step: int
    layers: dict[str, Values] = field(default_factory=dict)
    failures: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def summary(self) -> Values:
        """Mean and largest value over the layers; for the cosine mean and least value."""
        summary: Values = {
            'failures': float(self.failures),
            'seconds': self.seconds,
            'megabytes': self.megabytes,
            **{f'layers/{name}': float(number) for name, number in self.counts.items()},
        }
        names = sorted({name for values in self.layers.values() for name in values})
        for name in names:
            values = [values[name] for values in self.layers.values() if name in values]
            summary[f'{name}/mean'] = sum(values) / len(values)
            if name == 'cosine':
                summary[f'{name}/min'] = min(values)
            else:
                summary[f'{name}/max'] = max(values)
        return summary


class Monitor:
    """Monitor that reports each step with a refresh, and costs nothing at other steps.

    Call ``optimizer.curvature.watch_refreshes(Monitor())``, then read `report` after a step.

    Attributes:
        report: Report of the last step, or None if the step refreshed nothing.
    """

    def __init__(self) -> None:
        self.report: RefreshReport | None = None
        self._layers: list[tuple[LayerStack, int]] = []
        self._start = 0.0

    def take_report(self) -> RefreshReport | None:
        """Returns the report of the last step and removes it."""
        report, self.report = self.report, None
        return report

    def begin(self) -> None:
        """Starts a step; called before statistics are merged."""
        self.report, self._layers = None, []
        self._start = time.perf_counter()

    def refreshed(
        self,
        step: int,
        due: Sequence[tuple[LayerStack, list[int]]],
        held: float,
        counts: dict[str, int],
    ) -> None:
        """Starts a report; called after refreshes.

        Args:
            step: Number of the step.
            due: Stacks with the positions that were refreshed.
            held: Megabytes of statistics and operators.
            counts: Numbers of layers (see `report.count`).
        """
        self._layers = [(stack, k) for stack, positions in due for k in positions]
        failures = sum(stack.members[k].failures > 0 for stack, k in self._layers)
        self.report = RefreshReport(
            step,
            failures=failures,
            megabytes=held,
            seconds=time.perf_counter() - self._start,
            counts=counts,
        )

    def record_directions(
        self, gradients: Mapping[Tensor, Tensor], directions: Mapping[Tensor, Tensor]
    ) -> None:
        """Completes the report; called with the directions. Waits for the device once."""
        if self.report is None:
            return
        measurements: dict[str, dict[str, Tensor]] = {}
        for stack, k in self._layers:
            layer = stack.members[k].layer
            if stack.members[k].refreshes:
                measurements[layer.name] = describe(stack, k)
                if layer.weight in directions and not stack.method.acts_after_rule:
                    measurements[layer.name]['cosine'] = _cosine(layer, gradients, directions)
        flat = [
            value.double().reshape(())
            for values in measurements.values()
            for value in values.values()
        ]
        numbers = iter(torch.stack([v.to(flat[0].device) for v in flat]).tolist() if flat else [])
        self.report = replace(
            self.report,
            layers={
                name: {key: next(numbers) for key in values}
                for name, values in measurements.items()
            },
        )


def describe(stack: LayerStack, position: int) -> dict[str, Tensor]:
    """Values of one layer by side ('gradient', 'input').

    'largest' is the largest eigenvalue of the moment A. For an inverse X of A + mu I, 'damping' is
    the mu that fits best, and 'residual' is ``|I - X (A + mu I)|`` relative to ``|I|``. For a
    low-rank operator 'rank' is the number of columns, and 'damping' is the damped value of all
    omitted eigenvalues if the operator is an inverse, rather than a root of one.

    Args:
        stack: Stack of the layer.
        position: Position of the layer in the stack.

    Returns:
        Scalars by ``<value>/<side>``.
    """
    scalars: dict[str, Tensor] = {}
    moments = {
        statistic.side: stack.statistics[statistic.key][position]
        for statistic in stack.kept
        if isinstance(statistic.form, Moment)
    }
    for side in (GRADIENT, INPUT):
        moment, operator = moments.get(side), stack.operators.get(side.name)
        if moment is not None:
            scalars[f'largest/{side.name}'] = largest_eigenvalue(moment).amax()
        if isinstance(operator, Dense) and moment is not None and stack.method.is_inverse:
            scalars[f'damping/{side.name}'], scalars[f'residual/{side.name}'] = fit_damping(
                moment, operator.matrix[position]
            )
        if isinstance(operator, LowRank):
            used = torch.linalg.vector_norm(operator.columns[position], dim=-2) > 0
            scalars[f'rank/{side.name}'] = used.sum().double()
            if stack.method.is_inverse:
                scalars[f'damping/{side.name}'] = 1 / operator.scale[position].amax()
    return scalars


def fit_damping(moment: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Fits mu such that X is closest to (A + mu I)^-1.

    Args:
        moment: A (b, n, n).
        inverse: X (b, n, n).

    Returns:
        The mean of mu over the blocks, and the largest residual ``|I - X (A + mu I)| / |I|``
        (Frobenius norms).
    """
    moment, inverse = moment.double(), inverse.double()
    rest = identity_like(moment) - inverse @ moment
    damping = (rest * inverse).sum((-2, -1)) / inverse.square().sum((-2, -1))
    error = torch.linalg.matrix_norm(rest - damping[:, None, None] * inverse)
    return damping.mean(), (error / moment.shape[-1] ** 0.5).amax()


def _cosine(
    layer: Layer, gradients: Mapping[Tensor, Tensor], directions: Mapping[Tensor, Tensor]
) -> Tensor:
    g, v = (
        torch.cat([tensors[p].flatten().double() for p in layer.parameters if p in tensors])
        for tensors in (gradients, directions)
    )
    return (g * v).sum() / (g.norm() * v.norm()).clamp_min(1e-300)
