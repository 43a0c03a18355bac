"""Suite of comparisons: screened rates, several seeds, scores at equal iterations and seconds.

`results.py --suite quick` runs one task, `--suite full` all five. Each optimizer is screened at a
quarter of the length on seed 0, with rates beyond the grid where the best is at an edge, and is
then trained at full length on the given seeds (quick: seed 0). Finished runs are kept: a second
call continues a stopped one. Times are measured at the end, in short runs that alternate between
the optimizers. The machine must be otherwise idle then.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from analysis_tools.results import at, seconds_per_iteration, train_or_load
from common import ROOT
from common.suite import EXTERNAL, TASKS, Task, schedule
from common.tables import markdown, spread
from common.training import Run

#: Task of the quick suite, and its length and seeds.
QUICK = ('digits-cls', 150, (0,))
#: Part of the length that a screening takes.
SCREENING = 4
#: Ratio of neighbouring rates, and most rates beyond a grid.
STEP, MOST_BEYOND = 10**0.5, 3


def settings(task: Task, iterations: int, args: argparse.Namespace) -> argparse.Namespace:
    """Arguments of `train_or_load` for a task and a length."""
    folder = args.work_dir / task.model.title.replace(' ', '_').replace(',', '')
    return argparse.Namespace(
        model=_WithOptions(task),
        iterations=iterations,
        val_interval=max(1, iterations // task.evaluations),
        data=args.data / task.model.data,
        work_dir=folder,
        options=[*schedule(iterations).items(), *args.options],
        timed=args.timed,
        turns=args.turns,
    )


class _WithOptions:
    """A task's model, whose optimizers have the suite's settings."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task.model, name)

    def contestant(self, name: str) -> Any:
        """Training settings of an optimizer (see `Task.contestant`)."""
        return self._task.contestant(name)


def screen(task: Task, name: str, iterations: int, args: argparse.Namespace) -> list[Run]:
    """Screening runs in the order of their rates.

    The best rate is not at an edge, unless `MOST_BEYOND` further rates were tried.
    """
    short = settings(task, max(1, iterations // SCREENING), args)
    metric, seed = task.model.headline, args.seeds[0]
    runs = {rate: train_or_load(Run(name, rate, seed), short) for rate in task.rates(name)}
    for _ in range(MOST_BEYOND):
        best = max(runs, key=lambda rate: runs[rate].score(metric))
        beyond = {max(runs): best * STEP, min(runs): best / STEP}.get(best)
        if beyond is None:
            break
        rate = float(f'{beyond:.1g}')
        runs[rate] = train_or_load(Run(name, rate, seed), short)
    return [runs[rate] for rate in sorted(runs)]


def run_task(task: Task, iterations: int, args: argparse.Namespace) -> str:
    """Trains all optimizers of a task; returns its part of the report and writes its records."""
    task.model.make_data(args.data / task.model.data, task.images)
    whole = settings(task, iterations, args)
    whole.work_dir.mkdir(parents=True, exist_ok=True)
    metric = task.model.headline
    screened = {name: screen(task, name, iterations, args) for name in task.contestants}
    best = {name: max(runs, key=lambda r: r.score(metric)).lr for name, runs in screened.items()}
    final = {
        name: [train_or_load(Run(name, rate, seed), whole) for seed in args.seeds]
        for name, rate in best.items()
    }
    seconds = seconds_per_iteration(best, whole)
    write_records(final, seconds, whole.work_dir / 'records.csv')
    if seconds:
        _draw(final, seconds, task, whole.work_dir / 'suite.png')
    return f'## {task.model.title}\n\n{report(task, screened, final, seconds)}\n'


def report(
    task: Task,
    screened: dict[str, list[Run]],
    final: dict[str, list[Run]],
    seconds: dict[str, float],
) -> str:
    """Table of a task: means over seeds with ranges.

    Times are relative to the best optimizer of others.
    """
    metric = task.model.headline
    form = '.1f' if metric.startswith('accuracy') else '.3f'
    others = [name for name in final if name in EXTERNAL]
    first = max(others, key=lambda name: mean(run.score(metric) for run in final[name]))
    goal = mean(run.score(metric) for run in final[first])
    budget = final[first][0].iterations * seconds.get(first, math.nan)
    lines = []
    for name, runs in final.items():
        each = seconds.get(name, math.nan)
        level = [
            at(run, min(run.iterations, budget / each), metric) for run in runs if each == each
        ]
        reached = [s for run in runs if (s := _iterations_to(run, goal, metric)) is not None]
        lines.append(
            (
                name,
                f'{runs[0].lr:g}',
                spread([run.score(metric) for run in runs], form),
                spread([run.losses[-1][2] for run in runs], '.2f'),
                spread(level, form) if level else '-',
                f'{mean(reached) * each / budget:.2f}' if len(reached) == len(runs) else '-',
                f'{each:.3f}',
                f'{mean(run.memory for run in runs):.0f}',
                ', '.join(f'{run.lr:g}: {run.score(metric):{form}}' for run in screened[name]),
            )
        )
    title = task.model.metrics[metric]
    heads = (
        'optimizer',
        'lr',
        f'{title} at the end',
        'loss',
        f"{title} in {first}'s time",
        f"time to {first}'s score / its time",
        's / iteration',
        'MB',
        'screening',
    )
    return markdown(heads, lines)


def _iterations_to(run: Run, goal: float, metric: str) -> float | None:
    """Iterations until a run first has a score, between evaluations; None if it never has."""
    before = (0, 0.0)
    for step, _, value in run.scores.get(metric, []):
        if value >= goal:
            share = (goal - before[1]) / (value - before[1])
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


def write_records(final: dict[str, list[Run]], seconds: dict[str, float], path: Path) -> None:
    """Writes every evaluation of the whole runs."""
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('optimizer', 'lr', 'seed', 'quantity', 'iteration', 'seconds', 'value'))
        for name, runs in final.items():
            each = seconds.get(name, math.nan)
            for run in runs:
                series = {'loss': run.losses, **run.scores}
                for quantity, points in series.items():
                    for step, _, value in points:
                        writer.writerow(
                            (name, run.lr, run.seed, quantity, step, f'{step * each:.1f}', value)
                        )


def _draw(final: dict[str, list[Run]], seconds: dict[str, float], task: Task, path: Path) -> None:
    """Plots the mean score over seeds against seconds of training; others are dashed."""
    from matplotlib.figure import Figure

    metric = task.model.headline
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    for name, runs in final.items():
        points = [run.scores.get(metric, []) for run in runs]
        steps = [step for step, _, _ in points[0]]
        values = [
            mean(series[k][2] for series in points if k < len(series)) for k in range(len(steps))
        ]
        style = '--' if name in EXTERNAL else '-'
        label = name.rsplit('.', 1)[-1] + (' (pytorch_optimizer)' if '.' in name else '')
        axes.plot([step * seconds[name] for step in steps], values, style, marker='.', label=label)
    axes.set(
        xlabel='seconds of training', ylabel=task.model.metrics[metric], title=task.model.title
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(kind: str, tasks: Sequence[str], args: argparse.Namespace) -> None:
    """Runs the suite and writes report.md after each task."""
    args.work_dir = (args.work_dir or ROOT / f'work_dirs/suite_{kind}').resolve()
    args.data = ROOT / 'data/suite'
    parts = []
    if kind == 'quick':
        name, iterations, args.seeds = QUICK
        parts.append(run_task(TASKS[name], iterations, args))
    else:
        for name in tasks or TASKS:
            parts.append(run_task(TASKS[name], TASKS[name].iterations, args))
            (args.work_dir / 'report.md').write_text('\n'.join(parts))
    (args.work_dir / 'report.md').write_text('\n'.join(parts))
    print('\n'.join(parts))
