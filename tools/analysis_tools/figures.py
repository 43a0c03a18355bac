"""Figures like the thesis's, from short trainings or random matrices: a picture and a CSV each.

    python tools/analysis_tools/figures.py change     # change of statistics (figure 3.1)
    python tools/analysis_tools/figures.py newton     # residual of Newton's iteration (figure 3.2)
    python tools/analysis_tools/figures.py inversion  # time and error of inverses (table 3.3)
    python tools/analysis_tools/figures.py shares     # share of inversions in time (figure 3.6)
    python tools/analysis_tools/figures.py partial    # time and memory of SGD-PH (section 2.4.1)
    python tools/analysis_tools/figures.py accuracy CONFIG --optimizers SGD,NKFAC
                                                      # loss and accuracy (figures 2.5, 3.3, 4.4)

The files are KIND.png and KIND.csv in the folder --out. `accuracy` trains a classifier's config
with each optimizer, or reads the work folders that it is given.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis_tools import figure_data
from analysis_tools.figure_data import Row
from common import ROOT, WORK
from common.logs import Curves, log_files
from common.tables import markdown

#: Most lines of a panel with a legend.
MOST_NAMED = 12


def write(rows: Sequence[Row], path: Path) -> None:
    """Writes rows as CSV."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def draw(
    rows: Sequence[Row], panels: Sequence[tuple[str, str]], path: Path, log: Sequence[str] = ()
) -> None:
    """Plots one panel for each pair of a horizontal and a vertical quantity, a line for each group.

    Args:
        rows: Data; 'line' names the group.
        panels: Names of the quantities.
        path: File of the picture.
        log: Quantities with a logarithmic axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.6), layout='constrained')
    for panel, (x, y) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for line in dict.fromkeys(row['line'] for row in rows):
            points = [row for row in rows if row['line'] == line and {x, y} <= set(row)]
            if points:
                panel.plot(
                    *zip(*((p[x], p[y]) for p in points), strict=True), marker='.', label=line
                )
        panel.set(xlabel=x, ylabel=y)
        panel.set_xscale('log' if x in log else 'linear')
        panel.set_yscale('log' if y in log else 'linear')
        panel.grid(alpha=0.3)
        if len(panel.lines) <= MOST_NAMED:
            panel.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def accuracy(args: argparse.Namespace) -> list[Row]:
    """Training and validation accuracy of runs, which are trained first if a config is given."""
    folders = [Path(source) for source in args.sources if Path(source).is_dir()]
    configs = [source for source in args.sources if not Path(source).is_dir()]
    for config in configs:
        for name in args.optimizers.split(','):
            folder = args.out / f'{Path(config).stem}_{name}'
            _train(config, name, folder, args)
            folders.append(folder)
    rows: list[Row] = []
    for folder in folders:
        curves = Curves()
        files = log_files(folder)
        if not files:
            sys.exit(f'{folder} has no log of a training (*/vis_data/scalars.json)')
        for file in files:
            curves.read(file)
        rows += _points(folder.name, curves)
    return rows


def _train(config: str, name: str, folder: Path, args: argparse.Namespace) -> None:
    command = [sys.executable, str(ROOT / 'tools/train.py'), config, '--work-dir', str(folder)]
    command += ['--optimizer', name, '--cfg-options', 'model.head.cal_acc=True', *args.options]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f'the training with {name} failed; its log is in {folder}')


def _points(line: str, curves: Curves) -> list[Row]:
    """Rows of one run: the loss and each accuracy by iterations and seconds of training."""
    series = {'loss': curves.losses, **curves.training, **curves.scores}
    names = {'accuracy_top-1': 'training accuracy', 'accuracy/top1': 'validation accuracy'}
    return [
        {'line': line, 'iteration': step, 'seconds': seconds, names.get(name, name): value}
        for name, points in series.items()
        for step, seconds, value in points
    ]


#: By name: the data, the panels, and quantities with a logarithmic axis.
FIGURES: dict[str, tuple[Callable[[argparse.Namespace], list[Row]], list[tuple[str, str]], str]] = {
    'change': (
        figure_data.change,
        [('step', 'change of L'), ('step', 'change of R'), ('step', 'change of inverses')],
        'change of L,change of R,change of inverses',
    ),
    'newton': (figure_data.newton, [('iteration', 'residual')], 'residual'),
    'inversion': (
        figure_data.inversion,
        [('size', 'seconds'), ('damping', 'error'), ('damping', 'seconds')],
        'size,seconds,damping,error',
    ),
    'shares': (figure_data.shares, [('optimizer', 'seconds')], ''),
    'partial': (figure_data.partial, [('interval', 'time'), ('interval', 'memory')], 'interval'),
    'accuracy': (
        accuracy,
        [
            (x, y)
            for y in ('loss', 'training accuracy', 'validation accuracy')
            for x in ('iteration', 'seconds')
        ],
        '',
    ),
}


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(',')]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=WORK / 'work_dirs/figures', help='folder')
    kinds = parser.add_subparsers(dest='figure', required=True)
    parts = {
        name: kinds.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        for name in FIGURES
    }
    parts['change'].add_argument('--steps', type=int, default=200)
    parts['change'].add_argument('--stat-interval', type=int, default=20)
    parts['newton'].add_argument('--size', type=int, default=1024)
    parts['newton'].add_argument('--perturbations', type=_numbers, default=[0.1, 0.05, 0.01])
    parts['newton'].add_argument('--iterations', type=int, default=10)
    parts['inversion'].add_argument('--sizes', type=_numbers, default=[128, 256, 512, 1024])
    parts['inversion'].add_argument('--dampings', type=_numbers, default=[0.1, 0.01, 1e-3, 1e-4])
    parts['shares'].add_argument('--steps', type=int, default=100)
    parts['shares'].add_argument('--stat-interval', type=int, default=20)
    parts['shares'].add_argument('--refresh-interval', type=int, default=40)
    parts['partial'].add_argument('--intervals', type=_numbers, default=[1, 2, 5, 10])
    parts['partial'].add_argument('--steps', type=int, default=10)
    parts['partial'].add_argument('--size', type=int, default=32, help='pixels of the images')
    parts['accuracy'].add_argument('sources', nargs='+', help='a config, or work folders')
    parts['accuracy'].add_argument('--optimizers', default='SGD,NKFAC', help='of a config')
    parts['accuracy'].add_argument(
        '--options', nargs='+', default=[], metavar='KEY=VALUE', help='for --cfg-options'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    make, panels, log = FIGURES[args.figure]
    rows = make(args)
    write(rows, args.out / f'{args.figure}.csv')
    draw(rows, panels, args.out / f'{args.figure}.png', log.split(','))
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = rows if len(rows) <= 40 else [*rows[:3], *rows[-3:]]
    print(markdown(names, [[_cell(row.get(name, '')) for name in names] for row in shown]))
    print(f'in {args.out}: {args.figure}.png, {args.figure}.csv')


def _cell(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
    main()
