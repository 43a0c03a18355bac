"""Times optimizers side by side: plain steps, steps that measure, steps that refresh.

All optimizers train copies of one model, in one process and in turns (A B A B). Models come from
the configs of MMDetection and MMPretrain, with random weights, on noise. Writes a table in
Markdown, the numbers as JSON, and a bar chart.

    python tools/analysis_tools/benchmark.py --models resnet18 --size 112 112 --batch 16 \\
        --optimizers SGD,AdamW,NKFAC,NKFAC:solver=cholesky,NKFAC:solver=lowrank
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import mmprecond.optimizers as ours
from mmprecond.engine import launch
from mmprecond.engine.peers import with_groups
from mmprecond.optimizers import PreconditionedOptimizer, RuleOptimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis_tools.benchmark_entry import CAPTURE, KINDS, REFRESH, Entry
from common import ROOT
from common.contestants import EVERY_STEP
from common.models import CONFIGS, build_model, noise
from common.tables import markdown
from common.timing import now

USUAL = 'SGD,AdamW,NKFAC:solver=cholesky,NKFAC:solver=lowrank,AdamR,FSGD,FAdam:solver=lowrank'
PEERS = ('SOAP', 'Shampoo', 'Muon')
#: Cycles of `REFRESH` steps that are not counted: Newton's first three refreshes are exact.
WARM_UP = 3
#: Different batches, taken in turns: those of one alone would have few directions.
BATCHES = 8


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """A name and its settings from NAME:key=value:key=value."""
    name, *settings = spec.split(':')
    options: dict[str, Any] = {}
    for setting in settings:
        key, _, value = setting.partition('=')
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return name, options


def build_optimizer(spec: str, model: nn.Module) -> torch.optim.Optimizer:
    """One of torch's, ours or the package pytorch_optimizer's, at a rate that changes little."""
    name, options = parse_spec(spec)
    if name in ('SGD', 'AdamW'):
        extra = dict(momentum=0.9) if name == 'SGD' else {}
        return getattr(torch.optim, name)(model.parameters(), lr=1e-5, **extra, **options)
    if name in timed():
        taken = sorted({'stat_interval', 'refresh_interval', 'stagger'} & set(options))
        if taken:
            raise ValueError(
                f'{spec}: this tool sets the intervals, to tell steps apart by what '
                f'they do; leave out {", ".join(taken)} and see --intervals'
            )
        kind = getattr(ours, name)
        if kind.needs == 'capture' and name not in EVERY_STEP:
            options = dict(stat_interval=CAPTURE, refresh_interval=REFRESH, **options)
        elif kind.needs == 'loss':
            options = dict(total_steps=10**6, **options)
        return kind(model, lr=1e-5, **options)
    peers = installed_peers()
    if name in peers:
        return peers[name]([dict(params=list(model.parameters()))], lr=1e-5, **options)
    choices = ['SGD', 'AdamW', *timed(), *PEERS]
    raise ValueError(
        f'cannot time {name!r} here; choose from {", ".join(choices)} (the last '
        f'{len(PEERS)} from the package pytorch_optimizer, if it is installed)'
    )


def timed() -> list[str]:
    """Our optimizers that need no more than a learning rate, and no second derivatives."""
    kinds = {name: getattr(ours, name) for name in ours.__all__}
    return [
        name
        for name, kind in kinds.items()
        if isinstance(kind, type)
        and issubclass(kind, RuleOptimizer)
        and kind.needs != 'graph'
        and 'lr' in inspect.signature(kind.__init__).parameters
    ]


def installed_peers() -> dict[str, Any]:
    """Other preconditioned optimizers, of the optional package pytorch_optimizer."""
    try:
        import pytorch_optimizer
    except ImportError:
        return {}
    return {
        name: with_groups(getattr(pytorch_optimizer, name))
        for name in PEERS
        if hasattr(pytorch_optimizer, name)
    }


def gemm_rate(device: str, size: int = 2048) -> float:
    """Floating-point operations a second of a square product, the best of some."""
    matrix = torch.randn(size, size, device=device)
    best = float('inf')
    for _ in range(6):
        start = now(matrix)
        matrix @ matrix
        best = min(best, now(matrix) - start)
    return 2 * size**3 / best


def measure(entries: list[Entry], batches: list[dict[str, Any]], cycles: int) -> None:
    """Trains all in turns and notes times, first some cycles that do not count."""
    steps = (WARM_UP + cycles) * REFRESH
    for step in tqdm(range(steps), unit='step', mininterval=5):
        batch = batches[step % BATCHES]
        for entry in entries:
            if batch['inputs'].is_cuda:
                torch.cuda.reset_peak_memory_stats()
            whole, alone = entry.train(batch)
            if batch['inputs'].is_cuda:
                entry.peak_mb = max(entry.peak_mb, torch.cuda.max_memory_allocated() / 2**20)
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
    """One optimizer's numbers; times in seconds, memory in MB."""
    whole = {kind: median(times) for kind, times in entry.seconds.items() if times}
    plain = whole['plain']
    extra = {kind: whole.get(kind, plain) for kind in KINDS}
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
        result['amortised'][key] = (
            plain
            + (extra['statistics'] - plain) / capture
            + (extra['refresh'] - extra['statistics']) / refresh
        )
        result['p99'][key] = p99(entry.seconds, capture, refresh)
        if base is not None:
            result['overhead'][key] = result['amortised'][key] / median(base.seconds['plain'])
    optimizer = entry.optimizer
    if isinstance(optimizer, PreconditionedOptimizer):
        result |= against_forecast(entry, batch, rate)
    return result


def p99(seconds: dict[str, list[float]], capture: int, refresh: int) -> float:
    """The 99th percentile of iterations if kinds came as often as these intervals say."""
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
    """A plain step's products as they were: operations, their time at the GEMM's rate."""
    optimizer: Any = entry.optimizer
    while entry.kind(optimizer.t) != 'plain':
        entry.train(batch)
    loss = entry.model.parse_losses(entry.model(**batch, mode='loss'))[0]
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


def report(model: str, results: list[dict[str, Any]], args: argparse.Namespace, rate: float) -> str:
    """The table of one model."""
    keys = [f'{capture}/{refresh}' for capture, refresh in args.intervals]
    head = (
        f'### {model}, {args.batch} x {args.size[0]} x {args.size[1]}, {describe(args)}\n\n'
        f'Product of 2048 x 2048 in the same run: {rate / 1e9:,.0f} GFLOP/s. Seconds are '
        'medians of whole iterations; times of all iterations at intervals of captures and '
        "refreshes (first) are divided by the base optimizer's, p99 is in seconds.\n\n"
    )
    headers = [
        'optimizer',
        'plain',
        'measures',
        'refreshes',
        'step alone',
        'its products at GEMM rate',
        *(part for key in keys for part in (f'x base, {key}', 'p99')),
        'state MB',
        'peak MB',
        'ranks',
    ]
    return head + markdown(headers, [row(result, keys) for result in results])


def row(result: dict[str, Any], keys: list[str]) -> list[str]:
    """Cells of one optimizer."""
    times = [
        f'{result["iteration"][kind]:.3f}' if kind in result['iteration'] else '-' for kind in KINDS
    ]
    ratios = [
        cell
        for key in keys
        for cell in (
            f'{result["overhead"][key]:.2f} ({result["base"]})'
            if key in result['overhead']
            else '-',
            f'{result["p99"][key]:.3f}',
        )
    ]
    ranks = result.get('ranks')
    return [
        result['name'],
        *times,
        f'{result["step"]["plain"]:.3f}',
        f'{result["limit"]:.3f}' if 'limit' in result else '-',
        *ratios,
        f'{result["state_mb"]:.0f}',
        f'{result["peak_mb"]:.0f}' if result['peak_mb'] else '-',
        f'{min(ranks)}-{max(ranks)}' if ranks else '-',
    ]


def describe(args: argparse.Namespace) -> str:
    """The hardware."""
    if args.device.startswith('cuda'):
        return torch.cuda.get_device_name()
    return f'{torch.get_num_threads()} CPU threads, torch {torch.__version__}'


def chart(model: str, results: list[dict[str, Any]], key: str, path: Path) -> None:
    """Bars: iterations as many times the base optimizer's."""
    from matplotlib.figure import Figure

    shown = [r for r in results if key in r['overhead']]
    figure = Figure(figsize=(7, 0.5 + 0.4 * len(shown)), layout='constrained')
    axes = figure.subplots()
    bars = axes.barh([r['name'] for r in shown], [r['overhead'][key] for r in shown])
    axes.bar_label(bars, fmt='%.2f', padding=3)
    axes.axvline(1, color='grey', linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("time of an iteration / the base optimizer's")
    axes.set_title(f'{model}, intervals {key}')
    figure.savefig(path, dpi=120)


def peak_on_cpu(model: str, spec: str, args: argparse.Namespace) -> float:
    """Peak memory in MB of a process that trains with this optimizer alone."""
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
        '--child',
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f'{spec} on {model}: {done.stderr.strip().splitlines()[-1]}')
    return float(done.stdout.split()[-1])


def child(args: argparse.Namespace) -> None:
    """One cycle of one optimizer; prints the peak memory, as Linux counts it."""
    model = build_model(args.models[0], args.device)
    batches = noise(model, args.batch, tuple(args.size), BATCHES)
    entry = Entry(args.optimizers[0], model, build_optimizer(args.optimizers[0], model))
    for step in range(REFRESH + 1):
        entry.train(batches[step % BATCHES])
    status = Path('/proc/self/status').read_text()
    print(int(re.findall(r'VmHWM:\s*(\d+)', status)[0]) / 2**10)


def run(name: str, args: argparse.Namespace, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures all optimizers on one model; writes and returns its results."""
    model = build_model(name, args.device)
    batches = noise(model, args.batch, tuple(args.size), BATCHES)
    entries = []
    for spec in args.optimizers:
        twin = copy.deepcopy(model)
        entries.append(Entry(spec, twin, build_optimizer(spec, twin)))
    rate = gemm_rate(args.device)
    measure(entries, batches, args.cycles)
    rate = max(rate, gemm_rate(args.device))
    if args.memory and args.device == 'cpu':
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
    """Pairs from CAPTURE/REFRESH,CAPTURE/REFRESH."""
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
        help=f'each as NAME or NAME:key=value:key=value; default: {USUAL}, and '
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
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, default=ROOT / 'work_dirs/benchmark')
    parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.optimizers == USUAL.split(','):
        args.optimizers += installed_peers()
    return args


def main() -> None:
    args = parse_args()
    with launch.one_line_errors():
        launch.check_mmcv()
        if args.child:
            child(args)
            return
        for name in args.models:
            run(name, args)


if __name__ == '__main__':
    main()
