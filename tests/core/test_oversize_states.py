"""Sides over max_dim through resumes, failures and bad arguments; clip_update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from mmprecond.core import RefreshError
from mmprecond.curvature import moments as forms
from mmprecond.optimizers import (
    FSGD,
    KFAC,
    NKFAC,
    SGDMBK,
    AdamR,
    AdamWBK,
    AdaNKFAC,
    AFOpt,
    FAdam,
    Preconditioned,
    PreconditionedOptimizer,
)
from mmprecond.preconditioners import AttentionFeature
from tests.support.attention import reasons
from tests.support.classifier import Classifier, batch
from tests.support.errors import refused, warnings_of
from tests.support.oversize import EVERY, FORMS, chain, normal, one_step
from tests.support.states import differences, everything, saved

# ------------------------------------------------------------------- states and failures

KINDS = {
    'NKFAC': NKFAC,
    'FAdam': FAdam,
    'KFAC': KFAC,
    'AdamWBK': lambda *a, **s: AdamWBK(*a, **{'damping': 0.01, **s}),
}


def wide(
    kind: str, form: str, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, PreconditionedOptimizer]:
    model = chain(11, 9, 9, 3).to(dtype)
    settings = dict(stat_interval=1, refresh_interval=2, max_dim=5, max_rank=4, oversize=form)
    return model, KINDS[kind](model, lr=0.01, **{**settings, **options})


def train(model: nn.Module, optimizer: PreconditionedOptimizer, steps: range) -> None:
    for step in steps:
        one_step(model, optimizer, normal(7, 11, seed=step).to(next(model.parameters())))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kind', KINDS)
def test_a_resumed_run_continues_bit_for_bit(kind: str, form: str, dtype: torch.dtype) -> None:
    model, optimizer = wide(kind, form, dtype)
    train(model, optimizer, range(5))
    twin, resumed = wide(kind, form, dtype)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved(optimizer.state_dict()))
    train(model, optimizer, range(5, 11))
    train(twin, resumed, range(5, 11))
    assert differences(everything(model, optimizer), everything(twin, resumed)) == []


@pytest.mark.parametrize(
    'form, change',
    [
        ('block', dict(max_dim=3)),
        ('lowrank', dict(max_rank=3)),
        ('lowrank', dict(max_dim=40)),
        ('block', dict(oversize='lowrank')),
        ('lowrank', dict(oversize='block')),
    ],
    ids=str,
)
def test_changed_settings_are_measured_anew(
    form: str, change: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = wide('NKFAC', form)
    train(model, optimizer, range(2))
    twin, resumed = wide('NKFAC', form, **change)
    resumed.load_state_dict(saved(optimizer.state_dict()))
    (message,) = warnings_of(caplog)
    assert 'measured anew' in message and 'input_' in message and '\n' not in message
    train(twin, resumed, range(1))
    layers = resumed.state_dict()['precond']['layers']
    assert len(layers) == 3 and all(e['samples'] == e['refreshes'] == 1 for e in layers.values())


def sabotage(patch: pytest.MonkeyPatch, dtypes: set[torch.dtype]) -> None:
    """Sketches or inverses of side 12 fail in these dtypes."""
    real, inverse = forms.nystrom_columns, forms.add_to_diagonal

    def columns(sketch: Tensor, test: Tensor) -> Tensor:
        bad = sketch.dtype in dtypes and sketch.shape[-2] == 12
        return real(sketch, test) * (float('nan') if bad else 1.0)

    def damped(matrix: Tensor, damping: Tensor) -> Tensor:
        bad = matrix.dtype in dtypes and matrix.shape[-3:] == (3, 4, 4)
        return inverse(matrix, damping) * (-1.0 if bad else 1.0)

    patch.setattr(forms, 'nystrom_columns', columns)
    patch.setattr(forms, 'add_to_diagonal', damped)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('kind', KINDS)
def test_failures(
    kind: str, form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Retried in float64; then the last good operator stays; the third failure stops."""
    options = dict(solver='cholesky') if kind == 'NKFAC' else {}
    model, optimizer = wide(kind, form, refresh_interval=1, **options)
    train(model, optimizer, range(2))

    def entry() -> dict[str, Any]:
        return copy.deepcopy(optimizer.state_dict()['precond']['layers']['0.0.weight'])

    with monkeypatch.context() as patch:
        dtypes = {torch.float32}
        sabotage(patch, dtypes)
        train(model, optimizer, range(2, 3))
        exact = entry()
        assert (exact['refreshes'], exact['failures']) == (3, 0) and not warnings_of(caplog)
        assert all(
            o.dtype == torch.float32 and o.isfinite().all() for o in exact['operator'].values()
        )
        dtypes.add(torch.float64)
        train(model, optimizer, range(3, 5))
        after = entry()
        assert (after['refreshes'], after['failures']) == (3, 2)
        assert differences(after['operator'], exact['operator']) == []
        assert all('0.0.weight' in message for message in warnings_of(caplog))
        with pytest.raises(RefreshError, match='^0.0.weight: 3 '):
            train(model, optimizer, range(5, 6))
    assert all(p.isfinite().all() for p in model.parameters())


def attention_model() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.mlp = nn.Linear(6, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x + self.attention(x, x, x, need_weights=False)[0])

    torch.manual_seed(0)
    return Block()


@pytest.mark.parametrize('form', FORMS)
def test_attention_beside_oversized_layers_is_retried(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thesis's operator of W_V reads weights, in float64 too."""
    model = attention_model()
    real, seen = AttentionFeature.refresh, []

    def refresh(self: Any, factors: Any, *rest: Any) -> Any:
        operator, good = real(self, factors, *rest)
        seen.append({side.name: factor.tensor.dtype for side, factor in factors.items()})
        return operator, good & (next(iter(factors.values())).tensor.dtype == torch.float64)

    monkeypatch.setattr(AttentionFeature, 'refresh', refresh)
    optimizer = AFOpt(model, lr=0.1, max_dim=6, max_rank=4, oversize=form)
    one_step(model, optimizer, normal(3, 5, 6).float())
    assert any('weight' in names for names in seen)
    assert all(len(set(names.values())) == 1 for names in seen)
    layers = optimizer.state_dict()['precond']['layers']
    assert len(layers) >= 2 and {e['refreshes'] for e in layers.values()} == {1}
    assert all(o.dtype == torch.float32 for e in layers.values() for o in e['operator'].values())


@pytest.mark.parametrize('form', FORMS)
def test_oversized_attention_takes_the_plain_rule(form: str) -> None:
    optimizer = AFOpt(attention_model(), lr=0.1, max_dim=5, oversize=form)
    assert [layer.name for layer in optimizer.curvature.layers] == ['mlp.weight']
    (reason,) = (r for n, r in reasons(optimizer).items() if 'in_proj' in n or n == 'attention')
    assert 'over max_dim=5' in reason and 'over max_dim=5' in optimizer.table()


def test_the_table_of_attention_optimizers_tells_of_blocks() -> None:
    assert (
        'side in blocks of '
        in AFOpt(attention_model(), lr=0.1, max_dim=6, oversize='block').table()
    )


# ------------------------------------------------------------------- adversity


def test_blocks_of_small_inputs_do_not_drown_the_others() -> None:
    """Blocks are closer to the dense direction than the gradient is, with a dense damping."""
    x = normal(400, 60) / torch.arange(1, 61).double()
    start = nn.Linear(60, 4, bias=False).double()
    found = []
    for options in ({}, dict(max_dim=20, oversize='block')):
        model = copy.deepcopy(start)
        found.append(one_step(model, FSGD(model, lr=1.0, momentum=0.0, **options), x)[0])
    dense, ours = found
    gradient = model.weight.grad
    assert (ours - dense).norm() < (gradient - dense).norm()


@pytest.mark.parametrize('form', ['skip', 'block'])
def test_dead_inputs_beside_others(form: str) -> None:
    model = nn.Linear(8, 3, bias=False)
    optimizer = SGDMBK(model, lr=0.1, **EVERY, oversize=form, max_dim=4 if form != 'skip' else 8)
    for step in range(4):
        one_step(model, optimizer, normal(9, 8, seed=step).float() * (torch.arange(8) < 4))
    assert model.weight.isfinite().all()


def test_a_dead_group() -> None:
    """A group that nothing depends on: its outer factor is zero."""
    model = nn.Conv2d(12, 24, 1, groups=2, bias=False)
    optimizer = SGDMBK(model, lr=0.1, **EVERY)
    for _ in range(4):
        optimizer.zero_grad()
        model(normal(2, 12, 3, 3).float())[:, :12].square().mean().backward()
        optimizer.step()
    assert model.weight.isfinite().all()
    assert 'over max_dim=5' in str(
        refusal(lambda: SGDMBK(model, lr=0.1, oversize='block', max_dim=5))
    )


def refusal(call: Callable[[], Any]) -> ValueError:
    with pytest.raises(ValueError) as caught:
        call()
    return caught.value


def test_a_default_device() -> None:
    model, optimizer = wide('FAdam', 'lowrank')
    x = torch.randn(7, 11)
    with torch.device('meta'):  # stands for cuda
        one_step(model, optimizer, x)


# ------------------------------------------------------------------- refusals


def test_refusals() -> None:
    choices = 'choose one of skip, one_sided, block, lowrank'
    for kind in (*KINDS.values(), AdamR, AFOpt):
        refused(ValueError, lambda: kind(chain(4, 3), lr=0.1, oversize='crop'), choices)
        refused(
            ValueError,
            lambda: kind(chain(4, 3), lr=0.1, max_rank=0),
            'max_rank=0',
            'give an integer of at least 1',
        )
    refused(
        ValueError,
        lambda: SGDMBK(chain(4, 3), lr=0.1, oversize='lowrank'),
        'damping=1e-05',
        'at least 0.001',
    )
    for form in FORMS:
        refused(ValueError, lambda: AdamR(chain(4, 3), lr=0.1, oversize=form), form, 'one_sided')
        refused(
            ValueError,
            lambda: Preconditioned(
                chain(4, 3),
                rule=dict(type='AdamW', lr=0.1),
                layers=[dict(preconditioner=dict(type='EigenRotation', oversize=form))],
            ),
            form,
        )


# ------------------------------------------------------------------- clip_update


def moved(
    clip: float | None, kind: Any = NKFAC, raw: float | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Direction and gradient of one step with a norm layer, which takes the plain rule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    if kind is Preconditioned:
        optimizer = kind(
            model,
            rule=dict(type='SGDM', lr=1.0, momentum=0.0),
            clip_update=clip,
            layers=[dict(preconditioner=dict(type='NewtonKronecker'))],
        )
    else:
        optimizer = kind(model, lr=1.0, momentum=0.0, clip_update=clip, **options)
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    model(normal(9, 6)).square().mean().backward()
    if raw is not None:
        nn.utils.clip_grad_norm_(model.parameters(), raw)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    return before - nn.utils.parameters_to_vector(model.parameters()).detach(), gradient


@pytest.mark.parametrize('kind', [NKFAC, KFAC, FSGD, Preconditioned])
def test_clip_update_bounds_all_directions_together(kind: Any) -> None:
    free, gradient = moved(None, kind)
    size = float(free.norm())
    assert torch.equal(moved(2 * size, kind)[0], free)
    for bound in (0.5 * size, 1e-6):
        clipped, same = moved(bound, kind)
        torch.testing.assert_close(clipped, free * bound / size, rtol=1e-9, atol=1e-15)
        assert torch.equal(same, gradient)  # gradients themselves stay


def test_clip_update_composes_with_clipped_gradients() -> None:
    small, gradient = moved(None, raw=0.01)
    assert float(gradient.norm()) == pytest.approx(0.01)
    torch.testing.assert_close(moved(0.004, raw=0.01)[0], small * 0.004 / small.norm())


def test_clip_update_is_of_the_direction_alone() -> None:
    """Not of weight decay; and a gradient of zero stays."""
    model = nn.Linear(3, 2)
    optimizer = NKFAC(model, lr=1.0, momentum=0.0, weight_decay=1.0, clip_update=1e-3)
    (model(torch.zeros(4, 3)) * 0).sum().backward()
    optimizer.step()
    assert not model.weight.any() and not model.bias.any()


@pytest.mark.parametrize('value', [0, -1.0, float('nan'), float('inf'), '1', True])
def test_bad_clips(value: Any) -> None:
    for kind in (NKFAC, AdaNKFAC, KFAC, AdamR):
        refused(
            ValueError,
            lambda: kind(chain(4, 3), lr=0.1, clip_update=value),
            f'clip_update={value!r}',
            'give a number greater than 0',
        )


def test_clip_update_from_a_config() -> None:
    torch.manual_seed(0)
    model = Classifier()
    before = copy.deepcopy(model.state_dict())
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='PrecondOptimWrapperConstructor',
            clip_grad=dict(max_norm=0.1),
            optimizer=dict(
                type='NKFAC',
                lr=1.0,
                momentum=0.0,
                clip_update=1e-3,
                oversize='lowrank',
                max_dim=4,
                max_rank=3,
            ),
        ),
    )
    model.train_step(batch(seed=0), wrapper)
    changes = [p.detach() - before[n] for n, p in model.named_parameters()]
    assert float(torch.cat([c.flatten() for c in changes]).norm()) == pytest.approx(1e-3, rel=1e-3)
