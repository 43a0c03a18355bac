"""Gradient surgery: the summed gradient is replaced by a combination of the losses' gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_count, reject_unexpected
from ..distributed import sum_over_ranks, world_size
from .base import Aggregator, cosines, gram
from .gcond import GCond
from .pcgrad import PCGrad
from .samgs import SAMGS

#: Aggregators by name.
AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    'PCGrad': PCGrad,
    'GCond': GCond,
    'SAMGS': SAMGS,
}


def build_aggregator(method: str | dict[str, Any]) -> Aggregator:
    """Builds an aggregator from its name, or from ``dict(type=name, **settings)``.

    Raises:
        ValueError: If the name is unknown, or a setting is out of range.
        TypeError: If a setting is unknown.
    """
    settings: dict[str, Any] = {'type': method} if isinstance(method, str) else dict(method)
    name = settings.pop('type', None)
    check_choice('surgery', name, AGGREGATORS)
    known = list(signature(AGGREGATORS[name]).parameters)
    reject_unexpected(name, {k: v for k, v in settings.items() if k not in known}, known)
    return AGGREGATORS[name](**settings)


class GradientSurgery:
    """Replaces the gradient of summed losses by a combination of their gradients.

    In place of ``sum(losses.values()).backward()``::

        surgery = GradientSurgery(model.parameters(), 'GCond')
        surgery.backward(dict(classes=..., boxes=...))
        surgery.resolve()
        optimizer.step()

    `backward` may be called several times before `resolve`, to accumulate gradients. The sum of the
    losses has an ordinary backward pass, so that hooks on it (statistics of a preconditioner,
    DistributedDataParallel) see it once. All losses but the last have a pass of their own before
    that; the last one's gradient is the difference. Only shared parameters take part: those that
    at least two losses reach in the first call. If a gradient is not finite, the
    step keeps the sum's gradient.

    For k losses the memory is that of k gradients of the shared parameters, and that of the
    method's state.

    Args:
        params: Parameters of the model.
        method: 'PCGrad', 'GCond' (default) or 'SAMGS', or a dict with its name as type and its
            settings.
        interval: Steps from one surgery to the next; the sum is kept in between. Default: 1.

    Attributes:
        diagnostics: Numbers of the last surgery: `min_cosine` and `mean_cosine` over all pairs of
            gradients, `conflicts` (pairs with a negative cosine), `norm_NAME` of each loss, and
            `norm_ratio` (norm of the result by that of the sum).

    Raises:
        ValueError: If the method is unknown, or a setting is out of range.
    """

    def __init__(
        self, params: Iterable[Tensor], method: str | dict[str, Any] = 'GCond', interval: int = 1
    ) -> None:
        check_count('interval', interval)
        self.aggregator = build_aggregator(method)
        self.interval = interval
        self.diagnostics: dict[str, float] = {}
        self._params = [p for p in params if p.requires_grad]
        self._shared: list[Tensor] | None = None
        self._names: tuple[str, ...] = ()
        self._sums: list[Tensor] = []
        self._steps = 0

    @property
    def is_due(self) -> bool:
        """True if the next `resolve` combines the gradients."""
        return self._steps % self.interval == 0

    def backward(
        self,
        losses: Mapping[str, Tensor],
        run_backward: Callable[[Tensor], None] = torch.Tensor.backward,
    ) -> None:
        """Takes the losses' gradients apart, and runs the backward pass of their sum.

        Args:
            losses: Scalar losses by name, the same names at each call; at least two.
            run_backward: Function that runs the backward pass of the sum; default: torch's.

        Raises:
            ValueError: If there are fewer than two losses, or their names have changed.
        """
        self.separate(losses)
        run_backward(torch.stack(list(losses.values())).sum())

    def separate(self, losses: Mapping[str, Tensor]) -> None:
        """Takes the gradients of all losses but the last; the graph stays for their sum.

        Raises:
            ValueError: As `backward`.
        """
        names = tuple(losses)
        if len(names) < 2:
            raise ValueError(
                f'a surgery needs two losses or more, not {", ".join(names) or "none"}; take it out'
            )
        if self._names and names != self._names:
            raise ValueError(
                f'the losses are {", ".join(names)}, and were {", ".join(self._names)} before; '
                'give groups of losses that are always there'
            )
        self._names = names
        if not self.is_due:
            return
        if self._shared is None:
            self._shared = self._find_shared(list(losses.values()))
        gradients = [self._gradient(loss) for loss in list(losses.values())[:-1]]
        if not self._sums:
            self._sums = gradients
        else:
            torch._foreach_add_(self._sums, gradients)

    def resolve(self, scale: float = 1.0) -> None:
        """Combines the gradients since the last call, and writes the result into ``.grad``.

        Under DistributedDataParallel, which averages the sum's gradient, the others are averaged
        too.

        Args:
            scale: Factor of the losses that is to stay in ``.grad``, of a `GradScaler`.
        """
        due = self.is_due
        self._steps += 1
        if not due or not self._sums:
            return
        assert self._shared is not None
        parts, self._sums = self._sums, []
        if (ranks := world_size()) > 1:
            sum_over_ranks(parts)
            torch._foreach_div_(parts, ranks)
        total = _flatten([p.grad for p in self._shared], self._shared)
        gradients = torch.stack([*parts, total - torch.stack(parts).sum(0)]) / scale
        if not bool(gradients.isfinite().all()):
            return
        products = gram(gradients)
        result = self.aggregator.combine(gradients)
        self._record_diagnostics(products, float(result.norm()))
        offset = 0
        for p in self._shared:
            piece = result[offset : offset + p.numel()].view_as(p) * scale
            offset += p.numel()
            if p.grad is not None:
                p.grad.copy_(piece)

    def _gradient(self, loss: Tensor) -> Tensor:
        """Gradient (n,) of a loss with respect to the shared parameters."""
        assert self._shared is not None
        found = torch.autograd.grad(loss, self._shared, retain_graph=True, allow_unused=True)
        return _flatten(found, self._shared)

    def _find_shared(self, losses: Sequence[Tensor]) -> list[Tensor]:
        """Parameters that two losses reach.

        Raises:
            ValueError: If there are none.
        """
        reached = [0] * len(self._params)
        for loss in losses:
            found = torch.autograd.grad(loss, self._params, retain_graph=True, allow_unused=True)
            reached = [n + (g is not None) for n, g in zip(reached, found, strict=True)]
        shared = [p for p, n in zip(self._params, reached, strict=True) if n > 1]
        if not shared:
            raise ValueError('no parameter is reached by two losses: there is nothing to resolve')
        return shared

    def _record_diagnostics(self, products: Tensor, length: float) -> None:
        """Sets the statistics from the products of the gradients and the result's norm."""
        first, second = torch.triu_indices(len(products), len(products), 1)
        similarities = cosines(products)[first, second]
        norms = products.diagonal().clamp(min=0).sqrt().tolist()
        whole = float(products.sum().clamp(min=0).sqrt())
        self.diagnostics = {
            'min_cosine': float(similarities.min()),
            'mean_cosine': float(similarities.mean()),
            'conflicts': float((similarities < 0).sum()),
            'norm_ratio': length / whole if whole else 1.0,
            **{f'norm_{name}': norm for name, norm in zip(self._names, norms, strict=True)},
        }

    def state_dict(self) -> dict[str, Any]:
        """State between steps: the method's, and the number of steps."""
        return {'steps': self._steps, 'aggregator': self.aggregator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        self._steps = state['steps']
        device = self._params[0].device
        self.aggregator.load_state_dict(
            {
                key: value.to(device) if isinstance(value, Tensor) else value
                for key, value in state['aggregator'].items()
            }
        )


def _flatten(tensors: Iterable[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Vector (n,) of tensors in the shapes of parameters, in float32 at least; None is zeros."""
    return torch.cat(
        [
            (torch.zeros_like(p) if tensor is None else tensor)
            .flatten()
            .to(torch.promote_types(p.dtype, torch.float32))
            for tensor, p in zip(tensors, params, strict=True)
        ]
    )
