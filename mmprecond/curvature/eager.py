"""Eager execution of compiled models while hooks are on their modules."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch._compile import _disable_dynamo


class Eager:
    """Lets compiled functions run eagerly from `enter` to `leave`.

    Their code is kept and runs again afterwards. It must be entered before a compiled function is,
    as code that runs already goes on compiled. Several may be entered at once.
    """

    _entered: ClassVar[set[int]] = set()
    #: Torch's stance while one or more are entered; it knows the one before.
    _stance: ClassVar[list[Any]] = []

    @_disable_dynamo
    def enter(self) -> None:
        """Begins, if it has not."""
        if not self._entered:
            self._stance.append(torch.compiler.set_stance('force_eager'))
        self._entered.add(id(self))

    @_disable_dynamo
    def leave(self) -> None:
        """Ends; the last one to leave restores the stance before."""
        if id(self) in self._entered:
            self._entered.remove(id(self))
            if not self._entered:
                self._stance.pop().__exit__(None, None, None)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.leave()
