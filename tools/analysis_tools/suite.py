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
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis_tools.results import best_rate, measure_paces, train_or_load
from analysis_tools.suite_records import Records
from analysis_tools.suite_report import Results, Runs, draw, overview, report
from common import ROOT, WORK
from common.suite import TASKS, Task, schedule
from common.training import LOGGED, Run

#: Task and seeds of the quick suite.
QUICK = ('digits-cls', (0,))
#: Part of the length that a screening takes.
SCREENING = 4
#: Ratio of neighbouring rates, and most rates beyond a grid.
STEP, MOST_BEYOND = 10**0.5, 3
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
    """Results of a function that waits for trainings, some at a time; none starts after a fault."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(make, item) for item in items]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()
        return [future.result() for future in futures]


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

    After a stop by Ctrl-C or an error, the finished runs are in TASK.csv too.
    """
    task.model.make_data(args.data / task.model.data, task.images)
    length = settings(task, task.iterations, args)
    length.work_dir.mkdir(parents=True, exist_ok=True)
    known = read_records(task, args.records) if args.records else Records(screening_length(task))
    known.restore(length.work_dir)
    results = Results(task, paces=known.paces)
    try:
        results.task, results.screened, rates = choose_rates(task, kind, known, args)
        results.paces = known.paces or measure_paces(rates, length)
        check_paces(rates, results)
        lengths = {name: fitting(results, name, known) for name in rates}
        results.fitted = train_all(results.task, rates, lengths, args.seeds, args)
    finally:
        save_records(results, args)
    write(results, length.work_dir)
    return results


def fitting(results: Results, name: str, known: Records) -> int:
    """Iterations of an optimizer in the plain one's seconds.

    A recorded length next to it is taken, because seconds are rounded in records. A length is never
    that of the screening, whose runs would be taken for these.
    """
    wanted = LOGGED * max(1, round(results.paces[name].reach(results.budget) / LOGGED))
    wanted += LOGGED * (wanted == screening_length(results.task))
    near = [length for length in known.lengths(name) if abs(length - wanted) <= LOGGED]
    return min(near, key=lambda length: abs(length - wanted), default=wanted)


def check_paces(rates: dict[str, float], results: Results) -> None:
    """Ends the program if the records have seconds of some optimizers alone."""
    missing = rates.keys() - results.paces.keys()
    if missing:
        sys.exit(
            f'the records of {results.task.name} have no seconds of {", ".join(sorted(missing))}; '
            'seconds of two machines do not compare: remove the rows with quantity "pace" and the '
            'long runs, and all are measured again'
        )


def choose_rates(
    task: Task, kind: str, known: Records, args: argparse.Namespace
) -> tuple[Task, Runs, dict[str, float]]:
    """Best rates: those of records with all optimizers, else those of a screening.

    Returns:
        The task with Muon's second rate, the runs of the screening, the rates.
    """
    if kind == 'quick':
        known = read_records(task, RECORDS)
    rates, metric = known.rates(), task.model.headline
    if complete(task, rates):
        return replace(task, rest_rate=rates['AdamW']), known.screened(), rates
    if kind == 'quick':
        sys.exit(f'{RECORDS} has no finished {task.name}.csv; make it by --suite full')
    first = best_rate(screen(task, 'AdamW', args), metric)
    task = replace(task, rest_rate=first)  # as Muon's users would tune it
    screened = screen_all(task, args)
    return task, screened, {name: best_rate(runs, metric) for name, runs in screened.items()}


def complete(task: Task, names: Container[str]) -> bool:
    """True if all optimizers of a task are there, with one of its `rest`."""
    return all(name in names for name in task.contestants) and any(
        name in names for name in task.rest
    )


def run_whole(results: Results, args: argparse.Namespace) -> None:
    """Makes the runs of equal iterations."""
    task = results.task
    rates = {name: runs[0].lr for name, runs in results.fitted.items()}
    lengths = dict.fromkeys(rates, task.iterations)
    try:
        results.whole = train_all(task, rates, lengths, args.seeds[: task.whole_seeds], args)
    finally:
        save_records(results, args)
    write(results, args.work_dir / task.name)


def read_records(task: Task, folder: Path) -> Records:
    """Finished runs of a task in a folder of CSV files."""
    return Records.read(screening_length(task), folder / f'{task.name}.csv')


def save_records(results: Results, args: argparse.Namespace) -> None:
    """Writes the finished runs of a task; if no seconds are known yet, those of the file stay."""
    task, path = results.task, args.work_dir / f'{results.task.name}.csv'
    paces = results.paces or read_records(task, args.work_dir).paces
    Records.of(screening_length(task), args.work_dir / task.name, paces).write(path)


def write(results: Results, folder: Path) -> None:
    """Writes what there is so far: picture and report."""
    draw(results, folder / 'suite.png')
    (folder / 'report.md').write_text(report(results))


def recorded(task: Task, folder: Path, seeds: Sequence[int]) -> Results | None:
    """Results of a task's records; None if an optimizer or a run of equal seconds is missing."""
    known = read_records(task, folder)
    rates = known.rates()
    if not (complete(task, rates) and rates.keys() <= known.paces.keys()):
        return None
    results = Results(task, paces=known.paces, screened=known.screened())
    results.fitted = {n: known.tuned(n, fitting(results, n, known)) for n in rates}
    whole = {name: known.tuned(name, task.iterations)[: task.whole_seeds] for name in rates}
    if all(len(runs) == task.whole_seeds for runs in whole.values()):
        results.whole = whole
    finished = all(len(runs) == len(seeds) for runs in results.fitted.values())
    return results if finished else None


def report_records(names: Sequence[str], args: argparse.Namespace) -> str:
    """Makes the tables and pictures of finished tasks, and returns the tables."""
    done = []
    for name in names:
        results = recorded(TASKS[name], args.records or RECORDS, args.seeds)
        if results is None:
            print(f'{name} is left out: not all of its runs are in the records', file=sys.stderr)
            continue
        done.append(results)
        (args.work_dir / name).mkdir(parents=True, exist_ok=True)
        write(results, args.work_dir / name)
    if not done:
        sys.exit(f'{args.records or RECORDS} has no file TASK.csv with all runs of a task')
    return write_report(done, args.work_dir)


def main(kind: str, names: Sequence[str], args: argparse.Namespace) -> None:
    """Runs the suite, with a report after each task, or reports the records."""
    args.work_dir = (args.work_dir or WORK / f'work_dirs/suite_{kind}').resolve()
    args.data = WORK / 'data/suite'
    names = names or list(TASKS)
    if kind == 'recorded':
        print(report_records(names, args))
        return
    args.timed = args.timed or TIMED[kind]
    if kind == 'quick':
        quick, args.seeds = QUICK
        names = [quick]
    if args.records and not any((args.records / f'{name}.csv').is_file() for name in names):
        sys.exit(f'{args.records} has none of the files {", ".join(f"{n}.csv" for n in names)}')
    done: list[Results] = []
    for name in names:
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
