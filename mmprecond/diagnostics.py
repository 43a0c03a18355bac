"""Forecasts the cost of an optimizer on a config's model, before training.

    python -m mmprecond.diagnostics CONFIG --precondition AFOpt+NKFAC --batch 2 --size 800 1333

Prints a table of all layers with their memory and with the floating-point operations of each step,
of a step that measures statistics, and of a refresh. The forecast takes one forward pass on noise.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .core import Curvature
from .core.cost import LayerCost, measured_costs
from .curvature import Layer
from .engine import attach, launch, use_optimizer
from .engine.synthetic import random_model, synthetic_batch
from .optimizers import PreconditionedOptimizer

HEADERS = ('layer', 'preconditioner', 'calls', 'MB', 'step GFLOP', 'capture GFLOP', 'refresh GFLOP')


def forecast(
    model: nn.Module, curvature: Curvature, batch: dict[str, Any]
) -> tuple[dict[Layer, LayerCost], float]:
    """Costs by layer, and the FLOPs of the model's own forward and backward pass."""
    counter = FlopCounterMode(display=False)
    with measured_costs(curvature.layers, curvature.capture) as costs, torch.no_grad(), counter:
        model(**batch, mode='loss')
    return costs, 3.0 * counter.get_total_flops()


def amortised(curvature: Curvature, costs: dict[Layer, LayerCost]) -> float:
    """FLOPs per step, with captures and refreshes averaged over their intervals."""
    return sum(costs[layer].per_step(stack.method) for layer, stack in curvature.layers.items())


def table(curvature: Curvature, costs: dict[Layer, LayerCost], own: float) -> str:
    """Formats the forecast as text; `own` is the number of the model's FLOPs per step."""
    rows = [HEADERS, *(_row(cost.name.removesuffix('.weight'), cost) for cost in costs.values())]
    total = LayerCost(
        'all',
        '',
        *(
            sum(getattr(cost, name) for cost in costs.values())
            for name in ('megabytes', 'apply', 'refresh', 'capture', 'calls')
        ),
    )
    rows.append(_row('all', total))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        '  '.join(
            cell.ljust(w) if k < 2 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    share = amortised(curvature, costs) / own if own else float('nan')
    lines.append(
        f'forward and backward pass: {own / 1e9:,.1f} GFLOP; preconditioning adds '
        f'{100 * share:.1f} % of that a step, its intervals averaged'
    )
    return '\n'.join(lines)


def _row(name: str, cost: LayerCost) -> tuple[str, ...]:
    return (
        name,
        cost.method,
        str(cost.calls),
        f'{cost.megabytes:.1f}',
        *(f'{flops / 1e9:.3f}' for flops in (cost.apply, cost.capture, cost.refresh)),
    )


def build(cfg: Any) -> tuple[nn.Module, PreconditionedOptimizer]:
    """Builds the model of a config, with random weights, and its optimizer."""
    from mmengine.optim import build_optim_wrapper

    model = random_model(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    if not isinstance(optimizer, PreconditionedOptimizer):
        raise ValueError(
            f'the config trains with {type(optimizer).__name__}, which has no '
            'preconditioner; add one by --precondition AFOpt+NKFAC, or choose one of ours by '
            '--optimizer NAME'
        )
    return model, optimizer


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog='python -m mmprecond.diagnostics', description=__doc__.splitlines()[0]
    )
    parser.add_argument('config', help='a config file, or mmdet::FOLDER/NAME.py')
    parser.add_argument(
        '--optimizer',
        metavar='NAME',
        help="forecast for this optimizer of mmprecond in place of the config's",
    )
    launch.add_precondition(parser)
    parser.add_argument('--batch', type=launch.count, default=2, help='images; default: 2')
    parser.add_argument(
        '--size',
        type=launch.count,
        nargs=2,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
        help='default: 224 224',
    )
    launch.add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Prints the forecast."""
    args = parse_args()
    with launch.one_line_errors():
        launch.check_mmcv()
        cfg = launch.load_config(args.config)
        if args.optimizer:
            use_optimizer(cfg, args.optimizer)
        if args.precondition:
            attach(cfg, args.precondition)
        if args.cfg_options:
            cfg.merge_from_dict(args.cfg_options)
        model, optimizer = build(cfg)
        batch = synthetic_batch(model, args.batch, tuple(args.size))
        curvature = optimizer.curvature
        print(table(curvature, *forecast(model, curvature, batch)))


if __name__ == '__main__':
    main()
