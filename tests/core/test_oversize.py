"""Sides over max_dim in diagonal blocks or low rank, and clip_update."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tests.reference.feature
import tests.reference.kfac
import tests.reference.nkfac
import tests.reference.root
import tests.reference.rules
from mmprecond.curvature import Blocks, Sketch
from mmprecond.optimizers import (
    FSGD,
    KFAC,
    NKFAC,
    SGDMBK,
    AdamWBK,
    AdaNKFAC,
    FAdam,
)
from tests.reference.factors import plain_copy
from tests.reference.kfac import ReferenceKFAC, kfac_factors
from tests.support.oversize import EVERY, FORMS, chain, normal, one_step
from tests.support.trajectories import Convs, follow, make_loss
from tests.support.trajectories import batch as rows

SGD = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
ADAM = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-7, weight_decay=0.02)
STAR = dict(damping_form='relative', damping=0.01, scaling='norm_recovery')


# ------------------------------------------------------------------- what is measured


def pieces(matrix: Tensor, largest: int) -> list[Tensor]:
    """Diagonal blocks of at most `largest`, all but the last of one size."""
    n = len(matrix)
    size = math.ceil(n / math.ceil(n / largest))
    return [matrix[at : at + size, at : at + size] for at in range(0, n, size)]


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    'linear': (lambda: nn.Linear(7, 5), (6, 7)),
    'tokens': (lambda: nn.Linear(8, 7, bias=False), (3, 4, 8)),
    'conv': (lambda: nn.Conv2d(2, 5, 3, stride=2, padding=1), (3, 2, 6, 5)),
    'dilated': (lambda: nn.Conv2d(3, 4, (2, 1), dilation=2, bias=False), (2, 3, 5, 4)),
}


@pytest.mark.parametrize('reduction', ['expand', 'reduce'])
@pytest.mark.parametrize('case', CASES)
def test_statistics(case: str, reduction: str) -> None:
    """Of three calls in two micro-batches, patches laid out a few at a time."""
    torch.manual_seed(0)
    make, shape = CASES[case]
    model = nn.Sequential(make()).double()
    losses = [
        lambda m, s=s: sum((m(normal(*shape, seed=k)) ** 2).sum() for k in range(s, 3, 2))
        for s in (0, 1)
    ]
    weight = '0.weight'
    joint = model[0].bias is not None
    plain = plain_copy(model)
    right, left, _ = kfac_factors(plain, losses, plain[0].weight, joint, reduction)
    for form in FORMS:
        optimizer = KFAC(
            model,
            lr=0.0,
            max_dim=3,
            max_rank=2,
            oversize=form,
            reduction=reduction,
            capture_mb=1e-4,
            settings='published',
        )
        optimizer.zero_grad()
        for loss in losses:
            loss(model).backward()
        optimizer.step()
        (layer,) = optimizer.curvature.layers
        kept = optimizer.state_dict()['precond']['layers'][weight]['statistics']
        for side, dense in (('input', right), ('gradient', left)):
            name = f'{side}_{"blocks" if form == "block" else "sketch"}'
            name += '_reduced' if reduction == 'reduce' else ''
            if form == 'lowrank':
                (one,) = (s for s in optimizer.curvature.stacks[0].kept if s.key == name)
                wanted = dense @ one.form.test_matrix(layer, name, dense.shape[-1])
            else:
                cut = [piece for one in dense for piece in pieces(one, 3)]
                size = len(cut[0])
                wanted = torch.stack([nn.functional.pad(p, 2 * [0, size - len(p)]) for p in cut])
            torch.testing.assert_close(kept[name], wanted, rtol=1e-10, atol=1e-10)
        assert len(kept) == 2


# ------------------------------------------------------------------- trajectories

NORMALISED = tests.reference.nkfac.Factor.merge


class Cut:
    """One factor of a reference, as a block-diagonal matrix of smaller factors."""

    def __init__(self, kind: Callable[[Any], Any], settings: dict[str, Any], largest: int) -> None:
        self.make, self.largest = lambda: kind(settings), largest
        self.parts: list[Any] = []
        self.refreshes = 0

    def merge(self, sample: Tensor) -> None:
        cut = pieces(sample, self.largest)
        self.parts = self.parts or [self.make() for _ in cut]
        whole = torch.block_diag(*cut).norm()
        for part, piece in zip(self.parts, cut, strict=True):
            before = part.running
            part.merge(piece)
            if type(part).merge is NORMALISED:  # normalised, but with the rest
                decay = part.settings['stat_decay']
                part.running = decay * before + (1 - decay) * piece / whole

    def refresh(self, damping: float) -> None:
        """All parts are damped as that of the largest eigenvalue."""
        tops = [tests.reference.nkfac.power_iteration(part.running) for part in self.parts]
        for part, top in zip(self.parts, tops, strict=True):
            part.refresh(damping * max(tops) / top)
        self.refreshes += 1

    @property
    def inverse(self) -> Tensor:
        return torch.block_diag(*[part.inverse for part in self.parts])


class CutFisher(tests.reference.kfac.Block):
    """KFAC's factors without what is outside their diagonal blocks."""

    largest = 0

    def refresh(self, damping: float) -> None:
        self.running = [torch.block_diag(*pieces(f, self.largest)) for f in self.running]
        if self.settings['damping_form'] == 'pi':
            return super().refresh(damping)
        self.inverses = []
        for factor in self.running:
            tops = [tests.reference.nkfac.power_iteration(p) for p in pieces(factor, self.largest)]
            damped = [
                piece + damping * max(tops) * torch.eye(len(piece)).double()
                for piece in pieces(factor, self.largest)
            ]
            self.inverses.append(torch.linalg.inv(torch.block_diag(*damped)))
        self.refreshes += 1


#: Optimizer, its reference, the name of the reference's factor, rule, settings.
METHODS: dict[str, tuple[Any, Any, Any, str, dict[str, Any], dict[str, Any]]] = {
    'NKFAC': (
        NKFAC,
        tests.reference.nkfac.ReferenceNKFAC,
        tests.reference.nkfac,
        'Factor',
        SGD,
        dict(exact_interval=4),
    ),
    'AdaNKFAC': (
        AdaNKFAC,
        tests.reference.nkfac.ReferenceNKFAC,
        tests.reference.nkfac,
        'Factor',
        ADAM,
        dict(solver='cholesky'),
    ),
    'FSGD': (FSGD, None, tests.reference.feature, 'Feature', SGD, dict(exponent=1.0, damping=0.03)),
    'FAdam': (FAdam, None, tests.reference.feature, 'Feature', ADAM, dict(exponent=0.5)),
    'SGDMBK': (
        SGDMBK,
        tests.reference.root.ReferenceRoot,
        tests.reference.root,
        'Root',
        SGD,
        dict(solver='eigh', damping=1e-3),
    ),
    'AdamWBK': (
        AdamWBK,
        tests.reference.root.ReferenceRoot,
        tests.reference.root,
        'Root',
        ADAM,
        dict(solver='eigh', damping=0.01),
    ),
    'KFAC': (KFAC, ReferenceKFAC, tests.reference.kfac, 'Block', SGD, dict(STAR)),
    'KFAC reduce': (
        KFAC,
        ReferenceKFAC,
        tests.reference.kfac,
        'Block',
        SGD,
        dict(STAR, reduction='reduce', scaling='none', damping=0.3),
    ),
    'KFAC pi': (KFAC, ReferenceKFAC, tests.reference.kfac, 'Block', SGD, dict(damping=0.0625)),
}


def reference_of(method: str, model: nn.Module, settings: dict[str, Any]) -> Any:
    _, kind, _, _, rule, _ = METHODS[method]
    if kind is not None:
        return kind(plain_copy(model), **rule, **settings, settings='published')
    steps = (
        tests.reference.rules.ReferenceAdamW(rule['betas'], rule['eps'])
        if 'betas' in rule
        else tests.reference.rules.ReferenceSGDM(rule['momentum'])
    )
    return tests.reference.feature.ReferenceFeature(
        plain_copy(model), steps, rule['lr'], rule['weight_decay'], **settings
    )


class Ungrouped(Convs):
    """The same with ordinary convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 6, 2, stride=2, dilation=2, padding=1)


#: Networks, their input features, max_dim.
NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    'even': (lambda: chain(24, 12, 3, bias=False), 24, 8),  # 3, 2 and 1 blocks without padding
    'padded': (lambda: chain(20, 18, 16, 3), 20, 7),
    'convs': (Ungrouped, 0, 5),
}


def in_blocks(method: str, net: str, patch: pytest.MonkeyPatch) -> None:
    kind, _, module, factor, rule, options = METHODS[method]
    make, features, largest = NETS[net]
    model = make().double()
    settings = dict(EVERY, **options)
    real = getattr(module, factor)
    patch.setattr(CutFisher, 'largest', largest)
    patch.setattr(
        module,
        factor,
        CutFisher if module is tests.reference.kfac else lambda s: Cut(real, s, largest),
    )
    optimizer = kind(
        model, **rule, **settings, oversize='block', max_dim=largest, settings='published'
    )
    assert any(
        isinstance(statistic.form, Blocks)
        for stack in optimizer.curvature.stacks
        for statistic in stack.kept
    )
    follow(
        model,
        optimizer,
        reference_of(method, model, settings),
        lambda t: [make_loss(rows(t, 4, features))],
        7 if features else 3,
    )


@pytest.mark.parametrize(
    'method, net',
    [
        (m, n)
        for m in METHODS
        for n in NETS
        if (m, n) not in {('NKFAC', 'padded'), ('KFAC pi', 'padded'), ('KFAC pi', 'convs')}
    ],
)
def test_trajectories_in_blocks(method: str, net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks(method, net, monkeypatch)


def test_pi_is_of_whole_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both sides are cut into as many blocks."""
    monkeypatch.setitem(NETS, 'equal', (lambda: chain(12, 12, 3, bias=False), 12, 6))
    in_blocks('KFAC pi', 'equal', monkeypatch)


@pytest.mark.parametrize(
    'method, net',
    [
        (m, n)
        for m in METHODS
        for n in ('whole', 'low', 'convs')
        if 'NKFAC' not in m or n != 'convs'
    ],
)
def test_trajectories_at_full_rank(method: str, net: str) -> None:
    """Where the rank is enough for all rows so far, nothing is lost."""
    kind, _, _, _, rule, options = METHODS[method]
    settings = dict(EVERY, **options)
    if 'NKFAC' in method:  # captures are divided by the norm of a sketch, which then cancels
        settings.update(stat_decay=0.0, solver='cholesky')
    make, features = (Ungrouped, 0) if net == 'convs' else (lambda: chain(22, 19, 17, 3), 22)
    model = make().double()
    optimizer = kind(
        model,
        **rule,
        **settings,
        oversize='lowrank',
        max_dim=4,
        max_rank=16 if net == 'low' else 40,
    )
    assert any(
        isinstance(statistic.form, Sketch)
        for stack in optimizer.curvature.stacks
        for statistic in stack.kept
    )
    follow(
        model,
        optimizer,
        reference_of(method, model, settings),
        lambda t: [make_loss(rows(t, 3, features))],
        2 if net == 'convs' else 5,
        atol=1e-7,
    )


# ------------------------------------------------------------------- error and memory


class Peak(TorchDispatchMode):
    """The most entries of any tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, Tensor):
                self.most = max(self.most, one.numel())
        return result


@pytest.mark.parametrize('kind', [FSGD, NKFAC, SGDMBK, KFAC])
def test_more_rank_is_closer_to_the_dense_direction(kind: Any) -> None:
    x = normal(400, 60) * 0.8 ** torch.arange(60).double()
    start = nn.Linear(60, 4, bias=False).double()

    def direction(**options: Any) -> Tensor:
        model = copy.deepcopy(start)
        star = dict(STAR, damping=0.01) if kind is KFAC else dict(damping=0.01)
        if kind is SGDMBK:
            star['solver'] = 'eigh'
        optimizer = kind(model, lr=1.0, momentum=0.0, **star, **options)
        return one_step(model, optimizer, x)[0]

    dense = direction()
    errors = [
        float((direction(max_dim=20, oversize='lowrank', max_rank=m) - dense).norm() / dense.norm())
        for m in (2, 12, 24, 60)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1
    assert errors[2] < 0.05 and errors[3] < 1e-6


def test_a_wide_layer_takes_memory_by_its_rank() -> None:
    n, rank = 3000, 8
    model = nn.Sequential(nn.Linear(n, 20))
    x = torch.randn(16, n)
    for kind in (NKFAC, FSGD, KFAC, SGDMBK):
        optimizer = kind(
            model, lr=0.01, max_dim=100, oversize='lowrank', max_rank=rank, damping=0.01
        )
        with Peak() as peak:
            one_step(model, optimizer, x)
        assert peak.most <= 20 * (n + 1)
        entry = optimizer.state_dict()['precond']['layers']['0.weight']
        kept = [t for part in ('statistics', 'operator') for t in entry[part].values()]
        own = 2 * (n + 1) * rank + 1
        assert sum(t.numel() for t in kept) == own + (0 if kind is FSGD else 2 * 20 * 20)
        (line,) = (li for li in optimizer.table().splitlines() if li.startswith('0 '))
        assert f'{n + 1}x{rank}' in line and 'input side' in line and f'rank {rank}' in line
        assert f'{sum(t.numel() for t in kept) * 4 / 2**20:.1f}' in line


def test_the_table_tells_of_blocks() -> None:
    optimizer = NKFAC(chain(30, 25, 3), lr=0.1, max_dim=20, oversize='block', settings='published')
    first, second = (li for li in optimizer.table().splitlines() if li[:1] in '01' and '.0' in li)
    assert '2 x 16x16' in first and '2 x 13x13' in first and 'blocks of 16' in first
    assert 'input' in second and 'gradient' not in second and '2 x 13x13' in second
