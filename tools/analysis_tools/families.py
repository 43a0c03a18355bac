"""Attaches curvature by one option to model families of MMEngine's toolboxes.

    python tools/analysis_tools/families.py prove
    python tools/analysis_tools/families.py compare --iterations 100 --seeds 0,1,2

Each run is one of the toolbox's own tools/train.py. `prove` takes a few iterations with curvature,
and resumes them from the middle: the weights must be the same to the bit. `compare` takes the same
iterations with and without curvature. Runs that are done are not repeated. Toolboxes that are not
installed are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from mmprecond.engine import launch
from mmprecond.engine.toolboxes import find_config, installed

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT, WORK
from common.families import FAMILIES, USUAL, Family, make_config, make_data
from common.logs import entries
from common.tables import markdown
from mmprecond.datasets import writer

#: The option that attaches curvature.
OPTION = 'optim_wrapper.constructor=mmprecond.PrecondOptimWrapperConstructor'
TAIL = 10  # iterations whose mean is the loss at the end
#: Families of the comparison.
COMPARED = ('Faster R-CNN R50', 'Mask R-CNN Swin-T', 'DETR R50', 'SegFormer-B0', 'ResNet-18')


def run(family: Family, folder: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Trains with the toolbox's own script, or reads the record of a finished run.

    Returns:
        A dict with `losses` (one per iteration), `attached`, `plain` (see the functions below) and
        `error` (the last line of the error output, or '').
    """
    record = folder / 'record.json'
    if record.exists():
        return json.loads(record.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    half = max(1, options.iterations // 2)
    cfg = make_config(family, data, options.iterations, options.saved or half, options.seed)
    cfg.dump(str(folder / 'config.py'))
    script = find_script(family.toolbox)
    command = [sys.executable, str(script), 'config.py', '--work-dir', 'out']
    command += ['--resume'] if options.resume else []
    if options.attach:
        methods = [f'optim_wrapper.precondition={options.methods}'] * bool(options.methods)
        command += ['--cfg-options', OPTION, *methods]
    paths = [str(ROOT), str(ROOT / 'tools'), *filter(None, [os.environ.get('PYTHONPATH')])]
    done = subprocess.run(
        command,
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        check=False,
    )
    tables = sorted((folder / 'out').glob('*/layers.txt'))
    log = done.stdout + done.stderr + ''.join(file.read_text() for file in tables[-1:])
    (folder / 'output.log').write_text(log)
    files = sorted((folder / 'out').glob('*/vis_data/scalars.json'))
    losses = [entry['loss'] for file in files[-1:] for entry in entries(file) if 'loss' in entry]
    result = dict(
        losses=losses,
        attached=attached(log),
        plain=left_to_the_rule(log),
        error='' if done.returncode == 0 else (done.stderr.strip().splitlines() or [''])[-1],
    )
    if not result['error']:
        writer.write_json(record, result)
    return result


def attached(log: str) -> tuple[str, str]:
    """Methods with their numbers of layers, and the share of parameters, by a run's log."""
    found = re.search(r'mmprecond attached (.*?) layers? of \w+, which hold ([\d.]+) %', log)
    return (found[1].replace(' to ', ' '), found[2]) if found else ('', '')


def left_to_the_rule(log: str) -> str:
    """Modules with the plain rule, with the reasons, and unread attention, by a run's log."""
    kinds = Counter(re.findall(r'plain rule: (\w+), (.*?)(?=  |\n)', log))
    norms = sum(number for (kind, _), number in kinds.items() if 'Norm' in kind)
    others = [
        f'{number} {kind} ({reason})'
        for (kind, reason), number in kinds.items()
        if 'Norm' not in kind
    ]
    unread = sorted(set(re.findall(r'does not read (.*?)\. Their', log)))
    return '; '.join([f'{norms} norms'] * (norms > 0) + others + unread)


def find_script(toolbox: str) -> Path:
    """The toolbox's own tools/train.py."""
    return find_config(f'{toolbox}::_base_/default_runtime.py').parents[2] / 'tools/train.py'


def prove(name: str, args: argparse.Namespace, data: Path) -> tuple[str, ...]:
    """Row of a family: coverage, losses, and whether a resumed run is the same."""
    family = FAMILIES[name]
    folder = (
        args.work_dir / 'prove' / re.sub(r'\W+', '_', f'{name} {args.precondition or ""}'.strip())
    )
    options: dict[str, Any] = dict(
        iterations=args.iterations, saved=None, seed=0, attach=True, methods=args.precondition
    )
    straight = run(family, folder / 'straight', data, argparse.Namespace(**options, resume=False))
    last = f'iter_{args.iterations}.pth'
    if straight['error']:
        return (name, family.config, straight['error'], '', '', '', '')
    middle = folder / 'straight/out' / f'iter_{args.iterations // 2}.pth'
    out = folder / 'resumed/out'
    out.mkdir(parents=True, exist_ok=True)
    if middle.exists() and not (out / middle.name).exists():
        os.link(middle, out / middle.name)
        (out / 'last_checkpoint').write_text(str(out / middle.name))
    if not ((out / middle.name).exists() or (folder / 'resumed/record.json').exists()):
        return (name, family.config, f'there is no {middle.name} to resume from', '', '', '', '')
    resumed = run(family, folder / 'resumed', data, argparse.Namespace(**options, resume=True))
    verdict = folder / 'equal.json'
    if not verdict.exists():
        equal = not resumed['error'] and same_weights(folder / 'straight/out' / last, out / last)
        verdict.write_text(json.dumps(equal))
        drop_checkpoints(folder)
    equal = json.loads(verdict.read_text())
    losses = straight['losses']
    finite = len(losses) == args.iterations and all(map(math.isfinite, losses))
    return (
        name,
        family.config,
        *straight['attached'],
        straight['plain'],
        f'{losses[0]:.3g} to {losses[-1]:.3g}' if finite else 'not finite',
        'to the bit' if equal else resumed['error'] or 'no',
    )


def drop_checkpoints(folder: Path) -> None:
    """Deletes all checkpoints in a folder; those of 25 families take 50 GB."""
    for file in folder.glob('**/*.pth'):
        file.unlink()


def same_weights(one: Path, other: Path) -> bool:
    """True if two checkpoints have equal weights, bit for bit."""
    states = [torch.load(path, weights_only=False)['state_dict'] for path in (one, other)]
    return all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def compare(name: str, args: argparse.Namespace, data: Path) -> tuple[str, ...]:
    """Row of a family: losses at the end with and without curvature."""
    family = (FAMILIES | USUAL)[name]
    ends: dict[bool, list[float]] = {False: [], True: []}
    for seed in args.seeds:
        for attach in (False, True):
            methods = args.precondition if attach else None
            folder = args.work_dir / 'compare' / re.sub(r'\W+', '_', name)
            folder /= '_'.join([f'{attach}_{seed}', *([methods] if methods else [])])
            options = argparse.Namespace(
                iterations=args.iterations,
                saved=10**6,
                seed=seed,
                attach=attach,
                methods=methods,
                resume='',
            )
            result = run(family, folder, data, options)
            drop_checkpoints(folder)
            if result['error']:
                return (name, result['error'], '', '', '')
            ends[attach].append(mean(result['losses'][-TAIL:]))
    optimizer = launch.load_config(family.config).optim_wrapper.optimizer
    plain, attached = (mean(ends[attach]) for attach in (False, True))
    return (
        name,
        f'{optimizer.type}, {optimizer.lr:g}',
        f'{plain:.4g} ({min(ends[False]):.4g}-{max(ends[False]):.4g})',
        f'{attached:.4g} ({min(ends[True]):.4g}-{max(ends[True]):.4g})',
        f'{attached / plain:.3f}',
    )


HEADS = {
    prove: ('family', 'config', 'layers', '% of weights', 'plain rule', 'loss', 'resumed'),
    compare: ('family', 'optimizer, rate', 'loss without', 'loss with', 'ratio'),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', choices=['prove', 'compare'])
    parser.add_argument('--families', help='names, separated by commas; default: all of the task')
    parser.add_argument(
        '--precondition', metavar='METHODS', help="such as AdamR; default: the constructor's own"
    )
    parser.add_argument('--iterations', type=launch.count, help='default: 4, or 100 to compare')
    parser.add_argument(
        '--seeds', type=lambda text: [int(k) for k in text.split(',')], default=[0, 1, 2]
    )
    parser.add_argument('--jobs', type=launch.count, default=1, help='runs at a time; default: 1')
    parser.add_argument('--work-dir', type=Path, default=WORK / 'work_dirs/families')
    args = parser.parse_args()
    args.work_dir = args.work_dir.resolve()
    args.task = dict(prove=prove, compare=compare)[args.task]
    args.iterations = args.iterations or (4 if args.task is prove else 100)
    known = FAMILIES if args.task is prove else FAMILIES | USUAL
    names = (
        args.families.split(',') if args.families else FAMILIES if args.task is prove else COMPARED
    )
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f'there is no family {unknown[0]!r}; choose from {", ".join(known)}')
    args.families = [name for name in names if known[name].toolbox in installed()]
    return args


def main() -> None:
    args = parse_args()
    data = make_data(args.work_dir / 'data')
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(
            tqdm(
                pool.map(lambda name: args.task(name, args, data), args.families),
                total=len(args.families),
                unit='family',
            )
        )
    text = markdown(HEADS[args.task], rows)
    (args.work_dir / f'{args.task.__name__}.md').write_text(text + '\n')
    print(text)


if __name__ == '__main__':
    main()
