"""Report of the suite: runs of a task, their table and picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from common.pace import Pace
from common.suite import EXTERNAL, FIRST_ORDER, Task
from common.tables import markdown, spread
from common.training import Run

#: Lowest score of a picture, as a part of the best one.
SHOWN = 1 / 3
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

    @property
    def ranking(self) -> list[str]:
        """Optimizers, the best mean score first."""
        means = self.means
        return sorted(means, key=lambda name: -means[name])

    @property
    def best_first_order(self) -> str:
        """The better one of SGD and AdamW."""
        return next(name for name in self.ranking if name in FIRST_ORDER)

    @property
    def form(self) -> str:
        """Format of a score."""
        return '.1f' if self.task.model.headline.startswith('accuracy') else '.3f'

    def score(self, runs: list[Run]) -> str:
        """Mean and range of the final scores of some runs."""
        scores = [run.score(self.task.model.headline) for run in runs]
        return spread(scores, self.form) if scores else '-'

    def losses(self, name: str) -> list[float]:
        """Final losses of an optimizer's fitted runs."""
        return [run.losses[-1][2] for run in self.fitted[name]]

    def memory(self, name: str) -> str:
        """Mean peak memory of an optimizer's fitted runs in MB; '-' if it is not known."""
        known = [run.memory for run in self.fitted[name] if run.memory]
        return f'{mean(known):.0f}' if known else '-'

    def price(self, name: str) -> float:
        """Seconds of an iteration of an optimizer, with those of the plain one as the unit."""
        return self.task.iterations / self.paces[name].reach(self.budget)

    def time(self, name: str) -> str:
        """Part of the seconds until the best first-order score; '-' if a run never reaches it."""
        goal, metric = self.means[self.best_first_order], self.task.model.headline
        reached = [_iterations_to(run, goal, metric) for run in self.fitted[name]]
        found = [step for step in reached if step]
        if len(found) < len(reached):
            return '-'
        return f'{mean(map(self.paces[name].until, found)) / self.budget:.2f}'


def report(results: Results) -> str:
    """Part of the report for a task: means over seeds with ranges."""
    task, budget = results.task, results.budget
    metric, title = task.model.headline, task.model.metrics[task.model.headline]
    lines = [
        (
            name,
            f'{results.fitted[name][0].lr:g}',
            results.score(results.fitted[name]),
            spread(results.losses(name), '.3f'),
            results.score(results.whole.get(name, [])),
            results.time(name),
            f'{results.price(name):.2f}',
            results.memory(name),
            ', '.join(
                f'{run.lr:g}: {run.score(metric):{results.form}}'
                for run in results.screened.get(name, [])
            ),
        )
        for name in results.ranking
    ]
    heads = (
        'optimizer',
        'lr',
        f'{title} in {budget:.0f} s',
        'loss',
        f'{title} after {task.iterations} iterations',
        f"time to {results.best_first_order}'s score",
        'price',
        'MB',
        f'{title} of each rate in the screening',
    )
    about = (
        f'{task.iterations} iterations of {task.model.plain} take {budget:.0f} s '
        f'({budget / task.iterations:.3f} s each).'
    )
    return f'## {task.model.title}\n\n{about}\n\n{markdown(heads, lines)}\n'


def overview(done: Sequence[Results]) -> str:
    """Tables of all tasks, a column each: scores in equal seconds, prices, losses.

    Scores in equal iterations follow, of the tasks that have them. Optimizers of this package are
    in bold.
    """
    tables: dict[str, Callable[[Results, str], str]] = {
        'Score in equal seconds': lambda results, name: results.score(results.fitted[name]),
        'Price of an iteration, and time to the best first-order score': (
            lambda results, name: f'{results.price(name):.2f}, {results.time(name)}'
        ),
        'Loss, and rate': (
            lambda results, name: (
                f'{mean(results.losses(name)):.3f} at {results.fitted[name][0].lr:g}'
            )
        ),
    }
    parts = [_table(title, done, cell) for title, cell in tables.items()]
    if whole := [results for results in done if results.whole]:
        parts.append(
            _table(
                'Score in equal iterations',
                whole,
                lambda results, name: results.score(results.whole[name]),
            )
        )
    return '\n'.join(parts)


def _table(title: str, done: Sequence[Results], cell: Callable[[Results, str], str]) -> str:
    """A heading, and a table with a row for each optimizer and a column for each task."""
    names = dict.fromkeys(name for results in done for name in results.ranking)
    heads = ('optimizer', *(results.task.model.title for results in done))
    rows = [
        (
            label(name) if name in EXTERNAL else f'**{label(name)}**',
            *(cell(results, name) if name in results.fitted else '' for results in done),
        )
        for name in names
    ]
    return f'## {title}\n\n{markdown(heads, rows)}\n'


def label(name: str) -> str:
    """Name of an optimizer in a table or picture, with that of another package."""
    package, _, short = name.rpartition('.')
    return f'{short} ({package})' if package else short


def _iterations_to(run: Run, goal: float, metric: str) -> float | None:
    """Iterations until a run first has a score, between evaluations; None if it never has."""
    before = (0, 0.0)
    for step, _, value in run.scores.get(metric, []):
        if value >= goal:
            share = (goal - before[1]) / (value - before[1])
            return before[0] + share * (step - before[0])
        before = (step, value)
    return None


def draw(results: Results, path: Path) -> None:
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
        color = COLORS[name.rpartition('.')[2]]
        seconds = [results.paces[name].until(step) for step in steps]
        axes.plot(seconds, values, style, color=color, marker='.', label=label(name))
    axes.set(xlabel='seconds of training', ylabel=model.metrics[metric], title=model.title)
    axes.set_ylim(bottom=lowest)
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2, fontsize=9)
    figure.savefig(path, dpi=200)
