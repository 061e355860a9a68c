"""Unmodified agents, as people have them: the openai SDK, sync, async and streaming."""

from __future__ import annotations

import json
import threading
from typing import Any

import openai

TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a", "b"],
            },
        },
    }
]
QUESTION: Any = {"role": "user", "content": "What is 2 + 3?"}


def calculator(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """A tool loop, written for any OpenAI endpoint."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key)
    messages: list[Any] = [QUESTION]
    for _ in range(5):
        completion = client.chat.completions.create(
            model="gpt-4o", messages=messages, tools=TOOLS, temperature=0.2
        )
        message = completion.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return float("5" in (message.content or ""))
        for call in message.tool_calls:
            arguments = json.loads(call.function.arguments)  # type: ignore[union-attr]
            result = str(arguments["a"] + arguments["b"])
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return 0.0


TOGETHER = threading.Barrier(24)


def sociable(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """Written for threads; goes on only once 24 of its kind have had an answer."""
    client = openai.OpenAI(base_url=base_url, api_key=api_key)
    client.chat.completions.create(model="m", messages=[QUESTION])
    TOGETHER.wait(15)
    return 1.0


async def streamer(base_url: str, api_key: str, task: dict[str, Any]) -> dict[str, float]:
    """Streams, with usage, and looks at what models there are."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        models = [model.id async for model in client.models.list()]
        stream = await client.chat.completions.create(
            model=models[0],
            messages=[QUESTION],
            tools=TOOLS,
            stream=True,
            stream_options={"include_usage": True},
        )
        name, arguments, usage = "", "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                for call in choice.delta.tool_calls or ():
                    assert call.function is not None
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
        assert usage is not None
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        return {"called": float((name, json.loads(arguments)) == ("add", {"a": 2, "b": 3}))}


async def completer(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """The older endpoint, growing one text; log-probs asked for."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        text = "Once upon"
        for _ in range(2):
            made = await client.completions.create(model="m", prompt=text, logprobs=1, max_tokens=3)
            assert made.choices[0].logprobs is not None
            assert made.choices[0].logprobs.token_logprobs == [-0.25] * 3
            text += made.choices[0].text
        return 1.0


async def unkind(base_url: str, api_key: str, task: dict[str, Any]) -> dict[str, float]:
    """Asks for everything that cannot be served; returns what was refused, by name."""
    refused: dict[str, float] = {}
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    for name, wish in (
        ("n", {"n": 2}),
        ("stop", {"stop": [""]}),
        ("json", {"response_format": {"type": "json_object"}}),
        ("max_tokens", {"max_tokens": -1}),
    ):
        try:
            await client.chat.completions.create(model="m", messages=[QUESTION], **wish)  # type: ignore[call-overload]
        except openai.BadRequestError:
            refused[name] = 1.0
    try:
        await client.chat.completions.create(model="m", messages=[])
    except openai.BadRequestError:
        refused["messages"] = 1.0
    stranger = openai.AsyncOpenAI(base_url=base_url, api_key="lw-guess", max_retries=0)
    try:
        await stranger.models.list()
    except openai.AuthenticationError:
        refused["key"] = 1.0
    try:
        await client.embeddings.create(model="m", input="x")
    except openai.NotFoundError:
        refused["path"] = 1.0
    await client.chat.completions.create(model="m", messages=[QUESTION])
    await client.close()
    await stranger.close()
    return refused


async def stopped(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """Reads answers up to a stop string, and sends them back so."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        made = await client.chat.completions.create(
            model="m", messages=[QUESTION], stop=["Observation:"]
        )
        said = made.choices[0].message.content
        assert said == "Thought: hm. "
        again: Any = [QUESTION, {"role": "assistant", "content": said}, QUESTION]
        await client.chat.completions.create(model="m", messages=again)
    return 1.0


async def crasher(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """Fails after its first answer."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        await client.chat.completions.create(model="m", messages=[QUESTION])
    raise RuntimeError("the agent's own bug")


def quitter(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """Ends as scripts end."""
    openai.OpenAI(base_url=base_url, api_key=api_key).chat.completions.create(
        model="m", messages=[QUESTION]
    )
    raise SystemExit(3)


def silent(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """Never asks."""
    return 1.0


async def talkative(base_url: str, api_key: str, task: dict[str, Any]) -> str:
    """Returns no reward."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        made = await client.chat.completions.create(model="m", messages=[QUESTION])
    return made.choices[0].message.content or ""


async def forgetful(base_url: str, api_key: str, task: dict[str, Any]) -> float:
    """Compacts its history, and lets a second agent ask in between."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        first = await client.chat.completions.create(model="m", messages=[QUESTION])
        said = first.choices[0].message.content
        await client.chat.completions.create(
            model="m",
            messages=[QUESTION, {"role": "assistant", "content": said},
                      {"role": "user", "content": "and 3 + 4?"}],
        )  # fmt: skip
        await client.chat.completions.create(
            model="m", messages=[QUESTION, {"role": "user", "content": "a summary, and 4 + 5?"}]
        )
        await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "I am another agent"}]
        )
    return 1.0
