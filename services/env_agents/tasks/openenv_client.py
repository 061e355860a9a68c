"""An environment behind an OpenEnv server: one WebSocket session per episode.

The protocol, of openenv-core 0.3 (its POST /reset and /step make an environment per request, so
that only the session at /ws can play more than one step):

    -> {"type": "reset", "data": {"seed": 7}}
    -> {"type": "step", "data": ACTION}
    <- {"type": "observation", "data": {"observation": {}, "reward": 1.0, "done": true}}
    <- {"type": "error", "data": {"code": "VALIDATION_ERROR", "message": ""}}
    -> {"type": "close"}
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any, cast

from services.env_agents.answers import without_stop, without_thought
from services.env_agents.environment import EnvironmentLost, Observation, StepResult
from services.env_agents.tasks.drawing import content_digest
from services.env_agents.tasks.options import checked, installed
from shared.wire.messages import TaskRef

OPTIONS: Mapping[str, Any] = {
    "url": ..., "action": {}, "text": "", "reset": {}, "max_turns": 100,
    "connect_timeout_s": 10.0, "max_message_bytes": 16 << 20,
}  # fmt: skip

BLAMED_ON_ACTION = {"VALIDATION_ERROR", "INVALID_JSON"}
"""Error codes for which the policy is told what was wrong and goes on."""


class OpenEnvError(Exception):
    """The server refuses, or says what the protocol does not know."""


class OpenEnvClient:
    """One episode. Satisfies `Environment`.

    Args:
        options: `url` (`http://host:port`), `action` (a JSON object in which a text `{answer}`
            stands for the policy's answer, such as `{"message": "{answer}"}`; without one the
            answer itself is to be the JSON object), `text` (the observation's field to show;
            without one, all of it as JSON), `reset` (further fields of the reset; `seed` is
            sent in any case, and the task's payload under its own names), `max_turns` (100),
            `connect_timeout_s` (10), `max_message_bytes` (16 MiB).

    Raises:
        ValueError: an unknown option, no url, or websockets is not installed.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        chosen = checked("OpenEnvClient", options, OPTIONS)
        url = str(chosen["url"]).rstrip("/")
        scheme, separator, rest = url.partition("://")
        if not separator or scheme not in ("http", "https", "ws", "wss"):
            raise ValueError(f"url {url}: write it as http://host:port")
        secure = scheme in ("https", "wss")
        self._url = f"{'wss' if secure else 'ws'}://{rest}/ws"
        self._action: Any = chosen["action"]
        self._field = str(chosen["text"])
        self._reset = dict(chosen["reset"])
        self._max_turns = int(chosen["max_turns"])
        self._connect_timeout_s = float(chosen["connect_timeout_s"])
        self._max_message_bytes = int(chosen["max_message_bytes"])
        self._client = installed("websockets.asyncio.client", "openenv")
        self._exceptions = installed("websockets.exceptions", "openenv")
        self._connection: Any = None
        self._turns = 0
        self._digest = ""

    async def reset(self, task: TaskRef) -> Observation:
        """Open a session and reset it with a seed from the task.

        Raises:
            EnvironmentLost: the server cannot be reached, or went away.
            OpenEnvError: it refuses, for example because its sessions are all taken.
        """
        wanted = content_digest(task.dataset, task.split, str(task.seed), str(task.index))
        data = {"seed": int(wanted, 16) >> 33, **self._reset, **task.payload}
        try:
            self._connection = await self._client.connect(
                self._url, open_timeout=self._connect_timeout_s, max_size=self._max_message_bytes,
                proxy=None, close_timeout=1.0,
            )  # fmt: skip
        except (OSError, TimeoutError, self._exceptions.WebSocketException) as error:
            raise EnvironmentLost(f"{self._url}: {_line(error)}") from error
        answer = await self._ask({"type": "reset", "data": data})
        text = self._text(answer.get("observation"))
        self._digest = content_digest(
            self._url, json.dumps(data, sort_keys=True, default=str), text
        )
        return Observation(text)

    async def step(self, answer: str) -> StepResult:
        """Send the answer as an action; one that the server cannot read is a wasted turn.

        Raises:
            EnvironmentLost: the server went away.
            OpenEnvError: the environment failed.
        """
        self._turns += 1
        late = self._turns >= self._max_turns
        said = without_thought(without_stop(answer)).strip()
        try:
            action = self._filled(said)
        except ValueError as error:
            return _malformed(str(error), late)
        try:
            data = await self._ask({"type": "step", "data": action})
        except _ActionRefused as error:
            return _malformed(str(error), late)
        done = bool(data.get("done", False))
        return StepResult(
            observation=Observation(self._text(data.get("observation"))),
            reward=float(data.get("reward") or 0.0),
            terminated=done,
            truncated=late and not done,
        )

    def task_digest(self) -> str:
        return self._digest

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        try:
            await connection.send(json.dumps({"type": "close"}))
        except self._exceptions.ConnectionClosed:
            return
        finally:
            await connection.close()

    async def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            # A server that refuses the session says why before it hangs up: read even then.
            with contextlib.suppress(self._exceptions.ConnectionClosed):
                await self._connection.send(json.dumps(message))
            raw = await self._connection.recv()
        except (OSError, self._exceptions.ConnectionClosed) as error:
            raise EnvironmentLost(f"{self._url} hung up: {_line(error)}") from error
        try:
            answer: Any = json.loads(raw)
        except ValueError as error:
            raise OpenEnvError(f"answered no JSON: {str(raw)[:100]!r}") from error
        match answer:
            case {"type": "observation", "data": dict(data)}:
                return cast("dict[str, Any]", data)
            case {"type": "error", "data": {"code": code, "message": text, **more}}:
                if code in BLAMED_ON_ACTION and message["type"] == "step":
                    raise _ActionRefused(_refusal(text, more))
                raise OpenEnvError(f"{code}: {text}")
            case _:
                raise OpenEnvError(f"answered {str(answer)[:100]}")

    def _filled(self, answer: str) -> dict[str, Any]:
        if self._action:
            return cast("dict[str, Any]", _fill(self._action, answer))
        try:
            action: Any = json.loads(answer)
        except ValueError as error:
            raise ValueError(f"the answer is no JSON: {error}") from error
        if not isinstance(action, dict):
            raise ValueError("the answer is no JSON object")
        return cast("dict[str, Any]", action)

    def _text(self, observation: Any) -> str:
        if not isinstance(observation, dict):
            raise OpenEnvError(f"an observation that is no object: {str(observation)[:100]}")
        fields = cast("dict[str, Any]", observation)
        if not self._field:
            return json.dumps(fields) + "\n"
        if self._field not in fields:
            raise OpenEnvError(f"the observation has no {self._field!r}, but {sorted(fields)}")
        return f"{fields[self._field]}\n"


class _ActionRefused(Exception):
    pass


def _malformed(told: str, late: bool) -> StepResult:
    return StepResult(Observation(f"Error: {told}\n"), truncated=late, rewards={"malformed": 1.0})


def _fill(part: Any, answer: str) -> Any:
    match part:
        case str():
            return part.replace("{answer}", answer)
        case dict():
            fields = cast("dict[str, Any]", part)
            return {name: _fill(value, answer) for name, value in fields.items()}
        case list():
            return [_fill(value, answer) for value in cast("list[Any]", part)]
        case _:
            return part


def _refusal(text: str, more: Mapping[str, Any]) -> str:
    errors: Any = more.get("errors")
    if not isinstance(errors, list):
        return text
    named = [
        f"{'.'.join(str(part) for part in error.get('loc', ()))}: {error.get('msg', '')}"
        for error in cast("list[dict[str, Any]]", errors)
    ]
    return f"{text}: {'; '.join(named)}"


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
