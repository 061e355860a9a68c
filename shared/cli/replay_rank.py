"""`python -m shared.cli.replay_rank PART`: one of the ranks that train versions again together.

Rank 0 replays, the others follow it. What is to be told goes to standard output, one JSON object a
line: `equal` (a version), then `versions` and `problem`, or `refused` (one line) with the rank; of
rank 0 empty ones beside, as beats.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from services.learner.building import meet_ranks
from services.learner.following import follow
from shared.backends.rank_ends import beat_s
from shared.backends.ranks import Ranks
from shared.cli.replay_part import AGAIN, Part, Replayed, make
from shared.runtime.peers import unless_lost
from shared.runtime.rank_life import die_with_launcher, is_follower, leave_now
from shared.runtime.service import EXIT_CLEAN, EXIT_FAILED, cause_of, line_of
from shared.runtime.signals import leave_at_sigterm, stop_on_signals, unless_stopped

Say = Callable[..., None]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Do this rank's part to the end."""
    leave_at_sigterm(EXIT_FAILED)  # until the loop runs
    die_with_launcher()
    logging.getLogger().addHandler(logging.NullHandler())
    say = _voice()
    part = Part.read(Path((sys.argv[1:] if argv is None else argv)[0]))
    try:
        if not is_follower():
            timeout_s = part.config.model.rank_timeout_s
            threading.Thread(target=_beat, args=(say, timeout_s), daemon=True).start()
            asyncio.run(_lead(part, say))
        follow(part.config)
    except Exception as error:  # noqa: BLE001 - the shell: every end gets its line
        _refuse(say, error)
        leave_now(EXIT_FAILED)
    leave_now(EXIT_CLEAN)


def _voice() -> Say:
    """Return what writes to standard output, which nothing else does from now on."""
    own = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(**fields: object) -> None:
        # in one write: ranks share the pipe
        os.write(own, (json.dumps(fields) + "\n").encode())

    return say


def _beat(say: Say, timeout_s: float) -> NoReturn:
    while True:
        say()
        time.sleep(beat_s(timeout_s))


def _refuse(say: Say, error: BaseException) -> None:
    say(refused=line_of(cause_of(error)), rank=int(os.environ["RANK"]))


async def _lead(part: Part, say: Say) -> NoReturn:
    """Replay as rank 0; end the process here, whatever threads still wait for other ranks."""
    stop = asyncio.Event()
    stop_on_signals(stop, lambda name: None)
    met: list[Ranks] = []
    code = EXIT_FAILED
    try:
        result = await unless_stopped(stop, _replay(part, say, met))
        if result is not None:
            say(versions=result.versions, problem=result.problem)
            code = EXIT_CLEAN
        elif met and met[0].reason:  # the launcher saw it, too
            say(refused=f"{met[0].reason}: {AGAIN}", rank=0)
    except Exception as error:  # noqa: BLE001 - the shell: every end gets its line
        _refuse(say, error)
    leave_now(code)


async def _replay(part: Part, say: Say, met: list[Ranks]) -> Replayed:
    ranks = await asyncio.to_thread(meet_ranks, part.config)
    met.append(ranks)
    results: list[Replayed] = []

    async def work() -> None:
        results.append(await make(part, lambda version: say(equal=version), lambda _: ranks))

    await unless_lost(ranks, work(), AGAIN)
    ranks.close()  # not after a loss: this process says so and leaves
    return results[0]


if __name__ == "__main__":
    main()
