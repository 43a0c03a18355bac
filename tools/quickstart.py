"""Trains one small model with several optimizers on shapes or digits and compares them.

All runs of a seed start from the same weights and see the same images in the same order. Only the
optimizer differs. The output is a table, and a picture of loss and score against iterations and
seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from common import WORK
from common.contestants import MODELS, Model
from common.tables import markdown, spread
from common.training import Run, RunError, add_options, length, train


def by_label(runs: list[Run]) -> dict[str, list[Run]]:
    """Groups runs by optimizer and learning rate; a group has one run per seed."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def table(runs: list[Run], metrics: dict[str, str]) -> str:
    """Comparison as a Markdown table: means over seeds, with their range."""
    titles = ['optimizer', 'lr', *metrics.values(), 'final loss', 's / iteration', 'peak MB']
    lines = []
    for group in by_label(runs).values():
        columns: list[tuple[Callable[[Run], float], str]] = [
            *((lambda run, m=metric: run.score(m), '.3f') for metric in metrics),
            (lambda run: run.losses[-1][2], '.3f'),
            (lambda run: run.seconds / run.iterations, '.2f'),
            (lambda run: run.memory, '.0f'),
        ]
        cells = [spread([read(run) for run in group], form) for read, form in columns]
        lines.append([group[0].optimizer, f'{group[0].lr:g}', *cells])
    return markdown(titles, lines)


def verdict(runs: list[Run], model: Model) -> str:
    """Sentences that compare our optimizers with the plain one."""
    groups, plain, what_counts = by_label(runs), model.plain, model.metrics[model.headline]
    score = {
        label: mean(run.score(model.headline) for run in group) for label, group in groups.items()
    }
    seconds = {label: mean(run.seconds for run in group) for label, group in groups.items()}
    plains = [
        label for label, group in groups.items() if group[0].optimizer == plain and score[label] > 0
    ]
    lines = []
    for label, group in groups.items():
        if group[0].optimizer == plain or not plains:
            continue
        compared = [
            (other, 'the same rate') for other in plains if groups[other][0].lr == group[0].lr
        ]
        compared.append((max(plains, key=lambda other: score[other]), 'its best rate'))
        for other, rate_kind in compared:
            lines.append(
                f'{label}: {score[label] / score[other]:.2f} x the {what_counts} of '
                f'{plain} with {rate_kind} (lr {groups[other][0].lr:g}), at '
                f'{seconds[label] / seconds[other]:.2f} x its training time'
            )
    return '\n'.join(lines)


def draw(runs: list[Run], model: Model, path: Path) -> None:
    """Plots loss and scores against iterations and seconds; thin lines are single seeds."""
    from matplotlib.figure import Figure

    metrics = {key: title for key, title in model.metrics.items() if not key.endswith('_50')}
    rows = len(metrics) + 1
    figure = Figure(figsize=(10, 3.5 * rows), layout='constrained')
    axes = figure.subplots(rows, 2)
    for number, group in enumerate(by_label(runs).values()):
        for seed, run in enumerate(group):
            style = dict(
                label=run.label if seed == 0 else None,
                marker='.',
                color=f'C{number}',
                linewidth=1.5 if len(group) == 1 else 0.8,
                linestyle='--' if run.optimizer == model.plain else '-',
            )
            for column in (0, 1):
                axes[0, column].plot(
                    [x[column] for x in run.losses], [x[2] for x in run.losses], **style
                )
                for row, metric in enumerate(metrics, 1):
                    points = run.scores.get(metric, [])
                    axes[row, column].plot(
                        [x[column] for x in points], [x[2] for x in points], **style
                    )
    for column, unit in enumerate(('iterations', 'seconds of training')):
        for row, quantity in enumerate(('loss', *metrics.values())):
            axes[row, column].set(xlabel=unit, ylabel=quantity)
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(f'{model.title}, random weights')
    figure.savefig(path, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--model',
        choices=list(MODELS),
        default='r18',
        help='r18: Faster R-CNN with SGD and NKFAC; swin: a Swin Mask R-CNN with '
        'AdamW, AdaAFOpt and two hybrids; retinanet: a small Swin RetinaNet '
        'with SGD and AFOpt+NKFAC; resnet-cls: a ResNet-18 classifier '
        'with SGD and NKFAC; swin-cls: a small Swin classifier with AdamW, '
        'AdaAFOpt and two hybrids; digits, digits-cls: the detector at half width '
        'and the ResNet-18 classifier on handwritten digits, with SGD and NKFAC; '
        'default: %(default)s',
    )
    parser.add_argument(
        '--optimizers',
        help='names, separated by commas: ours, SGD, AdamW, AFOpt+NKFAC (the plain optimizer with '
        'curvature), or pytorch_optimizer.NAME of that package, if it is installed',
    )
    parser.add_argument('--lr', type=float, help='of every run')
    parser.add_argument('--grid', help="further rates for the plain optimizer, '' for none")
    parser.add_argument('--iterations', type=int)
    parser.add_argument('--val-interval', type=int, help='default: a quarter of --iterations')
    parser.add_argument(
        '--images', type=int, default=400, help='for training; a quarter more for validation'
    )
    parser.add_argument(
        '--seeds',
        type=lambda text: [int(k) for k in text.split(',')],
        default=[0],
        help='separated by commas; default: 0',
    )
    parser.add_argument(
        '--data', type=Path, help="default: data/ with the name of the model's data"
    )
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/quickstart_MODEL')
    parser.add_argument('--parse-only', action='store_true', help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args()
    args.work_dir = args.work_dir or WORK / f'work_dirs/quickstart_{args.model}'
    args.model = MODELS[args.model]
    args.data = args.data or WORK / 'data' / args.model.data
    args.optimizers = args.optimizers or ','.join(args.model.contestants)
    args.grid = args.model.grid if args.grid is None else args.grid
    args.iterations = length(args, parser)
    args.val_interval = args.val_interval or max(1, args.iterations // 4)
    args.data, args.work_dir = args.data.resolve(), args.work_dir.resolve()
    return args


def main() -> None:
    args = parse_args()
    if args.parse_only:  # by quickstart.sh, which has no environment yet
        return
    args.model.make_data(args.data, args.images)
    rates = [
        (name, args.model.contestant(name).lr if args.lr is None else args.lr)
        for name in args.optimizers.split(',')
    ]
    rates += [(args.model.plain, float(lr)) for lr in args.grid.split(',') if lr]
    runs = [Run(name, lr, seed) for seed in args.seeds for name, lr in rates]
    try:
        for run in runs:
            train(run, args)
    except RunError as error:
        sys.exit(str(error))
    (args.work_dir / 'results.json').write_text(json.dumps([asdict(run) for run in runs], indent=1))
    picture = args.work_dir / 'quickstart.png'
    draw(runs, args.model, picture)
    text = f'{table(runs, args.model.metrics)}\n\n{verdict(runs, args.model)}'
    (args.work_dir / 'table.md').write_text(text + '\n')
    print(
        f'\n{text}\n\nTraining time leaves out validation and start-up. In '
        f'{os.path.relpath(args.work_dir)}: table.md, {picture.name}, results.json, and a folder '
        'of logs and checkpoints for each run.'
    )


if __name__ == '__main__':
    main()
