"""Curves of a training, read from the scalars.json that MMEngine's logger writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .scores import is_score

#: Prefix of all names in a log with LogProcessor(log_with_hierarchy=True).
PHASE = re.compile(r'^(train|val)/')

Point = tuple[int, float, float]  # iteration, seconds of training so far, value


def log_files(work_dir: Path, since: float = 0.0) -> list[Path]:
    """Returns the logs of a work folder that were written since a time, oldest first."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    return [file for file in files if file.stat().st_mtime >= since]


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a log, except for an incomplete last line."""
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


@dataclass(kw_only=True)
class Curves:
    """Loss and scores over iterations and seconds.

    Seconds are those of training, without validation and start-up.

    Attributes:
        losses: The loss over time.
        scores: Each score over time, by its name in the log. At least one point each.
        training: Each accuracy on batches of the training, by its name in the log.
        memory: Peak memory in MB.
    """

    losses: list[Point] = field(default_factory=list)
    scores: dict[str, list[Point]] = field(default_factory=dict)
    training: dict[str, list[Point]] = field(default_factory=dict)
    memory: float = 0.0

    @property
    def iterations(self) -> int:
        """Iterations that were logged."""
        return self.losses[-1][0] if self.losses else 0

    @property
    def seconds(self) -> float:
        """Seconds of training."""
        return self.losses[-1][1] if self.losses else 0.0

    def last(self, score: str) -> float | None:
        """Returns a score at the last evaluation that has it."""
        points = self.scores.get(score)
        return points[-1][2] if points else None

    def read(self, file: Path) -> None:
        """Appends a log, and replaces earlier entries of the same iterations (after a resume)."""
        begun = False
        iteration, seconds = self.iterations, self.seconds
        for line in entries(file):
            entry = {PHASE.sub('', name): value for name, value in line.items()}
            if 'loss' in entry and 'iter' in entry:
                if not begun:
                    self.cut(int(entry['iter']))
                    begun, iteration, seconds = True, self.iterations, self.seconds
                seconds += entry.get('time', 0.0) * (entry['iter'] - iteration)
                iteration = int(entry['iter'])
                self.losses.append((iteration, seconds, entry['loss']))
                for name, value in entry.items():
                    if name.startswith('acc'):
                        self.training.setdefault(name, []).append((iteration, seconds, value))
                self.memory = max(self.memory, entry.get('memory', 0))
                continue
            for name, value in entry.items():
                if is_score(name, value):
                    # A loop by epochs has their number as step, which is smaller.
                    step = max(iteration, int(line.get('step', 0)))
                    self.scores.setdefault(name, []).append((step, seconds, value))

    def cut(self, start: int) -> None:
        """Removes entries from an iteration on."""
        self.losses = [point for point in self.losses if point[0] < start]
        for series in (self.scores, self.training):
            for name, points in list(series.items()):
                series[name] = [point for point in points if point[0] < start]
                if not series[name]:
                    del series[name]
