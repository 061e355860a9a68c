"""retail_tools: the oracle scores 1, doing nothing 0, every flaw 0; deterministic and held out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from services.env_agents.answer import Answer, Parsed, ToolCall
from services.env_agents.environment import StepResult
from services.env_agents.tasks.retail_tools.environment import RetailTools, target
from services.env_agents.tasks.retail_tools.generator import DOMAINS, FULL, draw, split_of, write
from services.env_agents.tasks.retail_tools.oracle import answers
from services.env_agents.tasks.retail_tools.scenario import PERSONALITIES, Scenario, state_digest
from services.env_agents.tasks.retail_tools.user import PATIENCE
from shared.wire.messages import TaskRef

EVERY = [(domain, personality) for domain in DOMAINS for personality in PERSONALITIES]


def scenarios(domain: str, personality: str, count: int = 25) -> list[Scenario]:
    return [draw("train", 3, index, (domain,), (personality,)) for index in range(count)]


def task(scenario: Scenario) -> TaskRef:
    return TaskRef(dataset="retail_tools", split="train", index=0, seed=0, payload=scenario.row())


async def play(scenario: Scenario, said: Iterable[Parsed]) -> StepResult:
    env = RetailTools({})
    await env.reset(task(scenario))
    result: StepResult | None = None
    for parsed in said:
        assert result is None or not result.terminated, "spoke after the end"
        result = await env.act(Answer(parsed.content, parsed))
    assert result is not None
    return result


@pytest.mark.parametrize(("domain", "personality"), EVERY)
async def test_the_oracle_scores_one_and_a_no_op_zero(domain: str, personality: str) -> None:
    for scenario in scenarios(domain, personality):
        result = await play(scenario, answers(scenario))
        assert (result.terminated, result.reward) == (True, 1.0)
        idle = await play(scenario, [Parsed("Hello. Is there anything else?")])
        assert (idle.terminated, idle.reward) == (True, 0.0)


@pytest.mark.parametrize("domain", DOMAINS)
async def test_leaving_out_the_last_change_or_the_information_scores_zero(domain: str) -> None:
    changed = informed = 0
    for scenario in scenarios(domain, "direct", 60):
        *said, last = answers(scenario)
        if state_digest(target(scenario)) != state_digest(scenario.database):
            changed += 1
            assert (await play(scenario, [*said[:-1], last])).reward == 0.0
        if scenario.want.required:
            informed += 1
            silent = Parsed("Is there anything else?")
            assert (await play(scenario, [*said, silent])).reward == 0.0
    assert min(changed, informed) > 3


async def test_an_extra_change_scores_zero() -> None:
    scenario = next(s for s in scenarios("telecom", "direct", 60) if s.want.required)
    *said, last = answers(scenario)
    extra = Parsed("", tool_calls=(ToolCall("transfer_to_human", {"reason": "other"}),))
    assert (await play(scenario, [*said, extra, last])).reward == 0.0


@pytest.mark.parametrize("domain", DOMAINS)
async def test_a_wavering_user_must_be_asked_to_learn_the_final_wish(domain: str) -> None:
    for scenario in scenarios(domain, "wavering", 10):
        env = RetailTools({})
        observation = await env.reset(task(scenario))
        wished = str(observation.messages[1]["content"])
        assert scenario.want.change not in wished
        said = await env.act(Answer("", Parsed("Shall I go ahead?")))
        assert said.observation.messages[0]["content"] == scenario.want.change
        said = await env.act(Answer("", Parsed("Shall I go ahead?")))
        assert said.observation.messages[0]["content"] == "Yes, please."


async def test_a_terse_user_tells_one_fact_per_question_and_a_forgetful_one_no_id() -> None:
    for domain, personality in EVERY:
        for scenario in scenarios(domain, personality, 8):
            env = RetailTools({})
            opening = str((await env.reset(task(scenario))).messages[1]["content"])
            told = [fact for fact in scenario.want.facts.values() if fact in opening]
            expected = 0 if personality in ("terse", "forgetful") else len(scenario.want.facts)
            assert len(told) == expected
            owner = json.dumps(scenario.want.facts)
            assert ("user id is" in owner or "customer id is" in owner) is (
                personality != "forgetful"
            )


async def test_a_user_who_is_not_understood_leaves() -> None:
    scenario = scenarios("retail", "direct", 1)[0]
    result = await play(scenario, [Parsed("Hm.")] * (PATIENCE + 1))
    assert (result.terminated, result.reward) == (True, 0.0)


async def test_whatever_is_wrong_with_a_call_is_an_observation_and_changes_nothing() -> None:
    scenario = scenarios("retail", "direct", 1)[0]
    env = RetailTools({})
    await env.reset(task(scenario))
    for call, error in (
        (ToolCall("fly", {}), "unknown tool 'fly'; there are find_user_by_email"),
        (ToolCall("get_order", {}), "get_order: argument 'order_id' is missing"),
        (ToolCall("get_order", {"order_id": 7}), "'order_id' must be string, not 7"),
        (ToolCall("get_order", {"order_id": "x", "y": 1}), "unknown argument 'y'"),
        (ToolCall("get_order", {"order_id": "#W0"}), "no order #W0"),
        (
            ToolCall("cancel_order", {"order_id": "#W0", "reason": "whim"}),
            "'reason' must be ['no_longer_needed', 'mistake'], not 'whim'",
        ),
        (
            ToolCall(
                "return_items", {"order_id": "#W0", "item_ids": [1], "refund_to": "gift_card"}
            ),
            "'item_ids' must be array",
        ),
    ):
        result = await env.act(Answer("", Parsed("", tool_calls=(call,))))
        (message,) = result.observation.messages
        assert message["role"] == "tool"
        assert str(message["content"]).startswith("Error: ")
        assert error in str(message["content"])
    result = await env.act(Answer("", Parsed("<tool_call>", errors=("not closed",))))
    assert result.observation.messages == ({"role": "user", "content": "Error: not closed"},)
    assert state_digest(env.database) == state_digest(scenario.database)


def test_every_domain_has_six_tools_or_more_and_a_policy() -> None:
    for domain in DOMAINS.values():
        database, _ = domain.draw(random.Random(0), "direct")
        assert len(domain.tools(database)) >= 6
        assert "confirm" in domain.policy


def test_the_reduced_domain_is_drawn_only_by_name_with_its_four_wishes_and_short_ids() -> None:
    drawn = [draw("train", 5, i, ("retail_small",), ("direct", "terse")) for i in range(80)]
    last = {s.want.calls[-1][0] for s in drawn}
    assert last == {"get_order", "cancel_order", "return_items", "transfer_to_human"}
    ids = {order for s in drawn for order in s.database["orders"]}
    assert all(len(order) == len("#W12") for order in ids)
    assert "retail_small" not in FULL


def test_an_item_to_return_is_not_always_the_first_of_its_order() -> None:
    places: set[int] = set()
    for s in scenarios("retail_small", "direct", 60):
        name, arguments = s.want.calls[-1]
        if name == "return_items":
            items = s.database["orders"][arguments["order_id"]]["items"]
            places.add([i["item_id"] for i in items].index(arguments["item_ids"][0]))
    assert places == {0, 1}


def test_tasks_are_deterministic_various_and_held_out_by_content(tmp_path: Path) -> None:
    train = [draw("train", 0, i) for i in range(150)]
    draw.cache_clear()
    assert train == [draw("train", 0, i) for i in range(150)]
    held_out = [draw("eval", 0, i) for i in range(30)]
    assert {split_of(s) for s in train} == {"train"}
    assert {split_of(s) for s in held_out} == {"eval"}
    assert len({s.digest() for s in train + held_out}) == 180
    assert {(s.domain, s.personality) for s in train} == {e for e in EVERY if e[0] in FULL}
    write(tmp_path, {"train": 5, "eval": 2}, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [Scenario.of_row(row) for row in rows] == [
        replace(s, want=replace(s.want, calls=tuple(s.want.calls), required=tuple(s.want.required)))
        for s in train[:5]
    ]


async def test_rows_with_missing_fields_and_unknown_names_are_named() -> None:
    row = scenarios("retail", "direct", 1)[0].row()
    env = RetailTools({})
    for change, reason in (
        ({"want": {}}, "has no field 'goal'"),
        ({"database": None}, "is malformed"),
        ({"domain": "banking"}, "no domain 'banking'; there are retail, airline, telecom"),
    ):
        bad = TaskRef(dataset="d", split="train", index=0, seed=0, payload={**row, **change})
        with pytest.raises(ValueError, match=reason):
            await env.reset(bad)
    with pytest.raises(ValueError, match="no domain 'banking'"):
        RetailTools({"domains": ["banking"]})
    with pytest.raises(ValueError, match="unknown option 'domain'"):
        RetailTools({"domain": "retail"})
    with pytest.raises(TypeError, match="ChatRenderer"):
        await env.step("hello")
