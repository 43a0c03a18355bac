"""Times captures, layer by layer, against products of all patches in memory.

python tools/analysis_tools/captures.py --model resnet18 --size 112 112 --batch 16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mmprecond.curvature import Call, Layer, Statistic
from mmprecond.engine import launch
from mmprecond.linalg import matmul_precision, rounded
from mmprecond.optimizers import NKFAC

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.models import CONFIGS, build_model, noise
from common.tables import markdown
from common.timing import seconds_of


@dataclass
class Recorded:
    """One call of a layer, with the tensors that a capture reads."""

    call: Call
    kept: tuple[Tensor, ...]
    gradient: Tensor


def record(model: Any, batch: dict[str, Any], optimizer: NKFAC) -> list[Recorded]:
    """All calls of the preconditioned layers in one forward and backward pass."""
    calls: list[Recorded] = []

    def observe(call: Call, kept: tuple[Tensor, ...], output: Tensor) -> None:
        inputs = tuple(tensor.detach().clone() for tensor in kept)  # ReLU works in place
        output.register_hook(lambda g: calls.append(Recorded(call, inputs, g.clone())))

    optimizer.disarm()
    handles = [
        handle
        for layer in optimizer.curvature.layers
        if layer.blocks == 1
        for handle in layer.watch(observe, lambda *_: None)
    ]
    model.parse_losses(model(**batch))[0].backward()
    for handle in handles:
        handle.remove()
    return calls


def unfolded_factors(recorded: Recorded) -> list[Tensor]:
    """Computes both factors from rows in memory, as in research code."""
    module: Any = recorded.call.module
    (inputs,), gradient = recorded.kept, recorded.gradient
    if gradient.dim() == 4 and inputs.dim() == 4:
        rows = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
        rows, gradient = rows.transpose(1, 2).flatten(0, 1), gradient.permute(0, 2, 3, 1)
    else:
        rows = inputs.reshape(-1, inputs.shape[-1])
    if recorded.call.layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    gradient = gradient.reshape(-1, gradient.shape[-1])
    return [rows.t() @ rows, gradient.t() @ gradient]


def measure_call(recorded: Recorded, statistics: Sequence[Statistic]) -> dict[str, Tensor]:
    """Computes both factors with the package."""
    kept = tuple(map(rounded, recorded.kept))
    return recorded.call.layer.measure(
        recorded.call, kept, rounded(recorded.gradient), statistics, torch.Generator()
    )


def compare(
    calls: list[Recorded], optimizer: NKFAC, turns: int, precision: str
) -> dict[Layer, list[float]]:
    """Seconds by layer of the package and of rows in memory, each the least of some turns."""
    seconds: dict[Layer, list[float]] = {}
    for recorded in tqdm(calls, unit='call'):
        statistics = optimizer.curvature.layers[recorded.call.layer].kept
        pair = [float('inf'), float('inf')]
        for _ in range(turns):
            with matmul_precision(precision):
                pair[0] = min(pair[0], seconds_of(partial(measure_call, recorded, statistics)))
            pair[1] = min(pair[1], seconds_of(partial(unfolded_factors, recorded)))
        total = seconds.setdefault(recorded.call.layer, [0.0, 0.0])
        seconds[recorded.call.layer] = [a + b for a, b in zip(total, pair, strict=True)]
    return seconds


def table(seconds: dict[Layer, list[float]]) -> str:
    """Markdown table with a row for each layer, and the sum."""
    rows = [
        (layer.name.removesuffix('.weight'), f'{layer.rows} x {layer.columns}', captured, unfolded)
        for layer, (captured, unfolded) in seconds.items()
    ]
    rows.append(('all', '', sum(row[2] for row in rows), sum(row[3] for row in rows)))
    return markdown(
        ('layer', 'o x i', 'ms', 'ms, laid out', 'ratio'),
        [
            (
                name,
                shape,
                f'{1e3 * captured:.1f}',
                f'{1e3 * unfolded:.1f}',
                f'{captured / unfolded:.2f}',
            )
            for name, shape, captured, unfolded in rows
        ],
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--model',
        default='resnet18',
        help=f'of {", ".join(CONFIGS)}, or a config; default: resnet18',
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
    parser.add_argument('--turns', type=launch.count, default=5)
    parser.add_argument('--precision', default='highest', help='of ours: matmul_precision')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with launch.one_line_errors():
        model = build_model(args.model)
        (batch,) = noise(model, args.batch, tuple(args.size), 1)
        optimizer = NKFAC(model, lr=0.1)
        calls = record(model, batch, optimizer)
        print(table(compare(calls, optimizer, args.turns, args.precision)))


if __name__ == '__main__':
    main()
