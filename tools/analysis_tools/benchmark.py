"""Times optimizers side by side: plain steps, steps that measure, steps that refresh.

All optimizers train copies of one model, in one process and in turns (A B A B). Models come from
the configs of MMDetection and MMPretrain, with random weights and noise as input. The output is a
table in Markdown, the numbers as JSON, and a bar chart.

    python tools/analysis_tools/benchmark.py --models resnet18 --size 112 112 --batch 16 \\
        --optimizers SGD,AdamW,NKFAC,NKFAC:settings=published
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mmprecond.engine import launch
from mmprecond.optimizers import PreconditionedOptimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis_tools.benchmark_entry import (
    PEERS,
    REFRESH,
    Entry,
    amortised,
    build_optimizer,
    installed_peers,
)
from analysis_tools.benchmark_report import chart, describe, report
from common import WORK
from common.devices import device
from common.models import CONFIGS, build_model, noise
from common.timing import now

USUAL = 'SGD,AdamW,NKFAC,NKFAC:settings=published,AdamR,FSGD,FAdam'
#: Cycles of `REFRESH` steps that are not counted: Newton's first three refreshes are exact.
WARM_UP = 3
#: Number of different batches, taken in turns; moments of a single batch would have a low rank.
BATCHES = 8


def gemm_rate(device: torch.device, size: int = 2048) -> float:
    """FLOPs per second of a square product, the best of several."""
    matrix = torch.randn(size, size, device=device)
    best = float('inf')
    for _ in range(6):
        start = now(matrix)
        matrix @ matrix
        best = min(best, now(matrix) - start)
    return 2 * size**3 / best


def measure(entries: list[Entry], batches: list[dict[str, Any]], cycles: int) -> None:
    """Trains all entries in turns and records times, after some cycles of warm-up."""
    steps = (WARM_UP + cycles) * REFRESH
    for step in tqdm(range(steps), unit='step', mininterval=5):
        batch = batches[step % BATCHES]
        for entry in entries:
            whole, alone = entry.train_watched(batch)
            if step >= WARM_UP * REFRESH:
                entry.seconds[entry.kind(step)].append(whole)
                entry.steps[entry.kind(step)].append(alone)


def summary(
    entry: Entry,
    bases: dict[str, Entry],
    batch: dict[str, Any],
    rate: float,
    intervals: list[tuple[int, int]],
) -> dict[str, Any]:
    """Results of one optimizer, with times in seconds and memory in MB."""
    whole = {kind: median(times) for kind, times in entry.seconds.items() if times}
    base = bases.get(entry.base)
    result: dict[str, Any] = dict(
        name=entry.name,
        base=entry.base,
        iteration=whole,
        step={kind: median(times) for kind, times in entry.steps.items() if times},
        state_mb=entry.state_mb(),
        peak_mb=entry.peak_mb,
        amortised={},
        p99={},
        overhead={},
    )
    for capture, refresh in intervals:
        key = f'{capture}/{refresh}'
        result['amortised'][key] = amortised(whole, capture, refresh)
        result['p99'][key] = p99(entry.seconds, capture, refresh)
        if base is not None:
            result['overhead'][key] = result['amortised'][key] / median(base.seconds['plain'])
    optimizer = entry.optimizer
    if isinstance(optimizer, PreconditionedOptimizer):
        result |= against_forecast(entry, batch, rate)
    return result


def p99(seconds: dict[str, list[float]], capture: int, refresh: int) -> float:
    """The 99th percentile of iteration times for the frequencies of these intervals."""
    shares = {'refresh': 1 / refresh, 'statistics': 1 / capture - 1 / refresh}
    shares['plain'] = 1 - 1 / capture
    if not seconds['refresh']:
        shares = {'plain': 1.0}
    weighted = sorted(
        (t, shares[kind] / len(times))
        for kind, times in seconds.items()
        if times and kind in shares
        for t in times
    )
    total = 0.0
    for t, share in weighted:
        total += share
        if total >= 0.99 * sum(s for _, s in weighted):
            return t
    return weighted[-1][0]


def against_forecast(entry: Entry, batch: dict[str, Any], rate: float) -> dict[str, Any]:
    """Products of a plain step: their FLOPs, and their time at the rate of the GEMM."""
    optimizer: Any = entry.optimizer
    while entry.kind(optimizer.t) != 'plain':
        entry.train(batch)
    loss = entry.model.parse_losses(entry.model(**batch))[0]
    optimizer.zero_grad()
    loss.backward()
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    done = counter.get_total_flops()
    forecast = sum(
        stack.method.apply_flops(layer) for layer, stack in optimizer.curvature.layers.items()
    )
    ranks = [
        operator.shape[-1]
        for stack in optimizer.curvature.stacks
        for name, operator in stack.operator_tensors.items()
        if 'columns' in name
    ]
    return dict(
        apply_gflop=done / 1e9,
        forecast_gflop=forecast / 1e9,
        limit=done / rate,
        ranks=sorted(ranks),
    )


def peak_on_cpu(model: str, spec: str, args: argparse.Namespace) -> float:
    """Peak memory in MB of a process that trains with this optimizer only."""
    command = [
        sys.executable,
        __file__,
        '--models',
        model,
        '--optimizers',
        spec,
        '--batch',
        str(args.batch),
        '--size',
        *map(str, args.size),
        '--device',
        'cpu',
        '--child',
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f'{spec} on {model}: {done.stderr.strip().splitlines()[-1]}')
    return float(done.stdout.split()[-1])


def child(args: argparse.Namespace) -> None:
    """Trains one cycle of one optimizer and prints the peak memory by Linux's count."""
    model = build_model(args.models[0], args.device)
    batches = noise(model, args.batch, tuple(args.size), BATCHES)
    entry = Entry(args.optimizers[0], model, build_optimizer(args.optimizers[0], model))
    for step in range(REFRESH + 1):
        entry.train(batches[step % BATCHES])
    status = Path('/proc/self/status').read_text()
    print(int(re.findall(r'VmHWM:\s*(\d+)', status)[0]) / 2**10)


def run(name: str, args: argparse.Namespace, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures all optimizers on one model; writes and returns the results."""
    model = build_model(name, args.device)
    batches = noise(model, args.batch, tuple(args.size), BATCHES)
    entries = []
    for spec in args.optimizers:
        twin = copy.deepcopy(model)
        entries.append(Entry(spec, twin, build_optimizer(spec, twin)))
    rate = gemm_rate(args.device)
    measure(entries, batches, args.cycles)
    rate = max(rate, gemm_rate(args.device))
    if args.memory and args.device.type == 'cpu':
        for entry in entries:
            entry.peak_mb = peak_on_cpu(name, entry.name, args)
    bases = {entry.name: entry for entry in entries if entry.name in ('SGD', 'AdamW')}
    results = [summary(entry, bases, batches[0], rate, args.intervals) for entry in entries]
    text = report(name, results, args, rate)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / name.split('/')[-1].removesuffix('.py')
    stem.with_suffix('.md').write_text(text + '\n')
    record = dict(
        model=name,
        batch=args.batch,
        size=list(args.size),
        hardware=describe(args),
        gemm_rate=rate,
        results=results,
    )
    stem.with_suffix('.json').write_text(json.dumps(record, indent=1))
    chart(name, results, '{}/{}'.format(*args.intervals[-1]), stem.with_suffix('.png'))
    say(text)
    return record


def intervals(text: str) -> list[tuple[int, int]]:
    """Parses pairs from CAPTURE/REFRESH,CAPTURE/REFRESH."""
    pairs = [[int(n) for n in pair.split('/')] for pair in text.split(',')]
    if not all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
        raise argparse.ArgumentTypeError(f'{text!r} is not like 20/200,100/1000')
    return [(capture, refresh) for capture, refresh in pairs]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = re.compile(',').split
    parser.add_argument(
        '--models',
        type=names,
        default=['resnet18'],
        help=f'of {", ".join(CONFIGS)}, or configs; default: resnet18',
    )
    parser.add_argument(
        '--optimizers',
        type=names,
        default=USUAL.split(','),
        help=f'each as NAME or NAME:key=value:key=value, or as AFOpt+NKFAC; default: {USUAL}, and '
        f'{", ".join(PEERS)} where pytorch_optimizer is installed',
    )
    parser.add_argument('--batch', type=launch.count, default=16, help='images; default: 16')
    parser.add_argument(
        '--size',
        type=launch.count,
        nargs=2,
        default=(112, 112),
        metavar=('HEIGHT', 'WIDTH'),
        help='default: 112 112',
    )
    parser.add_argument(
        '--cycles', type=launch.count, default=3, help=f'of {REFRESH} steps; default: 3'
    )
    parser.add_argument(
        '--intervals',
        type=intervals,
        default=[(20, 200), (100, 1000)],
        help='captures/refreshes to average over; default: 20/200,100/1000',
    )
    parser.add_argument(
        '--memory',
        action='store_true',
        help='measure peak memory on CPU too, each optimizer in its own process',
    )
    parser.add_argument(
        '--device', type=device, default='cuda' if torch.cuda.is_available() else 'cpu'
    )
    parser.add_argument('--out', type=Path, default=WORK / 'work_dirs/benchmark')
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.optimizers == USUAL.split(','):
        args.optimizers += installed_peers()
    return args


def main() -> None:
    args = parse_args()
    with launch.one_line_errors():
        if args.child:
            child(args)
            return
        for name in args.models:
            run(name, args)


if __name__ == '__main__':
    main()
