"""Settings that hold for all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..checks import PlainNumbers, check_choice, check_count, check_flag, check_number
from ..linalg import PRECISIONS
from .intervals import PlannedIntervals, check_plan
from .sharding import SHARDINGS

#: Treatments of parameters that capture cannot read.
FALLBACKS = ('rule', 'gradient')


@dataclass(frozen=True, kw_only=True)
class CurvatureOptions(PlainNumbers):
    """Settings that hold for all layers (see `PreconditionedOptimizer`)."""

    capture_mb: float = 64.0
    save_curvature: bool = True
    sharding: str = 'none'
    clip_update: float | None = None
    check_memory: bool = True
    stagger: bool = False
    overhead: float | None = None
    intervals: Sequence[PlannedIntervals] = ()
    start_step: int = 0
    fallback: str = 'rule'
    matmul_precision: str = 'auto'

    #: Settings behind published numbers.
    published: ClassVar[dict[str, Any]] = dict(matmul_precision='highest')

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ('save_curvature', 'check_memory', 'stagger'):
            check_flag(name, getattr(self, name))
        if self.overhead is not None:
            check_number('overhead', self.overhead, high=1, open_low=True)
        if self.overhead is not None and self.intervals:
            raise ValueError('overhead chooses the intervals; leave it or intervals out')
        check_choice('fallback', self.fallback, FALLBACKS)
        check_plan(self.intervals)
        check_count('start_step', self.start_step, low=0)
        check_choice('matmul_precision', self.matmul_precision, PRECISIONS)
        check_number('capture_mb', self.capture_mb, open_low=True, finite=False)
        check_choice('sharding', self.sharding, SHARDINGS)
        if self.clip_update is not None:
            check_number('clip_update', self.clip_update, open_low=True)

    def notes(self) -> list[str]:
        """A line for each setting that changes what methods do during training."""
        lines = [f'nothing is captured before step {self.start_step}'] if self.start_step else []
        lines += [
            f'from step {step} on: captures every {capture} steps, refreshes every {refresh}'
            for step, capture, refresh in self.intervals
        ]
        return lines

    @classmethod
    def names(cls) -> list[str]:
        """Names of the settings."""
        return [field.name for field in fields(cls)]

    @classmethod
    def unknown(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some options that are none of these settings."""
        return {key: value for key, value in options.items() if key not in cls.names()}
