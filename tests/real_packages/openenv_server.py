"""A small environment on the real OpenEnv server: `python openenv_server.py PORT SESSIONS`."""

from __future__ import annotations

import os
import random
import sys
from typing import Any

import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State


class Guess(Action):
    number: int


class Seen(Observation):
    hint: str


class Guessing(Environment[Guess, Seen, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        super().__init__()
        self._hidden = 0
        self._state = State()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: Any) -> Seen:
        self._hidden = random.Random(seed).randrange(10)
        return Seen(hint=f"a number below {kwargs.get('below', 10)}", done=False, reward=None)

    def step(self, action: Guess, timeout_s: float | None = None, **kwargs: Any) -> Seen:
        if action.number == 666:
            os._exit(9)
        if action.number == 500:
            raise RuntimeError("the environment failed")
        if action.number == self._hidden:
            return Seen(hint="right", done=True, reward=1.0)
        hint = "higher" if action.number < self._hidden else "lower"
        return Seen(hint=hint, done=False, reward=-0.1)

    @property
    def state(self) -> State:
        return self._state


if __name__ == "__main__":
    app = create_fastapi_app(Guessing, Guess, Seen, max_concurrent_envs=int(sys.argv[2]))
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
