"""A service process as one of several ranks that torchrun started."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn

LAUNCHER = "LAGWISE_LAUNCHER"
"""Process id of the launcher, in the environment of its ranks."""

_PR_SET_PDEATHSIG = 1


def is_rank() -> bool:
    """Return whether there are others."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def is_follower() -> bool:
    """Return whether another process of the job is rank 0."""
    return is_rank() and os.environ.get("RANK", "0") != "0"


def die_with_launcher() -> None:
    """Have the kernel end this process when its launcher dies: ranks have sessions of their own.

    A launcher that died before the wish was made is found by its process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and launcher != str(os.getppid()):
        leave_now(1)


def leave_now(code: int) -> NoReturn:
    """End without the interpreter's own end, which threads of process groups may abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
