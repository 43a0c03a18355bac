"""Attention modules under capture: what was read of them, and their sums by brute force."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.curvature import AttentionLayer, PackedAttention, Staged, WindowAttention
from mmprecond.curvature.attention import Heads
from mmprecond.optimizers import AFOpt, PreconditionedOptimizer
from tests.reference import attention as oracle

VARIANTS = ('thesis', 'gauss_newton')

Measured = dict[str, Staged]


def loss_of(out: Tensor) -> Tensor:
    """A loss whose gradient differs at every position."""
    weights = torch.arange(1, out.numel() + 1, dtype=out.dtype).reshape(out.shape).cos()
    return (out**2 * weights).mean() + (out * weights).mean()


def randomise(module: nn.Module, seed: int = 0, spread: float = 1.0) -> nn.Module:
    """Draws all parameters, biases and tables too; matrices as wide as their fan-in asks."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            width = p[0].numel() if p.dim() > 1 and p.shape[0] > 1 else 1
            drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(spread * drawn / width**0.5 + (p.dim() == 1) * 0.3)
    return module


def measured(
    model: nn.Module, run: Callable[[], Any], variant: str = 'thesis', **options: Any
) -> Measured:
    """What a new AFOpt captures of `run`, by weight name."""
    optimizer = AFOpt(model, lr=0.1, variant=variant, settings='published', count_from=0, **options)
    run()
    found = {layer.name: kept for layer, kept in optimizer.curvature.capture.staged.items()}
    optimizer.disarm()
    return found


def measured_whole(model: nn.Module, run: Callable[[], Any], **options: Any) -> Measured:
    """The statistics of both variants together."""
    thesis, exact = (measured(model, run, variant, **options) for variant in VARIANTS)
    assert thesis.keys() == exact.keys()
    for name, kept in thesis.items():
        assert kept.rows == exact[name].rows
        for key in kept.sums.keys() & exact[name].sums.keys():
            assert torch.allclose(kept.sums[key], exact[name].sums[key], rtol=1e-11)
        kept.sums.update(exact[name].sums)
    return thesis


def same(ours: Measured, theirs: Measured, rtol: float = 1e-12) -> None:
    """The same layers, rows and sums."""
    assert ours.keys() == theirs.keys() and ours
    for name, kept in ours.items():
        assert kept.rows == theirs[name].rows, name
        close(kept.sums, theirs[name].sums, rtol)


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys() and ours
    for key, value in ours.items():
        assert value.shape == theirs[key].shape, key
        size = theirs[key].norm()
        assert size > 0 and (value - theirs[key]).norm() <= rtol * size, key


def pretrain(name: str) -> Any:
    """An attention module of MMPretrain."""
    return getattr(pytest.importorskip('mmpretrain.models.utils.attention'), name)


def layer_of(optimizer: PreconditionedOptimizer, name: str) -> AttentionLayer:
    (layer,) = (layer for layer in optimizer.curvature.layers if layer.name == name)
    assert isinstance(layer, AttentionLayer)
    return layer


def reasons(optimizer: PreconditionedOptimizer) -> dict[str, str]:
    """Why each module that was left out takes the plain rule."""
    return {left.name: f'{left.kind}: {left.reason}' for left in optimizer.curvature.left_out}


def hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


# ------------------------------------------------------------------- what was read

Reads = list[tuple[AttentionLayer, Heads, Tensor]]


def spy(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Everything that the capture reads of attention modules, as layer, heads and windows."""
    seen: Reads = []
    for kind in (WindowAttention, PackedAttention):
        original = kind.read

        def read(
            self: Any, call: Any, kept: Any, chosen: Tensor, original: Callable = original
        ) -> Heads:
            heads = original(self, call, kept, chosen)
            seen.append((self, heads, chosen))
            return heads

        monkeypatch.setattr(kind, 'read', read)
    return seen


def whole(reads: Reads, name: str) -> Tensor:
    """One tensor of what was read, over the chunks of a call."""
    return torch.cat([getattr(heads, name) for _, heads, _ in reads])


@dataclass
class Noted:
    """What a block with `qkv` and `proj` itself used in one call, by hooks of the test's own."""

    inputs: Tensor
    mask: Tensor | None
    projected: Tensor
    outputs: Tensor
    scores: Tensor | None = None


@contextmanager
def noting(block: nn.Module) -> Iterator[list[Noted]]:
    """Notes the calls of a block within a `with`."""
    calls: list[Noted] = []
    parts: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            parts[name] = args[0].detach(), output.detach()

        return hook

    def finish(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> None:
        calls.append(
            Noted(
                args[0].detach(),
                kwargs.get('mask'),
                parts['qkv'][1],
                parts['proj'][0],
                parts['softmax'][1] if 'softmax' in parts else None,
            )
        )

    handles = [
        block.get_submodule(name).register_forward_hook(note(name))
        for name in ('qkv', 'softmax', 'proj')
        if hasattr(block, name)
    ]
    handles.append(block.register_forward_hook(finish, with_kwargs=True))
    yield calls
    for handle in handles:
        handle.remove()


# ------------------------------------------------------------------- sums by brute force


@dataclass
class Window:
    """One window: rows (n, c), queries, keys and values (heads, n, d), logits (heads, n_q, n_k).

    `real` says which queries are not padding.
    """

    inputs: Tensor
    memory: Tensor
    values_in: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    logits: Tensor
    real: Sequence[bool]


def windows_of(
    rows: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    scale: float,
    offset: Callable[[int], Tensor | float],
    real: Tensor | None = None,
) -> list[Window]:
    """Windows of self- or cross-attention from its rows (w, n, c) of W_Q, W_K and W_V.

    Args:
        rows: Input rows of the three projections.
        weight: (3 h d, c), W_Q over W_K over W_V, heads within each.
        bias: (3 h d), or None.
        heads: h.
        scale: By what the logits are multiplied.
        offset: What is added to the logits of a window, by its number.
        real: (w, n_q), False for padding.
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    found = []
    for w in range(len(rows[0])):
        projections = []
        for part, x in enumerate(rows):
            size = len(weight) // 3
            cut = slice(part * size, (part + 1) * size)
            out = F.linear(x[w].detach(), weight[cut], None if bias is None else bias[cut])
            projections.append(torch.stack(out.chunk(heads, 1)))
        q, k, v = projections
        found.append(
            Window(
                *(x[w].detach() for x in rows),
                q,
                k,
                v,
                scale * q @ k.mT + offset(w),
                [True] * q.shape[1] if real is None else real[w].tolist(),
            )
        )
    return found


def slow_sums(windows: Sequence[Window], separate: bool = False) -> dict[str, Tensor]:
    """All statistics of both variants, query by query.

    Args:
        windows: The windows.
        separate: Whether W_K's rows are not W_Q's, so that they have a moment of their own (and
            there is no thesis form of W_K).
    """
    first = windows[0]
    heads, _, d = first.query.shape
    c = first.inputs.shape[1]
    zeros = first.inputs.new_zeros
    sums = {
        'input_moment': zeros(1 + separate, c, c),
        'query_curvature': zeros(heads, d, d),
        'key_curvature': zeros(heads, d, d),
        'output_moment': zeros(1, heads * d, heads * d),
        'query_moment': zeros(heads, d, d),
        'key_feature_moment': zeros(heads, c, c),
        'value_feature_moment': zeros(heads, c, c),
    }
    for window in windows:
        sums['input_moment'][0] += oracle.moment(window.inputs)
        if separate:
            sums['input_moment'][1] += oracle.moment(window.memory)
        for i in (i for i, kept in enumerate(window.real) if kept):
            output = []
            for h in range(heads):
                row, value = window.logits[h, i], window.value[h]
                along = {'query_curvature': window.key[h], 'key_feature_moment': window.memory}
                if not separate:
                    along['key_curvature'] = window.query[h]
                parts = oracle.slopes(row, value, torch.cat(list(along.values()), 1))
                widths = [z.shape[1] for z in along.values()]
                for name, slope in zip(along, parts.split(widths, 1), strict=True):
                    sums[name][h] += slope.t() @ slope
                query, features = window.query[h, i], row.softmax(-1) @ window.values_in
                sums['query_moment'][h] += torch.outer(query, query)
                sums['value_feature_moment'][h] += torch.outer(features, features)
                output.append(row.softmax(-1) @ value)
            joined = torch.cat(output)
            sums['output_moment'][0] += torch.outer(joined, joined)
    if separate:
        del sums['key_curvature']
    return sums


# ------------------------------------------------------------------- window attention


def shift_window(toolbox: str = 'mmdet', shift: int = 0, seed: int = 0, **options: Any) -> Any:
    """`ShiftWindowMSA` in float64: 6 channels, 2 heads, windows of 3 x 3."""
    name = {
        'mmdet': 'mmdet.models.backbones.swin',
        'mmpretrain': 'mmpretrain.models.utils.attention',
    }[toolbox]
    kind = pytest.importorskip(name).ShiftWindowMSA
    return randomise(kind(6, 2, 3, shift_size=shift, **options).double(), seed)


def feature_map(shape: tuple[int, int], batch: int = 2, seed: int = 1) -> Tensor:
    return oracle.normal(seed, batch, shape[0] * shape[1], 6)


def position_bias(block: Any) -> Tensor:
    """The bias (h, n, n) by definition: by the offset of a query's row and column from a key's."""
    height, width = block.window_size
    table = block.relative_position_bias_table.detach()
    places = [(y, x) for y in range(height) for x in range(width)]
    rows = [
        [table[(yq - yk + height - 1) * (2 * width - 1) + xq - xk + width - 1] for yk, xk in places]
        for yq, xq in places
    ]
    return torch.stack([torch.stack(row) for row in rows]).movedim(2, 0)


def real_queries(model: Any, shape: tuple[int, int], batch: int) -> Tensor:
    """Which queries (w, n) are not padding: where a map of ones arrives."""
    with torch.no_grad(), noting(model.w_msa) as calls:
        model(torch.ones(batch, shape[0] * shape[1], 6).double(), shape)
    return calls[0].inputs[..., 0] == 1


def block_windows(model: Any, call: Noted, shape: tuple[int, int], batch: int = 2) -> list[Window]:
    """The windows of one call of a `ShiftWindowMSA`, from its input, weights, table and mask."""
    block, bias = model.w_msa, position_bias(model.w_msa)
    masks = call.mask

    def offset(w: int) -> Tensor:
        return bias if masks is None else bias + masks[w % len(masks)].double()

    return windows_of(
        [call.inputs] * 3,
        block.qkv.weight,
        block.qkv.bias,
        block.num_heads,
        block.scale,
        offset,
        real_queries(model, shape, batch),
    )


def swin(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A `SwinTransformer` of two stages with two blocks each, and maps that need padding."""
    kind = pytest.importorskip('mmdet.models.backbones.swin').SwinTransformer
    model = kind(
        embed_dims=6,
        patch_size=2,
        window_size=3,
        mlp_ratio=2,
        depths=(2, 2),
        num_heads=(2, 3),
        strides=(2, 2),
        out_indices=(0, 1),
        **{'drop_path_rate': 0.0, **options},
    )
    return randomise(model.to(dtype), spread=0.7)


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return oracle.normal(seed, batch, 3, 10, 14)


def backward(model: nn.Module, x: Tensor, share: float = 1.0) -> None:
    """Of `loss_of` over all stages."""
    (sum(loss_of(out) for out in model(x)) * share).backward()
