"""The embedded shapes data set: contents, determinism, errors, command line."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.paths import TOOLS
from tests.support.shapes import digests, make, make_folders

pytest.importorskip('PIL')
COCO = pytest.importorskip('pycocotools.coco').COCO
hypothesis = pytest.importorskip('hypothesis')

from hypothesis import strategies as st  # noqa: E402
from PIL import Image  # noqa: E402

from mmprecond.datasets import (  # noqa: E402
    CLASSES,
    PALETTE,
    make_shapes,
    render,
    render_image,
)

TOOL = TOOLS / 'make_shapes.py'


def read(root: Path, split: str = 'train') -> Any:
    return json.loads((root / 'annotations' / f'{split}.json').read_text())


def check_annotation(annotation: dict[str, Any], size: int) -> None:
    x, y, width, height = annotation['bbox']
    assert x >= 0 and y >= 0 and x + width <= size and y + height <= size
    assert width >= 1 and height >= 1
    assert 1 <= annotation['category_id'] <= len(CLASSES)
    assert annotation['iscrowd'] == 0
    (flat,) = annotation['segmentation']
    assert len(flat) >= 6 and len(flat) % 2 == 0
    assert 0 < annotation['area'] <= width * height
    # Exact, not close: the vertices lie on a binary grid.
    assert [min(flat[0::2]), min(flat[1::2])] == [x, y]
    assert [max(flat[0::2]), max(flat[1::2])] == [x + width, y + height]


# Contents


def test_opens_in_pycocotools_and_masks_agree(tmp_path: Path) -> None:
    size = 160
    make(tmp_path, images=12, size=size)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / 'annotations' / 'train.json'))
    assert [coco.cats[number]['name'] for number in sorted(coco.cats)] == list(CLASSES)
    assert len(coco.imgs) == 12 and len(coco.anns) > 24
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation).astype(bool)
        assert mask.shape == (size, size)
        flat = np.asarray(annotation['segmentation'][0]).reshape(-1, 2)
        length = np.linalg.norm(flat - np.roll(flat, 1, axis=0), axis=1).sum()
        # Rounding to whole pixels moves the outline, by 0.2 pixels at the worst seen.
        assert abs(mask.sum() - annotation['area']) <= 0.3 * length
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, width, height = annotation['bbox']
        # A sharp tip is narrower than a pixel before it ends, so up to 2 pixels.
        edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert np.abs(np.subtract(edges, [x, y, x + width, y + height])).max() <= 2
        # What was painted is what the polygon says.
        painted = render._coverage(flat, size) >= 0.5
        assert (painted & mask).sum() >= 0.85 * (painted | mask).sum()


def test_coco_keys_ids_and_files(tmp_path: Path) -> None:
    assert make(str(tmp_path), split='val') == tmp_path  # type: ignore[arg-type]
    content = read(tmp_path, 'val')
    assert set(content) == {'info', 'licenses', 'categories', 'images', 'annotations'}
    assert [entry['id'] for entry in content['categories']] == [1, 2, 3, 4]
    assert [entry['name'] for entry in content['categories']] == list(CLASSES)
    ids = [annotation['id'] for annotation in content['annotations']]
    assert len(set(ids)) == len(ids) and min(ids) == 1
    known = {entry['id'] for entry in content['images']}
    assert {annotation['image_id'] for annotation in content['annotations']} == known
    for entry in content['images']:
        with Image.open(tmp_path / 'val' / entry['file_name']) as image:
            assert (image.mode, image.size) == ('RGB', (entry['width'], entry['height']))
    for annotation in content['annotations']:
        check_annotation(annotation, 64)
    assert len(PALETTE) == len(CLASSES) and len(set(PALETTE)) == len(PALETTE)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
@hypothesis.given(size=st.integers(32, 200), seed=st.integers(0, 2**32 - 1))
def test_any_image_has_valid_annotations(size: int, seed: int) -> None:
    image, annotations = render_image(np.random.default_rng(seed), size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    assert 1 <= len(annotations) <= 8
    for annotation in annotations:
        check_annotation(annotation, size)


def test_sizes_classes_and_counts_are_spread() -> None:
    found = [render_image(np.random.default_rng(seed), 160)[1] for seed in range(60)]
    every = [annotation for annotations in found for annotation in annotations]
    sides = [min(annotation['bbox'][2:]) for annotation in every]
    assert min(sides) < 0.16 * 160 and max(sides) > 0.5 * 160
    counts = np.bincount([annotation['category_id'] for annotation in every])[1:]
    assert len(counts) == len(CLASSES) and counts.min() > 0.15 * len(every)
    assert {len(annotations) for annotations in found} >= {1, 2, 3, 4, 5}


def test_a_hidden_shape_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paint every shape at one place: only the last one can be seen."""
    square = np.array([[10.0, 10.0], [40.0, 10.0], [40.0, 40.0], [10.0, 40.0]])
    monkeypatch.setattr(render, '_polygon', lambda *args: square)
    assert len(render_image(np.random.default_rng(0), 64)[1]) == 1
    # Each one shifted by 30 % of its side: 30 % of each stays in sight, so all are kept.
    polygons = iter(square - 9 + [9.0 * k, 0.0] for k in range(9))
    monkeypatch.setattr(render, '_polygon', lambda *args: next(polygons))
    _, annotations = render_image(np.random.default_rng(0), 128)
    assert len(annotations) == 9 - len(list(polygons)) > 1


def test_a_clipped_shape_stays_inside() -> None:
    square = render._polygon(1, np.array([2.0, 32.0]), 20.0, 0.0, 64)
    annotation = render._annotation(1, square)
    check_annotation(annotation, 64)
    side = 20 / np.sqrt(2)
    assert annotation['bbox'] == pytest.approx([0, 32 - side / 2, 2 + side / 2, side], abs=0.1)
    assert annotation['area'] == pytest.approx((2 + side / 2) * side, rel=0.02)


# Determinism


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        make(tmp_path / name, seed=seed) for name, seed in (('a', 3), ('b', 3), ('c', 4))
    )
    assert digests(first) == digests(second)
    a, c = digests(first), digests(other)
    assert a.keys() == c.keys() and all(a[name] != c[name] for name in a)


def test_splits_differ(tmp_path: Path) -> None:
    make(tmp_path, split='train')
    make(tmp_path, split='val')
    found = digests(tmp_path)
    assert found['train/000000.png'] != found['val/000000.png']


def test_image_k_does_not_depend_on_the_number(tmp_path: Path) -> None:
    few, many = make(tmp_path / 'few', images=2), make(tmp_path / 'many', images=5)
    a, b = digests(few / 'train'), digests(many / 'train')
    assert len(a) == 2 and a.items() <= b.items()
    annotations = read(few)['annotations']
    assert annotations == read(many)['annotations'][: len(annotations)]


# Errors


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'images': 0}, 'images=0: write a whole number from 1 '),
        ({'images': 2.5}, 'images=2.5: write a whole number'),
        ({'size': 31}, 'size=31: write a whole number from 32 '),
        ({'seed': -1}, 'seed=-1: write a whole number from 0 '),
        ({'seed': 2**32}, 'seed=4294967296: write a whole number from 0 to 4294967295'),
        ({'split': 'a/b'}, "split='a/b' cannot name a folder here: write a word such as 'train'"),
        ({'split': ''}, "split='' cannot name"),
        ({'split': 'annotations'}, "split='annotations' cannot name"),
    ],
)
def test_bad_arguments(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make(tmp_path / 'a', **kwargs)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'a').exists()


def test_folders_need_an_image_per_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='images=3: write a whole number from 4 '):
        make_folders(tmp_path, images=3)


@pytest.mark.parametrize(
    ('file', 'out'), [('a', 'a'), ('a', 'a/b'), ('a/train', 'a'), ('a/annotations', 'a')]
)
def test_file_in_the_place_of_a_folder(tmp_path: Path, file: str, out: str) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('')
    with pytest.raises(ValueError, match=re.escape(f'{tmp_path / file} is a file: write')):
        make(tmp_path / out)


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'tqdm', None)  # None makes the import fail
    make_shapes(tmp_path / 'a', 1, 32)  # no bar, but no error
    monkeypatch.setitem(sys.modules, 'PIL.Image', None)
    with pytest.raises(ImportError, match='pip install pillow') as caught:
        make(tmp_path / 'b')
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'b').exists()


# Classification


def test_class_folders(tmp_path: Path) -> None:
    make_folders(tmp_path, images=10)
    found = {
        name: sorted(path.name for path in (tmp_path / 'train' / name).iterdir())
        for name in CLASSES
    }
    assert [len(found[name]) for name in CLASSES] == [3, 3, 2, 2]
    assert found['star'] == ['000000.png', '000001.png']
    assert sorted(path.name for path in (tmp_path / 'train').iterdir()) == sorted(CLASSES)
    assert len(set(digests(tmp_path / 'train').values())) == 10
    with Image.open(tmp_path / 'train' / 'star' / '000001.png') as image:
        assert (image.mode, image.size) == ('RGB', (32, 32))


def test_class_folders_are_deterministic(tmp_path: Path) -> None:
    a, b, few = (
        make_folders(tmp_path / name, images=images, seed=5)
        for name, images in (('a', 9), ('b', 9), ('few', 6))
    )
    other = make_folders(tmp_path / 'other', images=9, seed=6)
    assert digests(a) == digests(b)
    assert digests(few / 'train').items() < digests(a / 'train').items()
    assert not set(digests(a / 'train').values()) & set(digests(other / 'train').values())


# Command line


def run(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_command_makes_a_set_from_any_folder(tmp_path: Path) -> None:
    made = run(tmp_path, 'new/a', '--images', '3', '--size', '64', '--seed', '7', '--split', 'val')
    assert made.returncode == 0, made.stderr
    assert '3/3' in made.stderr  # the progress bar
    assert 'new/a/annotations/val.json' in made.stdout
    same = make_shapes(tmp_path / 'b', 3, 64, 7, 'val', progress=False)
    assert digests(tmp_path / 'new' / 'a') == digests(same)


def test_command_refuses_in_one_line(tmp_path: Path) -> None:
    failed = run(tmp_path, 'a', '--size', '8')
    assert failed.returncode == 2
    assert failed.stderr == 'make_shapes.py: size=8: write a whole number from 32 to 8192\n'


def test_command_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which saves the time to start another."""
    monkeypatch.syspath_prepend(str(TOOL.parent))
    main = importlib.import_module('make_shapes').main
    out = str(tmp_path / 'a')
    assert main([out, '--classification', '--images', '4']) == 0
    assert (tmp_path / 'a' / 'train' / 'star' / '000000.png').exists()
    assert main([out, '--classification', '--images', '5']) == 2
    assert '--overwrite' in capsys.readouterr().err.splitlines()[-1]
    assert main([out, '--classification', '--images', '5', '--overwrite']) == 0
    capsys.readouterr()
    for wrong in (['--images', 'many', out], [], [out, '--unknown']):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
