"""Closeness of low rank to exact inverses: rank, cosine and memory of each layer of a ResNet.

Trains a ResNet-18 on shapes with NKFAC. Then computes low-rank operators from the moments of each
layer, and compares their directions with those of exact inverses in float64.

    python tools/analysis_tools/accuracy.py --steps 60 --tolerances 0.1,0.01 --sketches 256,512
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mmprecond.curvature import INPUT, Factor, Layer, Sketch, Statistic
from mmprecond.datasets import make_shape_folders
from mmprecond.engine import launch
from mmprecond.linalg import LowRank, named_tensors
from mmprecond.optimizers import NKFAC
from mmprecond.preconditioners import NewtonKronecker
from mmprecond.preconditioners.base import Factors

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import WORK
from common.models import build_model
from common.tables import markdown
from common.timing import now


def images(folder: Path, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Images of shapes (n, 3, h, w) at about unit scale, and their classes."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    make_shape_folders(folder, images=count, size=size, progress=False)
    samples = [(pil_to_tensor(image), label) for image, label in ImageFolder(folder / 'train')]
    pixels, labels = zip(*samples, strict=True)
    return (torch.stack(pixels).float() - 127.5) / 64, torch.tensor(labels)


def train_model(args: argparse.Namespace) -> tuple[Any, NKFAC]:
    """Trains a ResNet-18 for some steps and keeps its gradients."""
    model: Any = build_model('resnet18')
    model.init_weights()
    optimizer = NKFAC(
        model,
        lr=args.lr,
        momentum=0.9,
        weight_decay=1e-4,
        input_factor='patch',
        rank_share=None,
        max_rows=None,
        stat_interval=args.stat_interval,
        refresh_interval=args.refresh_interval,
    )
    pixels, labels = images(args.data, 800, args.size)
    for _ in tqdm(range(args.steps + 1), unit='step'):
        chosen = torch.randint(len(pixels), (args.batch,))
        optimizer.zero_grad()
        features = model.extract_feat(pixels[chosen])
        F.cross_entropy(model.head(features), labels[chosen]).backward()
        if optimizer.t < args.steps:
            optimizer.step()
    optimizer.curvature.update(optimizer.t, optimizer.param_groups)
    return model, optimizer


def exact_direction(factors: Factors, gradient: Tensor) -> Tensor:
    """Direction by exact inverses in float64."""
    method = NewtonKronecker(solver='cholesky')
    doubled = {
        side: Factor(factor.form, (factor.tensor.double(),)) for side, factor in factors.items()
    }
    operators, succeeded = method.refresh(doubled, None)
    if not bool(succeeded.all()):
        raise RuntimeError('an exact inverse failed')
    return method.apply(operators, gradient.double())


def sketch_input_factor(layer: Layer, factors: Factors, rank: int) -> Factors:
    """Factors of a layer, with columns from a sketch of some rank for the input factor."""
    moment = factors[INPUT].tensor
    if moment.shape[-1] <= 2 * rank:
        return factors
    form = Sketch(rank)
    key = Statistic(INPUT, form).key
    test = form.test_matrix(layer, key, moment.shape[-1])
    columns = form.finalize((moment @ test,), [layer], key)
    return {**factors, INPUT: Factor(form, columns)}


def count_numbers(factors: Factors) -> int:
    return sum(factor.tensor.numel() for factor in factors.values())


def compare(optimizer: NKFAC, args: argparse.Namespace) -> dict[str, list[tuple[Any, ...]]]:
    """Rows by method: name of a layer, sides, columns, cosine, numbers kept, dense numbers."""
    method = NewtonKronecker(rank_share=None)
    rows_by_way: dict[str, list[tuple[Any, ...]]] = {}
    jobs = [
        (stack, k, member.layer)
        for stack in optimizer.curvature.stacks
        for k, member in enumerate(stack.members)
    ]
    for stack, k, layer in tqdm(jobs, unit='layer'):
        factors = stack.factors([k])
        gradient = layer.join(*(p.grad for p in layer.parameters))[None]
        reference = exact_direction(factors, gradient)
        ways: dict[str, tuple[Factors, NewtonKronecker]] = {
            f'tolerance {t:g}': (factors, replace(method, tolerance=t)) for t in args.tolerances
        }
        ways |= {
            f'sketch of {r}': (
                sketch_input_factor(layer, factors, r),
                NewtonKronecker(solver='cholesky'),
            )
            for r in args.sketches
        }
        for way, (way_factors, way_method) in ways.items():
            operators, _ = way_method.refresh(way_factors, None)
            direction = way_method.apply(operators, gradient)
            cosine = F.cosine_similarity(direction.double().flatten(), reference.flatten(), 0)
            columns = [
                operator.columns.shape[-1]
                for operator in operators.values()
                if isinstance(operator, LowRank)
            ]
            held = sum(tensor.numel() for tensor in named_tensors(operators).values())
            rows_by_way.setdefault(way, []).append(
                (
                    layer.name,
                    f'{layer.rows} x {layer.columns}',
                    columns,
                    float(cosine),
                    count_numbers(way_factors) + held,
                    2 * count_numbers(factors),
                )
            )
    return rows_by_way


def report(rows_by_way: dict[str, list[tuple[Any, ...]]]) -> str:
    """Formats a line for each method, then its worst layers."""
    cells = []
    for way, rows in rows_by_way.items():
        columns = [c for row in rows for c in row[2]]
        share = sum(row[4] for row in rows) / sum(row[5] for row in rows)
        column_range = f'{min(columns)}-{max(columns)}' if columns else '-'
        cells.append((way, column_range, f'{min(row[3] for row in rows):.6f}', f'{share:.2f}'))
    lines = [markdown(('way', 'columns kept', 'least cosine', 'numbers kept of dense'), cells)]
    for way, rows in rows_by_way.items():
        lines += ['', f'{way}: worst layers']
        lines += [
            f'  {row[0]} ({row[1]}): {row[2]} columns, cosine {row[3]:.6f}'
            for row in sorted(rows, key=lambda row: row[3])[:3]
        ]
    return '\n'.join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def numbers(text: str) -> list[float]:
        return [float(n) for n in text.split(',') if n]

    parser.add_argument('--steps', type=launch.count, default=60)
    parser.add_argument('--lr', type=float, default=0.01)
    parser.add_argument('--stat-interval', type=launch.count, default=20)
    parser.add_argument('--refresh-interval', type=launch.count, default=60)
    parser.add_argument('--tolerances', type=numbers, default=[0.1, 0.01])
    parser.add_argument(
        '--sketches', type=lambda text: [int(n) for n in numbers(text)], default=[256, 512]
    )
    parser.add_argument('--batch', type=launch.count, default=16)
    parser.add_argument('--size', type=launch.count, default=112)
    parser.add_argument('--data', type=Path, default=WORK / 'data/accuracy')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with launch.one_line_errors():
        start = now()
        _, optimizer = train_model(args)
        print(report(compare(optimizer, args)))
        print(f'\n{args.steps} steps at {args.size} px, batch {args.batch}; {now() - start:.0f} s')


if __name__ == '__main__':
    main()
