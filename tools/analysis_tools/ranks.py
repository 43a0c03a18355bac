"""Simulates data-parallel training: what curvature adds to an iteration on 8, 64, 512 ranks.

    python tools/analysis_tools/ranks.py mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py \\
        --optimizer NKFAC --size 800 1333 --iteration 0.15

Times of a plain iteration, a capture and a refresh are measured here on one process, and scaled to
an iteration of --iteration seconds. Messages are those that the optimizer sends, by shapes
(`mmprecond.core.traffic`). A sum of B bytes over W ranks takes 2 (W - 1) / W B / bandwidth and
2 log2(W) latencies; a broadcast takes B / bandwidth and log2(W) latencies. Nothing of a message is
hidden behind other work, although sums at captures are sent ahead.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mmprecond.core import Curvature, LayerStack
from mmprecond.core.memory import megabytes
from mmprecond.core.sharding import SHARDINGS, Sharding
from mmprecond.core.traffic import Messages, assign_stacks, traffic
from mmprecond.curvature import Layer
from mmprecond.engine import launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis_tools.benchmark import intervals, measure
from analysis_tools.benchmark_entry import EVERY_STEP, Entry, build_optimizer
from common.devices import device
from common.models import CONFIGS, build_model, noise
from common.tables import markdown


@dataclass(frozen=True)
class Pieces:
    """Seconds of one process.

    Attributes:
        iteration: An iteration of the first-order optimizer.
        capture: What a capture adds.
        refresh: What a refresh adds.
        apply: What a plain step adds.
    """

    iteration: float
    capture: float
    refresh: float
    apply: float

    def scaled_to(self, iteration: float) -> Pieces:
        """The same shares of an iteration of another length."""
        factor = iteration / self.iteration
        return Pieces(*(factor * seconds for seconds in vars(self).values()))


@dataclass(frozen=True)
class Network:
    """Bandwidth of each rank in MB/s, and latency of a message in seconds."""

    bandwidth: float
    latency: float

    def sum_seconds(self, messages: Messages, ranks: int) -> float:
        """Time of sums over ranks, in a ring for bandwidth and a tree for latency."""
        transfer = 2 * (ranks - 1) / ranks * messages.megabytes / self.bandwidth
        return transfer + 2 * messages.number * math.log2(ranks) * self.latency

    def broadcast_seconds(self, messages: Messages, ranks: int) -> float:
        """Time of broadcasts."""
        transfer = messages.megabytes / self.bandwidth
        return transfer + messages.number * math.log2(ranks) * self.latency


def measure_pieces(entry: Entry, base: Entry, batches: list[dict[str, Any]]) -> Pieces:
    """Times iterations on this machine, in turns with those of a first-order optimizer."""
    measure([entry, base], batches, cycles=2)
    whole = {kind: median(times) for kind, times in entry.seconds.items()}
    steps = {kind: median(times) for kind, times in entry.steps.items()}
    return Pieces(
        median(base.seconds['plain']),
        max(0.0, whole['statistics'] - whole['plain']),
        max(0.0, steps['refresh'] - steps['statistics']),
        max(0.0, steps['plain'] - median(base.steps['plain'])),
    )


def simulate(
    curvature: Curvature,
    pieces: Pieces,
    network: Network,
    ranks: int,
    mode: str,
    intervals: tuple[int, int],
) -> tuple[float, float]:
    """Share of an iteration that curvature adds, and megabytes of the fullest rank."""
    sharding = Sharding(mode, True, ranks)
    layers = assign_stacks(curvature.layers, sharding)
    messages = traffic(curvature.layers, sharding)
    refresh, apply = pieces.refresh, pieces.apply
    if mode != 'none':
        costs = {layer: stack.method.refresh_flops(layer) for layer, stack in layers.items()}
        refresh *= largest_load(layers, costs) / sum(costs.values())
    if mode == 'apply':
        costs = {layer: stack.method.apply_flops(layer) for layer, stack in layers.items()}
        apply *= largest_load(layers, costs) / sum(costs.values())
    seconds = (
        apply
        + network.broadcast_seconds(messages.step, ranks)
        + (pieces.capture + network.sum_seconds(messages.capture, ranks)) / intervals[0]
        + (refresh + network.broadcast_seconds(messages.refresh, ranks)) / intervals[1]
    )
    return seconds / pieces.iteration, held_by_the_fullest(layers, mode)


def largest_load(layers: Mapping[Layer, LayerStack], costs: Mapping[Layer, float]) -> float:
    """Sum of the costs of the rank that has most."""
    loads: dict[int, float] = {}
    for layer, stack in layers.items():
        owner = stack.owner or 0
        loads[owner] = loads.get(owner, 0.0) + costs[layer]
    return max(loads.values())


def held_by_the_fullest(layers: Mapping[Layer, LayerStack], mode: str) -> float:
    """Megabytes of statistics and operators on the rank that holds most, between refreshes."""
    whole = {layer: megabytes(layer, stack) for layer, stack in layers.items()}
    if mode != 'apply':
        return sum(whole.values())
    statistics = {layer: megabytes(layer, stack, False) for layer, stack in layers.items()}
    own = {layer: whole[layer] - statistics[layer] for layer in layers}
    return sum(statistics.values()) + largest_load(layers, own)


def modes_of(curvature: Curvature) -> list[str]:
    """Kinds of sharding that the methods allow."""
    after_rule = any(stack.method.acts_after_rule for stack in curvature.stacks)
    return [mode for mode in SHARDINGS if mode != 'apply' or not after_rule]


def describe(curvature: Curvature, ranks: int) -> str:
    """Table of the messages by sharding."""
    rows = []
    for mode in modes_of(curvature):
        counted = traffic(curvature.layers, Sharding(mode, True, ranks))
        cells = (f'{m.number}, {m.megabytes:.1f}' for m in vars(counted).values())
        rows.append((mode, *cells))
    heads = ('sharding', 'capture: messages, MB', 'refresh', 'every step')
    return markdown(heads, rows)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help=f'a config, or one of {", ".join(CONFIGS)}')
    parser.add_argument('--optimizer', default='NKFAC', help='as in benchmark.py; default: NKFAC')
    parser.add_argument('--batch', type=launch.count, default=2, help='images a rank; default: 2')
    parser.add_argument('--size', type=launch.count, nargs=2, default=(224, 224))
    parser.add_argument('--device', type=device, default='cpu', help='default: cpu')
    parser.add_argument(
        '--iteration', type=float, help='seconds of a plain iteration; default: as measured'
    )
    parser.add_argument(
        '--ranks',
        type=lambda text: [launch.count(k) for k in text.split(',')],
        default=[8, 64, 512],
        help='default: 8,64,512',
    )
    parser.add_argument(
        '--intervals',
        type=intervals,
        default=[(20, 200)],
        metavar='CAPTURE/REFRESH',
        help='default: 20/200',
    )
    parser.add_argument(
        '--bandwidth', type=float, default=25.0, help='GB/s of each rank; default: 25'
    )
    parser.add_argument('--latency', type=float, default=20.0, help='microseconds; default: 20')
    args = parser.parse_args()
    if len(args.intervals) > 1:
        parser.error('--intervals takes one pair, such as 20/200')
    if args.optimizer.split(':')[0] in EVERY_STEP:
        parser.error(
            f'{args.optimizer} measures at every step, so that its captures cannot be timed apart'
        )
    for name in ('iteration', 'bandwidth', 'latency'):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f'--{name} {value:g} is out of range; give a number greater than 0')
    return args


def main() -> None:
    args = parse_args()
    ((capture, refresh),) = args.intervals
    network = Network(1000 * args.bandwidth, args.latency / 1e6)
    model = build_model(args.config, args.device)
    batches = noise(model, args.batch, tuple(args.size), 2) * 4
    twin = copy.deepcopy(model)
    entry = Entry(args.optimizer, model, build_optimizer(args.optimizer, model))
    curvature = getattr(entry.optimizer, 'curvature', None)
    if curvature is None:
        sys.exit(f'{args.optimizer} measures no curvature; choose an optimizer such as NKFAC')
    base = Entry(entry.base, twin, build_optimizer(entry.base, twin))
    pieces = measure_pieces(entry, base, batches)
    print(f'measured: {pieces}')
    if args.iteration:
        pieces = pieces.scaled_to(args.iteration)
        print(f'scaled: {pieces}')
    print(describe(curvature, args.ranks[0]), '', sep='\n')
    rows = []
    for ranks in args.ranks:
        results = {
            mode: simulate(curvature, pieces, network, ranks, mode, (capture, refresh))
            for mode in modes_of(curvature)
        }
        best = min(results, key=lambda mode: results[mode][0])
        cells = (f'{100 * share:.1f} %, {held:,.0f} MB' for share, held in results.values())
        rows.append((str(ranks), *cells, best))
    print(markdown(('ranks', *modes_of(curvature), 'least time'), rows))


if __name__ == '__main__':
    main()
