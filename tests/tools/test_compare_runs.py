"""Reports of compare_runs.py: in the terminal, in Markdown and in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis_tools import compare_runs  # noqa: E402
from tests.support.paths import ROOT

OURS = 'PrecondOptimWrapperConstructor'
PAPER = """
paper = dict(table='3.9', detector='mask_rcnn', optimizer='NKFAC', result=dict(APb=40.1, APm=36.6))
"""


def make(
    folder: Path,
    stamp: str,
    iterations: range,
    optimizer: str = 'NKFAC',
    lr: float = 0.02,
    extra: str = '',
    ap: float = 0.395,
) -> Path:
    """A log as MMEngine writes it: the loss every 10 iterations, a score every 20."""
    data = folder / stamp / 'vis_data'
    data.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for k in iterations:
        lines.append(dict(loss=3.0 - k / 100, time=0.5, iter=k, step=k))
        if k % 20 == 0:
            lines.append({'coco/bbox_mAP': ap * k / 40, 'coco/segm_mAP': 0.37, 'step': k // 20})
            lines.append({'curvature/cosine/mean': 0.5, 'step': k})
    (data / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)) + '\n')
    (data / 'config.py').write_text(
        f"optim_wrapper = dict(optimizer=dict(type='{optimizer}', lr={lr}))\n"
        f"work_dir = '{folder}'\n{extra}"
    )
    (folder / stamp / f'{stamp}.log').write_text(
        'System environment:\n    Python: 3.11.7\n    PyTorch: 2.11.0\n    GPU 0: <none & such>\n'
    )
    return folder


@pytest.fixture(name='folders')
def _folders(tmp_path: Path) -> list[Path]:
    return [
        make(tmp_path / 'nkfac', '1', range(10, 50, 10), extra=PAPER),
        make(tmp_path / 'sgd', '1', range(10, 50, 10), 'SGD', 0.01, ap=0.3),
    ]


def test_a_log_is_read(folders: list[Path]) -> None:
    run = compare_runs.read_run(folders[0])
    assert run.losses[-1] == (40, 20.0, pytest.approx(2.6))
    assert run.scores['coco/bbox_mAP'] == [
        (20, 10.0, pytest.approx(0.1975)),
        (40, 20.0, pytest.approx(0.395)),
    ]
    assert run.optimizer == 'NKFAC' and run.machine['PyTorch'] == '2.11.0'
    assert not any('curvature' in name for name in run.scores)
    assert run.against_paper() == [
        ('APb', pytest.approx(39.5), 40.1),
        ('APm', pytest.approx(37.0), 36.6),
    ]


def test_a_resumed_run_is_one(tmp_path: Path) -> None:
    """What was logged after the checkpoint counts once: the later log's."""
    make(tmp_path / 'run', '1', range(10, 50, 10))
    folder = make(tmp_path / 'run', '2', range(30, 70, 10), ap=0.2)
    run = compare_runs.read_run(folder)
    assert [point[0] for point in run.losses] == [10, 20, 30, 40, 50, 60]
    assert run.seconds == 30.0
    assert [(point[0], point[2]) for point in run.scores['coco/bbox_mAP']] == [
        (20, pytest.approx(0.1975)),
        (40, pytest.approx(0.2)),
        (60, pytest.approx(0.3)),
    ]


def test_a_training_that_still_runs(tmp_path: Path) -> None:
    """A line that is being written; a config whose modules are not here."""
    folder = make(
        tmp_path / 'run',
        '1',
        range(10, 50, 10),
        extra="custom_imports = dict(imports=['nowhere_at_all'])",
    )
    with (folder / '1/vis_data/scalars.json').open('a') as file:
        file.write('{"loss": 1.0, "ti')
    run = compare_runs.read_run(folder)
    assert run.iterations == 40 and run.optimizer == 'NKFAC'
    (folder / '1/vis_data/config.py').write_text('optim_wrapper = dict(')
    run = compare_runs.read_run(folder)
    assert run.config == {} and 'cannot be read' in run.notes[0]


def test_an_evaluation_before_the_first_loss(tmp_path: Path) -> None:
    """It belongs to where the last log ended, not to the start."""
    make(tmp_path / 'run', '1', range(10, 30, 10))
    folder = make(tmp_path / 'run', '2', range(30, 50, 10))
    file = folder / '2/vis_data/scalars.json'
    file.write_text(json.dumps({'coco/bbox_mAP': 0.11, 'step': 1}) + '\n' + file.read_text())
    scores = compare_runs.read_run(folder).scores['coco/bbox_mAP']
    assert [point[:2] for point in scores] == [(20, 10.0), (20, 10.0), (40, 20.0)]


def test_seconds_that_leave_iterations_out_are_marked(tmp_path: Path) -> None:
    """MMEngine's time is that of a window, in which rare refreshes may never be."""
    folder = make(
        tmp_path / 'run',
        '1',
        range(100, 300, 100),
        extra=("default_hooks = dict(logger=dict(type='LoggerHook', interval=100))\n"),
    )
    run = compare_runs.read_run(folder)
    assert 'those of 10 of every 100 iterations' in run.notes[0]
    markdown, page = compare_runs.write([run], tmp_path / 'report', 'One')
    assert 'window_size=100' in markdown.read_text() and 'window_size=100' in page.read_text()


def test_detectors_without_masks_have_sizes_instead() -> None:
    run = compare_runs.LoggedRun(
        'a',
        paper=dict(result=dict(AP=39.7, APm=43.3)),
        scores={'coco/bbox_mAP': [(1, 1.0, 0.4)], 'coco/bbox_mAP_m': [(1, 1.0, 0.44)]},
    )
    assert run.against_paper() == [
        ('AP', pytest.approx(40.0), 39.7),
        ('APm', pytest.approx(44.0), 43.3),
    ]


@pytest.mark.parametrize(
    'change, gpus, said',
    [
        ({}, 8, []),
        ({'optim_wrapper.optimizer.damping': 0.1}, 8, ['damping is 0.1']),
        ({}, 1, ['batch of all GPUs is 2, the paper has 16']),
        ({'auto_scale_lr.enable': True}, 1, []),
        ({'optim_wrapper.accumulative_counts': 8}, 1, []),
    ],
)
def test_a_run_unlike_its_row_of_the_paper_says_so(
    change: dict[str, Any], gpus: int, said: list[str], tmp_path: Path
) -> None:
    pytest.importorskip('mmdet')
    from mmprecond.engine import launch

    folder = make(tmp_path / 'run', '1', range(10, 50, 10))
    cfg = launch.load_config(
        str(ROOT / 'configs/faster_rcnn' / 'faster-rcnn_r50_fpn_1x_coco_nkfac.py')
    )
    cfg.merge_from_dict(change | {'log_processor.window_size': 50})
    cfg.dump(folder / '1/vis_data/config.py')
    with (folder / '1/1.log').open('a') as log:
        log.write(f'Runtime environment:\n    GPU number: {gpus}\n')
    notes = compare_runs.read_run(folder).notes
    assert len(notes) == len(said)
    for note, words in zip(notes, said, strict=True):
        assert words in note and note.startswith('not trained as table 3.7 of the thesis: ')


def test_the_report(folders: list[Path], tmp_path: Path) -> None:
    markdown, page = compare_runs.write(
        [compare_runs.read_run(f) for f in folders], tmp_path / 'report', 'Two <runs>'
    )
    text = markdown.read_text()
    assert '| nkfac | NKFAC | 40 | 20 s | 0.395 | 0.370 |' in text and 'hours' not in text
    assert '| APb | 39.5 | 40.1 | -0.6 |' in text
    assert '| optim_wrapper.optimizer.lr | 0.02 | 0.01 |' in text and 'work_dir' not in text
    html = page.read_text()
    assert 'Two &lt;runs&gt;' in html and '&lt;none &amp; such&gt;' in html
    assert '<td class="number">20 s</td>' in html and '<th>training time</th>' in html
    assert html.count('<svg') == 3 and 'src=' not in html and 'http-equiv' not in html


def test_the_curves_in_markdown(folders: list[Path], tmp_path: Path) -> None:
    """The pictures lie beside the report, which can be moved with them."""
    markdown, _ = compare_runs.write(
        [compare_runs.read_run(f) for f in folders], tmp_path / 'report', 'Two'
    )
    pictures = re.findall(r'!\[(.*?)\]\((.*?)\)', markdown.read_text())
    assert pictures == [
        ('training loss', 'training_loss.png'),
        ('coco/bbox_mAP', 'coco_bbox_mAP.png'),
        ('coco/segm_mAP', 'coco_segm_mAP.png'),
    ]
    for _, file in pictures:
        assert (tmp_path / 'report' / file).read_bytes().startswith(b'\x89PNG')


def test_the_terminal(
    folders: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The table of the runs first, then where the reports are."""
    out = tmp_path / 'report'
    arguments = ['compare_runs.py', *map(str, folders), '--out', str(out)]
    monkeypatch.setattr(sys, 'argv', arguments)
    compare_runs.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines.pop(4).startswith('nkfac: whether it was trained as the row that it names is not')
    assert lines == [
        'run    optimizer  iterations  training time  coco/bbox_mAP  coco/segm_mAP',
        'nkfac  NKFAC              40           20 s          0.395          0.370',
        'sgd    SGD                40           20 s          0.300          0.370',
        '',
        str(out / 'report.md'),
        str(out / 'report.html'),
    ]


def test_scores_of_segmentation(tmp_path: Path) -> None:
    """MMSegmentation names them without a slash; mIoU has the column and the curve."""
    data = tmp_path / 'segformer/1/vis_data'
    data.mkdir(parents=True)
    (data / 'scalars.json').write_text(
        '{"lr": 0.1, "loss": 1.0, "decode.acc_seg": 9.0, "time": 0.5, "iter": 10, "step": 10}\n'
        '{"aAcc": 81.5, "mIoU": 40.25, "mAcc": 52.0, "data_time": 0.01, "time": 0.2, "step": 10}\n'
    )
    run = compare_runs.read_run(tmp_path / 'segformer')
    markdown, page = compare_runs.write([run], tmp_path / 'report', 'Segmentation')
    text = markdown.read_text()
    assert '| segformer | unknown | 10 | 5.0 s | 40.250 |' in text and '(mIoU.png)' in text
    assert '| aAcc | 81.500 |' in text and '| mAcc | 52.000 |' in text
    assert 'time' not in re.findall(r'^\| (\w+) \|', text, flags=re.MULTILINE)
    assert 'id="others"' in page.read_text()


def test_absent_values(tmp_path: Path) -> None:
    """A run that was not trained or evaluated; a key that one config does not have."""
    runs = [
        compare_runs.LoggedRun('a', config={'x': 1, 'y': '-'}, scores={'mIoU': [(1, 1.0, 0.5)]}),
        compare_runs.LoggedRun('b', config={'x': 1}),
        compare_runs.LoggedRun('c', notes=['its config cannot be read']),
    ]
    assert compare_runs.run_table(runs)[1][1] == ['b', 'unknown', '0', '-', '-']
    assert compare_runs.config_differences(runs) == [('y', ["'-'", 'not set', 'unknown'])]
    markdown, page = compare_runs.write(runs, tmp_path / 'report', 'Absent')
    assert "| y | '-' | not set | unknown |" in markdown.read_text()
    assert '<td>not set</td>' in page.read_text()


@pytest.mark.skipif(shutil.which('chromium') is None, reason='no browser is installed')
def test_the_page_in_a_browser(folders: list[Path], tmp_path: Path) -> None:
    """What a reader sees: rows, pictures with a size, and no request to anywhere."""
    _, page = compare_runs.write(
        [compare_runs.read_run(f) for f in folders], tmp_path / 'report', 'Two runs'
    )
    done = subprocess.run(
        [
            'chromium',
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--dump-dom',
            '--virtual-time-budget=2000',
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count('<tr>') == 3 + 3 + 3 and done.stdout.count('<path') > 20
    picture = tmp_path / 'page.png'
    subprocess.run(
        [
            'chromium',
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            f'--screenshot={picture}',
            '--window-size=1000,1400',
            page.as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    import numpy as np
    from PIL import Image

    pixels = np.asarray(Image.open(picture).convert('RGB')).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 100  # curves in colour, not an empty page


def test_other_folders_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, 'tools/analysis_tools/compare_runs.py', str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and 'scalars.json' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_classifiers_are_compared_by_top_1() -> None:
    run = compare_runs.LoggedRun(
        'a',
        paper=dict(table='3.5', result=dict(top1=71.12)),
        scores={'accuracy/top1': [(1, 1.0, 70.5)]},
    )
    assert run.against_paper() == [('top1', pytest.approx(70.5), 71.12)]
    assert run.source == 'table 3.5'


@pytest.mark.parametrize(
    ('wrapper', 'name'),
    [
        (dict(optimizer=dict(type='AdamW')), 'AdamW'),
        (dict(constructor=OURS, optimizer=dict(type='AdamW')), 'AFOpt+NKFAC on AdamW'),
        (dict(constructor=OURS, optimizer=dict(type='SGD'), precondition='NKFAC'), 'NKFAC on SGD'),
        (dict(constructor=OURS, optimizer=dict(type='SGD'), precondition=None), 'SGD'),
        (dict(constructor=OURS, optimizer=dict(type='NKFAC')), 'NKFAC'),
        (
            dict(
                constructor=OURS,
                optimizer=dict(type='SGD'),
                precondition=dict(attention='AFOpt', elsewhere=dict(type='KFAC', damping=0.1)),
            ),
            'AFOpt+KFAC on SGD',
        ),
    ],
    ids=str,
)
def test_attached_curvature_is_in_the_name(wrapper: dict[str, Any], name: str) -> None:
    assert compare_runs.optimizer_name(wrapper) == name
