"""Configs of the thesis's tables: against the paper and the toolboxes; some are stepped."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.building import build_package
from tests.support.paths import ROOT

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from mmprecond import optimizers  # noqa: E402
from mmprecond.engine import launch  # noqa: E402
from mmprecond.optimizers import get_optimizer_info  # noqa: E402
from paper import rows  # noqa: E402
from paper import verify_configs as verify  # noqa: E402
from paper.departures import departures, plain  # noqa: E402

CONFIGS = verify.all_configs()
DETECTOR = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco_nkfac'
CLASSIFIER = 'resnet/resnet18_b128_cifar100_nkfac'


def papers() -> dict[str, dict[str, Any]]:
    """The `paper` entries of all configs that have one, by the name of the config."""
    found = {path.stem: launch.load_config(str(path)).get('paper') for path in CONFIGS}
    return {name: dict(paper) for name, paper in found.items() if paper}


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_settings_are_those_of_the_paper_and_of_the_toolbox(path: Path) -> None:
    assert verify.differences(path) == []


def test_every_row_has_one_config_and_every_config_one_row() -> None:
    def keys(names: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
        order = ('table', 'data', 'model', 'detector', 'backbone', 'schedule', 'optimizer')
        return sorted(tuple(str(name.get(key)) for key in order) for name in names)

    entries = papers()
    assert keys(entries.values()) == keys(row.name for row in rows.rows())
    hybrids = [path.stem for path in CONFIGS if path.stem not in entries]
    assert len(hybrids) == 12 and all('_afopt' in name for name in hybrids)


def test_every_score_of_the_file_has_a_way_to_be_run() -> None:
    """A config, the name of another optimizer with its rates, or a reason for neither."""
    for content in rows.tables():
        cited = content.get('cited', [])
        if content['table'] in rows.WITHOUT_CONFIG:
            assert content['task'] in ('time', 're-identification')
            continue
        own = [row for row in rows.all_rows() if row.name['table'] == content['table']]
        for row in own:
            optimizer = row.name['optimizer']
            assert row.is_ours or optimizer in rows.OPTIMIZER_NAMES, row
            stated = {'lr', 'weight_decay'} <= set(row.optimizer)
            assert stated or optimizer in cited, row
        if content['task'] == 'classification':
            scores = [top1 for _, _, found in content['rows'] for top1 in found.values()]
        else:
            scores = content['rows']
        assert content['rows'] and (len(own) == len(scores) or content['task'] == 'ablation')


def test_results_of_chapters_2_to_5() -> None:
    """Counted in the thesis, so that no row can be lost from the file."""
    found = {
        content['table']: sum(
            len(row[2]) if isinstance(row, list) else 1 for row in content['rows']
        )
        for content in rows.tables()
        if content['task'] != 'time'
    }
    classifiers = {'2.1': 56, '2.2': 14, '2.3': 7, '2.4': 3, '2.5': 6, '2.6': 6, '3.1': 56}
    classifiers |= {'3.5': 14, '3.6': 4, '4.1': 80, '4.4': 16}
    detectors = {'3.7': 4, '3.8': 2, '3.9': 10, '4.5': 6, '4.6': 12, '5.1': 3, '5.2': 3}
    ablations = {'2.7': 5, '2.8': 24, '2.9': 3, '2.10': 5, '3.10': 4, '3.11': 4, '3.12': 5}
    ablations |= {'3.13': 4, '3.14': 4, '3.15': 4, '3.16': 6, '4.7': 5, '5.3': 4, '5.4': 4}
    assert found == classifiers | detectors | ablations


def test_ablations_are_settings_of_their_configs() -> None:
    from paper import make_index

    own = {
        content['table']: len(content['rows'])
        for content in rows.tables()
        if content['task'] == 'ablation'
    }
    for number, path, settings, _ in make_index.ablation_rows(list(make_index.rows())):
        own[number] -= 1
        optimizer = launch.load_config(str(path)).optim_wrapper.optimizer
        known = get_optimizer_info(optimizer.type).settings
        assert set(settings) <= {*known, *make_index.ELSEWHERE}, (number, settings)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
        changed = {k: v for k, v in settings.items() if k not in make_index.ELSEWHERE}
        kind = getattr(optimizers, optimizer.type)
        kind(model, **{k: v for k, v in optimizer.items() if k != 'type'} | changed)
    assert set(own.values()) == {0}


@pytest.mark.slow
def test_baselines_are_configs_with_another_optimizer() -> None:
    pytest.importorskip('pytorch_optimizer')
    from mmengine.optim import build_optim_wrapper

    from mmprecond.engine import use_optimizer
    from paper import make_index

    entries = list(make_index.rows())
    built = set()
    for row in rows.baselines():
        name = rows.OPTIMIZER_NAMES[row.name['optimizer']]
        if not row.optimizer or 'Swin' in row.name['model']:
            continue
        path = make_index.starting_point(row, entries)
        cfg = launch.load_config(str(path))
        use_optimizer(cfg, name)
        if (row.name['model'], row.name['optimizer']) == ('VGG19-noBN', 'SGDM'):
            cfg.model.backbone.conv_cfg = None
        assert 'paper' not in cfg  # another optimizer's score is not this one's
        rates = {key: row.optimizer[key] for key in ('lr', 'weight_decay')}
        cfg.optim_wrapper.optimizer.update(rates)
        cfg.paper = dict(row.name, result=row.result)
        wrong = departures(plain(cfg.to_dict()), row, path.stem)
        named = ('type is', 'decoupled_weight_decay is True')
        assert [one for one in wrong if not one.startswith(named)] == []
        if name not in built:
            built.add(name)
            wrapper = build_optim_wrapper(torch.nn.Linear(3, 3), cfg.optim_wrapper)
            assert type(wrapper.optimizer).__name__ == name.rsplit('.', 1)[-1]
    assert built == set(rows.OPTIMIZER_NAMES.values())


def test_detectors_of_the_toolbox_are_the_rows_of_its_optimizers() -> None:
    """Rate, decay, batch, epochs and drops of MMDetection's own configs."""
    shipped = [row for row in rows.all_rows() if row.is_shipped]
    entries = papers()
    paths = {path.stem: path for path in CONFIGS}
    for row in shipped:
        keys = ('detector', 'backbone', 'schedule')
        ours = next(
            name
            for name, paper in entries.items()
            if all(paper.get(key) == row.name[key] for key in keys)
        )
        cfg = launch.load_config(verify.base_of(paths[ours]))
        cfg.paper = dict(result=row.result)
        wrong = departures(plain(cfg.to_dict()), row, None)
        assert [one for one in wrong if not one.startswith('type is')] == [], row.name
    assert len(shipped) == 16


@pytest.mark.parametrize(
    'name, before, after, words',
    [
        (DETECTOR, 'lr=0.02', 'lr=0.01', 'lr is 0.01, the paper has 0.02'),
        (DETECTOR, 'refresh_interval=1000', 'refresh_interval=500', 'refresh_interval is 500'),
        (DETECTOR, "_1x_coco.py'\n", "_2x_coco.py'\n", 'max_epochs is 24'),
        (DETECTOR, 'AP=39.7', 'AP=39.8', 'result is'),
        (DETECTOR, 'momentum=0.9', 'momentum=0.5', 'momentum is 0.5'),
        (
            DETECTOR,
            'momentum=0.9',
            'momentum=0.9, damping=10.',
            'damping is 10.0, the paper has nothing',
        ),
        (
            DETECTOR,
            "constructor='Precond",
            "accumulative_counts=4,\n    constructor='Precond",
            'optim_wrapper.accumulative_counts differs',
        ),
        (DETECTOR, "table='3.7'", "table='3.8'", '0 rows'),
        (
            DETECTOR,
            'optim_wrapper = ',
            'model = dict(backbone=dict(depth=101))\noptim_wrapper = ',
            'model.backbone.depth differs',
        ),
        (CLASSIFIER, 'weight_decay=0.001', 'weight_decay=0.01', 'weight_decay is 0.01'),
        (CLASSIFIER, '        stat_interval=20,\n', '', 'stat_interval is None'),
        (
            CLASSIFIER,
            'T_max=200',
            'T_max=100',
            "schedule is [{'type': 'CosineAnnealingLR', 'T_max': 1",
        ),
        (CLASSIFIER, 'eta_min_ratio=1e-3', 'eta_min_ratio=1e-3, begin=5', "'begin': 5"),
        (
            CLASSIFIER,
            'optim_wrapper = ',
            'train_cfg = dict(max_epochs=100)\noptim_wrapper = ',
            'max_epochs is 100',
        ),
        (
            CLASSIFIER,
            'optim_wrapper = ',
            'train_dataloader = dict(batch_size=64)\noptim_wrapper = ',
            'batch of a GPU, and of all is [64, 64], the paper has [128, 128]',
        ),
        (
            CLASSIFIER,
            'optim_wrapper = ',
            "load_from = 'other.pth'\noptim_wrapper = ",
            "pretrained weights is ['other.pth', False]",
        ),
        (
            CLASSIFIER,
            'resnet18_cifar100.py',
            'resnet50_cifar100.py',
            "backbone is {'type': 'ResNet_CIFAR', 'depth': 50}",
        ),
        (
            CLASSIFIER,
            "data='CIFAR-100'",
            "data='CIFAR-10'",
            'data is CIFAR100, the paper has CIFAR10',
        ),
        (CLASSIFIER, "model='ResNet18'", "model='VGG11'", '0 rows'),
        (CLASSIFIER, 'lr=0.05', 'damping=0.1, lr=0.05', 'damping is 0.1, the paper has 0.01'),
        (
            CLASSIFIER,
            'optim_wrapper = ',
            "train_dataloader = dict(dataset=dict(pipeline=[dict(type='Resize', scale=64)]))\n"
            'optim_wrapper = ',
            'image size is 64, the paper has 32',
        ),
        (CLASSIFIER, 'top1=80.23', 'top1=80.24', 'result is'),
    ],
)
def test_a_wrong_config_is_found(
    name: str, before: str, after: str, words: str, tmp_path: Path
) -> None:
    path = ROOT / f'configs/{name}.py'
    source = path.read_text()
    assert source.count(before) == 1
    wrong = tmp_path / path.name
    changed = source.replace(before, after)
    wrong.write_text(changed.replace("'../_base_/", f"'{ROOT}/configs/_base_/"))
    assert words in '; '.join(verify.differences(wrong))


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'configs/_base_').glob('*_cifar100.py')), ids=lambda path: path.stem
)
def test_shared_parts_of_cifar_change_network_schedule_and_size_alone(path: Path) -> None:
    base = 'mmpretrain::resnet/resnet50_8xb16_cifar100.py'
    theirs, ours = (
        verify.flat(plain(launch.load_config(name).to_dict())) for name in (base, str(path))
    )
    changed = [
        key
        for key in sorted(theirs.keys() | ours.keys())
        if ours.get(key) != theirs.get(key) and not key.startswith(('model.', 'param_scheduler.'))
    ]
    enlarged = [key for key in changed if key.endswith('pipeline')]
    assert [key for key in changed if key not in enlarged] == ['train_dataloader.batch_size']
    assert len(enlarged) == (5 if 'dense' in path.stem or 'google' in path.stem else 0)
    for key in enlarged:
        assert [step for step in ours[key] if step['type'] != 'Resize'] == theirs[key]


@pytest.mark.slow
def test_a_detector_builds_and_steps_at_its_real_size(tmp_path: Path) -> None:
    """The cheapest; `tools/paper/verify_configs.py` does all."""
    (path,) = (path for path in CONFIGS if path.stem == 'retinanet_swin-t-p4-w7_fpn_1x_coco_fsgd')
    data = verify.make_data(tmp_path, 1, 320)
    outcome = verify.take_steps(path, data, 1)
    assert outcome.problems == [] and len(outcome.seconds) == 1


@pytest.mark.parametrize(
    'name, layers',
    [
        ('vgg/vgg11bn_b128_cifar100_sgdph', '3 of 24'),
        ('resnet/resnet18_b128_cifar100_skfac', '21 of 21'),
    ],
)
def test_a_classifier_builds_and_steps_at_its_real_size(
    name: str, layers: str, tmp_path: Path
) -> None:
    data = verify.make_data(tmp_path, 3, 64)
    outcome = verify.take_steps(ROOT / f'configs/{name}.py', data, 3)
    assert outcome.problems == [] and outcome.layers == layers


def test_a_process_that_dies_costs_its_own_row_alone(tmp_path: Path) -> None:
    deadly = tmp_path / 'deadly.py'
    deadly.write_text(
        'import os\n_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"\nos._exit(9)\n'
    )
    outcome = verify.prove_alone(deadly, None, 1)
    assert outcome.problems == ['the process was killed: is there too little memory?']
    row = verify.page({'deadly': verify.row(deadly, outcome)}).splitlines()[-1].split('|')
    assert row[1].strip() == 'deadly' and row[2].strip() == outcome.problems[0]


def test_a_partial_run_keeps_the_rows_of_other_configs(tmp_path: Path) -> None:
    page = tmp_path / 'page.md'
    first, second, third = CONFIGS[:3]
    stepped = verify.Outcome([], [1.0, 2.0, 3.0], 4.0, '5 of 5', 'a note')
    rows = {second.stem: verify.row(second, stepped)}
    page.write_text(verify.page(rows | {third.stem: verify.row(third, verify.Outcome([], []))}))
    assert verify.known_rows(page) == rows  # those without steps are made anew
    command = [sys.executable, 'tools/paper/verify_configs.py', '--no-steps', '--out', str(page)]
    subprocess.run([*command, str(first)], cwd=ROOT, check=True, capture_output=True)
    assert list(verify.known_rows(page)) == [second.stem]
    assert first.stem in page.read_text() and '1.0, 2.0, 3.0' in page.read_text()


def test_the_index_is_up_to_date() -> None:
    from paper import make_index

    for path, text in make_index.files().items():
        assert path.read_text() == text, f'{path.name}: run python tools/paper/make_index.py'


def test_the_full_run_is_in_the_docs() -> None:
    found = re.findall(
        r'^\| (\S+_\S+) +\| ([^|]+?) +\| ([^|]+?) +\| ([^|]+?) +\|',
        (ROOT / 'docs/verified_configs.md').read_text(),
        flags=re.MULTILINE,
    )
    assert [name for name, *_ in found] == [path.stem for path in CONFIGS]
    assert {settings for _, settings, _, _ in found} == {'as they must be'}
    stepped = {name: layers for name, _, layers, seconds in found if seconds != '-'}
    assert all(layers != '-' or '_adamw' in name for name, layers in stepped.items())


def test_the_index_as_mim_reads_it() -> None:
    import yaml

    from paper import make_index

    names = []
    for file in yaml.safe_load((ROOT / 'model-index.yml').read_text())['Import']:
        content = yaml.safe_load((ROOT / file).read_text())
        collections = {collection['Name'] for collection in content['Collections']}
        for model in content['Models']:
            assert model['In Collection'] in collections and (ROOT / model['Config']).is_file()
            names.append(model['Name'])
    assert sorted(names) == sorted(path.stem for path in CONFIGS)
    run = make_index.metafile('mask_rcnn', [(CONFIGS[0], {}, dict(APb=40.2, APm=36.5))])
    assert yaml.safe_load(run)['Models'][0]['Results'] == [
        {'Task': 'Object Detection', 'Dataset': 'COCO', 'Metrics': {'box AP': 40.2}},
        {'Task': 'Instance Segmentation', 'Dataset': 'COCO', 'Metrics': {'mask AP': 36.5}},
    ]
    run = make_index.metafile('vgg', [(CONFIGS[0], dict(data='CIFAR-100'), dict(top1=70.1))])
    assert yaml.safe_load(run)['Models'][0]['Results'] == [
        {
            'Task': 'Image Classification',
            'Dataset': 'CIFAR-100',
            'Metrics': {'Top 1 Accuracy': 70.1},
        }
    ]


def test_configs_travel_with_the_package(tmp_path: Path) -> None:
    shipped = build_package(tmp_path)
    assert (shipped / 'model-index.yml').is_file()
    (hybrid,) = shipped.glob('configs/mask_rcnn/*_1x_coco_afopt-nkfac.py')
    assert verify.differences(hybrid) == []  # its own bases are with it
    (enlarged,) = shipped.glob('configs/googlenet/*cifar100_nkfac.py')
    assert verify.differences(enlarged) == []
    for path in CONFIGS:
        assert (shipped / path.relative_to(ROOT)).is_file()
