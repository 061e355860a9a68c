"""OpenAI's requests and responses <-> observations and answers. Pure.

What a request asks of the sampler beyond a bound on tokens is not done: training must know the
distribution that tokens were drawn from, which is the run's. Harmless wishes are ignored by name;
those that an agent would misread if ignored (n > 1, JSON mode) are refused. A stop string ends
what the agent is told; the policy went on to its own stop token, and what it sampled stays.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from services.env_agents.answer import Answer
from services.env_agents.environment import Observation

IGNORED = (
    "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty",
    "logit_bias", "parallel_tool_calls", "reasoning_effort",
)  # fmt: skip


class BadRequest(Exception):
    """The request cannot be served: status 400 and an error as OpenAI writes it."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request."""

    observation: Observation
    model: str
    is_chat: bool
    stream: bool = False
    with_usage: bool = False
    """In the last chunk of a stream."""
    with_logprobs: bool = False
    stops: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    """Wishes that were left aside."""


def parse(path: str, body: bytes) -> Asked:
    """Read the body of a POST to /v1/chat/completions or /v1/completions.

    Raises:
        BadRequest: with the field that cannot be served.
    """
    try:
        found = json.loads(body)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadRequest("the body is not a JSON object")
    request = cast("dict[str, Any]", found)
    is_chat = path.endswith("/chat/completions")
    _refuse(request)
    ignored = [name for name in IGNORED if request.get(name) is not None]
    if request.get("tool_choice") not in (None, "auto", "none"):
        ignored.append("tool_choice")
    bound = _bound(request)
    logprobs = request.get("logprobs")
    options = cast("dict[str, Any]", request.get("stream_options") or {})
    return Asked(
        observation=_chat(request, bound) if is_chat else _text(request, bound),
        model=str(request.get("model") or "policy"),
        is_chat=is_chat,
        stream=bool(request.get("stream")),
        with_usage=bool(options.get("include_usage")),
        with_logprobs=logprobs is not None and logprobs is not False,
        stops=_stops(request),
        ignored=tuple(ignored),
    )


def response(asked: Asked, answer: Answer, number: int, created: int) -> dict[str, Any]:
    """Return the whole response as one object."""
    if asked.is_chat:
        choice: dict[str, Any] = {"index": 0, "message": _message(asked, answer)}
    else:
        choice = {"index": 0, "text": _said(asked, answer)}
    choice |= {"finish_reason": _finish(answer), "logprobs": _logprobs(asked, answer)}
    kind = "chat.completion" if asked.is_chat else "text_completion"
    return {**_head(asked, kind, number, created), "choices": [choice], "usage": _usage(answer)}


def chunks(asked: Asked, answer: Answer, number: int, created: int) -> Iterator[dict[str, Any]]:
    """Yield the response as the chunks of a stream: who speaks, what is said, why it ended."""
    kind = "chat.completion.chunk" if asked.is_chat else "text_completion"
    head = _head(asked, kind, number, created)

    def chunk(finish: str | None = None, **said: Any) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": finish, **said}
        return {**head, "choices": [choice]}

    if asked.is_chat:
        message = _message(asked, answer)
        yield chunk(delta={"role": "assistant", "content": ""}, logprobs=None)
        if message.get("reasoning_content"):
            yield chunk(delta={"reasoning_content": message["reasoning_content"]}, logprobs=None)
        if message["content"]:
            yield chunk(delta={"content": message["content"]}, logprobs=_logprobs(asked, answer))
        for index, call in enumerate(message.get("tool_calls", ())):
            yield chunk(delta={"tool_calls": [{"index": index, **call}]}, logprobs=None)
        yield chunk(_finish(answer), delta={}, logprobs=None)
    else:
        yield chunk(_finish(answer), text=_said(asked, answer), logprobs=_logprobs(asked, answer))
    if asked.with_usage:
        yield {**head, "choices": [], "usage": _usage(answer)}


def error_body(message: str, kind: str) -> bytes:
    """Return an error as OpenAI's clients read it."""
    content = {"message": message, "type": kind, "param": None, "code": kind}
    return json.dumps({"error": content}).encode()


def _refuse(request: Mapping[str, Any]) -> None:
    if request.get("n") not in (None, 1) or request.get("best_of") not in (None, 1):
        raise BadRequest("n and best_of: one answer per request; issue several requests instead")
    wanted = cast("dict[str, Any]", request.get("response_format") or {})
    if wanted.get("type", "text") != "text":
        raise BadRequest("response_format: only text; constrained decoding is not trained on")
    for name in ("functions", "audio", "echo", "suffix"):
        if request.get(name):
            raise BadRequest(f"{name}: not supported")


def _bound(request: Mapping[str, Any]) -> int | None:
    bound = request.get("max_completion_tokens") or request.get("max_tokens")
    if bound is not None and (not isinstance(bound, int) or bound < 1):
        raise BadRequest(f"max_tokens must be a positive integer, not {bound!r}")
    return bound


def _chat(request: Mapping[str, Any], bound: int | None) -> Observation:
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: a list of at least one message is needed")
    listed = cast("list[Any]", messages)
    if not all(isinstance(message, dict) for message in listed):
        raise BadRequest("messages: every one is an object with role and content")
    tools = () if request.get("tool_choice") == "none" else request.get("tools") or ()
    return Observation(messages=tuple(listed), tools=tuple(tools), whole=True, max_new_tokens=bound)


def _text(request: Mapping[str, Any], bound: int | None) -> Observation:
    match request.get("prompt"):
        case str() as text if text:
            return Observation(text, whole=True, max_new_tokens=bound)
        case [str() as text] if text:
            return Observation(text, whole=True, max_new_tokens=bound)
        case list() as listed if listed and all(
            isinstance(i, int) for i in cast("list[Any]", listed)
        ):
            ids = tuple(cast("list[int]", listed))
            return Observation(token_ids=ids, whole=True, max_new_tokens=bound)
        case _:
            raise BadRequest("prompt: one text, or one list of token ids")


def _stops(request: Mapping[str, Any]) -> tuple[str, ...]:
    stops = request.get("stop") or ()
    listed = [stops] if isinstance(stops, str) else list(cast("list[Any]", stops))
    if not all(isinstance(stop, str) and stop for stop in listed):
        raise BadRequest("stop: a text, or a list of texts")
    return tuple(listed)


def _said(asked: Asked, answer: Answer) -> str:
    ends = [at for stop in asked.stops if (at := answer.content.find(stop)) >= 0]
    return answer.content[: min(ends, default=None)]


def _message(asked: Asked, answer: Answer) -> dict[str, Any]:
    said = _said(asked, answer)
    made: dict[str, Any] = {"role": "assistant", "content": said}
    if answer.parsed.reasoning is not None:
        made["reasoning_content"] = answer.parsed.reasoning
    if answer.tool_calls:
        made["content"] = said or None
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(call.arguments, ensure_ascii=False),
                },
            }
            for call in answer.tool_calls
        ]
    return made


def _finish(answer: Answer) -> str:
    return "tool_calls" if answer.tool_calls else answer.finish


def _usage(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.num_context, len(answer.token_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _logprobs(asked: Asked, answer: Answer) -> dict[str, Any] | None:
    if not asked.with_logprobs:
        return None
    # Tokens by id: a token need not be text of its own.
    tokens = [f"token_id:{token_id}" for token_id in answer.token_ids]
    if not asked.is_chat:
        return {"tokens": tokens, "token_logprobs": list(answer.logprobs)}
    listed = zip(tokens, answer.logprobs, strict=True)
    return {
        "content": [
            {"token": token, "logprob": logprob, "bytes": None, "top_logprobs": []}
            for token, logprob in listed
        ]
    }


def _head(asked: Asked, kind: str, number: int, created: int) -> dict[str, Any]:
    name = "chatcmpl" if asked.is_chat else "cmpl"
    return {"id": f"{name}-{number}", "object": kind, "created": created, "model": asked.model}
