"""What must hold for every optimizer, whatever is switched on (the table in docs/guarantees.md)."""

from __future__ import annotations

import copy
import inspect
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.optim import LinearMomentum, OptimWrapperDict, build_optim_wrapper
from torch import nn

from mmprecond import optimizers
from mmprecond.engine.registration import optimizer_types
from mmprecond.optimizers import NKFAC
from tests.support.classifier import (
    Classifier,
    batch,
    build,
)
from tests.support.errors import refused
from tests.support.every_optimizer import (
    HOOKED,
    MEASURED,
    SETTINGS,
    backward,
    images,
    make,
    net,
    train,
)

ADAPTIVE = ('AdaNKFAC', 'AdamR', 'FAdam', 'AdaAFOpt', 'AdamWBK', 'SOAP')


def assert_same(a: nn.Module, b: nn.Module, tolerance: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=f'{name} differs')


def test_every_optimizer_is_here() -> None:
    assert {kind.__name__ for kind in optimizer_types()} == set(SETTINGS)


@pytest.mark.parametrize(
    'name, options',
    [
        *((name, {}) for name in SETTINGS),
        *(
            (name, dict(momentum=0.0))
            for name in SETTINGS
            if 'momentum' in inspect.signature(getattr(optimizers, name)).parameters
            and name != 'RAMDA'  # whose momentum is the weight of a step
        ),
    ],
)
def test_a_step_leaves_the_gradients_alone(name: str, options: dict[str, float]) -> None:
    """Also those of layers that are alone in their stack, which are not copied."""
    model = net()
    optimizer = make(name, model, **options)
    for seed in range(5):
        optimizer.zero_grad()
        x, y = images(seed)
        backward(name, optimizer, F.cross_entropy(model(x), y))
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize('sizes', [(3, 3), (2, 1, 3)])
@pytest.mark.parametrize('name', SETTINGS)
def test_accumulation_is_the_joint_batch(name: str, sizes: tuple[int, ...]) -> None:
    joint, parts = net(), net()
    train(name, joint, make(name, joint), range(9))
    train(name, parts, make(name, parts), range(9), sizes)
    assert_same(joint, parts, 1e-10)


@pytest.mark.parametrize(
    'options', [dict(checkpointed=False), dict(checkpointed=True), dict(inplace=True)], ids=str
)
@pytest.mark.parametrize('name', MEASURED)
def test_checkpointing_and_in_place_activations_change_nothing(
    name: str, options: dict[str, bool]
) -> None:
    plain, other = net(), net(**options)
    train(name, plain, make(name, plain), range(6))
    train(name, other, make(name, other), range(6))
    assert_same(plain, other, 1e-11)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('at', [1, 5])
@pytest.mark.parametrize('name', SETTINGS)
def test_a_resumed_run_continues_bit_for_bit(
    name: str, at: int, dtype: torch.dtype, tmp_path: Any
) -> None:
    """Through a file that is read with `weights_only`, into a new model and optimizer."""
    whole = net()
    optimizer = make(name, whole)
    train(name, whole, optimizer, range(at))
    torch.save([whole.state_dict(), optimizer.state_dict()], tmp_path / 'state.pt')
    train(name, whole, optimizer, range(at, at + 6))
    weights, state = torch.load(tmp_path / 'state.pt', weights_only=True)
    resumed = net()
    resumed.load_state_dict(weights)
    other = make(name, resumed)
    other.load_state_dict(state)
    train(name, resumed, other, range(at, at + 6))
    assert_same(whole, resumed, 0)


@pytest.mark.parametrize('name', MEASURED)
def test_a_layer_may_be_frozen_and_thawed(name: str) -> None:
    """Frozen it stays; thawed it learns, its statistics first measured then."""
    model = net()
    model.fc1.requires_grad_(False)
    optimizer = make(name, model)
    before = copy.deepcopy(model.fc1.state_dict())
    train(name, model, optimizer, range(5))
    assert all(torch.equal(value, before[key]) for key, value in model.fc1.state_dict().items())
    assert all(
        member.layer.weight is not model.fc1.weight
        for stack in optimizer.curvature.stacks
        for member in stack.members
    )
    model.fc1.requires_grad_(True)
    model.stem.requires_grad_(False)
    stem = model.stem.weight.detach().clone()
    train(name, model, optimizer, range(5, 14))
    assert torch.equal(model.stem.weight, stem)
    assert not torch.equal(model.fc1.weight, before['weight'])
    assert any(
        layer.weight is model.fc1.weight
        for stack in optimizer.curvature.stacks
        for _, layer in stack.ready()
    )
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name', MEASURED)
def test_a_constant_feature_and_a_batch_of_one(name: str) -> None:
    model = net().float()
    optimizer = make(name, model)
    for step in range(10):
        optimizer.zero_grad()
        x = torch.ones(1, 3, 8, 8) if step % 2 else torch.zeros(1, 3, 8, 8)
        F.cross_entropy(model(x), torch.tensor([step % 4])).backward()
        optimizer.step()
        assert all(p.isfinite().all() for p in model.parameters()), step


@pytest.mark.parametrize('name', HOOKED)
def test_what_is_not_finite_stays_out(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A batch with an inf in it never reaches statistics or operators."""
    model = net()
    optimizer = make(name, model)
    train(name, model, optimizer, range(2))
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        for seed in range(2, 6):
            optimizer.zero_grad()
            x, y = images(seed)
            x[0, 0, 0, 0] = float('inf')
            F.cross_entropy(model(x), y).backward()
            for p in model.parameters():  # what a guard outside would do
                p.grad = torch.zeros_like(p)
            optimizer.step()
    assert 'non-finite statistics' in caplog.text
    for stack in optimizer.curvature.stacks:
        for tensor in (*stack.statistics.values(), *stack.operator_tensors.values()):
            assert tensor.isfinite().all()
    train(name, model, optimizer, range(6, 12))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', MEASURED)
def test_autocast_measures_as_float32_does(name: str, dtype: torch.dtype) -> None:
    """Under a scaler: unscaled, in float32, and within the rounding of the activations."""
    found = []
    for enabled in (False, True):
        model = net().float()
        optimizer = make(
            name,
            model,
            **({} if name == 'Preconditioned' else dict(stat_interval=1, refresh_interval=1)),
        )
        scaler = torch.amp.GradScaler('cpu', init_scale=2.0**12, enabled=enabled)
        optimizer.loss_scale = scaler
        x, y = (t.float() if t.is_floating_point() else t for t in images(0))
        with torch.autocast('cpu', dtype, enabled=enabled):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        found.append(optimizer.state_dict()['precond']['layers'])
    assert len(found[0]) >= 4
    for layer, entry in found[0].items():
        for key, value in entry['statistics'].items():
            other = found[1][layer]['statistics'][key]
            assert other.dtype == torch.float32
            if 'columns' in key:
                other, value = other @ other.mT, value @ value.mT
            assert (other - value).norm() < 0.05 * value.norm(), (layer, key)


# ---------------------------------------------------------------- MMEngine


@pytest.mark.parametrize('name', MEASURED)
def test_raw_gradients_are_clipped_as_by_mmengine(name: str) -> None:
    """Our wrapper's clip_grad is clip_grad_norm_ between backward and step."""
    models = [Classifier(), Classifier()]
    models[1].load_state_dict(models[0].state_dict())
    settings = {'Preconditioned': {}}.get(name, dict(lr=0.05, stat_interval=1, refresh_interval=2))
    config = dict(type=name, **SETTINGS[name], **settings)
    wrapper = build(models[0], optimizer=dict(config), clip_grad=dict(max_norm=0.01))
    plain = getattr(optimizers, name)(models[1], **{k: v for k, v in config.items() if k != 'type'})
    for seed in range(5):
        models[0].train_step(batch(seed=seed), wrapper)
        plain.zero_grad()
        data = batch(seed=seed)
        models[1](**models[1].data_preprocessor(data, True), mode='loss')['loss'].backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), 0.01)
        plain.step()
    assert_same(*models, 1e-6)


@pytest.mark.parametrize('name', [n for n in MEASURED if n != 'Preconditioned'])
def test_clipping_after_preconditioning(name: str) -> None:
    model = net()
    optimizer = make(name, model, clip_update=0.01)
    train(name, model, optimizer, range(3))
    x, y = images(3)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    gradients = {p: p.grad for p in model.parameters()}
    groups = optimizer.param_groups
    directions = optimizer.curvature.precondition(gradients, groups)
    norm = torch.cat([d.flatten() for d in directions.values()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01).double())
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).norm() > 0.01
    for largest in (1e9, None):
        other = make(name, model, clip_update=largest)
        other.load_state_dict(optimizer.state_dict())
        free = other.curvature.precondition(gradients, groups)
        sizes = {p: direction.norm() for p, direction in free.items()}
        assert all(sizes[p] >= d.norm() for p, d in directions.items())
        if largest:
            loose = free
    assert all(torch.equal(direction, loose[p]) for p, direction in free.items())
    refused(ValueError, lambda: make(name, model, clip_update=0.0), 'clip_update')


@pytest.mark.parametrize(
    'name, rule',
    [
        ('NKFAC', None),
        *((name, rule) for name in ADAPTIVE for rule in ('AdamW', 'Adan')),
    ],
)
def test_a_momentum_schedule_acts(name: str, rule: str | None) -> None:
    """On the momentum, or the first beta: the same as that value by hand before each step."""
    choice = {} if rule is None else dict(rule=rule)
    found = []
    for scheduled in (True, False):
        torch.manual_seed(0)
        model = Classifier()
        wrapper = build(
            model,
            optimizer=dict(type=name, lr=1e-3, stat_interval=1, refresh_interval=1, **choice),
        )
        (group, *_) = wrapper.optimizer.param_groups
        first = group['betas'][0] if rule else group['momentum']
        if scheduled:
            schedule = LinearMomentum(
                wrapper, start_factor=1.0, end_factor=0.5, begin=0, end=6, by_epoch=False
            )
        for seed in range(4):
            value = first * (1 - seed / 10)
            for group in () if scheduled else wrapper.optimizer.param_groups:
                group.update(
                    {'betas': (value, *group['betas'][1:])} if rule else {'momentum': value}
                )
            model.train_step(batch(seed=seed), wrapper)
            if scheduled:
                schedule.step()
        found.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_synchronised_batch_norm_takes_the_plain_rule() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Classifier())
    optimizer = build(model).optimizer
    assert [left.kind for left in optimizer.curvature.left_out] == ['SyncBatchNorm']
    assert {layer.name for layer in optimizer.curvature.layers} == {'conv.weight', 'fc.weight'}


def test_several_wrappers_in_one() -> None:
    """OptimWrapperDict: each part of a model with its own optimizer, ours and torch's."""
    torch.manual_seed(0)
    model = Classifier()
    ours = build(
        model.conv,
        optimizer=dict(
            type='NKFAC', lr=0.05, stat_interval=1, refresh_interval=2, settings='published'
        ),
    )
    plain = build_optim_wrapper(model.fc, dict(optimizer=dict(type='SGD', lr=0.05)))
    both = OptimWrapperDict(conv=ours, fc=plain)
    before = copy.deepcopy(model.state_dict())
    for seed in range(3):
        data = model.data_preprocessor(batch(seed=seed), True)
        with both['conv'].optim_context(model), both['fc'].optim_context(model):
            loss = model(**data, mode='loss')['loss']
        both['conv'].backward(loss)
        both['conv'].step(), both['fc'].step()
        both['conv'].zero_grad(), both['fc'].zero_grad()
    assert ours.optimizer.curvature.stacks[0].members[0].samples == 3
    assert ours.optimizer.curvature.stacks[0].members[0].refreshes == 2
    for key in ('conv.weight', 'fc.weight'):
        assert not torch.equal(model.state_dict()[key], before[key])


def test_many_classes_and_wide_layers_are_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(300, 40), nn.Linear(40, 500))
    monkeypatch.setattr('mmprecond.core.memory.available', lambda device: 1.0)
    refused(
        ValueError,
        lambda: NKFAC(model, lr=0.1, settings='published'),
        '3 MB',
        '1 MB are free',
        '1.weight',
        "oversize='lowrank'",
        'max_dim',
    )
    NKFAC(model, lr=0.1, max_dim=100, oversize='lowrank', max_rank=8, settings='published')
    anyway = NKFAC(model, lr=0.1, check_memory=False, settings='published')
    before = model[1].weight.detach().clone()
    model(torch.randn(4, 300)).square().mean().backward()
    anyway.step()
    assert not torch.equal(model[1].weight, before) and anyway.curvature.stacks[0].members
