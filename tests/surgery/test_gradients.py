"""Gradients of several losses, taken apart and written back, in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmprecond import NKFAC
from mmprecond.surgery import GradientSurgery, PCGrad
from tests.support.distributed import leave
from tests.support.errors import refused


class TwoHeads(nn.Module):
    """A body that both losses reach, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.first, self.second = nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.body(inputs))
        return self.first(hidden), self.second(hidden)


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    first, second = model(batch[0])
    return {
        'regress': 3 * (first - batch[1][:, :2]).square().mean(),
        'classify': nn.functional.cross_entropy(second, batch[1].argmax(1)),
    }


def build(seed: int = 0) -> tuple[TwoHeads, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = TwoHeads().double()
    return model, (torch.randn(8, 5).double(), torch.randn(8, 3).double())


def by_hand(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[Any, Any]:
    """Gradients of both losses of all parameters, summed over the batches."""
    params = list(model.parameters())
    found = []
    for name in ('regress', 'classify'):
        total = sum(losses_of(model, batch)[name] for batch in batches)
        found.append(torch.autograd.grad(total, params, allow_unused=True, materialize_grads=True))
    return found[0], found[1]


@pytest.mark.parametrize('micro', [1, 3])
def test_shared_parameters_get_the_surgery_and_heads_the_sum(micro: int) -> None:
    """Also for gradients that were accumulated over several batches."""
    model, _ = build()
    batches = [build(seed)[1] for seed in range(micro)]
    first, second = by_hand(model, batches)
    surgery = GradientSurgery(model.parameters(), 'PCGrad')
    for batch in batches:
        surgery.backward(losses_of(model, batch))
    surgery.resolve()
    flat = torch.stack([torch.cat([g.flatten() for g in part[:2]]) for part in (first, second)])
    expected = PCGrad().combine(flat)
    found = torch.cat([p.grad.flatten() for p in model.body.parameters()])
    torch.testing.assert_close(found, expected)
    for p, one, other in zip(model.parameters(), first, second, strict=True):
        if p not in set(model.body.parameters()):
            torch.testing.assert_close(p.grad, one + other)
    numbers = surgery.diagnostics
    cosine = torch.nn.functional.cosine_similarity(flat[0], flat[1], dim=0)
    assert numbers['min_cosine'] == pytest.approx(float(cosine))
    assert numbers['conflicts'] == float(cosine < 0)
    assert numbers['norm_regress'] == pytest.approx(float(flat[0].norm()))
    assert numbers['norm_ratio'] == pytest.approx(float(expected.norm() / flat.sum(0).norm()))


def test_steps_between_surgeries_keep_the_sum() -> None:
    model, batch = build()
    surgery = GradientSurgery(model.parameters(), 'SAMGS', interval=2)
    kinds = []
    for _ in range(4):
        model.zero_grad()
        sum(losses_of(model, batch).values()).backward()
        plain = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        surgery.backward(losses_of(model, batch))
        surgery.resolve()
        same = all(
            torch.allclose(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True)
        )
        kinds.append(same)
    assert kinds == [False, True, False, True]


def test_the_scale_of_the_loss_is_taken_out_and_put_back() -> None:
    """SAM-GS, which is no linear map of the gradients, tells the difference."""
    results = []
    for scale in (1.0, 1024.0):
        model, batch = build()
        surgery = GradientSurgery(model.parameters(), dict(type='SAMGS', threshold=0.0))
        losses = {name: loss * scale for name, loss in losses_of(model, batch).items()}
        surgery.backward(losses)
        surgery.resolve(scale)
        results.append(model.body.weight.grad / scale)
    torch.testing.assert_close(*results)


def test_gradients_that_are_not_finite_stay_and_leave_no_trace() -> None:
    model, batch = build()
    surgery = GradientSurgery(model.parameters(), 'GCond')
    losses = losses_of(model, batch)
    losses['regress'] = losses['regress'] * float('inf')
    before = surgery.aggregator.state_dict()
    surgery.backward(losses)
    surgery.resolve()
    assert not bool(model.body.weight.grad.isfinite().all())
    assert surgery.aggregator.state_dict() == before and surgery.diagnostics == {}


def test_statistics_are_those_of_the_sum_measured_once() -> None:
    """The direction differs by the gradient alone: the operators are equal to the bit."""
    states = []
    for with_surgery in (False, True):
        model, batch = build()
        optimizer = NKFAC(model, lr=0.0, stat_interval=1, refresh_interval=1)
        surgery = GradientSurgery(model.parameters(), 'PCGrad')
        for _ in range(3):
            optimizer.zero_grad()
            losses = losses_of(model, batch)
            if with_surgery:
                surgery.backward(losses)
                surgery.resolve()
            else:
                torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
        states.append(optimizer.state_dict()['precond'])
    flat = [_tensors(state) for state in states]
    assert flat[0].keys() == flat[1].keys() and len(flat[0]) > 3
    assert all(torch.equal(flat[0][key], flat[1][key]) for key in flat[0])


def _tensors(value: Any, prefix: str = '') -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix: value}
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value if isinstance(value, (list, tuple)) else ())
    )
    return {k: v for key, part in items for k, v in _tensors(part, f'{prefix}/{key}').items()}


@pytest.mark.parametrize('set_to_none', [True, False])
def test_a_step_that_was_given_up_leaves_nothing(set_to_none: bool) -> None:
    model, batch = build()
    first, second = by_hand(model, [batch])
    surgery = GradientSurgery(model.parameters(), 'PCGrad')
    surgery.backward(losses_of(model, batch))
    model.zero_grad(set_to_none)
    surgery.backward(losses_of(model, batch))
    surgery.resolve()
    flat = torch.stack([torch.cat([g.flatten() for g in part[:2]]) for part in (first, second)])
    assert surgery.diagnostics['norm_regress'] == pytest.approx(float(flat[0].norm()))


def test_a_loss_without_a_graph_has_no_gradient() -> None:
    model, batch = build()
    surgery = GradientSurgery(model.parameters(), 'PCGrad')
    surgery.backward(losses_of(model, batch))
    surgery.resolve()
    model.zero_grad()
    losses = losses_of(model, batch)
    expected = torch.autograd.grad(losses['classify'], model.body.weight, retain_graph=True)[0]
    surgery.backward({**losses, 'regress': torch.zeros(()).double()})
    surgery.resolve()
    torch.testing.assert_close(model.body.weight.grad, expected)


def test_the_largest_gradient_is_the_difference() -> None:
    """So that rounding does not spoil a small one: the small one is exact."""
    model, batch = build()
    surgery = GradientSurgery(model.parameters(), 'PCGrad')
    losses = losses_of(model, batch)
    losses = {'large': 1e9 * losses['regress'], 'small': losses['classify']}
    expected = torch.autograd.grad(losses['small'], model.body.weight, retain_graph=True)[0]
    inputs: list[Tensor] = []
    combine = surgery.aggregator.combine
    surgery.aggregator.combine = lambda g: inputs.append(g.clone()) or combine(g)  # type: ignore
    surgery.backward(losses)
    surgery.resolve()
    assert torch.equal(inputs[0][1, : expected.numel()], expected.flatten())


def test_another_surgery_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build()
    saved = GradientSurgery(model.parameters(), 'GCond')
    saved.backward(losses_of(model, batch))
    saved.resolve()
    other = GradientSurgery(model.parameters(), 'SAMGS')
    other.load_state_dict(saved.state_dict())
    assert 'the saved surgery is GCond; SAMGS starts anew' in caplog.text
    model.zero_grad()
    other.backward(losses_of(model, batch))
    other.resolve()


def test_a_surgery_of_other_trained_parameters_starts_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run may be resumed with other frozen layers."""
    params = [nn.Parameter(torch.ones(2)) for _ in range(3)]

    def losses() -> dict[str, Tensor]:
        first, second = (p.sum() for p in params[1:])
        return dict(a=first + second, b=first * second)

    saved = GradientSurgery(params, 'GCond')
    saved.backward(losses())
    saved.resolve()
    same = GradientSurgery(params, 'GCond')
    same.load_state_dict(saved.state_dict())
    assert same.state_dict()['shared'] == saved.state_dict()['shared'] == [1, 2]
    params[0].requires_grad_(False)
    other = GradientSurgery(params, 'GCond')
    with caplog.at_level('WARNING', 'mmprecond'):
        other.load_state_dict(saved.state_dict())
    assert 'trains other parameters' in caplog.text
    assert other.state_dict()['shared'] == []


def test_compiled_and_reentrant_graphs_are_refused() -> None:
    model, batch = build()
    compiled = torch.compile(model, backend='aot_eager')
    surgery = GradientSurgery(model.parameters())
    with torch.compiler.set_stance('default'):  # whatever an optimizer of another test has left
        losses = losses_of(compiled, batch)
    refused(ValueError, lambda: surgery.backward(losses), 'torch.compile')

    def again(inputs: Tensor) -> Tensor:
        return checkpoint(model.body, inputs.requires_grad_(), use_reentrant=True)

    hidden = again(batch[0])
    losses = dict(a=model.first(hidden).sum(), b=model.second(hidden).sum())
    fresh = GradientSurgery(model.parameters())
    refused(ValueError, lambda: fresh.backward(losses), 'use_reentrant=False')


def test_what_is_refused() -> None:
    model, batch = build()
    surgery = GradientSurgery(model.parameters())
    losses = losses_of(model, batch)
    refused(ValueError, lambda: surgery.backward({'one': losses['regress']}), 'two losses or more')
    heads = GradientSurgery([*model.first.parameters(), *model.second.parameters()])
    refused(ValueError, lambda: heads.backward(losses_of(model, batch)), 'nothing to resolve')
    surgery.backward(losses)
    other = {'boxes': model.body.weight.sum(), **losses_of(model, batch)}
    refused(ValueError, lambda: surgery.backward(other), 'were regress, classify before')
    refused(ValueError, lambda: GradientSurgery(model.parameters(), interval=0), 'interval')


class Branches(TwoHeads):
    """A second body on rank 1, where the first one is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(5, 6)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        body = self.other if dist.get_rank() else self.body
        hidden = torch.tanh(body(inputs))
        return self.first(hidden), self.second(hidden)


def branching_worker(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Branches().double()
    batch = torch.randn(8, 5).double(), torch.randn(8, 3).double()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    surgery = GradientSurgery(model.parameters(), 'PCGrad')
    for _ in range(3):
        model.zero_grad()
        surgery.backward(losses_of(wrapped, batch))
        surgery.resolve()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    torch.save(model.state_dict(), f'{folder}/{rank}.pth')
    leave()


def test_ranks_that_use_different_layers_stay_equal(tmp_path: Path) -> None:
    mp.spawn(branching_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def worker(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, (inputs, targets) = build()
    wrapped = DistributedDataParallel(model)
    half = slice(4 * rank, 4 * rank + 4)
    surgery = GradientSurgery(model.parameters(), 'GCond')
    for _ in range(3):
        model.zero_grad()
        surgery.backward(losses_of(wrapped, (inputs[half], targets[half])))
        surgery.resolve()
        with torch.no_grad():
            torch._foreach_add_(
                list(model.parameters()), [p.grad for p in model.parameters()], alpha=-0.1
            )
    torch.save(model.state_dict(), f'{folder}/{rank}.pth')
    leave()


def test_two_ranks_are_the_joint_batch(tmp_path: Path) -> None:
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1)]
    model, batch = build()
    surgery = GradientSurgery(model.parameters(), 'GCond')
    for _ in range(3):
        model.zero_grad()
        surgery.backward(losses_of(model, batch))
        surgery.resolve()
        with torch.no_grad():
            torch._foreach_add_(
                list(model.parameters()), [p.grad for p in model.parameters()], alpha=-0.1
            )
    for name, value in model.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], value)
