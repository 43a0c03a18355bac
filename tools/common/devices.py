"""Devices as arguments."""

from __future__ import annotations

import argparse

import torch


def device(text: str) -> torch.device:
    """Parses a device that is there, as an argument's type."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f'{text} cannot be used ({reason}); cpu can') from error
    return torch.device(text)
