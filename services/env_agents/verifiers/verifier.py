"""What judges an answer: a Protocol, found by name or import path.

exact       services.env_agents.verifiers.exact_match:ExactMatch
maths       services.env_agents.verifiers.maths:Maths
unit_tests  services.env_agents.verifiers.unit_tests:UnitTests
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, cast

NAMES: Mapping[str, str] = {
    "exact": "services.env_agents.verifiers.exact_match:ExactMatch",
    "maths": "services.env_agents.verifiers.maths:Maths",
    "unit_tests": "services.env_agents.verifiers.unit_tests:UnitTests",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer is worth."""

    reward: float
    rewards: Mapping[str, float] = field(default_factory=dict[str, float])
    """Named parts, such as `malformed` or `timeout`."""
    detail: str = ""
    """One line for a person."""


class TaskFault(Exception):
    """The task cannot be judged, whatever the answer: a field is missing or makes no sense.

    Never a zero reward: it fails the episode with the reason `env_error`.
    """


class Verifier(Protocol):
    """Judges answers; one instance serves all episodes of a process, concurrently."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        """`options` is `task.options.verifier_options`, as written."""
        ...

    async def verify(self, answer: str, payload: Mapping[str, Any]) -> Verdict:
        """Judge an answer (text, without its stop token) to the task in `payload`.

        Raises:
            TaskFault: the task cannot be judged.
        """
        ...


def verifier(name: str, options: Mapping[str, Any]) -> Verifier:
    """Return the verifier of this process for a name or `package.module:Class`, made once.

    Raises:
        ValueError: there is no such verifier, or it refuses the options.
    """
    return _made(NAMES.get(name, name), json.dumps(dict(options), sort_keys=True))


@lru_cache(maxsize=64)
def _made(path: str, options: str) -> Verifier:
    module_name, separator, class_name = path.partition(":")
    if not separator:
        raise ValueError(
            f"verifier {path!r}: neither one of {', '.join(NAMES)} nor package.module:Class"
        )
    try:
        found: object = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise ValueError(f"verifier {path}: {error}") from error
    verify = getattr(found, "verify", None)
    if not inspect.isclass(found) or not inspect.iscoroutinefunction(verify):
        raise ValueError(f"verifier {path}: is no class with `async def verify`")
    return cast(Verifier, cast(Any, found)(json.loads(options)))
