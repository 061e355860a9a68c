"""MCP tools with the official SDK, against a real server over both transports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.env_agents.environment import EnvironmentLost
from services.env_agents.tasks.mcp_tools import McpTools
from services.env_agents.verifiers.verifier import TaskFault
from tests.real_packages.servers import serving, task

SERVER = Path(__file__).with_name("mcp_server.py")
STDIO: dict[str, Any] = {"command": sys.executable, "args": [str(SERVER)], "verifier": "exact"}
QUESTION = task(question="What is 2 + 3?", answer="5")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving("mcp_server.py") as (port, _):
        yield f"http://127.0.0.1:{port}/mcp"


@pytest.fixture(params=["stdio", "http"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "stdio":
        return STDIO
    return {"url": request.getfixturevalue("url"), "verifier": "exact"}


def call(name: str, **arguments: Any) -> str:
    written = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{written}\n</tool_call><|im_end|>"


async def test_tools_are_listed_called_and_the_final_answer_is_judged(
    options: dict[str, Any],
) -> None:
    tools = McpTools(options)
    first = (await tools.reset(QUESTION)).text
    assert first.endswith("</tools>\nWhat is 2 + 3?\n")
    listed = [json.loads(line)["function"] for line in first.split("\n")[1:-3]]
    assert [tool["name"] for tool in listed] == ["add", "divide", "sleep", "die"]
    assert listed[0]["parameters"]["required"] == ["a", "b"]
    result = await tools.step(call("add", a=2, b=3))
    assert result.observation.text == "<tool_response>\n5\n</tool_response>\n"
    assert (result.rewards, result.terminated) == ({"tool_calls": 1.0}, False)
    end = await tools.step("5<|im_end|>")
    assert (end.reward, end.terminated) == (1.0, True)
    await tools.close()


BAD_CALLS = [
    (call("divide", a=1, b=0), "Error executing tool divide", "tool_errors"),
    (call("nope"), "Unknown tool: nope", "tool_errors"),
    (call("add", a="x"), "validation error", "tool_errors"),
    ("<tool_call>{</tool_call>", "Error: malformed tool call '{'", "malformed"),
    ('<tool_call>{"name": "add"', "is not closed by </tool_call>", "malformed"),
]


async def test_a_bad_call_is_told_to_the_policy_and_the_episode_goes_on(
    options: dict[str, Any],
) -> None:
    tools = McpTools(options)
    await tools.reset(QUESTION)
    for answer, told, named in BAD_CALLS:
        result = await tools.step(answer)
        assert told in result.observation.text
        assert result.rewards == {"tool_calls": 1.0, named: 1.0}
        assert "5" in (await tools.step(call("add", a=2, b=3))).observation.text
    await tools.close()


async def test_a_tool_that_takes_too_long_is_told_to_the_policy(url: str) -> None:
    tools = McpTools({"url": url, "verifier": "exact", "tool_timeout_s": 5.0})
    await tools.reset(QUESTION)
    result = await tools.step(call("sleep", seconds=8))
    assert "timed out" in result.observation.text
    assert result.rewards["tool_errors"] == 1.0
    await tools.close()


async def test_a_server_process_that_dies_in_mid_episode_is_a_lost_environment() -> None:
    tools = McpTools(STDIO)
    await tools.reset(QUESTION)
    with pytest.raises(EnvironmentLost, match="hung up: MCPError: Connection closed"):
        await tools.step(call("die"))
    await tools.close()


async def test_an_http_server_that_dies_in_mid_episode_is_a_lost_environment() -> None:
    with serving("mcp_server.py") as (port, process):
        url = f"http://127.0.0.1:{port}/mcp"
        tools = McpTools({"url": url, "verifier": "exact"})
        await tools.reset(QUESTION)
        with pytest.raises(EnvironmentLost, match=f"MCP server {url} hung up"):
            await tools.step(call("die"))
        await tools.close()
        assert process.wait(10) == 9
        with pytest.raises(EnvironmentLost, match="answered no list of tools"):
            await McpTools({"url": url, "verifier": "exact"}).reset(QUESTION)


async def test_a_command_that_does_not_exist_is_a_lost_environment_by_name() -> None:
    tools = McpTools({**STDIO, "command": "no-such-command"})
    with pytest.raises(EnvironmentLost, match=r"no-such-command answered no list.*FileNotFound"):
        await tools.reset(QUESTION)
    await tools.close()


async def test_a_task_without_a_question_starts_no_server() -> None:
    with pytest.raises(TaskFault, match="train/7 has no `question`"):
        await McpTools(STDIO).reset(task(7))
