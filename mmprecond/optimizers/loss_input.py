"""The loss as an input of an optimizer's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import plain_numbers
from ..distributed import sum_over_ranks, world_size


class LossInput:
    """Mixin with the loss of this step, which a training loop, a closure or MMEngine sets."""

    _loss: Tensor | float | None = None

    @property
    def loss(self) -> Tensor | float | None:
        """Loss of this step, the mean over its samples; None once `step` has used it."""
        return self._loss

    @loss.setter
    def loss(self, loss: Tensor | float | None) -> None:
        self.take_loss(loss)

    def take_loss(self, loss: Tensor | float | None) -> None:
        """Sets the loss of this step, like an assignment to `loss`.

        Raises:
            ValueError: If the loss is not a single number.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f'loss has the shape {tuple(loss.shape)}; give its mean, a number '
                    'or a tensor of one'
                )
            loss = loss.detach().reshape(())
        elif loss is not None and not isinstance(loss := plain_numbers(loss), (int, float)):
            raise ValueError(f'loss={loss!r} is no number; give the loss of the step')
        self._loss = loss

    def _receive_loss(self, loss: Any) -> None:
        if loss is not None:
            self.take_loss(loss)

    def _use_loss(self, purpose: str, device: torch.device) -> Tensor:
        """Returns the mean loss over the ranks, a scalar of float64 on a device, and clears it.

        Raises:
            ValueError: If the loss was not set.
        """
        if self._loss is None:
            raise ValueError(
                f'{purpose} needs the loss of each step; write `optimizer.loss = loss` '
                'before `optimizer.step()`, give step a closure that returns the loss,'
                " or in a config set constructor='PrecondOptimWrapperConstructor'"
            )
        loss = torch.as_tensor(self._loss, dtype=torch.float64).to(device, copy=True)
        self._loss = None
        sum_over_ranks([loss])
        return loss / world_size()
