"""Attention under what users switch on: compiled models, saturated heads, accumulation, resume."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmprecond.curvature import ATTENTION_TYPES, WindowAttention, qualified_name
from mmprecond.engine import use_optimizer
from mmprecond.optimizers import NKFAC, AdaAFOpt, AFOpt, PreconditionedOptimizer
from tests.support.attention import feature_map, loss_of, shift_window
from tests.support.classifier import batch, build
from tests.support.errors import refused

SHAPE = (5, 4)


def tokens(seed: int, count: int = 5, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, count, width, generator=generator).double()


@pytest.mark.parametrize('kind', [NKFAC, AdaAFOpt])
def test_a_compiled_model_is_measured_alike(kind: type[PreconditionedOptimizer]) -> None:
    """Hooks are not compiled along, and layers keep their names."""
    losses, names = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
        run = torch.compile(model, backend='aot_eager') if compiled else model
        optimizer = kind(run, lr=1e-2, stat_interval=2, refresh_interval=4)
        names.append([layer.name for layer in optimizer.curvature.layers])
        found = []
        for step in range(6):
            optimizer.zero_grad()
            loss = (run(tokens(step)) ** 2).mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        losses.append(found)
    assert names[0] == names[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


def test_without_curvature_of_the_softmax_the_values_are_still_preconditioned() -> None:
    """One key: the softmax is constant, W_Q and W_K have no gradient, W_V has."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).double()
    optimizer = AFOpt(model, lr=0.1, momentum=0.0, stat_interval=1, refresh_interval=1)
    memory = tokens(1, count=1)
    (model(tokens(0), memory, memory)[0] ** 3).mean().backward()
    gradient = model.in_proj_weight.grad.clone()
    before = model.in_proj_weight.detach().clone()
    optimizer.step()
    moved = (before - model.in_proj_weight.detach()) / 0.1
    assert torch.equal(moved[:16], torch.zeros(16, 8).double())
    torch.testing.assert_close(moved[16:].norm(), gradient[16:].norm())
    assert (moved[16:] - gradient[16:]).norm() > 0.1 * gradient[16:].norm()


def test_zero_inputs_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    optimizer = AFOpt(model, lr=0.1, stat_interval=1, refresh_interval=1)
    with caplog.at_level(logging.INFO, 'mmprecond'):
        for _ in range(3):
            zeros = torch.zeros(2, 3, 8)
            model(zeros, zeros, zeros)[0].sum().backward()
            optimizer.step()
    told = [r.getMessage() for r in caplog.records if 'zero statistics' in r.getMessage()]
    assert len(told) == 1 and 'in_proj_weight' in told[0]


def test_micro_batches_draw_different_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under MMEngine too, whose wrapper arms the capture before each of them."""
    from tests.support.classifier import Classifier

    class Model(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.block = shift_window('mmdet', 1).float()
            self.project = nn.Linear(3, 6)

        def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = 'tensor') -> Any:
            rows = self.project(inputs.flatten(2).mT[:, :36])
            out = self.fc(self.block(rows, (6, 6)).mean(1))
            return dict(loss=nn.functional.cross_entropy(out, data_samples))

    drawn: list[list[int]] = []
    read = WindowAttention.read

    def spy(self: Any, call: Any, kept: Any, chosen: Tensor) -> Any:
        drawn.append(chosen.tolist())
        return read(self, call, kept, chosen)

    monkeypatch.setattr(WindowAttention, 'read', spy)
    model = Model()
    wrapper = build(
        model,
        accumulative_counts=4,
        optimizer=dict(type='AFOpt', lr=0.1, stat_interval=1, refresh_interval=1, max_windows=3),
    )
    for step in range(4):
        model.train_step(batch(8, step), wrapper)
    assert len(drawn) == 4 and len({tuple(one) for one in drawn}) > 1
    assert all(len(set(one)) == 3 for one in drawn)


class Renamed(nn.Module):
    """Attention whose parts have other names than the reader looks for."""

    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.proj, self.softmax = nn.Linear(4, 12), nn.Linear(4, 4), nn.Softmax(-1)


def test_an_attention_class_that_does_not_fit_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ATTENTION_TYPES, qualified_name(Renamed), WindowAttention)
    optimizer = AFOpt(nn.Sequential(Renamed()), lr=0.1)
    assert [left.reason for left in optimizer.curvature.left_out if left.kind == 'Renamed'][
        0
    ] == 'it has no submodule qkv'


def test_a_state_that_does_not_fit_is_measured_at_the_next_step() -> None:
    """Not at the next capture, up to `stat_interval` steps later."""
    model = shift_window('mmdet', 1)
    first = AFOpt(model, lr=0.01, stat_interval=5, refresh_interval=5)
    for step in range(7):
        first.zero_grad()
        loss_of(model(feature_map(SHAPE, seed=step), SHAPE)).backward()
        first.step()
    second = AFOpt(model, lr=0.01, stat_interval=5, refresh_interval=5, variant='gauss_newton')
    second.load_state_dict(first.state_dict())
    assert second.t == 7
    second.zero_grad()
    loss_of(model(feature_map(SHAPE, seed=7), SHAPE)).backward()
    second.step()
    layers = second.state_dict()['precond']['layers']
    assert 'query_moment' in layers['w_msa.qkv.weight']['statistics']
    assert layers['w_msa.qkv.weight']['refreshes'] == 1
    assert not any(m._forward_hooks for m in model.modules())  # and not again at step 8


def test_whitening_is_not_for_attention() -> None:
    refused(
        ValueError,
        lambda: AFOpt(nn.Linear(2, 2), lr=0.1, exponent=0.5),
        'exponent=0.5',
        'leave it at 1',
    )


@pytest.mark.parametrize('name', ['NKFAC', 'AdamR'])
def test_a_preset_replaces_adan(name: str) -> None:
    from mmengine.config import Config

    cfg = Config(
        dict(
            optim_wrapper=dict(
                optimizer=dict(
                    type='AdaAFOpt',
                    lr=1e-3,
                    betas=(0.98, 0.92, 0.99),
                    rule='Adan',
                    weight_decay=0.1,
                )
            )
        )
    )
    use_optimizer(cfg, name)
    assert cfg.optim_wrapper.optimizer == dict(type=name, lr=1e-3, weight_decay=0.1)
