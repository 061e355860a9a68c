"""The perfect agent of a task: asks, has it confirmed, calls, tells, takes its leave."""

from __future__ import annotations

from collections.abc import Iterator

from services.env_agents.answer import Parsed, ToolCall
from services.env_agents.tasks.retail_tools.scenario import Scenario


def answers(scenario: Scenario) -> Iterator[Parsed]:
    """Yield its answers, one per turn, to the last."""
    want = scenario.want
    if scenario.personality in ("terse", "forgetful"):
        for slot in want.facts:
            yield Parsed(f"Could you tell me the {slot}, please?")
    yield Parsed("I will take care of it. Shall I go ahead?")
    if want.change:
        yield Parsed("I have noted that. Shall I go ahead?")
    for name, arguments in want.calls:
        yield Parsed("", tool_calls=(ToolCall(name, arguments),))
    told = f"{', '.join(want.required)}. " if want.required else "It is done. "
    yield Parsed(f"{told}Is there anything else?")
