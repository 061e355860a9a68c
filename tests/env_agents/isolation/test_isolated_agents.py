"""Agents with a loop of their own, each in a process of its own: `act` crosses the border whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.env_agents.answer import Answer, Parsed, ToolCall
from services.env_agents.environment import Observation, StepResult
from services.env_agents.isolation import plain
from shared.runtime.memory_bus import MemoryBus
from shared.wire.messages import TaskRef, Ticket
from shared.wire.trajectory import Failure, Span, Trajectory
from tests.env_agents.chat_rollout import chat_config, chat_ticket, play, scripted
from tests.env_agents.rollout_stand_in import issue, make_context, serving, terminal

GATEWAY = "services.env_agents.gateway.environment:AgentEnvironment"
RETAIL = "services.env_agents.tasks.retail_tools.environment:RetailTools"
UNRULY = "tests.env_agents.isolation.unruly_agents:unruly"

FAULTS = {
    "hang": ("env_timeout", "act took longer than env_timeout_s"),
    "hang for ever in threads": ("env_timeout", "act took longer than env_timeout_s"),
    "raise": ("env_error", "ZeroDivisionError: as asked"),
    "exit": ("env_error", "the agent called sys.exit(3)"),
    "die": ("env_lost", "exited with status 7"),
    "fork": ("env_lost", "more than isolation.processes"),
    "leak": ("env_error", "MemoryError"),
    "no reward": ("env_error", "an agent returns its reward"),
}


def isolated(environment: str, options: dict[str, Any], **section: Any) -> Any:
    config = chat_config("qwen3", environment, **options)
    agents = config.env_agents.model_dump() | section
    agents["concurrency"] = 32
    agents["isolation"] = {"mode": "process", "memory_mb": 1024, "processes": 8}
    return type(config).model_validate(config.model_dump() | {"env_agents": agents})


def adds(prompt: str) -> str:
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
    return "It is 5." if "<tool_response>" in prompt else call


async def test_an_unmodified_agent_in_its_own_process_is_recorded_as_in_the_service(
    bus: MemoryBus,
) -> None:
    options = {"agent": "tests.env_agents.agents:calculator"}
    outcomes: list[Trajectory] = []
    async with scripted(bus, "qwen3", adds):
        for index, config in enumerate(
            (chat_config("qwen3", GATEWAY, **options), isolated(GATEWAY, options))
        ):
            outcome, _ = await play(bus, config, _ticket(index, "sum"))
            assert isinstance(outcome, Trajectory), outcome
            outcomes.append(outcome)
    here, there = outcomes
    assert (there.reward, there.rewards) == (1.0, {"task": 1.0})
    (a,), (b,) = here.sequences, there.sequences
    assert a.token_ids.numpy().tolist() == b.token_ids.numpy().tolist()
    assert a.loss_mask.numpy().tolist() == b.loss_mask.numpy().tolist()
    assert (a.spans, len(b.turns)) == (b.spans, 2)
    assert here.task_digest == there.task_digest


async def test_tools_of_an_isolated_environment_are_called_and_answered(bus: MemoryBus) -> None:
    def policy(prompt: str) -> str:
        if "<tool_response>" in prompt:
            return "Is there anything else?"
        return '<tool_call>\n{"name": "fly", "arguments": {}}\n</tool_call>'

    config = isolated(RETAIL, {"domains": ["retail"], "personalities": ["direct"]})
    async with scripted(bus, "qwen3", policy) as rollout:
        outcome, _ = await play(bus, config, chat_ticket())
    assert isinstance(outcome, Trajectory), outcome
    assert outcome.reward == 0.0
    assert len(rollout.requests) == 2


async def test_whatever_an_agent_does_to_its_process_costs_its_episode_alone(
    bus: MemoryBus,
) -> None:
    deeds = [*FAULTS, *[""] * 8]
    config = isolated(GATEWAY, {"agent": UNRULY}, env_timeout_s=8.0)
    async with (
        scripted(bus, "qwen3", lambda prompt: "It is 5."),
        serving(make_context(bus.server), config) as context,
    ):
        await issue(bus, *(_ticket(index, do) for index, do in enumerate(deeds)))
        ends = [await terminal(bus, f"t{i}", timeout_s=60) for i in range(len(deeds))]
        assert context.health.ready
    for do, end in zip(deeds, ends, strict=True):
        if do:
            assert isinstance(end.outcome, Failure), do
            assert (do, end.outcome.reason) == (do, FAULTS[do][0])
            assert FAULTS[do][1] in end.outcome.detail
        else:
            assert isinstance(end.outcome, Trajectory), end.outcome
            assert end.outcome.reward == 1.0
    assert context.counters["failed_episodes"] == len(FAULTS)
    assert context.counters.get("internal_errors", 0) == 0


def _ticket(index: int, do: str) -> Ticket:
    task = TaskRef(dataset="d", split="train", index=index, seed=1, payload={"do": do})
    return chat_ticket(index, task=task)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text(), OBJECTS, st.text()), max_size=2),
    st.lists(st.text(), max_size=2),
    st.lists(OBJECTS, max_size=3),
    st.none() | st.lists(OBJECTS, max_size=2),
)
def test_what_crosses_the_border_arrives_as_it_was(
    calls: list[tuple[str, dict[str, Any], str]],
    errors: list[str],
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
) -> None:
    answer = Answer(
        "text",
        Parsed("content", None, tuple(ToolCall(*call) for call in calls), tuple(errors)),
        (1, 2),
        (-0.5, -0.25),
        (Span(version=3, start=0, stop=2),),
        "length",
        7,
    )
    assert plain.answer(plain.of_answer(answer)) == answer
    said = Observation(
        messages=tuple(messages),
        tools=None if tools is None else tuple(tools),
        whole=True,
        token_ids=(5,),
        max_new_tokens=3,
    )
    result = StepResult(said, 0.5, truncated=True, rewards={"a": 1.0})
    assert plain.result(plain.of_result(result)) == result


def test_what_has_no_form_between_processes_is_named() -> None:
    with pytest.raises(TypeError, match="returned str, not Observation"):
        plain.of_observation("text")
    with pytest.raises(TypeError, match="returned NoneType, not StepResult"):
        plain.of_result(None)
    with pytest.raises(TypeError, match="not JSON serializable"):
        plain.of_observation(Observation(messages=({"role": "user", "content": object()},)))
