"""Proves that every config is what the thesis's tables say, and that it builds and steps.

A config with a `paper` entry is compared with its row of configs/paper_results.json (learning
rate, decay, intervals, schedule, batch) and with the MMDetection config that it inherits, from
which nothing but the optimizer and the schedule may differ. Then the real model is built at real
size with random weights and takes a few steps on synthetic images through the config's own
pipeline; on a CPU in float32.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmprecond.datasets import make_shapes
from mmprecond.engine import launch

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ('faster_rcnn', 'mask_rcnn', 'retinanet')
ROWS = ROOT / 'configs/paper_results.json'
#: Epochs, and those at which the rate drops by 10.
SCHEDULES = {'1x': (12, [8, 11]), '2x': (24, [16, 22]), '3x': (36, [27, 33])}
#: What a config may change of the one it inherits.
OURS = ('optim_wrapper', 'custom_imports', 'paper')
SCHEDULE_KEYS = ('train_cfg', 'param_scheduler', 'max_epochs')
#: Of the shapes, in the order of their categories.
NAMES = ('person', 'bicycle', 'car', 'motorcycle')


@dataclass
class Outcome:
    """What became of a config.

    Attributes:
        problems: What is wrong, in words.
        seconds: Of each step.
        memory: Peak of the process so far, in GB.
        layers: Layers with an operator, and all that are preconditioned and trained.
        note: What was done otherwise than the config says.
    """

    problems: list[str]
    seconds: list[float]
    memory: float = 0.
    layers: str = '-'
    note: str = ''


def all_configs() -> list[Path]:
    """Every config of a detector."""
    return [path for folder in FOLDERS for path in sorted((ROOT / 'configs' / folder).glob('*.py'))]


def differences(path: Path) -> list[str]:
    """Where a config departs from the thesis's table or from its base."""
    cfg, base = (_plain(launch.load_config(one).to_dict()) for one in (str(path), base_of(path)))
    allowed = OURS + (SCHEDULE_KEYS if cfg.get('paper', {}).get('schedule') == '2x' else ())
    compared = [key for key in sorted(cfg.keys() | base.keys())
                if key not in allowed and not key.startswith('afopt')]  # lists of configs/_base_
    found = [f'{key} differs from {base_of(path)}' for key in compared
             if cfg.get(key) != base.get(key)]
    wrappers = [{key: value for key, value in one['optim_wrapper'].items()
                 if key not in ('optimizer', 'constructor')} for one in (cfg, base)]
    found += [f'optim_wrapper.{key} differs from {base_of(path)}'
              for key in sorted(wrappers[0].keys() | wrappers[1].keys())
              if wrappers[0].get(key) != wrappers[1].get(key)]
    return found + (_against_paper(cfg) if 'paper' in cfg else [])


def _plain(value: Any) -> Any:
    """A config without the scopes that inheriting from a toolbox leaves in it."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key != '_scope_'}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def base_of(path: Path) -> str:
    """The MMDetection config that a config inherits, as its source says."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '_base_':
            bases = ast.literal_eval(node.value)
            bases = [bases] if isinstance(bases, str) else bases
            for base in bases:
                if '::' in base:
                    return str(base)
    raise ValueError(f'{path} inherits no config of MMDetection; write _base_ = '
                     '"mmdet::FOLDER/NAME.py"')


def _against_paper(cfg: dict[str, Any]) -> list[str]:
    """Where a config with a `paper` entry departs from its row."""
    paper = cfg['paper']
    keys = ('table', 'detector', 'backbone', 'schedule', 'optimizer')
    rows = [row for row in json.loads(ROWS.read_text())['coco']
            if all(row[key] == paper.get(key) for key in keys)]
    if len(rows) != 1:
        return [f'{len(rows)} rows of the paper are {[paper.get(key) for key in keys]}']
    (row,), optimizer = rows, cfg['optim_wrapper']['optimizer']
    epochs, drops = SCHEDULES[row['schedule']]
    steps = [s for s in cfg['param_scheduler'] if s['type'] == 'MultiStepLR']
    wanted = {'type': row['optimizer'], 'lr': row['lr'], 'weight_decay': row['weight_decay'],
              **{key: row[key] for key in ('stat_interval', 'refresh_interval') if key in row}}
    usual = {'betas': [0.9, 0.999], 'momentum': 0.9}
    wanted |= {key: usual.get(key, 'nothing') for key in optimizer if key not in wanted}
    pairs = {key: (optimizer.get(key), value) for key, value in wanted.items()}
    pairs |= {'result': (paper.get('result'), row['result']),
              'max_epochs': (cfg['train_cfg']['max_epochs'], epochs),
              'milestones': ([s['milestones'] for s in steps], [drops]),
              'batch': (cfg['auto_scale_lr']['base_batch_size'], 16)}
    return [f'{key} is {found}, the paper has {value}' for key, (found, value) in pairs.items()
            if found != value]


def make_data(folder: Path, images: int, size: int) -> Path:
    """Shapes in COCO format, under the names of categories of COCO."""
    root = make_shapes(folder, images=images, size=size, progress=False)
    file = root / 'annotations/train.json'
    content = json.loads(file.read_text())
    for category, name in zip(content['categories'], NAMES, strict=True):
        category['name'] = name
    file.write_text(json.dumps(content))
    return root


def take_steps(path: Path, data: Path, steps: int) -> Outcome:
    """Builds a config's model and optimizer and takes some steps at batch 1."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.runner import Runner

    from mmprecond.engine.synthetic import random_model

    cfg = launch.load_config(str(path))
    note = _adapt(cfg, data)
    torch.manual_seed(0)
    model = random_model(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    loader = Runner.build_dataloader(cfg.train_dataloader)
    outcome, batches = Outcome([], [], note=note), iter(loader)
    for _ in range(steps):
        start = time.perf_counter()
        losses = model.train_step(next(batches), wrapper)
        outcome.seconds.append(time.perf_counter() - start)
        loss = float(losses['loss'].detach())
        if not math.isfinite(loss):
            outcome.problems.append(f'the loss is {loss}')
    outcome.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    stacks = getattr(wrapper.optimizer, 'stacks', None)
    if stacks is not None:
        ready = {layer for stack in stacks for _, layer in stack.ready()}
        trained = [layer for layer in wrapper.optimizer.layers if layer.weight.requires_grad]
        outcome.layers = f'{len(ready)} of {len(trained)}'
        missing = [layer.name for layer in trained if layer not in ready]
        if missing:
            outcome.problems.append(f'no operator for {", ".join(missing[:3])}')
    return outcome


def _adapt(cfg: Any, data: Path) -> str:
    """Points a config to the data; makes it run on a CPU; returns what that changed."""
    notes = []
    cfg.model.backbone.init_cfg = None
    loader = cfg.train_dataloader
    loader.update(batch_size=1, num_workers=0, persistent_workers=False)
    loader.dataset.update(data_root=str(data), ann_file='annotations/train.json',
                          data_prefix=dict(img='train/'))
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and not torch.cuda.is_available():
        cfg.optim_wrapper.type = 'OptimWrapper'
        notes.append('OptimWrapper in place of AmpOptimWrapper')
    optimizer = cfg.optim_wrapper.optimizer
    late = [entry for entry in [optimizer, *(entry.get('preconditioner') or {} for entry
                                             in optimizer.get('layers', []))]
            if entry.get('type') in ('AdamR', 'EigenRotation')]
    for entry in late:  # its first capture is at step stat_interval, not at step 0
        entry.update(stat_interval=2, refresh_interval=2)
        notes.append('intervals of 2 for AdamR')
    return ', '.join(notes)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='*', type=Path, help='files; default: all')
    parser.add_argument('--steps', type=launch.count, default=3,
                        help='steps of each model; default: 3')
    parser.add_argument('--no-steps', action='store_true', help='only compare settings')
    parser.add_argument('--size', type=launch.count, default=640,
                        help='size of the images before the pipeline; default: 640')
    parser.add_argument('--out', type=Path, help='file for the table')
    return parser.parse_args()


def table(outcomes: dict[Path, Outcome]) -> str:
    """One row for each config, in Markdown."""
    lines = ['| config | settings | layers | seconds a step | peak GB | note |', '|---' * 6 + '|']
    for path, outcome in outcomes.items():
        seconds = ', '.join(f'{second:.0f}' for second in outcome.seconds) or '-'
        lines.append(f'| {path.stem} | {"; ".join(outcome.problems) or "as they must be"} | '
                     f'{outcome.layers} | {seconds} | {outcome.memory:.1f} | {outcome.note} |')
    return '\n'.join(lines)


def main() -> None:
    args = parse_args()
    outcomes: dict[Path, Outcome] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = None if args.no_steps else make_data(Path(folder), args.steps, args.size)
        for path in tqdm(args.configs or all_configs(), unit='config'):
            problems: list[str] = []
            try:
                problems = differences(path)
                outcome = take_steps(path, data, args.steps) if data else Outcome([], [])
            except (RuntimeError, ValueError, TypeError, KeyError) as error:
                outcome = Outcome([f'{type(error).__name__}: {error}'.splitlines()[0]], [])
            outcome.problems = problems + outcome.problems
            outcomes[path] = outcome
            if args.out:
                args.out.write_text(table(outcomes) + '\n')
    print(table(outcomes))
    if any(outcome.problems for outcome in outcomes.values()):
        sys.exit(1)


if __name__ == '__main__':
    main()
