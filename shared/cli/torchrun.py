"""`python -m shared.cli.torchrun ...`: torchrun, ending with the exit code of rank 0.

torchrun itself ends with 1 whatever a rank said. Our codes mean something to whoever restarts:
2 is a configuration that will not get better, 3 a run that another learner owns.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence

from shared.runtime.rank_life import LAUNCHER
from shared.runtime.signals import leave_at_sigterm

FAILED = 1


def code_of(failures: Mapping[int, int]) -> int:
    """Return the code to end with.

    Args:
        failures: exit code by rank of those that failed first; negative for a signal.
    """
    code = failures.get(0, FAILED)
    return code if code > 0 else 128 - code


def command(python: str, ranks: int, rest: Sequence[str], *, shutdown_s: int) -> tuple[str, ...]:
    """Return the command that starts ranks on this machine, which are started once.

    Args:
        python: the interpreter.
        ranks: how many.
        rest: of a rank's command, after the interpreter.
        shutdown_s: between SIGTERM and SIGKILL to ranks of which one has ended.
    """
    return (
        *(python, "-m", "shared.cli.torchrun", "--standalone", "--max-restarts", "0"),
        *("--nproc-per-node", str(ranks), "--shutdown-timeout", str(shutdown_s), *rest),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run to the end of all ranks; return the exit code."""
    leave_at_sigterm()  # until torchrun hands it on
    # What went wrong is the ranks' to say, one line each; torchrun would draw a box around it.
    logging.disable(logging.ERROR)
    os.environ[LAUNCHER] = str(os.getpid())
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(sys.argv[1:] if argv is None else argv)))
    except ChildFailedError as error:
        return code_of({rank: failure.exitcode for rank, failure in error.failures.items()})
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
