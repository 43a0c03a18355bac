"""Memory of a capture: checkpointing, inputs that are kept, patches that are not."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mmprecond.optimizers import NKFAC
from tests.support.capture import loss_of
from tests.support.captured_networks import Captured, captured, image, same


class Deep(nn.Module):
    """A stem and a block that may be checkpointed; `inner` notes the block's inner input."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 40), nn.Linear(40, 3)
        self.reentrant = reentrant
        self.inner: list[StorageWeakRef] = []

    def block(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        self.inner.append(StorageWeakRef(x.untyped_storage()))
        return self.second(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_does_not_change_what_is_captured(reentrant: bool) -> None:
    x = torch.randn(7, 5).double()
    ours, theirs = Deep(reentrant).double(), Deep(None).double()
    same(
        captured(ours, lambda _: [loss_of(ours(part)).backward() for part in x.split(4)]),
        captured(theirs, lambda _: [loss_of(theirs(part)).backward() for part in x.split(4)]),
    )


@pytest.mark.parametrize('reentrant, kept', [(None, True), (True, False), (False, False)])
def test_a_checkpointed_input_is_not_kept(reentrant: bool | None, kept: bool) -> None:
    model = Deep(reentrant)
    optimizer = NKFAC(model, lr=0.1, settings='published')
    out = model(torch.randn(7, 5))
    gc.collect()
    assert (not model.inner[0].expired()) == kept
    loss_of(out).backward()
    assert {layer.name for layer in optimizer.curvature.capture.staged} == {
        'stem.weight',
        'first.weight',
        'second.weight',
    }


def test_a_forward_pass_without_backward_frees_its_inputs() -> None:
    model = nn.Linear(3, 2)
    optimizer = NKFAC(model, lr=0.1, settings='published')
    x = torch.randn(4, 3)
    storage, reference = StorageWeakRef(x.untyped_storage()), weakref.ref(x)
    out = model(x)
    del x
    assert not storage.expired()
    del out
    assert storage.expired() and reference() is None
    assert not optimizer.curvature.capture.staged


@pytest.mark.parametrize('name, x', [('conv', image(3)), ('linear', torch.randn(4, 6).double())])
def test_an_input_is_freed_after_backward(name: str, x: Tensor) -> None:
    model = nn.Conv2d(2, 3, 3).double() if name == 'conv' else nn.Linear(6, 3).double()
    optimizer = NKFAC(model, lr=0.1, settings='published')
    x = x.clone()
    storage = StorageWeakRef(x.untyped_storage())
    out = model(x)
    loss_of(out).backward()
    del x
    assert storage.expired()
    assert optimizer.curvature.capture.staged


CONVS = {
    'plain': dict(kernel_size=3, padding=1),
    'strided': dict(kernel_size=3, stride=2),
    'grouped': dict(kernel_size=3, groups=2, padding='same', padding_mode='reflect'),
    'pointwise': dict(kernel_size=1),
}


@pytest.mark.parametrize('name', CONVS)
def test_the_memory_limit_does_not_change_the_sums(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(4, 4, **CONVS[name]).double()
    x = torch.randn(5, 4, 9, 8).double()
    line = module.weight[0].numel() * module.groups * 9 * 8  # bytes of one output row's patches
    limits = [1e-12, 2.5 * line / 2**20, 21 * line / 2**20, 64.0]
    found = [
        captured(module, lambda _: loss_of(module(x)).backward(), capture_mb=limit)
        for limit in limits
    ]
    for other in found[1:]:
        same(found[0], other)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor, in bytes, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


def largest_in_backward(module: nn.Module, x: Tensor, capture_mb: float) -> int:
    optimizer = NKFAC(module, lr=0.1, capture_mb=capture_mb, settings='published')
    out = module(x)
    with LargestTensor() as watch:
        out.sum().backward()
    assert optimizer.curvature.capture.staged
    optimizer.disarm()
    return watch.largest


@pytest.mark.parametrize('batch, size', [(8, 32), (1, 96)])
def test_patches_are_never_laid_out_for_a_whole_map(batch: int, size: int) -> None:
    """Neither over a batch nor within one image; the control lays them out."""
    module = nn.Conv2d(4, 4, 5, padding=2, padding_mode='reflect')
    x = torch.randn(batch, 4, size, size)
    unfolded = batch * size**2 * 4 * 25 * 4
    assert largest_in_backward(module, x, 64.0) >= unfolded
    largest = largest_in_backward(module, x, 0.05)
    assert largest <= max(0.05 * 2**20, 1.1 * (size + 4) ** 2 * 4 * 4 * batch) < unfolded / 5


@pytest.mark.parametrize('batch, size', [(8, 32), (1, 96)])
def test_where_the_stride_is_one_they_are_not_laid_out_at_all(batch: int, size: int) -> None:
    module = nn.Conv2d(8, 4, 5, padding=2, bias=False)
    x = torch.randn(batch, 8, size, size)
    padded = batch * (size + 4) ** 2 * 8 * 4
    assert largest_in_backward(module, x, 64.0) <= 1.1 * padded
    assert largest_in_backward(module, x, 0.05) <= max(x.numel() * 4, 1.1 * padded / batch)


def test_hooked_and_recomputed_calls_of_many_levels_match() -> None:
    """Five calls, the middle ones checkpointed, of different sizes."""
    head = nn.Conv2d(3, 2, 3, padding=1).double()
    levels = [torch.randn(2, 3, s, s).double().requires_grad_() for s in (9, 7, 5, 4, 3)]

    def run(mixed: bool) -> Captured:
        def backward(_: NKFAC) -> None:
            total = 0.0
            for k, reentrant in zip(range(5), itertools.cycle([None, False, True]), strict=False):
                out = (
                    head(levels[k])
                    if reentrant is None or not mixed
                    else checkpoint(head, levels[k], use_reentrant=reentrant)
                )
                total = total + loss_of(out)
            total.backward()

        return captured(head, backward)

    same(run(True), run(False))
