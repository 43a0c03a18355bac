"""Readers of attention modules, and classes of MMDetection, MMPretrain and torch that they read.

These classes have their qualified names here, because no toolbox is imported. `register_attention`
adds a reader for another class. Other classes are recognised by what they compute.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..calls import Call, Observer, Tap
from ..layer import Layer
from .heads import Heads
from .layer import AttentionLayer


class WindowAttention(AttentionLayer):
    """`WindowMSA`: reads queries, keys, values and softmax that the module itself computed."""

    #: Submodules whose calls make up one call of the block, in order.
    parts: tuple[str, ...] = ('qkv', 'softmax', 'proj')

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        missing = [
            part for part in cls.parts if not isinstance(getattr(module, part, None), nn.Module)
        ]
        heads = getattr(module, 'num_heads', None)
        if not isinstance(heads, int) or heads < 1:
            return 'it has no number num_heads'
        if missing:
            return f'it has no submodule {", ".join(missing)}'
        return _projection_refusal(module, heads)

    def watch(
        self, observe: Observer, complain: Callable[[Layer, str], None]
    ) -> list[RemovableHandle]:
        """Installs hooks on the parts of each block (see the base class).

        The block itself has no hook, because activation checkpointing may run its forward twice.
        """
        return [
            handle
            for module in self.modules
            for handle in self._watch_parts(module, observe, complain)
        ]

    def _watch_parts(
        self, block: nn.Module, observe: Observer, complain: Callable[[Layer, str], None]
    ) -> list[RemovableHandle]:
        first, last = self.parts[0], self.parts[-1]
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def record_part(
            part: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
        ) -> None:
            if part == first:
                seen.clear()  # a recomputation may have stopped half-way
            seen[part] = args[0], output
            if part == last:
                report_call(dict(seen))

        def report_call(parts_seen: dict[str, tuple[Tensor, Tensor]]) -> None:
            seen.clear()  # first: nothing is held, whatever `observe` raises
            missing = [part for part in self.parts if part not in parts_seen]
            if missing:
                complain(self, f'its {", ".join(missing)} was not called as a module')
            else:
                observe(Call(self, block), self.kept(parts_seen), parts_seen['qkv'][1])

        return [
            block.get_submodule(part).register_forward_hook(
                Tap(partial(record_part, part)), prepend=True
            )
            for part in self.parts
        ]

    def kept(self, seen: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """Tensors to keep of a call: X, the projections, O, and S."""
        return seen['qkv'][0], seen['qkv'][1], seen['proj'][0], seen['softmax'][1]

    def read(self, call: Call, kept: tuple[Tensor, ...], chosen: Tensor) -> Heads:
        inputs, projected, outputs = (t[chosen].to(self.working_dtype) for t in kept[:3])
        split = projected.unflatten(2, (3, self.heads, self.rows)).permute(2, 0, 3, 1, 4)
        query, key, value = split.unbind()
        scores = self.scores(call, kept, chosen, query, key)
        return Heads(
            inputs, inputs, inputs, query, key, value, scores, outputs, self.query_mask(inputs)
        )

    def query_mask(self, inputs: Tensor) -> Tensor:
        """Mask (w, n) with 0 for padding, as Swin pads its normalised map with zeros."""
        return (inputs.abs().amax(-1) != 0).to(inputs.dtype)

    def scores(
        self, call: Call, kept: tuple[Tensor, ...], chosen: Tensor, query: Tensor, key: Tensor
    ) -> Tensor:
        """The softmax of some windows (w, h, n, n)."""
        return kept[3][chosen].to(self.working_dtype)


class TokenAttention(WindowAttention):
    """ViT's attention, as MMPretrain's `MultiheadAttention`: recomputes its softmax from Q and K.

    Attention dropout acts after the softmax and is not part of it.
    """

    parts = ('qkv', 'proj')

    @classmethod
    def refusal(cls, module: nn.Module) -> str:
        if getattr(module, 'v_shortcut', False):
            return 'v_shortcut=True passes the values around the attention'
        reason = super().refusal(module)
        if not reason and cls._scale(module) is None:
            return 'its attention function is not known'
        return reason

    def kept(self, seen: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        return seen['qkv'][0], seen['qkv'][1], seen['proj'][0]

    def query_mask(self, inputs: Tensor) -> Tensor:
        return torch.ones_like(inputs[..., 0])

    def scores(
        self, call: Call, kept: tuple[Tensor, ...], chosen: Tensor, query: Tensor, key: Tensor
    ) -> Tensor:
        return torch.softmax(query @ key.mT * (self._scale(call.module) or 1.0), -1)

    def read_flops(self, queries: int, keys: int) -> float:
        """FLOPs of the logits."""
        return 2.0 * self.heads * queries * keys * self.rows

    @staticmethod
    def _scale(module: Any) -> float | None:
        """Factor of the module's logits, or None if it is not known."""
        function = getattr(module, 'scaled_dot_product_attention', None)
        usual = (module.qkv.out_features / (3 * module.num_heads)) ** -0.5
        if function is None:
            scale = getattr(module, 'scale', usual)
            return scale if isinstance(scale, float) else None
        if function is F.scaled_dot_product_attention:
            return usual
        if isinstance(function, partial) and set(function.keywords) == {'scale'}:
            return 1 / function.keywords['scale']  # MMPretrain divides by it
        return None


class PackedAttention(AttentionLayer):
    """`nn.MultiheadAttention`, also inside mmcv's wrapper (DETR): recomputed from its arguments.

    Queries, keys and values may come from different rows, and their numbers may differ. Dropout of
    the attention weights is not taken into account.
    """

    @classmethod
    def refusal(cls, module: Any) -> str:
        if not isinstance(module, nn.MultiheadAttention):
            return f'{type(module).__name__} is no MultiheadAttention of torch'
        if module.in_proj_weight is None:
            return 'its queries, keys and values have weights of their own (kdim, vdim)'
        if module.bias_k is not None or module.add_zero_attn:
            return 'it adds keys of its own (add_bias_kv, add_zero_attn)'
        return ''

    @classmethod
    def weight_owner(cls, module: nn.Module) -> tuple[str, str]:
        return '', 'in_proj_weight'

    @property
    def inputs(self) -> int:
        """Two: input rows of W_Q and of W_K."""
        return 2

    @property
    def is_square(self) -> bool:
        """False, because the numbers are not known before a call."""
        return False

    def watch(
        self, observe: Observer, complain: Callable[[Layer, str], None]
    ) -> list[RemovableHandle]:
        """Installs a hook on the module (see the base class)."""
        signature = inspect.signature(nn.MultiheadAttention.forward)

        def report(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: tuple[Tensor, Any],
        ) -> None:
            arguments = signature.bind(module, *args, **kwargs).arguments
            masks = arguments.get('attn_mask'), arguments.get('key_padding_mask')
            observe(
                Call(self, module, masks),
                (arguments['query'], arguments['key'], arguments['value']),
                output[0],
            )

        return [
            module.register_forward_hook(Tap(report), with_kwargs=True, prepend=True)
            for module in self.modules
        ]

    def sizes(self, call: Call, kept: tuple[Tensor, ...]) -> tuple[int, int, int]:
        query, key, _ = self._batch_first(call, kept)
        return query.shape[0], query.shape[1], key.shape[1]

    def read(self, call: Call, kept: tuple[Tensor, ...], chosen: Tensor) -> Heads:
        inputs, memory, values_in = rows = [
            t[chosen].to(self.working_dtype) for t in self._batch_first(call, kept)
        ]
        weights = self.weight.to(self.working_dtype).chunk(3)
        bias: Any = call.module.in_proj_bias
        biases = [None] * 3 if bias is None else bias.to(self.working_dtype).chunk(3)
        query, key, value = (
            F.linear(x, w, b).unflatten(2, (self.heads, self.rows)).transpose(1, 2)
            for x, w, b in zip(rows, weights, biases, strict=True)
        )
        logits = query @ key.mT * self.rows**-0.5
        for mask in self._masks(call, chosen):
            logits = logits + mask
        # For a query whose keys are all masked torch's own result is zero.
        nothing = logits.amax(-1, keepdim=True) == float('-inf')
        scores = torch.softmax(logits, -1).masked_fill(nothing, 0)
        outputs = (scores @ value).transpose(1, 2).flatten(2)
        return Heads(
            inputs,
            memory,
            values_in,
            query,
            key,
            value,
            scores,
            outputs,
            torch.ones_like(inputs[..., 0]),
        )

    def read_flops(self, queries: int, keys: int) -> float:
        """FLOPs of the projections, the logits and the outputs."""
        width = self.heads * self.rows
        return 2.0 * (queries + 2 * keys) * width**2 + 4.0 * queries * keys * width

    @staticmethod
    def _batch_first(call: Call, kept: tuple[Tensor, ...]) -> list[Tensor]:
        """Queries, keys and values as (batch, tokens, c)."""
        module: Any = call.module
        if kept[0].dim() == 2:
            return [t[None] for t in kept]
        return [t if module.batch_first else t.transpose(0, 1) for t in kept]

    def _masks(self, call: Call, chosen: Tensor) -> list[Tensor]:
        """Additive masks that broadcast against the logits (w, h, n_q, n_k)."""
        attention, padding = (self._additive_mask(mask) for mask in call.extra)
        masks = []
        if attention is not None:
            if attention.dim() == 3:
                attention = attention.unflatten(0, (-1, self.heads))[chosen]
            masks.append(attention)
        if padding is not None:
            masks.append(padding.reshape(-1, padding.shape[-1])[chosen][:, None, None])
        return masks

    def _additive_mask(self, mask: Tensor | None) -> Tensor | None:
        """Mask as numbers to add to the logits; True in a bool mask excludes a key."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        zeros = torch.zeros(mask.shape, dtype=self.working_dtype, device=mask.device)
        return zeros.masked_fill(mask, float('-inf'))


def _projection_refusal(module: Any, heads: int) -> str:
    """Reason why a module's qkv is not W_Q, W_K and W_V with equal numbers of heads, or ''."""
    weight, output = (
        getattr(module.get_submodule(part), 'weight', None) for part in ('qkv', 'proj')
    )
    if not isinstance(weight, Tensor) or not isinstance(output, Tensor):
        return ''  # parametrised weights are refused elsewhere, as for any layer
    rows, width = len(weight), output.shape[1]
    if rows != 3 * width or width % heads:
        return (
            f'its qkv has {rows} rows where its proj takes {width} numbers of {heads} heads: '
            'queries, keys and values must have equally many heads (no grouped-query attention)'
        )
    return ''


#: Readers of attention modules by qualified name.
ATTENTION_TYPES: dict[str, type[AttentionLayer]] = {
    'mmdet.models.backbones.swin.WindowMSA': WindowAttention,
    'mmpretrain.models.utils.attention.WindowMSA': WindowAttention,
    'mmpretrain.models.utils.attention.MultiheadAttention': TokenAttention,
    'torch.nn.modules.activation.MultiheadAttention': PackedAttention,
}

_FUNCTIONAL = 'it uses the weight of its qkv without calling it'

#: Attention modules with a `qkv` that cannot be read, with the reason (or '').
UNREADABLE: dict[str, Callable[[Any], str]] = {
    'mmpretrain.models.utils.attention.WindowMSAV2': lambda block: (
        f'its attention is cosine, for which no statistic is known, and {_FUNCTIONAL}'
    ),
    'mmpretrain.models.utils.attention.BEiTAttention': lambda block: (
        '' if block.q_bias is None else _FUNCTIONAL
    ),
    'torchvision.models.swin_transformer.ShiftedWindowAttention': lambda block: _FUNCTIONAL,
    'torchvision.models.swin_transformer.ShiftedWindowAttentionV2': lambda block: _FUNCTIONAL,
}
