"""Forecasts the cost of an optimizer on a config's model, before training.

    python -m mmprecond.diagnostics CONFIG --precondition AFOpt+NKFAC --batch 2 --size 800 1333

Prints a table of the model's stages, or of all layers, with their memory and with the
floating-point operations of each step, of a step that measures statistics, and of a refresh. The
forecast takes one forward pass on noise. Frozen layers cost nothing. `--suggest` compares settings.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .core import LayerStack
from .core.cost import LayerCost, measured_costs
from .core.overview import aligned, stage_of
from .core.report import describe_methods
from .curvature import Capture, Layer
from .engine import attach, launch, use_optimizer
from .engine.synthetic import random_model, synthetic_batch
from .optimizers import PreconditionedOptimizer

HEADERS = (
    'preconditioner',
    'calls',
    'MB',
    'step GFLOP',
    'capture GFLOP',
    'refresh GFLOP',
    '% of price',
)
#: Settings that may lower the price, which `--suggest` compares.
SUGGESTIONS: tuple[dict[str, Any], ...] = (
    dict(input_factor='kernel'),
    dict(max_rows=128),
    dict(rank_share=1 / 32),
    dict(stat_interval=100, refresh_interval=1000),
    dict(oversize='lowrank', max_dim=512, max_rank=64),
)


def forecast(
    model: nn.Module, layers: Mapping[Layer, LayerStack], capture: Capture, batch: dict[str, Any]
) -> tuple[dict[Layer, LayerCost], float]:
    """Costs by layer, and the FLOPs of the model's own forward and backward pass.

    Args:
        model: The model.
        layers: Its layers and their stacks; frozen ones cost nothing.
        capture: Capture of the layers.
        batch: Arguments of the model's forward pass.
    """
    trained = {layer: stack for layer, stack in layers.items() if layer.weight.requires_grad}
    counter = FlopCounterMode(display=False)
    with measured_costs(trained, capture) as costs, torch.no_grad(), counter:
        model(**batch, mode='loss')
    return costs, 3.0 * counter.get_total_flops()


def amortised(layers: Mapping[Layer, LayerStack], costs: Mapping[Layer, LayerCost]) -> float:
    """FLOPs per step, with captures and refreshes averaged over their intervals."""
    return sum(cost.per_step(layers[layer].method) for layer, cost in costs.items())


def table(
    layers: Mapping[Layer, LayerStack], costs: Mapping[Layer, LayerCost], whole: bool = False
) -> str:
    """Forecast by stage, or by layer if `whole`, the dearest first."""
    price = amortised(layers, costs)
    groups: dict[str, list[Layer]] = {}
    for layer in costs:
        name = layer.name.removesuffix('.weight') if whole else stage_of(layer.name)
        groups.setdefault(name, []).append(layer)
    shares = {
        name: amortised(layers, {layer: costs[layer] for layer in members}) / max(price, 1e-9)
        for name, members in groups.items()
    }
    rows = []
    for name in sorted(shares, key=lambda name: -shares[name]):
        members = groups[name]
        methods = Counter(layers[layer].method.title for layer in members)
        words = ', '.join(f'{m} x {n}' if len(members) > 1 else m for m, n in methods.items())
        sums = [
            sum(getattr(costs[layer], key) for layer in members)
            for key in ('calls', 'megabytes', 'apply', 'capture', 'refresh')
        ]
        gigaflops = (f'{flops / 1e9:.3f}' for flops in sums[2:])
        share = f'{100 * shares[name]:.1f}'
        rows.append((name, words, str(sums[0]), f'{sums[1]:.1f}', *gigaflops, share))
    rows.insert(0, ('layer' if whole else 'stage', *HEADERS))
    return '\n'.join(aligned(rows, left=2))


def totals(layers: Mapping[Layer, LayerStack], costs: Mapping[Layer, LayerCost], own: float) -> str:
    """Sentence with the sums over all layers; `own` is the number of the model's FLOPs per step."""
    apply, capture, refresh, held = (
        sum(getattr(cost, key) for cost in costs.values())
        for key in ('apply', 'capture', 'refresh', 'megabytes')
    )
    share = amortised(layers, costs) / own if own else float('nan')
    parts = ', '.join(
        f'a {what} {flops / 1e9:,.1f}'
        for what, flops in (('step', apply), ('capture', capture), ('refresh', refresh))
    )
    return (
        f'forward and backward pass: {own / 1e9:,.1f} GFLOP; preconditioning adds '
        f'{100 * share:.1f} % of that a step, its intervals averaged ({parts} GFLOP); '
        f'{held:,.0f} MB of statistics and operators'
    )


def suggestions(
    model: nn.Module,
    layers: Mapping[Layer, LayerStack],
    capture: Capture,
    batch: dict[str, Any],
    own: float,
) -> list[str]:
    """Lines with a setting each, and the price with it, the lowest first."""
    found = []
    for settings in SUGGESTIONS:
        changed = {layer: _with_settings(layer, stack, settings) for layer, stack in layers.items()}
        if all(changed[layer] is stack for layer, stack in layers.items()):
            continue
        costs, _ = forecast(model, changed, capture, batch)
        text = ', '.join(f'{key}={value!r}' for key, value in settings.items())
        held = sum(cost.megabytes for cost in costs.values())
        found.append((amortised(changed, costs) / own, f'{text}: ', held))
    return [f'{text}{100 * share:.1f} %, {held:,.0f} MB' for share, text, held in sorted(found)]


def _with_settings(layer: Layer, stack: LayerStack, settings: dict[str, Any]) -> LayerStack:
    """The stack of a layer under other settings; the same one if the method does not take them."""
    if not set(settings) <= set(stack.method.options()):
        return stack
    try:
        other = LayerStack(replace(stack.method, **settings), layer, stack.owner)
    except ValueError:  # of settings that do not go together
        return stack
    return other if other.kept else stack


def intro(args: argparse.Namespace, model: nn.Module, layers: Mapping[Layer, LayerStack]) -> str:
    """Line with the model, the batch, the device, and the methods with their intervals."""
    trained = {layer: stack for layer, stack in layers.items() if layer.weight.requires_grad}
    methods = '; '.join(describe_methods(trained))
    return (
        f'{type(model).__name__}, batch {args.batch} of {args.size[0]} x {args.size[1]} px, on '
        f'{next(model.parameters()).device}: {methods}'
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
    parser.add_argument('--layers', action='store_true', help='a row for each layer')
    parser.add_argument(
        '--suggest', action='store_true', help='compare settings that may lower the price'
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
        layers, capture = optimizer.curvature.layers, optimizer.curvature.capture
        costs, own = forecast(model, layers, capture, batch)
        print(intro(args, model, layers), totals(layers, costs, own), '', sep='\n')
        print(table(layers, costs, args.layers))
        if args.suggest:
            lines = suggestions(model, layers, capture, batch, own)
            print('\nwith other settings, preconditioning adds:', *lines, sep='\n  ')


if __name__ == '__main__':
    main()
