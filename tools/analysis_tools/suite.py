"""Suite of comparisons: screened rates, several seeds, scores at equal iterations and seconds.

Every optimizer of a task is screened at a quarter of the length on seed 0, with rates beyond the
grid where the best is at an edge. All are then timed in turns, an iteration each. With its best
rate each optimizer is trained on every seed, for as many iterations as fit into the seconds that
the config's own optimizer takes for the task's length. When all tasks have got so far, it is also
trained for that length, detectors on one seed alone. Each run has a schedule of its own length.
Finished runs are kept: a second call continues a stopped one, with `--records` also elsewhere.

`results.py --suite full` does this for five tasks. `--suite quick` takes the recorded rates of one
task, and makes its runs of equal seconds on one seed. `--suite recorded` trains nothing: it makes
the tables and pictures of docs/results.md from the records.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis_tools.results import best_rate, measure_paces, train_or_load
from analysis_tools.suite_records import Records, recorded_rates
from analysis_tools.suite_report import Results, Runs, draw, overview, report
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


def screening_length(task: Task) -> int:
    """Iterations of a screening run."""
    return max(1, task.iterations // SCREENING)


def screen(task: Task, name: str, args: argparse.Namespace) -> list[Run]:
    """Screening runs in the order of their rates, `args.jobs` at a time.

    The best rate is not at an edge, unless `MOST_BEYOND` further rates were tried.
    """
    short = settings(task, screening_length(task), args, evaluations=1)
    metric, seed = task.model.headline, args.seeds[0]
    grid = task.rates(name)
    made = in_parallel(lambda rate: train_or_load(Run(name, rate, seed), short), grid, args.jobs)
    runs = dict(zip(grid, made, strict=True))
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
    single = argparse.Namespace(**{**vars(args), 'jobs': 1})
    made = in_parallel(lambda name: screen(task, name, single), names, args.jobs)
    found = dict(zip(names, made, strict=True))
    metric = task.model.headline
    best = max(task.rest, key=lambda name: max(run.score(metric) for run in found[name]))
    return {name: runs for name, runs in found.items() if name not in task.rest or name == best}


def in_parallel(make: Callable[[Any], Any], items: Iterable[Any], jobs: int) -> list[Any]:
    """Results of a function that waits for trainings, some at a time."""
    with ThreadPoolExecutor(jobs) as pool:
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

    runs = dict(zip(pairs, in_parallel(one, pairs, args.jobs), strict=True))
    return {name: [runs[name, seed] for seed in seeds] for name in rates}


def run_fitted(task: Task, kind: str, args: argparse.Namespace) -> Results:
    """Finds the rates and seconds of a task's optimizers, and makes the runs of equal seconds.

    If it is stopped, finished runs are in records.csv too.
    """
    task.model.make_data(args.data / task.model.data, task.images)
    length = settings(task, task.iterations, args)
    length.work_dir.mkdir(parents=True, exist_ok=True)
    known = Records.read(args.records / f'{task.name}.csv') if args.records else Records()
    known.restore(length.work_dir)
    results = Results(task, paces=known.paces)
    try:
        rates = find_rates(results, kind, known, args)
        if not rates.keys() <= known.paces.keys():
            results.paces = measure_paces(rates, length)
        lengths = {name: fitting(results, name, known) for name in rates}
        results.fitted = train_all(results.task, rates, lengths, args.seeds, args)
    finally:
        Records.of(length.work_dir, results.paces).write(length.work_dir / 'records.csv')
    write(results, length.work_dir)
    return results


def fitting(results: Results, name: str, known: Records) -> int:
    """Iterations of an optimizer in the plain one's seconds; of recorded runs those that fit best.

    Records have rounded seconds, which do not always lead to the same number again.
    """
    wanted = LOGGED * max(1, round(results.paces[name].reach(results.budget) / LOGGED))
    return min(known.lengths(name), key=lambda length: abs(length - wanted), default=wanted)


def find_rates(
    results: Results, kind: str, known: Records, args: argparse.Namespace
) -> dict[str, float]:
    """Best rates: those of records with all optimizers, else those of a screening.

    The task of the results gets Muon's second rate, and they get the runs of the screening.
    """
    task, metric = results.task, results.task.model.headline
    rates = recorded_rates(RECORDS / f'{task.name}.csv') if kind == 'quick' else known.rates
    if kind == 'quick' or complete(task, rates):
        results.task = replace(task, rest_rate=rates['AdamW'])
        results.screened = known.screened(screening_length(task))
        return rates
    first = best_rate(screen(task, 'AdamW', args), metric)
    results.task = replace(task, rest_rate=first)  # as Muon's users would tune it
    results.screened = screen_all(results.task, args)
    return {name: best_rate(runs, metric) for name, runs in results.screened.items()}


def complete(task: Task, rates: dict[str, float]) -> bool:
    """True if all optimizers of a task are there, with one of its `rest`."""
    return rates.keys() >= set(task.contestants) and not rates.keys().isdisjoint(task.rest)


def run_whole(results: Results, args: argparse.Namespace) -> None:
    """Makes the runs of equal iterations."""
    task, folder = results.task, args.work_dir / results.task.name
    rates = {name: runs[0].lr for name, runs in results.fitted.items()}
    lengths = dict.fromkeys(rates, task.iterations)
    try:
        results.whole = train_all(task, rates, lengths, args.seeds[: task.whole_seeds], args)
    finally:
        Records.of(folder, results.paces).write(folder / 'records.csv')
    write(results, folder)


def write(results: Results, folder: Path) -> None:
    """Writes what there is so far: picture and report."""
    draw(results, folder / 'suite.png')
    (folder / 'report.md').write_text(report(results))


def recorded(task: Task, known: Records) -> Results:
    """Results of a task with all optimizers in a record."""
    results = Results(task, paces=known.paces, screened=known.screened(screening_length(task)))
    for name in known.rates:
        results.fitted[name] = known.tuned(name, fitting(results, name, known))
        whole = known.tuned(name, task.iterations)[: task.whole_seeds]
        results.whole |= {name: whole} if whole else {}
    return results


def main(kind: str, names: Sequence[str], args: argparse.Namespace) -> None:
    """Runs the suite and writes report.md after each task."""
    args.work_dir = (args.work_dir or WORK / f'work_dirs/suite_{kind}').resolve()
    args.data = WORK / 'data/suite'
    done: list[Results] = []
    if kind == 'recorded':
        for name in names or TASKS:
            known = Records.read((args.records or RECORDS) / f'{name}.csv')
            if complete(TASKS[name], known.rates):
                done.append(recorded(TASKS[name], known))
                (args.work_dir / name).mkdir(parents=True, exist_ok=True)
                write(done[-1], args.work_dir / name)
        print(write_report(done, args.work_dir))
        return
    args.timed = args.timed or TIMED[kind]
    if kind == 'quick':
        quick, args.seeds = QUICK
        names = [quick]
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
