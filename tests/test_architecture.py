"""Rooms of the package: which may import which, and what no module does to another."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import PACKAGE, ROOT

#: From the ground up; a room imports from itself and from rooms before it.
ROOMS = (
    'version',
    'checks',
    'graph',
    'resources',
    'linalg',
    'distributed',
    'curvature',
    'preconditioners',
    'rules',
    'surgery',
    'core',
    'second_order',
    'optimizers',
    'loss_surface',
    'engine',
    'datasets',
    'testing',
    'diagnostics',
    'landscape',
    'cli',
    '__init__',
)
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob('*.py'))

#: Attributes of other objects that may be set: of torch's and MMEngine's, which have no other way.
FOREIGN = {
    'grad',
    'fp32_precision',
    'original0',
    'custom_hooks',
    'work_dir',
    'launcher',
    'model_wrapper_cfg',
    'data_preprocessor',
    'track_running_stats',
}


#: Rooms whose functions may take an optimizer.
TAKERS = ('optimizers', 'loss_surface', 'engine', 'testing', 'diagnostics', 'landscape')


def room_of(path: Path) -> str:
    return path.parts[0].removesuffix('.py')


def imports_of(path: Path, source: str) -> Iterator[tuple[str, ...]]:
    """Modules of the package that a file imports, for type checking too, as parts."""
    here = path.with_suffix('').parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split('.')
                if parts[0] == 'mmprecond':
                    yield tuple(parts[1:])
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split('.')) if node.module else ()
            if node.level:
                base = here[: len(here) - node.level]
                names = [(a.name,) for a in node.names] if not (base or module) else [()]
                yield from (base + module + name for name in names)
            elif module[:1] == ('mmprecond',):
                yield from (module[1:] or (a.name,) for a in node.names)


def wrong_imports(path: Path, source: str) -> list[str]:
    """Rooms above its own that a file imports from."""
    own = ROOMS.index(room_of(path))
    return [
        room[0]
        for room in imports_of(path, source)
        if room and room[0] in ROOMS and ROOMS.index(room[0]) > own
    ]


@pytest.mark.parametrize('path', FILES, ids=str)
def test_arrows_point_down(path: Path) -> None:
    assert room_of(path) in ROOMS
    assert wrong_imports(path, (PACKAGE / path).read_text()) == []


@pytest.mark.parametrize(
    'source, found',
    [
        ('from ..core import Curvature', ['core']),
        ('from mmprecond.optimizers import NKFAC', ['optimizers']),
        ('if TYPE_CHECKING:\n    from ..core.stack import LayerStack', ['core']),
        ('import mmprecond.engine', ['engine']),
        ('from .. import optimizers', ['optimizers']),
        ('from ..linalg import Dense', []),
        ('from .base import Preconditioner', []),
        ('from torch import optimizers', []),
    ],
)
def test_a_wrong_arrow_is_found(source: str, found: list[str]) -> None:
    assert wrong_imports(Path('preconditioners/some.py'), source) == found


def foreign_settings(source: str) -> list[str]:
    """Attributes that are set on other objects than a method's own, and calls of setattr."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, (ast.AugAssign, ast.AnnAssign))
            else []
        )
        for target in targets:
            for part in ast.walk(target):
                if (
                    isinstance(part, ast.Attribute)
                    and isinstance(part.ctx, ast.Store)
                    and not (isinstance(part.value, ast.Name) and part.value.id == 'self')
                ):
                    found.append(ast.unparse(part))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            'setattr',
            'object.__setattr__',
        ):
            first = ast.unparse(node.args[0])
            found += [] if first == 'self' else [f'setattr({first})']
    return found


@pytest.mark.parametrize('path', FILES, ids=str)
def test_no_module_sets_attributes_of_another_object(path: Path) -> None:
    found = foreign_settings((PACKAGE / path).read_text())
    assert [one for one in found if one.split('.')[-1] not in FOREIGN] == []


def test_a_foreign_setting_is_found() -> None:
    assert foreign_settings('self.x = 1\nlayer.rank = 2\na.b.c += 1\nsetattr(layer, k, v)') == [
        'layer.rank',
        'a.b.c',
        'setattr(layer)',
    ]


@pytest.mark.parametrize(
    'path',
    [p for p in FILES if room_of(p) not in TAKERS],
    ids=str,
)
def test_only_optimizers_and_the_engine_take_an_optimizer(path: Path) -> None:
    tree = ast.parse((PACKAGE / path).read_text())
    taken = [
        f'{node.name}({argument.arg})'
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.arg == 'optimizer'
        or 'Optimizer' in ast.unparse(argument.annotation or ast.Constant(''))
    ]
    assert taken == []


@pytest.mark.parametrize(
    'path',
    [
        p
        for p in FILES
        if room_of(p) in ('linalg', 'curvature', 'preconditioners', 'rules', 'core', 'optimizers')
    ],
    ids=str,
)
def test_nothing_is_read_out_of_names(path: Path) -> None:
    """What a statistic or an operator is, its type says."""
    source = (PACKAGE / path).read_text()
    assert not [
        line
        for line in source.splitlines()
        if '.endswith(' in line or '.startswith(' in line or "' in name" in line
    ]


@pytest.mark.parametrize('folder', ['mmprecond', 'tools', 'tests'])
def test_files_are_short(folder: str) -> None:
    long = {
        str(path): count
        for path in (ROOT / folder).rglob('*.py')
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


#: Private members of torch and MMEngine that are used, as there is no public way.
BORROWED = {
    '_foreach',
    '_C',
    '_current_graph_task_id',
    '_utils',
    '_python_dispatch',
    '_compile',
    '_orig_mod',
    '_parameters',
    '_base',
    '_get_scale_async',
    '_ext',
    '_execution_engine',
    '_autograd',
    '_are_functorch_transforms_active',
    '_get_current_graph_task_keep_graph',
    '_version',
    '_accumulative_counts',
    '_scope_',
    '_forward_hooks',
    '_forward_pre_hooks',
}


@pytest.mark.parametrize(
    'path',
    [
        *FILES,
        *(
            Path('..') / path.relative_to(ROOT)
            for path in sorted((PACKAGE.parent / 'tools').rglob('*.py'))
        ),
    ],
    ids=str,
)
def test_no_private_member_is_used_across_modules(path: Path) -> None:
    """Of objects: what a class keeps to itself. Of modules: what they do not export."""
    tree = ast.parse((PACKAGE / path).read_text())
    own = {
        node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    own |= {
        part.attr
        for node in ast.walk(tree)
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.value, ast.Name)
        and part.value.id == 'self'
    }
    used = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith('_')
        and not node.attr.startswith('__')
        and node.attr not in own
        and not any(node.attr.startswith(name) for name in BORROWED)
    ]
    imported = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.level or (node.module or '').startswith('mmprecond'))
        for alias in node.names
        if alias.name.startswith('_') and not alias.name.startswith('__')
    ]
    assert used + imported == []


@pytest.mark.parametrize('folder', ['mmprecond', 'tools'])
def test_docstrings_name_the_thing(folder: str) -> None:
    """They open with a noun phrase or an imperative, not with a question."""
    asking = re.compile(r'(What|Whether|Why|How|Of|By)\b')
    found = [
        f'{path.name}: {text}'
        for path in (PACKAGE.parent / folder).rglob('*.py')
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and (text := ast.get_docstring(node))
        and asking.match(text)
    ]
    assert found == []


def imported_tests(source: str) -> list[str]:
    """Modules below tests/ that a file imports and that are not there to be imported."""
    modules = [
        name
        for node in ast.walk(ast.parse(source))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or '']
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    return [
        name
        for name in modules
        if re.match(r'(tests\b|.*\btest_)', name)
        and not re.match(r'tests\.(support|reference)\b', name)
    ]


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'tests').rglob('*.py')), ids=lambda path: str(path.relative_to(ROOT))
)
def test_tests_import_from_support_and_reference_alone(path: Path) -> None:
    assert imported_tests(path.read_text()) == []


def test_an_import_of_a_test_is_found() -> None:
    assert imported_tests(
        'from tests.core.test_memory import a\nimport test_x\n'
        'from tests.support.errors import refused'
    ) == ['tests.core.test_memory', 'test_x']


def test_tests_mirror_the_rooms() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / '__init__.py').is_file()}
    folders = {path.name for path in (ROOT / 'tests').iterdir() if (path / '__init__.py').is_file()}
    assert folders - {'support', 'reference', 'tools', 'configs'} == rooms
