"""What ARO and DCTAdamW share: AdamW for the rest, batches, resumption, reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmprecond.optimizers import ARO, DCTAdamW, Preconditioned
from mmprecond.optimizers.matrix_optimizer import MatrixOptimizer
from mmprecond.rules import matrix as matrix_rule
from tests.support.errors import refused
from tests.support.matrices import draw, parameters, step
from tests.support.networks import ConvNet

SETTINGS: dict[type[MatrixOptimizer], dict[str, Any]] = {
    ARO: dict(lr=0.02, weight_decay=0.1),
    DCTAdamW: dict(lr=0.02, weight_decay=0.1, rank=3, refresh_interval=3, error_feedback=True),
}
both = pytest.mark.parametrize('kind', SETTINGS)
SHAPES = ((5, 3, 2, 2), (5, 12), (5, 12), (12, 5), (5,), (12, 5), ())


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for t in steps:
        step(
            optimizer,
            params,
            [draw(*p.shape, seed=100 * t + k).to(p.dtype) for k, p in enumerate(params)],
        )


@both
@pytest.mark.parametrize('group', [{}, dict(precondition=False)])
def test_the_rest_takes_torchs_adamw(kind: type[MatrixOptimizer], group: dict[str, Any]) -> None:
    shapes = SHAPES if group else [shape for shape in SHAPES if len(shape) < 2]
    ours, theirs = parameters(shapes), parameters(shapes)
    hyper = SETTINGS[kind] | dict(betas=(0.7, 0.9), eps=1e-5)
    run(kind([dict(params=ours, **group)], **hyper), ours, range(6))
    run(
        torch.optim.AdamW(theirs, lr=0.02, betas=(0.7, 0.9), eps=1e-5, weight_decay=0.1),
        theirs,
        range(6),
    )
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@both
@pytest.mark.parametrize('most', [None, 70, 1])
def test_a_batch_is_its_members(
    kind: type[MatrixOptimizer], most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = parameters(SHAPES), parameters(SHAPES)
    if most:
        monkeypatch.setattr(matrix_rule, 'STACKED', most)
    run(kind(together, **SETTINGS[kind]), together, range(7))
    for k, p in enumerate(alone):
        optimizer = kind([p], **SETTINGS[kind])
        for t in range(7):
            step(optimizer, [p], [draw(*p.shape, seed=100 * t + k)])
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


@both
def test_parameters_of_one_batch_may_pause(kind: type[MatrixOptimizer]) -> None:
    """One that starts late, or has no gradient now and then, keeps steps of its own."""
    params, alone = parameters(SHAPES[1:3]), parameters(SHAPES[1:3])
    optimizer, other = kind(params, **SETTINGS[kind]), kind(alone[1:], **SETTINGS[kind])
    for t in range(8):
        params[0].grad, params[1].grad = draw(5, 12, seed=t), None
        if t not in (0, 1, 4):
            params[1].grad = draw(5, 12, seed=t + 50)
            step(other, alone[1:], [draw(5, 12, seed=t + 50)])
        optimizer.step()
    torch.testing.assert_close(params[1], alone[1], rtol=0, atol=1e-11)


@both
def test_equal_matrices_take_one_decomposition(
    kind: type[MatrixOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    for owner, name in ((torch.linalg, 'qr'), (Tensor, 'topk')):
        known = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=known, **k: calls.append(1) or _f(*a, **k))
    params = parameters([(5, 12)] * 7 + [(5, 3, 2, 2)] * 2)
    run(kind(params, **SETTINGS[kind]), params, range(1))
    assert len(calls) == 1


@both
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('at', [1, 4])
def test_a_resumed_run_continues_bit_for_bit(
    kind: type[MatrixOptimizer], at: int, dtype: torch.dtype, tmp_path: Any
) -> None:
    """Half precision too: torch's own loading would round rotations, and columns beyond 256."""

    def make() -> list[nn.Parameter]:
        return [nn.Parameter(p.detach().to(dtype)) for p in parameters([*SHAPES, (300, 290)])]

    settings = SETTINGS[kind] | (dict(rank=40) if kind is DCTAdamW else {})
    whole = make()
    optimizer = kind(whole, **settings)
    run(optimizer, whole, range(at))
    torch.save([whole, optimizer.state_dict()], tmp_path / 'state.pt')
    run(optimizer, whole, range(at, at + 4))
    resumed, state = torch.load(tmp_path / 'state.pt', weights_only=True)
    other = kind(resumed, **settings)
    other.load_state_dict(state)
    run(other, resumed, range(at, at + 4))
    for p, q in zip(whole, resumed, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            if torch.is_tensor(value):
                assert value.dtype == other.state[q][name].dtype
                assert torch.equal(value, other.state[q][name])
    assert all(
        torch.equal(a, b)
        for a, b in zip(  # nor does the loaded state change with the run
            state['state'][0].values(),
            torch.load(tmp_path / 'state.pt', weights_only=True)[1]['state'][0].values(),
            strict=True,
        )
        if torch.is_tensor(a)
    )


@both
def test_states_that_do_not_fit(kind: type[MatrixOptimizer]) -> None:
    params = parameters([(5, 12), (5,)])
    optimizer = kind(params, **SETTINGS[kind])
    run(optimizer, params, range(2))
    state = optimizer.state_dict()
    remedy = 'set them as they were, or start afresh from the weights alone'
    changed = dict(max_dim=4) if kind is ARO else dict(rank=4)
    refused(
        ValueError,
        lambda: kind(params, **SETTINGS[kind] | changed).load_state_dict(state),
        '(5, 12)',
        remedy,
    )
    plain = torch.optim.AdamW(params, lr=0.1)
    run(plain, params, range(2))
    refused(
        ValueError,
        lambda: kind(params, **SETTINGS[kind]).load_state_dict(plain.state_dict()),
        'another rule',
        'start afresh',
    )
    other = parameters([(5, 12)])
    with pytest.raises(ValueError, match='parameter groups'):
        kind(other, **SETTINGS[kind]).load_state_dict(state)


def problem() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = ConvNet()
    x, y = torch.randn(32, 3, 8, 8), torch.randint(0, 10, (32,))
    return model, lambda: F.cross_entropy(model(x), y)


@both
def test_it_learns_and_convolutions_train(kind: type[MatrixOptimizer]) -> None:
    model, loss = problem()
    optimizer = kind(model, lr=0.02, **(dict(rank=4) if kind is DCTAdamW else {}))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = loss().item()
    for _ in range(80):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.25 * first
    for name, p in model.named_parameters():
        assert (p - before[name]).norm() > 0.1 * before[name].norm(), name


@both
def test_channels_last_is_the_same(kind: type[MatrixOptimizer]) -> None:
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model, loss = problem()
        model = model.to(memory_format=layout)
        optimizer = kind(model, **SETTINGS[kind])
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        moved.append(model)
    for p, q in zip(*(m.parameters() for m in moved), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)


@both
def test_as_a_rule_of_preconditioned(kind: type[MatrixOptimizer]) -> None:
    """Where no layer is preconditioned, it is the optimizer; elsewhere it learns."""
    rule = dict(type=kind.__name__, **SETTINGS[kind])
    method = dict(type='NewtonKronecker', stat_interval=1, refresh_interval=1)
    first, loss = problem()
    frozen = nn.ModuleDict(dict(net=first, other=nn.Linear(2, 2)))  # never called
    second, loss_of_second = problem()
    ours = Preconditioned(
        frozen,
        rule=rule,
        layers=[dict(match=dict(name='other'), preconditioner=method), dict(preconditioner=None)],
    )
    theirs = kind(second, **SETTINGS[kind])
    for _ in range(5):
        for optimizer, evaluate in ((ours, loss), (theirs, loss_of_second)):
            optimizer.zero_grad()
            evaluate().backward()
            optimizer.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    model, loss = problem()
    ours = Preconditioned(model, rule=rule | dict(max_dim=11), layers=[dict(preconditioner=method)])
    assert 'over max_dim=11: ' in ours.table() and 'conv2.weight (12 x 8 x 3 x 3)' in ours.table()
    start = loss().item()
    for _ in range(20):
        ours.zero_grad()
        loss().backward()
        ours.step()
    assert loss().item() < 0.9 * start
    refused(
        ValueError,
        lambda: Preconditioned(
            problem()[0], rule=rule, layers=[dict(preconditioner=dict(type='EigenRotation'))]
        ),
        'AdamR',
        kind.__name__,
        'AdamW',
    )


@both
def test_the_table(kind: type[MatrixOptimizer]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(6, 5), nn.Linear(5, 6, bias=False))
    groups = [
        dict(params=[*model[0].parameters(), *model[1].parameters()]),
        dict(params=model[2].parameters(), precondition=False),
    ]
    name = kind.__name__
    numbers = {ARO: 4 * (12 + 4) + 5 * (6 + 5), DCTAdamW: 2 * 12 * 4 + 4 + 2 * 6 * 5 + 5}
    kept = 4 * numbers[kind]
    lines = kind(groups, lr=0.1, model=model).table().splitlines()
    assert lines == [
        f'2 matrices (78 numbers) take {name}, with {kept / 2**20:.1f} MB of state; 2 vectors and '
        'scalars take AdamW',
        '1 matrices take AdamW, as precondition=False: 2.weight (6 x 5)',
    ]
    assert kind(groups, lr=0.1).table().endswith('one of 6 x 5')
    many = nn.ModuleList(nn.Linear(3, 2, bias=False) for _ in range(7))
    assert (
        kind([dict(params=many.parameters(), precondition=False)], lr=0.1, model=many)
        .table()
        .endswith('4.weight (2 x 3) and 2 more')
    )


@both
def test_left_over_keys_say_delete(kind: type[MatrixOptimizer]) -> None:
    refused(
        TypeError,
        lambda: kind(parameters(), lr=0.1, nesterov=True, foo=1),
        kind.__name__,
        'foo, nesterov',
        'it takes lr, ',
        '`_delete_=True`',
    )
    refused(ValueError, lambda: kind([], lr=0.1), 'empty parameter list')


@both
def test_empty_and_sparse(kind: type[MatrixOptimizer]) -> None:
    empty = nn.Parameter(torch.zeros(0, 3))
    step(kind([empty], lr=0.1), [empty], [torch.zeros(0, 3)])
    table = nn.Embedding(5, 4, sparse=True)
    optimizer = kind(table, lr=0.1)
    table(torch.tensor([1])).sum().backward()
    refused(ValueError, optimizer.step, kind.__name__, 'sparse=False')
