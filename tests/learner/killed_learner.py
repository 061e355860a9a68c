"""A learner as a process that another one can kill; forked, so that starting it takes no import."""

from __future__ import annotations

import os
import sys

from services.learner.config import LearnerConfig
from services.learner.service import serve
from shared.runtime.service import launch


def main(config: str, log: str) -> None:
    """Be `python -m services.learner --config CONFIG`, its output appended to `log`."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, sys.stdout.fileno())
    os.dup2(out, sys.stderr.fileno())
    launch("learner", LearnerConfig, serve, ["--config", config, "--pod", "learner-0"])
