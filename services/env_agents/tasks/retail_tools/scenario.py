"""One task: a database, what the user wants, and what a perfect agent does. Pure."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

Database = dict[str, dict[str, Any]]
"""Table -> key -> row, JSON-like."""

Call = tuple[str, dict[str, Any]]
"""Tool, arguments."""

PERSONALITIES = ("direct", "terse", "chatty", "forgetful", "wavering")
"""direct: everything at once. terse: one fact per question. chatty: everything, among small talk.
forgetful: no ids, only what they can be found by. wavering: another wish once asked to confirm."""


@dataclass(frozen=True)
class Want:
    """What a user asks for, drawn by a domain."""

    goal: str
    """In the user's words."""
    facts: Mapping[str, str]
    """Slot -> the user's sentence about it; slots are words an agent asks with."""
    calls: Sequence[Call]
    """What a perfect agent calls, lookups included."""
    required: Sequence[str] = ()
    """What it must have told the user by the end, word for word."""
    change: str = ""
    """What a wavering user says instead of confirming: `calls` and `required` are after it."""


@dataclass(frozen=True)
class Scenario:
    """A whole task."""

    domain: str
    personality: str
    database: Database
    want: Want

    def row(self) -> dict[str, Any]:
        """Return the JSON form."""
        made = asdict(self)
        made["want"]["calls"] = [[tool, arguments] for tool, arguments in self.want.calls]
        made["want"]["required"] = list(self.want.required)
        return made

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Scenario:
        """Read the JSON form.

        Raises:
            ValueError: a field is missing or of a wrong kind, with its name.
        """
        try:
            want = row["want"]
            return cls(
                domain=str(row["domain"]),
                personality=str(row["personality"]),
                database=copy.deepcopy(dict(row["database"])),
                want=Want(
                    goal=str(want["goal"]),
                    facts=dict(want["facts"]),
                    calls=tuple((str(tool), dict(args)) for tool, args in want["calls"]),
                    required=tuple(map(str, want["required"])),
                    change=str(want.get("change", "")),
                ),
            )
        except KeyError as error:
            raise ValueError(f"a retail_tools task has no field {error}") from error
        except TypeError as error:
            raise ValueError(f"a retail_tools task is malformed: {error}") from error

    def digest(self) -> str:
        """Digest of the content, 16 hex digits."""
        return state_digest(self.row())


class Domain(Protocol):
    """One line of business: its policy, its tools over a database, and a drawer of tasks."""

    name: str
    policy: str
    """What the agent is told."""

    def tools(self, database: Database) -> Sequence[Callable[..., Any]]:
        """Return the functions, bound to a database that they may change."""
        ...

    def draw(self, rng: random.Random, personality: str) -> tuple[Database, Want]:
        """Draw a database and what its user wants."""
        ...


def state_digest(state: object) -> str:
    """Digest of JSON-like content, whatever the order of its keys."""
    written = json.dumps(state, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(written.encode(), digest_size=8).hexdigest()
