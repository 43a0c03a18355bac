"""Which attention modules are taken as a whole, and why others are not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.curvature import LinearLayer, WindowAttention
from mmprecond.optimizers import NKFAC, AFOpt, Preconditioned
from tests.reference.attention import normal
from tests.support.attention import (
    feature_map,
    layer_of,
    loss_of,
    measured,
    pretrain,
    reasons,
    same,
    shift_window,
)


def beside(**modules: nn.Module) -> nn.Module:
    """Modules beside a linear layer that can always be preconditioned."""
    return nn.ModuleDict({**modules, 'other': nn.Linear(2, 2)}).double()


@pytest.mark.parametrize(
    'make, name, reason',
    [
        (
            lambda: pretrain('MultiheadAttention')(6, 2, v_shortcut=True),
            'attn.qkv',
            'v_shortcut=True passes the values around the attention',
        ),
        (lambda: nn.MultiheadAttention(6, 2, kdim=4, vdim=4), 'attn', 'weights of their own'),
        (lambda: nn.MultiheadAttention(6, 2, vdim=4), 'attn', 'weights of their own'),
        (lambda: nn.MultiheadAttention(6, 2, add_bias_kv=True), 'attn', 'keys of its own'),
        (lambda: nn.MultiheadAttention(6, 2, add_zero_attn=True), 'attn', 'keys of its own'),
        (lambda: pretrain('WindowMSAV2')(6, (3, 3), 2), 'attn.qkv', 'its attention is cosine'),
        (lambda: pretrain('BEiTAttention')(6, 2, None, False), 'attn.qkv', 'without calling it'),
        (
            lambda: pytest.importorskip(
                'torchvision.models.swin_transformer'
            ).ShiftedWindowAttention(6, [3, 3], [0, 0], 2),
            'attn.qkv',
            'without calling it',
        ),
    ],
)
def test_what_cannot_be_read_is_left_out_with_a_reason(
    make: Callable[[], nn.Module], name: str, reason: str
) -> None:
    optimizer = AFOpt(beside(attn=make()), lr=0.1)
    assert reason in reasons(optimizer)[name] and reason in optimizer.table()
    assert [
        layer.name
        for layer in optimizer.curvature.layers
        if 'qkv' in layer.name or 'in_proj' in layer.name
    ] == []
    # Once, and everything else by its own rule.
    assert [left.name for left in optimizer.curvature.left_out].count(name) == 1
    assert ('attn.proj.weight' in {layer.name for layer in optimizer.curvature.layers}) == (
        'qkv' in name
    )


def test_an_unknown_attention_function_is_refused() -> None:
    model = beside(attn=pretrain('MultiheadAttention')(6, 2))
    model['attn'].scaled_dot_product_attention = lambda *args, **kwargs: args[2]
    assert 'attention function is not known' in reasons(AFOpt(model, lr=0.1))['attn.qkv']


@pytest.mark.parametrize('replaced', [False, True])
def test_subclasses_are_read_by_what_they_compute(
    replaced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    base = pretrain('WindowMSA')
    model = beside(attn=type('SigmoidMSA', (base,), {})(6, (3, 3), 2))
    if replaced:
        model['attn'].softmax = nn.Sigmoid()
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        optimizer = AFOpt(model, lr=0.1)
    kinds = {layer.name: type(layer) for layer in optimizer.curvature.layers}
    assert kinds['attn.qkv.weight'] is (LinearLayer if replaced else WindowAttention)
    assert kinds['attn.proj.weight'] is LinearLayer
    text = 'its logits are no scaled dot products of queries and keys'
    assert (text in caplog.text) == (text in optimizer.table()) == replaced


def test_swin_v2_trains_with_its_projection_preconditioned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    v2 = pretrain('WindowMSAV2')
    model = shift_window('mmpretrain', 1, window_msa=v2, cpb_mlp_hidden_dims=4)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        optimizer = AFOpt(model, lr=0.01, momentum=0.0, stat_interval=1, refresh_interval=1)
        loss_of(model(feature_map((5, 4)), (5, 4))).backward()
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
    (warning,) = caplog.messages
    assert 'does not read 1 x WindowMSAV2 as attention: its attention is cosine' in warning
    assert {layer.name for layer in optimizer.curvature.layers} == {
        'w_msa.proj.weight',
        'w_msa.cpb_mlp.0.weight',
        'w_msa.cpb_mlp.2.weight',
    }
    # Not the first layer of cpb_mlp: see test_an_in_place_change_of_the_output.
    assert {'w_msa.proj.weight', 'w_msa.cpb_mlp.2.weight'} <= set(
        optimizer.state_dict()['precond']['layers']
    )
    step = (old['w_msa.qkv.weight'] - model.w_msa.qkv.weight) / 0.01
    assert torch.allclose(step, model.w_msa.qkv.weight.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmpretrain'])
def test_other_methods_take_the_linear_layers(toolbox: str) -> None:
    model = shift_window(toolbox, 1)
    optimizer = NKFAC(model, lr=0.1)
    assert {layer.name: type(layer) for layer in optimizer.curvature.layers} == {
        'w_msa.qkv.weight': LinearLayer,
        'w_msa.proj.weight': LinearLayer,
    }
    loss_of(model(feature_map((5, 4)), (5, 4))).backward()
    rows = {layer.name: kept.rows for layer, kept in optimizer.curvature.capture.staged.items()}
    assert rows == {'w_msa.qkv.weight': 72, 'w_msa.proj.weight': 72}
    packed = NKFAC(beside(attn=nn.MultiheadAttention(6, 2)), lr=0.1)
    assert set(reasons(packed)) == {'attn', 'attn.out_proj'}


def test_attention_features_on_some_blocks_alone() -> None:
    """The others' qkv is an ordinary linear layer."""
    model = nn.ModuleDict({name: shift_window('mmdet') for name in ('first', 'second')})
    optimizer = Preconditioned(
        model,
        rule=dict(type='AdamW', lr=1e-3),
        layers=[
            dict(
                match=dict(name='first', module_type='WindowMSA'),
                preconditioner=dict(type='AttentionFeature'),
            ),
            dict(preconditioner=dict(type='NewtonKronecker')),
        ],
    )
    taken = {
        layer.name: (type(layer).__name__, type(stack.method).__name__)
        for layer, stack in optimizer.curvature.layers.items()
    }
    assert taken == {
        'first.w_msa.qkv.weight': ('WindowAttention', 'AttentionFeature'),
        'first.w_msa.proj.weight': ('LinearLayer', 'AttentionFeature'),
        'second.w_msa.qkv.weight': ('LinearLayer', 'NewtonKronecker'),
        'second.w_msa.proj.weight': ('LinearLayer', 'NewtonKronecker'),
    }


def test_groups_reach_attention() -> None:
    """`precondition=False`, `damping`, and a weight that is not in the optimizer."""
    model = beside(**{name: shift_window('mmdet').w_msa for name in 'abc'})
    chosen = {
        'a.qkv.weight': dict(precondition=False),
        'b.qkv.weight': dict(damping=0.5),
        'c.qkv.weight': None,
    }
    groups = [
        {'params': [p], **(chosen.get(name) or {})}
        for name, p in model.named_parameters()
        if chosen.get(name, {}) is not None
    ]
    optimizer = AFOpt(groups, lr=0.1, model=model)
    assert reasons(optimizer)['a.qkv'] == 'WindowMSA: precondition=False'
    assert reasons(optimizer)['c.qkv'] == 'WindowMSA: weight is not in the optimizer'
    dampings = optimizer.curvature.dampings.current(optimizer.param_groups)
    assert dampings == {layer_of(optimizer, 'b.qkv.weight'): 0.5}


def test_a_frozen_qkv_is_not_measured() -> None:
    model = shift_window('mmdet')
    model.w_msa.qkv.weight.requires_grad_(False)
    before = model.w_msa.qkv.weight.clone()
    optimizer = AFOpt(model, lr=0.1, stat_interval=1, refresh_interval=1)
    loss_of(model(feature_map((6, 3)), (6, 3))).backward()
    assert {layer.name for layer in optimizer.curvature.capture.staged} == {'w_msa.proj.weight'}
    optimizer.step()
    assert torch.equal(model.w_msa.qkv.weight, before)


def test_a_shared_weight_is_left_out() -> None:
    model = beside(a=shift_window('mmdet').w_msa, b=shift_window('mmdet').w_msa)
    model['b'].qkv.weight = model['a'].qkv.weight
    optimizer = AFOpt(model, lr=0.1)
    assert all('shared with another module' in reasons(optimizer)[f'{name}.qkv'] for name in 'ab')
    assert {layer.name for layer in optimizer.curvature.layers} == {
        'a.proj.weight',
        'b.proj.weight',
        'other.weight',
    }


def test_a_shared_projection_is_left_out() -> None:
    """Two blocks with one `qkv` module between them."""
    model = beside(a=shift_window('mmdet').w_msa, b=shift_window('mmdet').w_msa)
    model['b'].qkv = model['a'].qkv
    optimizer = AFOpt(model, lr=0.1)
    names = {layer.name for layer in optimizer.curvature.layers}
    assert names == {'a.proj.weight', 'b.proj.weight', 'other.weight'}
    assert 'shared with another module' in reasons(optimizer)['b.qkv']


def test_a_shared_block_is_one_layer() -> None:
    block = shift_window('mmdet', 1)
    model = nn.ModuleDict({'a': block, 'b': block})
    run = lambda: loss_of(model['b'](model['a'](feature_map((5, 4)), (5, 4)), (5, 4))).backward()
    assert measured(model, run)['a.w_msa.qkv.weight'].rows == 2 * 72


def test_a_projection_that_is_not_called_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """A block whose `forward` was replaced: nothing is measured by halves, and it is said once."""
    model = beside(attn=shift_window('mmdet').w_msa)
    block = model['attn']

    def forward(x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = block.qkv(x).unflatten(2, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        return block.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    block.forward = forward
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        optimizer = AFOpt(model, lr=0.1, stat_interval=1, refresh_interval=1)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(block(normal(0, 2, 9, 6))).backward()
            assert {layer.name for layer in optimizer.curvature.capture.staged} == {
                'attn.proj.weight'
            }
            optimizer.step()
    said = [record.getMessage() for record in caplog.records]
    assert all('attn.qkv.weight' in one for one in said) and len(said) == len(set(said)) <= 2
    assert sum('its softmax was not called as a module' in one for one in said) == 1


@pytest.mark.parametrize('kind', [NKFAC, AFOpt])
@pytest.mark.parametrize(
    'shape, bias', [((8, 6), True), ((2, 4, 6), True), ((2, 4, 6), False), ((2, 2, 4, 6), True)]
)
def test_an_in_place_change_of_the_output(kind: Any, shape: tuple[int, ...], bias: bool) -> None:
    """ReLU(inplace=True), mmcv's default in an FFN."""
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.ReLU(inplace), nn.Linear(5, 2))
        optimizer = kind(model.double(), lr=0.1)
        loss_of(model(normal(0, *shape))).backward()
        found.append(
            {layer.name: kept for layer, kept in optimizer.curvature.capture.staged.items()}
        )
    same(*found)


def test_an_in_place_residual_after_attention() -> None:
    model, x = beside(attn=nn.MultiheadAttention(6, 2, batch_first=True)), normal(0, 2, 4, 6)

    def run() -> None:
        out = model['attn'](x, x, x)[0]
        out += x
        loss_of(out).backward()

    assert measured(model, run)['attn.in_proj_weight'].rows == 8


def test_the_ffn_of_detr_is_measured() -> None:
    """As MMDetection builds it, beside attention."""
    ffn = pytest.importorskip('mmcv.cnn.bricks.transformer').FFN(6, 12).double()
    found = measured(ffn, lambda: loss_of(ffn(normal(0, 2, 4, 6))).backward())
    assert set(found) == {'layers.0.0.weight', 'layers.1.weight'}
