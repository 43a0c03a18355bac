"""Trainings that take turns, an iteration each: slow changes of the machine hit all alike."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from . import WORK
from .training import ENVIRONMENT, RunError, tail

#: Training script, relative to tools/, that knows the hook.
TURN_SCRIPT = 'analysis_tools/suite_entry.py'


@dataclass
class PacedTraining:
    """A training whose iterations wait for their turns (see `TurnHook` in `TURN_SCRIPT`).

    Attributes:
        process: The training.
        grant: File descriptor to write a byte to for each iteration.
        reports: Lines that the training writes.
        log: File with its output.
    """

    process: subprocess.Popen[bytes]
    grant: int
    reports: IO[str]
    log: Path

    @classmethod
    def start(cls, command: Sequence[str], log: Path) -> PacedTraining:
        """Starts a training, which writes a line when its first iteration may begin.

        Args:
            command: The training's command, which ends with settings for --cfg-options.
            log: File for its output.
        """
        turn_fd, grant = os.pipe()
        reports, report_fd = os.pipe()
        hook = dict(type='TurnHook', turn_fd=turn_fd, report_fd=report_fd)
        options = [f'default_hooks.turns.{key}={value}' for key, value in hook.items()]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open('w') as output:
            process = subprocess.Popen(
                [*command, *options],
                cwd=WORK,
                env=ENVIRONMENT,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                pass_fds=(turn_fd, report_fd),
            )
        os.close(turn_fd)
        os.close(report_fd)
        return cls(process, grant, os.fdopen(reports), log)

    def read(self) -> str:
        """The next line of the training.

        Raises:
            RunError: If the training has ended.
        """
        if line := self.reports.readline():
            return line
        raise RunError(f'the timing failed; the end of {self.log}:\n{tail(self.log)}')

    def iterate(self) -> float:
        """Lets the training make one iteration; returns its seconds."""
        os.write(self.grant, b'.')
        return float(self.read())

    def stop(self) -> None:
        """Ends the training where it is."""
        self.process.kill()
        self.process.wait()
        os.close(self.grant)
        self.reports.close()


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
    from tqdm import tqdm  # help texts must come without an environment

    trainings: dict[str, PacedTraining] = {}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with ExitStack() as stack:
        for name, command in commands.items():
            trainings[name] = training = PacedTraining.start(command, folder / f'{name}.log')
            stack.callback(training.stop)
            training.read()
        for _ in tqdm(range(iterations), desc='turns', unit='turn', mininterval=5.0):
            for name, training in trainings.items():
                seconds[name].append(training.iterate())
    return seconds
