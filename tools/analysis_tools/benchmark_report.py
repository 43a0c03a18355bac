"""Table and chart of benchmark.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from analysis_tools.benchmark_entry import KINDS
from common.tables import markdown


def report(model: str, results: list[dict[str, Any]], args: argparse.Namespace, rate: float) -> str:
    """Table of one model."""
    keys = [f'{capture}/{refresh}' for capture, refresh in args.intervals]
    head = (
        f'### {model}, {args.batch} x {args.size[0]} x {args.size[1]}, {describe(args)}\n\n'
        f'Product of 2048 x 2048 in the same run: {rate / 1e9:,.0f} GFLOP/s. Seconds are '
        'medians of whole iterations; times of all iterations at intervals of captures and '
        "refreshes (first) are divided by the base optimizer's, p99 is in seconds.\n\n"
    )
    headers = [
        'optimizer',
        'plain',
        'measures',
        'refreshes',
        'step alone',
        'its products at that rate',
        *(part for key in keys for part in (f'x base, {key}', 'p99')),
        'state MB',
        'peak MB' if args.device.type == 'cpu' else 'peak MB beside what is held',
        'ranks',
    ]
    return head + markdown(headers, [row(result, keys) for result in results])


def row(result: dict[str, Any], keys: list[str]) -> list[str]:
    """Table cells of one optimizer."""
    times = [
        f'{result["iteration"][kind]:.3f}' if kind in result['iteration'] else '-' for kind in KINDS
    ]
    ratios = [
        cell
        for key in keys
        for cell in (
            f'{result["overhead"][key]:.2f} ({result["base"]})'
            if key in result['overhead']
            else '-',
            f'{result["p99"][key]:.3f}',
        )
    ]
    ranks = result.get('ranks')
    return [
        result['name'],
        *times,
        f'{result["step"]["plain"]:.3f}',
        f'{result["limit"]:.3f}' if 'limit' in result else '-',
        *ratios,
        f'{result["state_mb"]:.0f}',
        f'{result["peak_mb"]:.0f}' if result['peak_mb'] else '-',
        f'{min(ranks)}-{max(ranks)}' if ranks else '-',
    ]


def describe(args: argparse.Namespace) -> str:
    """Description of the hardware."""
    if args.device.type == 'cuda':
        return torch.cuda.get_device_name(args.device)
    return f'{torch.get_num_threads()} CPU threads, torch {torch.__version__}'


def chart(model: str, results: list[dict[str, Any]], key: str, path: Path) -> None:
    """Plots bars of iteration times relative to the base optimizer."""
    from matplotlib.figure import Figure

    shown = [r for r in results if key in r['overhead']]
    figure = Figure(figsize=(7, 0.5 + 0.4 * len(shown)), layout='constrained')
    axes = figure.subplots()
    bars = axes.barh([r['name'] for r in shown], [r['overhead'][key] for r in shown])
    axes.bar_label(bars, fmt='%.2f', padding=3)
    axes.axvline(1, color='grey', linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("time of an iteration / the base optimizer's")
    axes.set_title(f'{model}, intervals {key}')
    figure.savefig(path, dpi=120)
