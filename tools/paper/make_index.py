"""Writes the indexes of configs: model-index.yml and metafile.yml for MIM, and docs/configs.md.

Our own runs come from configs/our_runs.json, by config name: {"NAME": {"AP": 39.6, ...}}. The
published figures are those of the thesis. They appear on the page, but not in the metafiles, which
are for our own runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mmprecond.engine import launch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import ROOT
from common.tables import markdown
from paper.rows import INTERVALS, ROWS, Row, baselines, toolbox_rows
from paper.verify_configs import FOLDERS, all_configs, base_of

RUNS = ROOT / 'configs/our_runs.json'
TITLES = {
    'faster_rcnn': 'Faster R-CNN',
    'mask_rcnn': 'Mask R-CNN',
    'retinanet': 'RetinaNet',
    'densenet': 'DenseNet',
    'googlenet': 'GoogLeNet',
    'resnet': 'ResNet',
    'swin_transformer': 'Swin Transformer',
    'vgg': 'VGG',
}
THESIS = dict(
    Title='Designing Effective Preconditioned Optimizers for Deep Neural Network '
    'Training (Ying Sun, PhD thesis, The Hong Kong Polytechnic University, 2024)'
)
#: Ablations of the thesis: the config, and the varied settings.
ABLATIONS = {
    'nkfac_damping': ('resnet50_b128_cifar100_nkfac', ('damping',)),
    'nkfac_stat_decay': ('resnet50_b128_cifar100_nkfac', ('stat_decay',)),
    'nkfac_newton_steps': ('resnet50_b128_cifar100_nkfac', ('newton_steps',)),
    'adamr_intervals': ('resnet50_b128_cifar100_adamr', INTERVALS),
    'afopt_damping': ('retinanet_swin-t-p4-w7_fpn_1x_coco_afopt', ('damping',)),
    'afopt_intervals': ('retinanet_swin-t-p4-w7_fpn_1x_coco_afopt', INTERVALS),
}
ABOUT_DETECTORS = """\
MMDetection's own configs, with what the thesis has for them. The AdamW rows of ResNet detectors and
of Swin-T's 2x schedule are among ours, above."""
ABOUT_CLASSIFIERS = """\
Classifiers: one of our configs with `--optimizer SGD` or `AdamW` for `tools/train.py`, and
`optim_wrapper.optimizer.lr=... optim_wrapper.optimizer.weight_decay=...` after `--cfg-options`;
VGG19-noBN under SGDM takes `model.backbone.conv_cfg=None` too. The thesis has no rates for those of
Mini-ImageNet. Its Swin Transformers' AdamW is that of the configs of MMPretrain that ours name."""
#: MIM's names of scores by our names.
METRICS = {
    'AP': ('Object Detection', 'box AP'),
    'APb': ('Object Detection', 'box AP'),
    'APm': ('Instance Segmentation', 'mask AP'),
    'top1': ('Image Classification', 'Top 1 Accuracy'),
}


def rows() -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """Yields each config's path, its `paper` entry and our run (or empty).

    The entry of hybrids has at most the data.
    """
    runs = json.loads(RUNS.read_text())
    for path in all_configs():
        paper = dict(launch.load_config(str(path)).get('paper') or {})
        if not paper and '_in1k_' in path.stem:
            paper['data'] = 'ImageNet'
        yield path, paper, runs.get(path.stem, {})


def metafile(folder: str, entries: list[tuple[Path, dict[str, Any], dict[str, Any]]]) -> str:
    """Content of a folder's metafile."""
    collection = f'{TITLES[folder]}, preconditioned'
    models = []
    for path, paper, run in entries:
        model: dict[str, Any] = {
            'Name': path.stem,
            'In Collection': collection,
            'Config': str(path.relative_to(ROOT)),
        }
        if run:
            model['Results'] = [
                {
                    'Task': METRICS[key][0],
                    'Dataset': data_of(paper),
                    'Metrics': {METRICS[key][1]: value},
                }
                for key, value in run.items()
                if key in METRICS
            ]
        models.append(model)
    data = sorted({data_of(paper) for _, paper, _ in entries})
    content = {
        'Collections': [
            {
                'Name': collection,
                'Paper': THESIS,
                'Metadata': {'Training Data': data if data[1:] else data[0]},
            }
        ],
        'Models': models,
    }
    return str(yaml.safe_dump(content, sort_keys=False, width=100))


def data_of(paper: dict[str, Any]) -> str:
    """Name of a config's data set, by its `paper` entry."""
    return str(paper.get('data', 'COCO'))


def page(entries: list[tuple[Path, dict[str, Any], dict[str, Any]]]) -> str:
    """Content of docs/configs.md."""
    lines = [
        '# Configs',
        '',
        'Made by `tools/paper/make_index.py`. Published figures are those of the thesis: COCO',
        'val2017, and top-1 accuracy in per cent. Hybrids are ours and have none. "Ours" is',
        'empty until someone has run the config.',
        '',
    ]
    for folder in FOLDERS:
        cells = []
        for path, paper, run in entries:
            if path.parent.name != folder:
                continue
            optimizer = paper.get('optimizer') or _hybrid(path)
            source = ' '.join(f'{key} {paper[key]}' for key in ('table', 'chapter') if key in paper)
            cells.append(
                (
                    f'[{path.stem}](../{path.relative_to(ROOT)})',
                    data_of(paper),
                    optimizer,
                    source,
                    scores(paper.get('result', {})),
                    scores(run),
                )
            )
        lines += [
            f'## {TITLES[folder]}',
            '',
            markdown(('config', 'data', 'optimizer', 'thesis', 'published', 'ours'), cells),
            '',
        ]
    lines += compared_with(entries)
    return '\n'.join(lines + ablations())


def _hybrid(path: Path) -> str:
    """Methods and rule of a config that is none of the thesis's."""
    wrapper = launch.load_config(str(path)).optim_wrapper
    rule = wrapper.optimizer.get('rule', wrapper.optimizer).type
    return f'{wrapper.get("precondition", "AFOpt")}, {rule}'


def compared_with(entries: list[tuple[Path, dict[str, Any], dict[str, Any]]]) -> list[str]:
    """First-order rows of the tables: MMDetection's configs, or our settings."""
    keys = ('detector', 'backbone', 'schedule')
    detectors = []
    for toolbox_row in toolbox_rows():
        base = next(
            base_of(path)
            for path, paper, _ in entries
            if all(paper.get(key) == toolbox_row[key] for key in keys)
        )
        detectors.append(
            (
                base,
                toolbox_row['optimizer'],
                f'{toolbox_row["lr"]:g}, {toolbox_row["weight_decay"]:g}',
                f'table {toolbox_row["table"]}',
                scores(toolbox_row['result']),
            )
        )
    classifiers, seen = [], []
    for row in baselines():
        if (key := (row.name | {'chapter': None}, row.result)) in seen:
            continue  # chapters 2 and 4 share some
        seen.append(key)
        rate = ', '.join(f'{row.optimizer[key]:g}' for key in ('lr', 'weight_decay'))
        classifiers.append(
            (
                row.name['data'],
                row.name['model'],
                row.name['optimizer'],
                starting_point(row, entries).stem,
                '-' if 'nan' in rate else rate,
                scores(row.result or {}),
            )
        )
    return [
        '## Baselines',
        '',
        ABOUT_DETECTORS,
        '',
        markdown(('config', 'optimizer', 'lr, weight decay', 'thesis', 'published'), detectors),
        '',
        ABOUT_CLASSIFIERS,
        '',
        markdown(
            ('data', 'network', 'optimizer', 'from', 'lr, weight decay', 'published'), classifiers
        ),
        '',
    ]


def starting_point(row: Row, entries: list[tuple[Path, dict[str, Any], dict[str, Any]]]) -> Path:
    """First config with the row's data, network and, if the row has one, chapter."""
    criteria = {key: row.name[key] for key in ('data', 'model', 'chapter') if row.name[key]}
    return next(
        path
        for path, paper, _ in entries
        if all(paper.get(key) == value for key, value in criteria.items())
    )


def ablations() -> list[str]:
    """Ablations of the thesis as settings of configs, with their published scores."""
    published = json.loads(ROWS.read_text())['ablations']
    cells = []
    for name, (config, keys) in ABLATIONS.items():
        entry = published[name]
        rows = [
            ' '.join(f'{key}={value}' for key, value in zip(keys, setting.split('/'), strict=True))
            + f': {score}'
            for setting, score in next(entry[k] for k in ('AP', 'acc') if k in entry).items()
        ]
        cells.append((entry['table'], config, ', '.join(rows)))
    return [
        '## Ablations',
        '',
        "Settings of the thesis's ablations, for `--cfg-options` with "
        '`optim_wrapper.optimizer.` before each,',
        'and its scores. (Tables 3.14 and 3.15, '
        'another step size of the Newton iteration, have no setting here.)',
        '',
        markdown(('table', 'config', 'settings: score'), cells),
        '',
    ]


def scores(result: dict[str, float]) -> str:
    """Headline scores of a row."""
    masks = 'APb' in result
    names = {'APb': 'box', 'APm': 'mask'} if masks else {'AP': 'box', 'top1': 'top-1'}
    return ', '.join(f'{title} {result[name]}' for name, title in names.items() if name in result)


def files() -> dict[Path, str]:
    """Contents of all files to write, by path."""
    entries = list(rows())
    metafiles = {
        ROOT / 'configs' / folder / 'metafile.yml': metafile(
            folder, [entry for entry in entries if entry[0].parent.name == folder]
        )
        for folder in FOLDERS
    }
    index = {'Import': [str(path.relative_to(ROOT)) for path in metafiles]}
    return {
        **metafiles,
        ROOT / 'model-index.yml': str(yaml.safe_dump(index)),
        ROOT / 'docs/configs.md': page(entries),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='only say what is out of date')
    check = parser.parse_args().check
    stale = [
        path for path, text in files().items() if not path.exists() or path.read_text() != text
    ]
    if check and stale:
        sys.exit(
            'out of date, run python tools/paper/make_index.py: '
            + ', '.join(str(path.relative_to(ROOT)) for path in stale)
        )
    for path, text in files().items() if stale else ():
        path.write_text(text)
    print(f'{len(stale)} files written' if stale else 'all up to date')


if __name__ == '__main__':
    main()
