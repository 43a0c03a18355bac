"""Settings of all tests."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

# On busy cores the threads of a pool wait for each other: 40 s in place of 0.3 s were seen.
torch.set_num_threads(1)

if find_spec('hypothesis'):
    from hypothesis import HealthCheck, settings

    # For tests that do not set max_examples themselves, such as test_random_networks.py.
    settings.register_profile(
        'short',
        max_examples=8,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    settings.register_profile(
        'long',
        settings.get_profile('short'),
        derandomize=False,
        max_examples=int(os.environ.get('FUZZ_EXAMPLES', 100)),
    )
    settings.load_profile('short')


@pytest.fixture
def registries_as_they_were() -> Iterator[None]:
    """Takes out again what a test registers."""
    from mmprecond.curvature import ATTENTION_TYPES, LAYER_TYPES
    from mmprecond.preconditioners import METHODS
    from mmprecond.rules import RULES

    known = [
        (registry, dict(registry)) for registry in (RULES, METHODS, LAYER_TYPES, ATTENTION_TYPES)
    ]
    yield
    for registry, before in known:
        registry.clear()
        registry.update(before)


@pytest.fixture
def amp_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets AmpOptimWrapper be built on a machine without an accelerator."""
    import mmengine.optim.optimizer.amp_optimizer_wrapper as module

    monkeypatch.setattr(module, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(
        module, 'GradScaler', lambda **kwargs: torch.amp.GradScaler('cpu', **kwargs)
    )
    monkeypatch.setattr('mmengine.runner.amp.get_device', lambda: 'cpu')


@pytest.fixture
def window_attention_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers the window attention of `tests.support.mixed`."""
    from mmprecond.curvature import qualified_name
    from mmprecond.curvature.attention import ATTENTION_TYPES, WindowAttention
    from tests.support.mixed import WindowMSA

    monkeypatch.setitem(ATTENTION_TYPES, qualified_name(WindowMSA), WindowAttention)


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled yet, and no optimizer that another test left keeps models eager."""
    from torch._dynamo.utils import counters

    from mmprecond.curvature import Eager

    monkeypatch.setattr(Eager, '_entered', set())
    monkeypatch.setattr(Eager, '_stance', [])
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance('default'):
        yield
    torch._dynamo.reset()
