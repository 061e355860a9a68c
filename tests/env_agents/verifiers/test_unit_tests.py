"""Code judged by unit tests: what passes, what does not, and what cannot cheat."""

from __future__ import annotations

from typing import Any

import pytest

from services.env_agents.verifiers import sandbox
from services.env_agents.verifiers import unit_tests as module
from services.env_agents.verifiers.unit_tests import UnitTests
from services.env_agents.verifiers.verifier import TaskFault, Verdict

pytestmark = pytest.mark.skipif(
    bool(sandbox.unavailable()), reason=f"this machine cannot isolate: {sandbox.unavailable()}"
)

OPTIONS: dict[str, Any] = {"memory_mb": 256, "wall_s": 20.0}
SQUARES = {"tests": [{"call": "f", "args": [n], "expected": n * n} for n in (0, 3, -4)]}


async def judge(code: str, payload: dict[str, Any], **options: Any) -> Verdict:
    return await UnitTests({**OPTIONS, **options}).verify(f"Here:\n```python\n{code}\n```", payload)


async def test_right_code_passes_and_wrong_code_does_not() -> None:
    assert await judge("def f(n): return n * n", SQUARES) == Verdict(
        1.0, {"passed": 1.0}, "3 of 3 tests passed, status 0"
    )
    wrong = await judge("def f(n): return n * abs(n)", SQUARES)
    assert (wrong.reward, wrong.rewards["passed"]) == (0.0, pytest.approx(2 / 3))
    partial = await judge("def f(n): return n * abs(n)", SQUARES, partial=True)
    assert partial.reward == pytest.approx(2 / 3)


async def test_programs_are_judged_by_what_they_print() -> None:
    payload = {"tests": [{"stdin": "2 3\n", "stdout": "5\n"}, {"stdin": "1 1", "stdout": "2"}]}
    assert (await judge("print(sum(map(int, input().split())), ' ')", payload)).reward == 1.0
    assert (await judge("print(5)", payload)).rewards["passed"] == 0.5


async def test_assertions_are_run_beside_the_code() -> None:
    payload = {"tests": [{"assert": "assert f(2) == 4"}, {"assert": "assert f(0) == 0"}]}
    assert (await judge("def f(n): return n * n", payload)).reward == 1.0
    assert (await judge("def f(n): return n + 2", payload)).rewards["passed"] == 0.5


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "print('passed ' * 3)",
        "def f(n): raise SystemExit(0)",
        "def f(n):\n  import os\n  for fd in range(3, 20):\n"
        "    try: os.write(fd, b'{\"value\": 9}\\n' * 3)\n    except OSError: pass",
        "class Any:\n  def __eq__(self, other): return True\ndef f(n): return Any()",
    ],
)
async def test_code_that_claims_to_have_passed_is_worth_nothing(code: str) -> None:
    assert (await judge(code, SQUARES)).reward == 0.0


async def test_code_that_hangs_is_worth_what_passed_before_and_says_so() -> None:
    verdict = await judge("def f(n):\n  while n: pass\n  return 0", SQUARES, wall_s=3.0)
    assert verdict.reward == 0.0
    assert verdict.rewards == {"passed": pytest.approx(1 / 3), "timeout": 1.0}
    assert verdict.detail == "1 of 3 tests passed, out of time"


async def test_an_answer_without_code_is_malformed() -> None:
    verdict = await UnitTests(OPTIONS).verify("<think>hm</think>", SQUARES)
    assert verdict.rewards == {"malformed": 1.0}


@pytest.mark.parametrize("tests", [None, [], [{"call": "f"}], [{"assert": "a"}, {"stdin": ""}]])
async def test_a_task_without_usable_tests_is_a_fault_and_no_zero(tests: object) -> None:
    with pytest.raises(TaskFault, match="`tests`"):
        await UnitTests(OPTIONS).verify("x", {"tests": tests})


def test_a_machine_that_cannot_isolate_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "unavailable", lambda: "unshare: Operation not permitted")
    with pytest.raises(ValueError, match=r"unshare: Operation not permitted.*isolate: false"):
        module.UnitTests({})
    module.UnitTests({"isolate": False})
    with pytest.raises(ValueError, match="no option 'wall'"):
        module.UnitTests({"wall": 3})
