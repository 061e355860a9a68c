"""Reward 1 for an answer that is mathematically equal, by the math-verify library.

Symbolic comparison may take for ever or all memory on what a policy writes (10**10**10), so it
runs in a helper process with limits, which is started again when it has died of them. An answer
that cannot be compared within them is not shown to be equal: reward 0, named `unverifiable`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, cast

from services.env_agents import answers
from services.env_agents.verifiers.verifier import TaskFault, Verdict

HELPER = "services.env_agents.verifiers.maths_helper"


class Maths:
    """Compares with `payload["answer"]`: LaTeX or plain text.

    Of the answer, the last boxed or otherwise recognisable expression counts; where it has
    <answer>...</answer>, only what stands there.

    Args:
        options: `timeout_s` (5: one comparison), `memory_mb` (1024: of the helper).

    Raises:
        ValueError: math-verify is not installed, or an option is unknown.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - {"timeout_s", "memory_mb"})
        if unknown:
            raise ValueError(f"maths has the options timeout_s and memory_mb, not {unknown[0]}")
        if find_spec("math_verify") is None:
            raise ValueError("maths needs math-verify: pip install 'lagwise[maths]'")
        self._limits = (
            str(float(options.get("timeout_s", 5.0))),
            str(int(options.get("memory_mb", 1024))),
        )
        self._one_at_a_time = threading.Lock()
        self._helper: subprocess.Popen[str] | None = None

    async def verify(self, answer: str, payload: Mapping[str, Any]) -> Verdict:
        """Judge.

        Raises:
            TaskFault: the task has no `answer`, or nobody can read it.
        """
        wanted = payload.get("answer")
        if not isinstance(wanted, (str, int, float)):
            raise TaskFault(f"the task's `answer` is no text: {wanted!r}")
        given = answers.tagged(answer) or answers.without_thought(answer)
        judged = await asyncio.to_thread(self._judge, str(wanted), given)
        match judged:
            case None:
                return Verdict(0.0, {"unverifiable": 1.0}, "no verdict within the helper's limits")
            case {"fault": str(fault)}:
                raise TaskFault(f"the task's `answer` {wanted!r}: {fault}")
            case {"malformed": _}:
                return Verdict(0.0, {"malformed": 1.0}, "no expression in the answer")
            case _:
                return Verdict(float(judged["equal"]))

    def close(self) -> None:
        """End the helper."""
        with self._one_at_a_time:
            self._discard()

    def _judge(self, wanted: str, given: str) -> dict[str, Any] | None:
        """Ask the helper; None: it died of the question."""
        with self._one_at_a_time:
            helper = self._helper
            if helper is None or helper.poll() is not None:
                self._discard()
                helper = self._helper = self._start()
            assert helper.stdin is not None
            assert helper.stdout is not None
            try:
                helper.stdin.write(json.dumps([wanted, given]) + "\n")
                helper.stdin.flush()
                line = helper.stdout.readline()
            except OSError:
                line = ""
            if not line:
                self._discard()
                return None
            return cast("dict[str, Any]", json.loads(line))

    def _start(self) -> subprocess.Popen[str]:
        helper = subprocess.Popen(
            [sys.executable, "-m", HELPER, *self._limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert helper.stdout is not None
        if helper.stdout.readline() != "ready\n":
            helper.kill()
            raise RuntimeError("the maths helper does not start: try importing math_verify")
        return helper

    def _discard(self) -> None:
        helper, self._helper = self._helper, None
        if helper is not None:
            helper.kill()
            helper.communicate()
