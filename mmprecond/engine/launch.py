"""Pieces shared by `tools/train.py` and `tools/test.py`: configs, processes, one-line errors."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction

from ..checks import did_you_mean, first_line
from .preflight import check_options
from .resolution import class_name
from .toolboxes import find_config, installed

#: Settings of MMEngine's `AmpOptimWrapper` alone.
MIXED_PRECISION = ('loss_scale', 'dtype', 'use_fp16')

#: Exit status of a mistake in the command or the config, as that of argparse.
USAGE = 2
#: Seconds that other processes of a machine wait for the first one to report an error.
PATIENCE = 20.0


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that MMDetection's and MMPretrain's own tools share."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    add_cfg_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes were started',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that overrides settings of a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionsAction,
        metavar='KEY=VALUE',
        help='settings that override the config, such as optim_wrapper.optimizer.lr=0.01',
    )


def add_precondition(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that attaches curvature to a config's own optimizer."""
    parser.add_argument(
        '--precondition',
        metavar='METHOD',
        help="add curvature to the config's own SGD, AdamW, Adan, or Adam without decay: NKFAC, or "
        'AFOpt+NKFAC for AFOpt on attention modules and NKFAC elsewhere',
    )


class OptionsAction(DictAction):  # type: ignore[misc]
    """MMEngine's `DictAction`, with a one-line error for an entry without '='."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, *others: Any
    ) -> None:
        """Parses KEY=VALUE entries."""
        for text in values or ():
            if '=' not in text.strip('='):
                parser.error(f'{self.option_strings[0]} takes KEY=VALUE, got {text!r}')
        super().__call__(parser, namespace, values, *others)


def count(text: str) -> int:
    """Parses a whole number of at least 1, as an argument's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number of at least 1')
    return int(text)


def load_config(path: str) -> Config:
    """Loads a config file, or a config of an installed toolbox (`mmdet::faster_rcnn/NAME.py`).

    Raises:
        FileNotFoundError: If the file or the toolbox does not exist.
        ValueError: If the file, or one that it is based on, cannot be read.
    """
    if '::' in path:
        return _read(find_config(path))
    if not Path(path).is_file():
        near = did_you_mean(path, map(str, Path(path).parent.glob('*.py')))
        raise FileNotFoundError(
            f'there is no config {path}; {near}give a file, or TOOLBOX::FOLDER/NAME.py for one of '
            f'{" or ".join(installed()) or "an installed toolbox"}'
        )
    return _read(path)


def _read(path: str | Path) -> Config:
    try:
        return Config.fromfile(path)
    except (AssertionError, AttributeError, NameError, RuntimeError) as error:
        raise ValueError(f'{path} cannot be read: {first_line(error)}') from error


def config_name(path: str) -> str:
    """Name of a config without its folder, toolbox and suffix."""
    return re.split(r'[/\\:]+', path)[-1].removesuffix('.py')


def finish_config(cfg: Config, args: argparse.Namespace) -> None:
    """Applies the common arguments and prepares the processes.

    Raises:
        ValueError: If a key of `--cfg-options` looks misspelt, or the launcher did not start the
            processes.
    """
    merge_options(cfg, args.cfg_options)
    check_launcher(args.launcher)
    own = str(Path('work_dirs') / config_name(args.config))
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or own
    cfg.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    if args.launcher == 'pytorch' and not torch.cuda.is_available():
        _use_gloo(cfg)


def merge_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Merges `--cfg-options` into a config; raises ValueError for a key that looks misspelt."""
    if options:
        check_options(cfg, options)
        cfg.merge_from_dict(options)


#: Variables that each launcher sets for its processes, and what starts them.
LAUNCHERS = {
    'none': ('', ''),
    'pytorch': ('RANK', 'bash tools/dist_train.sh CONFIG GPUS'),
    'slurm': ('SLURM_PROCID', 'bash tools/slurm_train.sh'),
    'mpi': ('OMPI_COMM_WORLD_LOCAL_RANK', 'mpirun -np GPUS python tools/train.py CONFIG'),
}


def check_launcher(launcher: str) -> None:
    """Raises ValueError if the launcher has not started this process."""
    variable, command = LAUNCHERS[launcher]
    if variable and variable not in os.environ:
        raise ValueError(
            f'--launcher {launcher} is for processes that it started, and {variable} is not set; '
            f'start them with `{command}`, or leave --launcher out for one process'
        )


def _use_gloo(cfg: Config) -> None:
    """Sets up data parallelism without a GPU, which MMEngine's defaults do not support."""
    torch.set_num_threads(int(os.environ.setdefault('OMP_NUM_THREADS', '1')))
    if not dist.is_initialized():
        dist.init_process_group('gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    cfg.model_wrapper_cfg = {**wrapper, **cfg.get('model_wrapper_cfg', {}), 'device_ids': None}


def check_mmcv(scope: str | None) -> None:
    """Raises ImportError with the remedy if mmcv was installed without its compiled operators.

    Args:
        scope: The config's `default_scope`; classifiers of MMPretrain need no operators.
    """
    if scope == 'mmpretrain':
        return
    try:
        import mmcv
    except ModuleNotFoundError:
        return
    try:
        import mmcv._ext  # noqa: F401
    except ModuleNotFoundError as error:
        raise ImportError(
            f'mmcv {mmcv.__version__} was installed without its compiled operators (mmcv._ext); '
            'run `pip uninstall -y mmcv onedl-mmcv`, then `bash tools/setup_env.sh`'
        ) from error


def check_training_data(cfg: Config) -> None:
    """Raises ValueError if a config has no training data."""
    if not cfg.get('train_dataloader'):
        raise ValueError('the config has no train_dataloader to take batches from')


def in_full_precision(wrapper: dict[str, Any]) -> dict[str, Any]:
    """Settings of a wrapper without those of mixed precision, which needs a GPU."""
    kept = {key: value for key, value in wrapper.items() if key not in MIXED_PRECISION}
    kind = wrapper.get('type')
    if 'AmpOptim' in (name := kind if isinstance(kind, str) else class_name(kind)):
        kept['type'] = name.replace('AmpOptim', 'Optim')
    return kept


@contextmanager
def one_line_errors(*inside: str) -> Iterator[None]:
    """Ends the program with a one-line message for errors that a user can fix.

    Args:
        inside: Names of the functions whose errors are meant; default: all.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError, ImportError, SyntaxError) as error:
        names = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        if os.environ.get('MMPRECOND_TRACEBACK') or (inside and not set(inside) & set(names)):
            raise
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        if int(os.environ.get('LOCAL_RANK', 0)):
            # The first process of the machine says it, and its end stops this one.
            time.sleep(PATIENCE)
        print(
            f'{type(error).__name__}: {text}\n'
            '(set MMPRECOND_TRACEBACK=1 to see where it came from)',
            file=sys.stderr,
        )
        sys.exit(USAGE)


def run(main: Callable[[], None]) -> None:
    """Runs a tool's main function and then destroys the process group."""
    main()
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # a rank that exits early closes the connections of the others
        dist.destroy_process_group()
