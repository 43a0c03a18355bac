"""Data of the thesis's kinds of figure (see figures.py)."""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from common import WORK
from common.models import build_model
from common.timing import seconds_of
from mmprecond.core import Curvature
from mmprecond.core.inspection import LayerView
from mmprecond.linalg import cholesky_inverse, largest_eigenvalue, newton_inverse
from mmprecond.optimizers import KFAC, NKFAC, SGDPH, SKFAC
from mmprecond.optimizers.peers import PeerHessian

#: A row of a figure's data: the line that it belongs to, and numbers by name.
Row = dict[str, Any]


def shapes(size: int = 32, count: int = 800) -> tuple[Tensor, Tensor]:
    """Images of shapes (n, 3, h, w) at about unit scale, and their classes."""
    from analysis_tools.accuracy import images

    return images(WORK / 'data/figures', count, size)


def train(optimizer: Any, model: Any, steps: int, batch: int = 64) -> Iterator[int]:
    """Trains a classifier on shapes; yields the number of each finished step."""
    pixels, labels = shapes()
    generator = torch.Generator().manual_seed(0)
    for step in tqdm(range(steps), unit='step'):
        chosen = torch.randint(len(pixels), (batch,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model.head(model.extract_feat(pixels[chosen])), labels[chosen]).backward()
        optimizer.step()
        yield step


def change(args: argparse.Namespace) -> list[Row]:
    """Relative change of each layer's statistics and inverses between captures.

    NKFAC as published, but with an exact inverse after each capture, trains a ResNet-18. The change
    is the Frobenius norm of the difference from the capture before, over that of the statistic.
    """
    model: Any = build_model('resnet18')
    model.init_weights()
    optimizer = NKFAC(
        model,
        lr=0.05,
        weight_decay=1e-3,
        settings='published',
        stat_interval=args.stat_interval,
        refresh_interval=args.stat_interval,
        solver='cholesky',
    )
    rows: list[Row] = []
    before: dict[str, LayerView] = {}
    for step in train(optimizer, model, args.steps):
        if step % args.stat_interval:
            continue
        for layer, stack in optimizer.curvature.layers.items():
            if not stack.holds(layer):  # branches begin at zero
                continue
            view = optimizer.curvature.layer(layer.name)
            if layer.name in before:
                rows.append(
                    {'line': layer.name, 'step': step, **_changes(before[layer.name], view)}
                )
            before[layer.name] = view
    return rows


def _changes(old: LayerView, new: LayerView) -> dict[str, float]:
    names = {'gradient': 'change of L', 'input': 'change of R'}
    found = {
        title: _relative(old.factors[side], new.factors[side])
        for side, title in names.items()
        if side in new.factors
    }
    inverses = [_relative(old.operators[key], new.operators[key]) for key in new.operators]
    return {**found, 'change of inverses': max(inverses)}


def _relative(old: Tensor, new: Tensor) -> float:
    return float(torch.linalg.vector_norm(new - old) / torch.linalg.vector_norm(new))


def newton(args: argparse.Namespace) -> list[Row]:
    """Residual ``||A B - I||_F`` of Newton's iteration, with both of its step sizes.

    A is a random second moment with damping 0.01, of norm 1; B is the inverse of A + P, where P is
    a random symmetric matrix of each given norm.
    """
    torch.manual_seed(0)
    matrix = random_moment(args.size)
    rows: list[Row] = []
    for size in args.perturbations:
        noise = torch.randn_like(matrix)
        noise = noise @ noise.mT
        start = torch.linalg.inv(matrix + size * noise / torch.linalg.matrix_norm(noise))
        for optimal in (False, True):
            inverse = start
            for iteration in range(args.iterations + 1):
                error = matrix @ inverse - torch.eye(args.size).double()
                line = f'perturbation {size:g}, {"optimal" if optimal else "norm"} step'
                residual = float(torch.linalg.matrix_norm(error))
                rows.append({'line': line, 'iteration': iteration, 'residual': residual})
                inverse, _ = newton_inverse(matrix, inverse, 1, optimal)
    return rows


def random_moment(size: int, damping: float = 0.01) -> Tensor:
    """Second moment (n, n) with eigenvalues that decrease like 1 / k, damped, of norm 1."""
    basis = torch.linalg.qr(torch.randn(size, size).double())[0]
    moment = basis @ (basis / torch.arange(1, size + 1)).mT
    moment = moment + damping * torch.eye(size).double()
    return moment / torch.linalg.matrix_norm(moment)


def inversion(args: argparse.Namespace) -> list[Row]:
    """Seconds and error of inverses of damped moments in float32, by solver.

    'newton' is one step from the inverse of a moment that differs by 2 % in norm. The largest
    eigenvalue, which gives the damping, is timed beside them. The error is
    ``||A B - I||_F / sqrt(n)`` in float64. At the first damping all sizes are measured, at the
    largest size all dampings.
    """
    rows: list[Row] = []
    pairs = [(int(n), args.dampings[0]) for n in args.sizes]
    pairs += [(int(max(args.sizes)), damping) for damping in args.dampings[1:]]
    for size, damping in tqdm(pairs):
        torch.manual_seed(size)
        exact = random_moment(size, 0.0)
        moment = exact.float()
        noise = torch.randn_like(moment) / size
        other = moment + 0.02 * (noise @ noise.mT) / torch.linalg.matrix_norm(noise @ noise.mT)
        eye = torch.eye(size)
        amount = damping * float(largest_eigenvalue(moment[None]))
        damped, last = moment + amount * eye, torch.linalg.inv(other + amount * eye)
        for line, solve in (
            ('cholesky', lambda d=damped: cholesky_inverse(d)[0]),
            ('eigenvectors', lambda d=damped: _by_eigenvectors(d)),
            ('newton', lambda d=damped, b=last: newton_inverse(d, b, 1)[0]),
            ('largest eigenvalue', lambda m=moment[None]: largest_eigenvalue(m)),
        ):
            row = {'line': line, 'size': size, 'damping': damping}
            row['seconds'] = min(seconds_of(solve) for _ in range(3))
            inverse = solve()
            if inverse.shape == damped.shape:
                error = damped.double() @ inverse.double() - torch.eye(size).double()
                row['error'] = float(torch.linalg.matrix_norm(error)) / size**0.5
            rows.append(row)
    return rows


def _by_eigenvectors(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors / values) @ vectors.mT


#: Settings of KFAC* and SKFAC* in table 3.16: NKFAC's damping and norm recovery.
STARRED = dict(damping_form='relative', damping=0.01, scaling='norm_recovery')
#: Optimizers of `shares`, with their settings.
SHARES_OPTIMIZERS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    'KFAC*': (KFAC, STARRED),
    'SKFAC*': (SKFAC, STARRED),
    'NKFAC': (NKFAC, {}),
}


def shares(args: argparse.Namespace) -> list[Row]:
    """Seconds of a training in inversions, in their damping, and in all else.

    A ResNet-18 is trained with the settings of each source. Damping is the search for the largest
    eigenvalues; it is part of a refresh, and inversion is the rest of that.
    """
    rows: list[Row] = []
    for name, (kind, settings) in SHARES_OPTIMIZERS.items():
        model: Any = build_model('resnet18')
        model.init_weights()
        optimizer = kind(
            model,
            lr=0.01,
            settings='published',
            stat_interval=args.stat_interval,
            refresh_interval=args.refresh_interval,
            **settings,
        )
        profile = cProfile.Profile()
        seconds = seconds_of(
            lambda: profile.runcall(deque, train(optimizer, model, args.steps), maxlen=0)  # noqa: B023
        )
        damping = _cumulative(profile, largest_eigenvalue)
        refresh = _cumulative(profile, Curvature.refresh)
        parts = {'inversion': refresh - damping, 'damping': damping, 'all else': seconds - refresh}
        rows += [{'line': part, 'optimizer': name, 'seconds': s} for part, s in parts.items()]
    return rows


def _cumulative(profile: cProfile.Profile, function: Callable[..., Any]) -> float:
    """Seconds in a function and in all that it called."""
    code = function.__code__
    stats: Any = pstats.Stats(profile)
    entry = stats.stats.get((code.co_filename, code.co_firstlineno, code.co_name))
    return float(entry[3]) if entry else 0.0


def partial(args: argparse.Namespace) -> list[Row]:
    """Time and memory of SGDPH relative to SGD, by its interval, and of AdaHessian.

    The model is a ResNet-18 at batch 64. Time is that of whole iterations. Memory is the peak of a
    process beyond what it has before the model is built.
    """
    jobs = [('SGD', 1)] + [
        (name, interval)
        for interval in map(int, args.intervals)
        for name in ('SGDPH, round_robin', 'SGDPH, all', 'AdaHessian')
    ]
    prices = []
    for name, interval in tqdm(jobs):
        with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
            prices.append(pool.submit(measure_cost, name, interval, args.steps, args.size).result())
    base = prices[0]
    return [
        {'line': name, 'interval': n, 'time': time / base[0], 'memory': memory / base[1]}
        for (name, n), (time, memory) in zip(jobs[1:], prices[1:], strict=True)
    ]


def measure_cost(name: str, interval: int, steps: int, size: int) -> tuple[float, float]:
    """Seconds of an iteration, and megabytes of this process at its peak."""
    before = _peak()
    torch.manual_seed(0)
    model: Any = build_model('resnet18')
    hessian = None
    if name == 'AdaHessian':
        from pytorch_optimizer import AdaHessian

        optimizer: Any = AdaHessian(model.parameters(), lr=0.1, update_period=interval)
        hessian = PeerHessian(optimizer)
    elif name == 'SGD':
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    else:
        refresh = name.split(', ')[1]
        optimizer = SGDPH(model, lr=0.01, interval=interval, refresh=refresh)
    source = hessian or optimizer
    pixels, labels = torch.randn(64, 3, size, size), torch.randint(1000, (64,))

    def iterate() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model.head(model.extract_feat(pixels)), labels)
        loss.backward(create_graph=getattr(source, 'needs_graph', False))
        if hessian is not None:
            hessian.measure()
        optimizer.step()

    iterate()
    return sum(seconds_of(iterate) for _ in range(steps)) / steps, _peak() - before


def _peak() -> float:
    """Megabytes of this process at its peak so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
