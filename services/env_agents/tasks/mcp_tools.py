"""Tools of an MCP server, over stdio or streamable HTTP; the final answer is judged by a verifier.

One session per episode, and with `command` one server process per episode. The first observation
is the tools' schemas and the task's question; an answer with <tool_call>...</tool_call> is
carried out and answered with <tool_response>...</tool_response>, one without is the final answer.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from services.env_agents.answers import without_stop
from services.env_agents.chat.tool_parsers import HermesParser
from services.env_agents.environment import EnvironmentLost, Observation, StepResult
from services.env_agents.tasks.drawing import content_digest
from services.env_agents.tasks.options import checked, installed
from services.env_agents.verifiers.verifier import TaskFault, verifier
from shared.wire.messages import TaskRef

OPTIONS: Mapping[str, Any] = {
    "url": "", "command": "", "args": [], "env": {}, "cwd": "", "log": "", "verifier": ...,
    "verifier_options": {}, "max_turns": 20, "tool_timeout_s": 20.0, "max_result_chars": 8000,
}  # fmt: skip

CLOSE_S = 5.0
"""For the server to end before its session is given up."""


class McpTools:
    """One episode. Satisfies `Environment`.

    The task's payload has `question` and what the verifier needs.

    Args:
        options: `url` (of a streamable HTTP endpoint) or `command`, `args`, `env`, `cwd`, `log`
            (of a server that speaks on stdio; a file for its stderr), `verifier`,
            `verifier_options`, `max_turns` (20), `tool_timeout_s` (20: one call),
            `max_result_chars` (8000: of one result).

    Raises:
        ValueError: an unknown option, neither or both of url and command, or mcp is missing.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        chosen = checked("McpTools", options, OPTIONS)
        if bool(chosen["url"]) == bool(chosen["command"]):
            raise ValueError("McpTools needs either `url` or `command`")
        mcp = installed("mcp", "mcp")
        self._where = str(chosen["url"] or chosen["command"])
        self._verifier = verifier(str(chosen["verifier"]), dict(chosen["verifier_options"]))
        self._max_turns = int(chosen["max_turns"])
        self._max_result_chars = int(chosen["max_result_chars"])
        self._parser = HermesParser()
        self._session = _Session(mcp, chosen)
        self._payload: Mapping[str, Any] = {}
        self._turns = 0

    async def reset(self, task: TaskRef) -> Observation:
        """Connect, list the tools, ask.

        Raises:
            EnvironmentLost: no server.
            TaskFault: the task has no question.
        """
        self._payload = task.payload
        question = task.payload.get("question")
        if not isinstance(question, str) or not question:
            raise TaskFault(f"the task {task.split}/{task.index} has no `question`")
        tools = await self._session.start()
        listed = "\n".join(json.dumps(tool) for tool in tools)
        return Observation(f"<tools>\n{listed}\n</tools>\n{question}\n")

    async def step(self, answer: str) -> StepResult:
        """Carry out the calls of an answer, or judge it when it has none.

        Raises:
            EnvironmentLost: the server went away.
            TaskFault: the task cannot be judged.
        """
        self._turns += 1
        said = without_stop(answer)
        parsed = self._parser.parse(said)
        if not parsed.tool_calls and not parsed.errors:
            verdict = await self._verifier.verify(said, self._payload)
            return StepResult(
                Observation(""), reward=verdict.reward, terminated=True, rewards=verdict.rewards
            )
        # An answer with a malformed call makes none: what is wrong is all that it is told.
        told = [_response(f"Error: {error}", self._max_result_chars) for error in parsed.errors]
        failed = 0
        for call in parsed.tool_calls:
            text, ok = await self._session.call(call.name, dict(call.arguments))
            failed += not ok
            told.append(_response(text, self._max_result_chars))
        rewards = {"tool_calls": float(len(told))}
        if parsed.errors:
            rewards["malformed"] = float(len(parsed.errors))
        if failed:
            rewards["tool_errors"] = float(failed)
        return StepResult(
            Observation("".join(told)), truncated=self._turns >= self._max_turns, rewards=rewards
        )

    def task_digest(self) -> str:
        return content_digest(self._where, json.dumps(self._payload, sort_keys=True, default=str))

    async def close(self) -> None:
        await self._session.stop()


class _Session:
    """A client in a task of its own: its library may cancel the task that it lives in."""

    def __init__(self, mcp: Any, chosen: Mapping[str, Any]) -> None:
        self._mcp = mcp
        self._timeout_s = float(chosen["tool_timeout_s"])
        self._where = str(chosen["url"] or chosen["command"])
        self._chosen = chosen
        self._calls: asyncio.Queue[tuple[str, dict[str, Any], asyncio.Future[Any]] | None]
        self._calls = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._why = ""

    async def start(self) -> list[dict[str, Any]]:
        """Connect and return the tools in OpenAI's schema.

        Raises:
            EnvironmentLost: no server, or it does not list its tools.
        """
        listed: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(listed))
        tools = await self._outcome(listed, "answered no list of tools")
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                },
            }
            for tool in tools
        ]

    async def call(self, name: str, arguments: dict[str, Any]) -> tuple[str, bool]:
        """Call a tool: what it returned or what went wrong with it, and which of the two.

        Raises:
            EnvironmentLost: the server went away.
        """
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.put_nowait((name, arguments, done))
        try:
            result = await self._outcome(done, "hung up")
        except self._mcp.MCPError as error:
            return f"Error: {error}", False
        text = "\n".join(
            part.text if part.type == "text" else f"[{part.type}]" for part in result.content
        )
        return (f"Error: {text}", False) if result.is_error else (text, True)

    async def stop(self) -> None:
        """End the session, and the server if it was started here."""
        task, self._task = self._task, None
        if task is None:
            return
        self._calls.put_nowait(None)
        _, late = await asyncio.wait([task], timeout=CLOSE_S)
        for one in late:
            one.cancel()
            await asyncio.wait([one], timeout=CLOSE_S)

    async def _outcome(self, future: asyncio.Future[Any], fate: str) -> Any:
        """Wait for a result, or for the end of the session."""
        assert self._task is not None, "call before start"
        await asyncio.wait([future, self._task], return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        future.cancel()
        raise EnvironmentLost(f"MCP server {self._where} {fate}: {self._why or 'no reason given'}")

    async def _live(self, listed: asyncio.Future[Any]) -> None:
        try:
            async with AsyncExitStack() as stack:
                client = self._mcp.Client(self._server(stack), read_timeout_seconds=self._timeout_s)
                await stack.enter_async_context(client)
                listed.set_result((await client.list_tools()).tools)
                while (order := await self._calls.get()) is not None:
                    await self._perform(client, *order)
        except asyncio.CancelledError:
            self._why = self._why or "its session was cancelled"
        except BaseExceptionGroup as group:
            self._why = _line(_innermost(group))
        except Exception as error:  # noqa: BLE001 - whatever ends a session loses its episode
            self._why = _line(error)

    def _server(self, stack: AsyncExitStack) -> Any:
        """Return what the client connects to."""
        if self._chosen["url"]:
            return str(self._chosen["url"])
        parameters = self._mcp.StdioServerParameters(
            command=self._chosen["command"],
            args=[str(argument) for argument in self._chosen["args"]],
            env={**os.environ, **self._chosen["env"]},
            cwd=self._chosen["cwd"] or None,
        )
        # A server's own log must not end up among the service's lines.
        log = Path(self._chosen["log"] or os.devnull).open("a")  # noqa: SIM115 - by the stack
        stack.enter_context(log)
        return self._mcp.stdio_client(parameters, errlog=log)

    async def _perform(
        self, client: Any, name: str, arguments: dict[str, Any], done: asyncio.Future[Any]
    ) -> None:
        try:
            result = await client.call_tool(name, arguments)
        except self._mcp.MCPError as error:
            if error.code == self._mcp.types.CONNECTION_CLOSED:
                raise
            if error.code == self._mcp.types.REQUEST_TIMEOUT:
                await client.session.list_tools()  # a slow tool, or nobody there?
            if not done.done():
                done.set_exception(error)
        else:
            if not done.done():
                done.set_result(result)


def _response(text: str, max_chars: int) -> str:
    return f"<tool_response>\n{text[:max_chars]}\n</tool_response>\n"


def _innermost(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first: BaseException = group
    while isinstance(first, BaseExceptionGroup):
        nested: BaseExceptionGroup[BaseException] = first
        first = nested.exceptions[0]
    return first


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
