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
from paper.rows import OPTIMIZER_NAMES, WITHOUT_CONFIG, Row, all_rows, tables
from paper.verify_configs import FOLDERS, all_configs, base_of

#: A config's path, its `paper` entry, and our run.
Entry = tuple[Path, dict[str, Any], dict[str, Any]]
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
ABOUT_BASELINES = """\
All scores of classifiers, with the settings of each optimizer (learning rate, weight decay).
Optimizers of this package have configs above. To run another one, start the config in the first
column with `--optimizer NAME`, where NAME stands in brackets in the column's head, and give its
rates as `--cfg-options optim_wrapper.optimizer.lr=... optim_wrapper.optimizer.weight_decay=...`.
(Names with `pytorch_optimizer` need that package.) VGG19-noBN under SGDM takes
`model.backbone.conv_cfg=None` too. The thesis cites scores without settings from other papers. For
Swin Transformers, AdamW is MMPretrain's own config, which ours inherits."""
ABOUT_DETECTORS = """\
Baselines of the thesis's detectors. The configs are MMDetection's own."""
ABOUT_ABLATIONS = """\
Each row changes a config by `--cfg-options`. Put `optim_wrapper.optimizer.` before every setting
but `train_dataloader.batch_size`. Scores are the thesis's, with its seconds where it has them."""
#: Settings of ablations that are none of the optimizer's.
ELSEWHERE = {'batch_size': 'train_dataloader.batch_size'}
#: MIM's names of scores by our names.
METRICS = {
    'AP': ('Object Detection', 'box AP'),
    'APb': ('Object Detection', 'box AP'),
    'APm': ('Instance Segmentation', 'mask AP'),
    'top1': ('Image Classification', 'Top 1 Accuracy'),
}


def rows() -> Iterator[Entry]:
    """Yields each config's path, its `paper` entry and our run (or empty).

    The entry of hybrids has at most the data.
    """
    runs = json.loads(RUNS.read_text())
    for path in all_configs():
        paper = dict(launch.load_config(str(path)).get('paper') or {})
        if not paper and '_in1k_' in path.stem:
            paper['data'] = 'ImageNet'
        yield path, paper, runs.get(path.stem, {})


def metafile(folder: str, entries: list[Entry]) -> str:
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


def page(entries: list[Entry]) -> str:
    """Content of docs/configs.md."""
    lines = [
        '# Configs',
        '',
        'Made by `tools/paper/make_index.py`. Published scores are those of the thesis: AP on COCO',
        'val2017, or top-1 accuracy in per cent. Hybrids are ours and have none. "Ours" is empty',
        'until someone has run the config.',
        '',
    ]
    for folder in FOLDERS:
        cells = []
        for path, paper, run in entries:
            if path.parent.name != folder:
                continue
            optimizer = paper.get('optimizer') or _hybrid(path)
            source = f'table {paper["table"]}' if 'table' in paper else ''
            cells.append(
                (
                    f'`{path.stem}`',
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
            f'In `configs/{folder}/`:',
            '',
            markdown(('config', 'data', 'optimizer', 'thesis', 'published', 'ours'), cells),
            '',
        ]
    return '\n'.join([*lines, *compared_with(entries), *ablations(entries)])


def _hybrid(path: Path) -> str:
    """Methods and rule of a config that is none of the thesis's."""
    wrapper = launch.load_config(str(path)).optim_wrapper
    rule = wrapper.optimizer.get('rule', wrapper.optimizer).type
    return f'{wrapper.get("precondition", "AFOpt")}, {rule}'


def compared_with(entries: list[Entry]) -> list[str]:
    """Scores of classifiers under all optimizers, and MMDetection's own configs of detectors."""
    lines = ['## All scores of classifiers', '', ABOUT_BASELINES, '']
    for content in tables():
        if content['task'] == 'classification':
            lines += [*_classifiers(content, entries), '']
    keys = ('detector', 'backbone', 'schedule')
    detectors = [
        (
            next(
                base_of(path)
                for path, paper, _ in entries
                if all(paper.get(key) == row.name[key] for key in keys)
            ),
            row.name['optimizer'],
            rates(row),
            f'table {row.name["table"]}',
            scores(row.result),
        )
        for row in all_rows()
        if 'detector' in row.name and row.is_shipped
    ]
    titles = ('config', 'optimizer', 'lr, weight decay', 'thesis', 'published')
    return [
        *lines,
        '## Detectors of MMDetection',
        '',
        ABOUT_DETECTORS,
        '',
        markdown(titles, detectors),
        '',
    ]


def _classifiers(content: dict[str, Any], entries: list[Entry]) -> list[str]:
    """One table of classifiers: networks by rows, optimizers by columns."""
    own = [row for row in all_rows() if row.name['table'] == content['table']]
    columns = list(dict.fromkeys(row.name['optimizer'] for row in own))
    heads = [
        f'{name} ({OPTIMIZER_NAMES[name]})' if name in OPTIMIZER_NAMES else name for name in columns
    ]
    cells = []
    for data, model, _ in content['rows']:
        found = {
            row.name['optimizer']: row
            for row in own
            if (row.name['data'], row.name['model']) == (data, model)
        }
        config = starting_point(next(iter(found.values())), entries).stem
        scored = [_score(found[name]) if name in found else '-' for name in columns]
        cells.append((config, data, model, *scored))
        stated = [rates(found[name]) if name in found else '-' for name in columns]
        cells.append(('', '', 'lr, decay', *stated))
    cells = [
        cell
        for k, cell in enumerate(cells)
        if k % 2 == 0 or k + 2 >= len(cells) or cell != cells[k + 2]
    ]  # settings stand below the last of the networks that share them
    training = ', '.join(
        f'{title} {content[key]}'
        for title, key in (
            ('epochs', 'epochs'),
            ('batch', 'batch_size'),
            ('schedule', 'schedule'),
            ('image size', 'image_size'),
        )
        if key in content
    )
    note = f'. {content["note"][0].upper() + content["note"][1:]}.' if 'note' in content else '.'
    return [
        f'Table {content["table"]} (section {content["section"]}): {training}{note}',
        '',
        markdown(('config', 'data', 'network', *heads), cells),
    ]


def _score(row: Row) -> str:
    """Top-1 accuracy, with the standard deviation if there is one."""
    return f'{row.result["top1"]}' + ('' if row.std is None else f'±{row.std}')


def rates(row: Row) -> str:
    """Learning rate and weight decay of a row, or '-'."""
    keys = ('lr', 'weight_decay')
    return ', '.join(f'{row.optimizer[key]:g}' for key in keys if key in row.optimizer) or '-'


def starting_point(row: Row, entries: list[Entry]) -> Path:
    """First config with the row's table, data and network."""
    keys = [key for key in ('table', 'data', 'model') if key in row.name]
    return next(
        path for path, paper, _ in entries if all(paper.get(key) == row.name[key] for key in keys)
    )


def ablations(entries: list[Entry]) -> list[str]:
    """Ablations of the thesis as settings of configs, with their published scores."""
    cells = []
    for number, path, settings, row in ablation_rows(entries):
        words = ' '.join(f'{ELSEWHERE.get(key, key)}={value}' for key, value in settings.items())
        score = '±'.join(map(str, row['top1'])) if 'top1' in row else scores(row['result'])
        seconds = f', {row["seconds"][0]} s' if 'seconds' in row else ''
        cells.append((number, path.stem, words or 'as it is', f'{score}{seconds}'))
    reasons = [f'- {place}: {reason}.' for place, reason in WITHOUT_CONFIG.values()]
    return [
        '## Ablations',
        '',
        ABOUT_ABLATIONS,
        '',
        markdown(('table', 'config', 'settings', 'published'), cells),
        '',
        'Results without a config:',
        '',
        *reasons,
        '',
    ]


def ablation_rows(
    entries: list[Entry],
) -> Iterator[tuple[str, Path, dict[str, Any], dict[str, Any]]]:
    """Yields each row of an ablation: number of the table, config, settings, and the row itself."""
    for content in tables():
        if content['task'] != 'ablation':
            continue
        for row in content['rows']:
            wanted = content['of'] | row.get('of', {})
            (path,) = (
                path
                for path, paper, _ in entries
                if {key: value for key, value in paper.items() if key != 'result'} == wanted
            )
            yield content['table'], path, row['settings'], row


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
