"""SOAA in MMEngine: accumulation, the length of a run, scaling, ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import Tensor, nn

from mmprecond.optimizers import SOAA
from mmprecond.rules import TrustRegionAdam
from tests.support.classifier import Classifier, batch, build
from tests.support.distributed import leave
from tests.support.errors import refused
from tests.support.soaa import HYPER, parameters, step, tensors

CONFIG = dict(type='SOAA', lr=0.02, weight_decay=1e-3)


class Smooth(Classifier):
    """Without batch statistics, which differ between micro-batches and ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)


def run_classifier(
    parts: int, rank: int | None = None, steps: int = 6, **optimizer: Any
) -> tuple[dict[str, Tensor], SOAA]:
    """Steps on batches of eight, in micro-batches, all of them or a rank's half."""
    from mmengine.model import MMDistributedDataParallel

    torch.manual_seed(0)
    model = Smooth().double()
    wrapped = model if rank is None else MMDistributedDataParallel(model, device_ids=None)
    wrapper = build(wrapped, optimizer=CONFIG | optimizer, accumulative_counts=parts)
    wrapper.initialize_count_status(wrapped, 0, steps * parts)
    for seed in range(steps):
        data = batch(8, seed)
        mine = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
        for xs, ys in zip(
            data['inputs'][mine].double().chunk(parts),
            data['data_samples'][mine].chunk(parts),
            strict=True,
        ):
            wrapped.train_step(dict(inputs=xs, data_samples=ys), wrapper)
    return {name: p.detach() for name, p in model.named_parameters()}, wrapper.optimizer


@pytest.mark.parametrize('parts', [2, 4])
def test_accumulation_equals_the_joint_batch(parts: int) -> None:
    joint, one = run_classifier(1)
    split, two = run_classifier(parts)
    assert one.t == two.t == one.total_steps == two.total_steps == 6
    for name, value in joint.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=1e-10)
    for name, value in one.rule.region.items():
        torch.testing.assert_close(two.rule.region[name], value, rtol=1e-8, atol=1e-12, msg=name)


def test_the_length_of_the_run() -> None:
    model = Classifier()
    wrapper = build(model, optimizer=CONFIG, accumulative_counts=4)
    wrapper.initialize_count_status(model, 0, 10)
    assert wrapper.optimizer.total_steps == 3
    for seed in range(10):
        model.train_step(batch(seed=seed), wrapper)
    assert wrapper.optimizer.t == 3 and wrapper._losses == []
    given = build(model, optimizer=dict(CONFIG, total_steps=77))
    given.initialize_count_status(model, 0, 10)
    assert given.optimizer.total_steps == 77
    unknown = build(model, optimizer=CONFIG)
    refused(ValueError, lambda: model.train_step(batch(), unknown), 'total_steps=...')


def test_the_wrapper_takes_the_loss_before_it_is_scaled(
    amp_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    adapt = TrustRegionAdam.adapt
    monkeypatch.setattr(
        TrustRegionAdam,
        'adapt',
        lambda self, loss, predicted: (seen.append(float(loss)), adapt(self, loss, predicted))[1],
    )
    for scaled in (dict(), dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1024.0)):
        torch.manual_seed(0)
        model = Classifier()
        wrapper = build(
            model, optimizer=dict(CONFIG, total_steps=9), accumulative_counts=2, **scaled
        )
        for seed in range(2):
            model.train_step(batch(seed=seed), wrapper)
    assert len(seen) == 2 and seen[1] == pytest.approx(seen[0], rel=0.02)
    assert 1.0 < seen[0] < 2.0  # about log 4


def test_an_overflow_step_leaves_everything(amp_on_cpu: None) -> None:
    model = Classifier()
    wrapper = build(
        model,
        type='AmpOptimWrapper',
        dtype='bfloat16',
        loss_scale='dynamic',
        optimizer=dict(CONFIG, total_steps=9),
    )
    bad = batch()
    bad['inputs'][0, 0, 0, 0] = float('inf')
    model.train_step(bad, wrapper)
    optimizer = wrapper.optimizer
    assert optimizer.t == 0 and float(optimizer.radius) == 10.0
    assert not float(optimizer.rule.region['skipped'])
    model.norm.reset_running_stats()
    model.train_step(batch(), wrapper)
    assert optimizer.t == 1 and float(optimizer.radius) == 1.0


def test_without_our_constructor_the_error_names_it() -> None:
    model = Classifier()
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(CONFIG, total_steps=9)))
    assert type(wrapper) is OptimWrapper
    refused(
        ValueError,
        lambda: model.train_step(batch(), wrapper),
        "constructor='PrecondOptimWrapperConstructor'",
    )


def worker(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.set_num_threads(1)
    weights, optimizer = run_classifier(2, rank)
    torch.save([weights, optimizer.state_dict()], f'{folder}/{rank}.pt')
    leave()


def test_two_ranks_equal_the_joint_batch(tmp_path: Path) -> None:
    """In weights and in all that the radius is made with; equal to the bit between ranks."""
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1))
    joint, optimizer = run_classifier(1)
    for name, value in joint.items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], value, rtol=0, atol=1e-10)
    regions = [state['trust_region'] for _, state in (first, second)]
    assert regions[0] == regions[1]
    for name, value in optimizer.rule.region.items():
        torch.testing.assert_close(regions[0][name], value, rtol=1e-8, atol=1e-12, msg=name)


def test_left_over_keys_and_odd_groups() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match='_delete_=True'):
        SOAA([p], lr=0.1, momentum=0.9)
    optimizer = SOAA([dict(params=[]), dict(params=[p])], lr=0.1, total_steps=3)
    p.grad, optimizer.loss = torch.ones(2), 1.0
    optimizer.step()
    assert (p < 1).all()


def test_a_state_that_lacks_something_is_refused_before_anything_changes() -> None:
    params = parameters()
    optimizer = SOAA(params, total_steps=9, **HYPER)
    step(optimizer, params, tensors(0), 1.0)
    state = copy.deepcopy(optimizer.state_dict())
    del state['trust_region']['predicted']
    before = copy.deepcopy(optimizer.state_dict())
    refused(ValueError, lambda: optimizer.load_state_dict(state), 'it has no predicted')
    for key, value in before['trust_region'].items():
        assert optimizer.state_dict()['trust_region'][key] == value
