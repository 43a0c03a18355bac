"""The attention of ViT and of torch (DETR), which is recomputed, on one rank and on two."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmprecond.curvature import PackedAttention, TokenAttention
from mmprecond.optimizers import AFOpt
from tests.reference.attention import normal
from tests.support.attention import (
    VARIANTS,
    Reads,
    close,
    layer_of,
    loss_of,
    measured,
    measured_whole,
    noting,
    pretrain,
    randomise,
    reasons,
    same,
    slow_sums,
    spy,
    whole,
    windows_of,
)
from tests.support.distributed import leave


@pytest.fixture(name='reads')
def _reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return spy(monkeypatch)


# ------------------------------------------------------------------- ViT


def vit(seed: int = 0, **options: Any) -> Any:
    """MMPretrain's attention in float64: 6 channels, 2 heads of 3."""
    return randomise(pretrain('MultiheadAttention')(6, 2, **options).double(), seed)


@pytest.mark.parametrize(
    'options, scale',
    [
        ({}, 3**-0.5),
        (dict(qkv_bias=False), 3**-0.5),
        (dict(input_dims=4), 3**-0.5),
        (dict(layer_scale_init_value=0.1, proj_drop=0.5), 3**-0.5),
        (dict(qk_scale=0.2), 3**0.5),
    ],
)  # whatever its value: MMPretrain divides by d^-1/2
def test_the_softmax_of_vit_is_recomputed(
    options: dict[str, Any], scale: float, reads: Reads
) -> None:
    model = vit(**options)
    x = normal(1, 3, 5, options.get('input_dims', 6))
    with noting(model) as calls:
        found = measured_whole(model, lambda: loss_of(model(x)).backward())
    del reads[len(reads) // 2 :]  # those of the second variant
    assert torch.equal(whole(reads, 'inputs'), x)
    assert torch.equal(whole(reads, 'outputs'), calls[0].outputs)
    # What the module really computed: S V is the projection's input.
    joined = (whole(reads, 'scores') @ whole(reads, 'value')).transpose(1, 2).flatten(2)
    assert torch.allclose(joined, calls[0].outputs, rtol=1e-12, atol=1e-12)
    windows = windows_of([x] * 3, model.qkv.weight, model.qkv.bias, 2, scale, lambda w: 0.0)
    explicit = torch.stack([window.logits.softmax(-1) for window in windows])
    assert torch.allclose(whole(reads, 'scores'), explicit, rtol=1e-12)
    close(found['qkv.weight'].sums, slow_sums(windows), 1e-11)
    assert found['qkv.weight'].rows == 15


def test_dropout_of_vit_is_left_out_of_the_softmax(reads: Reads) -> None:
    """And stays in O."""
    x, dropping, plain = normal(1, 3, 5, 6), vit(attn_drop=0.6), vit()

    def run() -> None:
        torch.manual_seed(0)
        loss_of(dropping(x)).backward()

    with noting(dropping) as calls:
        found = measured_whole(dropping, run)['qkv.weight'].sums
    assert torch.equal(reads[0][1].outputs, calls[0].outputs)
    without = measured_whole(plain, lambda: loss_of(plain(x)).backward())['qkv.weight'].sums
    dropped, kept = found.pop('output_moment'), without.pop('output_moment')
    close(found, without)
    assert not torch.allclose(dropped, kept, rtol=0.1)


def test_a_vision_transformer_is_found_and_measured() -> None:
    kind = pytest.importorskip('mmpretrain.models.backbones').VisionTransformer
    arch = dict(embed_dims=12, num_layers=2, num_heads=3, feedforward_channels=24)
    model = kind(arch=arch, img_size=16, patch_size=4, out_type='cls_token').double()
    found = measured(model, lambda: loss_of(model(normal(0, 2, 3, 16, 16))[0]).backward())
    for k in range(2):
        assert found[f'layers.{k}.attn.qkv.weight'].rows == 2 * 17
        assert found[f'layers.{k}.attn.qkv.weight'].sums['query_curvature'].shape == (3, 4, 4)
    optimizer = AFOpt(model, lr=0.1)
    assert type(layer_of(optimizer, 'layers.0.attn.qkv.weight')) is TokenAttention
    assert not any('attn' in name for name in reasons(optimizer))


# ------------------------------------------------------------------- torch's own


def packed(batch_first: bool, **options: Any) -> nn.MultiheadAttention:
    model = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options).double()
    randomise(model)
    return model


def rows_of(kind: str, queries: int = 4, keys: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a batch of 3, batch first."""
    x, memory = normal(1, 3, queries, 6), normal(2, 3, keys, 6)
    placed = x + normal(3, 3, queries, 6)
    return {
        'self': (x, x, x),
        'cross': (x, memory, memory),
        'detr': (placed, placed, x),
        'all': (x, memory, normal(4, 3, keys, 6)),
    }[kind]


def masks_of(kind: str, queries: int, keys: int) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of the module, and what they add to the logits (3, 2, n_q, n_k)."""
    forbidden = normal(5, 6, queries, keys) > 0.3
    forbidden[..., 0] = False  # no query is left without keys
    late = torch.zeros(3, keys, dtype=torch.bool)
    late[1, -2:] = late[2, -1] = True
    added = normal(6, 6, queries, keys)
    bool_as_number = lambda mask: torch.where(mask, float('-inf'), 0.0).double()
    attention = {
        'bool 2-D': forbidden[0],
        'float 2-D': added[0],
        'bool 3-D': forbidden,
        'float 3-D': added,
        'infinite': bool_as_number(forbidden[1]),
    }
    arguments: dict[str, Tensor] = {}
    total = torch.zeros(3, 2, queries, keys).double()
    for part in filter(None, kind.split(' + ')):
        if part.startswith('padding'):
            arguments['key_padding_mask'] = (
                late if part == 'padding' else torch.where(late, -2.5, 0.0).double()
            )
            mask = arguments['key_padding_mask'][:, None, None]
        else:
            arguments['attn_mask'] = mask = attention[part]
            mask = mask.view(3, 2, queries, keys) if mask.dim() == 3 else mask
        total = total + (bool_as_number(mask) if mask.dtype == torch.bool else mask)
    return arguments, total


@pytest.mark.parametrize(
    'kind, masks, options',
    [
        ('self', '', {}),
        ('self', 'bool 2-D', {}),
        ('self', 'bool 3-D + padding', {}),
        ('cross', '', {}),
        ('cross', 'float 3-D', {}),
        ('cross', 'padding', {}),
        ('cross', 'float 2-D + padding as numbers', {}),
        ('detr', '', {}),
        ('detr', 'infinite', dict(bias=False)),
        ('all', 'bool 2-D + padding', {}),
        ('self', 'float 3-D', dict(dropout=0.4)),
    ],
)
@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('need_weights', [True, False])
def test_torch_attention_is_recomputed(
    kind: str,
    masks: str,
    options: dict[str, Any],
    batch_first: bool,
    need_weights: bool,
    reads: Reads,
) -> None:
    """S is what the module returns, with all masks; different rows for queries, keys and values."""
    model, rows = packed(batch_first, **options), rows_of(kind)
    queries, keys = rows[0].shape[1], rows[1].shape[1]
    arguments, added = masks_of(masks, queries, keys)
    given = rows if batch_first else tuple(x.transpose(0, 1) for x in rows)
    with torch.no_grad():
        model.eval()
        expected = model(*given, **arguments, average_attn_weights=False)
        model.train()
    out: list[Tensor] = []

    def run() -> None:
        torch.manual_seed(0)
        out.append(model(*given, **arguments, need_weights=need_weights)[0])
        loss_of(out[-1]).backward()

    found = measured_whole(model, run)
    del reads[len(reads) // 2 :]
    assert torch.allclose(whole(reads, 'scores'), expected[1], rtol=1e-12, atol=1e-15)
    for name, x in zip(('inputs', 'memory', 'values_in'), rows, strict=True):
        assert torch.equal(whole(reads, name), x)
    projected = model.out_proj(whole(reads, 'outputs'))
    projected = projected if batch_first else projected.transpose(0, 1)
    assert torch.allclose(projected, expected[0], rtol=1e-10, atol=1e-12)
    assert options.get('dropout') or torch.allclose(out[0], expected[0], rtol=1e-10, atol=1e-12)
    windows = windows_of(
        rows, model.in_proj_weight, model.in_proj_bias, 2, 3**-0.5, lambda w: added[w]
    )
    close(found['in_proj_weight'].sums, slow_sums(windows, separate=True), 1e-11)
    assert found['in_proj_weight'].rows == 3 * queries


@pytest.mark.parametrize('batch_first', [True, False])
def test_torch_attention_without_a_batch(batch_first: bool, reads: Reads) -> None:
    model, (x, _, _), memory = packed(batch_first), rows_of('self'), normal(2, 5, 6)
    mask = normal(5, 2, 4, 5) > 0.3
    mask[..., 0] = False
    padding = torch.tensor([False] * 4 + [True])
    arguments = dict(attn_mask=mask, key_padding_mask=padding, average_attn_weights=False)
    found = measured(model, lambda: loss_of(model(x[0], memory, memory, **arguments)[0]).backward())
    expected = model(x[0], memory, memory, **arguments)[1]
    assert torch.allclose(whole(reads, 'scores')[0], expected, rtol=1e-12, atol=1e-15)
    assert found['in_proj_weight'].rows == 4


def test_torch_attention_by_keyword(reads: Reads) -> None:
    model, (q, k, v) = packed(True), rows_of('all')
    by_name = measured_whole(
        model, lambda: loss_of(model(value=v, key=k, query=q, need_weights=False)[0]).backward()
    )
    same(by_name, measured_whole(model, lambda: loss_of(model(q, k, v)[0]).backward()))


def test_sampled_images_take_their_own_masks(reads: Reads) -> None:
    model, rows = packed(False), rows_of('cross')
    arguments, _ = masks_of('bool 3-D + padding', 4, 5)
    given = tuple(x.transpose(0, 1) for x in rows)
    expected = model(*given, **arguments, average_attn_weights=False)[1]
    for limit in (64.0, 1e-9):
        measured(
            model,
            lambda: loss_of(model(*given, **arguments)[0]).backward(),
            max_windows=2,
            capture_mb=limit,
        )
    chosen = torch.cat([chosen for _, _, chosen in reads])
    assert len(chosen) == 4 and chosen[:2].tolist() == chosen[2:].tolist()
    assert torch.allclose(whole(reads, 'scores'), expected[chosen], rtol=1e-12, atol=1e-15)


def test_a_mask_of_single_precision_serves_double_precision(reads: Reads) -> None:
    """Under mixed precision too, the capture works in the weight's own precision."""
    model, (q, k, v) = packed(True).float(), (x.float() for x in rows_of('cross'))
    mask = normal(5, 4, 5).float()

    def run() -> None:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = model(q, k, v, attn_mask=mask.bfloat16())[0]
        loss_of(out.float()).backward()

    found = measured(model, run)['in_proj_weight'].sums
    plain = measured(model, lambda: loss_of(model(q, k, v, attn_mask=mask)[0]).backward())
    for name, value in found.items():
        expected = plain['in_proj_weight'].sums[name]
        assert value.dtype == torch.float32
        assert (value - expected).norm() < 0.05 * expected.norm()


def test_a_query_without_keys_does_not_spoil_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """Torch's fused attention gives zeros for it, so that training goes on."""
    model, rows = packed(True), rows_of('cross')
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1] = True
    optimizer = AFOpt(model, lr=0.1, stat_interval=1, refresh_interval=1)
    out = model(*rows, attn_mask=mask, need_weights=False)[0]
    loss_of(out).backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        optimizer.step()
    assert not caplog.records
    assert 'in_proj_weight' in optimizer.state_dict()['precond']['layers']


@pytest.mark.parametrize('batch_first', [True, False])
def test_mmcv_attention_is_its_inner_one(batch_first: bool, reads: Reads) -> None:
    """As DETR calls it: positions join queries and keys, not values."""
    kind = pytest.importorskip('mmcv.cnn.bricks.transformer').MultiheadAttention
    model = randomise(kind(6, 2, batch_first=batch_first).double())
    x, memory, position, place = (normal(seed, 3, n, 6) for seed, n in enumerate((4, 5, 4, 5)))
    turned = [t if batch_first else t.transpose(0, 1) for t in (x, memory, position, place)]
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True

    def run() -> None:
        loss_of(
            model(
                turned[0],
                turned[1],
                turned[1],
                query_pos=turned[2],
                key_pos=turned[3],
                key_padding_mask=padding,
            )
        ).backward()

    found = measured_whole(model, run)
    rows = x + position, memory + place, memory
    offset = torch.where(padding, float('-inf'), 0.0).double()
    windows = windows_of(
        rows, model.attn.in_proj_weight, model.attn.in_proj_bias, 2, 3**-0.5, lambda w: offset[w]
    )
    assert set(found) == {'attn.in_proj_weight'}
    close(found['attn.in_proj_weight'].sums, slow_sums(windows, separate=True), 1e-11)
    assert type(layer_of(AFOpt(model, lr=0.1), 'attn.in_proj_weight')) is PackedAttention


@pytest.mark.parametrize('variant', VARIANTS)
def test_training_with_cross_attention(variant: str) -> None:
    model, rows = packed(True), rows_of('cross')
    optimizer = AFOpt(model, lr=0.05, variant=variant, stat_interval=1, refresh_interval=2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(model(*rows)[0].square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


# ------------------------------------------------------------------- two ranks


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
    return randomise(nn.Sequential(layer, nn.Linear(6, 3)).double())


def steps(model: nn.Module, wrapped: nn.Module, variant: str, part: slice) -> dict[str, Any]:
    optimizer = AFOpt(wrapped, lr=0.02, variant=variant, stat_interval=1, refresh_interval=2)
    for step in range(3):
        optimizer.zero_grad()
        wrapped(normal(step, 4, 5, 6)[part]).pow(3).mean().backward()
        optimizer.step()
    return {'model': model.state_dict(), 'layers': optimizer.state_dict()['precond']['layers']}


def worker(rank: int, folder: str) -> None:
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    results = {}
    for variant in VARIANTS:
        model = encoder()
        results[variant] = steps(
            model, DistributedDataParallel(model), variant, slice(2 * rank, 2 * rank + 2)
        )
    torch.save(results, f'{folder}/{rank}.pt')
    leave()


def test_two_ranks_equal_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    for variant in VARIANTS:
        model = encoder()
        joint = steps(model, model, variant, slice(4))
        assert '0.self_attn.in_proj_weight' in joint['layers']
        for name, value in joint['model'].items():
            assert torch.equal(first[variant]['model'][name], second[variant]['model'][name])
            assert torch.allclose(first[variant]['model'][name], value, rtol=0, atol=1e-9), name
        for name, state in joint['layers'].items():
            close(first[variant]['layers'][name]['statistics'], state['statistics'], 1e-9)
