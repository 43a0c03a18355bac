"""Settings of property tests, and distances."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

few = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10**6)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the size of what is expected, which must not be nothing."""
    assert found.shape == expected.shape and expected.norm() > 0
    return float((found - expected).norm() / expected.norm())
