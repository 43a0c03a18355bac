"""The documentation: it builds, names what there is, and its examples run."""

from __future__ import annotations

import html
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
from mmprecond.preconditioners import METHODS
from tests.support.paths import ROOT

EXAMPLES = dict(
    re.findall(
        r'```python\n# example: ([^\n]+)\n(.*?)```',
        ''.join((ROOT / f'docs/{page}.md').read_text() for page in ('adapting', 'coming_from')),
        flags=re.DOTALL,
    )
)
#: Examples in plain PyTorch.
PLAIN = ('pytorch', 'attached', 'schedules')
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
    page = (tmp_path / 'options/index.html').read_text()
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
        assert f'<code>{setting}</code>' in page or f'>{setting}<' in page, setting
    for name in METHODS:
        assert f'id="mmprecond.preconditioners.{name}"' in page, name
    text = re.sub(r'\s+', ' ', html.unescape(re.sub(r'<[^>]+>', '', page)))
    assert 'exact_interval: int = 500' in text and 'refresh_interval: int = 200' in text


def test_every_page_is_in_the_navigation() -> None:
    pages = re.findall(r': (\w+\.md)$', (ROOT / 'mkdocs.yml').read_text(), flags=re.MULTILINE)
    assert sorted(pages) == sorted(path.name for path in (ROOT / 'docs').glob('*.md'))


def test_every_optimizer_is_described() -> None:
    table = (ROOT / 'docs/optimizers.md').read_text()
    readme = (ROOT / 'README.md').read_text()
    for kind in optimizer_types():
        assert f'`{kind.__name__}`' in table and f'`{kind.__name__}`' in readme, kind.__name__


def test_links_lead_somewhere() -> None:
    for path in [*ROOT.glob('docs/*.md'), ROOT / 'README.md']:
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
def test_the_examples_in_plain_pytorch(name: str) -> None:
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
        *PLAIN,
    }


def test_guarantees_name_tests_that_there_are() -> None:
    named = re.findall(
        r'`([\w/]*)(?:::(test_\w+))?`',
        (ROOT / 'docs/guarantees.md').read_text().split('Known limit')[0],
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
