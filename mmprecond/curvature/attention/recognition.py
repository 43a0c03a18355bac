"""Recognition of attention modules of any package, by what they compute."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls import Call
from .heads import Heads
from .layer import AttentionLayer
from .modules import TokenAttention, WindowAttention

#: Layers that act in training alone, and after the softmax.
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
#: Largest relative error of recomputed tensors that count as equal, in float64.
TOLERANCE = 1e-9
#: Number of tokens for modules without a fixed window size. Local windows are smaller.
TOKENS = 70
#: Reason for modules that use the weight of `qkv` without calling it, so that no hook runs.
UNCALLED = 'its qkv was not called as a module'
#: Largest number of tokens in a test of a module.
MOST_TOKENS = 1024


def recognise(module: nn.Module) -> tuple[type[AttentionLayer] | None, str]:
    """Finds the layer type that reads an attention module, and tests it on a copy of the module.

    The module must have the parts of Swin's or ViT's attention: linear layers `qkv` and `proj`, a
    number `num_heads`, and possibly a module `softmax`. The copy runs in float64 on random weights
    and inputs, in evaluation mode and in training mode without dropout. The layer type is accepted
    if the softmax is that of scaled dot products, the input of `proj` is softmax times values, and
    the output of `proj` is the module's output. The module itself is not changed.

    Args:
        module: Any module. An exception in the test becomes a reason.

    Returns:
        The layer type and '', or None and the reason.
    """
    parts = dict(module.named_children())
    if not all(isinstance(parts.get(name), nn.Linear) for name in ('qkv', 'proj')):
        return None, 'it has no linear layers qkv and proj'
    kind = WindowAttention if 'softmax' in parts else TokenAttention
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            reason = kind.refusal(module) or _hidden_input(module, kind) or _try_out(module, kind)
    except Exception as error:  # whatever code of another package raises on such inputs
        text = str(error).splitlines() or ['']
        reason = f'its forward pass failed on random tokens ({type(error).__name__}: {text[0]})'
    return (None, reason) if reason else (kind, '')


def _hidden_input(module: nn.Module, kind: type[AttentionLayer]) -> str:
    """Reason why a module may read more than its tokens, or ''."""
    others = list(inspect.signature(module.forward).parameters)[1:]
    if kind is WindowAttention:  # whose softmax has seen a mask
        others = [name for name in others if 'mask' not in name]
    return f'it may depend on {", ".join(others)} too' if others else ''


def _try_out(module: nn.Module, kind: type[AttentionLayer]) -> str:
    """Reason why a reader does not suit a module, or ''."""
    twin: Any = copy.deepcopy(module).to('cpu', torch.float64)
    own = {*module.modules(), *module.parameters(), *module.buffers()}
    if own & {*twin.modules(), *twin.parameters(), *twin.buffers()}:
        return 'copy.deepcopy of it shares modules or tensors with it'
    for part in twin.modules():  # hooks of the user
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(draw(*tensor.shape) / (tensor.shape[-1] if tensor.dim() else 1) ** 0.5)
    tokens, width = _tokens(twin), twin.qkv.in_features
    if tokens > MOST_TOKENS:
        return f'its windows have {tokens} tokens, more than the {MOST_TOKENS} of the test'
    for training in (False, True):
        for part in twin.modules():
            part.train(training and not isinstance(part, DROPOUTS))
        reason = _doubt(twin, kind, [draw(2, tokens, width) for _ in range(2)])
        if reason:
            return f'{reason}, in training' if training else reason
    return ''


def _tokens(module: Any) -> int:
    """Number of tokens in a window of a module."""
    size = getattr(module, 'window_size', None)
    sides = [size, size] if isinstance(size, int) else size
    return math.prod(sides) if isinstance(sides, (tuple, list)) and sides else TOKENS


def _doubt(module: Any, kind: type[AttentionLayer], inputs: list[Tensor]) -> str:
    """Reason why some calls are not softmax attention of dot products, or ''."""
    complaints: list[str] = []
    read: list[tuple[Heads, tuple[Tensor, ...]]] = []
    projected: list[Tensor] = []

    def observe(call: Call, kept: tuple[Tensor, ...], output: Tensor) -> None:
        layer: Any = call.layer
        read.append((layer.read(call, kept, torch.arange(2)), kept))

    layer = kind('', [module], module.qkv.weight)
    handles = layer.watch(observe, lambda _, reason: complaints.append(reason))
    handles.append(module.proj.register_forward_hook(lambda *call: projected.append(call[-1])))
    results = [module(x) for x in inputs]
    for handle in handles:
        handle.remove()
    if len(read) != len(inputs) or len(projected) != len(inputs):
        return (complaints or ['its proj was not called once as a module'])[0]
    for result, output, (heads, (x, qkv, *_)) in zip(results, projected, read, strict=True):
        if not isinstance(result, Tensor) or not _is_close(result, output):
            return 'its output is not that of its proj'
        if not _is_close(qkv, F.linear(x, module.qkv.weight, module.qkv.bias)):
            return 'the output of its qkv is not weight times input plus bias'
        values = (heads.scores @ heads.value).transpose(1, 2).flatten(2)
        if not _is_close(values, heads.outputs):
            return 'the input of its proj is not softmax times values'
    logits = torch.cat([heads.scores.log() for heads, _ in read])
    products = torch.cat([heads.query @ heads.key.mT for heads, _ in read])
    logits, products = (t - t.mean(-1, keepdim=True) for t in (logits, products))
    # Biases are common to all windows, and cancel.
    logits, products = logits[1:] - logits[:1], products[1:] - products[:1]
    scale = (logits * products).sum() / products.square().sum()
    return (
        ''
        if _is_close(scale * products, logits)
        else 'its logits are no scaled dot products of queries and keys'
    )


def _is_close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= TOLERANCE * b.norm())
