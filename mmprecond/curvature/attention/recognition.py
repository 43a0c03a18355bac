"""Recognition of attention modules of any package, by what they compute."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import Call
from .heads import Heads
from .layer import AttentionLayer
from .modules import TokenAttention, WindowAttention

#: Largest relative error of what a reader reads, in float64.
TOLERANCE = 1e-9
#: Number of tokens for modules without a window of fixed size.
TOKENS = 5


def recognise(module: Any) -> tuple[type[AttentionLayer] | None, str]:
    """Finds the reader of an attention module by its parts, and tries it out.

    The parts are those of Swin's and ViT's attention: linear layers `qkv` and `proj`, a number
    `num_heads`, and possibly a module `softmax`. A copy of the module runs on random weights and
    inputs. A reader is right if what it reads is softmax attention of dot products.

    Returns:
        The reader and '', or None and the reason.
    """
    parts = [getattr(module, part, None) for part in ('qkv', 'proj')]
    if not all(isinstance(part, nn.Linear) for part in parts):
        return None, 'it has no linear layers qkv and proj'
    has_softmax = isinstance(getattr(module, 'softmax', None), nn.Module)
    kind = WindowAttention if has_softmax else TokenAttention
    reason = kind.refusal(module) or _hidden_input(module, kind) or _try_out(module, kind)
    return (None, reason) if reason else (kind, '')


def _hidden_input(module: nn.Module, kind: type[AttentionLayer]) -> str:
    """Reason why a softmax that is not a module cannot be recomputed, or ''."""
    others = list(inspect.signature(module.forward).parameters)[1:]
    if kind is WindowAttention or not others:
        return ''
    return f'its softmax may depend on {", ".join(others)}, which its qkv does not show'


def _try_out(module: Any, kind: type[AttentionLayer]) -> str:
    """Reason why a reader does not suit a module, or ''."""
    complaints: list[str] = []
    read: list[Heads] = []

    def observe(call: Call, kept: tuple[Tensor, ...], output: Tensor) -> None:
        layer: Any = call.layer
        read.append(layer.read(call, kept, torch.arange(2)))

    try:
        twin = copy.deepcopy(module).to('cpu', torch.float64).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in twin.parameters():
                p.copy_(
                    torch.randn(p.shape, generator=generator, dtype=p.dtype) / p.shape[-1] ** 0.5
                )
            layer = kind('', [twin], twin.qkv.weight)
            handles = layer.watch(observe, lambda _, reason: complaints.append(reason))
            width = twin.qkv.weight.shape[1]
            twin(torch.randn(2, _tokens(twin), width, generator=generator, dtype=torch.float64))
            for handle in handles:
                handle.remove()
            if not read:
                return (complaints or ['its proj was not called as a module'])[0]
            return _doubt(read[-1])
    except Exception as error:  # whatever code of another package raises on such inputs
        text = str(error).splitlines() or ['']
        return f'it does not take windows of tokens alone ({type(error).__name__}: {text[0]})'


def _tokens(module: Any) -> int:
    """Number of tokens in a window of a module."""
    size = getattr(module, 'window_size', None)
    sides = [size, size] if isinstance(size, int) else size
    return math.prod(sides) if isinstance(sides, (tuple, list)) and sides else TOKENS


def _doubt(heads: Heads) -> str:
    """Reason why what was read of two windows is no dot-product attention, or ''."""
    outputs = (heads.scores @ heads.value).transpose(1, 2).flatten(2)
    if not _is_close(outputs, heads.outputs):
        return 'the input of its proj is not softmax times values'
    logits, products = (
        t - t.mean(-1, keepdim=True) for t in (heads.scores.log(), heads.query @ heads.key.mT)
    )
    # Biases are common to both windows, and cancel.
    logits, products = logits[0] - logits[1], products[0] - products[1]
    scale = (logits * products).sum() / products.square().sum()
    if not _is_close(scale * products, logits):
        return 'its logits are no scaled dot products of queries and keys'
    return ''


def _is_close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() <= TOLERANCE * b.norm())
