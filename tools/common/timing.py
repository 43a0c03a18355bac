"""Clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def now(tensor: Tensor | None = None) -> float:
    """Returns the time in seconds, once the tensor's device has finished its work."""
    if tensor is not None and tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def seconds_of(work: Callable[[], Any]) -> float:
    """Returns the seconds that a call takes on the CPU."""
    start = now()
    work()
    return now() - start
