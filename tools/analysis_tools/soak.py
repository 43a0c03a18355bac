"""A long run with faults: overflows, failing decompositions, kill -9 and resume.

    python tools/analysis_tools/soak.py --steps 2000 --kills 5

The faults of a step are the same in all runs. A run that is killed and resumed must therefore end
with exactly the weights of an uninterrupted run. A run with overflows must end with the weights of
a run without the batches that overflow. A failing decomposition changes weights, but no weight may
become non-finite, and the log must report the failure. After every kind of fault has occurred, the
allocated memory must not grow.

The tool needs Linux with glibc. It exits with 1 if a condition fails. The number of steps must be a
multiple of 50, at least 100. --optimizer takes any optimizer with a single preconditioner.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond import optimizers
from mmprecond.linalg import Operators
from mmprecond.preconditioners import Preconditioner

OVERFLOW_EVERY = 50
SAVE_EVERY = 20
#: Shares of the run after which one decomposition fails, or all with their retries in float64.
FAIL_ONCE, FAIL_TWICE = 0.2, 0.4
#: Share of a run after which every fault has occurred, and the MB that the rest may add.
SETTLED, GROWTH = 0.6, 1.0


class Net(nn.Module):
    """A few convolutions with norms, tokens and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.conv = nn.Conv2d(16, 24, 3, stride=2)
        self.mlp = nn.Linear(24, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        x = F.relu(self.conv(x)).flatten(2).mT
        return self.head(F.gelu(self.mlp(x)).mean(1))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Blobs of ten kinds."""
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(0, 10, (16,), generator=generator)
    x = 0.5 * torch.randn(16, 3, 12, 12, generator=generator)
    x[torch.arange(16), y % 3, y, y] += 4
    return x, y


@contextmanager
def inject_failures(method: type[Preconditioner], times: int) -> Iterator[None]:
    """Makes the first `times` decompositions of a method fail."""
    plain = method.refresh
    left = [times]

    def sabotaged(self: Preconditioner, *args: Any) -> tuple[Operators, Tensor]:
        operator, succeeded = plain(self, *args)
        if left[0]:
            left[0] -= 1
            succeeded = torch.zeros_like(succeeded)
        return operator, succeeded

    with patch.object(method, 'refresh', sabotaged):
        yield


def is_overflow(step: int) -> bool:
    return step % OVERFLOW_EVERY == OVERFLOW_EVERY - 1


def run(args: argparse.Namespace) -> None:
    """Trains in one process from the newest checkpoint to the end, unless it is killed."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Net()
    optimizer = getattr(optimizers, args.optimizer)(
        model, lr=args.lr, stat_interval=5, refresh_interval=10
    )
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**10, growth_interval=200)
    optimizer.loss_scale = scaler
    path, log = args.folder / 'newest.pt', args.folder / 'memory.jsonl'
    first = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        first = saved['step']
    for step in range(first, args.steps):
        if step % SAVE_EVERY == 0:
            part = path.with_suffix('.part')
            torch.save(
                dict(
                    model=model.state_dict(),
                    optimizer=optimizer.state_dict(),
                    scaler=scaler.state_dict(),
                    step=step,
                ),
                part,
            )
            part.replace(path)
            with log.open('a') as lines:
                lines.write(json.dumps([step, memory()]) + '\n')
        overflow = is_overflow(step)
        if overflow and args.leave_out:
            scaler.update(scaler.get_scale() / 2)  # what an overflow does to the scale
            continue
        faults = 0
        for share, count in ((FAIL_ONCE, 1), (FAIL_TWICE, 10**6)) if args.fail else ():
            if 0 <= step - int(args.steps * share) < 20:  # one or two refreshes
                faults = count
        with inject_failures(type(optimizer.curvature.stacks[0].method), faults):
            train_step(model, optimizer, scaler, step, overflow)
        if not all(p.isfinite().all() for p in model.parameters()):
            sys.exit(f'step {step}: a weight is not finite')
    torch.save(
        {name: p.detach() for name, p in model.named_parameters()}, args.folder / 'weights.pt'
    )
    (args.folder / 'end.json').write_text(json.dumps(accuracy(model)))


def train_step(
    model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, step: int, overflow: bool
) -> None:
    """Takes one step like AMP; an overflow affects the gradient of the loss, nothing before it."""
    x, y = batch(step)
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    optimizer.zero_grad()
    out = model(x)
    loss = F.cross_entropy(out, y) * (float('inf') if overflow else 1.0)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    if overflow:  # batch normalisation saw a batch that the run without it leaves out
        for name, b in model.named_buffers():
            b.copy_(statistics[name])


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    x, y = batch(10**6)
    return float((model.eval()(x).argmax(1) == y).float().mean())


class Allocated(ctypes.Structure):
    """The C library's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            'arena',
            'ordblks',
            'smblks',
            'hblks',
            'hblkhd',
            'usmblks',
            'fsmblks',
            'uordblks',
            'fordblks',
            'keepcost',
        )
    ]


def memory() -> float:
    """Allocated memory in MB, which depends less on the system than resident memory."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Allocated
    info = mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


def start(folder: Path, args: argparse.Namespace, *options: str) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        __file__,
        '--folder',
        str(folder),
        '--steps',
        str(args.steps),
        '--optimizer',
        args.optimizer,
        '--lr',
        str(args.lr),
        *options,
    ]
    with (folder / 'log.txt').open('a') as log:
        return subprocess.Popen(command, stderr=log)


def supervise(args: argparse.Namespace) -> list[str]:
    """Trains all runs and returns the failed conditions."""
    wrong = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for folder, options in (
            ('whole', ['--fail']),
            ('clean', []),
            ('left_out', ['--leave-out']),
        ):
            if start(root / folder, args, *options).wait():
                return [f'{folder} failed: {(root / folder / "log.txt").read_text()[-1000:]}']
        draw = random.Random(args.seed)
        stops = sorted(draw.randrange(SAVE_EVERY, args.steps) for _ in range(args.kills))
        killed = root / 'killed'
        for stop in stops:
            process = start(killed, args, '--fail')
            while (
                last_saved_step(killed) < stop // SAVE_EVERY * SAVE_EVERY and process.poll() is None
            ):
                time.sleep(0.01)
            process.kill()
            process.wait()
        if start(killed, args, '--fail').wait():
            return [f'killed failed: {(killed / "log.txt").read_text()[-1000:]}']
        weights = {
            f: torch.load(root / f / 'weights.pt') for f in ('whole', 'clean', 'left_out', 'killed')
        }
        wrong += weight_differences('killed and resumed', weights['killed'], weights['whole'])
        wrong += weight_differences('overflows', weights['clean'], weights['left_out'])
        log = (root / 'whole/log.txt').read_text()
        if 'its last good operator stays' not in log:
            wrong.append('a failed refresh was not logged')
        usage = [
            json.loads(line)
            for line in (root / 'whole/memory.jsonl').read_text().split('\n')
            if line
        ]
        settled = max(m for step, m in usage if step <= args.steps * SETTLED)
        if usage[-1][1] > settled + GROWTH:
            wrong.append(f'memory grew from {settled:.1f} to {usage[-1][1]:.1f} MB')
        print(
            f'{args.optimizer}: {args.steps} steps, overflow every {OVERFLOW_EVERY}, killed '
            f'after {", ".join(map(str, stops))}; allocated {settled:.1f} MB after the faults, '
            f'{usage[-1][1]:.1f} MB at the end; accuracy {(root / "whole/end.json").read_text()}'
        )
    return wrong


def last_saved_step(folder: Path) -> int:
    path = folder / 'memory.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)[0] for line in lines if line.endswith(']')), default=-1)


def weight_differences(label: str, a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Messages on weights that are not exactly equal."""
    return [
        f'{label}: {name} differs by {float((a[name] - b[name]).abs().max()):.2g}'
        for name in a
        if not torch.equal(a[name], b[name])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--optimizer', default='NKFAC')
    parser.add_argument('--lr', type=float, default=0.02)
    parser.add_argument('--steps', type=int, default=2000)
    parser.add_argument('--kills', type=int, default=5)
    parser.add_argument('--seed', type=int, default=0, help='of the steps at which it is killed')
    parser.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    for name in ('--fail', '--leave-out'):
        parser.add_argument(name, action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 100 or args.steps % OVERFLOW_EVERY:
        parser.error(f'--steps {args.steps}: give a multiple of {OVERFLOW_EVERY}, at least 100')
    if args.folder:
        logging.basicConfig(level=logging.INFO)
        run(args)
        return
    wrong = supervise(args)
    print('\n'.join(wrong) or 'all as it must be')
    sys.exit(bool(wrong))


if __name__ == '__main__':
    main()
