"""Trainings that take turns, an iteration each: the noise of the machine is the same for all."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import WORK
from .training import RunError

#: Script in tools/ that knows the hook.
ENTRY = 'analysis_tools/suite_entry.py'


@dataclass
class Turns:
    """A training whose iterations wait for their turns (see `TurnHook` in `ENTRY`).

    Attributes:
        process: The training.
        grant: File descriptor to write a byte to for each iteration.
        seconds: Lines that the training writes.
        log: File with its output.
    """

    process: subprocess.Popen[bytes]
    grant: int
    seconds: Any
    log: Path

    @classmethod
    def start(cls, command: Sequence[str], log: Path) -> Turns:
        """Starts a training, and waits until its first iteration could begin.

        Args:
            command: The training's command, which ends with settings for --cfg-options.
            log: File for its output.

        Raises:
            RunError: If the training ends before.
        """
        turns, grant = os.pipe()
        seconds, report = os.pipe()
        hook = dict(type='TurnHook', turns=turns, seconds=report)
        options = [f'default_hooks.turns.{key}={value}' for key, value in hook.items()]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open('w') as output:
            process = subprocess.Popen(
                [*command, *options],
                cwd=WORK,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                pass_fds=(turns, report),
            )
        os.close(turns)
        os.close(report)
        training = cls(process, grant, os.fdopen(seconds), log)
        training.read()
        return training

    def read(self) -> str:
        """The next line of the training.

        Raises:
            RunError: If the training has ended.
        """
        if line := self.seconds.readline():
            return str(line)
        tail = ''.join(self.log.read_text().splitlines(keepends=True)[-15:])
        raise RunError(f'the timing failed; the end of {self.log}:\n{tail}')

    def iterate(self) -> float:
        """Lets the training make one iteration; returns its seconds."""
        os.write(self.grant, b'.')
        return float(self.read())

    def stop(self) -> None:
        """Ends the training where it is."""
        self.process.kill()
        self.process.wait()
        os.close(self.grant)
        self.seconds.close()


def take_turns(
    commands: Mapping[str, Sequence[str]], iterations: int, folder: Path
) -> dict[str, list[float]]:
    """Makes some trainings take turns.

    Args:
        commands: Commands of trainings that are longer than `iterations`.
        iterations: Number of iterations of each.
        folder: Folder for their outputs.

    Returns:
        Seconds of each iteration.

    Raises:
        RunError: If a training ends before.
    """
    trainings: dict[str, Turns] = {}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    try:
        for name, command in commands.items():
            trainings[name] = Turns.start(command, folder / f'{name}.log')
        for _ in tqdm(range(iterations), desc='turns', unit='turn', mininterval=5.0):
            for name, training in trainings.items():
                seconds[name].append(training.iterate())
    finally:
        for training in trainings.values():
            training.stop()
    return seconds
