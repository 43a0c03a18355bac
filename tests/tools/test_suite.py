"""The suite: rates beyond a grid, and scores at equal iterations and seconds."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import pytest

from analysis_tools import results, suite
from common.suite import EXTERNAL, TASKS, schedule
from common.training import Run
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
        work_dir=folder, data=folder, seeds=[0, 1], options=[], timed=5, turns=1
    )


@pytest.mark.parametrize('best, count', [(0.03, 4), (0.3, 5), (1.0, 6), (1e9, 7), (1e-9, 7)])
def test_a_screening_goes_beyond_an_edge(
    best: float, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the best rate is inside, or three more have been tried."""

    def train(wanted: Run, args: argparse.Namespace) -> Run:
        assert args.iterations == 150 and wanted.seed == 0
        distance = max(best / wanted.lr, wanted.lr / best)
        return run(wanted.optimizer, wanted.lr, 0, 90 / distance**0.1, 150)

    monkeypatch.setattr(suite, 'train_or_load', train)
    task = TASKS['digits-cls']
    found = suite.screen(task, 'SGD', 600, arguments(tmp_path))
    rates = [one.lr for one in found]
    assert rates == sorted(rates) and len(rates) == count
    assert set(task.rates('SGD')) <= set(rates)


def test_scores_at_equal_seconds(tmp_path: Path) -> None:
    task = TASKS['digits-cls']
    final = {
        'SGD': [run('SGD', 0.1, 0, 80.0), run('SGD', 0.1, 1, 60.0)],
        'NKFAC': [run('NKFAC', 0.3, 0, 100.0), run('NKFAC', 0.3, 1, 100.0)],
        'SOAP': [run('SOAP', 0.3, 0, 50.0), run('SOAP', 0.3, 1, 50.0)],
    }
    text = suite.report(
        task, {k: v[:1] for k, v in final.items()}, final, dict(SGD=1.0, NKFAC=2.0, SOAP=1.0)
    )
    cells = [[cell.strip() for cell in line.split('|')[1:-1]] for line in text.splitlines()]
    assert cells[0][4] == "top-1 % in SGD's time"
    nkfac = next(row for row in cells if row[0] == 'NKFAC')
    assert nkfac[2].startswith('100.0') and nkfac[4].startswith('50.0')  # at half of its length
    assert nkfac[5] == '1.40'  # 70 iterations of two seconds, of 100 seconds
    assert next(row for row in cells if row[0] == 'SOAP')[5] == '-'
    suite.write_records(final, dict(SGD=1.0), tmp_path / 'records.csv')
    with (tmp_path / 'records.csv').open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == 3 * 2 * 8 and records[0]['seconds'] == '25.0'


def test_tasks_have_configs_and_all_contestants() -> None:
    for name, task in TASKS.items():
        assert set(EXTERNAL) < set(task.contestants), name
        for optimizer in ('SGD', 'AdamW', *task.ours):
            contestant = task.contestant(optimizer)
            assert (ROOT / f'configs/quickstart/{contestant.config}.py').resolve().is_file()
            assert contestant.options['optim_wrapper.optimizer.weight_decay'] in (1e-4, 0.05)
            assert len(task.rates(optimizer)) == 4


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
    called: list[Any] = []
    monkeypatch.setattr('sys.argv', ['results.py', '--suite', 'full', '--tasks', 'digits-cls,swin'])
    monkeypatch.setattr(suite, 'main', lambda *given: called.append(given[:2]))
    results.main()
    assert called == [('full', ['digits-cls', 'swin'])]
