"""Random networks and settings against the slow float64 references; see fuzz_cases.py.

A few examples run by default. Many more::

    OMP_NUM_THREADS=1 python -m pytest tests/optimizers/test_random_networks.py \
        --hypothesis-profile=long

FUZZ_EXAMPLES sets their number for each test. What fails is printed as plain data, enough to
build it again.
"""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.fuzz import Case, Net, freeze
from tests.support.random_runs import METHODS, Run, Slow, against_references, cases
from tests.support.states import differences, everything, saved

pytestmark = pytest.mark.filterwarnings('ignore:Using padding=.same.:UserWarning')


# ------------------------------------------------------------------- the tests


@pytest.mark.parametrize('kind', METHODS)
@given(data=st.data())
def test_trajectories(kind: str, data: st.DataObject) -> None:
    against_references(data.draw(cases(kind)))


@given(cases(mixed=True))
def test_two_methods(case: Case) -> None:
    """The head by one, all else by another."""
    against_references(case)


def runs(case: Case, *others: Case, odd: dict[str, int] | None = None) -> list[Run]:
    """Runs of similar cases, if there is a layer to precondition."""
    net = Net(case)
    freeze(case, net, 0)
    assume(Slow(case, net).layers)
    return [Run(case)] + [Run(other, odd) for other in others]


@given(cases())
def test_groups_and_the_named_optimizers_change_nothing(case: Case) -> None:
    change = lambda **new: Case(**{**vars(case), **new})
    all_runs = runs(
        *(change(grouped=grouped, via=via) for grouped in (False, True) for via in (False, True))
    )
    for t in range(case.steps):
        for run in all_runs:
            run.step(t)
    for other in all_runs[1:]:
        assert differences(dict(all_runs[0].net.state_dict()), dict(other.net.state_dict())) == []
        layers = [r.optimizer.state_dict()['precond']['layers'] for r in (all_runs[0], other)]
        assert differences(*layers) == []


@given(cases(), st.integers(0, 5))
def test_a_resumed_run_continues_bit_for_bit(case: Case, at: int) -> None:
    (run,) = runs(case)
    for t in range(case.steps):
        if t == at % case.steps:
            twin = Run(case)  # built as the first time
            twin.net.load_state_dict(saved(run.net.state_dict()))
            twin.optimizer.load_state_dict(saved(run.optimizer.state_dict()))
            if run.scaler:
                twin.scaler.load_state_dict(run.scaler.state_dict())
        run.step(t)
        if t >= at % case.steps:
            twin.step(t)
    assert (
        differences(everything(run.net, run.optimizer), everything(twin.net, twin.optimizer)) == []
    )


@given(
    cases(),
    st.fixed_dictionaries(
        {place: st.integers(0, 2**8 - 1) for place in ('before', 'late', 'between', 'after')}
    ),
)
def test_what_is_done_beside_training_changes_nothing(case: Case, odd: dict[str, int]) -> None:
    """Evaluation, copies, graphs that are not walked, gradients that are cleared."""
    run, other = runs(case, case, odd=odd)
    for t in range(case.steps):
        run.step(t), other.step(t)
    assert (
        differences(everything(run.net, run.optimizer), everything(other.net, other.optimizer))
        == []
    )
