"""Compares all optimizers on one small model: rates from one grid, several seeds.

Each optimizer is trained on the first seed with every rate of its grid (for optimizers like SGD, or
like Adam). It is then trained on the other seeds with the rate that had the best final score.
Finished runs are kept in the work folder. A second call continues a stopped one, and a call with
more optimizers adds them to the table. Other data or settings need another folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import WORK
from common.contestants import MODELS, Model
from common.pace import Pace
from common.suite import TASKS
from common.tables import markdown, spread
from common.training import Run, RunError, add_options, command, length, train
from common.turns import TURN_SCRIPT, take_turns

ANY = (
    'SGD',
    'AdamW',
    'SGDPH',
    'NKFAC',
    'AdaNKFAC',
    'FSGD',
    'FAdam',
    'KFAC',
    'SKFAC',
    'SGDMBK',
    'AdamWBK',
    'AdamR',
    'MAC',
    'SMAC',
    'AdaAct',
    'NysAct',
    'SOAA',
    'AdaFisher',
    'AdaFisherW',
    'ARO',
    'DCTAdamW',
    'SOAP',
    'Shampoo',
)
ATTENTION = ('AFOpt', 'AdaAFOpt')
#: Time-budget baseline: scores are compared at its training time.
PACE = 'SGD'
#: Rounds of the timing, and processes that take turns in one; each has about 1 GB of memory.
ROUNDS, MOST_AT_ONCE = 2, 12


def grid_runs(name: str, args: argparse.Namespace) -> list[Run]:
    """Runs of one optimizer on the first seed, one for each rate of its grid."""
    adaptive = args.model.contestant(name).adaptive
    rates = args.adam_rates if adaptive else args.sgd_rates
    return [train_or_load(Run(name, rate, args.seeds[0]), args) for rate in rates]


def best_rate(runs: list[Run], metric: str) -> float:
    """Rate of the run with the best final score; of equal ones the first."""
    return max(runs, key=lambda run: run.score(metric)).lr


def record_file(run: Run, iterations: int, folder: Path) -> Path:
    """File that a run of some iterations has in a work folder when it is finished."""
    name = f'{run.label} seed {run.seed}'.replace(' ', '_')
    return folder / f'{name}_{iterations}.json'


def train_or_load(run: Run, args: argparse.Namespace) -> Run:
    """Record of a run, from an earlier call or from a new training."""
    from mmprecond.datasets import writer  # help texts must come without an environment

    record = record_file(run, args.iterations, args.work_dir)
    if record.exists():
        return Run(**json.loads(record.read_text()))
    try:
        train(run, args)
    except RunError as error:
        if not diverged(str(error)):
            raise
        run.losses.append((args.iterations, run.seconds, float('nan')))
    writer.write_json(record, asdict(run))
    return run


def diverged(message: str) -> bool:
    """True if a run ended because it diverged, which is a result and no fault."""
    return re.search(r'RefreshError|non-finite|\b(nan|inf)\b', message, re.IGNORECASE) is not None


def measure_paces(rates: dict[str, float], args: argparse.Namespace) -> dict[str, Pace]:
    """Seconds against iterations of some optimizers, which take turns of one iteration.

    Each round has new processes, and the fastest counts. The rates are the best ones, because a
    detector that diverges has less work to do. What an earlier call measured with the same rates is
    kept.
    """
    from mmprecond.datasets import writer

    record = args.work_dir / 'turns.json'
    asked = dict(rates=rates, iterations=args.timed)
    known: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    rounds = known['rounds'] if known and known['asked'] == asked else []
    folder = args.work_dir / 'timing'
    changes = {'iterations': args.timed + 1, 'val_interval': 10**6, 'work_dir': folder}
    longer = argparse.Namespace(**{**vars(args), **changes})
    commands = {
        name: command(Run(name, rate, 0), longer, TURN_SCRIPT) for name, rate in rates.items()
    }
    while len(rounds) < ROUNDS:
        seconds: dict[str, list[float]] = {}
        for start in range(0, len(rates), MOST_AT_ONCE):
            names = list(rates)[start : start + MOST_AT_ONCE]
            seconds |= take_turns({name: commands[name] for name in names}, args.timed, folder)
        rounds.append(seconds)
        writer.write_json(record, dict(asked=asked, rounds=rounds))
    return {name: Pace.of([seconds[name] for seconds in rounds]) for name in rates}


def at(run: Run, iteration: float, metric: str) -> float:
    """Score of a run between two evaluations, by linear interpolation; 0 before training."""
    import numpy as np  # help texts must come without an environment

    points = run.scores.get(metric, [])
    steps, values = [step for step, _, _ in points], [value for _, _, value in points]
    return float(np.interp(iteration, [0, *steps], [0.0, *values]))


def table(
    tuned: dict[str, list[Run]],
    final: dict[str, list[Run]],
    seconds: dict[str, float],
    args: argparse.Namespace,
) -> str:
    """Comparison as Markdown: means over seeds with their range."""
    metric, end = args.model.headline, args.iterations
    titles = {key: title for key, title in args.model.metrics.items() if not key.endswith('_50')}
    title = titles[metric]
    heads = [
        'optimizer',
        'lr',
        *(f'{heading} after {end} iterations' for heading in titles.values()),
        'loss',
        f'time of {PACE}',
        f"{title} in {PACE}'s time",
        'MB',
        f'{title} of each rate, seed {args.seeds[0]}',
    ]
    lines = []
    form = '.1f' if metric.startswith('accuracy') else '.3f'
    for name, runs in final.items():
        ratio = seconds[name] / seconds[PACE] if {name, PACE} <= set(seconds) else float('nan')
        level = [at(run, min(end, end / ratio), metric) for run in runs] if ratio == ratio else []
        rates = ', '.join(f'{run.lr:g}: {run.score(metric):{form}}' for run in tuned[name])
        cells = [
            name,
            f'{runs[0].lr:g}',
            *(spread([run.score(key) for run in runs], form) for key in titles),
            spread([run.losses[-1][2] for run in runs], '.2f'),
            f'{ratio:.2f}',
            spread(level, form) if level else '-',
            f'{mean([run.memory for run in runs if run.memory] or [float("nan")]):.0f}',
            rates,
        ]
        lines.append(cells)
    return markdown(heads, lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', choices=list(MODELS), nargs='?', help='not with --suite')
    parser.add_argument(
        '--suite',
        choices=('quick', 'full', 'recorded'),
        help='compare optimizers on fixed tasks instead of one model (see suite.py); quick: one '
        'task and one seed, with recorded rates; full: five tasks and three seeds, many hours; a '
        'second call continues a stopped one; recorded: tables and pictures of recorded runs',
    )
    parser.add_argument(
        '--tasks',
        type=lambda text: text.split(','),
        default=[],
        help='of --suite full and recorded; default: all',
    )
    parser.add_argument(
        '--records',
        type=Path,
        metavar='FOLDER',
        help='CSV files of finished runs, by task; --suite full makes only the other runs; default '
        'of --suite recorded: docs/records',
    )
    parser.add_argument(
        '--optimizers',
        help='names, separated by commas; default: all that the model can be trained with',
    )
    parser.add_argument('--iterations', type=int, help="default: the model's in the quickstart")
    parser.add_argument('--evaluations', type=int, default=8)
    parser.add_argument('--images', type=int, default=2000)
    parser.add_argument(
        '--seeds', type=lambda text: [int(k) for k in text.split(',')], default=[0, 1, 2]
    )
    for kind, rates in (('sgd', '0.01,0.03,0.1,0.3'), ('adam', '1e-4,3e-4,1e-3,3e-3')):
        parser.add_argument(
            f'--{kind}-rates',
            default=[float(r) for r in rates.split(',')],
            type=lambda text: [float(r) for r in text.split(',')],
            help=f'default: {rates}',
        )
    parser.add_argument(
        '--timed',
        type=int,
        default=0,
        help='iterations in each of two rounds of timing, in turns, on an otherwise idle '
        'machine; default: 100 of --suite full, 60 of --suite quick, else none',
    )
    parser.add_argument(
        '--jobs', type=int, default=1, help='runs of --suite side by side; default: 1'
    )
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/results_MODEL')
    add_options(parser)
    args = parser.parse_args()
    if args.records and args.suite not in ('full', 'recorded'):
        parser.error('--records goes with --suite full or --suite recorded')
    if args.records and not args.records.is_dir():
        parser.error(f'--records: there is no folder {args.records}')
    unknown = ', '.join(name for name in args.tasks if name not in TASKS)
    if unknown:
        parser.error(f'--tasks: there is no {unknown}; choose from {", ".join(TASKS)}')
    if args.suite:
        return args
    if args.model is None:
        parser.error('give a model, or --suite quick')
    args.work_dir = (args.work_dir or WORK / f'work_dirs/results_{args.model}').resolve()
    args.data = WORK / f'data/results-{args.model}'
    args.model = MODELS[args.model]
    args.iterations = length(args, parser)
    args.val_interval = max(1, args.iterations // args.evaluations)
    args.optimizers = args.optimizers.split(',') if args.optimizers else usual(args.model)
    for name in args.optimizers:
        args.model.contestant(name)
    return args


def usual(model: Model) -> list[str]:
    """Names of all optimizers that can train a model."""
    names = [name for name in ANY if not (model.detects and name == 'SGDPH')]
    names += ATTENTION if 'Swin' in model.title else ()
    return [*names, *(name for name in model.contestants if name not in names)]


def main() -> None:
    args = parse_args()
    if args.suite:
        from analysis_tools import suite

        suite.main(args.suite, args.tasks, args)
        return
    args.model.make_data(args.data, args.images)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    tuned = {name: grid_runs(name, args) for name in args.optimizers}
    final = {}
    for name, runs in tuned.items():
        rate = best_rate(runs, args.model.headline)
        final[name] = [train_or_load(Run(name, rate, seed), args) for seed in args.seeds]
    rates = {name: runs[0].lr for name, runs in final.items()}
    paces = measure_paces(rates, args) if args.timed else {}
    seconds = {name: pace.mean for name, pace in paces.items()}
    text = table(tuned, final, seconds, args)
    (args.work_dir / 'table.md').write_text(text + '\n')
    print(text)


if __name__ == '__main__':
    main()
