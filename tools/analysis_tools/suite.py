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
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from analysis_tools.results import best_rate, measure_paces, train_or_load
from common import ROOT, WORK
from common.pace import Pace
from common.suite import EXTERNAL, FIRST_ORDER, TASKS, Task, schedule
from common.tables import markdown, spread
from common.training import Run

#: Task and seeds of the quick suite.
QUICK = ('digits-cls', (0,))
#: Part of the length that a screening takes.
SCREENING = 4
#: Ratio of neighbouring rates, and most rates beyond a grid.
STEP, MOST_BEYOND = 10**0.5, 3
#: Iterations between two lines of a log; lengths are multiples, so that the end is in the log.
LOGGED = 10
#: Lowest score of a picture, as a part of the best one.
SHOWN = 0.5
#: Colours of a picture by optimizer, the same in all.
COLORS = {
    'SGD': 'tab:gray',
    'AdamW': 'black',
    'Muon': 'tab:blue',
    'SOAP': 'tab:red',
    'ScalableShampoo': 'tab:brown',
    'NKFAC': 'tab:green',
    'AdaNKFAC': 'tab:orange',
    'FAdam': 'tab:pink',
    'AdamR': 'tab:purple',
    'ARO': 'tab:cyan',
    'SKFAC': 'gold',
    'AdaAFOpt': 'navy',
    'AFOpt+NKFAC': 'tab:olive',
}
#: Recorded runs of the full suite.
RECORDS = ROOT / 'docs/records'
#: Iterations of each round of the timing; early ones take longer (see `Pace`).
TIMED = {'full': 100, 'quick': 60}

Runs = dict[str, list[Run]]


@dataclass
class Results:
    """Runs of a task.

    Attributes:
        task: The task.
        screened: Short runs on one seed, one for each rate.
        paces: Seconds of training against iterations.
        whole: Runs of the task's length.
        fitted: Runs that take the seconds of the plain optimizer's whole run.
    """

    task: Task
    screened: Runs = field(default_factory=dict)
    paces: dict[str, Pace] = field(default_factory=dict)
    whole: Runs = field(default_factory=dict)
    fitted: Runs = field(default_factory=dict)

    @property
    def budget(self) -> float:
        """Seconds of training in each of the fitted runs."""
        return self.paces[self.task.model.plain].until(self.task.iterations)

    @property
    def means(self) -> dict[str, float]:
        """Mean score of each optimizer's fitted runs."""
        metric = self.task.model.headline
        return {name: mean(run.score(metric) for run in runs) for name, runs in self.fitted.items()}


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
    _draw(results, folder / 'suite.png')
    (folder / 'report.md').write_text(report(results))


def report(results: Results) -> str:
    """Part of the report for a task: means over seeds with ranges."""
    task, paces, budget = results.task, results.paces, results.budget
    metric, title = task.model.headline, task.model.metrics[task.model.headline]
    form = '.1f' if metric.startswith('accuracy') else '.3f'
    means = results.means
    first = max((name for name in means if name in FIRST_ORDER), key=means.__getitem__)
    lines = []
    for name, runs in sorted(results.fitted.items(), key=lambda item: -means[item[0]]):
        reached = [s for run in runs if (s := _iterations_to(run, means[first], metric))]
        whole = [run.score(metric) for run in results.whole.get(name, [])]
        lines.append(
            (
                name,
                f'{runs[0].lr:g}',
                spread([run.score(metric) for run in runs], form),
                spread([run.losses[-1][2] for run in runs], '.3f'),
                spread(whole, form) if whole else '-',
                f'{mean(map(paces[name].until, reached)) / budget:.2f}'
                if len(reached) == len(runs)
                else '-',
                f'{task.iterations / paces[name].reach(budget):.2f}',
                f'{mean(run.memory for run in runs):.0f}',
                ', '.join(
                    f'{run.lr:g}: {run.score(metric):{form}}'
                    for run in results.screened.get(name, [])
                ),
            )
        )
    heads = (
        'optimizer',
        'lr',
        f'{title} in {budget:.0f} s',
        'loss',
        f'{title} after {task.iterations} iterations',
        f"time to {first}'s score",
        'seconds / iteration',
        'MB',
        f'{title} of each rate in the screening',
    )
    about = (
        f'{task.iterations} iterations of {task.model.plain} take {budget:.0f} s '
        f'({budget / task.iterations:.3f} s each).'
    )
    return f'## {task.model.title}\n\n{about}\n\n{markdown(heads, lines)}\n'


def _iterations_to(run: Run, goal: float, metric: str) -> float | None:
    """Iterations until a run first has a score, between evaluations; None if it never has."""
    before = (0, 0.0)
    for step, _, value in run.scores.get(metric, []):
        if value >= goal:
            share = (goal - before[1]) / (value - before[1])
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


def write_records(results: Results, path: Path) -> None:
    """Writes the loss and every evaluation of all runs.

    `length` is the number of iterations of a run: it tells screening, whole and fitted runs apart.
    """
    heads = ('optimizer', 'lr', 'seed', 'length', 'quantity', 'iteration', 'seconds', 'value')
    runs = {
        (run.optimizer, run.lr, run.seed, run.length): run
        for part in (results.screened, results.whole, results.fitted)
        for group in part.values()
        for run in group
    }
    with path.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(heads)
        for (name, rate, seed, length), run in runs.items():
            pace = results.paces.get(name)
            about = (name, f'{rate:g}', seed, length)
            for quantity, points in {'loss': run.losses[-1:], **run.scores}.items():
                for step, _, value in points:
                    seconds = f'{pace.until(step):.1f}' if pace else ''
                    writer.writerow((*about, quantity, step, seconds, f'{value:.5g}'))


def recorded_rates(path: Path) -> dict[str, float]:
    """Best rate of every optimizer: that of its runs on more seeds than the screening's."""
    if not path.is_file():
        sys.exit(f'there is no record {path}; make one by --suite full --tasks {path.stem}')
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if int(row['seed']) > 0]
    return {row['optimizer']: float(row['lr']) for row in rows}


def _draw(results: Results, path: Path) -> None:
    """Plots the mean score of the fitted runs against seconds; lines of other packages are dashed.

    The axis begins at `SHOWN` of the best score. Two pictures fit into the width of a page.
    """
    from matplotlib.figure import Figure

    metric, model = results.task.model.headline, results.task.model
    figure = Figure(figsize=(4.8, 4.8), layout='constrained')
    axes = figure.subplots()
    finals = results.means
    lowest = SHOWN * max(finals.values())
    for name, runs in results.fitted.items():
        if finals[name] < lowest:
            continue
        points = [run.scores.get(metric, []) for run in runs]
        steps = [step for step, _, _ in points[0]]
        values = [
            mean(series[k][2] for series in points if k < len(series)) for k in range(len(steps))
        ]
        style = '--' if name in EXTERNAL else '-'
        package, _, short = name.rpartition('.')
        label = f'{short} ({package})' if package else short
        seconds = [results.paces[name].until(step) for step in steps]
        axes.plot(seconds, values, style, color=COLORS[short], marker='.', label=label)
    axes.set(xlabel='seconds of training', ylabel=model.metrics[metric], title=model.title)
    axes.set_ylim(bottom=lowest)
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2, fontsize=9)
    figure.savefig(path, dpi=200)


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
    """Writes the report of some tasks, and returns it."""
    text = '\n'.join(map(report, done))
    (folder / 'report.md').write_text(text)
    return text
