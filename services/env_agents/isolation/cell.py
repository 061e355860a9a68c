"""The inside of an episode's process: calls in, answers out, one environment."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

from services.env_agents.environment import ActsOnAnswers, Environment, EnvironmentLost
from services.env_agents.isolation import frames, plain
from services.env_agents.isolation.confinement import CellLimits, release_reserve
from shared.wire.messages import TaskRef

LONGEST_ERROR = 2000
"""Characters of an exception's text that are passed on."""


async def serve(
    connection: socket.socket, make: Callable[[], Environment], limits: CellLimits
) -> None:
    """Play one episode by remote control, until the other side hangs up."""
    reader, writer = await asyncio.open_connection(sock=connection)
    cell = _Cell(make, limits)
    while True:
        try:
            call = await frames.read(reader, limits.max_message_bytes)
        except EOFError:
            return
        answer = _packed(await cell.answer(call))
        if len(answer) > limits.max_message_bytes:
            answer = frames.pack({"error": _too_large(len(answer), limits.max_message_bytes)})
        writer.write(answer)
        await writer.drain()


class _Cell:
    def __init__(self, make: Callable[[], Environment], limits: CellLimits) -> None:
        self._make = make
        self._limits = limits
        self._environment: Environment | None = None

    async def answer(self, call: dict[str, Any]) -> dict[str, Any]:
        """Return what the call led to: its result, `error` or `lost`."""
        try:
            return await self._perform(call)
        except EnvironmentLost as error:
            return {"lost": str(error)[:LONGEST_ERROR]}
        except MemoryError:
            release_reserve()  # what leaked is still held: without it no answer could be built
            mebibytes = self._limits.memory_bytes >> 20
            return {"error": f"MemoryError: beyond isolation.memory_mb ({mebibytes} MiB)"}
        except (Exception, SystemExit) as error:  # noqa: BLE001 - any fault costs only this episode
            return {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}

    async def _perform(self, call: dict[str, Any]) -> dict[str, Any]:
        match call:
            case {"call": "reset", "task": task}:
                self._environment = self._make()
                observation = cast(object, await self._environment.reset(_task(task)))
                said = plain.of_observation(observation)
                return {"observation": said, "digest": str(self._environment.task_digest())}
            case {"call": "step", "answer": str(answer)} if self._environment is not None:
                return plain.of_result(cast(object, await self._environment.step(answer)))
            case {"call": "act", "answer": fields} if self._environment is not None:
                assert isinstance(self._environment, ActsOnAnswers), "asked only where it acts"
                answered = await self._environment.act(plain.answer(fields))
                return plain.of_result(cast(object, answered))
            case {"call": "close"}:
                if self._environment is not None:
                    await self._environment.close()
                return {}
            case _:
                raise ValueError(f"no such call: {call.get('call')}")


def _task(fields: dict[str, Any]) -> TaskRef:
    return TaskRef.model_validate(fields)


def _packed(answer: dict[str, Any]) -> bytes:
    try:
        return frames.pack(answer)
    except (TypeError, ValueError, OverflowError) as error:
        # Text with half a character, say: the environment's fault, and its episode's end.
        return frames.pack({"error": f"returned what cannot be sent: {type(error).__name__}"})


def _too_large(num_bytes: int, max_bytes: int) -> str:
    return f"an observation of {num_bytes} bytes, isolation.max_message_bytes is {max_bytes}"
