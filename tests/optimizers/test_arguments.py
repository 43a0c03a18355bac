"""Wrong arguments: the error's type, and one line that says what to write instead."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mmprecond.optimizers import (
    ARO,
    NKFAC,
    SGDPH,
    SOAA,
    AdaNKFAC,
    PreconditionedOptimizer,
    precondition,
)
from tests.support.errors import refused

Kind = type[PreconditionedOptimizer]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))


NUMBER = 'give a number'
COUNT = 'give an integer of at least 1'


@pytest.mark.parametrize('kind', [NKFAC, AdaNKFAC])
@pytest.mark.parametrize(
    'name, value, remedy',
    [
        ('lr', -0.1, NUMBER + ' at least 0'),
        ('lr', float('nan'), NUMBER),
        ('lr', '0.1', NUMBER),
        ('lr', None, NUMBER),
        ('lr', True, NUMBER),
        ('weight_decay', -1e-4, NUMBER + ' at least 0'),
        ('weight_decay', None, NUMBER),
        ('damping', 0.0, NUMBER + ' greater than 0'),
        ('damping', -1.0, NUMBER + ' greater than 0'),
        ('damping', float('nan'), NUMBER),
        ('damping_floor', -1e-4, NUMBER + ' at least 0'),
        ('stat_decay', 1.0, 'less than 1'),
        ('stat_decay', -0.1, 'at least 0'),
        ('stat_interval', 0, COUNT),
        ('stat_interval', -5, COUNT),
        ('stat_interval', 2.0, COUNT),
        ('stat_interval', '20', COUNT),
        ('stat_interval', True, COUNT),
        ('stat_interval', None, COUNT),
        ('refresh_interval', 0, COUNT),
        ('refresh_interval', 200.5, COUNT),
        ('exact_interval', 0, COUNT),
        ('newton_steps', 0, COUNT),
        ('newton_steps', 1.5, COUNT),
        ('max_dim', 0, COUNT),
        ('max_dim', 1e3, COUNT),
        ('capture_mb', 0.0, NUMBER + ' greater than 0'),
        ('capture_mb', -1, NUMBER),
        ('solver', 'lu', 'newton, cholesky'),
        ('solver', None, 'newton, cholesky'),
        ('oversize', 'crop', 'skip, one_sided'),
        ('oversize', None, 'skip, one_sided'),
    ],
)
def test_values_out_of_range(kind: Kind, name: str, value: Any, remedy: str) -> None:
    refused(
        ValueError, lambda: kind(net(), **{'lr': 0.1, name: value}), f'{name}={value!r}', remedy
    )


@pytest.mark.parametrize('momentum', [1.0, 1.5, -0.1, float('nan'), None])
def test_momentum_out_of_range(momentum: Any) -> None:
    refused(
        ValueError,
        lambda: NKFAC(net(), lr=0.1, momentum=momentum),
        f'momentum={momentum!r}',
        'at least 0 and less than 1',
    )


@pytest.mark.parametrize(
    'betas, remedy',
    [
        ((0.9, 1.0), 'betas=1.0'),
        ((-0.1, 0.9), 'betas=-0.1'),
        ((0.9, float('nan')), 'betas=nan'),
        ((0.9,), 'write betas=(0.9, 0.999)'),
        ((0.9, 0.99, 0.999), 'write betas=(0.9, 0.999)'),
        (0.9, 'write betas=(0.9, 0.999)'),
    ],
)
def test_bad_betas(betas: Any, remedy: str) -> None:
    refused(ValueError, lambda: AdaNKFAC(net(), lr=0.1, betas=betas), remedy)


def test_a_negative_eps() -> None:
    refused(ValueError, lambda: AdaNKFAC(net(), lr=0.1, eps=-1e-8), 'eps=-1e-08', NUMBER)


@pytest.mark.parametrize('stat, refresh', [(20, 30), (20, 10), (3, 200)])
def test_refreshes_that_fall_between_statistics(stat: int, refresh: int) -> None:
    refused(
        ValueError,
        lambda: NKFAC(net(), 0.1, stat_interval=stat, refresh_interval=refresh),
        f'refresh_interval={refresh}',
        'multiple',
        f'stat_interval={stat}',
    )


def test_one_interval_given_must_fit_the_others_default() -> None:
    refused(ValueError, lambda: NKFAC(net(), lr=0.1, stat_interval=7), 'multiple')
    refused(ValueError, lambda: AdaNKFAC(net(), lr=0.1, stat_interval=300), 'multiple')


@pytest.mark.parametrize(
    'key, value, where',
    [
        ('lr', -1.0, 'lr=-1.0'),
        ('weight_decay', -1.0, 'weight_decay=-1.0'),
        ('momentum', 1.0, 'momentum=1.0'),
        ('damping', 0.0, 'damping=0.0'),
    ],
)
@pytest.mark.parametrize('later', [False, True])
def test_values_of_a_group_are_checked(key: str, value: float, where: str, later: bool) -> None:
    model = net()
    group = {'params': model[0].parameters(), key: value}
    if later:
        optimizer = NKFAC(model[2].parameters(), lr=0.1, model=model)
        refused(ValueError, lambda: optimizer.add_param_group(group), where)
        assert len(optimizer.param_groups) == 1  # a caller who catches the error trains without it
    else:
        refused(ValueError, lambda: NKFAC([group], lr=0.1, model=model), where)


def test_betas_of_a_rule_without_them_are_refused() -> None:
    model = net()
    group = dict(params=model.parameters(), betas=(0.9, 0.99))
    refused(ValueError, lambda: NKFAC([group], lr=0.1, model=model), 'betas')


@pytest.mark.parametrize('kind', [NKFAC, AdaNKFAC])
@pytest.mark.parametrize(
    'params',
    [
        lambda m: m.parameters(),
        lambda m: list(m.parameters()),
        lambda m: [dict(params=list(m.parameters()))],
    ],
    ids=['generator', 'list', 'groups'],
)
def test_a_missing_model(kind: Kind, params: Callable[[nn.Module], Any]) -> None:
    refused(
        ValueError,
        lambda: kind(params(net()), lr=0.1),
        kind.__name__,
        'model=',
        "constructor='PrecondOptimWrapperConstructor'",
    )


@pytest.mark.parametrize(
    'model',
    [
        nn.Sequential(nn.LayerNorm(3), nn.Embedding(3, 3)),
        nn.ConvTranspose1d(2, 2, 3),
        nn.EmbeddingBag(3, 2),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_model_without_a_supported_layer(model: nn.Module) -> None:
    kinds = {type(m).__name__ for m in model.modules() if list(m.parameters(recurse=False))}
    refused(ValueError, lambda: NKFAC(model, lr=0.1), 'Linear or a convolution', 'NKFAC', *kinds)


def test_the_model_does_not_own_the_parameters() -> None:
    """Another model's parameters, by mistake: none of the model's layers is trained."""
    refused(ValueError, lambda: NKFAC(net().parameters(), lr=0.1, model=net()), 'params')


def test_all_layers_excluded() -> None:
    groups = lambda model: [dict(params=model.parameters(), precondition=False)]
    refused(ValueError, lambda: NKFAC(groups(model := net()), lr=0.1, model=model), 'Linear')


def test_no_parameters_is_torchs_error() -> None:
    refused(ValueError, lambda: NKFAC([], lr=0.1, model=net()), 'empty parameter list')
    refused(ValueError, lambda: NKFAC(nn.ReLU(), lr=0.1), 'empty parameter list')


@pytest.mark.parametrize(
    'kind, key, value',
    [
        (AdaNKFAC, 'momentum', 0.9),
        (NKFAC, 'betas', (0.9, 0.999)),
        (NKFAC, 'nesterov', True),
        (AdaNKFAC, 'amsgrad', False),
        (NKFAC, 'TCov', 20),
    ],
)
def test_a_left_over_key_says_delete(kind: Kind, key: str, value: Any) -> None:
    refused(
        TypeError,
        lambda: kind(net(), lr=0.1, **{key: value}),
        kind.__name__,
        key,
        '`_delete_=True`',
        'stat_interval',
    )


def test_several_left_over_keys_are_all_named() -> None:
    refused(
        TypeError,
        lambda: AdaNKFAC(net(), lr=0.1, momentum=0.9, nesterov=True),
        'momentum',
        'nesterov',
        '`_delete_=True`',
    )


def test_delete_itself_left_over_says_to_leave_it_out() -> None:
    refused(TypeError, lambda: NKFAC(net(), lr=0.1, _delete_=True), '`_base_`', 'leave it out')


@pytest.mark.parametrize('kind', [NKFAC, AdaNKFAC])
def test_a_missing_learning_rate(kind: Kind) -> None:
    with pytest.raises(TypeError, match="'lr'"):
        kind(net())


@pytest.mark.parametrize('kind', [NKFAC, AdaNKFAC])
def test_sparse_gradients(kind: Kind) -> None:
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    optimizer = kind(model, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.tensor([1, 2])).sum().backward()
    refused(ValueError, optimizer.step, kind.__name__, 'sparse', 'sparse=False')
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize('capture_mb', [1e-30, 1e9, float('inf')])
def test_any_positive_limit_of_memory_works(capture_mb: float) -> None:
    model = nn.Conv2d(2, 3, 3)
    optimizer = NKFAC(model, lr=0.1, capture_mb=capture_mb)
    model(torch.randn(2, 2, 5, 5)).sum().backward()
    optimizer.step()
    assert 'weight' in optimizer.state_dict()['precond']['layers']


def test_wrong_settings_leave_no_hooks() -> None:
    model = net()
    for wrong in (dict(lr=-1.0), dict(lr=0.1, damping=0.0), dict(lr=0.1, nesterov=True)):
        with pytest.raises((ValueError, TypeError)):
            NKFAC(model, **wrong)
    assert not any(m._forward_hooks for m in model.modules())


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer, as torchvision's Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.called = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(x, self.used.weight, self.used.bias))


def test_a_weight_that_is_used_as_a_function_is_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Functional()
    optimizer = NKFAC(model, lr=1.0, momentum=0.0, stat_interval=1, refresh_interval=1)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        for _ in range(3):
            before = model.used.weight.detach().clone()
            optimizer.zero_grad()
            (model(torch.randn(5, 4)) ** 2).mean().backward()
            optimizer.step()
            assert torch.allclose(before - model.used.weight, model.used.weight.grad, atol=1e-6)
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1 and 'used.weight' in messages[0] and 'plain rule' in messages[0]


def test_a_layer_that_is_called_but_not_trained_this_time_is_not_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = net()
    optimizer = NKFAC(model, lr=0.1, stat_interval=1, refresh_interval=1)
    with caplog.at_level(logging.WARNING, 'mmprecond'):
        optimizer.step()
        model[0](torch.randn(0, 4)).sum().backward()
        optimizer.step()
    assert not caplog.records


def test_wrapped_by_fsdp_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = net()

    refused(
        ValueError,
        lambda: NKFAC(FullyShardedDataParallel(), lr=0.1),
        'FSDP',
        'DistributedDataParallel',
    )


def test_devices_that_cannot_measure_are_refused() -> None:
    model: Any = nn.DataParallel(net())
    model.device_ids = [0, 1]
    refused(ValueError, lambda: NKFAC(model, lr=0.1), '2 devices', 'DistributedDataParallel')
    model = nn.Linear(3, 2)
    with FakeTensorMode():
        model.weight = nn.Parameter(torch.zeros(2, 3, device='mps'))
    refused(ValueError, lambda: NKFAC(model, lr=0.1), 'Apple GPU', 'CPU')


def test_valid_arguments_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, 'mmprecond'):
        warnings.simplefilter('error')
        for kind in (NKFAC, AdaNKFAC):
            optimizer = kind(model := net(), lr=0)
            model(torch.randn(3, 4)).sum().backward()
            optimizer.step()
    assert not caplog.records


@pytest.mark.parametrize('kind', [NKFAC, SOAA, ARO, SGDPH])
def test_a_model_that_is_no_module(kind: Any) -> None:
    model = nn.Linear(3, 3)
    refused(TypeError, lambda: kind(model.parameters(), lr=0.1, model=[model]), 'model is a list')


def test_arguments_of_precondition_in_the_wrong_order() -> None:
    model = nn.Linear(3, 3)
    swapped: tuple[Any, Any] = torch.optim.SGD(model.parameters(), lr=0.1), model
    refused(TypeError, lambda: precondition(*swapped), 'was given a SGD and a Linear', 'the model')


@pytest.mark.parametrize(
    ('scale', 'kind', 'remedy'),
    [
        ('dynamic', TypeError, 'is a str; give a number, a GradScaler, or None'),
        (torch.ones(2), TypeError, 'is a Tensor'),
        (0.0, ValueError, 'greater than 0'),
        (float('nan'), ValueError, 'greater than 0'),
        (-2.0, ValueError, 'greater than 0'),
    ],
)
def test_invalid_loss_scales(scale: Any, kind: type[Exception], remedy: str) -> None:
    optimizer = NKFAC(nn.Linear(3, 3), lr=0.1)
    refused(kind, lambda: setattr(optimizer, 'loss_scale', scale), remedy)
    assert optimizer.loss_scale is None


def test_parameters_that_are_not_in_the_model_are_named() -> None:
    model, other = nn.Linear(3, 3), nn.Parameter(torch.zeros(2, 4))
    groups = [dict(params=list(model.parameters())), dict(params=[other])]
    report = NKFAC(groups, model=model, lr=0.1).report()
    assert (
        '1 x parameters, 1 of the optimizer that are not in the model (2 x 4 in group 1)' in report
    )


def test_parametrised_weights_have_their_own_reason() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    left = NKFAC(nn.Sequential(nn.Linear(3, 3), layer), lr=0.1).left_out
    assert [(part.name, part.reason) for part in left] == [
        ('1', 'weight is parametrised, no plain parameter'),
        ('1.parametrizations.weight', 'parameters of a parametrised weight'),
    ]
