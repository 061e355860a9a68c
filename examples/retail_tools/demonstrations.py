"""Noisy demonstrations: the oracle's answers, mixed with plausible wrong ones."""

from __future__ import annotations

import json
import random
import re

from vocabulary import CALLED, SAID

from services.env_agents.answer import Answer, Parsed
from services.env_agents.chat.renderer import ChatRenderer
from services.env_agents.tasks.retail_tools.environment import RetailTools
from services.env_agents.tasks.retail_tools.oracle import answers
from shared.wire.messages import TaskRef

MAX_TURNS = 10


def text_of(parsed: Parsed) -> str:
    """Return an answer as the template writes it."""
    calls = "".join(
        f'<tool_call>{{"name": "{call.name}", "arguments": {json.dumps(dict(call.arguments))}}}'
        "</tool_call>"
        for call in parsed.tool_calls
    )
    return parsed.content + calls


def blunder(rng: random.Random, seen: str) -> str:
    """Return an answer of the right form that is probably wrong here.

    Ids and numbers are some that were seen: a price for the total, the other item. Made-up ones
    would teach to make them up.
    """
    orders = re.findall(r"#W(\d\d)", seen)
    items = re.findall(r'"i(\d\d)"', seen)
    numbers = re.findall(r'"(?:price|total)": (\d+)', seen)
    possible = [rng.choice(SAID[:6]), rng.choice(CALLED[3:5])]
    if orders:
        order = rng.choice(orders)
        possible.append(f"{CALLED[0]}{order}{CALLED[5]}")
        possible.append(f"{CALLED[1]}{order}{rng.choice(CALLED[6:8])}")
        if items:
            head, tail = f"{CALLED[2]}{order}{CALLED[8]}", rng.choice(CALLED[9:11])
            possible.append(f"{head}{rng.choice(items)}{tail}")
    if numbers:
        possible.append(f"{SAID[6]}{rng.choice(numbers)}{SAID[7]}")
    return rng.choice(possible)


async def demonstrate(
    renderer: ChatRenderer, task: TaskRef, options: dict[str, list[str]], rng: random.Random,
    noise: float,
) -> tuple[list[int], list[bool], float]:  # fmt: skip
    """Play one task; its ids, which of them the policy would write, and the reward.

    Args:
        renderer: of the model directory.
        task: what is played.
        options: of the environment.
        rng: of the blunders.
        noise: share of turns that are blunders.
    """
    env, conversation = RetailTools(options), renderer.conversation()
    ids = conversation.begin(await env.reset(task))
    written = [False] * len(ids)
    assert env.scenario is not None
    right = [text_of(parsed) for parsed in answers(env.scenario)]
    if env.scenario.want.required:
        right[-1] = f"{SAID[6]}{right[-1]}"
    seen = ""
    for _ in range(MAX_TURNS):
        seen = renderer.tokenizer.decode(ids)
        said = blunder(rng, seen) if rng.random() < noise or not right else right.pop(0)
        sampled = [*renderer.tokenizer.encode(said), renderer.stop_ids[0]]
        ids += sampled
        written += [True] * len(sampled)
        text, parsed = conversation.read(sampled)
        result = await env.act(Answer(text, parsed))
        if result.terminated:
            return ids, written, result.reward
        told = conversation.follow(result.observation)
        assert not told.rewrites, "this template never rewrites"
        ids += told.token_ids
        written += [False] * len(told.token_ids)
    return ids, written, 0.0
