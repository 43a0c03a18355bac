"""Draws, by stage of a model, what an optimizer covers, its cost and its memory.

    python tools/analysis_tools/model_report.py CONFIG --precondition AFOpt+NKFAC --size 800 1333

One picture has three bars for each stage: its parameters, the FLOPs that preconditioning adds to a
step as a share of the forward and backward pass, and the memory of statistics and operators. The
numbers are those of `python -m mmprecond.diagnostics`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from textwrap import wrap
from typing import Any

from torch import nn

from mmprecond import diagnostics
from mmprecond.core import LayerStack
from mmprecond.core.cost import LayerCost
from mmprecond.core.overview import stage_of
from mmprecond.curvature import Layer
from mmprecond.engine import forecast_inputs, launch

#: Largest number of stages in a picture; the smallest of more are summed in one.
SHOWN = 25
#: Characters of a line of the title.
WIDTH = 140
#: Parts of each bar, with their colours.
PARAMETERS = {'covered': 'C0', 'plain': 'C1', 'frozen': 'lightgrey'}
PRICE = {'step': 'C0', 'capture': 'C2', 'refresh': 'C3'}
LABELS = {'plain': 'plain rule', 'capture': 'captures', 'refresh': 'refreshes'}


@dataclass
class Stage:
    """Numbers of a stage of the model.

    Attributes:
        name: Name of the stage.
        covered: Number of trained parameters with a preconditioner.
        plain: Number of trained parameters that take the plain rule.
        frozen: Number of parameters that are not trained.
        step: FLOPs of every step.
        capture: FLOPs of captures, averaged over their interval.
        refresh: FLOPs of refreshes, averaged over their interval.
        megabytes: Memory of statistics and operators.
    """

    name: str
    covered: int = 0
    plain: int = 0
    frozen: int = 0
    step: float = 0.0
    capture: float = 0.0
    refresh: float = 0.0
    megabytes: float = 0.0

    def add(self, other: Stage) -> None:
        """Adds the numbers of another stage."""
        for field in fields(self)[1:]:
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def by_stage(
    model: nn.Module, layers: Mapping[Layer, LayerStack], costs: Mapping[Layer, LayerCost]
) -> list[Stage]:
    """Returns the stages in the model's order.

    Args:
        model: The model.
        layers: Its layers and their stacks.
        costs: Costs of the layers that are trained (see `mmprecond.diagnostics.forecast`).
    """
    covered = {p for layer in layers for p in layer.parameters}
    stages: dict[str, Stage] = {}
    for name, parameter in model.named_parameters():
        stage = stage_of(name.rpartition('.')[0] or name)
        row = stages.setdefault(stage, Stage(stage))
        if not parameter.requires_grad:
            row.frozen += parameter.numel()
        elif parameter in covered:
            row.covered += parameter.numel()
        else:
            row.plain += parameter.numel()
    for layer, cost in costs.items():
        stage, method = stage_of(layer.name), layers[layer].method
        stages.setdefault(stage, Stage(stage)).add(
            Stage(
                stage,
                step=cost.apply,
                capture=cost.capture / method.capture_interval,
                refresh=cost.refresh / method.refresh_interval,
                megabytes=cost.megabytes,
            )
        )
    return list(stages.values())


def fold(stages: Sequence[Stage], shown: int = SHOWN) -> list[Stage]:
    """Returns the largest stages in their order, and the sum of the others as the last one."""
    if len(stages) <= shown:
        return list(stages)

    def size(stage: Stage) -> float:
        return stage.covered + stage.plain + stage.frozen

    large = sorted(stages, key=size, reverse=True)[: shown - 1]
    rest = Stage(f'{len(stages) - len(large)} smaller stages')
    for stage in stages:
        if stage not in large:
            rest.add(stage)
    return [stage for stage in stages if stage in large] + [rest]


def share_covered(stages: Sequence[Stage]) -> str:
    """Returns the model's number of parameters and the share that is preconditioned."""
    covered, plain, frozen = (sum(getattr(s, key) for s in stages) for key in PARAMETERS)
    share = 100 * covered / max(1, covered + plain)
    return (
        f'{(covered + plain + frozen) / 1e6:.2f} M parameters, {frozen / 1e6:.2f} M of them '
        f'frozen, {share:.1f} % of the others covered'
    )


def draw(stages: Sequence[Stage], own: float, title: Sequence[str], path: Path) -> None:
    """Writes the picture.

    Args:
        stages: The stages.
        own: FLOPs of the model's forward and backward pass.
        title: Lines of the title.
        path: Path of the PNG file.
    """
    from matplotlib.figure import Figure

    shown = fold(stages)
    lines = [line for text in title for line in wrap(text, WIDTH)]
    height = 1.5 + 0.3 * max(4, len(shown)) + 0.2 * len(lines)
    figure = Figure(figsize=(13, height), layout='constrained')
    panels = figure.subplots(1, 3, sharey=True)
    millions = {key: [getattr(s, key) / 1e6 for s in shown] for key in PARAMETERS}
    percents = {key: [100 * getattr(s, key) / max(own, 1.0) for s in shown] for key in PRICE}
    held = {'megabytes': [s.megabytes for s in shown]}
    _bars(panels[0], shown, millions, PARAMETERS, 'million parameters')
    _bars(panels[1], shown, percents, PRICE, '% of the forward and backward pass')
    _bars(panels[2], shown, held, {'megabytes': 'C0'}, 'MB')
    panels[0].invert_yaxis()
    for axes, heading in zip(panels, ('Parameters', 'Price of a step', 'Memory'), strict=True):
        axes.set_title(heading, pad=22)
    figure.suptitle('\n'.join(lines), fontsize='medium')
    figure.savefig(path, dpi=120)


def _bars(
    axes: Any,
    stages: Sequence[Stage],
    parts: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
    unit: str,
) -> None:
    """Draws a stacked bar for each stage, with its sum at the end."""
    names, ends = [stage.name for stage in stages], [0.0] * len(stages)
    for part, colour in colours.items():
        bars = axes.barh(names, parts[part], left=ends, color=colour, label=LABELS.get(part, part))
        ends = [end + value for end, value in zip(ends, parts[part], strict=True)]
    axes.bar_label(bars, [_short(end) for end in ends], padding=3, fontsize='small')
    axes.margins(x=0.16, y=0.01)
    axes.set_xlabel(unit)
    axes.spines[['top', 'right']].set_visible(False)
    if len(colours) > 1:
        place = dict(loc='lower center', bbox_to_anchor=(0.5, 1.0), ncols=len(colours))
        axes.legend(**place, fontsize='small', frameon=False)


def _short(value: float) -> str:
    """A number with three digits."""
    return '< 0.01' if 0 < value < 0.01 else f'{value:.3g}' if value < 1000 else f'{value:,.0f}'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    forecast_inputs.add_arguments(parser)
    parser.add_argument(
        '--out',
        type=Path,
        help='path of the PNG file; default: work_dirs/model_report/CONFIGNAME.png',
    )
    args = parser.parse_args()
    name = f'{launch.config_name(args.config)}.png'
    args.out = args.out or Path('work_dirs/model_report') / name
    if args.out.suffix.lower() != '.png':
        parser.error(f'--out {args.out} is no PNG file; give a path that ends in .png')
    return args


def main() -> None:
    args = parse_args()
    with launch.one_line_errors():
        model, optimizer, images, size = forecast_inputs.build(args)
        layers, capture = optimizer.curvature.layers, optimizer.curvature.capture
        batch, costs, own = diagnostics.forecast_on_noise(model, layers, capture, images, size)
        line = diagnostics.totals(layers, costs, own)
        stages = by_stage(model, layers, costs)
        lines = (
            f'{launch.config_name(args.config)}: {share_covered(stages)}',
            diagnostics.intro(model, layers, costs, batch),
            line,
        )
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            draw(stages, own, lines, args.out)
        except OSError as error:
            raise ValueError(f'cannot write {args.out}: {error.strerror}; see --out') from error
    print(args.out, line, sep='\n')


if __name__ == '__main__':
    main()
