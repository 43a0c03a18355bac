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
        from_first: Takes the first sample whole.
        normalise: Divides each sample by its Frobenius norm first, which makes captures count
            alike whatever the loss's scale (NKFAC's published code; not in its paper).
    """

    decay: float | None = 0.95
    normalise: bool = False
    from_first: bool = False

    def merge(self, running: Tensor, sample: Tensor, merged: int, joint: bool = False) -> None:
        """Merges one sample (blocks, n, n) into the running average, in place.

        Args:
            running: The average of `merged` samples.
            sample: The new one; overwritten.
            merged: Number of samples before it.
            joint: Whether the blocks are those of one matrix, with one norm.
        """
        if self.normalise:
            norm = torch.linalg.matrix_norm(sample)[..., None, None]
            norm = torch.linalg.vector_norm(norm) if joint else norm
            sample /= norm + 1e-12
        if self.decay is None:
            weight = 1 / (merged + 1)
        else:
            weight = 1. if self.from_first and merged == 0 else 1 - self.decay
        running.lerp_(sample, weight)
