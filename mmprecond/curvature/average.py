"""Running averages of measured statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningAverage:
    """``m <- decay m + (1 - decay) sample``, from zero, without bias correction.

    Attributes:
        decay: Weight of the old value, in [0, 1); None for the plain mean of all samples.
        from_first: Whether the average starts as the first sample.
        corrected: Whether the average is divided by the sum of its weights, 1 - decay^samples.
        normalise: Normalisation of each sample, or ''. 'norm' divides it by its Frobenius norm, so
            that captures have equal weight whatever the scale of the loss (NKFAC's published code,
            not its paper). 'range' shifts and scales its entries to the range from 0 to 1
            (AdaFisher); entries that are all equal become 1.
        new_weight: Weight of the new sample if that is not 1 - decay.
        start: Value of the average before the first sample.
    """

    decay: float | None = 0.95
    normalise: str = ''
    from_first: bool = False
    corrected: bool = False
    new_weight: float | None = None
    start: float = 0.0

    def merge(
        self, running: Tensor, sample: Tensor, merged: int, norm: Tensor | float = 1.0
    ) -> None:
        """Merges one sample (b, n, m) into the running average, in place.

        Args:
            running: Average of `merged` samples; zeros at first.
            sample: The new sample; overwritten.
            merged: Number of samples before the new one.
            norm: The sample's norm, for normalise='norm' (see `Form.norm`).
        """
        if self.normalise == 'norm':
            sample /= norm + 1e-12
        elif self.normalise == 'range' and sample.numel():
            least, most = sample.aminmax()
            spread = most - least
            sample.sub_(least).div_(torch.where(spread > 0, spread, 1)).add_(spread == 0)
        self.merge_plain(running, sample, merged)

    def merge_plain(self, running: Tensor, sample: Tensor, merged: int) -> None:
        """Merges one sample without the normalisation (see `merge`)."""
        if self.start and merged == 0:
            running.fill_(self.start)
        if self.new_weight is not None and self.decay is not None:
            running.mul_(self.decay).add_(sample, alpha=self.new_weight)
            return
        if self.decay is None:
            weight = 1 / (merged + 1)
        else:
            weight = 1.0 if self.from_first and merged == 0 else 1 - self.decay
            if self.corrected:
                weight /= 1 - self.decay ** (merged + 1)
        running.lerp_(sample, weight)
