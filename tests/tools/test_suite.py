"""The suite: rates beyond a grid, and scores at equal iterations and seconds."""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis_tools import results, suite, suite_records, suite_report
from common.pace import Pace
from common.suite import EXTERNAL, MUON, TASKS, schedule
from common.training import Run
from tests.support.commands import run_python
from tests.support.errors import refused
from tests.support.paths import ROOT

METRIC = 'accuracy/top1'


def run(name: str, lr: float, seed: int, final: float, iterations: int = 100) -> Run:
    """A run whose score rises in a straight line, and takes a second an iteration."""
    made = Run(name, lr, seed)
    steps = [iterations * k // 4 for k in (1, 2, 3, 4)]
    made.scores = {METRIC: [(step, float(step), final * step / iterations) for step in steps]}
    made.losses = [(step, float(step), 1.0) for step in steps]
    made.memory = 5.0
    return made


def arguments(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(
        work_dir=folder, data=folder, seeds=[0, 1], options=[], timed=5, jobs=2, records=None
    )


@pytest.mark.parametrize('best, count', [(0.03, 4), (0.3, 5), (1.0, 6), (1e9, 7), (1e-9, 7)])
def test_a_screening_goes_beyond_an_edge(
    best: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the best rate is inside, or three more have been tried."""

    def train(wanted: Run, args: argparse.Namespace) -> Run:
        assert args.iterations == 75 and wanted.seed == 0
        distance = max(best / wanted.lr, wanted.lr / best)
        return run(wanted.optimizer, wanted.lr, 0, 90 / distance**0.1)

    monkeypatch.setattr(suite, 'train_or_load', train)
    task = TASKS['digits-cls']
    found = suite.screen(task, 'SGD', arguments(tmp_path))
    rates = [one.lr for one in found]
    assert rates == sorted(rates) and len(rates) == count
    assert set(task.rates('SGD')) <= set(rates)


def train_straight(wanted: Run, args: argparse.Namespace) -> Run:
    """A training whose score is 50 at the end, 80 for ARO, 60 for NKFAC, 45 for AdamW."""
    final = {'ARO': 80.0, 'NKFAC': 60.0, 'AdamW': 45.0}.get(wanted.optimizer, 50.0)
    made = run(wanted.optimizer, wanted.lr, wanted.seed, final, args.iterations)
    file = results.record_file(made, args.iterations, args.work_dir)
    file.write_text(json.dumps(asdict(made)))
    return made


def test_runs_of_equal_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every optimizer has iterations for the plain one's seconds; one of the rest takes part."""
    task = TASKS['digits-cls']
    monkeypatch.setattr(suite, 'train_or_load', train_straight)
    monkeypatch.setattr(type(task.model), 'make_data', lambda *_: None)
    paces = lambda rates, _: {name: Pace([1], [1.0 + (name == 'NKFAC')]) for name in rates}  # noqa: E731
    monkeypatch.setattr(suite, 'measure_paces', paces)
    found = suite.run_fitted(task, 'full', arguments(tmp_path))
    assert not found.whole and 'after 300 iterations' in suite.report(found)
    suite.run_whole(found, arguments(tmp_path))
    assert list(found.fitted) == [*task.contestants, 'ARO']
    lengths = {name: {one.iterations for one in runs} for name, runs in found.fitted.items()}
    assert lengths.pop('NKFAC') == {task.iterations // 2}
    assert set.union(*lengths.values()) == {task.iterations}
    assert {one.iterations for runs in found.whole.values() for one in runs} == {task.iterations}

    cells = [line.split('|')[1:-1] for line in suite.report(found).splitlines() if '|' in line]
    rows = [[cell.strip() for cell in row] for row in cells]
    assert rows[0][2] == 'top-1 % in 300 s'
    assert [row[0] for row in rows[2:4]] == ['ARO', 'NKFAC']
    nkfac, sgd = rows[3], next(row for row in rows if row[0] == 'SGD')
    assert nkfac[5] == '0.83'  # 50 of 60 in a straight line
    assert nkfac[6] == '2.00' and sgd[5] == sgd[6] == '1.00'

    other = replace(found, task=TASKS['swin-digits-cls'], fitted={'SGD': found.fitted['SGD']})
    tables = suite.overview([found, other])
    assert '| optimizer' in tables and '| ResNet-18, digits   | Swin, digits   |' in tables
    scores, prices, losses, whole = re.findall(
        r'^\| \*\*NKFAC\*\* (.*)$', tables, flags=re.MULTILINE
    )
    assert '60.0 (60.0-60.0)' in scores and '2.00, 0.83' in prices and '1.000 at 0.0' in losses
    assert '60.0 (60.0-60.0)' in whole
    assert all(not row.split('|')[2].strip() for row in (scores, prices, losses))  # takes no part

    folder = tmp_path / 'digits-cls'
    with (tmp_path / 'digits-cls.csv').open() as file:
        records = [row for row in csv.DictReader(file) if row['quantity'] != 'pace']
    one = ('optimizer', 'lr', 'seed', 'length', 'quantity', 'iteration')
    assert len({tuple(row[key] for key in one) for row in records}) == len(records)
    assert {row['length'] for row in records if row['optimizer'] == 'NKFAC'} == {'75', '150', '300'}
    assert (folder / 'suite.png').is_file() and (folder / 'report.md').is_file()


def slow_start(rates: dict[str, float]) -> dict[str, Pace]:
    """Paces whose first 66 of 100 iterations take twice as long; NKFAC's take 1.5 times as long."""
    late = {name: 1.5 if name == 'NKFAC' else 1.0 for name in rates}
    return {name: Pace.of([[2 * one] * 66 + [one] * 34]) for name, one in late.items()}


def test_records_continue_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped task leaves its finished runs and seconds; what they hold is not made again.

    One call is stopped after the timing, one within the runs of equal seconds, one never.
    """
    task = TASKS['digits-cls']
    trained: list[tuple[str, int, int]] = []
    timed: list[list[str]] = []
    monkeypatch.setattr(type(task.model), 'make_data', lambda *_: None)

    def paces(rates: dict[str, float], args: argparse.Namespace) -> dict[str, Pace]:
        timed.append(list(rates))
        return slow_start(rates)

    def train(wanted: Run, args: argparse.Namespace) -> Run:
        if results.record_file(wanted, args.iterations, args.work_dir).exists():
            return results.train_or_load(wanted, args)
        if (wanted.optimizer, wanted.seed, args.iterations == 75) == stop:
            raise KeyboardInterrupt
        trained.append((wanted.optimizer, wanted.seed, args.iterations))
        return train_straight(wanted, args)

    monkeypatch.setattr(suite, 'measure_paces', paces)
    monkeypatch.setattr(suite, 'train_or_load', train)
    reports, made, records = [], [], None
    stops = [('SGD', 0, False), ('FAdam', 1, False), None, None]
    for call, stop in enumerate(stops):
        args = arguments(tmp_path / str(call))
        args.jobs, args.records = 1, records
        if stop:
            with pytest.raises(KeyboardInterrupt):
                suite.run_fitted(task, 'full', args)
        else:
            report = suite.report(suite.run_fitted(task, 'full', args))
            reports.append(sorted(report.splitlines()))
        made.append(list(trained))
        trained.clear()
        records = args.work_dir  # another folder, as on another machine
    assert len(timed) == 1 and not made[3] and reports[0] == reports[1]
    assert not [one for one in made[1] + made[2] if one[2] == 75]  # the screening is whole
    long = [one for runs in made for one in runs if one[2] != 75]
    assert len(set(long)) == len(long) == 2 * len(timed[0])
    assert {length for name, _, length in long if name == 'NKFAC'} == {180}
    assert {length for name, _, length in long if name != 'NKFAC'} == {task.iterations}


def test_no_training_starts_after_a_fault() -> None:
    """One that runs may end."""
    started = []

    def make(item: int) -> int:
        started.append(item)
        if item == 1:
            raise results.RunError('no memory')
        time.sleep(0.5 if item == 0 else 0.1)
        return item

    with pytest.raises(results.RunError):
        suite.in_parallel(make, range(20), 2)
    assert 0 in started and len(started) < 5
    assert suite.in_parallel(str, range(3), 2) == ['0', '1', '2']


def test_records_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    task = TASKS['digits-cls']
    refuse = lambda call, text: refused(SystemExit, call, text)  # noqa: E731
    args = arguments(tmp_path)
    args.records = tmp_path
    refuse(lambda: suite.main('full', ['digits-cls'], args), 'none of the files digits-cls.csv')
    refuse(lambda: suite.main('recorded', ['digits-cls'], args), 'no file TASK.csv')
    found = suite_report.Results(task, paces=slow_start({'SGD': 0.1}))
    refuse(lambda: suite.check_paces({'SGD': 0.1, 'AdamW': 0.1}, found), 'no seconds of AdamW')
    runs = [(300, run('SGD', rate, 0, 50.0)) for rate in (0.1, 0.3)]
    refuse(lambda: suite_records.Records(75, runs).rates(), 'rates 0.1 and 0.3')


def test_a_long_run_never_has_the_length_of_the_screening() -> None:
    """Here 75 iterations fit, which is 80 in tens, and then 80, which is the screening's length."""
    task = TASKS['digits-cls']
    found = suite_report.Results(task, paces={'SGD': Pace([1], [1.0]), 'SOAP': Pace([1], [4.0])})
    none = suite_records.Records(75)
    assert suite.fitting(found, 'SOAP', none) == 80
    found.task = replace(task, iterations=320)
    assert suite.screening_length(found.task) == 80 and suite.fitting(found, 'SOAP', none) == 90
    made = run('SGD', 0.1, 1, 50.0)
    for recorded, length in ((290, 290), (280, 300)):  # near what fits, and too far from it
        known = suite_records.Records(75, [(recorded, made), (75, made)])
        assert suite.fitting(replace(found, task=task), 'SGD', known) == length


def test_an_outline_keeps_a_pace() -> None:
    pace = slow_start({'NKFAC': 0.1})['NKFAC']
    few = pace.outline
    assert len(few.iterations) == 11 and few.late == pytest.approx(pace.late)
    for step in (10, 70, 100, 500):
        assert few.until(step) == pytest.approx(pace.until(step))


def test_the_tables_of_the_documentation_are_those_of_the_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell, for all tasks that are finished; no recorded run would be made again."""
    args = arguments(tmp_path)
    args.seeds = [0, 1, 2]
    suite.main('recorded', [], args)
    assert capsys.readouterr().err.count('left out') == len(TASKS) - 5
    page = (ROOT / 'docs/results.md').read_text()
    parts = (tmp_path / 'report.md').read_text().split('## ')
    tables = [part for part in parts if part.startswith(('Score', 'Price', 'Loss'))]
    assert len(tables) == 3
    for part in tables:
        title, _, rest = part.partition('\n')
        written = page.partition(f'## {title}\n')[2].partition('\n## ')[0]
        assert cells(written) == cells(rest) != [], title


def cells(text: str) -> list[list[str]]:
    """Cells of a table in Markdown, without its line of dashes."""
    rows = [line.split('|')[1:-1] for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in row] for k, row in enumerate(rows) if k != 1]


def test_late_iterations_have_the_pace_of_the_last_third() -> None:
    """Here the first 20 of 30 take two seconds each, and all others one."""
    pace = Pace.of([[2.0] * 20 + [1.0] * 10, [3.0] * 30])
    assert pace.mean == pytest.approx(5 / 3) and pace.late == pytest.approx(1.0)
    for iterations, seconds in ((5, 10.0), (20, 40.0), (25, 45.0), (30, 50.0), (120, 140.0)):
        assert pace.until(iterations) == pytest.approx(seconds)
        assert pace.reach(seconds) == pytest.approx(iterations)
    assert Pace([1], [0.5]).until(8) == pytest.approx(4.0)


def test_timing_has_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest counts; a second call measures again only at other rates."""
    rounds = []

    def take_turns(commands: dict[str, list[str]], iterations: int, folder: Path) -> Any:
        rounds.append(list(commands))
        assert all('suite_entry.py' in command[1] for command in commands.values())
        return {name: [4.0 - len(rounds) % 2] * iterations for name in commands}

    monkeypatch.setattr(results, 'take_turns', take_turns)
    args = suite.settings(TASKS['digits-cls'], 300, arguments(tmp_path))
    args.work_dir.mkdir()
    rates = {'SGD': 0.1, 'pytorch_optimizer.Muon': 0.02}
    for _ in range(2):
        paces = results.measure_paces(rates, args)
        assert {name: pace.mean for name, pace in paces.items()} == dict.fromkeys(rates, 3.0)
    assert rounds == [list(rates)] * 2
    monkeypatch.setattr(results, 'MOST_AT_ONCE', 1)
    results.measure_paces({**rates, 'SGD': 0.3}, args)
    assert rounds[2:] == [[name] for name in rates] * 2


def test_a_score_counts_after_the_last_line_of_the_log() -> None:
    """A run of 75 iterations has its last line at 70; without a last evaluation its score is 0."""
    made = Run('SGD', 0.1, 0)
    made.losses = [(step, float(step), 1.0) for step in range(10, 80, 10)]
    made.scores = {METRIC: [(75, 70.0, 40.0)]}
    assert (made.score(METRIC), made.length) == (40.0, 75)
    made.scores = {METRIC: [(37, 37.0, 40.0)]}
    assert (made.score(METRIC), made.length) == (0.0, 70)


def test_tasks_have_configs_and_all_contestants() -> None:
    assert len(set(suite_report.COLORS.values())) == len(suite_report.COLORS)
    for name, task in TASKS.items():
        drawn = {one.rpartition('.')[2] for one in (*task.contestants, *task.rest)}
        assert drawn <= suite_report.COLORS.keys()  # else the picture fails after all trainings
        assert set(EXTERNAL) < set(task.contestants), name
        for optimizer in ('SGD', 'AdamW', *task.ours, *task.rest):
            contestant = task.contestant(optimizer)
            assert (ROOT / f'configs/quickstart/{contestant.config}.py').resolve().is_file()
            assert contestant.options['optim_wrapper.optimizer.weight_decay'] in (1e-4, 0.05)
            assert len(task.rates(optimizer)) == 4
        assert (ROOT / 'tools' / task.contestant(MUON).script).is_file()


def test_muon_multiplies_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bfloat16 has no units, it would take most of an iteration."""
    peers = pytest.importorskip('pytorch_optimizer')
    from pytorch_optimizer.optimizer.muon import base

    from analysis_tools import suite_entry

    name = suite_entry.NEWTON_SCHULZ
    monkeypatch.setattr(base, name, getattr(base, name))  # restored after the test
    changed = []
    for change in (lambda: None, suite_entry.multiply_in_float32):
        change()
        matrix = torch.eye(3, 5, dtype=torch.float32).requires_grad_()
        matrix.grad = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
        peers.Muon([dict(params=[matrix], use_muon=True)], lr=1.0).step()
        changed.append((torch.eye(3, 5) - matrix).detach())
    assert torch.equal(changed[0], changed[0].bfloat16().float())
    assert not torch.equal(changed[1], changed[1].bfloat16().float())
    torch.testing.assert_close(*changed, rtol=0.1, atol=0.05)


def test_the_schedule_ends_with_the_run() -> None:
    pytest.importorskip('mmengine')
    from mmengine.config import Config

    for task in TASKS.values():
        path = ROOT / f'configs/quickstart/{task.contestant("SGD").config}.py'
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(schedule(40))
        warm, cosine = cfg.param_scheduler
        assert (warm.begin, warm.end, cosine.begin, cosine.end) == (0, 2, 2, 40)
        assert cosine.T_max == 38


def test_the_command_needs_a_model_or_the_suite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr('sys.argv', ['results.py'])
    with pytest.raises(SystemExit):
        results.main()
    assert 'give a model, or --suite quick' in capsys.readouterr().err
    for given in (['quick', '--records', '.'], ['full', '--records', 'nowhere']):
        monkeypatch.setattr('sys.argv', ['results.py', '--suite', *given])
        with pytest.raises(SystemExit):
            results.main()
        assert '--records' in capsys.readouterr().err
    called: list[Any] = []
    monkeypatch.setattr('sys.argv', ['results.py', '--suite', 'full', '--tasks', 'digits-cls,swin'])
    monkeypatch.setattr(suite, 'main', lambda *given: called.append(given[:2]))
    results.main()
    assert called == [('full', ['digits-cls', 'swin'])]


def test_help_needs_no_environment() -> None:
    """Without site-packages, as before the set-up."""
    done = run_python('-S', ROOT / 'tools/analysis_tools/results.py', '--help')
    assert done.returncode == 0 and '--suite' in done.stdout, done.stderr


def test_options_of_the_user_win_and_fixed_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    import quickstart
    from common.training import command

    decay = 'optim_wrapper.optimizer.weight_decay'
    words = ['quickstart.py', '--options', f'{decay}=0']
    monkeypatch.setattr(sys, 'argv', words)
    args = quickstart.parse_args()
    for name in ('SGD', 'AdamW', 'FSGD'):  # the last two have a decay of their own
        assert f'{decay}=0' in command(Run(name, 0.1, 0), args)
    for option, message in (
        ('randomness.seed=1', 'randomness.seed is set by --seeds'),
        ('weight_decay', 'is no KEY=VALUE'),
    ):
        monkeypatch.setattr(sys, 'argv', ['quickstart.py', '--options', option])
        with pytest.raises(SystemExit):
            quickstart.parse_args()
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, 'argv', ['quickstart.py', '--iterations', '5'])
    with pytest.raises(SystemExit):
        quickstart.parse_args()
    assert 'the interval of the logs' in capsys.readouterr().err
