"""The retail_tools environment: an agent serves a scripted user over a domain's tools.

The reward is 1 when the database has become what the right calls make of it *and* the user was
told what they had to be told, else 0. Looking things up changes nothing and costs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from services.env_agents.environment import Message
from services.env_agents.tasks.retail_tools.generator import DOMAINS, FULL, draw
from services.env_agents.tasks.retail_tools.scenario import (
    PERSONALITIES,
    Database,
    Scenario,
    state_digest,
)
from services.env_agents.tasks.retail_tools.user import ScriptedUser
from services.env_agents.tool_environment import ToolEnvironment
from shared.wire.messages import TaskRef


class RetailTools(ToolEnvironment):
    """Plays the task of a row (generator's JSON lines), or draws it from (split, seed, index).

    Args:
        options: `domains` and `personalities`: lists that drawn tasks are restricted to.

    Raises:
        ValueError: an unknown option, domain or personality.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        unknown = sorted(set(options) - {"domains", "personalities"})
        if unknown:
            raise ValueError(
                f"unknown option {unknown[0]!r}; retail_tools has domains, personalities"
            )
        self._domains = _chosen("domain", options.get("domains"), tuple(FULL), tuple(DOMAINS))
        self._personalities = _chosen(
            "personality", options.get("personalities"), PERSONALITIES, PERSONALITIES
        )
        self.scenario: Scenario | None = None
        self.database: Database = {}
        self._user: ScriptedUser | None = None
        self._said: list[str] = []

    def start(self, task: TaskRef) -> Sequence[Message]:
        if task.payload:
            self.scenario = Scenario.of_row(task.payload)
        else:
            self.scenario = draw(
                task.split, task.seed, task.index, self._domains, self._personalities
            )
        if self.scenario.domain not in DOMAINS:
            raise ValueError(f"no domain {self.scenario.domain!r}; there are {', '.join(DOMAINS)}")
        self.database = copy.deepcopy(self.scenario.database)
        self._user = ScriptedUser(self.scenario)
        return (
            {"role": "system", "content": DOMAINS[self.scenario.domain].policy},
            {"role": "user", "content": self._user.opening()},
        )

    def tools(self) -> Sequence[Callable[..., Any]]:
        assert self.scenario is not None
        return DOMAINS[self.scenario.domain].tools(self.database)

    def reply(self, content: str) -> str | None:
        assert self._user is not None
        self._said.append(content)
        return self._user.reply(content)

    def reward(self) -> Mapping[str, float]:
        assert self.scenario is not None
        told = "\n".join(self._said)
        informed = all(text in told for text in self.scenario.want.required)
        right = state_digest(self.database) == state_digest(target(self.scenario))
        return {"task": float(right and informed)}

    def task_digest(self) -> str:
        assert self.scenario is not None
        return self.scenario.digest()


def target(scenario: Scenario) -> Database:
    """Return the database after the right calls."""
    database = copy.deepcopy(scenario.database)
    tools = {tool.__name__: tool for tool in DOMAINS[scenario.domain].tools(database)}
    for name, arguments in scenario.want.calls:
        tools[name](**arguments)
    return database


def _chosen(
    what: str, named: object, default: tuple[str, ...], known: tuple[str, ...]
) -> tuple[str, ...]:
    if named is None:
        return default
    chosen = tuple(named) if isinstance(named, list | tuple) else (str(named),)
    for name in chosen:
        if name not in known:
            raise ValueError(f"no {what} {name!r}; there are {', '.join(known)}")
    if not chosen:
        raise ValueError(f"an empty list of {what} names")
    return chosen
