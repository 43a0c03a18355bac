"""Suite of comparisons: screened rates, several seeds, scores at equal iterations and seconds.

Every optimizer of a task is screened at a quarter of the length on seed 0, with rates beyond the
grid where the best is at an edge. All are then timed in turns, an iteration each. With its best
rate each optimizer is trained on every seed, for as many iterations as fit into the seconds that
the config's own optimizer takes for the task's length. When all tasks have got so far, it is also
trained for that length, detectors on one seed alone. Each run has a schedule of its own length.
Finished runs are kept: a second call continues a stopped one.

`results.py --suite full` does this for five tasks. `--suite quick` takes the recorded rates of one
task, and makes its runs of equal seconds on one seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis_tools.results import best_rate, measure_paces, train_or_load
from analysis_tools.suite_report import (
    Results,
    Runs,
    draw,
    overview,
    recorded_rates,
    report,
    write_records,
)
from common import ROOT, WORK
from common.suite import TASKS, Task, schedule
from common.training import Run

#: Task and seeds of the quick suite.
QUICK = ('digits-cls', (0,))
#: Part of the length that a screening takes.
SCREENING = 4
#: Ratio of neighbouring rates, and most rates beyond a grid.
STEP, MOST_BEYOND = 10**0.5, 3
#: Iterations between two lines of a log; lengths are multiples, so that the end is in the log.
LOGGED = 10
#: Recorded runs of the full suite.
RECORDS = ROOT / 'docs/records'
#: Iterations of each round of the timing; early ones take longer (see `Pace`).
TIMED = {'full': 100, 'quick': 60}


def settings(
    task: Task, iterations: int, args: argparse.Namespace, evaluations: int | None = None
) -> argparse.Namespace:
    """Arguments of `train_or_load` for a task, a length, and a number of evaluations."""
    return argparse.Namespace(
        model=task.prepared,
        iterations=iterations,
        val_interval=max(1, iterations // (evaluations or task.evaluations)),
        data=args.data / task.model.data,
        work_dir=args.work_dir / task.name,
        options=[*schedule(iterations).items(), *args.options],
        timed=args.timed,
    )


def screen(task: Task, name: str, args: argparse.Namespace) -> list[Run]:
    """Screening runs in the order of their rates.

    The best rate is not at an edge, unless `MOST_BEYOND` further rates were tried.
    """
    short = settings(task, max(1, task.iterations // SCREENING), args, evaluations=1)
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


def screen_all(task: Task, args: argparse.Namespace) -> Runs:
    """Screening runs of all optimizers; of the task's `rest` those of the best one stay."""
    names = (*task.contestants, *task.rest)
    found = dict(zip(names, in_parallel(lambda n: screen(task, n, args), names, args), strict=True))
    metric = task.model.headline
    best = max(task.rest, key=lambda name: max(run.score(metric) for run in found[name]))
    return {name: runs for name, runs in found.items() if name not in task.rest or name == best}


def in_parallel(
    make: Callable[[Any], Any], items: Iterable[Any], args: argparse.Namespace
) -> list[Any]:
    """Results of a function that waits for trainings, `args.jobs` at a time."""
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(make, items))


def train_all(
    task: Task,
    rates: dict[str, float],
    lengths: dict[str, int],
    seeds: Sequence[int],
    args: argparse.Namespace,
) -> Runs:
    """Trains every optimizer on some seeds for a number of iterations of its own."""
    pairs = [(name, seed) for name in rates for seed in seeds]

    def one(pair: tuple[str, int]) -> Run:
        name, seed = pair
        return train_or_load(Run(name, rates[name], seed), settings(task, lengths[name], args))

    runs = dict(zip(pairs, in_parallel(one, pairs, args), strict=True))
    return {name: [runs[name, seed] for seed in seeds] for name in rates}


def run_fitted(task: Task, kind: str, args: argparse.Namespace) -> Results:
    """Finds the rates and seconds of a task's optimizers, and makes the runs of equal seconds."""
    task.model.make_data(args.data / task.model.data, task.images)
    metric, results = task.model.headline, Results(task)
    length = settings(task, task.iterations, args)
    length.work_dir.mkdir(parents=True, exist_ok=True)
    if kind == 'quick':
        rates = recorded_rates(RECORDS / f'{task.name}.csv')
        task = results.task = replace(task, rest_rate=rates['AdamW'])
    else:
        first = best_rate(screen(task, 'AdamW', args), metric)
        task = results.task = replace(task, rest_rate=first)  # as Muon's users would tune it
        results.screened = screen_all(task, args)
        rates = {name: best_rate(runs, metric) for name, runs in results.screened.items()}
    results.paces = measure_paces(rates, length)
    fitting = {
        name: LOGGED * max(1, round(results.paces[name].reach(results.budget) / LOGGED))
        for name in rates
    }
    results.fitted = train_all(task, rates, fitting, args.seeds, args)
    write(results, length.work_dir)
    return results


def run_whole(results: Results, args: argparse.Namespace) -> None:
    """Makes the runs of equal iterations."""
    task = results.task
    rates = {name: runs[0].lr for name, runs in results.fitted.items()}
    lengths = dict.fromkeys(rates, task.iterations)
    results.whole = train_all(task, rates, lengths, args.seeds[: task.whole_seeds], args)
    write(results, args.work_dir / task.name)


def write(results: Results, folder: Path) -> None:
    """Writes what there is so far: records, picture and report."""
    write_records(results, folder / 'records.csv')
    draw(results, folder / 'suite.png')
    (folder / 'report.md').write_text(report(results))


def main(kind: str, names: Sequence[str], args: argparse.Namespace) -> None:
    """Runs the suite and writes report.md after each task."""
    args.work_dir = (args.work_dir or WORK / f'work_dirs/suite_{kind}').resolve()
    args.data = WORK / 'data/suite'
    args.timed = args.timed or TIMED[kind]
    if kind == 'quick':
        quick, args.seeds = QUICK
        names = [quick]
    done: list[Results] = []
    for name in names or TASKS:
        done.append(run_fitted(TASKS[name], kind, args))
        text = write_report(done, args.work_dir)
    for results in done if kind == 'full' else ():
        run_whole(results, args)
        text = write_report(done, args.work_dir)
    print(text)


def write_report(done: Sequence[Results], folder: Path) -> str:
    """Writes the report of some tasks, and returns it: tables of all, then one of each."""
    text = '\n'.join([overview(done), *map(report, done)])
    (folder / 'report.md').write_text(text)
    return text
