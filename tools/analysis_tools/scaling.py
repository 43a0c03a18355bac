"""Growth of the cost of preconditioning with a convolution's width, its kernel, and the batch.

The model is one square convolution. Its inputs and output gradients have channel moments with
eigenvalues that decrease like 1 / k^2. The tool times a step, a capture and a refresh of NKFAC,
with its forms in turns, and fits slopes to the logarithms. The output is a figure and a table.

    python tools/analysis_tools/scaling.py --widths 32,64,128,256 --kernels 1,3,5 --rows 256,1024
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mmprecond.core import Curvature
from mmprecond.optimizers import NKFAC

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import WORK
from common.tables import markdown
from common.timing import seconds_of

#: Settings of NKFAC by form.
FORMS: dict[str, dict[str, Any]] = {
    'dense': dict(input_factor='patch', solver='cholesky', max_rows=None),
    'low rank': dict(input_factor='patch'),
    'separable, dense': dict(input_factor='separable', solver='cholesky', max_rows=None),
    'separable': dict(input_factor='separable'),
}
PARTS = ('step', 'capture', 'refresh')
SIDE = 16  # pixels of the images
#: Number of refreshes before the clock starts; later ones of low rank start from an earlier one.
WARM_UP = 4


def measure_parts(form: str, width: int, kernel: int, rows: int, turns: int) -> dict[str, float]:
    """Seconds of each part, the least of several runs."""
    torch.manual_seed(0)
    layer = nn.Conv2d(width, width, kernel, padding=kernel // 2, bias=False)
    optimizer = NKFAC(
        layer,
        lr=1e-6,
        stat_interval=1,
        refresh_interval=1,
        max_dim=width * kernel**2,
        matmul_precision='highest',
        **FORMS[form],
    )
    best = dict.fromkeys((*PARTS, 'pass'), math.inf)
    for turn in range(WARM_UP + turns):
        inputs, gradients = decaying_maps(rows, width), decaying_maps(rows, width) / rows

        def train(inputs: Tensor = inputs, gradients: Tensor = gradients) -> None:
            layer(inputs).backward(gradients)

        optimizer.zero_grad()
        optimizer.disarm()
        times = {'pass': seconds_of(train)}
        optimizer.zero_grad()
        optimizer.arm()
        curvature = optimizer.curvature
        times['capture'] = seconds_of(train) + seconds_of(partial(_merge, curvature))
        times['refresh'] = seconds_of(partial(curvature.refresh, 0))
        gradient_by_weight: dict[Any, Any] = {layer.weight: layer.weight.grad}
        times['step'] = seconds_of(
            partial(curvature.precondition, gradient_by_weight, optimizer.param_groups)
        )
        if turn >= WARM_UP:
            best = {part: min(best[part], seconds) for part, seconds in times.items()}
    best['capture'] = max(best['capture'] - best['pass'], 1e-6)
    return best


def _merge(curvature: Curvature) -> None:
    curvature.start_merge(0)
    curvature.finish_merge()


def decaying_maps(rows: int, width: int) -> Tensor:
    """Random images, with eigenvalues of the channels' second moment that decrease like 1 / k^2."""
    images = torch.randn(rows // SIDE**2, width, SIDE, SIDE)
    return images / torch.arange(1, width + 1)[:, None, None]


def slope(sizes: list[int], seconds: list[float]) -> float:
    """Exponent of the growth of times over the larger half of the sizes."""
    half = len(sizes) // 2
    logs = [[math.log(v) for v in values[half:]] for values in (sizes, seconds)]
    return linear_regression(*logs).slope if len(logs[0]) > 1 else math.nan


def table(axis: str, sizes: list[int], times_by_form: dict[str, list[dict[str, float]]]) -> str:
    """Table of times by size, with slopes."""
    rows = []
    for part in PARTS:
        for form, times in times_by_form.items():
            seconds = [entry[part] for entry in times]
            rows.append(
                (part, form, *(f'{s:.4f}' for s in seconds), f'{slope(sizes, seconds):.2f}')
            )
    return markdown(('part', 'form', *(f'{axis} {n}' for n in sizes), 'slope'), rows)


def draw(
    results: dict[str, tuple[list[int], dict[str, list[dict[str, float]]]]], path: Path
) -> None:
    """Plots one panel for each part and axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(PARTS), 3.2 * len(results)), layout='constrained')
    panels = figure.subplots(len(results), len(PARTS), squeeze=False)
    for row, (axis, (sizes, times_by_form)) in zip(panels, results.items(), strict=True):
        for panel, part in zip(row, PARTS, strict=True):
            for form, times in times_by_form.items():
                seconds = [entry[part] for entry in times]
                panel.loglog(
                    sizes, seconds, marker='o', label=f'{form}, slope {slope(sizes, seconds):.1f}'
                )
            panel.set_title(f'{part}, seconds')
            panel.set_xlabel(axis)
            panel.minorticks_off()
            panel.set_xticks(sizes, labels=sizes)
            panel.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def sizes(text: str) -> list[int]:
        return [int(n) for n in re.split(',', text)]

    parser.add_argument('--widths', type=sizes, default=[32, 64, 128, 256, 512])
    parser.add_argument('--kernels', type=sizes, default=[1, 3, 5, 7])
    parser.add_argument(
        '--rows',
        type=sizes,
        default=[256, 1024, 4096, 16384],
        help=f'output positions of a batch, in multiples of {SIDE**2}',
    )
    parser.add_argument('--turns', type=int, default=3)
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=list(FORMS))
    parser.add_argument('--out', type=Path, default=WORK / 'work_dirs/scaling')
    args = parser.parse_args()
    if any(rows % SIDE**2 for rows in args.rows):
        parser.error(f'--rows takes multiples of {SIDE**2}, the positions of one image')
    return args


def main() -> None:
    args = parse_args()
    width, kernel, rows = args.widths[len(args.widths) // 2], 3, args.rows[1 % len(args.rows)]
    jobs: dict[str, tuple[list[int], list[tuple[int, int, int]]]] = {
        'width': (args.widths, [(size, kernel, rows) for size in args.widths]),
        'kernel': (args.kernels, [(width, size, rows) for size in args.kernels]),
        'rows': (args.rows, [(width, kernel, size) for size in args.rows]),
    }
    results = {}
    for axis, (sizes, triples) in jobs.items():
        times_by_form: dict[str, list[dict[str, float]]] = {form: [] for form in args.forms}
        for channels, side, batch in tqdm(triples, desc=axis):
            for form in args.forms:
                parts = measure_parts(form, channels, side, batch, args.turns)
                times_by_form[form].append(parts)
        results[axis] = sizes, times_by_form
    args.out.mkdir(parents=True, exist_ok=True)
    text = '\n\n'.join(table(axis, *result) for axis, result in results.items())
    (args.out / 'scaling.md').write_text(text + '\n')
    (args.out / 'scaling.json').write_text(json.dumps(results, indent=1))
    draw(results, args.out / 'scaling.png')
    print(text)


if __name__ == '__main__':
    main()
