"""Records of the suite: the finished runs of a task and their seconds, as a CSV file."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from analysis_tools.results import record_file
from common.pace import Pace
from common.training import Run

#: Columns. `length` is the number of iterations of a run. `seconds` are those measured in turns,
#: empty before the measurement.
HEADS = ('optimizer', 'lr', 'seed', 'length', 'quantity', 'iteration', 'seconds', 'value')
#: Quantities of a run beside its scores, and of an optimizer (without rate, seed and length).
LOSS, MEMORY, PACE = 'loss', 'memory_mb', 'pace'


@dataclass
class Records:
    """Finished runs of a task.

    Attributes:
        screening: Number of iterations of the task's screening runs; no other run has it.
        runs: Each run with its number of iterations.
        paces: Seconds of training against iterations, by optimizer.
    """

    screening: int
    runs: list[tuple[int, Run]] = field(default_factory=list)
    paces: dict[str, Pace] = field(default_factory=dict)

    @classmethod
    def of(cls, screening: int, folder: Path, paces: dict[str, Pace]) -> Records:
        """Returns the finished runs of a work folder."""
        runs = [
            (int(file.stem.rpartition('_')[2]), Run(**json.loads(file.read_text())))
            for file in folder.glob('*_seed_*_*.json')
        ]
        runs.sort(key=lambda pair: (pair[0], pair[1].optimizer, pair[1].lr, pair[1].seed))
        return cls(screening, runs, paces)

    @classmethod
    def read(cls, screening: int, path: Path) -> Records:
        """Reads a file; without one there are no runs."""
        runs: dict[tuple[str, ...], Run] = {}
        points: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for row in _rows_of(path):
            step, seconds = float(row['iteration']), float(row['seconds'] or 0)
            name, quantity = row['optimizer'], row['quantity']
            if quantity == PACE:
                points[name].append((step, seconds))
                continue
            key = (name, row['lr'], row['seed'], row['length'])
            run = runs.setdefault(key, Run(name, float(row['lr']), int(row['seed'])))
            if quantity == MEMORY:
                run.memory = float(row['value'])
                continue
            curve = run.losses if quantity == LOSS else run.scores.setdefault(quantity, [])
            curve.append((int(step), seconds, float(row['value'])))
        paces = {
            name: Pace([step for step, _ in known], [seconds for _, seconds in known])
            for name, known in points.items()
        }
        return cls(screening, [(int(key[3]), run) for key, run in runs.items()], paces)

    def write(self, path: Path) -> None:
        """Writes the paces, and the last loss and every evaluation of all runs."""
        with path.open('w', newline='') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(HEADS)
            for name, pace in self.paces.items():
                few = pace.outline
                for step, seconds in zip(few.iterations, few.seconds, strict=True):
                    writer.writerow((name, '', '', '', PACE, f'{step:.10g}', f'{seconds:.3f}', ''))
            writer.writerows(row for length, run in self.runs for row in self._rows(length, run))

    def _rows(self, length: int, run: Run) -> Iterator[tuple[Any, ...]]:
        pace = self.paces.get(run.optimizer)
        curves = {LOSS: run.losses[-1:], **run.scores}
        if run.memory:
            curves[MEMORY] = [(length, 0.0, run.memory)]
        for quantity, points in curves.items():
            for step, _, value in points:
                seconds = f'{pace.until(step):.1f}' if pace else ''
                about = (run.optimizer, f'{run.lr:g}', run.seed, length, quantity)
                yield (*about, step, seconds, f'{value:.5g}')

    def restore(self, folder: Path) -> None:
        """Puts the runs into a work folder, as if they had been made there."""
        for length, run in self.runs:
            file = record_file(run, length, folder)
            if not file.exists():
                file.write_text(json.dumps(asdict(run)))

    def rates(self) -> dict[str, float]:
        """Best rate of every optimizer: that of its runs after the screening.

        Raises:
            SystemExit: If an optimizer has such runs at two rates.
        """
        rates: dict[str, float] = {}
        for length, run in self.runs:
            if length != self.screening and rates.setdefault(run.optimizer, run.lr) != run.lr:
                sys.exit(
                    f'{run.optimizer} has long runs at the rates {rates[run.optimizer]:g} and '
                    f'{run.lr:g}; remove those of one rate from the records or the work folder'
                )
        return rates

    def tuned(self, name: str, length: int) -> list[Run]:
        """Runs of an optimizer with some length, in the order of their seeds."""
        runs = [run for n, run in self.runs if (n, run.optimizer) == (length, name)]
        return sorted(runs, key=lambda run: run.seed)

    def lengths(self, name: str) -> set[int]:
        """Lengths of an optimizer's runs after the screening."""
        return {n for n, run in self.runs if run.optimizer == name and n != self.screening}

    def screened(self) -> dict[str, list[Run]]:
        """Runs of the screening by optimizer, in the order of their rates."""
        found: defaultdict[str, list[Run]] = defaultdict(list)
        for run in sorted(
            (run for n, run in self.runs if n == self.screening), key=attrgetter('lr')
        ):
            found[run.optimizer].append(run)
        return found


def _rows_of(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))
