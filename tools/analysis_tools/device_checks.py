"""Checks that an optimizer works on a device: results, mixed precision, resume, no waits."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.vision import VisionModel, batch_of, classifier
from mmprecond import optimizers
from mmprecond.checks import first_line
from mmprecond.optimizers import PreconditionedOptimizer

#: Methods that are checked; the last one is attention's with NKFAC elsewhere.
METHODS = ('NKFAC', 'AdamR', 'FAdam', 'AdaAFOpt', 'SGDMBK', 'KFAC', 'MAC', 'NysAct', 'AFOpt+NKFAC')
STEPS = 8
#: Largest difference of weights from those in float64 on the CPU, relative to the change.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-2}
RATE = 1e-3


@dataclass(frozen=True)
class Check:
    """Outcome of one check.

    Attributes:
        name: Name of the check.
        subject: Method or precision.
        passed: Whether it passed; None if it does not apply to the device.
        detail: What was measured.
    """

    name: str
    subject: str
    passed: bool | None
    detail: str


def run_checks(device: torch.device) -> list[Check]:
    """Runs all checks on a device."""
    checks = []
    for method in METHODS:
        checks += [
            attempt(name, method, check, method, device)
            for name, check in (
                ('float64 and float32 against the CPU', against_cpu),
                ('resumed to the bit', resumed),
                ('no wait on a plain step', no_wait),
            )
        ]
    for dtype in (torch.float16, torch.bfloat16):
        subject = str(dtype).removeprefix('torch.')
        checks.append(attempt('mixed precision', subject, mixed_precision, dtype, device))
    return checks


def attempt(
    name: str, subject: str, check: Callable[..., tuple[bool | None, str]], *args: Any
) -> Check:
    """Runs one check; an error is a failure."""
    try:
        return Check(name, subject, *check(*args))
    except Exception as error:
        return Check(name, subject, False, first_line(error))


def small_model(device: torch.device, dtype: torch.dtype = torch.float32) -> VisionModel:
    """A small Swin with convolution, attention and linear layers."""
    torch.manual_seed(0)
    model: VisionModel = classifier('swin-mini').to(device, dtype)
    return model


def small_batch(device: torch.device, dtype: torch.dtype, step: int) -> dict[str, Tensor]:
    """Eight images of 32 px."""
    batch = batch_of(8, (32, 32), 10, step)
    return dict(inputs=batch['inputs'].to(device, dtype), targets=batch['targets'].to(device))


def build(method: str, model: VisionModel, **settings: Any) -> PreconditionedOptimizer:
    """Optimizer that measures every second step and refreshes every fourth."""
    settings = dict(stat_interval=2, refresh_interval=4, early_refreshes=False) | settings
    if '+' in method:
        parts = zip(('attention', 'elsewhere'), method.split('+'), strict=True)
        layers = {part: dict(type=word, **settings) for part, word in parts}
        rule = dict(type='AdamW', lr=RATE)
        return optimizers.Preconditioned(
            model, rule=rule, layers=layers, matmul_precision='highest'
        )
    kind = getattr(optimizers, method)
    made: PreconditionedOptimizer = kind(model, lr=RATE, matmul_precision='highest', **settings)
    return made


def train(
    model: VisionModel, optimizer: PreconditionedOptimizer, steps: range, dtype: torch.dtype
) -> None:
    """Takes some steps."""
    device = next(model.parameters()).device
    for step in steps:
        optimizer.zero_grad()
        model.parse_losses(model(**small_batch(device, dtype, step)))[0].backward()
        optimizer.step()


def against_cpu(method: str, device: torch.device) -> tuple[bool, str]:
    """Compares weights on the device, in two precisions, with those in float64 on the CPU."""
    cpu = torch.device('cpu')
    start = flat(small_model(cpu, torch.float64))

    def weights(place: torch.device, dtype: torch.dtype) -> Tensor:
        model = small_model(place, dtype)
        optimizer = build(method, model)
        train(model, optimizer, range(STEPS), dtype)
        return flat(model)

    expected = weights(cpu, torch.float64)
    change = (expected - start).norm()
    errors = {
        dtype: float((weights(device, dtype) - expected).norm() / change) for dtype in TOLERANCES
    }
    detail = ', '.join(f'{str(dtype)[6:]} {error:.1e}' for dtype, error in errors.items())
    return all(errors[dtype] <= limit for dtype, limit in TOLERANCES.items()), detail


def flat(model: nn.Module) -> Tensor:
    """All weights as one float64 vector on the CPU."""
    return torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])


def resumed(method: str, device: torch.device) -> tuple[bool, str]:
    """Compares a run with one that is saved in the middle, loaded and continued."""
    model = small_model(device)
    optimizer = build(method, model)
    train(model, optimizer, range(STEPS // 2 + 1), torch.float32)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin = small_model(device)
    twin.load_state_dict(weights)
    other = build(method, twin)
    other.load_state_dict(state)
    rest = range(STEPS // 2 + 1, STEPS + 4)
    train(model, optimizer, rest, torch.float32)
    train(twin, other, rest, torch.float32)
    difference = float((flat(model) - flat(twin)).abs().max())
    return difference == 0, f'largest difference {difference:g}'


def no_wait(method: str, device: torch.device) -> tuple[bool | None, str]:
    """Takes a plain step while torch raises an error for each wait."""
    if device.type != 'cuda':
        return None, 'on a GPU only'
    model = small_model(device)
    optimizer = build(method, model, stat_interval=4, refresh_interval=8)
    train(model, optimizer, range(6), torch.float32)
    optimizer.zero_grad()
    model.parse_losses(model(**small_batch(device, torch.float32, 6)))[0].backward()
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode('error')
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode('default')
    return True, ''


def mixed_precision(dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Trains NKFAC in full and in mixed precision, with a loss scale for float16."""
    ends = {}
    for chosen in (None, dtype):
        model = small_model(device)
        optimizer = optimizers.NKFAC(model, lr=0.01, stat_interval=2, refresh_interval=4)
        scaled = chosen is torch.float16
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**12, enabled=scaled)
        optimizer.loss_scale = scaler if scaled else None
        for step in range(24):
            optimizer.zero_grad()
            context = torch.autocast(device.type, chosen) if chosen else nullcontext()
            with context:
                loss = model.parse_losses(model(**small_batch(device, torch.float32, step % 4)))[0]
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        ends[chosen] = float(loss.detach())
        kinds = {t.dtype for s in optimizer.curvature.stacks for t in s.statistics.values()}
        assert kinds == {torch.float32}, f'statistics are in {kinds}'
    close = abs(ends[dtype] - ends[None]) <= 0.2 * max(ends[None], 0.5)
    return (
        close,
        f'loss {ends[dtype]:.3f}, in float32 {ends[None]:.3f}, dropped {optimizer.dropped}',
    )
