"""Any gymnasium environment with numbered actions, played as text.

The first observation lists the actions, then what the environment shows; the policy answers with
one of the actions. Anything else is a wasted turn: it is told so, and `malformed` counts it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from services.env_agents.answers import without_stop, without_thought
from services.env_agents.environment import Observation, StepResult
from services.env_agents.tasks.drawing import content_digest, draw
from services.env_agents.tasks.options import checked, function, installed
from shared.wire.messages import TaskRef

MAX_NUMBERS = 64
"""A larger observation is no text; `describe` says what to show instead."""

COLOURS: tuple[str, ...] = (
    "black", "red", "green", "yellow", "blue", "magenta", "cyan", "white",
)  # fmt: skip

_COLOURED = re.compile("\x1b\\[([0-9;]+)m(.*?)\x1b\\[0m", re.DOTALL)
_ESCAPE = re.compile("\x1b\\[[0-9;]*m")

OPTIONS: Mapping[str, Any] = {
    "id": ..., "kwargs": {}, "actions": [], "describe": "", "intro": True, "max_turns": 100,
    "hidden": False,
}  # fmt: skip


class GymnasiumText:
    """One episode. Satisfies `Environment`.

    Args:
        options: `id` (as for `gymnasium.make`), `kwargs` (for it), `actions` (words in the order
            of the action numbers; default: the numbers), `describe` (`package.module:function` of
            the observation; default: the `ansi` rendering where there is one, else the
            observation itself), `intro` (True: list the actions first), `max_turns` (100),
            `hidden` (False: equal first observations are equal tasks; True: the seed decides more
            than is seen, as in a card game).

    Raises:
        ValueError: an unknown option, no such environment, or not playable as text.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        chosen = checked("GymnasiumText", options, OPTIONS)
        gymnasium = installed("gymnasium", "env-agents")
        kwargs: dict[str, Any] = dict(chosen["kwargs"])
        self._id = str(chosen["id"])
        self._describe = function(chosen["describe"]) if chosen["describe"] else None
        try:
            modes = gymnasium.spec(self._id).make().metadata.get("render_modes", [])
            if "ansi" in modes and self._describe is None:
                kwargs.setdefault("render_mode", "ansi")
            self._env: Any = gymnasium.make(self._id, **kwargs)
        except Exception as error:
            raise ValueError(f"gymnasium.make({self._id!r}): {error}") from error
        self._ansi = kwargs.get("render_mode") == "ansi" and self._describe is None
        space = self._env.action_space
        if not isinstance(space, gymnasium.spaces.Discrete):
            raise ValueError(f"{self._id}: its actions are {space}, not numbered (Discrete)")
        self._first_action = int(space.start)
        self._actions = [str(word) for word in chosen["actions"]] or [
            str(number) for number in range(self._first_action, self._first_action + int(space.n))
        ]
        if len(self._actions) != int(space.n):
            raise ValueError(
                f"{self._id} has {int(space.n)} actions, the option names {len(self._actions)}"
            )
        shown = self._env.observation_space
        numbers = gymnasium.spaces.utils.flatdim(shown) if shown.is_np_flattenable else 0
        if not self._ansi and self._describe is None and numbers > MAX_NUMBERS:
            discrete = isinstance(shown, gymnasium.spaces.Discrete | gymnasium.spaces.Tuple)
            if not discrete:
                raise ValueError(f"{self._id}: {numbers} numbers are no text; set `describe`")
        self._intro = bool(chosen["intro"])
        self._hidden = bool(chosen["hidden"])
        self._max_turns = int(chosen["max_turns"])
        self._turns = 0
        self._digest = ""

    async def reset(self, task: TaskRef) -> Observation:
        """Draw a task of the split and start it.

        Raises:
            ValueError: no such split, or it is empty.
        """

        def make(seed: int) -> tuple[int, str]:
            observation, _ = self._env.reset(seed=seed)
            return seed, self._text(observation)

        def content(drawn: tuple[int, str]) -> str:
            seed, text = drawn
            return content_digest(self._id, text, str(seed) if self._hidden else "")

        # The last one made is the one that was drawn: the environment stands at its start.
        drawn = draw(task, make, content)
        self._digest = content(drawn)
        words = f"Actions: {', '.join(self._actions)}\n" if self._intro else ""
        return Observation(words + drawn[1])

    async def step(self, answer: str) -> StepResult:
        """Act, or waste the turn when the answer is no action."""
        self._turns += 1
        late = self._turns >= self._max_turns
        word = without_thought(without_stop(answer)).strip()
        if word not in self._actions:
            told = f"{word[:40]!r} is no action. Actions: {', '.join(self._actions)}\n"
            return StepResult(Observation(told), truncated=late, rewards={"malformed": 1.0})
        moved = self._env.step(self._first_action + self._actions.index(word))
        observation, reward, terminated, truncated, _ = moved
        return StepResult(
            observation=Observation(self._text(observation)),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=not terminated and (bool(truncated) or late),
        )

    def task_digest(self) -> str:
        return self._digest

    async def close(self) -> None:
        self._env.close()

    def _text(self, observation: Any) -> str:
        if self._describe is not None:
            return str(self._describe(observation))
        if self._ansi:
            return without_escapes(str(self._env.render()))
        return f"{_plain(observation)}\n"


def without_escapes(text: str) -> str:
    """The text with coloured parts written out, `(red:S)`: colour is often all that tells."""
    named = _COLOURED.sub(lambda found: f"({_colour(found[1])}:{found[2]})", text)
    return _ESCAPE.sub("", named)


def _colour(codes: str) -> str:
    for code in codes.split(";"):
        if code[:1] in ("3", "4") and code[1:] in "01234567" and len(code) == 2:
            return COLOURS[int(code[1])]
    return "marked"


def _plain(observation: Any) -> Any:
    """The observation in Python's own types, which read without `np.int64(...)`."""
    if isinstance(observation, tuple):
        return tuple(_plain(part) for part in observation)
    if isinstance(observation, dict):
        return {name: _plain(part) for name, part in observation.items()}
    return observation.tolist() if hasattr(observation, "tolist") else observation
