"""Unmodified openai-SDK agents through the whole service: recorded like native episodes."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import httpx
import pytest

from services.env_agents.answer import Answer, Parsed
from services.env_agents.gateway.environment import AgentEnvironment
from services.env_agents.gateway.sessions import Gateway
from shared.runtime.memory_bus import MemoryBus
from shared.wire.messages import TaskRef
from shared.wire.trajectory import Failure, Trajectory
from tests.env_agents import agents
from tests.env_agents.chat.conversations import renderer
from tests.env_agents.chat_rollout import chat_config, chat_ticket, play, scripted
from tests.env_agents.rollout_stand_in import issue, make_context, serving, terminal

AGENTS = "tests.env_agents.agents"
ENVIRONMENT = "services.env_agents.gateway.environment:AgentEnvironment"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def adds(prompt: str) -> str:
    return "It is 5." if "<tool_response>" in prompt else CALL


def text_of(family: str, outcome: Trajectory, index: int = 0) -> str:
    ids = outcome.sequences[index].token_ids.numpy().tolist()
    return renderer(family).tokenizer.decode(ids)


def sampled_of(family: str, outcome: Trajectory, index: int = 0) -> str:
    sequence = outcome.sequences[index]
    ids = sequence.token_ids.numpy()[sequence.loss_mask.numpy().astype(bool)]
    return renderer(family).tokenizer.decode(ids.tolist())


async def test_a_tool_loop_written_for_the_openai_sdk_is_one_append_only_sequence(
    bus: MemoryBus,
) -> None:
    config = chat_config("qwen3", ENVIRONMENT, agent=f"{AGENTS}:calculator")
    async with scripted(bus, "qwen3", adds) as rollout:
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Trajectory)
    assert (outcome.status, outcome.reward, outcome.rewards) == ("done", 1.0, {"task": 1.0})
    (sequence,) = outcome.sequences
    assert len(sequence.turns) == 2
    assert {span.version for span in sequence.spans} == {5}
    assert sampled_of("qwen3", outcome) == f"{CALL}<|im_end|>It is 5.<|im_end|>"
    # The prompt of the second request is what the first one left, and the tool's message.
    first, second = (request.token_ids.numpy().tolist() for request in rollout.requests)
    assert second[: len(first)] == first
    assert text_of("qwen3", outcome).count("<tool_response>\n5\n</tool_response>") == 1
    logprobs = sequence.arrays["sampler_logprobs"].numpy()
    assert set(logprobs[sequence.loss_mask.numpy().astype(bool)].tolist()) == {-0.25}


async def test_streams_models_and_usage_are_as_the_sdk_expects(bus: MemoryBus) -> None:
    config = chat_config("qwen3", ENVIRONMENT, agent=f"{AGENTS}:streamer")
    async with scripted(bus, "qwen3", adds):
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Trajectory)
    assert outcome.rewards == {"called": 1.0}


async def test_completions_grow_one_text_and_keep_to_their_bound(bus: MemoryBus) -> None:
    config = chat_config("qwen3", ENVIRONMENT, agent=f"{AGENTS}:completer")
    async with scripted(bus, "qwen3", lambda prompt: " a time, long ago, there was"):
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Trajectory)
    (sequence,) = outcome.sequences
    assert [turn.stop - turn.start for turn in sequence.turns] == [3, 3]
    assert {turn.finish for turn in sequence.turns} == {"length"}
    assert text_of("qwen3", outcome).startswith("Once upon a")


async def test_what_cannot_be_served_is_refused_by_name_and_ends_nothing(bus: MemoryBus) -> None:
    config = chat_config("qwen3", ENVIRONMENT, agent=f"{AGENTS}:unkind")
    async with scripted(bus, "qwen3", lambda prompt: "fine"):
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Trajectory)
    assert sorted(outcome.rewards) == sorted(
        ["n", "stop", "json", "max_tokens", "messages", "key", "path"]
    )


async def test_a_compacted_history_and_another_agent_are_further_sequences(bus: MemoryBus) -> None:
    config = chat_config("qwen3", ENVIRONMENT, agent=f"{AGENTS}:forgetful")
    async with scripted(bus, "qwen3", lambda prompt: f"answer {prompt.count('assistant')}"):
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Trajectory)
    assert [s.parent for s in outcome.sequences] == [None, 0, None]
    assert [len(s.turns) for s in outcome.sequences] == [2, 1, 1]


async def test_a_stop_string_ends_what_the_agent_reads_and_not_what_is_trained(
    bus: MemoryBus,
) -> None:
    config = chat_config("qwen3", ENVIRONMENT, agent=f"{AGENTS}:stopped")
    said = "Thought: hm. Observation: made up"
    async with scripted(bus, "qwen3", lambda prompt: said):
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Trajectory), outcome
    assert sampled_of("qwen3", outcome) == f"{said}<|im_end|>"
    assert [s.parent for s in outcome.sequences] == [None, 0]


@pytest.mark.parametrize(
    ("agent", "detail"),
    [
        ("crasher", "the agent's own bug"),
        ("quitter", "the agent called sys.exit(3)"),
        ("silent", "the agent ended without asking its model for anything"),
        ("talkative", "an agent returns its reward"),
    ],
)
async def test_an_agent_that_fails_is_a_failure_with_its_reason_and_its_trace_stays(
    bus: MemoryBus, tmp_path: Path, agent: str, detail: str
) -> None:
    config = chat_config(
        "qwen3", ENVIRONMENT, agent=f"{AGENTS}:{agent}", trace_dir=str(tmp_path / "traces")
    )
    async with scripted(bus, "qwen3", lambda prompt: "fine"):
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Failure)
    assert outcome.reason == "env_error"
    assert detail in outcome.detail
    (path,) = (tmp_path / "traces").iterdir()
    events = [json.loads(line) for line in path.read_text().splitlines()]
    if agent == "silent":
        assert [event["event"] for event in events] == ["begin"]
        return
    assert [event["event"] for event in events] == ["begin", "request", "answer", "fail"]
    assert events[2]["spans"] == [[5, 0, len(events[2]["token_ids"])]]
    assert events[2]["logprobs"] == [-0.25] * len(events[2]["token_ids"])
    assert detail in events[3]["error"]


async def test_many_agents_written_for_threads_play_at_once(bus: MemoryBus) -> None:
    count = agents.TOGETHER.parties
    config = chat_config("qwen3", ENVIRONMENT, agent=f"{AGENTS}:sociable")
    section = config.env_agents.model_copy(update={"concurrency": count})
    config = config.model_copy(update={"env_agents": section})
    async with (
        scripted(bus, "qwen3", lambda prompt: "fine"),
        serving(make_context(bus.server), config),
    ):
        await issue(bus, *(chat_ticket(index) for index in range(count)))
        ends = [await terminal(bus, f"t{index}", timeout_s=40) for index in range(count)]
    assert [end.outcome.reward for end in ends if isinstance(end.outcome, Trajectory)] == (
        [1.0] * count
    )


PROGRAM = """
import json, os, urllib.request
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode(),
    {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
)
answer = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
assert json.loads(os.environ["LAGWISE_TASK"])["split"] == "train"
"""


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ('print(json.dumps({"said": float(answer == "fine")}))', {"said": 1.0}),
        ("os.kill(os.getpid(), 9)", "the agent exited with -9"),
        ('raise SystemExit("no luck")', "the agent exited with 1: no luck"),
        ('print("done")', "last line is no reward"),
    ],
)
async def test_an_agent_in_a_process_of_its_own_and_every_way_it_ends(
    bus: MemoryBus, ending: str, expected: object
) -> None:
    command = [sys.executable, "-c", PROGRAM + ending]
    config = chat_config("qwen3", ENVIRONMENT, command=command)
    async with scripted(bus, "qwen3", lambda prompt: "fine"):
        outcome, _ = await play(bus, config, chat_ticket(), timeout_s=60)
    if isinstance(outcome, Trajectory):
        assert outcome.rewards == expected
    else:
        assert str(expected) in outcome.detail


async def test_a_retry_after_a_broken_connection_is_given_the_first_answer() -> None:
    gateway = Gateway()
    session = await gateway.open()
    body = {"messages": [{"role": "user", "content": "hi"}]}
    headers = {"Authorization": f"Bearer {session.key}"}
    url = f"{gateway.base_url}/chat/completions"
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post(url, json=body, headers=headers, timeout=0.3)
        exchange = session.waiting.get_nowait()
        exchange.answer.set_result(Answer("once", Parsed("once")))
        again = {**headers, "x-stainless-retry-count": "1"}
        answer = await client.post(url, json=body, headers=again)
    assert answer.json()["choices"][0]["message"]["content"] == "once"
    assert session.waiting.empty()
    await gateway.close(session)


async def test_a_request_that_the_episode_does_not_outlive_is_told_so() -> None:
    gateway = Gateway()
    session, other = await gateway.open(), await gateway.open()
    headers = {"Authorization": f"Bearer {session.key}"}
    async with httpx.AsyncClient(base_url=gateway.base_url, headers=headers) as client:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        asking = asyncio.create_task(client.post("/chat/completions", json=body))
        await session.waiting.get()
        await gateway.close(session)
        assert (await asking).status_code == 410
        assert (await client.post("/chat/completions", json=body)).status_code == 401
    await gateway.close(other)


def test_options_that_make_no_agent_are_named() -> None:
    for options, reason in (
        ({}, "either `agent` or `command`"),
        ({"agent": "json"}, "package.module:function"),
        ({"agent": "json:nothing"}, "has no attribute 'nothing'"),
        ({"command": "python x.py"}, "`command` is a list"),
        ({"agents": "x"}, "unknown option 'agents'"),
    ):
        with pytest.raises(ValueError, match=reason.replace("`", ".")):
            AgentEnvironment(options)


async def test_equal_tasks_have_equal_digests() -> None:
    digests: list[str] = []
    for payload in ({"a": 1}, {"a": 1}, {"a": 2}):
        env = AgentEnvironment({"agent": f"{AGENTS}:silent"})
        with pytest.raises(RuntimeError):
            await env.reset(TaskRef(dataset="d", split="train", index=0, seed=0, payload=payload))
        digests.append(env.task_digest())
        await env.close()
    assert digests[0] == digests[1] != digests[2]
