"""The agent of an episode: a Python function, or a command, told where its model answers."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

from shared.wire.messages import TaskRef

_STDERR_BYTES = 2000


class Program(Protocol):
    """Plays one episode against an endpoint."""

    async def run(self, base_url: str, api_key: str, task: TaskRef) -> dict[str, float]:
        """Return the parts of the reward by name.

        Raises:
            Exception: whatever the agent failed of.
        """
        ...


@dataclass(frozen=True, slots=True)
class Function:
    """`agent(base_url, api_key, task)`, sync or async; task is a dict, the result the reward."""

    agent: Callable[..., Any]

    @classmethod
    def load(cls, path: str) -> Function:
        """Import package.module:function.

        Raises:
            ValueError: there is none.
        """
        module_name, separator, name = path.partition(":")
        if not separator:
            raise ValueError(f"agent {path!r}: write it as package.module:function")
        try:
            found = getattr(import_module(module_name), name)
        except Exception as error:
            raise ValueError(f"agent {path!r}: {type(error).__name__}: {error}") from error
        if not callable(found):
            raise ValueError(f"agent {path!r} is no function")
        return cls(found)

    async def run(self, base_url: str, api_key: str, task: TaskRef) -> dict[str, float]:
        told = task.model_dump(mode="json")
        try:
            if inspect.iscoroutinefunction(self.agent):
                return rewards_of(await self.agent(base_url, api_key, told))
            return rewards_of(await _in_thread(self.agent, base_url, api_key, told))
        except SystemExit as error:
            # Out of a task it would end the event loop, and every episode with it.
            raise RuntimeError(f"the agent called sys.exit({error.code})") from error


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a thread of its own; whatever it raises is raised here.

    Not in asyncio's pool: an agent keeps its thread for the whole episode, and a few threads would
    make the others wait. A daemon: one that hangs must not keep the service from ending.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Any] = loop.create_future()

    def settle(result: object, error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(result)
        else:
            ended.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except StopIteration as caught:  # no future takes this one
            error = RuntimeError(f"the agent raised {caught!r}")
        except BaseException as caught:  # noqa: BLE001 - carried over, not swallowed
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="agent", daemon=True).start()
    return await ended


@dataclass(frozen=True, slots=True)
class Command:
    """A process with OPENAI_BASE_URL, OPENAI_API_KEY and LAGWISE_TASK (JSON) in its environment.

    The last line that it prints is the reward: a number, or a JSON object of numbers.
    """

    arguments: Sequence[str]

    async def run(self, base_url: str, api_key: str, task: TaskRef) -> dict[str, float]:
        told = {
            "OPENAI_BASE_URL": base_url,
            "OPENAI_API_KEY": api_key,
            "LAGWISE_TASK": json.dumps(task.model_dump(mode="json")),
        }
        process = await asyncio.create_subprocess_exec(
            *self.arguments,
            env={**os.environ, **told},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            printed, complaints = await process.communicate()
        finally:
            # With everything that it started.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if process.returncode:
            last = complaints[-_STDERR_BYTES:].decode(errors="replace").strip()
            raise RuntimeError(f"the agent exited with {process.returncode}: {last}")
        lines = printed.decode(errors="replace").strip().splitlines() or [""]
        try:
            return rewards_of(json.loads(lines[-1]))
        except ValueError as error:
            raise ValueError(
                f"the agent's last line is no reward (a number or a JSON object of numbers): "
                f"{lines[-1][:120]!r}"
            ) from error


def rewards_of(result: object) -> dict[str, float]:
    """Read an agent's result.

    Raises:
        ValueError: it is neither a number nor numbers by name.
    """
    if isinstance(result, bool | int | float):
        return {"task": float(result)}
    if isinstance(result, Mapping):
        parts = cast("Mapping[Any, Any]", result)
        if parts and all(isinstance(value, bool | int | float) for value in parts.values()):
            return {str(name): float(value) for name, value in parts.items()}
    raise ValueError(f"an agent returns its reward: a number, or numbers by name, not {result!r}")
