"""Wrapper that replaces the summed gradient by a combination of the losses' gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from mmengine.logging import MessageHub
from mmengine.optim import ApexOptimWrapper, OptimWrapper
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..curvature import unwrap
from ..surgery import GradientSurgery
from .wrapper import DoubleBackwardMixin


class SurgeryMixin:
    """Mixin that replaces the summed gradient by a combination of the losses' gradients.

    Args:
        surgery: The method's name, or a dict with its name as type, its settings, and `interval`
            and `groups`. `groups` is a list of lists of patterns (as in `fnmatch`) of the names of
            losses; each list is one loss for the surgery. By default each loss is one.

    Raises:
        ValueError: If the method is unknown or a setting is out of range; in `backward`, if the
            model's losses are not seen, do not add up to its loss, or do not fit the groups.
    """

    optimizer: torch.optim.Optimizer

    def __init__(self, *args: Any, surgery: str | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings: dict[str, Any] = {'type': surgery} if isinstance(surgery, str) else dict(surgery)
        self.groups: Sequence[Sequence[str]] | None = settings.pop('groups', None)
        if any(isinstance(group, str) for group in self.groups or ()):
            raise ValueError(
                f"groups={self.groups} are no lists; write groups=[['loss_rpn_*'], ...]"
            )
        interval: Any = settings.pop('interval', 1)
        params = [p for group in self.optimizer.param_groups for p in group['params']]
        self.surgery = GradientSurgery(params, settings, interval)
        self._model: Any = None
        self._losses: dict[str, Any] = {}

    @_disable_dynamo
    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Notes the losses of the model's forward pass."""
        self._model, self._losses = unwrap(model), {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Mapping):
                self._losses = dict(output)

        handle = self._model.register_forward_hook(note)
        try:
            with super().optim_context(model):  # type: ignore[misc]
                yield
        finally:
            handle.remove()

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """Takes the gradients of the losses, runs the pass of their sum, and combines them.

        `scale_loss` divides by the accumulated micro-batches; `scale` is the scaler's of AMP.
        """
        scaler = getattr(self, 'loss_scaler', None)
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        parts = {
            name: self.scale_loss(part).float()  # type: ignore[attr-defined]
            for name, part in self._parts().items()
        }
        self._losses = {}
        detached = torch.stack([part.detach() for part in parts.values()])
        total = detached.sum()
        error = (total - loss.detach().float()).abs()
        # The model added the losses in its own dtype; ours are summed in float32.
        rounding = 8 * torch.finfo(loss.dtype).eps + 1e-5
        if bool(error > rounding * detached.abs().sum()):  # one wait for the device; false for NaN
            raise ValueError(
                f'the losses add up to {float(total):.4g}, and the model trains on '
                f'{float(loss.detach()):.4g}: a surgery needs their sum'
            )
        self.surgery.separate({name: part * scale for name, part in parts.items()})
        super().backward(loss, **kwargs)  # type: ignore[misc]
        if self.should_update():  # type: ignore[attr-defined]
            self.surgery.resolve(scale)
            hub = MessageHub.get_current_instance()
            for name, value in self.surgery.diagnostics.items():
                hub.update_scalar(f'train/surgery/{name}', value)

    def _parts(self) -> dict[str, Tensor]:
        """Losses, or groups of them, by name."""
        names = [name for name in self._losses if 'loss' in name]
        if not names:
            raise ValueError(
                'a surgery saw no losses: the model returned none in this step, or it is compiled '
                'as a whole; train without compile'
            )
        groups = self.groups or [[name] for name in names]
        members = [
            [name for name in names if any(fnmatchcase(name, pattern) for pattern in group)]
            for group in groups
        ]
        counted = [name for group in members for name in group]
        if sorted(counted) != sorted(names) or not all(members):
            raise ValueError(
                f'groups={[list(group) for group in groups]} do not hold each of the losses '
                f'{", ".join(names)} once'
            )
        parts = {}
        for patterns, group in zip(groups, members, strict=True):
            total, _ = self._model.parse_losses({name: self._losses[name] for name in group})
            parts['+'.join(patterns)] = total
        return parts

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the surgery's."""
        state: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return {**state, 'surgery': self.surgery.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; one without a surgery starts it afresh."""
        state = dict(state_dict)
        saved = state.pop('surgery', None)
        super().load_state_dict(state)  # type: ignore[misc]
        if saved is not None:
            self.surgery.load_state_dict(saved)


@cache
def with_surgery(base: Any) -> Any:
    """The wrapper class with a surgery.

    Raises:
        ValueError: If the wrapper does not run the backward pass of a loss, or differentiates it
            twice.
    """
    if not issubclass(base, OptimWrapper):
        raise ValueError(f'{base.__name__} takes no surgery; use OptimWrapper or AmpOptimWrapper')
    if issubclass(base, ApexOptimWrapper):
        raise ValueError('ApexOptimWrapper runs its own backward pass; use AmpOptimWrapper')
    if issubclass(base, DoubleBackwardMixin):
        raise ValueError(
            'a surgery is not for optimizers that differentiate twice, such as SGDPH; take one out'
        )
    return type(f'Surgery{base.__name__}', (SurgeryMixin, base), {'__module__': __name__})
