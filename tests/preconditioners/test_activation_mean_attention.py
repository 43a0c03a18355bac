"""MAC's means in attention modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.optimizers import MAC
from tests.support.attention import (
    block_windows,
    feature_map,
    images,
    layer_of,
    loss_of,
    noting,
    pretrain,
    randomise,
    reasons,
    shift_window,
    swin,
)

QKV = 'w_msa.qkv.weight'


def slow_means(windows: Any) -> dict[str, Tensor]:
    """Sums of the rows that each projection multiplies, with a trailing 1, query by query."""

    def with_one(row: Tensor) -> Tensor:
        return torch.cat([row, row.new_ones(1)])

    size = windows[0].inputs.shape[1] + 1
    sums = {name: torch.zeros(size).double() for name in ('query_mean', 'key_mean', 'value_mean')}
    for window in windows:
        heads, queries, keys = window.logits.shape
        for k in range(keys):
            sums['key_mean'] += with_one(window.memory[k]) * queries / keys
        for i in (i for i in range(queries) if window.real[i]):
            sums['query_mean'] += with_one(window.inputs[i])
            for h in range(heads):
                mixed = window.logits[h, i].softmax(-1) @ window.values_in
                sums['value_mean'] += with_one(mixed) / heads
    return sums


@pytest.mark.parametrize(
    'toolbox, shift, shape', [('mmdet', 0, (6, 3)), ('mmdet', 1, (4, 5)), ('mmpretrain', 1, (5, 4))]
)
def test_means_of_window_attention(toolbox: str, shift: int, shape: tuple[int, int]) -> None:
    model = shift_window(toolbox, shift)
    optimizer = MAC(model, lr=0.1)
    layer = layer_of(optimizer, QKV)
    with noting(model.w_msa) as calls:
        loss_of(model(feature_map(shape), shape)).backward()
    wanted = slow_means(block_windows(model, calls[0], shape))
    staged = optimizer.curvature.capture.staged[layer]
    assert layer.bias is model.w_msa.qkv.bias and layer.columns == 7
    for name, vector in wanted.items():
        torch.testing.assert_close(staged.sums[name][0, :, 0], vector, rtol=1e-9, atol=1e-11)
        form = next(s.form for s in optimizer.curvature.layers[layer].kept if s.key == name)
        (mean,) = form.finalize((staged.sums[name][None],), [layer], name)
        mean = mean[0, 0, :, 0]  # of real queries alone
        torch.testing.assert_close(mean, vector / vector[-1])


@pytest.mark.parametrize('capture_mb', [64.0, 1e-9])
def test_the_official_form_multiplies_means(capture_mb: float) -> None:
    """Of a whole call, however it is cut."""
    model = shift_window()
    optimizer = MAC(model, lr=0.1, compat='official', capture_mb=capture_mb)
    with noting(model.w_msa) as calls:
        loss_of(model(feature_map((6, 3)), (6, 3))).backward()
    (call,) = calls
    weights = call.scores.mean((0, 1, 2))
    wanted = weights @ call.inputs.mean(0) * call.inputs[..., 0].numel()
    staged = optimizer.curvature.capture.staged[layer_of(optimizer, QKV)]
    torch.testing.assert_close(staged.sums['value_product_mean'][0, :-1, 0], wanted)


def test_every_stage_splits_its_own_rows() -> None:
    """Rows of W_Q, W_K and W_V, by the width of their stage, each with its own mean."""
    model = swin()
    optimizer = MAC(model, lr=0.1, momentum=0.0, damping=0.5)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    sum(loss_of(out) for out in model(images())).backward()
    names = [name for name in weights if name.endswith('qkv.weight')]
    assert {len(weights[name]) for name in names} == {18, 36}
    means = {}
    for name in names:
        staged = optimizer.curvature.capture.staged[layer_of(optimizer, name)]
        means[name] = {key: (total / total[:, -1:])[0, :, 0] for key, total in staged.sums.items()}
    optimizer.step()
    params = dict(model.named_parameters())
    for name in names:
        bias = name.replace('weight', 'bias')
        moved = (
            torch.cat(
                [
                    (weights[n] - params[n]).detach().reshape(len(weights[n]), -1)
                    for n in (name, bias)
                ],
                1,
            )
            / 0.1
        )
        whole = torch.cat([params[n].grad.reshape(len(params[n]), -1) for n in (name, bias)], 1)
        for part, statistic in enumerate(('query_mean', 'key_mean', 'value_mean')):
            third = len(whole) // 3
            cut = slice(part * third, (part + 1) * third)
            a = means[name][statistic]
            wanted = whole[cut] - torch.outer(whole[cut] @ a, a) / (0.5 + a @ a)
            torch.testing.assert_close(moved[cut], wanted, rtol=1e-8, atol=1e-10)


def test_vision_transformers_and_cross_attention() -> None:
    block = randomise(pretrain('MultiheadAttention')(6, 2).double())
    optimizer = MAC(block, lr=0.1)
    x = torch.randn(3, 5, 6).double()
    loss_of(block(x)).backward()
    optimizer.step()
    assert set(optimizer.curvature.layers[layer_of(optimizer, 'qkv.weight')].operator_tensors) == {
        'query',
        'key',
        'value',
    }
    cross = randomise(nn.MultiheadAttention(6, 2, batch_first=True).double())
    optimizer = MAC(cross, lr=0.1)
    out, _ = cross(x, torch.randn(3, 4, 6).double(), torch.randn(3, 4, 6).double())
    loss_of(out).backward()
    (layer,) = (layer for layer in optimizer.curvature.layers if layer.name == 'in_proj_weight')
    staged = optimizer.curvature.capture.staged[layer]
    torch.testing.assert_close(staged.sums['query_mean'][0, :6, 0], x.sum((0, 1)))
    assert float(staged.sums['key_mean'][0, -1, 0]) == pytest.approx(15)
    optimizer.step()
    assert cross.in_proj_weight.isfinite().all()


def test_attention_without_biases() -> None:
    model = shift_window(qkv_bias=False)
    optimizer = MAC(model, lr=0.1, momentum=0.0)
    weight = model.w_msa.qkv.weight.detach().clone()
    loss_of(model(feature_map((6, 3)), (6, 3))).backward()
    layer = layer_of(optimizer, QKV)
    total = optimizer.curvature.capture.staged[layer].sums['query_mean'][0, :, 0]
    a = (total / total[-1])[:-1]
    optimizer.step()
    gradient = model.w_msa.qkv.weight.grad[:6]
    wanted = gradient - torch.outer(gradient @ a, a) / (1 + a @ a)
    moved = (weight - model.w_msa.qkv.weight).detach()[:6] / 0.1
    torch.testing.assert_close(moved, wanted, rtol=1e-8, atol=1e-10)


def test_attention_may_be_left_alone() -> None:
    model = shift_window()
    optimizer = MAC(model, lr=0.1, attention=False)
    loss_of(model(feature_map((6, 3)), (6, 3))).backward()
    optimizer.step()
    names = {layer.name: stack for layer, stack in optimizer.curvature.layers.items()}
    assert set(names[QKV].operator_tensors) == {'input'} and not any(
        'attention' in reason for reason in reasons(optimizer).values()
    )
