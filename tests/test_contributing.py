"""The recipes of CONTRIBUTING.md, followed."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TEXT = (ROOT / 'CONTRIBUTING.md').read_text()
EXAMPLES = dict(re.findall(r'```python\n# example: ([^\n]+)\n(.*?)```', TEXT, flags=re.DOTALL))


@pytest.mark.usefixtures('registries_as_they_were')
@pytest.mark.parametrize('name', ['preconditioner', 'rule', 'layer', 'attention'])
def test_a_recipe_works_as_it_stands(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f'recipe_{name}'
    (tmp_path / f'{module}.py').write_text(EXAMPLES[name])
    monkeypatch.syspath_prepend(tmp_path)
    space = vars(importlib.import_module(module))
    exec(compile(EXAMPLES[f'{name} test'], f'{name} test', 'exec', dont_inherit=True), space)


def test_rooms_and_files_are_those_that_there_are() -> None:
    package = ROOT / 'mmprecond'
    rooms = {
        path.name for path in package.iterdir() if path.is_dir() and path.name != '__pycache__'
    }
    table = TEXT[TEXT.index('| subpackage |') : TEXT.index('Beside the package')]
    assert set(re.findall(r'`(\w+)/`', table)) == rooms
    beside = TEXT[TEXT.index('Beside the package') : TEXT.index("NKFAC's mathematics")]
    folders = re.findall(r'`(\w[\w/]*)/`', beside)
    assert len(folders) >= 9 and all((ROOT / folder).is_dir() for folder in folders)
    for name in re.findall(
        r'`((?:mmprecond|curvature|core|preconditioners|optimizers|rules|linalg|'
        r'tests|docs)/[\w/]+\.(?:py|md))`',
        TEXT,
    ):
        found = [ROOT / name, package / name]
        assert any(path.is_file() for path in found) or 'input_scale' in name, name
