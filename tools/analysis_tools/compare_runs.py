"""Compares finished or running trainings from MMEngine's own logs.

Reads the work folders of tools/train.py (or of MMDetection's and MMPretrain's own tools), and
writes report.md and report.html. The reports have final scores (beside those of the thesis if the
config names them), curves of loss and scores against iterations and seconds, the differences
between the configs, and the machines.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.logs import Curves, log_files
from paper.rows import departures, plain, row_of

TEMPLATES = Path(__file__).resolve().parent / 'templates'
#: Scores in a table row of the paper, by their names in the log: for boxes, and for masks too.
BOX = {
    'AP': 'coco/bbox_mAP',
    'AP50': 'coco/bbox_mAP_50',
    'AP75': 'coco/bbox_mAP_75',
    'APs': 'coco/bbox_mAP_s',
    'APm': 'coco/bbox_mAP_m',
    'APl': 'coco/bbox_mAP_l',
}
MASK = {
    'APb': 'coco/bbox_mAP',
    'APb50': 'coco/bbox_mAP_50',
    'APb75': 'coco/bbox_mAP_75',
    'APm': 'coco/segm_mAP',
    'APm50': 'coco/segm_mAP_50',
    'APm75': 'coco/segm_mAP_75',
}
TOP_1 = {'top1': 'accuracy/top1'}  # in per cent already
#: Scores with a curve, if a run has them.
HEADLINES = ('coco/bbox_mAP', 'coco/segm_mAP', 'accuracy/top1')
MACHINE = (
    'Python',
    'GPU 0',
    'GPU 0,1,2,3,4,5,6,7',
    'CUDA available',
    'PyTorch',
    'MMEngine',
    'Distributed training',
    'GPU number',
)
#: Parts of a config that do not concern the method.
UNINTERESTING = ('work_dir', 'resume', 'load_from', 'launcher', 'visualizer', 'vis_backends')


@dataclass
class Run(Curves):
    """One training run, read from its folder.

    Attributes:
        name: Name of the folder.
        losses, scores, memory: See `Curves`.
        config: The config with dotted keys.
        paper: The `paper` entry of the config.
        machine: Information on the machine in the log.
        notes: Notes for the reader on how the run was read.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def optimizer(self) -> str:
        return str(self.config.get('optim_wrapper.optimizer.type', 'unknown'))

    @property
    def source(self) -> str:
        """Part of the thesis that the run is compared with."""
        return ' '.join(
            f'{key} {self.paper[key]}' for key in ('table', 'chapter') if key in self.paper
        )

    def against_paper(self) -> list[tuple[str, float, float]]:
        """Names of scores, with this run's value and the published one, in per cent."""
        result = self.paper.get('result', {})
        names = TOP_1 if 'top1' in result else MASK if 'APb' in result else BOX
        unit = 1 if names is TOP_1 else 100
        scores = [
            (name, self.last(names[name]), value) for name, value in result.items() if name in names
        ]
        return [(name, unit * score, value) for name, score, value in scores if score is not None]


def read_run(folder: Path) -> Run:
    """Reads a work folder; of a resumed run's several logs the later ones count.

    Raises:
        ValueError: If the folder has no logs of MMEngine.
    """
    files = log_files(folder)
    if not files:
        raise ValueError(
            f'{folder} has no */vis_data/scalars.json; give the work folder of a '
            'training by MMEngine'
        )
    run = Run(folder.name)
    for file in files:
        run.read(file)
    for log in sorted(folder.glob('*/*.log'))[-1:]:
        run.machine = _read_machine(log)
    dumped = files[-1].parent / 'config.py'
    if dumped.exists():
        _read_config(run, dumped)
    return run


def _read_config(run: Run, file: Path) -> None:
    """Reads a dumped config, whose custom modules may be missing here."""
    try:
        config = Config.fromfile(file, import_custom_modules=False).to_dict()
    except Exception as error:  # a config is a program
        run.notes.append(f'its config cannot be read ({type(error).__name__}: {error})')
        return
    run.paper = config.get('paper') or {}
    if run.paper:
        run.notes += _paper_departures(config, run)
    run.config = flat(config)
    window = run.config.get('log_processor.window_size', 10)
    interval = run.config.get('default_hooks.logger.interval', 10)
    if isinstance(window, int) and window < interval:
        run.notes.append(
            f'its seconds are those of {window} of every {interval} iterations, in which captures '
            f'and refreshes may be missing: log with log_processor=dict(window_size={interval})'
        )


def _paper_departures(config: dict[str, Any], run: Run) -> list[str]:
    """Reasons against a comparison of its scores with the row that its config names."""
    try:
        row = row_of(config)
        differences = departures(plain(config), row, None)
        batch = (
            config['train_dataloader']['batch_size']
            * int(run.machine.get('GPU number', 0))
            * config['optim_wrapper'].get('accumulative_counts', 1)
        )
    except (ValueError, KeyError) as error:
        return [f'whether it was trained as the row that it names is not known ({error})']
    if batch and batch != row.batch and not config['auto_scale_lr'].get('enable'):
        differences.append(
            f'batch of all GPUs is {batch}, the paper has {row.batch} (and the rates for '
            'it: --auto-scale-lr)'
        )
    return (
        [f'not trained as {run.source} of the thesis: {"; ".join(differences)}']
        if differences
        else []
    )


def _read_machine(log: Path) -> dict[str, str]:
    """Machine and versions, from the head of the log."""
    head = log.read_text(errors='replace')[:20000]
    entries = dict(re.findall(r'^    ([^:\n]+): (.*)$', head, flags=re.MULTILINE))
    return {key: entries[key] for key in MACHINE if key in entries}


def flat(config: Any, prefix: str = '') -> dict[str, Any]:
    """Flattens a nested config to dotted keys."""
    if isinstance(config, dict) and config:
        return {
            key: value
            for name, part in config.items()
            if name != '_scope_'
            for key, value in flat(part, f'{prefix}{name}.').items()
        }
    return {prefix.rstrip('.'): config}


def config_differences(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Keys in which the configs differ, with the value of each run."""
    keys = sorted({key for run in runs for key in run.config})
    values_by_key = [
        (key, [repr(run.config.get(key, '-')) for run in runs])
        for key in keys
        if key.split('.')[0] not in (*UNINTERESTING, 'paper')
    ]
    return [(key, values) for key, values in values_by_key if len(set(values)) > 1]


def draw(runs: list[Run], score: str | None) -> str:
    """Plots the loss, or a score, against iterations and seconds, as SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout='constrained')
    for position, (axes, label) in enumerate(
        zip(figure.subplots(1, 2, sharey=True), ('iterations', 'seconds of training'), strict=True)
    ):
        for run in runs:
            points = run.losses if score is None else run.scores.get(score, [])
            axes.plot(
                [point[position] for point in points],
                [point[2] for point in points],
                label=run.name,
                marker='' if score is None else '.',
            )
        axes.set(xlabel=label, ylabel='' if position else score or 'loss')
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text)
    return text.getvalue()[text.getvalue().index('<svg') :]


def write(runs: list[Run], folder: Path, title: str) -> tuple[Path, Path]:
    """Writes report.md and report.html; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = [name for name in HEADLINES if any(name in run.scores for run in runs)]
    known = dict(
        title=title,
        runs=runs,
        scores=scores,
        differences=config_differences(runs),
        pictures=[draw(runs, score) for score in (None, *scores)],
    )
    paths = folder / 'report.md', folder / 'report.html'
    for path in paths:
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=path.suffix == '.html',
            keep_trailing_newline=True,
        )
        environment.filters['number'] = lambda value: '-' if value is None else f'{value:.3f}'
        path.write_text(environment.get_template(f'{path.name}.j2').render(known))
    return paths


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folders', nargs='+', type=Path, metavar='WORK_DIR')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/report'),
        help='folder of the report; default: work_dirs/report',
    )
    parser.add_argument('--title', default='Runs side by side')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    try:
        runs = [read_run(folder) for folder in args.folders]
    except ValueError as error:
        sys.exit(str(error))
    for path in write(runs, args.out, args.title):
        print(path)


if __name__ == '__main__':
    main()
