"""The scripted user: reads what the agent says, answers by rules. Deterministic, pure.

It opens with its wish, tells facts as its personality does, confirms (or changes its mind once)
when asked to, and leaves when it is asked whether there is anything else, or when it has answered
`patience` times without being understood.
"""

from __future__ import annotations

from services.env_agents.tasks.retail_tools.scenario import Scenario

PATIENCE = 12

_SMALL_TALK = (
    "Hello! What a day, my train was late again.",
    "My sister recommended you, by the way.",
    "I hope this does not take long, I have a cake in the oven.",
)
_CONFIRM = ("confirm", "go ahead", "is that right", "shall i", "proceed")
_DONE = ("anything else", "something else")


class ScriptedUser:
    """One user's side of the conversation."""

    def __init__(self, scenario: Scenario) -> None:
        want = scenario.want
        self._personality = scenario.personality
        self._goal = want.goal
        self._untold = dict(want.facts)
        self._change = want.change
        self._num_replies = 0

    def opening(self) -> str:
        """Return the first message."""
        if self._personality in ("terse", "forgetful"):
            return self._goal
        facts = self._tell(*self._untold)
        if self._personality == "chatty":
            return f"{_SMALL_TALK[0]} {self._goal} {_SMALL_TALK[1]} {facts} {_SMALL_TALK[2]}"
        return f"{self._goal} {facts}".strip()

    def reply(self, said: str) -> str | None:
        """Return the answer to what the agent said, None when the user leaves."""
        self._num_replies += 1
        heard = said.lower()
        if any(phrase in heard for phrase in _DONE) or self._num_replies > PATIENCE:
            return None
        if any(phrase in heard for phrase in _CONFIRM):
            change, self._change = self._change, ""
            return change or "Yes, please."
        asked = [slot for slot in self._untold if slot in heard]
        if asked:
            # A terse user answers one question at a time.
            return self._tell(*(asked[:1] if self._personality == "terse" else asked))
        if self._untold:
            return self._tell(next(iter(self._untold)))
        return "I have told you everything. Please help me."

    def _tell(self, *slots: str) -> str:
        return " ".join([self._untold.pop(slot) for slot in slots])
