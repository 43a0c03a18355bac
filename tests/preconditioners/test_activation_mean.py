"""MAC's first layer."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmprecond.engine import use_optimizer
from mmprecond.engine.hooks import CalibrationHook
from mmprecond.optimizers import MAC, NKFAC, SMAC
from mmprecond.preconditioners import ActivationMean, CalibratedInput
from tests.reference.factors import input_rows
from tests.support.classifier import Classifier, build
from tests.support.distributed import leave
from tests.support.errors import refused
from tests.support.networks import ConvNet


def photos(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 6, 7, generator=torch.Generator().manual_seed(seed)).double() + 0.5


def network() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet().double()


def step(model: nn.Module, optimizer: MAC, seed: int) -> None:
    optimizer.zero_grad()
    model(photos(seed)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize('compat, factor', [('paper', 3.0), ('official', 1.0)])
def test_the_first_layer_takes_the_inverse_of_its_inputs(compat: str, factor: float) -> None:
    model = network()
    optimizer = MAC(model, lr=0.1, momentum=0.0, damping=3.0, compat=compat)
    optimizer.calibrate_first_layer(photos(seed) for seed in range(3))
    rows = torch.cat([input_rows(model.conv1, photos(seed), False)[0] for seed in range(3)])
    moment = rows.t() @ rows / len(rows)
    before = model.conv1.weight.detach().clone()
    step(model, optimizer, 9)
    gradient = model.conv1.weight.grad.reshape(8, 27)
    wanted = factor * gradient @ torch.linalg.inv(moment + 3 * torch.eye(27).double())
    moved = (before - model.conv1.weight).reshape(8, 27) / 0.1
    torch.testing.assert_close(moved.detach(), wanted, rtol=1e-9, atol=1e-12)


def test_it_is_inverted_once_and_never_measured_again() -> None:
    model = network()
    optimizer = MAC(model, lr=0.1, stat_interval=1, refresh_interval=2)
    optimizer.calibrate_first_layer(photos(0))
    stack = optimizer.curvature.layers[optimizer.first_layer]
    assert optimizer.calibrated and type(stack.method) is CalibratedInput
    for seed in range(5):
        assert not model.conv1._forward_hooks
        step(model, optimizer, seed)
        kept = stack.operator_tensors['input_moment'].clone()
    assert (stack.members[0].samples, stack.members[0].refreshes) == (1, 1)
    assert torch.equal(kept, stack.operator_tensors['input_moment'])


def test_without_calibration_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, 'mmprecond'):
        model = network()
        optimizer = MAC(model, lr=0.1)
        step(model, optimizer, 0)
        step(model, optimizer, 1)
    assert caplog.text.count('conv1.weight: the first layer is treated like any other') == 1


@pytest.mark.parametrize('calibrated', [True, False])
@pytest.mark.parametrize('prepared', [True, False])
def test_a_resumed_run_knows_its_first_layer(
    calibrated: bool, prepared: bool, tmp_path: Path
) -> None:
    """Bit for bit, whatever the new optimizer's own first layer was told."""
    model = network()
    optimizer = MAC(model, lr=0.05, stat_interval=1, refresh_interval=2)
    if calibrated:
        optimizer.calibrate_first_layer(photos(7))
    for seed in range(3):
        step(model, optimizer, seed)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / 'state.pt')
    weights, state = torch.load(tmp_path / 'state.pt', weights_only=True)
    other = network()
    other.load_state_dict(weights)
    resumed = MAC(other, lr=0.05, stat_interval=1, refresh_interval=2)
    if prepared:
        resumed.calibrate_first_layer(photos(8))
    resumed.load_state_dict(state)
    assert resumed.calibrated == calibrated
    for seed in range(3, 7):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_calibration_that_cannot_be() -> None:
    model = network()
    optimizer = MAC(model, lr=0.1)
    refused(ValueError, lambda: optimizer.calibrate_first_layer([]), '0 rows')
    refused(ValueError, lambda: optimizer.calibrate_first_layer(photos(0) * float('inf')), 'finite')
    pairs = [(photos(0), 1)]
    refused(ValueError, lambda: optimizer.calibrate_first_layer(pairs), 'tuple; give tensors')
    weak = MAC(network().float(), lr=0.1, damping=1e-30)
    refused(ValueError, lambda: weak.calibrate_first_layer(torch.ones(1, 3, 6, 7)), 'raise damping')
    optimizer.calibrate_first_layer(photos(0))
    refused(ValueError, lambda: optimizer.calibrate_first_layer(photos(0)), 'calibrated already')
    trained = network()
    other = MAC(trained, lr=0.1)
    step(trained, other, 0)
    refused(ValueError, lambda: other.calibrate_first_layer(photos(0)), 'after 1 steps')
    small = MAC(network(), lr=0.1, max_dim=28, oversize='block')
    small._usual = ActivationMean(max_dim=26)
    refused(ValueError, lambda: small.calibrate_first_layer(photos(0)), 'max_dim=26')


def test_only_the_models_first_layer_is_calibrated() -> None:
    """Not the first that happens to be preconditioned, nor a frozen or shared one."""
    model = network()
    groups = [
        dict(params=[model.conv1.weight], precondition=False),
        dict(params=[p for p in model.parameters() if p is not model.conv1.weight]),
    ]
    optimizer = MAC(groups, lr=0.1, model=model)
    assert optimizer.first_layer is None and not optimizer.calibrated
    refused(ValueError, lambda: optimizer.calibrate_first_layer(photos(0)), 'not preconditioned')
    model.conv1.requires_grad_(False)
    refused(ValueError, lambda: MAC(model, lr=0.1).calibrate_first_layer(photos(0)), 'frozen')
    twice = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    twice[2].weight, twice[2].bias = twice[0].weight, twice[0].bias
    refused(
        ValueError,
        lambda: MAC(twice, lr=0.1).calibrate_first_layer(torch.ones(2, 4)),
        'several modules',
    )


def calibrated(seed: int = 7, **options: Any) -> tuple[ConvNet, MAC]:
    model = network()
    optimizer = MAC(model, lr=0.05, stat_interval=1, refresh_interval=2, **options)
    optimizer.calibrate_first_layer(photos(seed))
    return model, optimizer


def test_a_refused_state_changes_nothing() -> None:
    model, optimizer = calibrated()
    step(model, optimizer, 0)
    wrong = optimizer.state_dict()
    wrong['param_groups'][0]['momentum'] = 7.0
    before = copy.deepcopy(optimizer.state_dict()['precond'])
    with pytest.raises(ValueError, match='momentum'):
        optimizer.load_state_dict(wrong)
    assert optimizer.calibrated and str(optimizer.state_dict()['precond']) == str(before)


def test_a_lost_calibration_is_not_made_up(caplog: pytest.LogCaptureFixture) -> None:
    """The layer is then like any other, and measured as they are."""
    model, optimizer = calibrated()
    step(model, optimizer, 0)
    state = optimizer.state_dict()
    state['precond']['layers']['conv1.weight']['operator']['input_moment'][:] = float('nan')
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        optimizer.load_state_dict(state)
    assert 'its calibration is lost' in caplog.text and not optimizer.calibrated
    step(model, optimizer, 1)
    stack = optimizer.curvature.layers[optimizer.first_layer]
    assert set(stack.operator_tensors) == {'input'} and stack.members[0].refreshes == 1


def test_a_state_without_curvature_keeps_a_calibration() -> None:
    _, optimizer = calibrated(save_curvature=False)
    other_model, other = calibrated(8)
    other.load_state_dict(optimizer.state_dict())
    kept = other.curvature.layers[other.first_layer].statistics['input_moment'].clone()
    step(other_model, other, 0)
    assert other.calibrated
    assert torch.equal(kept, other.curvature.layers[other.first_layer].statistics['input_moment'])


def test_another_damping_reaches_a_calibrated_layer() -> None:
    model, optimizer = calibrated()
    step(model, optimizer, 0)
    other = network()
    resumed = MAC(other, lr=0.05, damping=50.0, stat_interval=1, refresh_interval=2)
    resumed.load_state_dict(optimizer.state_dict())
    step(other, resumed, 1)
    stack = resumed.curvature.layers[resumed.first_layer]
    damped = stack.statistics['input_moment'][0, 0] + 50 * torch.eye(27).double()
    torch.testing.assert_close(
        stack.operator_tensors['input_moment'][0, 0], 50 * torch.linalg.inv(damped)
    )


def test_one_calibrated_layer_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 3)).double()
    optimizer = MAC(model, lr=0.1)
    optimizer.calibrate_first_layer(torch.randn(9, 5).double())
    model(torch.randn(4, 5).double()).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.calibrated


def test_linear_first_layers_with_biases() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    optimizer = SMAC(model, lr=0.1)
    x = torch.randn(8, 5).double()
    optimizer.calibrate_first_layer(x)
    ones = torch.cat([x, torch.ones(8, 1).double()], 1)
    moment = optimizer.curvature.layers[optimizer.first_layer].statistics['input_moment'][0, 0]
    torch.testing.assert_close(moment, ones.t() @ ones / 8)


def calibrate_half(rank: int, folder: str) -> None:
    store = f'file://{folder}/rendezvous'
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=2)
    optimizer = MAC(network(), lr=0.1)
    optimizer.calibrate_first_layer(photos(rank, count=2 + rank))
    stack = optimizer.curvature.layers[optimizer.first_layer]
    torch.save(stack.statistics, f'{folder}/rank{rank}.pt')
    leave()


def test_ranks_share_their_inputs(tmp_path: Path) -> None:
    mp.spawn(calibrate_half, args=(str(tmp_path),), nprocs=2)
    optimizer = MAC(network(), lr=0.1)
    optimizer.calibrate_first_layer([photos(0, count=2), photos(1, count=3)])
    joint = optimizer.curvature.layers[optimizer.first_layer].statistics['input_moment']
    halves = [torch.load(tmp_path / f'rank{rank}.pt')['input_moment'] for rank in range(2)]
    assert torch.equal(*halves)
    torch.testing.assert_close(halves[0], joint)


class Pictures(Dataset):
    """Images of different brightness, so that it matters which are read."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return dict(
            inputs=torch.randn(3, 8, 8, generator=generator) + index, data_samples=index % 4
        )


WRAPPER = dict(constructor='PrecondOptimWrapperConstructor', optimizer=dict(type='MAC', lr=0.01))


def run(
    folder: Path,
    sampler: str,
    batches: int | None,
    steps: int = 4,
    resume: bool = False,
    **options: Any,
) -> Runner:
    """Trains by a real runner, with the hook unless `batches` is None."""
    torch.manual_seed(0)
    hooks = [dict(type='CalibrationHook', batches=batches)] if batches else []
    runner = Runner(
        model=Classifier(),
        work_dir=str(folder),
        resume=resume,
        custom_hooks=hooks,
        experiment_name=f'{folder.name}_{sampler}_{batches}_{steps}_{resume}',
        train_dataloader=dict(
            dataset=Pictures(),
            batch_size=8,
            num_workers=0,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type=sampler, shuffle=True),
        ),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=steps),
        optim_wrapper=WRAPPER | options,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2)),
        randomness=dict(seed=0),
    )
    runner.train()
    return runner


@pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
def test_the_hook_calibrates_before_the_first_step(sampler: str, tmp_path: Path) -> None:
    """On all images, which three batches are; training then sees the batches it always did."""
    runner = run(tmp_path, sampler, 3)
    optimizer = runner.optim_wrapper.optimizer
    assert optimizer.calibrated and optimizer.t == 4
    model = Classifier()
    by_hand = MAC(model, lr=0.01)
    by_hand.calibrate_first_layer(torch.stack([Pictures()[k]['inputs'] for k in range(24)]))
    ours, theirs = (
        o.curvature.layers[o.first_layer].statistics['input_moment'] for o in (optimizer, by_hand)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert all(not module._forward_pre_hooks for module in runner.model.modules())


def test_a_resumed_run_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, 'InfiniteSampler', 1, steps=2)
    monkeypatch.setattr(
        'mmprecond.engine.hooks.calibration_hook._inputs_of', lambda *_: pytest.fail('read')
    )
    runner = run(tmp_path, 'InfiniteSampler', 1, steps=4, resume=True)
    assert runner.optim_wrapper.optimizer.calibrated and runner.optim_wrapper.optimizer.t == 4


def test_a_run_resumed_without_curvature_calibrates_again(tmp_path: Path) -> None:
    small = dict(type='MAC', lr=0.01, save_curvature=False)
    for steps in (2, 4):
        runner = run(tmp_path, 'InfiniteSampler', 1, steps, steps > 2, optimizer=small)
    assert runner.optim_wrapper.optimizer.calibrated and runner.optim_wrapper.optimizer.t == 4


def test_the_hook_leaves_a_frozen_stem_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = dict(custom_keys={'conv': dict(precondition=False)})
    with caplog.at_level(logging.INFO, 'mmprecond'):
        runner = run(tmp_path, 'DefaultSampler', 1, steps=1, paramwise_cfg=keys)
    assert not runner.optim_wrapper.optimizer.calibrated
    assert 'the first layer is not calibrated' in caplog.text


def test_choosing_mac_brings_its_hook() -> None:
    cfg = Config(
        dict(
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            custom_hooks=[dict(type='EMAHook')],
        )
    )
    for name in ('MAC', 'SMAC'):
        use_optimizer(cfg, name)
        assert [hook['type'] for hook in cfg.custom_hooks] == ['EMAHook', 'CalibrationHook']
    other = Config(dict(optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1))))
    use_optimizer(other, 'NysAct')
    assert 'custom_hooks' not in other


def test_the_hook_refuses_other_optimizers() -> None:
    runner = SimpleNamespace(
        optim_wrapper=build(Classifier(), optimizer=dict(type='NKFAC', lr=0.05))
    )
    assert isinstance(runner.optim_wrapper.optimizer, NKFAC)
    refused(ValueError, lambda: CalibrationHook().before_train(runner), 'not NKFAC')
    refused(ValueError, lambda: CalibrationHook(batches=0), 'batches=0')


def test_a_state_of_another_method_says_nothing_of_the_calibration() -> None:
    _, optimizer = calibrated()
    kept = optimizer.curvature.layers[optimizer.first_layer].statistics['input_moment'].clone()
    model = network()
    other = NKFAC(model, lr=0.1)
    step(model, other, 0)
    optimizer.load_state_dict(other.state_dict())
    stack = optimizer.curvature.layers[optimizer.first_layer]
    assert optimizer.calibrated and torch.equal(stack.statistics['input_moment'], kept)


def test_a_layer_that_goes_back_to_the_others_starts_anew() -> None:
    """It takes nothing along from before, and leaves no second moment behind."""
    model = network()
    plain = MAC(model, lr=0.1, stat_interval=1, refresh_interval=1)
    for seed in range(3):
        step(model, plain, seed)
    _, other = calibrated()
    state = copy.deepcopy(other.state_dict())
    plain.load_state_dict(state)
    assert plain.calibrated
    state['precond']['layers']['conv1.weight']['statistics']['input_moment'][:] = float('nan')
    plain.load_state_dict(state)
    first = plain.first_layer
    assert not plain.calibrated and not plain.curvature.layers[first].holds(first)
    assert {type(stack.method) for stack in plain.curvature.stacks} == {ActivationMean}


def test_what_is_no_state_of_a_layer_is_measured_anew() -> None:
    model, optimizer = calibrated()
    state = optimizer.state_dict()
    state['precond']['layers']['conv1.weight'] = 5
    optimizer.load_state_dict(state)
    step(model, optimizer, 0)
