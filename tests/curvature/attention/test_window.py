"""Window attention of MMDetection and MMPretrain: what the capture reads, sums and samples."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mmprecond.curvature import WindowAttention
from mmprecond.optimizers import AFOpt
from tests.support.attention import (
    VARIANTS,
    Reads,
    block_windows,
    close,
    feature_map,
    layer_of,
    loss_of,
    measured,
    measured_whole,
    noting,
    real_queries,
    same,
    shift_window,
    slow_sums,
    spy,
    whole,
)

QKV = 'w_msa.qkv.weight'

#: Toolbox, shift, map and options of the block.
CASES: list[tuple[str, int, tuple[int, int], dict[str, Any]]] = [
    ('mmdet', 0, (6, 3), {}),
    ('mmdet', 0, (7, 2), {}),
    ('mmdet', 1, (6, 6), {}),
    ('mmdet', 1, (4, 5), dict(qk_scale=0.9)),
    ('mmdet', 2, (2, 7), dict(qkv_bias=False)),
    ('mmpretrain', 0, (3, 6), {}),
    ('mmpretrain', 0, (4, 5), {}),
    ('mmpretrain', 1, (6, 6), {}),
    ('mmpretrain', 1, (5, 4), dict(qkv_bias=False)),
    ('mmpretrain', 1, (3, 6), {}),  # of the window's own size: not shifted
    ('mmpretrain', 1, (3, 6), dict(pad_small_map=True)),
    ('mmpretrain', 1, (2, 4), dict(pad_small_map=True, qk_scale=0.9)),
]


@pytest.fixture(name='reads')
def _reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return spy(monkeypatch)


cases = pytest.mark.parametrize('toolbox, shift, shape, options', CASES)


def test_the_cases_are_what_they_seem() -> None:
    """Some shifted, some padded, with and without each other."""
    seen = set()
    for toolbox, shift, shape, options in CASES:
        model = shift_window(toolbox, shift, **options)
        real = real_queries(model, shape, 2)
        assert real.sum() == 2 * shape[0] * shape[1]
        with torch.no_grad(), noting(model.w_msa) as calls:
            model(feature_map(shape), shape)
        seen.add((toolbox, calls[0].mask is not None, bool(real.all())))
    assert len(seen) == 8


# ------------------------------------------------------------------- what is read


@cases
def test_the_block_is_read_to_the_last_bit(
    toolbox: str, shift: int, shape: tuple[int, int], options: dict[str, Any], reads: Reads
) -> None:
    """Softmax with bias table and mask, X, Q, K, V and O are the block's own tensors."""
    model = shift_window(toolbox, shift, **options)
    with noting(model.w_msa) as calls:
        measured(model, lambda: loss_of(model(feature_map(shape), shape)).backward())
    (call,) = calls
    assert torch.equal(whole(reads, 'scores'), call.scores)
    assert torch.equal(whole(reads, 'inputs'), call.inputs)
    assert torch.equal(whole(reads, 'outputs'), call.outputs)
    windows, tokens, _ = call.inputs.shape
    split = call.projected.reshape(windows, tokens, 3, 2, 3)
    for number, name in enumerate(('query', 'key', 'value')):
        assert torch.equal(whole(reads, name), split[:, :, number].transpose(1, 2))
    # The recorded softmax is the documented one: scale, relative position bias and mask.
    expected = torch.stack([w.logits.softmax(-1) for w in block_windows(model, call, shape)])
    assert torch.allclose(call.scores, expected, rtol=1e-12, atol=1e-300)
    assert torch.equal(whole(reads, 'keep') == 1, real_queries(model, shape, 2))
    assert all(
        heads.memory is heads.inputs and heads.values_in is heads.inputs for _, heads, _ in reads
    )


@pytest.mark.parametrize(
    'toolbox, option', [('mmdet', 'attn_drop_rate'), ('mmpretrain', 'attn_drop')]
)
def test_the_softmax_is_read_before_dropout(toolbox: str, option: str, reads: Reads) -> None:
    """And O as the projection multiplies it, dropout included."""
    model = shift_window(toolbox, 1, **{option: 0.5})
    torch.manual_seed(0)
    with noting(model.w_msa) as calls:
        measured(model, lambda: loss_of(model(feature_map((6, 6)), (6, 6))).backward())
    assert torch.equal(whole(reads, 'scores'), calls[0].scores)
    assert torch.allclose(calls[0].scores.sum(-1), torch.ones(1).double())
    assert torch.equal(whole(reads, 'outputs'), calls[0].outputs)
    dropless = (whole(reads, 'scores') @ whole(reads, 'value')).transpose(1, 2).flatten(2)
    assert not torch.allclose(dropless, calls[0].outputs)


# ------------------------------------------------------------------- what is summed


@cases
def test_sums_are_those_over_real_queries(
    toolbox: str, shift: int, shape: tuple[int, int], options: dict[str, Any]
) -> None:
    """Padding asks nothing, answers as a key, and counts as a token."""
    model = shift_window(toolbox, shift, **options)
    with noting(model.w_msa) as calls:
        found = measured_whole(model, lambda: loss_of(model(feature_map(shape), shape)).backward())
    windows = block_windows(model, calls[0], shape)
    close(found[QKV].sums, slow_sums(windows), 1e-11)
    assert found[QKV].rows == 9 * len(windows)
    padded = not all(all(window.real) for window in windows)
    for window in windows:
        window.real = [True] * 9
    if padded:
        with pytest.raises(AssertionError):
            close(found[QKV].sums, slow_sums(windows), 1e-2)


def test_calls_of_one_block_add_up() -> None:
    """Windows of different number, as of pyramid levels."""
    model, shapes = shift_window('mmdet', 1), [(6, 3), (4, 4)]
    with noting(model.w_msa) as calls:
        found = measured_whole(
            model, lambda: sum(loss_of(model(feature_map(s), s)) for s in shapes).backward()
        )
    windows = [
        window
        for call, shape in zip(calls, shapes, strict=False)
        for window in block_windows(model, call, shape)
    ]
    close(found[QKV].sums, slow_sums(windows), 1e-11)
    assert found[QKV].rows == 9 * len(windows) == 9 * (4 + 8)


def test_a_call_that_does_not_reach_the_loss_is_not_counted() -> None:
    model, x = shift_window('mmdet'), feature_map((6, 3))

    def run() -> None:
        model(feature_map((3, 3), seed=5), (3, 3))
        out = model(x, (6, 3))
        with torch.no_grad():
            model(feature_map((3, 3), seed=6), (3, 3))
        loss_of(out).backward()

    same(
        measured_whole(model, run),
        measured_whole(model, lambda: loss_of(model(x, (6, 3))).backward()),
    )


def test_the_memory_limit_does_not_change_the_sums(reads: Reads) -> None:
    model, shape = shift_window('mmdet', 1), (8, 8)
    run = lambda: loss_of(model(feature_map(shape, batch=3), shape)).backward()
    found, counts = [], []
    for limit in (64.0, 0.1, 1e-9):
        reads.clear()
        found.append(measured_whole(model, run, capture_mb=limit))
        counts.append(len(reads) // 2)
    assert counts[0] == 1 < counts[1] < counts[2] == 27
    same(found[1], found[0])
    same(found[2], found[0])


@pytest.mark.parametrize('variant', VARIANTS)
def test_the_memory_limit_bounds_what_is_read(variant: str, reads: Reads) -> None:
    """All windows in order, with T of them; at least one."""
    model, shape = shift_window('mmdet'), (9, 9)
    run = lambda: loss_of(model(feature_map(shape), shape)).backward()
    for limit in (0.2, 0.1, 1e-9):
        reads.clear()
        measured(model, run, variant, capture_mb=limit)
        assert [w for _, _, chosen in reads for w in chosen.tolist()] == list(range(18))
        for _, heads, chosen in reads:
            names = 'inputs', 'query', 'key', 'value', 'scores', 'outputs', 'gram'
            held = sum(getattr(heads, name).numel() * 8 for name in names)
            assert held <= limit * 2**20 or len(chosen) == 1
        assert (max(len(chosen) for _, _, chosen in reads) > 1) == (limit > 1e-9)


# ------------------------------------------------------------------- what is sampled


class Sampler:
    """A block of five windows, of which two are measured a call."""

    def __init__(self, reads: Reads, variant: str, **options: Any) -> None:
        self.model = shift_window('mmdet', 1)
        self.x = feature_map((3, 15), batch=1)
        self.reads = reads
        self.optimizer = AFOpt(
            self.model,
            lr=0.1,
            variant=variant,
            **{'max_windows': 2, **options},
            settings='published',
            count_from=0,
        )
        self.capture = self.optimizer.curvature.capture
        self.layer = layer_of(self.optimizer, QKV)

    def draw(self, seed: int, calls: int = 1) -> tuple[list[int], dict[str, Tensor]]:
        """Windows measured and sums, under a seed."""
        self.reads.clear()
        kept = self.optimizer.curvature.layers[self.layer].kept
        self.capture.arm({self.layer: kept}, seed)
        for _ in range(calls):
            loss_of(self.model(self.x, (3, 15))).backward()
        kept = self.capture.staged[self.layer]
        assert kept.rows == calls * 5 * 9
        self.capture.drop()
        self.model.zero_grad()
        windows = [w for _, _, chosen in self.reads for w in chosen.tolist()]
        return windows, {name: total.clone() for name, total in kept.sums.items()}


@pytest.mark.parametrize('variant', VARIANTS)
def test_sampled_windows_estimate_the_sums_without_bias(variant: str, reads: Reads) -> None:
    """The mean over all ten pairs is the whole sum, and all pairs are as likely."""
    sampler = Sampler(reads, variant)
    found: dict[tuple[int, ...], list[dict[str, Tensor]]] = {}
    for seed in range(200):
        windows, sums = sampler.draw(seed)
        found.setdefault(tuple(windows), []).append(sums)
    assert set(found) == set(itertools.combinations(range(5), 2))
    counts = [len(draws) for draws in found.values()]
    assert sum((count - 20) ** 2 / 20 for count in counts) < 22  # chi-square, 9 degrees: 99 %
    means = {
        name: torch.stack([draws[0][name] for draws in found.values()]).mean(0)
        for name in found[0, 1][0]
    }
    everything, sums = Sampler(reads, variant, max_windows=256).draw(0)
    assert everything == list(range(5))
    close(means, sums)
    # As a user sees it: the mean over seeds comes near.
    near = {
        name: sum(sums[name] for draws in found.values() for sums in draws) / 200 for name in means
    }
    close(near, sums, 0.2)
    with pytest.raises(AssertionError):
        close(found[0, 1][0], sums, 0.2)


def test_a_sample_is_its_windows_scaled_to_all(reads: Reads) -> None:
    sampler = Sampler(reads, 'thesis', max_windows=3)
    with noting(sampler.model.w_msa) as calls:
        windows, sums = sampler.draw(4)
    blocks = block_windows(sampler.model, calls[0], (3, 15), 1)
    expected = slow_sums([blocks[w] for w in windows])
    assert len(set(windows)) == 3
    close(sums, {name: expected[name] * 5 / 3 for name in sums}, 1e-11)


def test_the_same_seed_draws_the_same_windows(reads: Reads) -> None:
    sampler = Sampler(reads, 'thesis')
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draws = [sampler.draw(seed) for seed in range(8)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    for seed, (windows, sums) in enumerate(draws):
        again, repeated = sampler.draw(seed)
        assert windows == again
        assert all(torch.equal(sums[name], repeated[name]) for name in sums)


def test_each_call_draws_afresh(reads: Reads) -> None:
    sampler = Sampler(reads, 'thesis')
    pairs = [sampler.draw(seed, calls=2)[0] for seed in range(8)]
    assert all(len(pair) == 4 for pair in pairs)
    assert any(set(pair[:2]) != set(pair[2:]) for pair in pairs)


def test_each_step_draws_its_own_windows(reads: Reads) -> None:
    """By the number of the step, which a resumed run knows."""
    runs = []
    for _ in range(2):
        sampler = Sampler(reads, 'thesis', stat_interval=2, refresh_interval=2)
        drawn = []
        for _ in range(8):
            reads.clear()
            sampler.optimizer.zero_grad()
            loss_of(sampler.model(sampler.x, (3, 15))).backward()
            drawn.append([w for _, _, chosen in reads for w in chosen.tolist()])
            sampler.optimizer.step()
        assert all(
            len(windows) == (2 if step % 2 == 0 else 0) for step, windows in enumerate(drawn)
        )
        runs.append(drawn)
    assert runs[0] == runs[1] and len({tuple(windows) for windows in runs[0][::2]}) > 1


def test_sampled_chunks_are_those_of_one_read(reads: Reads) -> None:
    sums = [
        Sampler(reads, 'gauss_newton', max_windows=4, capture_mb=limit).draw(3)[1]
        for limit in (64.0, 1e-9)
    ]
    close(*sums)


@pytest.mark.parametrize('windows', [5, 6, 256])
def test_few_windows_are_all_measured(windows: int, reads: Reads) -> None:
    drawn, sums = Sampler(reads, 'thesis', max_windows=windows).draw(7)
    assert drawn == list(range(5))
    everything = Sampler(reads, 'thesis', max_windows=10**6).draw(0)[1]
    assert all(torch.equal(sums[name], everything[name]) for name in sums)


def test_a_window_layer_is_read_as_one() -> None:
    layer = layer_of(AFOpt(shift_window(), lr=0.1, settings='published', count_from=0), QKV)
    assert type(layer) is WindowAttention and layer.shape == (6, 3, 6) and layer.bias is None
