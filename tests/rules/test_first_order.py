"""Rules: against torch, and Adan against a slow reference and MMPretrain's."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import AdaAFOpt, FAdam, Preconditioned, PreconditionedOptimizer
from mmprecond.rules import RULES, AdamW, Adan, build_rule
from tests.reference.factors import plain_copy
from tests.reference.feature import ReferenceFeature
from tests.reference.rules import (
    ReferenceAdaBelief,
    ReferenceAdaGrad,
    ReferenceAdamW,
    ReferenceAdan,
    ReferenceRAdam,
    ReferenceSGDM,
)
from tests.support.errors import refused
from tests.support.states import differences, everything, saved
from tests.support.trajectories import Tokens, follow, make_loss
from tests.support.trajectories import batch as rows

FEATURE = [dict(preconditioner=dict(type='InputFeature', stat_interval=1, refresh_interval=1))]
SHAPES = ((3, 4), (3,), (2, 3, 2, 2), (3, 4), (), (1, 1))


class Bare(nn.Module):
    """Parameters, of which none belongs to a layer that is ever called."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.free = nn.ParameterList(
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES
        )
        self.layer = nn.Linear(2, 2).double().requires_grad_(False)


def gradients(step: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(50 + step)
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES
    ]


def give(model: Bare, values: Sequence[Tensor | None]) -> None:
    """Sets all gradients."""
    for p, g in zip(model.free, values, strict=True):
        p.grad = None if g is None else g.clone()


def optimizer_of(model: Bare, *groups: dict[str, Any], **rule: Any) -> PreconditionedOptimizer:
    given = [dict(params=[*model.free, *model.layer.parameters()])] if not groups else list(groups)
    if groups:
        given.append(dict(params=list(model.layer.parameters())))
    return Preconditioned(given, model=model, rule=rule, layers=FEATURE)


def compare(ours: Bare, theirs: Bare, atol: float = 1e-12) -> None:
    for a, b in zip(ours.free, theirs.free, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


# ------------------------------------------------------------------- torch's own


@pytest.mark.parametrize('momentum', [0.0, 0.9])
@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_sgdm_is_torchs(momentum: float, weight_decay: float) -> None:
    hyper = dict(lr=0.1, momentum=momentum, weight_decay=weight_decay)
    model, other = Bare(), Bare()
    ours = optimizer_of(model, type='SGDM', **hyper)
    theirs = torch.optim.SGD(other.free, **hyper)
    for step in range(12):
        give(model, gradients(step)), give(other, gradients(step))
        ours.step(), theirs.step()
        compare(model, other)


@pytest.mark.parametrize(
    'hyper',
    [
        {},
        dict(weight_decay=0.1),
        dict(betas=(0.5, 0.7), eps=1e-3, weight_decay=1.0),
        dict(betas=(0.0, 0.9)),
        dict(betas=(0.9, 0.0)),
    ],
    ids=str,
)
def test_decoupled_adamw_is_torchs(hyper: dict[str, Any]) -> None:
    model, other = Bare(), Bare()
    ours = optimizer_of(model, type='AdamW', lr=0.03, **hyper)
    theirs = torch.optim.AdamW(other.free, lr=0.03, **{'weight_decay': 0.0, **hyper})
    for step in range(12):
        give(model, gradients(step)), give(other, gradients(step))
        ours.step(), theirs.step()
        compare(model, other)


def test_published_decay_is_larger_by_the_bias_correction() -> None:
    """lr / (1 - beta1^t) weight_decay p; the direction itself is the decoupled rule's."""
    for last in range(5):
        moved = {}
        for decay in ('decoupled', 'published'):
            model = Bare()
            optimizer = optimizer_of(model, type='AdamW', lr=0.0, weight_decay=0.2, decay=decay)
            for step in range(last + 1):
                optimizer.param_groups[0]['lr'] = 0.01 if step == last else 0.0
                give(model, gradients(step)), optimizer.step()
            moved[decay] = [p.detach() for p in model.free]
        extra = 0.01 * 0.2 * (1 / (1 - 0.9 ** (last + 1)) - 1)
        for start, plain, more in zip(Bare().free, *moved.values(), strict=True):
            torch.testing.assert_close(plain - more, extra * start.detach(), rtol=1e-9, atol=1e-15)


# ------------------------------------------------------------------- references

REFERENCES = {
    'SGDM': (dict(momentum=0.7), lambda: ReferenceSGDM(0.7)),
    'nesterov SGDM': (dict(momentum=0.7, nesterov=True), lambda: ReferenceSGDM(0.7, True)),
    'AdamW': (dict(betas=(0.8, 0.95), eps=1e-7), lambda: ReferenceAdamW((0.8, 0.95), 1e-7)),
    'Adan': (dict(betas=(0.8, 0.7, 0.95), eps=1e-4), lambda: ReferenceAdan((0.8, 0.7, 0.95), 1e-4)),
    'AdaGrad': (dict(eps=1e-4), lambda: ReferenceAdaGrad(1e-4)),
    'RAdam': (dict(betas=(0.8, 0.9), eps=1e-4), lambda: ReferenceRAdam((0.8, 0.9), 1e-4)),
    'AdaBelief': (dict(betas=(0.8, 0.9), eps=1e-6), lambda: ReferenceAdaBelief((0.8, 0.9), 1e-6)),
    'default Adan': ({}, lambda: ReferenceAdan((0.98, 0.92, 0.99), 1e-8)),
}


@pytest.mark.parametrize('weight_decay', [0.0, 0.3])
@pytest.mark.parametrize('name', REFERENCES)
def test_rules_follow_their_references(name: str, weight_decay: float) -> None:
    hyper, make = REFERENCES[name]
    model, other, reference = Bare(), Bare(), make()
    optimizer = optimizer_of(
        model, type=name.split()[-1], lr=0.05, weight_decay=weight_decay, **hyper
    )
    for step in range(15):
        give(model, gradients(step, 1 + step))
        optimizer.step()
        for p, g in zip(other.free, gradients(step, 1 + step), strict=True):
            reference.step(p, g, 0.05, weight_decay)
        compare(model, other, 1e-11)


@pytest.mark.parametrize('name', REFERENCES)
def test_each_parameter_has_steps_and_settings_of_its_own(name: str) -> None:
    """Batches of one: lr and decay by group, parameters that start late or pause."""
    hyper, make = REFERENCES[name]
    model, other, reference = Bare(), Bare(), make()
    rates, decays = (0.1, 0.02, 0.1, 0.05, 0.0, 0.1), (0.0, 0.2, 0.0, 0.2, 0.1, 0.3)
    groups = [
        dict(params=[p], lr=lr, weight_decay=decay)
        for p, lr, decay in zip(model.free, rates, decays, strict=True)
    ]
    optimizer = optimizer_of(model, *groups, type=name.split()[-1], lr=1.0, **hyper)
    for step in range(10):
        values = [
            None if (k == 3 and step < 4) or (k == 0 and step % 3 == 1) else g
            for k, g in enumerate(gradients(step))
        ]
        give(model, values)
        optimizer.step()
        for p, g, lr, decay in zip(other.free, values, rates, decays, strict=True):
            if g is not None:
                reference.step(p, g, lr, decay)
        compare(model, other, 1e-11)


def test_a_rate_that_changes_scales_the_step_alone() -> None:
    model, other, reference = Bare(), Bare(), ReferenceAdan((0.98, 0.92, 0.99), 1e-8)
    optimizer = optimizer_of(model, type='Adan', lr=0.1, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    for step in range(6):
        give(model, gradients(step))
        optimizer.step()
        for p, g in zip(other.free, gradients(step), strict=True):
            reference.step(p, g, 0.1 * 0.7**step, 0.1)
        compare(model, other)
        schedule.step()


# ------------------------------------------------------------------- Adan


def test_adans_first_step_has_no_difference() -> None:
    """Whatever the betas, its direction is g / (|g| + eps): that of Adam."""
    for betas in ((0.98, 0.92, 0.99), (0.1, 0.2, 0.3), (0.0, 0.0, 0.0)):
        model, before = Bare(), Bare()
        give(model, gradients(0))
        optimizer_of(model, type='Adan', lr=0.1, betas=betas).step()
        for a, b, g in zip(before.free, model.free, gradients(0), strict=True):
            torch.testing.assert_close(
                (a - b).detach(), 0.1 * g / (g.abs() + 1e-8), rtol=1e-10, atol=1e-12
            )


def test_adans_decay_is_proximal() -> None:
    """A division, so that no decay however large turns a parameter around."""
    model, before = Bare(), Bare()
    give(model, [torch.zeros_like(p) for p in model.free])
    optimizer_of(model, type='Adan', lr=0.5, weight_decay=100.0).step()
    for a, b in zip(before.free, model.free, strict=True):
        torch.testing.assert_close(b, a / 51, rtol=0, atol=1e-15)


@pytest.mark.parametrize('foreach', [True, False])
@pytest.mark.parametrize(
    'hyper',
    [
        dict(weight_decay=0.1),
        dict(weight_decay=0.0),
        dict(betas=(0.7, 0.8, 0.9), eps=1e-3, weight_decay=1.0),
    ],
    ids=str,
)
def test_adan_is_mmpretrains(foreach: bool, hyper: dict[str, Any]) -> None:
    theirs = pytest.importorskip('mmpretrain.engine.optimizers.adan_t').Adan
    model, other = Bare(), Bare()
    ours = optimizer_of(model, type='Adan', lr=0.02, **hyper)
    oracle = theirs(list(other.free), lr=0.02, foreach=foreach, no_prox=False, **hyper)
    for step in range(20):
        give(model, gradients(step)), give(other, gradients(step))
        ours.step(), oracle.step()
        compare(model, other)


def preconditioned(rule: str) -> tuple[nn.Module, PreconditionedOptimizer, ReferenceFeature]:
    model = Tokens().double()
    hyper, make = REFERENCES[rule]
    optimizer = Preconditioned(
        model, layers=FEATURE, rule=dict(type=rule.split()[-1], lr=0.01, weight_decay=0.1, **hyper)
    )
    return model, optimizer, ReferenceFeature(plain_copy(model), make(), 0.01, 0.1)


@pytest.mark.parametrize('rule', REFERENCES)
def test_rules_work_on_preconditioned_directions(rule: str) -> None:
    """Adan's difference is that of directions, not of raw gradients."""
    model, optimizer, reference = preconditioned(rule)
    follow(model, optimizer, reference, lambda t: [make_loss(rows(t, features=6))], 6)


@pytest.mark.parametrize('at', [1, 2, 5])
@pytest.mark.parametrize('rule', REFERENCES)
def test_a_resumed_run_continues_bit_for_bit(rule: str, at: int) -> None:
    model, optimizer, _ = preconditioned(rule)

    def run(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            make_loss(rows(step, features=6), use_second=step >= 2)(model).backward()
            optimizer.step()

    run(model, optimizer, range(at))
    twin = copy.deepcopy(model)
    resumed = Preconditioned(
        twin,
        layers=FEATURE,
        rule=dict(type=rule.split()[-1], lr=0.01, weight_decay=0.1, **REFERENCES[rule][0]),
    )
    resumed.load_state_dict(saved(optimizer.state_dict()))
    run(model, optimizer, range(at, 9)), run(twin, resumed, range(at, 9))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


@pytest.mark.parametrize(
    'saved_rule, loaded', [('AdamW', 'AdaBelief'), ('AdaBelief', 'RAdam'), ('AdaBelief', 'AdamW')]
)
def test_the_state_of_another_rule_is_refused(saved_rule: str, loaded: str) -> None:
    """Its second moment would start from zero at a late step."""
    model, optimizer, _ = preconditioned(saved_rule)
    make_loss(rows(0, features=6))(model).backward()
    optimizer.step()
    other = preconditioned(loaded)[1]
    refused(ValueError, lambda: other.load_state_dict(saved(optimizer.state_dict())), 'afresh')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('rule', ['AdaGrad', 'RAdam'])
def test_the_default_dtype_does_not_matter(
    rule: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Bare().float()
    optimizer = optimizer_of(model, type=rule, lr=0.1)
    give(model, [g.float() for g in gradients(0)])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        optimizer.step()
    finally:
        torch.set_default_dtype(before)
    assert all(p.isfinite().all() for p in model.free)


def test_adans_state_is_its_own() -> None:
    """Neither a gradient that is changed afterwards nor the next one reaches what it remembers."""
    model, other, reference = Bare(), Bare(), ReferenceAdan((0.98, 0.92, 0.99), 1e-8)
    optimizer = optimizer_of(model, type='Adan', lr=0.1)
    for step in range(4):
        give(model, gradients(step))
        optimizer.step()
        for p, g in zip(other.free, gradients(step), strict=True):
            reference.step(p, g, 0.1, 0.0)
        for p in model.free:
            p.grad.zero_()
    compare(model, other)


def test_adan_copies_no_gradient_once_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Bare()
    optimizer = optimizer_of(model, type='Adan', lr=0.1)
    give(model, gradients(0)), optimizer.step()
    give(model, gradients(1))
    copies, clone = [], Tensor.clone
    monkeypatch.setattr(Tensor, 'clone', lambda t, **kw: copies.append(t) or clone(t, **kw))
    optimizer.step()
    assert not copies


# ------------------------------------------------------------------- settings


def test_settings_of_ada_afopt() -> None:
    net = lambda: nn.Linear(3, 2)
    adan, adamw = AdaAFOpt(net(), 0.1, rule='Adan'), AdaAFOpt(net(), 0.1)
    assert type(adan.rule) is Adan and adan.defaults['betas'] == (0.98, 0.92, 0.99)
    assert type(adamw.rule) is AdamW and adamw.defaults['betas'] == (0.9, 0.999)
    assert adamw.rule.decay == 'decoupled'
    own = AdaAFOpt(net(), 0.1, betas=(0.1, 0.2, 0.3), eps=0.1, weight_decay=0.2, rule='Adan')
    shared = dict(lr=0.1, betas=(0.1, 0.2, 0.3), eps=0.1, weight_decay=0.2)
    assert own.defaults == dict(shared, momentum=0.1, damping=0.01)  # for schedulers of momentum
    for rule in ('SGDM', 'Adam', None):
        refused(ValueError, lambda: AdaAFOpt(net(), 0.1, rule=rule), repr(rule), 'AdamW, Adan')
    refused(TypeError, lambda: AdaAFOpt(net(), 0.1, momentum=0.9), 'momentum', '`_delete_=True`')


@pytest.mark.parametrize('betas', [(0.9, 0.999), (0.9,), (0.9, 0.9, 0.9, 0.9), 0.9, None])
def test_adan_takes_three_betas(betas: Any) -> None:
    remedy = 'write betas=(0.98, 0.92, 0.99)'
    refused(
        ValueError,
        lambda: Preconditioned(
            nn.Linear(2, 2), rule=dict(type='Adan', lr=0.1, betas=betas), layers=FEATURE
        ),
        remedy,
    )
    if betas is not None:  # there it means the default
        refused(
            ValueError, lambda: AdaAFOpt(nn.Linear(2, 2), 0.1, betas=betas, rule='Adan'), remedy
        )
    three = dict(lr=0.1, betas=(0.9, 0.9, 0.9))
    refused(ValueError, lambda: FAdam(nn.Linear(2, 2), **three), 'write betas=(0.9, 0.999)')


@pytest.mark.parametrize('beta', [1.0, -0.1, float('nan'), '0.9'])
@pytest.mark.parametrize('position', range(3))
def test_betas_out_of_range(position: int, beta: Any) -> None:
    betas = [0.9, 0.9, 0.9]
    betas[position] = beta
    refused(
        ValueError,
        lambda: Preconditioned(
            nn.Linear(2, 2), rule=dict(type='Adan', lr=0.1, betas=betas), layers=FEATURE
        ),
        f'betas={beta!r}',
        'less than 1',
    )


@pytest.mark.parametrize('name', RULES)
def test_build_rule(name: str) -> None:
    config = dict(type=name, lr=0.1, weight_decay=0.5)
    rule, defaults = build_rule(config)
    assert type(rule) is RULES[name] and isinstance(rule, RULES[name])
    assert defaults == {**RULES[name].defaults, 'lr': 0.1, 'weight_decay': 0.5}
    assert config == dict(type=name, lr=0.1, weight_decay=0.5)
    assert set(defaults) == set(rule.hyper)
    lists = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    model, other = Bare(), Bare()  # a config read from a file has lists
    for m, hyper in ((model, defaults), (other, lists)):
        optimizer = optimizer_of(m, type=name, **hyper)
        give(m, gradients(0)), optimizer.step()
    compare(model, other, 0.0)
