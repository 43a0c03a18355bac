"""Checks mmprecond on a device and times it, with torch and torchvision alone.

    bash tools/analysis_tools/gpu_check.sh [--device cpu] [--out FOLDER] [--minutes 8]

Checks results against float64 on the CPU, mixed precision, resuming and waits. Times ResNet-50,
Swin-T and ResNet-50's feature pyramid. Writes gpu_check.json and gpu_check.md, and ends with 1 if a
check failed. Optimizers of the package pytorch_optimizer are timed too, if it is installed; with
MMDetection installed, Faster R-CNN on a GPU as well.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # equal results of equal runs

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

from analysis_tools.device_checks import Check, run_checks
from analysis_tools.device_times import time_workload, workloads
from common.devices import device
from mmprecond import __version__

#: Share of the time that timing gets for each model; the rest is for checks and set-up.
TIMING_SHARE = 0.2
DETECTOR = ('--models', 'faster-rcnn-r50', '--size', '800', '1333', '--batch', '2')


def describe(device: torch.device) -> dict[str, str]:
    """Names and versions."""
    name = (
        torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.processor() or ''
    )
    return dict(
        device=f'{device} {name}'.strip(),
        torch=torch.__version__,
        cuda=str(torch.version.cuda),
        mmprecond=__version__,
        tf32=str(torch.backends.cuda.matmul.allow_tf32),
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the package tabulate may be missing here."""
    lines = [heads, ['---'] * len(heads), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def check_table(checks: Sequence[Check]) -> str:
    """Table of the checks."""
    words = {True: 'passed', False: '**failed**', None: 'left out'}
    rows = [(c.name, c.subject, words[c.passed], c.detail) for c in checks]
    return table(('check', 'method', 'outcome', 'measured'), rows)


def time_table(rows: Sequence[dict[str, Any]]) -> str:
    """Table of one model's times."""
    cells = []
    for row in rows:
        if 'error' in row:
            cells.append((row['name'], row['error'], *[''] * 6))
            continue
        seconds = (row['seconds'].get(kind) for kind in ('plain', 'statistics', 'refresh'))
        times = ('' if s is None else f'{1000 * s:.1f}' for s in seconds)
        ratios = (f'{row["plain_ratio"]:.3f}', f'{row["ratio_20_200"]:.3f}')
        memory = (f'{row["state_mb"]:.0f}', f'{row["peak_mb"]:.0f}' if row['peak_mb'] else '')
        cells.append((row['name'], *times, *ratios, *memory))
    heads = ('optimizer', 'plain ms', 'capture ms', 'refresh ms', 'plain ratio', 'ratio at 20/200')
    return table((*heads, 'state MB', 'peak MB'), cells)


def detector_table(device: torch.device, folder: Path) -> str:
    """Table of benchmark.py for Faster R-CNN, or the reason why there is none."""
    if device.type != 'cuda' or not importlib.util.find_spec('mmdet'):
        return 'Left out: it needs a GPU and MMDetection.'
    script = ROOT / 'tools/analysis_tools/benchmark.py'
    command = [sys.executable, str(script), *DETECTOR, '--optimizers', 'SGD,NKFAC']
    done = subprocess.run(
        [*command, '--out', str(folder / 'detector')], capture_output=True, text=True, check=False
    )
    last = (done.stderr.strip().splitlines() or [''])[-1]
    return done.stdout if done.returncode == 0 else f'Failed: {last}'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog='gpu_check.sh', description=__doc__.splitlines()[0])
    parser.add_argument('--device', type=device, default='cuda', help='cuda (default), cuda:1, cpu')
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'work_dirs/gpu_check', help='folder of the results'
    )
    parser.add_argument('--minutes', type=float, default=8.0, help='at most, about; default: 8')
    args = parser.parse_args()
    if not 0 < args.minutes < float('inf'):
        parser.error(f'--minutes {args.minutes:g} is out of range; give a number greater than 0')
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f'--out {args.out} cannot be made ({error.strerror}); name a folder')
    return args


def main() -> int:
    args = parse_args()
    torch.backends.cudnn.deterministic = True
    start = time.perf_counter()
    facts = describe(args.device)
    checks = run_checks(args.device)
    torch.backends.cudnn.deterministic = False
    times = {}
    for work in workloads(args.device):
        size = f'{work.images} x {work.size[0]} x {work.size[1]}'
        print(f'{time.perf_counter() - start:.0f} s: timing {work.name}, {size}', flush=True)
        seconds = 60 * args.minutes * TIMING_SHARE
        times[f'{work.name}, {size}'] = time_workload(work, args.device, seconds)
    result = dict(facts=facts, checks=[asdict(check) for check in checks], times=times)
    (args.out / 'gpu_check.json').write_text(json.dumps(result, indent=1) + '\n')
    parts = [', '.join(f'{key} {value}' for key, value in facts.items()), check_table(checks)]
    parts += [f'### {name}\n\n{time_table(rows)}' for name, rows in times.items()]
    parts.append(f'### Faster R-CNN R50 of MMDetection\n\n{detector_table(args.device, args.out)}')
    text = '\n\n'.join(parts) + '\n'
    (args.out / 'gpu_check.md').write_text(text)
    print(text)
    outcomes = [check.passed for check in checks]
    failed = outcomes.count(False)
    print(
        f'{outcomes.count(True)} checks passed, {failed} failed, {outcomes.count(None)} left out; '
        f'{time.perf_counter() - start:.0f} s in all'
    )
    print(f'results: {args.out}/gpu_check.md and .json')
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())
