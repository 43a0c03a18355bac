"""The documentation: it builds, names what there is, and its examples run."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmprecond.engine import launch
from mmprecond.engine.registration import optimizer_types
from mmprecond.engine.synthetic import random_model, synthetic_batch
from mmprecond.optimizers import get_optimizer_info
from mmprecond.preconditioners import METHODS
from tests.support.paths import ROOT

EXAMPLES = dict(
    re.findall(
        r'```python\n# example: ([^\n]+)\n(.*?)```',
        ''.join(
            path.read_text()
            for folder in ('use', 'methods')
            for path in sorted((ROOT / 'docs' / folder).glob('*.md'))
        ),
        flags=re.DOTALL,
    )
)
#: Examples in plain PyTorch.
PLAIN = (
    'pytorch',
    'attached',
    'schedules',
    'landscape',
    'surgery in pytorch',
    'gradient damping',
    'pruning',
)
#: The hybrid is a Mask R-CNN Swin-T at its own width.
CONFIGS = [
    pytest.param(name, marks=pytest.mark.slow) if name == 'hybrid' else name
    for name in EXAMPLES
    if name not in PLAIN
]


def test_the_site_builds(tmp_path: Path) -> None:
    """Without a warning: no dead link between pages, no class that is not there."""
    pytest.importorskip('mkdocs')
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q', '-d', str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pages = ''.join(path.read_text() for path in tmp_path.rglob('*.html'))
    for setting in (
        'refresh_interval',
        'stat_decay',
        'exact_interval',
        'clip_update',
        'sketch',
        'gradient_scale',
        'map_interval',
        'rotate_moments',
    ):
        assert f'<code>{setting}</code>' in pages or f'>{setting}<' in pages, setting
    for name in METHODS:
        assert f'id="mmprecond.preconditioners.{name}"' in pages, name
    text = re.sub(r'\s+', ' ', html.unescape(re.sub(r'<[^>]+>', '', pages)))
    assert 'exact_interval: int = 500' in text and 'refresh_interval: int = 200' in text
    method = (tmp_path / 'methods/nkfac/index.html').read_text()
    assert '<math' in method and '$' not in re.sub(r'<[^>]+>', '', method)  # formulas, no LaTeX
    assert len(json.loads((tmp_path / 'search/search_index.json').read_text())['docs']) > 100


def test_every_page_is_in_the_navigation() -> None:
    pages = re.findall(r'([\w/]+\.md)$', (ROOT / 'mkdocs.yml').read_text(), flags=re.MULTILINE)
    files = [str(path.relative_to(ROOT / 'docs')) for path in (ROOT / 'docs').rglob('*.md')]
    assert sorted(pages) == sorted(files)


def test_every_optimizer_is_described() -> None:
    table = (ROOT / 'docs/methods/index.md').read_text()
    pages = ''.join(path.read_text() for path in (ROOT / 'docs/methods').glob('*.md'))
    readme = (ROOT / 'README.md').read_text()
    for kind in optimizer_types():
        assert f'`{kind.__name__}`' in table and f'`{kind.__name__}`' in readme, kind.__name__
        assert f'::: mmprecond.optimizers.{kind.__name__}\n' in pages, kind.__name__


def test_links_lead_somewhere() -> None:
    for path in [*ROOT.glob('docs/**/*.md'), ROOT / 'README.md', ROOT / 'CONTRIBUTING.md']:
        for target in re.findall(r'\]\((?!http)([^)#]+)[^)]*\)', path.read_text()):
            assert (path.parent / target).exists(), f'{path.name}: {target}'


def shrunk(cfg: Any) -> Any:
    """The config with small factors, random weights and no data."""
    cfg.model.backbone.init_cfg = None
    if cfg.optim_wrapper.optimizer.type not in ('SGD', 'AdamW'):  # these are rules, and stay
        cfg.optim_wrapper.optimizer.max_dim = 600
    return cfg


@pytest.mark.parametrize('name', CONFIGS)
def test_configs_train(name: str, tmp_path: Path) -> None:
    from mmengine.optim import build_optim_wrapper

    if name in ('mmpretrain', 'layer decay'):
        pytest.importorskip('mmpretrain')
    file = tmp_path / 'example.py'
    file.write_text(EXAMPLES[name])
    torch.manual_seed(0)
    cfg = shrunk(launch.load_config(str(file)))
    model = random_model(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    size = (224, 224) if name == 'layer decay' else (64, 96)
    before = [p.detach().clone() for p in model.parameters()]
    with wrapper.optim_context(model):
        losses = model(**synthetic_batch(model, 2, size))
    loss, _ = model.parse_losses(losses)
    wrapper.update_params(loss)
    assert sum(len(stack.ready()) for stack in wrapper.optimizer.curvature.stacks) > 10
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 3


@pytest.mark.parametrize('name', PLAIN)
def test_the_examples_in_plain_pytorch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(EXAMPLES[name], scope)  # noqa: S102
    assert scope['optimizer'].t == 3


def test_examples_are_all_there() -> None:
    assert set(EXAMPLES) == {
        'mmdetection',
        'custom keys',
        'hybrid',
        'mmpretrain',
        'layer decay',
        'surgery',
        *PLAIN,
    }


@pytest.mark.slow
def test_the_tutorial_runs_as_written(tmp_path: Path) -> None:
    """With 4 iterations in place of 100."""
    text = (ROOT / 'docs/tutorial.md').read_text()
    for name, content in re.findall(r'```python\n# file: (\S+)\n(.*?)```', text, re.DOTALL):
        short = content.replace('max_iters=100, val_interval=50', 'max_iters=4, val_interval=4')
        (tmp_path / name).write_text(short.replace('interval=100)', 'interval=4)'))
    assert 'max_iters=4' in (tmp_path / 'my_detector.py').read_text()
    (tmp_path / 'tools').symlink_to(ROOT / 'tools')
    commands = '\n'.join(re.findall(r'```bash\n(.*?)```', text, re.DOTALL))
    short = commands.replace('--images 200', '--images 16').replace('--images 40', '--images 8')
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        ['bash', '-ec', short],
        cwd=tmp_path,
        env={**os.environ, 'PATH': path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert 'mmprecond attached NKFAC to 35 layers of FasterRCNN' in done.stdout + done.stderr
    table = re.search(r'^tutorial_nkfac +AFOpt\+NKFAC on SGD +4 ', done.stdout, re.MULTILINE)
    assert table and (tmp_path / 'work_dirs/tutorial_report/report.html').is_file()
    (events,) = tmp_path.glob('work_dirs/tutorial_nkfac/*/vis_data/events*')
    scalars = set(re.findall(rb'curvature/[\w/]+', events.read_bytes()))
    for name in re.findall(r'`(curvature/[\w/]+)`', text):
        assert name.encode() in scalars, name


def test_guarantees_name_tests_that_there_are() -> None:
    named = re.findall(
        r'`([\w/]*)(?:::(test_\w+))?`',
        (ROOT / 'docs/guarantees.md').read_text(),
    )
    file, count = '', 0
    for path, test in named:
        if not (test or path.split('/')[-1].startswith('test_')):
            continue
        file = path or file
        source = (ROOT / f'tests/{file}.py').read_text()
        assert not test or f'def {test}(' in source, f'{file}::{test}'
        count += 1
    assert count > 60


#: Optimizers of each method's word in the table of settings; all of those that it names share it.
FORMS = {
    'NKFAC': ('NKFAC',),
    'KFAC': ('KFAC', 'SKFAC'),
    'AFOpt': ('AFOpt', 'AdaAFOpt'),
    'AdaBK': ('SGDMBK', 'AdamWBK'),
    'AdaFisher': ('AdaFisher', 'AdaFisherW'),
}


def test_defaults_of_the_settings_are_those_of_the_table() -> None:
    """Intervals and dampings of docs/choosing.md, method by method."""
    text = (ROOT / 'docs/choosing.md').read_text()
    (intervals,) = re.findall(r'\| `stat_interval`, `refresh_interval` \| (.*?) \|', text)
    found = {}
    for pair, names in re.findall(r'(\d+, \d+) for ([\w, ]+?(?: and \w+)?)(?:;|$)', intervals):
        for word in re.split(r', | and ', names):
            for name in FORMS.get(word, (word,)):
                found[name] = tuple(int(number) for number in pair.split(', '))
    assert len(found) > 15
    for name, pair in found.items():
        settings = get_optimizer_info(name).settings
        assert (settings['stat_interval'], settings['refresh_interval']) == pair, name
    (dampings,) = re.findall(r'\| `damping` \| (.*?) \|', text)
    usual, rest = dampings.split(';', 1)
    given = {
        form: float(number)
        for names, number in re.findall(r'((?:\w+, )*\w+) ([\d.e-]+\d|\d)', rest)
        for word in names.split(', ')
        for form in FORMS.get(word, (word,))
    }
    for name in found:
        expected = given.get(name, float(usual))
        if 'damping' in get_optimizer_info(name).settings:
            assert get_optimizer_info(name).settings['damping'] == expected, name
