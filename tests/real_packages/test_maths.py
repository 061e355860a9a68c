"""Maths equivalence by the real math-verify, in its helper process."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from services.env_agents.verifiers.maths import Maths
from services.env_agents.verifiers.verifier import TaskFault, Verdict


@pytest.fixture(scope="module")
def maths() -> Iterator[Maths]:
    made = Maths({"timeout_s": 20.0})
    yield made
    made.close()


@pytest.mark.parametrize(
    ("wanted", "given", "reward"),
    [
        ("1/2", "0.5", 1.0),
        (r"\frac{1}{2}", r"so it is \boxed{\frac{2}{4}}", 1.0),
        (r"\sqrt{8}", r"$2\sqrt{2}$", 1.0),
        ("(x+1)^2", "$x^2 + 2x + 1$", 1.0),
        ("5", "<think>it is 5</think><answer>6</answer>", 0.0),
        ("5", "<think>it is 6</think>The answer is 5.", 1.0),
        (r"\{1, 2\}", r"$\{2, 1\}$", 1.0),
        ("x", "$y$", 0.0),
    ],
)
async def test_equal_is_what_mathematics_calls_equal(
    maths: Maths, wanted: str, given: str, reward: float
) -> None:
    assert (await maths.verify(given, {"answer": wanted})).reward == reward


async def test_an_answer_without_any_expression_is_malformed(maths: Maths) -> None:
    verdict = await maths.verify("", {"answer": "5"})
    assert verdict == Verdict(0.0, {"malformed": 1.0}, "no expression in the answer")


async def test_a_task_without_a_readable_answer_is_a_fault_and_no_zero(maths: Maths) -> None:
    for payload in ({}, {"answer": None}, {"answer": ""}):
        with pytest.raises(TaskFault, match="`answer`"):
            await maths.verify("5", payload)


async def test_a_comparison_without_end_costs_its_time_and_the_next_is_judged() -> None:
    impatient = Maths({"timeout_s": 3.0})
    assert (await impatient.verify("5", {"answer": "5"})).reward == 1.0
    assert impatient._helper is not None
    os.kill(impatient._helper.pid, signal.SIGSTOP)
    waiting = asyncio.create_task(impatient.verify("5", {"answer": "5"}))
    await asyncio.sleep(0.5)
    os.kill(impatient._helper.pid, signal.SIGKILL)
    assert (await waiting).rewards == {"unverifiable": 1.0}
    endless = await impatient.verify("$10^{10^{10^{10}}} - 3$", {"answer": "10^{10^{10^{10}}} - 2"})
    assert endless.reward == 0.0
    assert (await impatient.verify("5", {"answer": "5"})).reward == 1.0
    impatient.close()
