"""Verifiers by name, and exact match."""

from __future__ import annotations

import pytest

from services.env_agents.answers import code, tagged, without_stop, without_thought
from services.env_agents.verifiers.verifier import TaskFault, Verdict, verifier


@pytest.mark.parametrize(
    ("options", "answer", "wanted", "verdict"),
    [
        ({}, " Paris ", "Paris", Verdict(1.0)),
        ({}, "paris", "Paris", Verdict(0.0)),
        ({"ignore_case": True}, "paris", "Paris", Verdict(1.0)),
        ({}, "<think>Rome?</think>New\n York", ["NY", "New York"], Verdict(1.0)),
        ({}, "4", 4, Verdict(1.0)),
        ({"extract": "tag"}, "so <answer>1</answer><answer> 4 </answer>", "4", Verdict(1.0)),
        ({"extract": "tag"}, "4", "4", Verdict(0.0, {"malformed": 1.0}, "no <answer>...</answer>")),
        ({"extract": "tag"}, "<think><answer>4</answer>", "4",
         Verdict(0.0, {"malformed": 1.0}, "no <answer>...</answer>")),
    ],
)  # fmt: skip
async def test_exact_match_by_hand(
    options: dict[str, object], answer: str, wanted: object, verdict: Verdict
) -> None:
    assert await verifier("exact", options).verify(answer, {"answer": wanted}) == verdict


async def test_a_task_without_an_answer_is_a_fault_and_no_zero() -> None:
    for payload in ({}, {"answer": []}, {"answer": {}}):
        with pytest.raises(TaskFault, match="`answer`"):
            await verifier("exact", {}).verify("x", payload)


def test_one_verifier_serves_all_episodes_of_a_process() -> None:
    assert verifier("exact", {}) is verifier("exact", {})
    assert verifier("exact", {}) is not verifier("exact", {"ignore_case": True})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exakt", "neither one of exact, maths, unit_tests nor package.module:Class"),
        ("no_such_module_here:X", "No module named"),
        ("services.env_agents.answers:code", "no class with `async def verify`"),
    ],
)
def test_a_verifier_that_cannot_be_used_is_named(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        verifier(name, {})


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="ignore_case"):
        verifier("exact", {"ignorecase": True})


def test_answers_are_taken_apart_as_written() -> None:
    assert without_stop("4<|im_end|>\n") == "4"
    assert without_thought("a<think>b</think>c<think>d") == "ac"
    assert tagged("<answer>\n4\n</answer>") == "4"
    assert tagged("4") is None
    assert code("```python\na\n```\n```\nb\n```") == "b\n"
    assert code("print(1)") == "print(1)"
