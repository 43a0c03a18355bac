"""Trains one small model with several optimizers on shapes and compares them.

Every run of a seed starts from the same weights and sees the same images in the same order; only
the optimizer differs. Ends with a table and a picture of loss and score against iterations and
seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from tqdm import tqdm

from common.contestants import FOLDER, MODELS, ROOT, Model


@dataclass
class Run:
    """One training run and what its log says.

    Attributes:
        optimizer: The optimizer's name.
        lr: Learning rate.
        seed: Of weights and data order.
        losses: (iteration, seconds of training so far, loss).
        scores: (iteration, seconds of training so far, metrics by their names in the log).
        seconds: Training time alone: validation and start-up are left out.
        memory: Peak memory in MB: of the process, or on the GPU where there is one.
    """

    optimizer: str
    lr: float
    seed: int
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    scores: list[tuple[int, float, dict[str, float]]] = field(default_factory=list)
    seconds: float = 0.
    memory: float = 0.

    @property
    def label(self) -> str:
        return f'{self.optimizer} lr {self.lr:g}'

    @property
    def iterations(self) -> int:
        return self.losses[-1][0]

    def score(self, metric: str) -> float:
        """A metric at the end; 0 where CocoMetric found no detection to rate."""
        at_end = bool(self.scores) and self.scores[-1][0] == self.iterations
        return self.scores[-1][2].get(metric, 0.) if at_end else 0.

    def read(self, lines: list[dict[str, float]]) -> None:
        """Takes the entries of MMEngine's scalars.json."""
        last = 0
        for line in lines:
            if 'loss' in line:
                iteration = int(line['step'])
                self.seconds += line['time'] * (iteration - last)
                last = iteration
                self.losses.append((iteration, self.seconds, line['loss']))
                self.memory = max(self.memory, line.get('memory', 0))
            elif any('/' in key for key in line):
                metrics = {key: value for key, value in line.items() if '/' in key}
                self.scores.append((last, self.seconds, metrics))


class RunError(RuntimeError):
    """A run that ended early; its text is the end of its log."""


def train(run: Run, args: argparse.Namespace) -> None:
    """Trains one run in a process of its own and reads its log.

    Raises:
        RunError: If it failed.
    """
    work_dir = args.work_dir / f'{run.label.replace(" ", "_")}_seed_{run.seed}'
    contestant = args.model.contestant(run.optimizer)
    options = dict(args.options or [])
    options |= {
        'train_cfg.max_iters': args.iterations, 'train_cfg.val_interval': args.val_interval,
        'default_hooks.checkpoint.interval': args.iterations, 'randomness.seed': run.seed,
        contestant.rate: run.lr, 'train_dataloader.dataset.data_root': f'{args.data}/',
        'val_dataloader.dataset.data_root': f'{args.data}/', **contestant.options}
    if args.model.detects:
        options['val_evaluator.ann_file'] = f'{args.data}/annotations/val.json'
    command = [sys.executable, 'tools/train.py', str(FOLDER / f'{contestant.config}.py'),
               '--work-dir', str(work_dir), *contestant.arguments]
    command += ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / 'output.log'
    started = time.time()
    with log.open('w') as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL)
        usage = watch(process, work_dir, started, f'{run.label} seed {run.seed}', args.iterations)
    if process.returncode:
        tail = ''.join(log.read_text().splitlines(keepends=True)[-15:])
        raise RunError(f'{run.label} failed; the end of {log}:\n{tail}')
    run.read(scalars(work_dir, started))
    run.memory = run.memory or usage


def watch(process: subprocess.Popen[bytes], work_dir: Path, started: float, label: str,
          iterations: int) -> float:
    """Shows a run's progress until it ends; returns the process's peak memory in MB."""
    with tqdm(total=iterations, desc=label.ljust(24), unit='it', mininterval=5.) as bar:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            done = max((int(line['step']) for line in scalars(work_dir, started)
                        if 'loss' in line), default=0)
            bar.update(done - bar.n)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return usage.ru_maxrss / 1024
            time.sleep(1)


def scalars(work_dir: Path, started: float) -> list[dict[str, float]]:
    """The entries of the log that a run has written since it started."""
    files = [f for f in sorted(work_dir.glob('*/vis_data/scalars.json'))
             if f.stat().st_mtime >= started - 1]
    return [json.loads(line) for f in files[-1:] for line in f.read_text().splitlines()
            if line.endswith('}')]


def by_label(runs: list[Run]) -> dict[str, list[Run]]:
    """The seeds of each optimizer and rate."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def spread(values: list[float], form: str) -> str:
    """Mean, and the range where there is one."""
    text = f'{mean(values):{form}}'
    if len(values) > 1:
        text += f' ({min(values):{form}}-{max(values):{form}})'
    return text.replace('nan', 'diverged')


def table(runs: list[Run], metrics: dict[str, str]) -> str:
    """The comparison as a Markdown table: means over seeds, with their range."""
    titles = ['optimizer', 'lr', *metrics.values(), 'final loss', 's / iteration', 'peak MB']
    lines = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
    for group in by_label(runs).values():
        columns: list[tuple[Callable[[Run], float], str]] = [
            *((lambda run, m=metric: run.score(m), '.3f') for metric in metrics),
            (lambda run: run.losses[-1][2], '.3f'),
            (lambda run: run.seconds / run.iterations, '.2f'),
            (lambda run: run.memory, '.0f')]
        cells = [spread([read(run) for run in group], form) for read, form in columns]
        lines.append(f'| {group[0].optimizer} | {group[0].lr:g} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def verdict(runs: list[Run], model: Model) -> str:
    """Sentences on our optimizers against the plain one."""
    groups, plain, what_counts = by_label(runs), model.plain, model.metrics[model.headline]
    score = {label: mean(run.score(model.headline) for run in group)
             for label, group in groups.items()}
    seconds = {label: mean(run.seconds for run in group) for label, group in groups.items()}
    plains = [label for label, group in groups.items()
              if group[0].optimizer == plain and score[label] > 0]
    lines = []
    for label, group in groups.items():
        if group[0].optimizer == plain or not plains:
            continue
        compared = [(other, 'the same rate') for other in plains
                    if groups[other][0].lr == group[0].lr]
        compared.append((max(plains, key=lambda other: score[other]), 'its best rate'))
        for other, what in compared:
            lines.append(f'{label}: {score[label] / score[other]:.2f} x the {what_counts} of '
                         f'{plain} with {what} (lr {groups[other][0].lr:g}), at '
                         f'{seconds[label] / seconds[other]:.2f} x its training time')
    return '\n'.join(lines)


def draw(runs: list[Run], model: Model, path: Path) -> None:
    """Loss and APs against iterations and against seconds of training; thin lines are seeds."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    metrics = {key: title for key, title in model.metrics.items() if not key.endswith('_50')}
    rows = len(metrics) + 1
    figure, axes = plt.subplots(rows, 2, figsize=(10, 3.5 * rows), constrained_layout=True)
    for number, group in enumerate(by_label(runs).values()):
        for seed, run in enumerate(group):
            style = dict(label=run.label if seed == 0 else None, marker='.', color=f'C{number}',
                         linewidth=1.5 if len(group) == 1 else 0.8,
                         linestyle='--' if run.optimizer == model.plain else '-')
            for column in (0, 1):
                axes[0, column].plot([x[column] for x in run.losses], [x[2] for x in run.losses],
                                     **style)
                for row, metric in enumerate(metrics, 1):
                    axes[row, column].plot([x[column] for x in run.scores],
                                           [x[2].get(metric, 0.) for x in run.scores], **style)
    for column, unit in enumerate(('iterations', 'seconds of training')):
        for row, quantity in enumerate(('loss', *metrics.values())):
            axes[row, column].set(xlabel=unit, ylabel=quantity)
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(f'{model.title} on shapes, random weights')
    figure.savefig(path, dpi=110)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--options', nargs='+', metavar='KEY=VALUE', default=[],
                        type=lambda text: tuple(text.split('=', 1)),
                        help='settings of every run, as for --cfg-options of tools/train.py')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', choices=list(MODELS), default='r18',
                        help='r18: Faster R-CNN with SGD and NKFAC; swin: a Swin Mask R-CNN with '
                             'AdamW, AdaAFOpt and two hybrids; retinanet: a small Swin RetinaNet '
                             'with SGD and AFOpt+NKFAC; resnet-cls: a ResNet-18 classifier '
                             'with SGD and NKFAC; swin-cls: a small Swin classifier with AdamW, '
                             'AdaAFOpt and two hybrids; default: %(default)s')
    parser.add_argument('--optimizers', help='names, separated by commas: ours, SGD, '
                        'AdamW, or pytorch_optimizer.NAME of that package, if it is installed')
    parser.add_argument('--lr', type=float, help='of every run')
    parser.add_argument('--grid', help="further rates for the plain optimizer, '' for none")
    parser.add_argument('--iterations', type=int)
    parser.add_argument('--val-interval', type=int, help='default: a quarter of --iterations')
    parser.add_argument('--images', type=int, default=400, help='for training; a quarter more for '
                        'validation')
    parser.add_argument('--seeds', type=lambda text: [int(k) for k in text.split(',')], default=[0],
                        help='separated by commas; default: 0')
    parser.add_argument('--data', type=Path, help='default: data/shapes, or data/shapes-cls')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/quickstart_MODEL')
    add_options(parser)
    args = parser.parse_args()
    args.work_dir = args.work_dir or ROOT / f'work_dirs/quickstart_{args.model}'
    args.model = MODELS[args.model]
    args.data = args.data or ROOT / 'data' / args.model.data
    args.optimizers = args.optimizers or ','.join(args.model.contestants)
    args.grid = args.model.grid if args.grid is None else args.grid
    args.iterations = args.iterations or args.model.iterations
    args.val_interval = args.val_interval or max(1, args.iterations // 4)
    args.data, args.work_dir = args.data.resolve(), args.work_dir.resolve()
    return args


def main() -> None:
    args = parse_args()
    from mmprecond.datasets import make_shape_folders, make_shapes

    make = make_shapes if args.model.detects else make_shape_folders
    make(args.data, images=args.images, split='train')
    make(args.data, images=max(4, args.images // 4), split='val')
    rates = [(name, args.lr or args.model.contestant(name).lr)
             for name in args.optimizers.split(',')]
    rates += [(args.model.plain, float(lr)) for lr in args.grid.split(',') if lr]
    runs = [Run(name, lr, seed) for seed in args.seeds for name, lr in rates]
    try:
        for run in runs:
            train(run, args)
    except RunError as error:
        sys.exit(str(error))
    (args.work_dir / 'results.json').write_text(json.dumps([asdict(run) for run in runs],
                                                           indent=1))
    picture = args.work_dir / 'quickstart.png'
    draw(runs, args.model, picture)
    text = f'{table(runs, args.model.metrics)}\n\n{verdict(runs, args.model)}'
    (args.work_dir / 'table.md').write_text(text + '\n')
    print(f'\n{text}\n\nTraining time leaves out validation and start-up. In '
          f'{os.path.relpath(args.work_dir)}: table.md, {picture.name}, results.json, and a folder '
          'of logs and checkpoints for each run.')


if __name__ == '__main__':
    main()
