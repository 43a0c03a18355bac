"""Records of the suite: the finished runs of a task and their seconds, as a CSV file."""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis_tools.results import record_file
from common.pace import Pace
from common.training import Run

#: Columns. `length` is the number of iterations of a run: it tells screening, whole and fitted runs
#: apart. `seconds` are those measured in turns, empty before the measurement.
HEADS = ('optimizer', 'lr', 'seed', 'length', 'quantity', 'iteration', 'seconds', 'value')
#: Quantities of a run beside its scores.
LOSS, MEMORY = 'loss', 'memory_mb'


@dataclass
class Records:
    """Finished runs of a task.

    Attributes:
        runs: Each run with its number of iterations.
        paces: Seconds of training against iterations, by optimizer.
    """

    runs: list[tuple[int, Run]] = field(default_factory=list)
    paces: dict[str, Pace] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, paces: dict[str, Pace]) -> Records:
        """Returns the finished runs of a work folder."""
        runs = [
            (int(file.stem.rpartition('_')[2]), Run(**json.loads(file.read_text())))
            for file in folder.glob('*_seed_*_*.json')
        ]
        runs.sort(key=lambda pair: (pair[0], pair[1].optimizer, pair[1].lr, pair[1].seed))
        return cls(runs, paces)

    @classmethod
    def read(cls, path: Path) -> Records:
        """Reads a file; without one there are no runs."""
        if not path.is_file():
            return cls()
        runs: dict[tuple[str, ...], Run] = {}
        points: defaultdict[str, dict[int, float]] = defaultdict(dict)
        with path.open() as file:
            for row in csv.DictReader(file):
                key = (row['optimizer'], row['lr'], row['seed'], row['length'])
                run = runs.setdefault(key, Run(key[0], float(key[1]), int(key[2])))
                step, value, quantity = int(row['iteration']), float(row['value']), row['quantity']
                if row['seconds']:
                    points[key[0]][step] = float(row['seconds'])
                if quantity == MEMORY:
                    run.memory = value
                    continue
                curve = run.losses if quantity == LOSS else run.scores.setdefault(quantity, [])
                curve.append((step, float(row['seconds'] or 0), value))
        paces = {
            name: Pace(steps, [known[step] for step in steps])
            for name, known in points.items()
            if (steps := sorted(known))
        }
        return cls([(int(key[3]), run) for key, run in runs.items()], paces)

    def write(self, path: Path) -> None:
        """Writes the last loss and every evaluation of all runs."""
        with path.open('w', newline='') as file:
            writer = csv.writer(file, lineterminator='\n')
            writer.writerow(HEADS)
            writer.writerows(row for length, run in self.runs for row in self._rows(length, run))

    def _rows(self, length: int, run: Run) -> Iterator[tuple[Any, ...]]:
        pace = self.paces.get(run.optimizer)
        curves = {LOSS: run.losses[-1:], **run.scores}
        if run.memory:
            curves[MEMORY] = [(length, 0.0, run.memory)]
        for quantity, points in curves.items():
            for step, _, value in points:
                seconds = f'{pace.until(step):.2f}' if pace else ''
                about = (run.optimizer, f'{run.lr:g}', run.seed, length, quantity)
                yield (*about, step, seconds, f'{value:.5g}')

    def restore(self, folder: Path) -> None:
        """Puts the runs into a work folder, as if they had been made there."""
        for length, run in self.runs:
            file = record_file(run, length, folder)
            if not file.exists():
                file.write_text(json.dumps(asdict(run)))

    @property
    def rates(self) -> dict[str, float]:
        """Best rate of every optimizer: that of its runs on more seeds than the screening's."""
        return {run.optimizer: run.lr for _, run in self.runs if run.seed > 0}

    def tuned(self, name: str, length: int) -> list[Run]:
        """Runs of an optimizer with its best rate and some length, in the order of their seeds."""
        runs = [run for n, run in self.runs if (n, run.optimizer) == (length, name)]
        return sorted((run for run in runs if run.lr == self.rates[name]), key=lambda run: run.seed)

    def lengths(self, name: str) -> set[int]:
        """Lengths of an optimizer's runs on more seeds than the screening's."""
        return {length for length, run in self.runs if run.optimizer == name and run.seed > 0}

    def screened(self, length: int) -> dict[str, list[Run]]:
        """Runs of a screening's length by optimizer, in the order of their rates."""
        found: defaultdict[str, list[Run]] = defaultdict(list)
        for _, run in sorted((p for p in self.runs if p[0] == length), key=lambda p: p[1].lr):
            found[run.optimizer].append(run)
        return found


def recorded_rates(path: Path) -> dict[str, float]:
    """Best rates of a record; without one it ends the program."""
    rates = Records.read(path).rates
    if not rates:
        sys.exit(f'there is no record {path}; make one by --suite full --tasks {path.stem}')
    return rates
