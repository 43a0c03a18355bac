"""Torchrun, which leaves a mistake in the command or the config to the line of its processes."""

from __future__ import annotations

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

#: Exit status of a process that has reported such a mistake (`mmprecond.engine.launch.USAGE`).
USAGE = 2


def main() -> None:
    # It announces each failed process; the error below has them all.
    logging.getLogger('torch.distributed.elastic.multiprocessing.api').setLevel(logging.CRITICAL)
    try:
        run.main()
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode != USAGE:
            raise
        sys.exit(USAGE)


if __name__ == '__main__':
    main()
