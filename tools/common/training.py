"""Runs of tools/train.py on the shapes, each in its own process."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import ROOT, WORK
from .contestants import FOLDER, RATE
from .logs import Curves, entries, log_files


@dataclass
class Run(Curves):
    """One training run and its log.

    Attributes:
        optimizer: Name of the optimizer.
        lr: Learning rate.
        seed: Seed of weights and data order.
        losses, scores: See `Curves`.
        memory: Peak memory in MB, of the GPU if there is one, else of the process.
    """

    optimizer: str
    lr: float
    seed: int

    @property
    def label(self) -> str:
        """Optimizer and rate."""
        return f'{self.optimizer} lr {self.lr:g}'

    @property
    def length(self) -> int:
        """Iterations up to the last line of the log, or an evaluation after it."""
        return max([self.iterations, *(points[-1][0] for points in self.scores.values())])

    def score(self, metric: str) -> float:
        """Returns a metric at the end; 0 where CocoMetric found no detection to rate."""
        points = self.scores.get(metric)
        return points[-1][2] if points and points[-1][0] >= self.iterations else 0.0


#: Environment of a training. Memory that is freed stays with the process: to return it to the
#: system and take it again costs from 0 to a fifth of an iteration, by chance of the heap's layout.
ENVIRONMENT = {
    **os.environ,
    'MALLOC_MMAP_MAX_': '0',
    'MALLOC_TRIM_THRESHOLD_': str(2**40),
}


#: Iterations between two lines of a log; lengths of the suite are multiples, so that their end is
#: in the log.
LOGGED = 10
#: Settings that a comparison gives, and by what.
FIXED = {
    'train_cfg.max_iters': '--iterations',
    'train_cfg.val_interval': 'the number of evaluations',
    'default_hooks.checkpoint.interval': '--iterations',
    'randomness.seed': '--seeds',
    RATE: 'the rates',
    'train_dataloader.dataset.data_root': 'the data set',
    'val_dataloader.dataset.data_root': 'the data set',
    'val_evaluator.ann_file': 'the data set',
}


class RunError(RuntimeError):
    """A run ended early; the text is the end of its log."""


def tail(log: Path) -> str:
    """Last lines of a log."""
    return ''.join(log.read_text().splitlines(keepends=True)[-15:])


def _folder(run: Run, args: argparse.Namespace) -> Path:
    return Path(args.work_dir) / f'{run.label.replace(" ", "_")}_seed_{run.seed}'


def command(run: Run, args: argparse.Namespace, script: str | None = None) -> list[str]:
    """Command of one run, by default with the contestant's own script."""
    contestant = args.model.contestant(run.optimizer)
    options = {
        **contestant.options,
        **dict(args.options or []),
        'train_cfg.max_iters': args.iterations,
        'train_cfg.val_interval': args.val_interval,
        'default_hooks.checkpoint.interval': args.iterations,
        'randomness.seed': run.seed,
        RATE: run.lr,
        'train_dataloader.dataset.data_root': f'{args.data}/',
        'val_dataloader.dataset.data_root': f'{args.data}/',
    }
    if args.model.detects:
        options['val_evaluator.ann_file'] = f'{args.data}/annotations/val.json'
    return [
        sys.executable,
        str(ROOT / 'tools' / (script or contestant.script)),
        str(FOLDER / f'{contestant.config}.py'),
        '--work-dir',
        str(_folder(run, args)),
        *contestant.arguments,
        '--cfg-options',
        *(f'{key}={value}' for key, value in options.items()),
    ]


def train(run: Run, args: argparse.Namespace) -> None:
    """Trains one run in its own process and reads its log.

    Raises:
        RunError: If the run failed.
    """
    work_dir = _folder(run, args)
    work_dir.mkdir(parents=True, exist_ok=True)
    log = work_dir / 'output.log'
    started = time.time()
    with log.open('w') as output:
        process = subprocess.Popen(
            command(run, args),
            cwd=WORK,
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        usage = watch(process, work_dir, started, f'{run.label} seed {run.seed}', args.iterations)
    if process.returncode:
        raise RunError(f'{run.label} failed; the end of {log}:\n{tail(log)}')
    for file in log_files(work_dir, started - 1)[-1:]:
        run.read(file)
    run.memory = run.memory or usage


def watch(
    process: subprocess.Popen[bytes], work_dir: Path, started: float, label: str, iterations: int
) -> float:
    """Shows the progress of a run until it ends; returns the peak memory of the process in MB."""
    from tqdm import tqdm  # help texts must come without an environment

    with tqdm(total=iterations, desc=label.ljust(24), unit='it', mininterval=5.0) as bar:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            done = max(
                (
                    int(entry['iter'])
                    for file in log_files(work_dir, started - 1)[-1:]
                    for entry in entries(file)
                    if 'loss' in entry
                ),
                default=0,
            )
            bar.update(done - bar.n)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                return usage.ru_maxrss / 1024
            time.sleep(1)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--options',
        nargs='+',
        metavar='KEY=VALUE',
        default=[],
        type=_option,
        help='settings of every run, as for --cfg-options of tools/train.py',
    )


def length(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Iterations of a run: those given, or the model's; without a logged one an error follows."""
    iterations: int = args.model.iterations if args.iterations is None else args.iterations
    given = str(dict(args.options).get('default_hooks.logger.interval', LOGGED))
    logged = int(given) if given.isdigit() else LOGGED  # MMEngine complains of anything else
    if iterations < logged:
        parser.error(f'--iterations {iterations} is less than {logged}, the interval of the logs')
    return iterations


def _option(text: str) -> tuple[str, str]:
    """Key and value of one option; raises an argparse error for what the runs set themselves."""
    key, equals, value = text.partition('=')
    if not equals:
        raise argparse.ArgumentTypeError(f'{text!r} is no KEY=VALUE')
    if key in FIXED:
        raise argparse.ArgumentTypeError(f'{key} is set by {FIXED[key]}')
    return key, value
