"""Verifies that every config agrees with the thesis's tables, builds, and takes steps.

The tool compares a config that has a `paper` entry with its row of configs/paper_results.json
(learning rate, decay, intervals, schedule, batch; for a classifier also network and data). It also
compares each config with the inherited one; only the optimizer and the schedule may differ. It then
builds the model at its real size with random weights, and takes a few steps on synthetic images
through the config's own pipeline, on a CPU in float32.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import resource
import sys
import tempfile
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger
from tqdm import tqdm

from mmprecond.core import split_words
from mmprecond.datasets import make_shape_folders, make_shapes
from mmprecond.engine import launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT
from common.tables import markdown
from mmprecond.checks import first_line
from paper.departures import departures, plain, schedulers
from paper.rows import row_of

DETECTORS = ('faster_rcnn', 'mask_rcnn', 'retinanet')
CLASSIFIERS = ('densenet', 'googlenet', 'resnet', 'swin_transformer', 'vgg')
FOLDERS = DETECTORS + CLASSIFIERS
#: Prefixes of settings in which every config may differ from the inherited one.
OURS = (
    'optim_wrapper.optimizer.',
    'optim_wrapper.constructor',
    'optim_wrapper.precondition',
    'custom_imports.',
    'paper.',
    'optim_wrapper.paramwise_cfg.custom_keys.mask_head.upsample',
    'afopt',  # of configs/_base_
)
SMALL = 32  # pixels of CIFAR's images
#: Head of the page.
ABOUT = """\
# Verified configs

Made by `tools/paper/verify_configs.py --out docs/verified_configs.md`. The command compares each
config with its row of the thesis and with the config that it inherits. It builds the model at its
real size with random weights, and takes three steps at batch 1 (2 for a classifier) on synthetic
images through the config's own pipeline, on a CPU in float32. The steps include a capture and a
refresh. CI compares all configs, and takes steps with one detector and two classifiers. Seconds
are those of one thread beside other work; they only show which configs are expensive. A row
without seconds has its settings compared only: the config has taken no steps since it last changed.
'As they must be' means that the settings are those of the thesis's row. 'Layers' counts the
layers that have an operator after the three steps, of all trained layers; for SGDPH the 1-D
parameters whose second derivatives were measured. Notes are departures of the check from the
config:

- "intervals of 2": methods whose first capture is at step `stat_interval`, and classifiers whose
  branches start at zero, so that the first step has no gradients there.
- "max_dim=8192 for AdamR": the basis of a box head's 12,545 inputs costs about 18 TFLOP (9 n^3).
- "no stochastic depth": with one image, stochastic depth may skip blocks, which then have nothing
  to measure.
"""
#: Longest side with a basis in the steps: that of 12,545 inputs costs about 18 TFLOP.
LONGEST_BASIS = 8192
AFOPTS = ('AFOpt', 'AdaAFOpt', 'AttentionFeature')
#: Names of COCO's categories for the shapes, in the order of the shapes' categories.
NAMES = ('person', 'bicycle', 'car', 'motorcycle')


@dataclass
class Outcome:
    """Outcome of a config's check.

    Attributes:
        problems: Descriptions of problems.
        seconds: Time of each step.
        memory: Peak memory of the process in GB.
        layers: Number of layers with an operator, of all layers that are preconditioned and
            trained; for SGDPH the number of vectors with a Hessian.
        note: Departures of the check from the config.
    """

    problems: list[str]
    seconds: list[float]
    memory: float = 0.0
    layers: str = '-'
    note: str = ''


def all_configs() -> list[Path]:
    """Paths of all configs of detectors and classifiers."""
    return [path for folder in FOLDERS for path in sorted((ROOT / 'configs' / folder).glob('*.py'))]


def differences(path: Path) -> list[str]:
    """Differences between a config and the thesis's table or its base."""
    loaded = [launch.load_config(config).to_dict() for config in (str(path), base_of(path))]
    cfg, base = (plain(config) for config in loaded)
    row = None
    if 'paper' in cfg:
        try:
            row = row_of(cfg)
        except ValueError as error:
            return [str(error)]
    free = OURS + (row.free if row else ())
    cfg_settings, base_settings = flat(cfg), flat(base)
    changes = [
        f'{key} differs from {base_of(path)}'
        for key in sorted(cfg_settings.keys() | base_settings.keys())
        if not key.startswith(free) and cfg_settings.get(key) != base_settings.get(key)
    ]
    return changes + (departures(cfg, row, path.stem) if row else [])


def flat(cfg: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """Flattens settings to dotted names; lists stay whole."""
    settings: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, dict) and value:
            settings |= flat(value, f'{prefix}{key}.')
        else:
            settings[f'{prefix}{key}'] = value
    return settings


def base_of(path: Path) -> str:
    """Base in the source of a config: a config of a toolbox, else one of our files."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '_base_':
            bases = ast.literal_eval(node.value)
            bases = [bases] if isinstance(bases, str) else bases
            files = [str((path.parent / base).resolve()) for base in bases if '::' not in base]
            return str([*(base for base in bases if '::' in base), *files][0])
    raise ValueError(f'{path} inherits no config; write _base_ = "mmdet::FOLDER/NAME.py"')


def make_data(folder: Path, images: int, size: int) -> Path:
    """Makes shapes in COCO format, with COCO's category names, and in folders of two sizes."""
    root = make_shapes(folder / 'coco', images=images, size=size, progress=False)
    file = root / 'annotations/train.json'
    content = json.loads(file.read_text())
    for category, name in zip(content['categories'], NAMES, strict=True):
        category['name'] = name
    file.write_text(json.dumps(content))
    for name, side in (('large', size), ('small', SMALL)):
        make_shape_folders(folder / name, images=max(4, 2 * images), size=side, progress=False)
    return folder


def take_steps(path: Path, data: Path, steps: int) -> Outcome:
    """Builds a config's model and optimizer and takes some steps at batch 1, a classifier at 2."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import PARAM_SCHEDULERS
    from mmengine.runner import Runner

    from mmprecond.engine.synthetic import random_model

    cfg = launch.load_config(str(path))
    note = _adapt_to_cpu(cfg, data)
    torch.manual_seed(0)
    model: Any = random_model(cfg)
    if cfg.default_scope == 'mmpretrain':  # as in training; detectors begin from other weights
        model.init_weights()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    loader = Runner.build_dataloader(cfg.train_dataloader)
    outcome, batches = Outcome([], [], note=note), iter(loader)
    warm_up = [
        PARAM_SCHEDULERS.build(dict(config, optimizer=wrapper))
        for config in schedulers(cfg)
        if not config.get('by_epoch', True)
    ]
    for _ in range(steps):
        start = time.perf_counter()
        losses = model.train_step(next(batches), wrapper)
        outcome.seconds.append(time.perf_counter() - start)
        for scheduler in warm_up:
            scheduler.step()
        loss = float(losses['loss'].detach())
        if not math.isfinite(loss):
            outcome.problems.append(f'the loss is {loss}')
    outcome.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    _check_curvature(wrapper.optimizer, outcome)
    return outcome


def _check_curvature(optimizer: Any, outcome: Outcome) -> None:
    """Records how much curvature the steps have measured, and problems if some is missing."""
    if hasattr(optimizer, 'curvature'):
        ready = {layer for stack in optimizer.curvature.stacks for _, layer in stack.ready()}
        trained = [layer for layer in optimizer.curvature.layers if layer.weight.requires_grad]
        outcome.layers = f'{len(ready)} of {len(trained)}'
        missing = [layer.name for layer in trained if layer not in ready]
        if missing:
            outcome.problems.append(f'no operator for {", ".join(missing[:3])}')
    elif hasattr(optimizer, 'vectors'):
        diagonals = [optimizer.state[p]['hessian'] for p in optimizer.vectors[:-1]]
        seen = sum(bool(diagonal.any()) for diagonal in diagonals)
        outcome.layers = f'{seen} of {len(diagonals)}'
        if not seen or not all(diagonal.isfinite().all() for diagonal in diagonals):
            outcome.problems.append('no Hessian, or one that is not finite')


def _adapt_to_cpu(cfg: Any, data: Path) -> str:
    """Adapts a config to the data and to a CPU; returns notes on the changes."""
    notes = []
    if 'Pretrained' in str(cfg.model.backbone.get('init_cfg')):
        cfg.model.backbone.init_cfg = None
    if cfg.model.backbone.get('drop_path_rate'):  # with one image it may skip blocks
        cfg.model.backbone.drop_path_rate = 0.0
        notes.append('no stochastic depth')
    loader = cfg.train_dataloader
    loader.update(batch_size=1, num_workers=0, persistent_workers=False)
    if cfg.default_scope == 'mmpretrain':
        loader.batch_size = 2  # batch normalisation may see one position
        loader.dataset = _image_folder_dataset(loader.dataset, data)
    else:
        loader.dataset.update(
            data_root=str(data / 'coco'),
            ann_file='annotations/train.json',
            data_prefix=dict(img='train/'),
        )
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and not torch.cuda.is_available():
        cfg.optim_wrapper = launch.in_full_precision(cfg.optim_wrapper)
        notes.append('OptimWrapper in place of AmpOptimWrapper')
    optimizer = cfg.optim_wrapper.optimizer
    entries = [
        optimizer,
        *(entry.get('preconditioner') or {} for entry in optimizer.get('layers', [])),
    ]
    # A ResNet's branches begin at zero: the first step has no gradients.
    blind = cfg.default_scope == 'mmpretrain' and cfg.model.backbone.type.startswith('ResNet')
    words = cfg.optim_wrapper.get('precondition')
    if words:
        parts = split_words(words).items()
        cfg.optim_wrapper.precondition = {part: dict(type=word) for part, word in parts}
        entries += cfg.optim_wrapper.precondition.values()
    for entry in entries:
        if entry.get('type') == 'AdamR' and cfg.default_scope == 'mmdet':
            entry.update(max_dim=LONGEST_BASIS)
            notes.append(f'max_dim={LONGEST_BASIS} for AdamR')
        if _captures_late(entry) or blind and 'stat_interval' in entry:
            entry.update(stat_interval=2, refresh_interval=2)
            notes.append(f'intervals of 2 for {entry["type"]}')
    return ', '.join(notes)


def _captures_late(entry: dict[str, Any]) -> bool:
    """True for methods whose first capture is at step `stat_interval`."""
    literal = entry.get('settings') == 'published'
    return entry.get('type') == 'AdamR' or literal and entry['type'] in AFOPTS


def _image_folder_dataset(dataset: Any, data: Path) -> dict[str, Any]:
    """Data set of a classifier with its pipeline, on images in folders."""
    pipeline, size = list(dataset.pipeline), 'large'
    if dataset.type.startswith('CIFAR'):  # holds its images in memory
        pipeline, size = [dict(type='LoadImageFromFile'), *pipeline], 'small'
    return dict(
        type='CustomDataset', data_root=str(data / size), data_prefix='train', pipeline=pipeline
    )


def prove(path: Path, data: Path | None, steps: int) -> Outcome:
    """Compares a config with the tables and, if there is data, takes steps with its model."""
    MMLogger.get_instance('mmengine', log_level='WARNING')  # not the table of every run
    problems: list[str] = []
    try:
        problems = differences(path)
        outcome = take_steps(path, data, steps) if data else Outcome([], [])
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        outcome = Outcome([first_line(error)], [])
    outcome.problems = problems + outcome.problems
    return outcome


def prove_alone(path: Path, data: Path | None, steps: int) -> Outcome:
    """Runs `prove` in its own process, to measure its memory and to survive its death."""
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        try:
            return pool.submit(prove, path, data, steps).result()
        except BrokenExecutor:
            return Outcome(['the process was killed: is there too little memory?'], [])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='*', type=Path, help='files; default: all')
    parser.add_argument(
        '--steps', type=launch.count, default=3, help='steps of each model; default: 3'
    )
    parser.add_argument('--no-steps', action='store_true', help='only compare settings')
    parser.add_argument(
        '--size',
        type=launch.count,
        default=640,
        help='size of the images before the pipeline; default: 640',
    )
    parser.add_argument(
        '--out',
        type=Path,
        help='file for the page, docs/verified_configs.md; it keeps the rows of other configs that '
        'have taken steps',
    )
    return parser.parse_args()


def row(path: Path, outcome: Outcome) -> tuple[str, ...]:
    """Cells of a config's row."""
    return (
        path.stem,
        '; '.join(outcome.problems) or 'as they must be',
        outcome.layers,
        ', '.join(f'{second:.1f}' for second in outcome.seconds) or '-',
        f'{outcome.memory:.1f}' if outcome.seconds else '-',
        outcome.note,
    )


def page(rows: dict[str, tuple[str, ...]]) -> str:
    """Page with one row for each config."""
    titles = ('config', 'settings', 'layers', 'seconds a step', 'peak GB', 'note')
    return f'{ABOUT}\n{markdown(titles, list(rows.values()))}\n'


def known_rows(path: Path | None) -> dict[str, tuple[str, ...]]:
    """Rows with steps that a page has from earlier calls, in the order of the configs."""
    names = [config.stem for config in all_configs()]
    found: dict[str, tuple[str, ...]] = {}
    if path and path.exists():
        for line in path.read_text().splitlines():
            cells = tuple(cell.strip() for cell in line.strip('|').split('|'))
            if cells[0] in names and cells[3] != '-':
                found[cells[0]] = cells
    return {name: found[name] for name in names if name in found}


def main() -> None:
    args = parse_args()
    rows, failed = known_rows(args.out), False
    configs = args.configs or all_configs()
    with tempfile.TemporaryDirectory() as folder:
        data = None if args.no_steps else make_data(Path(folder), args.steps, args.size)
        run = prove_alone if data else prove
        for path in tqdm(configs, unit='config'):
            outcome = run(path, data, args.steps)
            failed = failed or bool(outcome.problems)
            if data or path.stem not in rows:
                rows[path.stem] = row(path, outcome)
            rows = {p.stem: rows[p.stem] for p in all_configs() if p.stem in rows}
            if args.out:
                args.out.write_text(page(rows))
    print(page(rows))
    if failed:
        sys.exit(1)


if __name__ == '__main__':
    main()
