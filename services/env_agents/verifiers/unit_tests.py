"""Reward for code that passes unit tests, run in a sandbox."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from services.env_agents import answers
from services.env_agents.verifiers.sandbox import (
    Ran,
    Sandbox,
    SandboxLimits,
    SandboxUnavailable,
)
from services.env_agents.verifiers.verifier import TaskFault, Verdict

Kind = Literal["call", "stdio", "assert"]

HARNESS = Path(__file__).with_name("runner_in_sandbox.py").read_text()
"""What runs in the sandbox, read here: inside, this folder need not be visible."""

LIMITS = ("wall_s", "cpu_s", "memory_mb", "processes", "disk_mb", "output_bytes")


class UnitTests:
    """Runs the code of an answer (its last fenced block) against the task's `tests`.

    Each is one of

    * `{"call": "f", "args": [...], "expected": ...}`: JSON in and out;
    * `{"stdin": "...", "stdout": "..."}`: the program as a whole, white space at line ends apart;
    * `{"assert": "assert f(2) == 4"}`: statements run beside the code.

    What is expected of the first two never enters the sandbox, so that code cannot claim it. An
    `assert` shares its process with the code it judges: code that looks for the runner's state
    can fake it. All tests of a task are of one kind.

    Args:
        options: `partial` (False: 1 only when all pass; True: the share that passes),
            `isolate` (True), `concurrency` (4), and the limits `wall_s`, `cpu_s`, `memory_mb`,
            `processes`, `disk_mb`, `output_bytes`.

    Raises:
        ValueError: an unknown option, or this machine cannot isolate and `isolate` is not False.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - {"partial", "isolate", "concurrency", *LIMITS})
        if unknown:
            raise ValueError(f"unit_tests has no option {unknown[0]!r}")
        self._partial = bool(options.get("partial", False))
        limits = SandboxLimits(**{name: options[name] for name in LIMITS if name in options})
        try:
            self._sandbox = Sandbox(
                limits,
                isolate=bool(options.get("isolate", True)),
                concurrency=int(options.get("concurrency", 4)),
            )
        except SandboxUnavailable as error:
            raise ValueError(
                f"unit_tests: this machine cannot isolate untrusted code ({error}); allow user "
                "namespaces or CAP_SYS_ADMIN, or run it unprotected with isolate: false"
            ) from error

    async def verify(self, answer: str, payload: Mapping[str, Any]) -> Verdict:
        """Judge.

        Raises:
            TaskFault: the task has no usable tests.
        """
        kind, tests = _tests(payload)
        code = answers.code(answer)
        if not code.strip():
            return Verdict(0.0, {"malformed": 1.0}, "no code in the answer")
        nonce = secrets.token_hex(16)
        inputs = [{name: test.get(name) for name in _INPUTS[kind]} for test in tests]
        given = json.dumps({"kind": kind, "code": code, "tests": inputs, "nonce": nonce})
        argv = [sys.executable, "-I", "-c", HARNESS]
        try:
            ran = await self._sandbox.run(argv, given.encode())
        except SandboxUnavailable as error:
            raise TaskFault(f"the sandbox could not be entered: {error}") from error
        passed = _passed(kind, tests, _results(ran, nonce))
        share = passed / len(tests)
        reward = share if self._partial else float(passed == len(tests))
        rewards = {"passed": share}
        if ran.end != "exited":
            rewards[ran.end] = 1.0
        return Verdict(reward, rewards, _detail(ran, passed, len(tests)))


_INPUTS: Mapping[Kind, tuple[str, ...]] = {
    "call": ("call", "args"),
    "stdio": ("stdin",),
    "assert": ("assert",),
}


def _tests(payload: Mapping[str, Any]) -> tuple[Kind, list[dict[str, Any]]]:
    tests: Any = payload.get("tests")
    if not isinstance(tests, list) or not tests:
        raise TaskFault("the task's `tests` is no list of tests")
    needed: Mapping[Kind, set[str]] = {
        "call": {"call", "args", "expected"},
        "stdio": {"stdin", "stdout"},
        "assert": {"assert"},
    }
    for kind, names in needed.items():
        if all(isinstance(test, dict) and set(cast("dict[str, Any]", test)) == names
               for test in cast("list[Any]", tests)):  # fmt: skip
            return kind, cast("list[dict[str, Any]]", tests)
    raise TaskFault(
        "the task's `tests` are not all {call, args, expected}, all {stdin, stdout} or all {assert}"
    )


def _results(ran: Ran, nonce: str) -> list[Any]:
    """What the runner reported: one result a test, as far as it came."""
    found: list[Any] = []
    for line in ran.output.decode(errors="replace").splitlines():
        told, _, result = line.partition(" ")
        if told == nonce:
            try:
                found.append(json.loads(result))
            except ValueError:
                return found
    return found


def _passed(kind: Kind, tests: list[dict[str, Any]], results: list[Any]) -> int:
    passed = 0
    for test, result in zip(tests, results, strict=False):
        match kind:
            case "call":
                passed += result == {"value": test["expected"]}
            case "stdio":
                printed = result.get("stdout") if isinstance(result, dict) else None
                passed += isinstance(printed, str) and _lines(printed) == _lines(test["stdout"])
            case "assert":
                passed += result == {"passed": True}
    return passed


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _detail(ran: Ran, passed: int, num_tests: int) -> str:
    end = {"exited": f"status {ran.status}", "timeout": "out of time", "output": "too much output"}
    return f"{passed} of {num_tests} tests passed, {end[ran.end]}"
