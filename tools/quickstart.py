"""Trains one small detector with several optimizers on shapes and compares them.

Every run starts from the same weights and sees the same images in the same order; only the
optimizer differs. Ends with a table and a picture of loss and mAP against iterations and seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs/quickstart/faster-rcnn_r18_fpn_shapes.py'
#: What our optimizers get beside lr. The default intervals suit runs of 10,000 iterations and more.
#: With random weights and no warm-up the classifier's statistics age at once, and its operator from
#: the first batch diverged: it takes the plain rule.
CURVATURE = {'optim_wrapper.optimizer.stat_interval': 5,
             'optim_wrapper.optimizer.refresh_interval': 25,
             'optim_wrapper.paramwise_cfg.custom_keys.fc_cls.precondition': False}


@dataclass
class Run:
    """One training run and what its log says.

    Attributes:
        optimizer: SGD, or one of ours.
        lr: Learning rate.
        losses: (iteration, seconds of training so far, loss).
        scores: (iteration, seconds of training so far, mAP, mAP50).
        seconds: Training time alone: validation and start-up are left out.
        memory: Peak memory in MB: of the process, or on the GPU where there is one.
    """

    optimizer: str
    lr: float
    losses: list[tuple[int, float, float]] = field(default_factory=list)
    scores: list[tuple[int, float, float, float]] = field(default_factory=list)
    seconds: float = 0.
    memory: float = 0.

    @property
    def label(self) -> str:
        return f'{self.optimizer} lr {self.lr:g}'

    @property
    def iterations(self) -> int:
        return self.losses[-1][0]

    @property
    def score(self) -> tuple[float, float]:
        """mAP and mAP50 at the end; 0 where CocoMetric found no detection to rate."""
        at_end = bool(self.scores) and self.scores[-1][0] == self.iterations
        return self.scores[-1][2:] if at_end else (0., 0.)

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
            elif 'coco/bbox_mAP' in line:
                self.scores.append((last, self.seconds, line['coco/bbox_mAP'],
                                    line['coco/bbox_mAP_50']))


def train(run: Run, args: argparse.Namespace) -> None:
    """Trains one run in a process of its own and reads its log."""
    work_dir = args.work_dir / run.label.replace(' ', '_')
    options = dict(args.options or [])
    options |= {
        'train_cfg.max_iters': args.iterations, 'train_cfg.val_interval': args.val_interval,
        'default_hooks.checkpoint.interval': args.iterations, 'randomness.seed': args.seed,
        'optim_wrapper.optimizer.lr': run.lr, 'train_dataloader.dataset.data_root': f'{args.data}/',
        'val_dataloader.dataset.data_root': f'{args.data}/',
        'val_evaluator.ann_file': f'{args.data}/annotations/val.json'}
    command = [sys.executable, 'tools/train.py', str(CONFIG), '--work-dir', str(work_dir)]
    if run.optimizer != 'SGD':
        command += ['--optimizer', run.optimizer]
        options |= CURVATURE
    command += ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / 'output.log'
    started = time.time()
    with log.open('w') as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                                   stdin=subprocess.DEVNULL)
        usage = watch(process, work_dir, started, run.label, args.iterations)
    if process.returncode:
        tail = ''.join(log.read_text().splitlines(keepends=True)[-15:])
        sys.exit(f'{run.label} failed; the end of {log}:\n{tail}')
    run.read(scalars(work_dir, started))
    run.memory = run.memory or usage


def watch(process: subprocess.Popen[bytes], work_dir: Path, started: float, label: str,
          iterations: int) -> float:
    """Shows a run's progress until it ends; returns the process's peak memory in MB."""
    with tqdm(total=iterations, desc=label.ljust(16), unit='it', mininterval=5.) as bar:
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


def table(runs: list[Run]) -> str:
    """The comparison as a Markdown table."""
    lines = ['| optimizer | lr | mAP | mAP50 | final loss | s / iteration | training s | peak MB |',
             '|---|---|---|---|---|---|---|---|']
    for run in runs:
        loss = f'{run.losses[-1][2]:.3f}'.replace('nan', 'diverged')
        pace = run.seconds / run.iterations
        lines.append(f'| {run.optimizer} | {run.lr:g} | {run.score[0]:.3f} | {run.score[1]:.3f} '
                     f'| {loss} | {pace:.2f} | {run.seconds:.0f} | {run.memory:.0f} |')
    return '\n'.join(lines)


def verdict(runs: list[Run]) -> str:
    """What the table says of our optimizers against SGD."""
    plain = [run for run in runs if run.optimizer == 'SGD' and run.score[0] > 0]
    lines = []
    for run in runs:
        if run.optimizer == 'SGD' or not plain:
            continue
        same = [other for other in plain if other.lr == run.lr]
        best = max(plain, key=lambda other: other.score)
        for other, what in [(same[0], 'the same rate')] * bool(same) + [(best, 'its best rate')]:
            lines.append(f'{run.label}: {run.score[0] / other.score[0]:.2f} x the mAP of SGD with '
                         f'{what} (lr {other.lr:g}), at {run.seconds / other.seconds:.2f} x its '
                         'training time')
    return '\n'.join(lines)


def draw(runs: list[Run], path: Path) -> None:
    """Loss and mAP against iterations and against seconds of training."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for run in runs:
        style = dict(label=run.label, marker='.', linestyle='--' if run.optimizer == 'SGD' else '-')
        for column in (0, 1):
            axes[0, column].plot([x[column] for x in run.losses], [x[2] for x in run.losses],
                                 **style)
            axes[1, column].plot([x[column] for x in run.scores], [x[2] for x in run.scores],
                                 **style)
    for column, unit in enumerate(('iterations', 'seconds of training')):
        for row, quantity in enumerate(('loss', 'box mAP')):
            axes[row, column].set(xlabel=unit, ylabel=quantity)
            axes[row, column].grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle('Faster R-CNN R18-FPN on shapes, random weights')
    figure.savefig(path, dpi=110)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--optimizers', default='SGD,NKFAC', help='default: %(default)s')
    parser.add_argument('--lr', type=float, default=0.02, help='of every run; default: %(default)s')
    parser.add_argument('--sgd-grid', default='0.01,0.04',
                        help="further rates for SGD, '' for none; default: %(default)s")
    parser.add_argument('--iterations', type=int, default=100)
    parser.add_argument('--val-interval', type=int, default=25)
    parser.add_argument('--images', type=int, default=400, help='for training; a quarter more for '
                        'validation')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--data', type=Path, default=ROOT / 'data/shapes')
    parser.add_argument('--work-dir', type=Path, default=ROOT / 'work_dirs/quickstart')
    parser.add_argument('--options', nargs='+', metavar='KEY=VALUE', default=[],
                        type=lambda text: tuple(text.split('=', 1)),
                        help='settings of every run, as for --cfg-options of tools/train.py')
    args = parser.parse_args()
    args.data, args.work_dir = args.data.resolve(), args.work_dir.resolve()
    return args


def main() -> None:
    args = parse_args()
    from mmprecond.datasets import make_shapes

    make_shapes(args.data, images=args.images, split='train')
    make_shapes(args.data, images=max(1, args.images // 4), split='val')
    runs = [Run(name, args.lr) for name in args.optimizers.split(',')]
    runs += [Run('SGD', float(lr)) for lr in args.sgd_grid.split(',') if lr]
    for run in runs:
        train(run, args)
    (args.work_dir / 'results.json').write_text(json.dumps([vars(run) for run in runs], indent=1))
    picture = args.work_dir / 'quickstart.png'
    draw(runs, picture)
    text = f'{table(runs)}\n\n{verdict(runs)}'
    (args.work_dir / 'table.md').write_text(text + '\n')
    print(f'\n{text}\n\nTraining time leaves out validation and start-up. In '
          f'{os.path.relpath(args.work_dir)}: table.md, {picture.name}, results.json, and a folder '
          'of logs and checkpoints for each run.')


if __name__ == '__main__':
    main()
