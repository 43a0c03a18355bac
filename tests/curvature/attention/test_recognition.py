"""Attention modules of classes that nobody registered: read by what they compute."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.curvature import (
    PackedAttention,
    TokenAttention,
    attention_type,
    attention_types,
    unread_attention,
)
from mmprecond.optimizers import AFOpt, Preconditioned
from tests.support.attention import feature_map, loss_of, shift_window

WIDTH, HEADS = 12, 3


class TokenAttn(nn.Module):
    """ViT's attention as many packages write it, with variations."""

    def __init__(self, scale: float | None = None, order: str = 'qkv', kind: str = '') -> None:
        super().__init__()
        self.num_heads, self.order, self.kind = HEADS, order, kind
        self.scale = (WIDTH // HEADS) ** -0.5 if scale is None else scale
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH // HEADS)
        self.register_buffer('table', torch.zeros(1))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = F.linear(x, self.qkv.weight) if self.kind == 'functional' else self.qkv(x)
        if self.kind == 'head-major':
            parts = qkv.unflatten(-1, (HEADS, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            parts = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        named = dict(zip(self.order, parts, strict=True))
        return named['q'], named['k'], named['v']

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        if self.kind == 'normalised':
            q, k = self.norm(q), self.norm(k)
        if self.kind == 'linear':
            out = q @ (k.mT @ v)
        else:
            logits = q @ k.mT * (1.0 if self.kind == 'unscaled' else self.scale)
            places = torch.arange(x.shape[1])
            if self.kind == 'local':
                far = (places[:, None] - places).abs() > 8
                logits = logits.masked_fill(far, -100.0)
            if self.kind == 'drops keys' and self.training:
                logits = logits.masked_fill(torch.rand_like(logits) < 0.3, -100.0)
            if self.kind == 'bias':
                logits = logits + self.table * places
            out = torch.softmax(logits, -1) @ v
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out + x if self.kind == 'shortcut' else out


class Signed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.sign(), self.bias)


class SignedAttn(TokenAttn):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = Signed(WIDTH, 3 * WIDTH)


class SelfCopyAttn(TokenAttn):
    def __deepcopy__(self, memo: Any) -> SelfCopyAttn:
        return self


def with_heads(number: int) -> nn.Module:
    module = TokenAttn()
    module.num_heads = number
    return module


def unread(module: nn.Module) -> str:
    """Reason why a module is not read, or ''."""
    model = nn.Sequential(module)
    return unread_attention(model, attention_types(model)).get('0', '')


class MaskedAttn(TokenAttn):
    """Its softmax may have a mask that no part shows."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x)


class WindowAttn(TokenAttn):
    """Swin's attention with parts of the usual names, and its softmax as a module."""

    def __init__(self, kind: str = '', **options: Any) -> None:
        super().__init__(kind=kind, **options)
        self.window_size = (2, 3)
        self.bias = nn.Parameter(torch.zeros(HEADS, 6, 6))
        self.softmax = nn.Softmax(-2 if kind == 'columns' else -1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        if self.kind == 'cosine':
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        logits = q * self.scale @ k.mT
        logits = logits * self.bias if self.kind == 'gated' else logits + self.bias
        if self.kind == 'batch bias':
            logits = logits + q.mean((0, 2, 3))[None, :, None, None] * torch.arange(6)
        return self.proj((self.softmax(logits) @ v).transpose(1, 2).flatten(2))


class CrossAttn(WindowAttn):
    """Keys and values may be of another map."""

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


@pytest.mark.parametrize(
    ('make', 'reader'),
    [
        (lambda: TokenAttn(), 'TokenAttention'),
        (lambda: TokenAttn(scale=0.3), 'TokenAttention'),
        (lambda: WindowAttn(), 'WindowAttention'),
        (lambda: WindowAttn(scale=2.0), 'WindowAttention'),
    ],
)
@pytest.mark.parametrize('change', [nn.Module.half, nn.Module.double, nn.Module.eval])
def test_dot_product_attention_is_read(
    make: Callable[[], nn.Module], reader: str, change: Callable[[nn.Module], nn.Module]
) -> None:
    module = change(make())
    before = torch.random.get_rng_state(), module.training
    weights = {name: p.clone() for name, p in module.state_dict().items()}
    kind, reason = attention_type(module)
    assert kind is not None and kind.__name__ == reader and not reason
    assert torch.equal(torch.random.get_rng_state(), before[0]) and module.training == before[1]
    assert all(torch.equal(p, weights[name]) for name, p in module.state_dict().items())
    assert not unread(module)


@pytest.mark.parametrize(
    ('make', 'reason'),
    [
        (lambda: TokenAttn(order='kqv', kind='unscaled'), 'is not softmax times values'),
        (lambda: TokenAttn(order='qvk'), 'is not softmax times values'),
        (lambda: TokenAttn(kind='head-major'), 'is not softmax times values'),
        (lambda: TokenAttn(kind='normalised'), 'is not softmax times values'),
        (lambda: TokenAttn(kind='linear'), 'is not softmax times values'),
        (lambda: TokenAttn(kind='unscaled'), 'is not softmax times values'),
        (lambda: TokenAttn(kind='functional'), 'its qkv was not called as a module'),
        (lambda: MaskedAttn(), 'it may depend on mask too'),
        (lambda: TokenAttn(kind='local'), 'is not softmax times values'),
        (lambda: TokenAttn(kind='drops keys'), 'is not softmax times values, in training'),
        (lambda: TokenAttn(kind='shortcut'), 'its output is not that of its proj'),
        (lambda: TokenAttn(kind='bias'), 'is not softmax times values'),
        (lambda: SignedAttn(), 'the output of its qkv is not weight times input'),
        (lambda: CrossAttn(), 'it may depend on memory too'),
        (lambda: WindowAttn(kind='batch bias'), 'its logits are no scaled dot products'),
        (lambda: SelfCopyAttn(), 'shares modules or tensors with it'),
        (lambda: with_heads(0), 'it has no number num_heads'),
        (lambda: with_heads(5), 'queries, keys and values must have equally many heads'),
        (lambda: WindowAttn(kind='columns'), 'its logits are no scaled dot products'),
        (lambda: WindowAttn(kind='cosine'), 'its logits are no scaled dot products'),
        (lambda: WindowAttn(kind='gated'), 'its logits are no scaled dot products'),
        (lambda: WindowAttn(order='vkq'), 'is not softmax times values'),
    ],
)
def test_what_is_no_such_attention_is_said(
    make: Callable[[], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), make(), make())
    assert attention_type(model[1])[0] is None
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        table = Preconditioned(model, rule=dict(type='SGDM', lr=0.1), layers='AFOpt+NKFAC').table()
    (warning,) = caplog.messages
    assert f'does not read 2 x {type(model[1]).__name__} as attention: ' in warning
    assert reason in warning and table.count('not read as attention') == 2
    caplog.clear()
    Preconditioned(model, rule=dict(type='SGDM', lr=0.1), layers='NKFAC')
    assert not caplog.messages  # nobody asked for attention


def test_a_module_that_takes_other_arguments() -> None:
    class NeedyAttention(TokenAttn):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            raise RuntimeError('needs a map\nof another shape')

    assert unread(NeedyAttention()) == (
        'its forward pass failed on random tokens (RuntimeError: needs a map)'
    )


def test_channel_attention_is_no_such_attention() -> None:
    """Squeeze and excitation, which has no heads."""

    class ChannelAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Conv2d(WIDTH, WIDTH, 1)

    assert not unread(ChannelAttention())


def test_subclasses_of_torchs_own_that_keep_its_forward() -> None:
    class Named(nn.MultiheadAttention):
        pass

    class OtherAttention(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert attention_type(Named(WIDTH, HEADS)) == (PackedAttention, '')
    assert attention_type(OtherAttention(WIDTH, HEADS)) == (None, '')
    assert 'no linear layers qkv' in unread(OtherAttention(WIDTH, HEADS))


def test_a_toolboxs_copy_trains_as_the_class_that_is_known() -> None:
    """A copy of MMDetection's window attention under another name, as other toolboxes have."""
    shape, weights = (5, 4), []
    for copied in (False, True):
        torch.manual_seed(0)
        model = shift_window('mmdet', 1)
        if copied:
            kind: Any = type(model.w_msa)
            model.w_msa.__class__ = type('WindowMSA', (kind,), {})
        optimizer = AFOpt(model, lr=0.01, stat_interval=1, refresh_interval=1)
        assert {'w_msa.qkv.weight'} <= {
            layer.name for layer in optimizer.curvature.layers if not layer.compressible
        }
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model(feature_map(shape, seed=step), shape)).backward()
            optimizer.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights))


def test_the_readers_are_those_of_the_registered_classes() -> None:
    assert attention_type(TokenAttn())[0] is TokenAttention


def test_hooks_of_the_user_are_not_called_and_weights_stay() -> None:
    calls: list[str] = []
    module = TokenAttn()
    for part in (module, module.qkv, module.proj):
        part.register_forward_hook(lambda *_: calls.append('called'))
        part.register_forward_pre_hook(lambda *_: calls.append('called'))
    owner = WindowAttn()
    copying = SelfCopyAttn()
    before = [p.clone() for p in copying.parameters()]
    assert attention_type(module)[0] and attention_type(owner)[0]
    assert attention_type(copying) == (None, '') and copying.training
    assert all(map(torch.equal, before, copying.parameters())) and not calls


def test_a_block_that_shows_the_parts_of_its_attention() -> None:
    class Block(nn.Module):
        num_heads = HEADS

        def __init__(self) -> None:
            super().__init__()
            self.inner = TokenAttn()

        @property
        def qkv(self) -> nn.Module:
            return self.inner.qkv

        @property
        def proj(self) -> nn.Module:
            return self.inner.proj

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    optimizer = Preconditioned(
        nn.Sequential(nn.Linear(WIDTH, WIDTH), Block()),
        rule=dict(type='SGDM', lr=0.1),
        layers='AFOpt+NKFAC',
    )
    assert '1.inner.qkv.weight' in [layer.name for layer in optimizer.curvature.layers]


@pytest.mark.parametrize('words', ['NKFAC', 'AFOpt+NKFAC', 'FSGD+FSGD'])
def test_a_weight_that_no_call_shows_is_left_out(words: str) -> None:
    """Under every method: nothing may look preconditioned and not be."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), TokenAttn(kind='functional'))
    optimizer = Preconditioned(model, rule=dict(type='SGDM', lr=0.1), layers=words)
    names = [layer.name for layer in optimizer.curvature.layers]
    assert names == ['0.weight', '1.proj.weight']
    assert '1.qkv' in [left.name for left in optimizer.curvature.left_out]


def test_heads_of_another_name_are_no_attention() -> None:
    module = TokenAttn()
    del module.num_heads
    assert attention_type(module) == (None, '') and not unread(module)


def test_wide_windows_are_not_tried_out() -> None:
    module = WindowAttn()
    module.window_size = (40, 40)
    assert attention_type(module) == (None, '')


@pytest.mark.parametrize('untrained', ['frozen', 'left out', 'not in the optimizer'])
def test_attention_that_is_not_trained_leaves_the_rest(untrained: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), TokenAttn())
    groups: list[dict[str, Any]] = [dict(params=list(model[0].parameters()))]
    if untrained == 'left out':
        groups.append(dict(params=list(model[1].parameters()), precondition=False))
    if untrained == 'frozen':
        model[1].requires_grad_(False)
    optimizer = Preconditioned(
        groups, model=model, rule=dict(type='SGDM', lr=0.1), layers='AFOpt+NKFAC'
    )
    assert [layer.name for layer in optimizer.curvature.layers] == ['0.weight']
    assert 'AFOpt takes no layer' in optimizer.summary()
