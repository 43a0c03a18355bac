"""Optimizers of the package pytorch_optimizer, by name; AdaHessian with its second derivatives."""

from __future__ import annotations

import copy
import gc
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.optim import LinearLR, OptimWrapper, build_optim_wrapper
from torch import Tensor, nn

from common.contestants import DECAY, DECAYS, MODELS
from mmprecond.engine import use_optimizer
from mmprecond.optimizers import peers
from tests.support.classifier import Classifier, Labelled, batch, build
from tests.support.distributed import leave
from tests.support.errors import refused

NAMES = ('AdaBelief', 'AdamP', 'Adan', 'DiffGrad', 'Kron', 'Muon', 'RAdam', 'Ranger')
NAMES += ('ScalableShampoo', 'SGDP', 'Shampoo', 'SOAP')
TWICE = ('AdaHessian', 'SophiaH')


@pytest.fixture
def package() -> Any:
    return pytest.importorskip('pytorch_optimizer')


def peer(name: str, **settings: Any) -> dict[str, Any]:
    return dict(type=f'pytorch_optimizer.{name}', **{'lr': 0.01, **settings})


def trained(model: nn.Module, wrapper: OptimWrapper, steps: int = 3) -> dict[str, Tensor]:
    """How far each parameter went, after the losses were seen to be finite."""
    random.seed(0)
    before = copy.deepcopy(dict(model.named_parameters()))
    for seed in range(steps):
        assert model.train_step(batch(seed=seed), wrapper)['loss'].isfinite()
    return {name: (p - before[name]).detach() for name, p in model.named_parameters()}


def twins() -> tuple[Classifier, Classifier]:
    torch.manual_seed(0)
    model = Classifier()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize('name', NAMES)
def test_ours_and_mmengines_constructor(package: Any, name: str) -> None:
    """The package's own class, unchanged, and the same weights by both where both can build it."""
    model, other = twins()
    wrapper = build(model, optimizer=peer(name))
    assert type(wrapper) is OptimWrapper
    assert type(wrapper.optimizer) is getattr(package, name)
    torch.manual_seed(1)
    steps = 8 if name == 'RAdam' else 3  # it starts late
    moved = trained(model, wrapper, steps)
    assert moved['fc.weight'].any() and moved['conv.weight'].any()
    if name == 'Muon':
        return  # asks for groups that MMEngine's does not make
    plain = build_optim_wrapper(other, dict(optimizer=peer(name)))
    torch.manual_seed(1)
    trained(other, plain, steps)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        if name == 'Kron':  # its products once rounded differently in two runs
            torch.testing.assert_close(p, q)
        else:
            assert torch.equal(p, q)


def test_a_class_and_another_wrapper_serve_as_well(package: Any) -> None:
    wrapper = build(
        Classifier(), type=Labelled, label='mine', optimizer=dict(type=package.AdaHessian, lr=0.01)
    )
    assert isinstance(wrapper, Labelled) and type(wrapper).__name__ == 'DoubleBackwardLabelled'
    trained(Classifier(), build(Classifier(), optimizer=dict(type=package.SOAP, lr=0.01)), 0)


def test_muon_gets_matrices_apart(package: Any) -> None:
    model = Classifier()
    settings = peer('Muon', lr=0.02, weight_decay=0.1, adamw_lr=1e-3, adamw_wd=0.01)
    keys = {'norm': dict(lr_mult=0.5, decay_mult=0.0), 'fc': dict(use_muon=False)}
    wrapper = build(model, optimizer=settings, paramwise_cfg=dict(custom_keys=keys))
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        names[id(p)]: group for group in wrapper.optimizer.param_groups for p in group['params']
    }
    assert {name for name, group in found.items() if group['use_muon']} == {'conv.weight'}
    assert found['conv.weight']['lr'] == 0.02
    assert found['norm.weight']['lr'] == pytest.approx(5e-4)
    assert found['norm.weight']['weight_decay'] == 0.0
    assert found['fc.weight']['lr'] == pytest.approx(1e-3)
    assert found['conv.bias']['weight_decay'] == 0.01
    schedule = LinearLR(wrapper, start_factor=0.5, begin=0, end=4, by_epoch=False)
    trained(model, wrapper, 1)
    schedule.step()
    assert found['conv.weight']['lr'] == pytest.approx(0.02 * (0.5 + 0.5 / 3))
    assert wrapper.get_lr()['base_lr']
    plain = build(Classifier(), optimizer=peer('Muon'))
    assert [group['use_muon'] for group in plain.optimizer.param_groups].count(True) == 2


# ---------------------------------------------------------------- second derivatives


@pytest.mark.parametrize('name', TWICE)
def test_second_derivatives_are_the_packages_own(package: Any, name: str) -> None:
    """The weights of its own loop, with clipping after the Hessian is known."""
    model, other = twins()
    wrapper = build(model, optimizer=peer(name, update_period=2), clip_grad=dict(max_norm=0.5))
    graphs = []
    backward = Tensor.backward

    def spy(self: Tensor, *args: Any, **kwargs: Any) -> None:
        graphs.append(kwargs.get('create_graph', False))
        backward(self, *args, **kwargs)

    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, 'backward', spy)
        trained(model, wrapper, 5)
    assert graphs == [True, False, True, False, True]
    optimizer = getattr(package, name)(other.parameters(), lr=0.01, update_period=2)
    torch.manual_seed(1)
    for seed in range(5):
        optimizer.zero_grad()
        data = other.data_preprocessor(batch(seed=seed), True)
        loss = other(**data, mode='loss')['loss']
        params = list(other.parameters())
        gradients = torch.autograd.grad(loss, params, create_graph=True)
        hessian = None
        if seed % 2 == 0:
            signs = [
                torch.randint_like(p, 0, 2) * 2.0 - 1.0
                if name == 'AdaHessian' or optimizer.distribution == 'rademacher'
                else torch.randn_like(p)
                for p in params
            ]
            products = torch.autograd.grad(gradients, params, signs)
            hessian = [z * h for z, h in zip(signs, products, strict=True)]
            assert sum(float(h.abs().sum()) for h in hessian) > 0
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.detach()
        nn.utils.clip_grad_norm_(params, 0.5)
        optimizer.step(hessian=hessian)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_memory_stays_flat_over_200_steps(package: Any) -> None:
    model = Classifier()
    wrapper = build(model, optimizer=peer('AdaHessian'))
    graphs = []
    wrapper.optimizer.register_step_pre_hook(
        lambda optimizer, *_: graphs.append(any(p.grad.requires_grad for p in model.parameters()))
    )
    counts = []
    gc.collect()
    gc.disable()
    try:
        for step in range(200):
            model.train_step(batch(), wrapper)
            if step % 50 == 9:
                counts.append(sum(type(o) is Tensor for o in gc.get_objects()))
    finally:
        gc.enable()
    assert max(counts) - min(counts) <= 4, counts
    assert graphs == [False] * 200  # no gradient holds the graph that holds its parameter


def test_frozen_and_unused_parameters(package: Any) -> None:
    model = Classifier()
    model.conv.requires_grad_(False)
    model.spare = nn.Linear(2, 2)
    wrapper = build(model, optimizer=peer('AdaHessian', weight_decay=0.1))
    moved = trained(model, wrapper)
    assert moved['fc.weight'].any() and moved['norm.weight'].any()
    assert not any(moved[name].any() for name in moved if name.startswith(('conv', 'spare')))


def test_resume(package: Any) -> None:
    """On the right steps for a graph, and with the Hessian kept for those without."""
    torch.manual_seed(3)
    whole = Classifier()
    wrapper = build(whole, optimizer=peer('AdaHessian', update_period=3))
    trained(whole, wrapper, 4)
    resumed = copy.deepcopy(whole)
    other = build(resumed, optimizer=peer('AdaHessian', update_period=3))
    other.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    for model, used in ((whole, wrapper), (resumed, other)):
        torch.manual_seed(5)
        assert not used._twice.needs_graph
        trained(model, used, 5)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


def test_what_cannot_be_differentiated_twice_is_refused(package: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    refused(
        ValueError,
        lambda: build(model, optimizer=peer('AdaHessian')),
        '1 is a SyncBatchNorm',
        'as AdaHessian needs',
    )
    refused(
        ValueError,
        lambda: build(Classifier(), type='AmpOptimWrapper', optimizer=peer('SophiaH')),
        'SophiaH',
        'without --amp',
    )
    build(model, optimizer=peer('SOAP'))


class Smooth(Classifier):
    """Without batch statistics, which differ between ranks; `forward` may take one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)
        self.other = nn.Linear(6, 6)

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
        if dist.is_initialized() and dist.get_rank():
            inputs = inputs + self.other(inputs.mean((2, 3)).repeat(1, 2)).mean()
        return super().forward(inputs, data_samples, mode)


def hessians(rank: int, folder: str) -> None:
    from mmengine.model import MMDistributedDataParallel

    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Smooth().double()
    wrapped = MMDistributedDataParallel(model, device_ids=None)
    wrapper = build(wrapped, optimizer=peer('AdaHessian', update_period=2), accumulative_counts=2)
    torch.manual_seed(rank)  # other signs on each rank
    gradients: list[list[Tensor]] = []
    measure = wrapper._twice.measure
    wrapper._twice.measure = lambda: (
        measure(),
        gradients.append([p.grad.clone() for p in model.parameters()]),
    )
    for step in range(6):
        data = batch(8, step)
        half = slice(4 * rank, 4 * rank + 4)
        wrapped.train_step(
            dict(inputs=data['inputs'][half].double(), data_samples=data['data_samples'][half]),
            wrapper,
        )
    torch.save([model.state_dict(), wrapper.state_dict(), gradients], f'{folder}/{rank}.pt')
    leave()


def test_two_ranks_stay_equal(package: Any, tmp_path: Path) -> None:
    """One rank uses a layer that the other does not; gradients are those of the joint batch."""
    mp.spawn(hessians, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
    for key, state in first[1]['state'].items():
        for name, value in state.items():
            assert torch.equal(value, second[1]['state'][key][name]), (key, name)
    assert len(first[2]) == 3
    torch.manual_seed(0)
    model = Smooth().double()
    for step in range(2):  # of one optimizer step
        data = batch(8, step)
        for rank, half in enumerate((slice(0, 4), slice(4, 8))):
            x, y = data['inputs'][half].double(), data['data_samples'][half]
            if rank:
                x = x + model.other(x.mean((2, 3)).repeat(1, 2)).mean()
            (Classifier.forward(model, x, y, 'loss')['loss'] / 4).backward()
    for p, found in zip(model.parameters(), first[2][0], strict=True):
        torch.testing.assert_close(p.grad, found, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    'name, why',
    [
        ('SAM', 'by a closure'),
        ('GSAM', 'by a closure'),
        ('WSAM', 'by a closure'),
        ('BSAM', 'by a closure'),
        ('LBFGS', 'a closure'),
        ('AliG', 'a closure'),
        ('LOMO', "takes 'model'"),
        ('AdamMini', "takes 'model'"),
        ('Lookahead', "takes 'optimizer'"),
        ('PCGrad', "takes 'optimizer'"),
        ('ScheduleFreeAdamW', 'optimizer.eval()'),
        ('MuonClip', 'attention logits'),
        ('DeMo', 'between ranks'),
        ('DistributedMuon', 'rank'),
    ],
)
def test_what_no_step_of_mmengine_serves_is_refused(package: Any, name: str, why: str) -> None:
    refused(
        ValueError,
        lambda: build(Classifier(), optimizer=peer(name)),
        f'pytorch_optimizer.{name} ',
        why,
        'choose another',
    )


def test_an_unknown_name_is_one_line(package: Any) -> None:
    refused(
        ValueError,
        lambda: build(Classifier(), optimizer=peer('SAOP')),
        "no optimizer 'SAOP'",
        'SOAP',
    )
    refused(ValueError, lambda: build(Classifier(), optimizer=peer('adahesian')), 'AdaHessian')
    refused(ValueError, lambda: build(Classifier(), optimizer=peer('load_optimizer')), 'no optim')


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'pytorch_optimizer', None)
    config = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1))))
    for call in (
        lambda: build(Classifier(), optimizer=peer('SOAP')),
        lambda: use_optimizer(config, 'pytorch_optimizer.SOAP'),
    ):
        refused(
            ImportError,
            call,
            'pytorch_optimizer.SOAP',
            'not installed',
            '`pip install pytorch_optimizer`',
        )
    with pytest.raises(SystemExit, match='pip install pytorch_optimizer'):
        MODELS['resnet-cls'].contestant('pytorch_optimizer.SOAP')


def test_whose_a_type_is() -> None:
    assert peers.is_peer('pytorch_optimizer.SOAP')
    for other in (
        'SOAP',
        'torch.optim.SGD',
        'pytorch_optimizers.SOAP',
        torch.optim.SGD,
        None,
        'pytorch_optimizer',
    ):
        assert not peers.is_peer(other)


# ---------------------------------------------------------------- presets and tools


def test_the_preset(package: Any) -> None:
    def chosen(name: str, **old: Any) -> dict[str, Any]:
        config = Config(dict(optim_wrapper=dict(optimizer=dict(lr=0.1, **old))))
        use_optimizer(config, f'pytorch_optimizer.{name}')
        assert config.optim_wrapper.constructor == 'PrecondOptimWrapperConstructor'
        return dict(config.optim_wrapper.optimizer)

    sgd = dict(type='SGD', momentum=0.9, weight_decay=1e-4)
    adam = dict(type='AdamW', betas=(0.9, 0.99), weight_decay=0.05)
    assert chosen('SGDP', **sgd) == dict(sgd, type='pytorch_optimizer.SGDP', lr=0.1)
    assert chosen('SOAP', **sgd) == dict(type='pytorch_optimizer.SOAP', lr=0.1, weight_decay=1e-4)
    assert chosen('SOAP', **adam) == dict(adam, type='pytorch_optimizer.SOAP', lr=0.1)
    assert 'betas' not in chosen('Adan', **adam)
    build(Classifier(), optimizer=chosen('Adan', **adam))


def test_the_quickstart_takes_them(package: Any) -> None:
    model = MODELS['resnet-cls']
    found = model.contestant('pytorch_optimizer.SOAP')
    assert found.arguments == ('--optimizer', 'pytorch_optimizer.SOAP')
    assert found.adaptive and found.options == {DECAY: DECAYS[True]}
    assert found.lr == model.rates[True]
    assert not model.contestant('pytorch_optimizer.SGDP').adaptive
    assert model.contestant('NKFAC').options == {}
    assert model.contestant('SOAA').options == {DECAY: DECAYS[True]}
    with pytest.raises(SystemExit, match='did you mean'):
        model.contestant('pytorch_optimizer.SAOP')
    with pytest.raises(SystemExit, match='by a closure'):
        model.contestant('pytorch_optimizer.SAM')
