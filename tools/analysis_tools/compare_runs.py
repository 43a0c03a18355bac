"""Compares finished or running trainings from MMEngine's own logs.

Reads the work folders of tools/train.py (or of a toolbox's own tool), prints a table of the runs,
and writes report.md and report.html. The reports have final scores (beside those of the thesis if
the config names them), curves of loss and scores against iterations and seconds, the differences
between the configs, and the machines.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader
from mmengine.config import Config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.logs import Curves, log_files
from common.scores import headlines
from common.tables import duration
from mmprecond.engine.console import print_table
from mmprecond.engine.constructor import DEFAULT, PrecondOptimWrapperConstructor
from mmprecond.optimizers.replacement import REPLACEMENTS
from paper.departures import departures, plain
from paper.rows import row_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
#: Number of columns with text in the table of runs.
TEXTS = 2
#: Parts of a config that do not concern the method.
UNINTERESTING = ('work_dir', 'resume', 'load_from', 'launcher', 'visualizer', 'vis_backends')


@dataclass
class LoggedRun(Curves):
    """One training run, read from its folder.

    Attributes:
        name: Name of the folder.
        optimizer: Name of the optimizer, with the curvature that is attached to it.
        losses, scores, memory: See `Curves`.
        config: The config with dotted keys.
        paper: The `paper` entry of the config.
        machine: Information on the machine in the log.
        notes: Notes for the reader on how the run was read.
    """

    name: str
    optimizer: str = 'unknown'
    config: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Part of the thesis that the run is compared with."""
        return f'table {self.paper["table"]}' if 'table' in self.paper else ''

    def against_paper(self) -> list[tuple[str, float, float]]:
        """Names of scores, with this run's value and the published one, in per cent."""
        result = self.paper.get('result', {})
        names = TOP_1 if 'top1' in result else MASK if 'APb' in result else BOX
        unit = 1 if names is TOP_1 else 100
        scores = [
            (name, self.last(names[name]), value) for name, value in result.items() if name in names
        ]
        return [(name, unit * score, value) for name, score, value in scores if score is not None]


def read_run(folder: Path) -> LoggedRun:
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
    run = LoggedRun(folder.name)
    for file in files:
        run.read(file)
    for log in sorted(folder.glob('*/*.log'))[-1:]:
        run.machine = _read_machine(log)
    if not run.losses:
        run.notes.append(
            'no loss was logged: lower default_hooks.logger.interval, or train for longer'
        )
    dumped = files[-1].parent / 'config.py'
    if dumped.exists():
        _read_config(run, dumped)
    return run


def _read_config(run: LoggedRun, file: Path) -> None:
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
    run.optimizer = optimizer_name(config.get('optim_wrapper') or {})
    window = run.config.get('log_processor.window_size', 10)
    interval = run.config.get('default_hooks.logger.interval', 10)
    if isinstance(window, int) and window < interval:
        run.notes.append(
            f'its seconds are those of {window} of every {interval} iterations, in which captures '
            f'and refreshes may be missing: log with log_processor=dict(window_size={interval})'
        )


def _paper_departures(config: dict[str, Any], run: LoggedRun) -> list[str]:
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


def optimizer_name(wrapper: dict[str, Any]) -> str:
    """Name of an `optim_wrapper`'s optimizer: 'NKFAC', or 'AFOpt+NKFAC on AdamW' if attached."""
    kind = str((wrapper.get('optimizer') or {}).get('type', 'unknown'))
    methods = wrapper.get('precondition', DEFAULT)
    ours = PrecondOptimWrapperConstructor.__name__ in str(wrapper.get('constructor'))
    if not ours or methods is None or kind not in REPLACEMENTS:
        return kind
    if isinstance(methods, str):
        return f'{methods} on {kind}'
    parts = list(methods.values()) if isinstance(methods, dict) else []
    words = [str(part.get('type') if isinstance(part, dict) else part) for part in parts]
    return f'{"+".join(words) or "several methods"} on {kind}'


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


def config_differences(runs: list[LoggedRun]) -> list[tuple[str, list[str]]]:
    """Keys in which the configs differ, with the value of each run."""
    known = [run for run in runs if run.config]
    differences = []
    for key in sorted({key for run in known for key in run.config}):
        if key.split('.')[0] in (*UNINTERESTING, 'paper'):
            continue
        if len({_setting(run, key) for run in known}) > 1:
            differences.append((key, [_setting(run, key) for run in runs]))
    return differences


def _setting(run: LoggedRun, key: str) -> str:
    """Value of a key in a run's config as text."""
    if not run.config:
        return 'unknown'
    return repr(run.config[key]) if key in run.config else 'not set'


def main_scores(runs: list[LoggedRun]) -> list[str]:
    """Scores with a column and a curve: the main ones of each run."""
    return list(dict.fromkeys(name for run in runs for name in headlines(run.scores)))


def run_table(runs: list[LoggedRun]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the table of runs; the first `TEXTS` columns are text."""
    scores = main_scores(runs)
    return ['run', 'optimizer', 'iterations', 'training time', *scores], [
        [
            run.name,
            run.optimizer,
            str(run.iterations),
            duration(run.seconds),
            *(_number(run.last(name)) for name in scores),
        ]
        for run in runs
    ]


def other_scores(runs: list[LoggedRun]) -> list[tuple[str, list[str]]]:
    """Scores without a column in the table of runs, with the last value of each run."""
    names = dict.fromkeys(name for run in runs for name in run.scores)
    shown = main_scores(runs)
    return [
        (name, [_number(run.last(name)) for run in runs]) for name in names if name not in shown
    ]


def _number(score: float | None) -> str:
    """Text of a score, '-' for a run that does not have it (in COCO's metrics: -1)."""
    return '-' if score is None or score == -1 else f'{score:.3f}'


def draw(runs: list[LoggedRun], score: str | None) -> Figure:
    """Plots the loss, or a score, against iterations and seconds."""
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
    return figure


def write_pictures(runs: list[LoggedRun], folder: Path) -> list[dict[str, str]]:
    """Writes the curves as PNG; returns the title, file name and SVG of each picture."""
    pictures = []
    for score in (None, *main_scores(runs)):
        title = score or 'training loss'
        file = re.sub(r'[^\w.-]+', '_', title) + '.png'
        figure = draw(runs, score)
        figure.savefig(folder / file, dpi=110)
        text = io.StringIO()
        figure.savefig(text, format='svg')
        svg = text.getvalue()
        pictures.append(dict(title=title, file=file, svg=svg[svg.index('<svg') :]))
    return pictures


def write(runs: list[LoggedRun], folder: Path, title: str) -> tuple[Path, Path]:
    """Writes report.md, its pictures and report.html; returns the paths of the reports."""
    folder.mkdir(parents=True, exist_ok=True)
    headers, rows = run_table(runs)
    known = dict(
        title=title,
        runs=runs,
        headers=headers,
        rows=rows,
        texts=TEXTS,
        others=other_scores(runs),
        differences=config_differences(runs),
        pictures=write_pictures(runs, folder),
    )
    paths = folder / 'report.md', folder / 'report.html'
    for path in paths:
        environment = Environment(
            loader=FileSystemLoader(TEMPLATES),
            autoescape=path.suffix == '.html',
            keep_trailing_newline=True,
        )
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
    paths = write(runs, args.out, args.title)
    print_table(*run_table(runs), left=TEXTS)
    print()
    for run in runs:
        for note in run.notes:
            print(f'{run.name}: {note}')
    for path in paths:
        print(path)


if __name__ == '__main__':
    main()
