"""Configs of the thesis's tables: settings against the paper and MMDetection; one is stepped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet')
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tools'))

import verify_configs as verify  # noqa: E402

from mmprecond.engine import launch  # noqa: E402

CONFIGS = verify.all_configs()


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_settings_are_those_of_the_paper_and_of_mmdetection(path: Path) -> None:
    assert verify.differences(path) == []


def test_every_row_of_the_tables_has_one_config() -> None:
    rows = [row for row in json.loads(verify.ROWS.read_text())['coco']
            if not row['is_toolbox_default']]
    keys = ('table', 'detector', 'backbone', 'schedule', 'optimizer')
    papers = [launch.load_config(str(path)).get('paper') for path in CONFIGS]
    found = sorted(tuple(paper[key] for key in keys) for paper in papers if paper)
    assert found == sorted(tuple(row[key] for key in keys) for row in rows)
    hybrids = [path.stem for path, paper in zip(CONFIGS, papers, strict=True) if not paper]
    assert len(hybrids) == 5 and all('coco_afopt' in name for name in hybrids)


@pytest.mark.parametrize('before, after, words', [
    ('lr=0.02', 'lr=0.01', 'lr is 0.01, the paper has 0.02'),
    ('refresh_interval=1000', 'refresh_interval=500', 'refresh_interval is 500'),
    ("_1x_coco.py'\n", "_2x_coco.py'\n", 'max_epochs is 24'),
    ('AP=39.7', 'AP=39.8', 'result is'),
    ('momentum=0.9', 'momentum=0.5', 'momentum is 0.5'),
    ('momentum=0.9', 'momentum=0.9, damping=10.', 'damping is 10.0, the paper has nothing'),
    ("constructor='Precond", "accumulative_counts=4,\n    constructor='Precond",
     'optim_wrapper.accumulative_counts differs'),
    ("table='3.7'", "table='3.8'", '0 rows'),
    ('optim_wrapper = ', 'model = dict(backbone=dict(depth=101))\noptim_wrapper = ',
     'model differs'),
])
def test_a_wrong_config_is_found(before: str, after: str, words: str, tmp_path: Path) -> None:
    source = (ROOT / 'configs/faster_rcnn/faster-rcnn_r50_fpn_1x_coco_nkfac.py').read_text()
    assert source.count(before) == 1
    wrong = tmp_path / 'wrong.py'
    wrong.write_text(source.replace(before, after))
    assert words in '; '.join(verify.differences(wrong))


def test_a_config_builds_and_steps_at_its_real_size(tmp_path: Path) -> None:
    """The cheapest; `tools/verify_configs.py` does all."""
    (path,) = (path for path in CONFIGS if path.stem == 'retinanet_swin-t-p4-w7_fpn_1x_coco_afopt')
    data = verify.make_data(tmp_path, 1, 320)
    outcome = verify.take_steps(path, data, 1)
    assert outcome.problems == [] and len(outcome.seconds) == 1


def test_the_index_is_up_to_date() -> None:
    import make_index

    for path, text in make_index.files().items():
        assert path.read_text() == text, f'{path.name}: run python tools/make_index.py'


def test_the_index_as_mim_reads_it() -> None:
    import make_index
    import yaml

    names = []
    for file in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        content = yaml.safe_load((ROOT / file).read_text())
        collections = {collection['Name'] for collection in content['Collections']}
        for model in content['Models']:
            assert model['In Collection'] in collections and (ROOT / model['Config']).is_file()
            names.append(model['Name'])
    assert sorted(names) == sorted(path.stem for path in CONFIGS)
    run = make_index.metafile('mask_rcnn', [(CONFIGS[-1], {}, dict(APb=40.2, APm=36.5))])
    assert yaml.safe_load(run)['Models'][0]['Results'] == [
        {'Task': 'Object Detection', 'Dataset': 'COCO', 'Metrics': {'box AP': 40.2}},
        {'Task': 'Instance Segmentation', 'Dataset': 'COCO', 'Metrics': {'mask AP': 36.5}}]


def test_configs_travel_with_the_package(tmp_path: Path) -> None:
    subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', str(tmp_path)],
                   cwd=ROOT, check=True, capture_output=True)
    shipped = tmp_path / 'mmprecond/.mim'
    assert (shipped / 'model-index.yml').is_file()
    (hybrid,) = shipped.glob('configs/mask_rcnn/*_afopt-nkfac_adamw.py')
    assert verify.differences(hybrid) == []  # its own bases are with it
    assert len(list(shipped.glob('configs/*/*_coco_*.py'))) == len(CONFIGS)
