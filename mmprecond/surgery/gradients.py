"""Gradient surgery: the summed gradient is replaced by a combination of the losses' gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_count, reject_unexpected
from ..distributed import sum_over_ranks, world_size
from ..graph import graph_nodes
from ..linalg import flatten_like, unflatten_like
from .base import Aggregator, cosines, gram
from .gcond import GCond
from .pcgrad import PCGrad
from .samgs import SAMGS

logger = logging.getLogger('mmprecond')

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
    DistributedDataParallel) see it once. All losses but one have a pass of their own before that;
    the gradient of that one, the largest in the step before, is the difference. Only shared
    parameters take part: those that at least two losses reach in the first call. If a gradient is
    not finite, the step keeps the sum's gradient.

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
        self._all = list(params)
        self._params = [p for p in self._all if p.requires_grad]
        devices = {str(p.device) for p in self._params}
        if len(devices) > 1:
            raise ValueError(
                f'the parameters are on {", ".join(sorted(devices))}; a surgery needs one'
            )
        self._shared: list[Tensor] = []
        self._names: tuple[str, ...] = ()
        self._sums: dict[str, Tensor] = {}
        self._remainder = ''
        self._steps = 0

    @property
    def is_due(self) -> bool:
        """True if the next `resolve` combines the gradients."""
        return self._steps % self.interval == 0

    def backward(self, losses: Mapping[str, Tensor]) -> None:
        """Takes the losses' gradients apart, and runs the backward pass of their sum.

        Args:
            losses: Scalar losses by name, the same names at each call; at least two.

        Raises:
            ValueError: If there are fewer than two losses, their names have changed, or their graph
                is one that has no gradients of parts.
        """
        self.separate(losses)
        torch.stack(list(losses.values())).sum().backward()

    def separate(self, losses: Mapping[str, Tensor]) -> None:
        """Takes the gradients of all losses but one; the graph stays for their sum.

        Raises:
            ValueError: As `backward`.
        """
        self._check_names(tuple(losses))
        if not self.is_due:
            return
        if not self._shared:
            self._find_shared(losses)
        if self._sums and not any(p.grad is not None and bool(p.grad.any()) for p in self._shared):
            self._sums = {}  # of a step that was given up
        for name, loss in losses.items():
            if name == self._remainder:
                continue
            gradient = self._gradient(loss)
            if name in self._sums:
                self._sums[name] += gradient
            else:
                self._sums[name] = gradient

    def _check_names(self, names: tuple[str, ...]) -> None:
        if len(names) < 2:
            raise ValueError(
                f'a surgery needs two losses or more, not {", ".join(names) or "none"}; take it out'
            )
        if self._names and names != self._names:
            raise ValueError(
                f'the losses are {", ".join(names)}, and were {", ".join(self._names)} before; '
                'put losses that come and go into a group with others'
            )
        self._names = names

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
        parts, self._sums = self._sums, {}
        if (ranks := world_size()) > 1:
            sum_over_ranks(list(parts.values()))
            torch._foreach_div_(list(parts.values()), ranks)
        rest = flatten_like([p.grad for p in self._shared], self._shared)
        for part in parts.values():
            rest -= part
        parts[self._remainder] = rest
        gradients = torch.stack([parts.pop(name) for name in self._names]).div_(scale)
        if not bool(gradients.isfinite().all()):
            return
        products = gram(gradients)
        result = self.aggregator.combine(gradients)
        self._record_diagnostics(products, float(result.norm()))
        # A difference has the rounding errors of all: it is the largest gradient's.
        self._remainder = self._names[int(products.diagonal().argmax())]
        for p, piece in zip(
            self._shared, unflatten_like(result * scale, self._shared), strict=True
        ):
            if p.grad is not None:
                p.grad.copy_(piece)

    def _gradient(self, loss: Tensor) -> Tensor:
        """Gradient (n,) of a loss with respect to the shared parameters."""
        return flatten_like(_gradients_of(loss, self._shared), self._shared)

    def _find_shared(self, losses: Mapping[str, Tensor]) -> None:
        """Finds the parameters that two losses reach on any rank, and the longest gradient.

        Raises:
            ValueError: If there are none, or the graph has no gradients of parts.
        """
        for loss in losses.values():
            _refuse_opaque(loss)
        reached = torch.zeros(len(losses), len(self._params), device=self._params[0].device)
        lengths = []
        for k, loss in enumerate(losses.values()):
            gradients = _gradients_of(loss, self._params)
            reached[k] = torch.tensor([float(g is not None) for g in gradients])
            lengths.append(float(flatten_like(gradients, self._params).norm()))
        sum_over_ranks([reached])
        shared = ((reached > 0).sum(0) > 1).tolist()
        self._shared = [p for p, is_shared in zip(self._params, shared, strict=True) if is_shared]
        if not self._shared:
            raise ValueError('no parameter is reached by two losses: there is nothing to resolve')
        longest = torch.tensor(lengths, device=reached.device)
        sum_over_ranks([longest])
        self._remainder = self._names[int(longest.nan_to_num().argmax())]

    def _record_diagnostics(self, products: Tensor, length: float) -> None:
        """Sets the diagnostics from the Gram matrix and the result's norm."""
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
        """State between steps: the method's, and what was found of the losses."""
        places = {p: k for k, p in enumerate(self._params)}
        return {
            'type': type(self.aggregator).__name__,
            'steps': self._steps,
            'names': list(self._names),
            'shared': [places[p] for p in self._shared],
            'sizes': self._sizes(),
            'remainder': self._remainder,
            'aggregator': self.aggregator.state_dict(),
        }

    def _sizes(self) -> list[int]:
        """Numbers of entries of all parameters, 0 for those that are not trained."""
        trained = set(self._params)
        return [p.numel() if p in trained else 0 for p in self._all]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned.

        That of another method, or of parameters that are not trained now, is left out, with a
        warning.
        """
        kind = type(self.aggregator).__name__
        if state['type'] != kind:
            logger.warning('the saved surgery is %s; %s starts anew', state['type'], kind)
            return
        if state.get('sizes') != self._sizes():
            logger.warning('the saved surgery trains other parameters; %s starts anew', kind)
            return
        self._steps, self._names = state['steps'], tuple(state['names'])
        self._shared = [self._params[k] for k in state['shared']]
        self._remainder = state['remainder']
        device = self._params[0].device
        self.aggregator.load_state_dict(
            {
                key: value.to(device) if isinstance(value, Tensor) else value
                for key, value in state['aggregator'].items()
            }
        )


def _gradients_of(loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a loss by parameter, None where it does not reach one."""
    trained = [p for p in params if p.requires_grad]
    if not loss.requires_grad or not trained:
        return [None] * len(params)
    given = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    by_param = dict(zip(trained, given, strict=True))
    return [by_param.get(p) for p in params]


def _refuse_opaque(loss: Tensor) -> None:
    """Raises ValueError for graphs that have no gradient of one loss alone."""
    for node in graph_nodes(loss):
        name = node.name()
        if 'CompiledFunction' in name:
            raise ValueError('a surgery needs the graph of each loss; train without torch.compile')
        if name.startswith('CheckpointFunction'):
            raise ValueError(
                'a surgery works with checkpoint(..., use_reentrant=False) alone; in a config set '
                'with_cp=False'
            )
