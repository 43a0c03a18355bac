"""Errors and warnings: in one line, of exactly one type."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest


def refused(error: type[Exception], call: Callable[[], Any], *fragments: str) -> None:
    """The call raises exactly this error, in one line that holds all fragments."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    assert '\n' not in message
    for fragment in fragments:
        assert fragment in message, message


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
