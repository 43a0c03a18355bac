"""Runs the scripts of tools/ as `mmprecond COMMAND`, from a clone or an installed package."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from .resources import find_root

#: Scripts by command, relative to tools/, and what they do.
COMMANDS = {
    'train': ('train.py', 'train a config of MMDetection, MMPretrain or this project'),
    'test': ('test.py', 'evaluate a checkpoint'),
    'diagnose': (None, 'forecast memory and cost of an optimizer on a config'),
    'compare': ('analysis_tools/compare_runs.py', 'compare finished runs: table, curves, report'),
    'quickstart': ('quickstart.py', 'train a small model with several optimizers on drawn images'),
}


def main() -> None:
    """Runs one command with the arguments of its script."""
    parser = argparse.ArgumentParser(
        prog='mmprecond',
        description='Preconditioned optimizers for OpenMMLab and PyTorch.',
        epilog='\n'.join(f'{name:12}{about}' for name, (_, about) in COMMANDS.items())
        + '\n\nmmprecond COMMAND --help lists the arguments of a command.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, metavar='...')
    given = parser.parse_args()
    script, _ = COMMANDS[given.command]
    sys.argv[:] = [f'mmprecond {given.command}', *given.arguments]
    try:
        if script is None:
            from .diagnostics import main as diagnose

            diagnose()
        else:
            _run(find_root() / 'tools', script)
    except ModuleNotFoundError as error:
        names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        # In a training or an evaluation; others import optional packages inside functions.
        begun = given.command in ('train', 'test') and names.count('main') > 1
        if begun or os.environ.get('MMPRECOND_TRACEBACK'):
            raise
        package = str(error.name).split('.')[0]
        parser.exit(
            2, f'mmprecond {given.command} needs the package {package}, which is not installed\n'
        )


def _run(tools: Path, script: str) -> None:
    """Runs a script as `python SCRIPT` does, but for its name in the help (runpy changes it)."""
    sys.path.insert(0, str(tools))
    file = tools / script
    code = compile(file.read_text(encoding='utf-8'), str(file), 'exec')
    exec(code, {'__name__': '__main__', '__file__': str(file)})


if __name__ == '__main__':
    main()
