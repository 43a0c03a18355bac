"""Attention capture over a training step: memory, checkpointing, accumulation, precision."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from mmprecond.optimizers import AdaAFOpt, AFOpt, PreconditionedOptimizer
from tests.support.attention import (
    VARIANTS,
    Measured,
    backward,
    feature_map,
    hooks,
    images,
    loss_of,
    measured,
    measured_whole,
    randomise,
    same,
    shift_window,
    swin,
)

SHAPE = (5, 4)


def attention(found: Measured) -> set[str]:
    """Layers that hold attention statistics."""
    return {name for name, kept in found.items() if 'query_curvature' in kept.sums}


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed now is freed without the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Watch:
    """Notes the storages of every softmax, projection and O of window attention."""

    def __init__(self, model: nn.Module) -> None:
        self.storages: list[StorageWeakRef] = []
        for name, module in model.named_modules():
            if name.rpartition('.')[2] in ('softmax', 'qkv', 'proj'):
                module.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        projects = isinstance(module, nn.Linear) and module.in_features == module.out_features
        self.storages.append(StorageWeakRef((args[0] if projects else output).untyped_storage()))

    def alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


# ------------------------------------------------------------------- memory


def test_a_forward_pass_without_backward_frees_everything(no_collector: None) -> None:
    model = shift_window('mmdet', 1)
    watch = Watch(model)
    optimizer = AFOpt(model, lr=0.1, settings='published', count_from=0)
    out = model(feature_map(SHAPE), SHAPE)
    assert len(watch.storages) == 3 and watch.alive() == 3
    del out
    assert watch.alive() == 0 and not optimizer.curvature.capture.staged


def test_everything_is_freed_after_backward(no_collector: None) -> None:
    """While the output is still there."""
    model = shift_window('mmdet', 1)
    watch = Watch(model)
    optimizer = AFOpt(model, lr=0.1, settings='published', count_from=0)
    out = model(feature_map(SHAPE), SHAPE)
    loss_of(out).backward()
    assert watch.alive() == 0 and optimizer.curvature.capture.staged and out is not None


def test_passes_without_gradient_leave_nothing(no_collector: None) -> None:
    """Validation, and evaluation with gradients of the weights switched off."""
    model = shift_window('mmdet', 1)
    watch = Watch(model)
    optimizer = AFOpt(model, lr=0.1, settings='published', count_from=0)
    model.eval()
    with torch.no_grad():
        out = model(feature_map(SHAPE), SHAPE)
    assert watch.storages and watch.alive() == 0 and not optimizer.curvature.capture.staged
    model.train()
    loss_of(model(feature_map(SHAPE), SHAPE)).backward()
    optimizer.disarm()
    found = {layer.name: kept for layer, kept in optimizer.curvature.capture.staged.items()}
    same(found, measured(model, lambda: loss_of(model(feature_map(SHAPE), SHAPE)).backward()))
    assert out.isfinite().all()


def test_hooks_exist_on_statistics_steps_alone() -> None:
    model = shift_window('mmdet', 1)
    optimizer = AFOpt(
        model, lr=0.01, stat_interval=3, refresh_interval=3, settings='published', count_from=0
    )
    for step in range(7):
        armed = step % 3 == 0
        assert hooks(model) == 0
        optimizer.zero_grad()
        loss_of(model(feature_map(SHAPE), SHAPE)).backward()
        # One on each of the block's parts; one on proj as a layer of its own.
        assert hooks(model) == (4 if armed else 0)
        assert bool(optimizer.curvature.capture.staged) == armed
        optimizer.step()
    optimizer.disarm()
    assert hooks(model) == 0


@pytest.mark.parametrize(
    'clone', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle']
)
def test_a_copy_of_an_armed_model_is_not_observed(clone: Callable[[Any], Any]) -> None:
    """Copied before, between and after calls; the model itself still is."""
    model = shift_window('mmdet', 1)
    run = lambda m: loss_of(m(feature_map(SHAPE), SHAPE)).backward()
    optimizer = AFOpt(model, lr=0.1, settings='published', count_from=0)
    twin = clone(model)
    run(twin)
    assert not optimizer.curvature.capture.staged
    run(model)
    alone = {layer.name: kept.rows for layer, kept in optimizer.curvature.capture.staged.items()}
    run(clone(model))
    assert {
        layer.name: kept.rows for layer, kept in optimizer.curvature.capture.staged.items()
    } == alone
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


# ------------------------------------------------------------------- checkpointing


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
def test_checkpointed_blocks_of_swin_are_measured_alike(no_collector: None) -> None:
    """MMDetection's `with_cp`, which is reentrant; no softmax is kept between the passes."""
    plain, checkpointed = swin(), swin(with_cp=True)
    found, expected = (
        measured_whole(m, lambda m=m: backward(m, images())) for m in (checkpointed, plain)
    )
    assert len(attention(found)) == 4
    same(found, expected)
    watch, optimizer = (
        Watch(checkpointed),
        AFOpt(checkpointed, lr=0.1, settings='published', count_from=0),
    )
    outs = checkpointed(images())
    assert watch.alive() == 0
    sum(loss_of(out) for out in outs).backward()
    del outs
    assert watch.alive() == 0 and optimizer.curvature.capture.staged


class Checkpointed(nn.Module):
    """A stem before a block that is checkpointed with what follows it, or not."""

    def __init__(self, reentrant: bool | None, after: bool) -> None:
        super().__init__()
        self.stem, self.reentrant = nn.Linear(6, 6).double(), reentrant
        self.block = shift_window('mmdet', 1)
        self.after = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 7), nn.GELU()).double()
        self.parts = [self.block, self.after] if after else [self.block]
        randomise(self)

    def inner(self, x: Tensor) -> Tensor:
        x = self.block(x, SHAPE)
        return self.after(x) if len(self.parts) > 1 else x

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = (
            self.inner(x)
            if self.reentrant is None
            else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        )
        return x if len(self.parts) > 1 else self.after(x)


@pytest.mark.parametrize('after', [True, False])
@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_does_not_change_the_statistics(reentrant: bool, after: bool) -> None:
    def found(kind: bool | None) -> Measured:
        model = Checkpointed(kind, after)
        return measured_whole(
            model, lambda: [loss_of(model(feature_map(SHAPE, seed=s))).backward() for s in range(2)]
        )

    same(found(reentrant), found(None))
    assert attention(found(reentrant)) == {'block.w_msa.qkv.weight'}


@pytest.mark.parametrize(
    'reentrant, after', [(True, True), (True, False), (False, True), (False, False)]
)
def test_a_checkpointed_block_keeps_nothing(
    reentrant: bool, after: bool, no_collector: None
) -> None:
    model = Checkpointed(reentrant, after)
    watch, optimizer = Watch(model), AFOpt(model, lr=0.1, settings='published', count_from=0)
    out = model(feature_map(SHAPE))
    assert watch.alive() == 0
    loss_of(out).backward()
    assert optimizer.curvature.capture.staged
    del out
    assert watch.alive() == 0


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint')
def test_a_block_that_is_checkpointed_itself_is_measured(caplog: pytest.LogCaptureFixture) -> None:
    """MMEngine's ``activation_checkpointing=['backbone.layers.0.attn']`` replaces `forward`."""
    module = pytest.importorskip('mmpretrain.models.utils.attention')
    turn_on = pytest.importorskip('mmengine.runner.activation_checkpointing')
    attn = module.MultiheadAttention(6, 2)
    model = nn.ModuleDict({'stem': nn.Linear(6, 6), 'attn': attn}).double()
    turn_on.turn_on_activation_checkpointing(model, 'attn')
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        optimizer = AFOpt(model, lr=0.1, settings='published', count_from=0)
        loss_of(attn(model.stem(feature_map(SHAPE)))).backward()
        found = {layer.name for layer in optimizer.curvature.capture.staged}
        optimizer.step()
    complained = any('attn.qkv.weight' in record.getMessage() for record in caplog.records)
    assert 'attn.proj.weight' in found and bool(attn.qkv.weight.grad.any())
    assert 'attn.qkv.weight' in found and not complained


# ------------------------------------------------------------------- sums over calls and scales


def test_accumulated_micro_batches_equal_the_joint_batch() -> None:
    model, x = swin(), images(4)
    split = measured_whole(model, lambda: [backward(model, part, 0.5) for part in x.split([1, 3])])
    same(split, measured_whole(model, lambda: backward(model, x)))
    assert len(attention(split)) == 4


@pytest.mark.parametrize('kind', [AFOpt, AdaAFOpt])
@pytest.mark.parametrize('variant', VARIANTS)
def test_accumulated_micro_batches_give_the_same_weights(
    kind: type[PreconditionedOptimizer], variant: str
) -> None:
    weights = []
    for parts in (1, 2):
        model = shift_window('mmpretrain', 1)
        optimizer = kind(
            model,
            lr=0.01,
            variant=variant,
            stat_interval=1,
            refresh_interval=2,
            settings='published',
            count_from=0,
        )
        for step in range(4):
            optimizer.zero_grad()
            for x in feature_map(SHAPE, batch=4, seed=step).split(4 // parts):
                (model(x, SHAPE) ** 3).mean().div(parts).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*weights, rtol=0, atol=1e-9)


@pytest.mark.parametrize('scale', [1024.0, 'scaler'])
def test_the_loss_scale_does_not_touch_attention(scale: Any) -> None:
    model = swin(torch.float32)
    plain = measured_whole(model, lambda: backward(model, images().float()))
    scaler = torch.amp.GradScaler('cpu', 2.0**20) if scale == 'scaler' else None
    for variant in VARIANTS:
        optimizer = AFOpt(model, lr=0.1, variant=variant, settings='published', count_from=0)
        optimizer.loss_scale = scaler or scale
        loss = sum(loss_of(out) for out in model(images().float()))
        (scaler.scale(loss) if scaler else loss * scale).backward()
        for layer, kept in optimizer.curvature.capture.staged.items():
            for name, value in kept.sums.items():
                assert torch.allclose(value, plain[layer.name].sums[name], rtol=1e-5)
        optimizer.disarm()


def test_mixed_precision_is_measured_in_float32() -> None:
    model = swin(torch.float32)
    plain = measured_whole(model, lambda: backward(model, images().float()))

    def mixed() -> None:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            outs = model(images().float())
        assert model.stages[0].blocks[0].attn.w_msa.qkv.weight.dtype == torch.float32
        sum(loss_of(out.float()) for out in outs).backward()

    found = measured_whole(model, mixed)
    assert found.keys() == plain.keys() and len(attention(found)) == 4
    for name, kept in found.items():
        assert kept.rows == plain[name].rows
        for key, value in kept.sums.items():
            expected = plain[name].sums[key]
            assert value.dtype == torch.float32 and value.isfinite().all()
            assert (value - expected).norm() < 0.1 * expected.norm(), (name, key)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_are_measured_in_float32(dtype: torch.dtype) -> None:
    model = shift_window('mmdet', 1).to(dtype)
    model.w_msa.relative_position_bias_table.data.zero_()
    x = feature_map(SHAPE).to(dtype)

    def run() -> None:
        loss_of(model(x, SHAPE).float()).backward()

    model.w_msa.softmax.register_forward_pre_hook(lambda m, args: args[0].to(dtype))
    found = measured(model, run)['w_msa.qkv.weight'].sums
    assert all(s.dtype == torch.float32 and s.isfinite().all() for s in found.values())
