"""A part of a replay on several ranks: started by torchrun as `lagwise up` does, and heard."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from shared.cli import torchrun
from shared.cli.processes import child_environment, dying_with_us, last_line
from shared.cli.replay_part import AGAIN, OnEqual, Part, Replayed
from shared.runtime.errors import Fatal

_SHUTDOWN_S = 2
"""Between SIGTERM and SIGKILL to ranks that are to end."""
_MARGIN_S = 3.0
"""Beyond a bound, for whoever keeps it."""
_IMPORTS_S = 60.0
"""Before rank 0 can beat."""


@dataclass
class _Heard:
    """What the ranks said."""

    result: Replayed | None = None
    refusals: dict[int, str] = field(default_factory=dict[int, str])
    """By rank."""


def replay(part: Part, on_equal: OnEqual) -> Replayed:
    """Train the versions of a part again on its ranks. On the main thread.

    Nothing of it outlives this call, nor this process.

    Raises:
        Fatal: a rank was lost, or the ranks refused; one line.
    """
    path, log_path = part.folder / "part.json", part.folder / "ranks.log"
    part.write(path)
    rest = ("-m", "shared.cli.replay_rank", str(path))
    argv = torchrun.command(sys.executable, part.ranks, rest, shutdown_s=_SHUTDOWN_S)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            dying_with_us(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=child_environment(os.environ),
            start_new_session=True,  # Ctrl-C is ours to hand on
            text=True,
        )
    assert process.stdout is not None
    try:
        heard = _listen(_bounded(process.stdout, part.config.model.rank_timeout_s), on_equal)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SHUTDOWN_S + _MARGIN_S)
    finally:
        _end(process)
    if heard.result is not None:
        return heard.result
    raise Fatal(_refusal(heard.refusals, process.returncode, log_path))


def _bounded(output: IO[str], timeout_s: float) -> Iterator[str]:
    """Yield lines; the launcher waits long for a frozen rank 0, which does not hear it.

    Raises:
        Fatal: rank 0 has not even beaten for so long.
    """
    heard: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        with output:
            for line in output:
                heard.put(line)
        heard.put(None)

    threading.Thread(target=read, daemon=True, name="replay-ranks").start()
    bound_s = timeout_s + _IMPORTS_S
    try:
        while (line := heard.get(timeout=bound_s + _MARGIN_S)) is not None:
            bound_s = timeout_s  # and a margin: rank 0 knows best who is silent
            yield line
    except queue.Empty:
        # It may hold the interpreter's lock in a collective that waits for a frozen one.
        who = "rank 0, or one that it waits for"
        raise Fatal(f"{who}: silent for {bound_s:g} s: {AGAIN}") from None


def _listen(lines: Iterable[str], on_equal: OnEqual) -> _Heard:
    """Take in what is said, until there is a result or all ranks and their launcher have ended."""
    heard = _Heard()
    for line in lines:
        if not line.startswith("{"):
            continue  # a library's word while it was imported
        told: dict[str, Any] = json.loads(line)
        if "equal" in told:
            on_equal(told["equal"])
        elif "refused" in told:
            heard.refusals[told["rank"]] = told["refused"]
        elif "versions" in told:
            heard.result = Replayed(told["versions"], told["problem"])
            break
    return heard


def _end(process: subprocess.Popen[str]) -> None:
    """End the launcher, which ends the ranks; the kernel ends them with a killed one."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SHUTDOWN_S + _MARGIN_S)
        process.kill()
        process.wait()


def _refusal(refusals: dict[int, str], code: int, log_path: Path) -> str:
    """Return why there is no result: rank 0 knows best, then whoever spoke."""
    for rank in sorted(refusals):
        return refusals[rank]
    if code == 128 + signal.SIGTERM:  # from the launcher, before rank 0 could say whom it lost
        return f"a rank ended before all had met: {AGAIN}"
    if code > 128:
        return f"rank 0: its process ended by {signal.Signals(code - 128).name}: {AGAIN}"
    if code < 0:
        return f"the launcher of the ranks ended by {signal.Signals(-code).name}: {AGAIN}"
    return f"the ranks ended with exit code {code}: {last_line(log_path) or 'no word'}"
