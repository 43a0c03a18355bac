"""MMEngine: constructor, wrapper, registration, presets."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import (
    AmpOptimWrapper,
    ApexOptimWrapper,
    BaseOptimWrapper,
    OptimWrapper,
    build_optim_wrapper,
)
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS, Registry
from torch import nn

import mmprecond
from mmprecond.engine import PrecondOptimWrapperConstructor, use_optimizer
from mmprecond.engine.registration import _register, optimizer_types, register_all
from mmprecond.engine.resolution import resolve
from mmprecond.engine.wrapper import MIXINS, mixed_wrapper
from mmprecond.optimizers import NKFAC, AdaNKFAC, RuleOptimizer
from mmprecond.rules import AdamW
from tests.support.classifier import Classifier, HalfRateConstructor, Labelled, batch, build
from tests.support.errors import refused
from tests.support.states import differences


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


def test_one_parameter_a_group_equals_one_group() -> None:
    torch.manual_seed(0)
    model = Classifier()
    other = copy.deepcopy(model)
    plain = build(model)
    paramwise = build(other, paramwise_cfg=dict(norm_decay_mult=0.0))
    assert len(plain.optimizer.param_groups) == 1
    assert len(paramwise.optimizer.param_groups) == 6
    for seed in range(5):
        model.train_step(batch(seed=seed), plain)
        other.train_step(batch(seed=seed), paramwise)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_custom_keys_reach_the_optimizer() -> None:
    keys = {'fc': dict(precondition=False), 'conv': dict(lr_mult=0.5, damping=0.1)}
    wrapper = build(Classifier(), paramwise_cfg=dict(custom_keys=keys))
    assert [layer.name for layer in wrapper.optimizer.curvature.layers] == ['conv.weight']
    groups = wrapper.optimizer.param_groups
    layer = next(iter(wrapper.optimizer.curvature.layers))
    assert wrapper.optimizer.curvature.dampings.current(groups)[layer] == 0.1
    assert 'precondition=False' in wrapper.optimizer.table()
    assert wrapper.optimizer.param_groups[0]['lr'] == 0.05


def test_positions_of_a_flattened_map_reach_a_layer() -> None:
    keys = {'fc.weight': dict(input_positions=2)}
    optimizer = dict(type='NKFAC', lr=0.1, input_factor='kernel', settings='published')
    built = build(Classifier(), optimizer=optimizer, paramwise_cfg=dict(custom_keys=keys)).optimizer
    assert [layer.kernel_positions for layer in built.curvature.layers] == [9, 2]
    keys['conv'] = dict(input_positions=9)
    refused(
        ValueError,
        lambda: build(Classifier(), paramwise_cfg=dict(custom_keys=keys)),
        'input_positions=9',
        'conv.weight is of a Conv2d',
    )


def test_capture_is_bracketed_by_the_training_step() -> None:
    model = Classifier()
    wrapper = build(model)
    assert hooks(model) == 0
    with wrapper.optim_context(model):
        assert hooks(model) == 2
        loss = model(**batch(), mode='loss')['loss']
    assert hooks(model) == 2  # a checkpointed forward pass would run again in backward
    wrapper.update_params(loss)
    assert hooks(model) == 0
    with wrapper.optim_context(model):
        assert hooks(model) == 0  # step 1 measures nothing
        loss = model(**batch(), mode='loss')['loss']
    wrapper.update_params(loss)
    assert wrapper.optimizer.t == 2


def test_a_moving_average_of_the_model_feeds_nothing() -> None:
    states = []
    for averaged in (False, True):
        torch.manual_seed(0)
        model = Classifier()
        wrapper = build(model)
        with wrapper.optim_context(model):
            if averaged:
                average = ExponentialMovingAverage(model)
                average(**batch(seed=1))
                assert not wrapper.optimizer.curvature.capture.seen
            loss = model(**batch(), mode='loss')['loss']
        if averaged:
            average(**batch(seed=2), mode='loss')
        wrapper.update_params(loss)
        states.append(copy.deepcopy(wrapper.optimizer.state_dict()['precond']))
    assert differences(*states) == []


def test_any_wrapper_class_is_kept() -> None:
    first = build(Classifier(), type=Labelled, label='mine')
    second = build(Classifier(), type=Labelled, label='mine')
    assert isinstance(first, Labelled) and first.label == 'mine'
    assert type(first) is type(second)
    assert pickle.loads(pickle.dumps(type(first))) is type(first)


def amp_statistics(model: nn.Module, **cfg: Any) -> dict[str, Any]:
    wrapper = build(model, **cfg)
    model.train_step(batch(), wrapper)
    return {
        layer.name: {name: s[k] for name, s in stack.statistics.items()}
        for stack in wrapper.optimizer.curvature.stacks
        for k, member in enumerate(stack.members)
        for layer in [member.layer]
    }


def test_amp_measures_unscaled_values(amp_on_cpu: None) -> None:
    torch.manual_seed(0)
    model = Classifier()
    average = 'mmprecond.preconditioners.NewtonKronecker.average'
    with pytest.MonkeyPatch.context() as patch:  # raw sums, which feel the scale
        patch.setattr(average, lambda self: mmprecond.curvature.RunningAverage(0.0))
        plain = amp_statistics(copy.deepcopy(model))
        scaled = amp_statistics(
            copy.deepcopy(model), type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1024.0
        )
    assert set(plain) == {'conv.weight', 'fc.weight'}
    for name, statistics in plain.items():
        for key, value in statistics.items():
            assert scaled[name][key].dtype == torch.float32
            difference = torch.linalg.vector_norm(scaled[name][key] - value)
            assert difference < 0.05 * torch.linalg.vector_norm(value), (name, key)


def test_an_overflow_step_leaves_everything(amp_on_cpu: None) -> None:
    model = Classifier()
    wrapper = build(model, type='AmpOptimWrapper', dtype='bfloat16', loss_scale='dynamic')
    assert isinstance(wrapper, AmpOptimWrapper)
    before = copy.deepcopy(model.state_dict())
    bad = batch()
    bad['inputs'][0, 0, 0, 0] = float('inf')
    model.train_step(bad, wrapper)
    assert wrapper.optimizer.t == 0
    assert not wrapper.optimizer.curvature.capture.staged
    assert all(not stack.members for stack in wrapper.optimizer.curvature.stacks)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    model.norm.reset_running_stats()
    model.train_step(batch(), wrapper)
    assert wrapper.optimizer.t == 1
    assert all(stack.members for stack in wrapper.optimizer.curvature.stacks)


def test_accumulation_equals_the_joint_batch() -> None:
    torch.manual_seed(0)
    joint = Classifier().double()
    joint.norm.eval()
    joint.norm.train = lambda mode=True: joint.norm  # batch statistics would differ
    parts = copy.deepcopy(joint)
    parts.norm.train = lambda mode=True: parts.norm
    whole, split = build(joint), build(parts, accumulative_counts=2)
    split.initialize_count_status(parts, 0, 12)
    for seed in range(6):
        data = batch(seed=seed)
        data['inputs'] = data['inputs'].double()
        joint.train_step(data, whole)
        for half in (slice(0, 4), slice(4, 8)):
            parts.train_step({key: value[half] for key, value in data.items()}, split)
    assert whole.optimizer.t == split.optimizer.t == 6
    for a, b in zip(joint.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class OwnBackward(BaseOptimWrapper):
    """A wrapper with a backward and step of its own, as DeepSpeed's."""

    def update_params(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError('never built')


def test_refused_wrappers() -> None:
    with pytest.raises(ValueError, match='use OptimWrapper or AmpOptimWrapper'):
        build(Classifier(), type=OwnBackward)
    with pytest.raises(ValueError, match='use AmpOptimWrapper'):
        build(Classifier(), type='ApexOptimWrapper')
    with pytest.raises(ValueError, match='DistributedDataParallel'):
        build(Classifier(), type='AmpOptimWrapper', use_fsdp=True)


def test_base_constructor_makes_the_groups() -> None:
    wrapper = build(
        Classifier(), base_constructor=HalfRateConstructor.__name__, paramwise_cfg=dict(a=1)
    )
    assert {group['lr'] for group in wrapper.optimizer.param_groups} == {0.05}
    assert len(wrapper.optimizer.curvature.layers) == 2


def test_left_over_key_says_what_to_write() -> None:
    with pytest.raises(TypeError, match='_delete_=True'):
        build(
            Classifier(),
            optimizer=dict(type='AdaNKFAC', lr=0.1, momentum=0.9, settings='published'),
        )


def test_optimizer_without_our_constructor_says_what_to_write() -> None:
    with pytest.raises(ValueError, match="constructor='PrecondOptimWrapperConstructor'"):
        build_optim_wrapper(
            Classifier(), dict(optimizer=dict(type='NKFAC', lr=0.1, settings='published'))
        )


def test_registered_in_the_root_once() -> None:
    assert OPTIMIZERS.get('NKFAC') is NKFAC and OPTIMIZERS.get('AdaNKFAC') is AdaNKFAC
    assert 'PreconditionedOptimizer' not in OPTIMIZERS.module_dict
    register_all()
    clashing = Registry('optimizer')
    clashing.register_module(name='NKFAC', module=torch.optim.SGD)
    with pytest.raises(KeyError, match=r'torch\.optim\.sgd.*mmprecond\.optimizers'):
        _register(clashing, NKFAC)


def test_dotted_path_registers_everything() -> None:
    code = (
        'import torch; from mmengine.optim import build_optim_wrapper as b; '
        'w = b(torch.nn.Linear(2, 2), dict('
        'constructor="mmprecond.PrecondOptimWrapperConstructor", '
        'optimizer=dict(type="NKFAC", lr=0.1))); print(type(w.optimizer).__name__)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == 'NKFAC'


def test_core_works_without_mmengine() -> None:
    code = (
        'import sys, importlib.util as u; find = u.find_spec; '
        'u.find_spec = lambda name, *a: None if name == "mmengine" else find(name, *a); '
        'import torch, mmprecond; m = torch.nn.Linear(3, 2); o = mmprecond.NKFAC(m, lr=0.1); '
        'm(torch.ones(4, 3)).square().mean().backward(); o.step(); '
        'assert "mmengine" not in sys.modules; print(o.t)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '1'


@pytest.mark.parametrize(
    'name, kept',
    [
        ('NKFAC', dict(lr=0.02, momentum=0.9, weight_decay=1e-4)),
        ('AdaNKFAC', dict(lr=0.02, weight_decay=1e-4)),
    ],
)
def test_preset_keeps_what_fits(name: str, kept: dict[str, float]) -> None:
    paramwise = dict(norm_decay_mult=0.0)
    cfg = Config(
        dict(
            optim_wrapper=dict(
                type='OptimWrapper',
                clip_grad=dict(max_norm=5),
                paramwise_cfg=paramwise,
                constructor='SomeConstructor',
                optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4),
            )
        )
    )
    use_optimizer(cfg, name)
    assert cfg.optim_wrapper.optimizer == dict(type=name, **kept)
    assert cfg.optim_wrapper.constructor == 'PrecondOptimWrapperConstructor'
    assert cfg.optim_wrapper.base_constructor == 'SomeConstructor'
    assert cfg.optim_wrapper.paramwise_cfg == paramwise
    assert cfg.optim_wrapper.clip_grad == dict(max_norm=5)


def test_preset_names_the_choices() -> None:
    with pytest.raises(ValueError, match='choose one of AFOpt, ARO, AdaAFOpt'):
        use_optimizer(Config(dict()), 'NKFACC')
    with pytest.raises(ValueError, match='optim_wrapper.optimizer'):
        use_optimizer(Config(dict()), 'NKFAC')


class Plain(RuleOptimizer):
    """A rule that needs nothing but gradients, nor the model."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, AdamW(), dict(AdamW.defaults, lr=lr))


@pytest.mark.parametrize('kind', [OptimWrapper, Labelled, 'ApexOptimWrapper'])
def test_what_needs_nothing_gets_the_wrapper_as_it_is(kind: Any) -> None:
    base = resolve(OPTIM_WRAPPERS, kind)
    assert mixed_wrapper(base, Plain.needs, 'Plain') is base
    if issubclass(base, ApexOptimWrapper):  # is not installed
        return
    settings = dict(label='mine') if kind is Labelled else {}
    wrapper = build(Classifier(), type=kind, optimizer=dict(type=Plain, lr=0.1), **settings)
    assert type(wrapper) is kind
    assert wrapper.optimizer.report() == '6 parameters take AdamW'


def test_the_wrapper_is_chosen_by_need() -> None:
    assert {kind.needs for kind in optimizer_types()} <= {'', *MIXINS}
    for needs, mixin in MIXINS.items():
        mixed = mixed_wrapper(OptimWrapper, needs, 'It')
        assert issubclass(mixed, mixin) and issubclass(mixed, OptimWrapper)
        assert mixed is mixed_wrapper(OptimWrapper, needs, 'Another')
        assert not any(issubclass(mixed, other) for other in MIXINS.values() if other is not mixin)
        with pytest.raises(ValueError, match='It must see'):
            mixed_wrapper(OwnBackward, needs, 'It')
        with pytest.raises(ValueError, match='use AmpOptimWrapper'):
            mixed_wrapper(ApexOptimWrapper, needs, 'It')


def test_a_base_constructor_reads_its_config_as_it_is() -> None:
    """By attribute too; the config itself stays as it was."""
    from mmengine.config import ConfigDict
    from mmengine.optim import DefaultOptimWrapperConstructor
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

    class Reading(DefaultOptimWrapperConstructor):
        def __call__(self, model: nn.Module) -> OptimWrapper:
            assert self.optimizer_cfg.lr == 0.1
            return super().__call__(model)

    OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=Reading, force=True)
    for kind in ('NKFAC', 'SGD'):
        cfg = ConfigDict(
            optimizer=dict(type=kind, lr=0.1),
            base_constructor='Reading',
            constructor='PrecondOptimWrapperConstructor',
            **(dict(precondition=None) if kind == 'SGD' else {}),
        )
        before = copy.deepcopy(cfg)
        assert build_optim_wrapper(Classifier(), cfg).optimizer.param_groups[0]['lr'] == 0.1
        assert cfg == before


def test_one_constructor_serves_two_models() -> None:
    constructor = PrecondOptimWrapperConstructor(
        dict(optimizer=dict(type='NKFAC', lr=0.1, settings='published'))
    )
    wrappers = [constructor(Classifier()) for _ in range(2)]
    assert type(wrappers[0]) is type(wrappers[1])
    owners = [next(iter(w.optimizer.curvature.layers)).weight for w in wrappers]
    assert owners[0] is not owners[1]


@pytest.mark.parametrize('configured', ['', 'logging.basicConfig(level=logging.INFO);'])
def test_plain_pytorch_sees_each_line_once(configured: str) -> None:
    code = (
        f'import logging; {configured} import mmprecond.engine;'
        "logging.getLogger('mmprecond').info('a line')"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).count('a line') == 1
