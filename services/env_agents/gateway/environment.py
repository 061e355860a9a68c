"""An agent program as an environment: its requests are the observations.

The program runs the loop, as it does in production; to the episode it looks like any environment:
`reset` is its first request, `act` hands it the answer and waits for the next one, and its return
value ends the episode with the reward. So what it is trained on is recorded, fenced, scored and
audited by the same code as any other episode.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from services.env_agents.answer import Answer
from services.env_agents.environment import Observation, StepResult
from services.env_agents.gateway.programs import Command, Function, Program
from services.env_agents.gateway.sessions import Exchange, Gateway, Session
from services.env_agents.gateway.traces import Trace
from shared.wire.messages import TaskRef

OPTIONS = ("agent", "command", "host", "port", "trace_dir")

_GATEWAYS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, int], Gateway]] = (
    weakref.WeakKeyDictionary()
)
"""One endpoint per process (event loop) and address."""


class AgentEnvironment:
    """Satisfies `Environment` and `ActsOnAnswers`.

    Args:
        options: `agent` (package.module:function) or `command` (list of arguments), see
            `programs.py`; `host` (127.0.0.1) and `port` (0: any) of the endpoint; `trace_dir`
            (folder for traces that outlive a crash; none).

    Raises:
        ValueError: unknown or missing options, or an agent that cannot be imported.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; there are {', '.join(OPTIONS)}")
        if ("agent" in options) is ("command" in options):
            raise ValueError("needs either `agent` or `command`")
        self._program: Program
        if "agent" in options:
            self._program = Function.load(str(options["agent"]))
        else:
            arguments = options["command"]
            if not isinstance(arguments, list) or not arguments:
                raise ValueError("`command` is a list: the program and its arguments")
            self._program = Command([str(one) for one in cast("list[Any]", arguments)])
        self._address = str(options.get("host", "127.0.0.1")), int(options.get("port", 0))
        self._trace = Trace(Path(str(options["trace_dir"])) if "trace_dir" in options else None)
        self._session: Session | None = None
        self._running: asyncio.Task[dict[str, float]] | None = None
        self._exchange: Exchange | None = None
        self._digest = ""

    async def reset(self, task: TaskRef) -> Observation:
        """Start the agent and wait for its first request.

        Raises:
            RuntimeError: it ended without one.
        """
        content = json.dumps(
            task.payload or [task.dataset, task.split, task.seed, task.index], sort_keys=True
        )
        self._digest = hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
        gateway = self._gateway()
        self._session = await gateway.open()
        self._trace.begin(self._session.key, task)
        self._running = asyncio.create_task(
            self._program.run(gateway.base_url, self._session.key, task)
        )
        observation = await self._next()
        if observation is None:
            raise RuntimeError("the agent ended without asking its model for anything")
        return observation

    async def act(self, answer: Answer) -> StepResult:
        """Hand the agent its answer; return its next request, or its reward.

        Raises:
            Exception: whatever the agent failed of.
        """
        assert self._exchange is not None
        assert self._running is not None
        self._trace.answer(self._exchange, answer)
        if not self._exchange.answer.done():
            self._exchange.answer.set_result(answer)
        observation = await self._next()
        if observation is not None:
            return StepResult(observation)
        parts = self._running.result()
        self._trace.end(parts)
        return StepResult(Observation(), reward=sum(parts.values()), terminated=True, rewards=parts)

    async def step(self, answer: str) -> StepResult:
        """Not without a chat renderer: an agent sends messages."""
        del answer
        raise TypeError("an agent sends messages; task.renderer must be a chat renderer")

    def task_digest(self) -> str:
        return self._digest

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running], timeout=1.0)
        if self._session is not None:
            await self._gateway().close(self._session)
        self._trace.close()

    async def _next(self) -> Observation | None:
        """Return the next request, None when the agent has ended; raise what it failed of."""
        assert self._session is not None
        assert self._running is not None
        waiting = asyncio.ensure_future(self._session.waiting.get())
        try:
            await asyncio.wait((waiting, self._running), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            waiting.cancel()
            raise
        if waiting.done():
            self._exchange = waiting.result()
            self._trace.request(self._exchange)
            return self._exchange.asked.observation
        waiting.cancel()
        error = self._running.exception()
        if error is not None:
            self._trace.fail(error)
            raise error
        return None

    def _gateway(self) -> Gateway:
        by_address = _GATEWAYS.setdefault(asyncio.get_running_loop(), {})
        return by_address.setdefault(self._address, Gateway(*self._address))
