"""Forecasts the cost of an optimizer on a config's model, before training.

    python -m mmprecond.diagnostics CONFIG --precondition AFOpt+NKFAC --batch 2 --size 800 1333

Prints a table of the model's stages, or of all layers, with their memory and with the
floating-point operations of each step, of a step that measures statistics, and of a refresh. The
forecast takes one forward pass on noise. Frozen layers cost nothing. `--suggest` compares settings.
`--suggest-lr` finds the largest stable learning rate on the training data instead. The command
needs MMEngine; the functions need only torch, except `forecast_on_noise`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .checks import first_line
from .core import LayerStack
from .core.cost import LayerCost, measured_costs
from .core.overview import stage_of
from .core.report import describe_methods
from .curvature import Capture, Layer

logger = logging.getLogger('mmprecond')

HEADERS = (
    'preconditioner',
    'calls',
    'MB',
    'step GFLOP',
    'capture GFLOP',
    'refresh GFLOP',
    '% of cost',
)
#: Settings that may lower the cost, which `--suggest` compares.
SUGGESTIONS: tuple[dict[str, Any], ...] = (
    dict(input_factor='kernel'),
    dict(max_rows=128),
    dict(rank_share=1 / 32),
    dict(max_columns=64),
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
        batch: Arguments of the model's forward, such as inputs, labels and mode. With mode='tensor'
            layers that the pass does not call are left out.
    """
    trained = {layer: stack for layer, stack in layers.items() if layer.weight.requires_grad}
    counter = FlopCounterMode(display=False)
    with measured_costs(trained, capture) as costs, torch.no_grad(), counter:
        model(**batch)
    if batch.get('mode') == 'tensor':
        costs = {layer: cost for layer, cost in costs.items() if cost.calls or cost.capture}
    return costs, 3.0 * counter.get_total_flops()


def forecast_on_noise(
    model: nn.Module,
    layers: Mapping[Layer, LayerStack],
    capture: Capture,
    images: int,
    size: Sequence[int] | None = None,
) -> tuple[dict[str, Any], dict[Layer, LayerCost], float]:
    """Forecast on a batch of noise, without the loss if the loss does not take noise.

    Args:
        model: A model derived from MMEngine's `BaseModel`.
        layers: Its layers and their stacks.
        capture: Capture of the layers.
        images: Number of images.
        size: Their height and width; None takes those that the model is made for, else 224 x 224.

    Returns:
        The batch with its mode, and what `forecast` returns.

    Raises:
        ValueError: If the model's forward does not take such a batch.
    """
    from .engine.synthetic import batch_without_loss, own_size, synthetic_batch

    failures: list[Exception] = []
    height, width = size or own_size(model)
    torch.manual_seed(0)  # proposals, and so the cost of their heads, depend on the noise
    for make in (synthetic_batch, batch_without_loss):
        # A model raises errors of any kind on data that are not its own.
        try:
            batch = make(model, images, (height, width))
            costs, own = forecast(model, layers, capture, batch)
        except Exception as error:
            failures.append(error)
            continue
        if failures:
            logger.warning('The loss takes no batch of noise (%s)', first_line(failures[0]))
        return batch, costs, own
    raise ValueError(
        f'{type(model).__name__} takes no batch of noise ({first_line(failures[0])}); give '
        'another --batch or --size, or call mmprecond.diagnostics.forecast with a batch of your '
        'data'
    ) from failures[0]


def amortised(layers: Mapping[Layer, LayerStack], costs: Mapping[Layer, LayerCost]) -> float:
    """FLOPs per step, with captures and refreshes averaged over their intervals."""
    return sum(cost.per_step(layers[layer].method) for layer, cost in costs.items())


def table(
    layers: Mapping[Layer, LayerStack], costs: Mapping[Layer, LayerCost], whole: bool = False
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers, and a row for each stage, or for each layer if `whole`, the most expensive first."""
    total = amortised(layers, costs)
    groups: dict[str, list[Layer]] = {}
    for layer in costs:
        name = layer.name.removesuffix('.weight') if whole else stage_of(layer.name)
        groups.setdefault(name, []).append(layer)
    shares = {
        name: amortised(layers, {layer: costs[layer] for layer in members}) / max(total, 1e-9)
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
    return ('layer' if whole else 'stage', *HEADERS), rows


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
    costs: Mapping[Layer, LayerCost],
    own: float,
) -> list[str]:
    """Lines with a setting each, and the cost with it, the lowest first.

    A setting that saves neither a hundredth of the FLOPs nor of the memory is left out.
    """
    found = []
    most = 0.99 * amortised(layers, costs) / own
    most_held = 0.99 * sum(cost.megabytes for cost in costs.values())
    for settings in SUGGESTIONS:
        changed = {layer: _with_settings(layer, stack, settings) for layer, stack in layers.items()}
        if all(changed[layer] is stack for layer, stack in layers.items()):
            continue
        lower, _ = forecast(model, changed, capture, batch)
        text = ', '.join(f'{key}={value!r}' for key, value in settings.items())
        held = sum(cost.megabytes for cost in lower.values())
        share = amortised(changed, lower) / own
        if share < most or held < most_held:
            found.append((share, f'{text}: ', held))
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


def intro(
    model: nn.Module,
    layers: Mapping[Layer, LayerStack],
    costs: Mapping[Layer, LayerCost],
    batch: Mapping[str, Any],
) -> str:
    """Line with the model, the batch, the device, and the methods with their intervals."""
    images = next(value for value in batch.values() if isinstance(value, Tensor))
    methods = '; '.join(describe_methods({layer: layers[layer] for layer in costs}))
    partial = batch.get('mode') == 'tensor'
    note = '; forward without the loss: layers used only in training are not counted'
    return (
        f'{type(model).__name__}, batch {len(images)} of {images.shape[-2]} x {images.shape[-1]} '
        f'px, on {images.device}: {methods}{note if partial else ""}'
    )


def parse_args() -> argparse.Namespace:
    """Parses the command line."""
    from .engine import forecast_inputs

    parser = argparse.ArgumentParser(
        prog=sys.argv[0]
        if sys.argv[0].startswith('mmprecond ')
        else 'python -m mmprecond.diagnostics',
        description=__doc__.splitlines()[0],
    )
    forecast_inputs.add_arguments(parser)
    parser.add_argument('--layers', action='store_true', help='a row for each layer')
    parser.add_argument(
        '--suggest', action='store_true', help='compare settings that may lower the cost'
    )
    parser.add_argument(
        '--suggest-lr',
        action='store_true',
        help='find the largest stable learning rate in the first steps on the training data, in '
        'place of the forecast',
    )
    args = parser.parse_args()
    if args.suggest_lr and (args.layers or args.suggest or args.batch or args.size):
        parser.error(
            '--suggest-lr takes the training data: leave out --batch, --size, --layers, --suggest'
        )
    return args


def main() -> None:
    """Prints the forecast, or the largest stable rate."""
    if find_spec('mmengine') is None:
        sys.exit(
            'the forecast takes an MMEngine config, and MMEngine is not installed: run '
            '`pip install onedl-mmengine` or `pip install mmengine`; in plain PyTorch, '
            'print(optimizer.report()) shows the layers, the memory and the cost'
        )
    from .engine import forecast_inputs, launch
    from .engine.console import print_table

    args = parse_args()
    with launch.one_line_errors():
        if args.suggest_lr:
            from .engine import stable_rates

            print(stable_rates.suggest(args))
            return
        model, optimizer, images, size = forecast_inputs.build(args)
        layers, capture = optimizer.curvature.layers, optimizer.curvature.capture
        batch, costs, own = forecast_on_noise(model, layers, capture, images, size)
        print(intro(model, layers, costs, batch), totals(layers, costs, own), '', sep='\n')
        print_table(*table(layers, costs, args.layers), left=2)
        if args.suggest:
            lines = suggestions(model, layers, capture, batch, costs, own)
            lines = lines or ['no less with any of the settings compared']
            print('\nwith other settings, preconditioning adds:', *lines, sep='\n  ')


if __name__ == '__main__':
    main()
