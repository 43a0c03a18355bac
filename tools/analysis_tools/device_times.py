"""Times of plain steps, captures and refreshes on a device, with torch and torchvision alone."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from analysis_tools.benchmark_entry import (
    PEERS,
    REFRESH,
    Entry,
    amortised,
    build_optimizer,
    installed_peers,
)
from common.vision import VisionModel, batch_of, classifier, feature_pyramid
from mmprecond.checks import first_line

#: Cycles of `REFRESH` steps that do not count.
WARM_UP = 1
#: Least number of cycles that count.
CYCLES = 2


@dataclass(frozen=True)
class Workload:
    """A model with its input.

    Attributes:
        name: Name in the table.
        make: Function that makes the model.
        images: Images of a batch.
        size: Height and width.
        optimizers: What is timed, in the notation of benchmark.py.
    """

    name: str
    make: Callable[[], VisionModel]
    images: int
    size: tuple[int, int]
    optimizers: tuple[str, ...]


GPU_PEERS = ('pytorch_optimizer.SOAP', 'pytorch_optimizer.Muon')
CONVOLUTIONS = ('SGD', 'AdamW', *GPU_PEERS, 'NKFAC', 'AdamR', 'MAC', 'AdaAct')
ATTENTION = ('AdamW', *GPU_PEERS, 'AFOpt+NKFAC', 'NKFAC', 'AdamR', 'MAC', 'AdaAct')


def workloads(device: torch.device) -> list[Workload]:
    """Usual sizes on a GPU. On a CPU small ones, which only try the script."""
    if device.type == 'cpu':
        few = ('SGD', 'AdamW', 'NKFAC', 'MAC')  # a peer's eigenvectors take minutes here
        return [
            Workload('ResNet-18', lambda: classifier('resnet18'), 2, (32, 32), few),
            Workload('Swin, small', lambda: classifier('swin-mini'), 2, (32, 32), ATTENTION),
            Workload('ResNet-18 FPN', lambda: feature_pyramid('resnet18'), 1, (64, 96), few),
        ]
    return [
        Workload('ResNet-50', lambda: classifier('resnet50'), 64, (224, 224), CONVOLUTIONS),
        Workload('Swin-T', lambda: classifier('swin-t'), 64, (224, 224), ATTENTION),
        Workload('ResNet-50 FPN features', feature_pyramid, 2, (800, 1333), CONVOLUTIONS),
    ]


def time_workload(work: Workload, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Times the optimizers in turns, each with its copy of the model.

    Args:
        work: Model and input.
        device: The device.
        seconds: Time to spend; at least `CYCLES` cycles are measured, whatever they take.

    Returns:
        Rows with medians of an iteration by kind of step, in seconds, the ratio of a plain
        iteration to that of the first-order optimizer, the same of an average iteration at 20/200,
        state and peak memory in MB, and `error` for an optimizer that failed.
    """
    end = time.perf_counter() + seconds
    torch.manual_seed(0)
    model = work.make()
    batches = [
        {key: t.to(device) for key, t in batch_of(work.images, work.size, 10, seed).items()}
        for seed in range(4)
    ]
    entries, rows = [], []
    for name in work.optimizers:
        if name in PEERS and name not in installed_peers():
            rows.append(dict(name=name, error='the package pytorch_optimizer is not installed'))
            continue
        try:
            twin = copy.deepcopy(model).to(device)
            entries.append(Entry(name, twin, build_optimizer(name, twin)))
        except Exception as error:  # a peer's fault must not end the table
            rows.append(dict(name=name, error=first_line(error)))
    step = 0
    least = (WARM_UP + CYCLES) * REFRESH
    while entries and (step < least or step % REFRESH or time.perf_counter() < end):
        for entry in list(entries):
            try:
                _train(entry, batches[step % len(batches)], step)
            except Exception as error:
                rows.append(dict(name=entry.name, error=first_line(error)))
                entries.remove(entry)
        step += 1
    rows += _results(entries)
    del entries, batches
    gc.collect()
    return rows


def _train(entry: Entry, batch: dict[str, Any], step: int) -> None:
    whole, _ = entry.train_watched(batch)
    if step >= WARM_UP * REFRESH:
        entry.seconds[entry.kind(step)].append(whole)


def _results(entries: list[Entry]) -> list[dict[str, Any]]:
    plain = {entry.name: median(entry.seconds['plain']) for entry in entries}
    rows = []
    for entry in entries:
        times = {kind: median(values) for kind, values in entry.seconds.items() if values}
        base = plain.get(entry.base, plain.get('AdamW', float('nan')))
        rows.append(
            dict(
                name=entry.name,
                seconds=times,
                plain_ratio=times['plain'] / base,
                ratio_20_200=amortised(times, 20, 200) / base,
                state_mb=entry.state_mb(),
                peak_mb=entry.peak_mb,
            )
        )
    return rows
