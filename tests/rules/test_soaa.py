"""SOAA: against a slow reference and AdamW, its trust radius, its loss, ranks, resuming."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import Tensor, nn

from mmprecond.optimizers import SOAA, AdaNKFAC
from mmprecond.rules import TrustRegionAdam
from tests.reference.soaa import ReferenceSOAA
from tests.support.classifier import (
    Classifier,
    batch,
    build,
)
from tests.support.distributed import leave
from tests.support.errors import refused

SHAPES = ((3, 4), (3,), (), (2, 3, 2, 2))
HYPER: dict[str, Any] = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, gamma=0.3)


def tensors(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES
    ]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in tensors(0)]


def losses(count: int, seed: int = 5) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    return [2 * 0.9**t + 0.03 * float(x) for t, x in enumerate(noise)]


def step(optimizer: SOAA, params: list[nn.Parameter], gradients: list[Tensor], loss: Any) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    optimizer.loss = loss
    optimizer.step()


@pytest.mark.parametrize('sums', ['global', 'parameter'])
@pytest.mark.parametrize('scale', [3.0, 0.3, 0.01])
def test_every_step_is_the_references(scale: float, sums: str) -> None:
    ours, theirs = parameters(), [p.detach().clone() for p in parameters()]
    half = [dict(params=ours[:2]), dict(params=ours[2:])]  # two groups, one optimizer
    optimizer = SOAA(half, total_steps=15, radius=4.0, sums=sums, **HYPER)
    reference = ReferenceSOAA(theirs, d=4.0, total=15, per_parameter=sums == 'parameter', **HYPER)
    radii = set()
    for t, loss in enumerate(losses(15)):
        gradients = tensors(10 + t, scale)
        step(optimizer, ours, gradients, loss)
        reference.step(gradients, loss)
        radii.add(float(optimizer.radius))
        assert float(optimizer.radius) == pytest.approx(reference.d, rel=1e-9), t
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-11)
    assert len(radii) > 8  # neither always at a bound
    assert bool(reference.fisher_wins) == (scale > 0.1)


def test_groups_have_their_own_rates() -> None:
    ours, theirs = parameters(), parameters()
    one = SOAA([dict(params=ours[:2]), dict(params=ours[2:], lr=0.0)], total_steps=9, **HYPER)
    two = SOAA([dict(params=theirs[:2]), dict(params=theirs[2:])], total_steps=9, **HYPER)
    for t, loss in enumerate(losses(2)):
        step(one, ours, tensors(t), loss)
        step(two, theirs, tensors(t), loss)
    assert torch.equal(ours[3], parameters()[3]) and not torch.equal(theirs[3], parameters()[3])
    assert torch.equal(ours[0], theirs[0])
    first, second = (float(o.state_dict()['trust_region']['predicted']) for o in (one, two))
    assert 0 < first < second  # what does not move reduces nothing


def test_small_gradients_take_adamw_with_its_rate_times_the_radius() -> None:
    """d F < sqrt(v) there, and the decay is not multiplied."""
    ours, theirs = parameters(), parameters()
    optimizer = SOAA(ours, total_steps=12, **HYPER)
    plain = torch.optim.AdamW(theirs, lr=0.01, betas=HYPER['betas'], eps=HYPER['eps'])
    radii = []
    for t, loss in enumerate(losses(12)):
        radii.append(float(optimizer.radius))
        plain.param_groups[0]['lr'] = 0.01 * radii[-1]
        plain.param_groups[0]['weight_decay'] = 0.1 / radii[-1]
        gradients = tensors(10 + t, 1e-3)
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone()
        plain.step()
        step(optimizer, ours, gradients, loss)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    assert radii[:2] == [10.0, 1.0] and len(set(radii)) > 3


hypothesis = pytest.importorskip('hypothesis')
st = hypothesis.strategies


@hypothesis.given(
    gamma=st.floats(0.01, 0.9),
    total=st.integers(1, 12),
    radius=st.floats(1e-3, 1e3),
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=16),
)
def test_the_radius_keeps_its_bounds(
    gamma: float, total: int, radius: float, values: list[float]
) -> None:
    """Whatever the losses are, past the end of the run too."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = SOAA([p], lr=0.1, gamma=gamma, total_steps=total, radius=radius)
    moved = False
    for t, loss in enumerate(values):
        before = float(optimizer.radius)
        step(optimizer, [p], [torch.full((3,), 0.1, dtype=torch.float64)], loss)
        q = min(t / total, 1.0)
        d = float(optimizer.radius)
        if torch.tensor(loss).isfinite() and abs(loss) < 1e100:
            moved = True
        if d != before:
            assert (1 - gamma) ** q * (1 - 1e-12) <= d <= (1 + gamma**q) * (1 + 1e-12)
    if moved and len(values) == 1:
        assert float(optimizer.radius) == 1.0


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), torch.tensor(float('nan'))], ids=str)
def test_a_loss_that_is_not_finite_leaves_the_radius(
    bad: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = parameters(), parameters()
    one, two = (SOAA(p, total_steps=20, **HYPER) for p in (ours, theirs))
    for t in range(3):
        step(one, ours, tensors(t), losses(3)[t])
        step(two, theirs, tensors(t), losses(3)[t])
    kept = {
        k: v
        for k, v in one.state_dict()['trust_region'].items()
        if k in ('radius', 'loss', 'weight')
    }
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        for t in range(3, 6):
            step(one, ours, tensors(t), bad)
    assert caplog.text.count('is not finite') == 1
    assert kept.items() <= one.state_dict()['trust_region'].items()
    for t in range(6, 9):
        step(one, ours, tensors(t), 1.0)
    assert all(p.isfinite().all() for p in ours) and one.radius.isfinite()
    assert float(one.state_dict()['trust_region']['skipped']) == 3


def test_gradients_that_are_not_finite_leave_the_radius_finite() -> None:
    params = parameters()
    optimizer = SOAA(params, total_steps=20, **HYPER)
    step(optimizer, params, tensors(0), 1.0)
    step(optimizer, params, [g * float('inf') for g in tensors(1)], 1.0)
    step(optimizer, params, tensors(2), 1.0)
    assert all(value.isfinite() for value in optimizer.rule.region.values())


# ---------------------------------------------------------------- the loss, plain PyTorch


def test_a_closure_tells_its_loss() -> None:
    ours, theirs = parameters(), parameters()
    one, two = (SOAA(p, total_steps=20, **HYPER) for p in (ours, theirs))

    def closure() -> Tensor:
        one.zero_grad()
        loss: Any = sum((p**2).sum() for p in ours)
        loss.backward()
        return loss

    for _ in range(4):
        wanted = sum((p**2).sum() for p in theirs)
        step(two, theirs, [2 * p.detach() for p in theirs], wanted)
        assert one.step(closure).item() == wanted.item()
        assert one.loss is None
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    assert torch.equal(one.radius, two.radius)


def test_a_missing_loss_is_one_line_and_changes_nothing() -> None:
    params = parameters()
    optimizer = SOAA(params, total_steps=20)
    step(optimizer, params, tensors(0), 1.0)
    before = [p.detach().clone() for p in params]
    refused(
        ValueError,
        optimizer.step,
        'optimizer.loss = loss',
        'closure',
        "constructor='PrecondOptimWrapperConstructor'",
    )
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert optimizer.t == 1
    for bad in (torch.ones(2), 'low', [1.0]):
        refused(ValueError, lambda: setattr(optimizer, 'loss', bad), 'loss')


def test_a_missing_length_is_one_line() -> None:
    params = parameters()
    optimizer = SOAA(params)
    refused(ValueError, lambda: step(optimizer, params, tensors(0), 1.0), 'total_steps=...')
    optimizer.plan_steps(7)
    step(optimizer, params, tensors(0), 1.0)
    assert optimizer.total_steps == 7


def test_the_loss_keeps_no_graph() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = SOAA([p], total_steps=3)
    optimizer.loss = (p**2).sum()
    assert not optimizer.loss.requires_grad


@pytest.mark.parametrize(
    'setting',
    [
        dict(lr=-1.0),
        dict(betas=(0.9, 1.0)),
        dict(betas=(0.9,)),
        dict(eps=0.0),
        dict(weight_decay=-1.0),
        dict(gamma=0.0),
        dict(gamma=1.0),
        dict(radius=0.0),
        dict(total_steps=0),
        dict(total_steps=1.5),
        dict(sums='layer'),
    ],
    ids=str,
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    refused(ValueError, lambda: SOAA(parameters(), **setting), next(iter(setting)))


@pytest.mark.parametrize('at', [1, 4])
def test_resume_through_a_file(at: int, tmp_path: Path) -> None:
    """With its radius, its average and its predicted reduction, to the bit."""
    whole = parameters()
    optimizer = SOAA(whole, total_steps=9, **HYPER)
    for t, loss in enumerate(losses(9)):
        if t == at:
            torch.save([whole, optimizer.state_dict()], tmp_path / 'state.pt')
        step(optimizer, whole, tensors(t), loss)
    saved, state = torch.load(tmp_path / 'state.pt', weights_only=True)
    assert state['trust_region']['steps'] == at
    resumed = SOAA(saved, total_steps=9, **HYPER)
    resumed.load_state_dict(state)
    for t, loss in list(enumerate(losses(9)))[at:]:
        step(resumed, saved, tensors(t), loss)
    assert all(torch.equal(p, q) for p, q in zip(whole, saved, strict=True))
    assert resumed.rule.region == optimizer.rule.region and resumed.t == optimizer.t == 9


def test_the_state_of_another_optimizer_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = SOAA(model, total_steps=9)
    refused(
        ValueError,
        lambda: optimizer.load_state_dict(AdaNKFAC(nn.Linear(3, 2), lr=0.1).state_dict()),
        'another optimizer than SOAA',
    )


# ---------------------------------------------------------------- MMEngine


CONFIG = dict(type='SOAA', lr=0.02, weight_decay=1e-3)


class Smooth(Classifier):
    """Without batch statistics, which differ between micro-batches and ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)


def run_classifier(
    parts: int, rank: int | None = None, steps: int = 6, **optimizer: Any
) -> tuple[dict[str, Tensor], SOAA]:
    """Steps on batches of eight, in micro-batches, all of them or a rank's half."""
    from mmengine.model import MMDistributedDataParallel

    torch.manual_seed(0)
    model = Smooth().double()
    wrapped = model if rank is None else MMDistributedDataParallel(model, device_ids=None)
    wrapper = build(wrapped, optimizer=CONFIG | optimizer, accumulative_counts=parts)
    wrapper.initialize_count_status(wrapped, 0, steps * parts)
    for seed in range(steps):
        data = batch(8, seed)
        mine = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
        for xs, ys in zip(
            data['inputs'][mine].double().chunk(parts),
            data['data_samples'][mine].chunk(parts),
            strict=True,
        ):
            wrapped.train_step(dict(inputs=xs, data_samples=ys), wrapper)
    return {name: p.detach() for name, p in model.named_parameters()}, wrapper.optimizer


@pytest.mark.parametrize('parts', [2, 4])
def test_accumulation_equals_the_joint_batch(parts: int) -> None:
    joint, one = run_classifier(1)
    split, two = run_classifier(parts)
    assert one.t == two.t == one.total_steps == two.total_steps == 6
    for name, value in joint.items():
        torch.testing.assert_close(split[name], value, rtol=0, atol=1e-10)
    for name, value in one.rule.region.items():
        torch.testing.assert_close(two.rule.region[name], value, rtol=1e-8, atol=1e-12, msg=name)


def test_the_length_of_the_run() -> None:
    model = Classifier()
    wrapper = build(model, optimizer=CONFIG, accumulative_counts=4)
    wrapper.initialize_count_status(model, 0, 10)
    assert wrapper.optimizer.total_steps == 3
    for seed in range(10):
        model.train_step(batch(seed=seed), wrapper)
    assert wrapper.optimizer.t == 3 and wrapper._losses == []
    given = build(model, optimizer=dict(CONFIG, total_steps=77))
    given.initialize_count_status(model, 0, 10)
    assert given.optimizer.total_steps == 77
    unknown = build(model, optimizer=CONFIG)
    refused(ValueError, lambda: model.train_step(batch(), unknown), 'total_steps=...')


def test_the_wrapper_takes_the_loss_before_it_is_scaled(
    amp_on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    adapt = TrustRegionAdam.adapt
    monkeypatch.setattr(
        TrustRegionAdam,
        'adapt',
        lambda self, loss, predicted: (seen.append(float(loss)), adapt(self, loss, predicted))[1],
    )
    for scaled in (dict(), dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1024.0)):
        torch.manual_seed(0)
        model = Classifier()
        wrapper = build(
            model, optimizer=dict(CONFIG, total_steps=9), accumulative_counts=2, **scaled
        )
        for seed in range(2):
            model.train_step(batch(seed=seed), wrapper)
    assert len(seen) == 2 and seen[1] == pytest.approx(seen[0], rel=0.02)
    assert 1.0 < seen[0] < 2.0  # about log 4


def test_an_overflow_step_leaves_everything(amp_on_cpu: None) -> None:
    model = Classifier()
    wrapper = build(
        model,
        type='AmpOptimWrapper',
        dtype='bfloat16',
        loss_scale='dynamic',
        optimizer=dict(CONFIG, total_steps=9),
    )
    bad = batch()
    bad['inputs'][0, 0, 0, 0] = float('inf')
    model.train_step(bad, wrapper)
    optimizer = wrapper.optimizer
    assert optimizer.t == 0 and float(optimizer.radius) == 10.0
    assert not float(optimizer.rule.region['skipped'])
    model.norm.reset_running_stats()
    model.train_step(batch(), wrapper)
    assert optimizer.t == 1 and float(optimizer.radius) == 1.0


def test_without_our_constructor_the_error_names_it() -> None:
    model = Classifier()
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(CONFIG, total_steps=9)))
    assert type(wrapper) is OptimWrapper
    refused(
        ValueError,
        lambda: model.train_step(batch(), wrapper),
        "constructor='PrecondOptimWrapperConstructor'",
    )


def worker(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.set_num_threads(1)
    weights, optimizer = run_classifier(2, rank)
    torch.save([weights, optimizer.state_dict()], f'{folder}/{rank}.pt')
    leave()


def test_two_ranks_equal_the_joint_batch(tmp_path: Path) -> None:
    """In weights and in all that the radius is made with; equal to the bit between ranks."""
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1))
    joint, optimizer = run_classifier(1)
    for name, value in joint.items():
        assert torch.equal(first[0][name], second[0][name])
        torch.testing.assert_close(first[0][name], value, rtol=0, atol=1e-10)
    regions = [state['trust_region'] for _, state in (first, second)]
    assert regions[0] == regions[1]
    for name, value in optimizer.rule.region.items():
        torch.testing.assert_close(regions[0][name], value, rtol=1e-8, atol=1e-12, msg=name)


def test_left_over_keys_and_odd_groups() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(TypeError, match='_delete_=True'):
        SOAA([p], lr=0.1, momentum=0.9)
    optimizer = SOAA([dict(params=[]), dict(params=[p])], lr=0.1, total_steps=3)
    p.grad, optimizer.loss = torch.ones(2), 1.0
    optimizer.step()
    assert (p < 1).all()


def test_a_state_that_lacks_something_is_refused_before_anything_changes() -> None:
    params = parameters()
    optimizer = SOAA(params, total_steps=9, **HYPER)
    step(optimizer, params, tensors(0), 1.0)
    state = copy.deepcopy(optimizer.state_dict())
    del state['trust_region']['predicted']
    before = copy.deepcopy(optimizer.state_dict())
    refused(ValueError, lambda: optimizer.load_state_dict(state), 'it has no predicted')
    for key, value in before['trust_region'].items():
        assert optimizer.state_dict()['trust_region'][key] == value
