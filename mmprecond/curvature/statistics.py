"""Running averages of measured statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunningAverage:
    """``m <- decay m + (1 - decay) sample``, from zero, without bias correction.

    Attributes:
        decay: Weight of the old value, in [0, 1).
        normalise: Divides each sample by its Frobenius norm first, which makes captures count
            alike whatever the loss's scale (NKFAC's published code; not in its paper).
    """

    decay: float = 0.95
    normalise: bool = False

    def merge(self, running: Tensor, sample: Tensor) -> None:
        """Merges one sample (blocks, n, n) into the running average, in place."""
        if self.normalise:
            norm = torch.linalg.matrix_norm(sample)[..., None, None]
            sample = sample / (norm + 1e-12)
        running.lerp_(sample, 1 - self.decay)
