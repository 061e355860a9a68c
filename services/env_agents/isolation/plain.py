"""Observations, answers and results as plain data, for the way between two processes. Pure.

What came from JSON, or goes into a chat template, travels as JSON text: integers of any size and
broken surrogates, which a policy may well write, arrive as they were sent.
"""

from __future__ import annotations

import json
from typing import Any

from services.env_agents.answer import Answer, Parsed, ToolCall
from services.env_agents.environment import Observation, StepResult
from shared.wire.trajectory import Span


def of_observation(observation: object) -> dict[str, Any]:
    """Return an observation's fields.

    Raises:
        TypeError: it is no Observation, or its messages hold what JSON has no form for.
    """
    if not isinstance(observation, Observation):
        raise TypeError(f"returned {type(observation).__name__}, not Observation")
    ids = observation.token_ids
    bound = observation.max_new_tokens
    return {
        "text": str(observation.text),
        "messages": json.dumps([dict(message) for message in observation.messages]),
        "tools": None
        if observation.tools is None
        else json.dumps([dict(tool) for tool in observation.tools]),
        "whole": bool(observation.whole),
        "token_ids": None if ids is None else [int(token_id) for token_id in ids],
        "max_new_tokens": None if bound is None else int(bound),
    }


def observation(fields: dict[str, Any]) -> Observation:
    """Return what `of_observation` was given."""
    ids = fields["token_ids"]
    return Observation(
        text=fields["text"],
        messages=tuple(json.loads(fields["messages"])),
        tools=None if fields["tools"] is None else tuple(json.loads(fields["tools"])),
        whole=fields["whole"],
        token_ids=None if ids is None else tuple(ids),
        max_new_tokens=fields["max_new_tokens"],
    )


def of_result(result: object) -> dict[str, Any]:
    """Return a result's fields.

    Raises:
        TypeError: it is no StepResult, or as `of_observation`.
    """
    if not isinstance(result, StepResult):
        raise TypeError(f"returned {type(result).__name__}, not StepResult")
    return {
        "observation": of_observation(result.observation),
        "reward": float(result.reward),
        "terminated": bool(result.terminated),
        "truncated": bool(result.truncated),
        "rewards": {str(name): float(value) for name, value in result.rewards.items()},
    }


def result(fields: dict[str, Any]) -> StepResult:
    """Return what `of_result` was given."""
    return StepResult(
        observation=observation(fields["observation"]),
        reward=fields["reward"],
        terminated=fields["terminated"],
        truncated=fields["truncated"],
        rewards=fields["rewards"],
    )


def of_answer(answer: Answer) -> dict[str, Any]:
    """Return an answer's fields."""
    calls = [[call.name, dict(call.arguments), call.id] for call in answer.tool_calls]
    return {
        "text": answer.text,
        "content": answer.content,
        "reasoning": answer.parsed.reasoning,
        "tool_calls": json.dumps(calls),
        "errors": json.dumps(answer.errors),
        "token_ids": list(answer.token_ids),
        "logprobs": list(answer.logprobs),
        "spans": [[span.version, span.start, span.stop] for span in answer.spans],
        "finish": answer.finish,
        "num_context": answer.num_context,
    }


def answer(fields: dict[str, Any]) -> Answer:
    """Return what `of_answer` was given."""
    calls = json.loads(fields["tool_calls"])
    return Answer(
        text=fields["text"],
        parsed=Parsed(
            fields["content"],
            fields["reasoning"],
            tuple(ToolCall(name, arguments, call_id) for name, arguments, call_id in calls),
            tuple(json.loads(fields["errors"])),
        ),
        token_ids=tuple(fields["token_ids"]),
        logprobs=tuple(fields["logprobs"]),
        spans=tuple(Span(version=v, start=a, stop=b) for v, a, b in fields["spans"]),
        finish=fields["finish"],
        num_context=fields["num_context"],
    )
