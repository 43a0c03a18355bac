"""The embedded shapes data set: reuse, refusal, interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from mmprecond.datasets import render_image, shapes, writer
from tests.support.shapes import digests, make, make_folders


def modified(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob('*') if path.is_file()}


@pytest.mark.parametrize('maker', [make, make_folders])
def test_complete_set_is_reused(tmp_path: Path, maker: Any) -> None:
    maker(tmp_path)
    before = modified(tmp_path)
    maker(tmp_path)
    maker(tmp_path, overwrite=True)  # nothing to replace: the arguments are the same
    assert modified(tmp_path) == before


@pytest.mark.parametrize('maker', [make, make_folders])
def test_other_arguments_are_refused_unless_overwrite(tmp_path: Path, maker: Any) -> None:
    maker(tmp_path / 'a', images=9)
    before = digests(tmp_path / 'a')
    with pytest.raises(ValueError, match=r'holds another set .*images=9.*overwrite=True'):
        maker(tmp_path / 'a', images=5)
    assert digests(tmp_path / 'a') == before
    maker(tmp_path / 'a', images=5, overwrite=True)
    assert digests(tmp_path / 'a') == digests(maker(tmp_path / 'b', images=5))


def test_older_render_version_is_another_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    newer = dataclasses.replace(shapes.SHAPES, version=shapes.SHAPES.version + 1)
    monkeypatch.setattr(shapes, 'SHAPES', newer)
    with pytest.raises(ValueError, match=r'holds another set \(version=1'):
        make(tmp_path)


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    make(tmp_path / 'a')
    with pytest.raises(ValueError, match='kind=coco'):
        make_folders(tmp_path / 'a')
    make_folders(tmp_path / 'a', overwrite=True)
    assert not (tmp_path / 'a' / 'annotations' / 'train.json').exists()
    assert digests(tmp_path / 'a') == digests(make_folders(tmp_path / 'b'))


@pytest.mark.parametrize('images', [4, 2])
def test_interrupted_set_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    calls = 0

    def stop(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return render_image(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, 'render_image', stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / 'a')
    assert len(list((tmp_path / 'a' / 'train').iterdir())) == 3
    assert not (tmp_path / 'a' / 'annotations' / 'train.json').exists()
    # The same arguments or others: half a set is in nobody's way, and nothing of it stays.
    make(tmp_path / 'a', images=images)
    assert digests(tmp_path / 'a') == digests(make(tmp_path / 'b', images=images))


def test_interrupted_overwrite_leaves_no_stale_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)

    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, 'render_image', stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, seed=1, overwrite=True)
    assert not (tmp_path / 'annotations' / 'train.json').exists()


@pytest.mark.parametrize('lost', ['train/000002.png', 'annotations/train.json'])
def test_set_with_a_lost_file_is_made_again(tmp_path: Path, lost: str) -> None:
    make(tmp_path)
    before = digests(tmp_path)
    (tmp_path / lost).unlink()
    make(tmp_path)
    assert digests(tmp_path) == before


def test_json_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'a.json'
    writer.write_json(path, {'old': 1})

    def full(*args: Any) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(writer.os, 'replace', full)
    with pytest.raises(OSError, match='No space'):
        writer.write_json(path, {'new': 2})
    assert json.loads(path.read_text()) == {'old': 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('place', ['train/000000.png', 'annotations/train.json', 'train.meta.json'])
@pytest.mark.parametrize('content', ['{}', '[1]', 'not json'])
def test_files_of_others_are_never_touched(tmp_path: Path, place: str, content: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(content)
    before = digests(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match='was not written by make_shapes'):
            make(tmp_path, overwrite=overwrite)
    assert digests(tmp_path) == before


def test_overwrite_keeps_added_files(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / 'train' / 'notes.txt').write_text('mine')
    make(tmp_path, images=2, overwrite=True)
    assert sorted(path.name for path in (tmp_path / 'train').iterdir()) == [
        '000000.png',
        '000001.png',
        'notes.txt',
    ]
