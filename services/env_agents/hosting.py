"""Where environments live: in the service itself, or each episode in a process of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import cast

from services.env_agents import loading
from services.env_agents.config import EnvAgentsConfig
from services.env_agents.environment import Environment
from services.env_agents.isolation.cells import Cells
from services.env_agents.isolation.isolated import IsolatedAgent, IsolatedEnvironment
from shared.runtime.context import Context

MakeEnvironment = Callable[[], Environment]


@asynccontextmanager
async def hosted(context: Context, config: EnvAgentsConfig) -> AsyncGenerator[MakeEnvironment]:
    """Yield what makes a fresh environment, checked on `task.options`.

    Raises:
        ConfigError: the environment cannot be used.
    """
    options = config.task.options
    isolation = config.env_agents.isolation
    if isolation.mode == "none":
        environment = loading.environment_class(config.task.environment, options)
        yield lambda: environment(options)
        return
    cells = Cells(context, config.task.environment, options, isolation)
    await cells.start()
    kind = IsolatedAgent if cells.acts else IsolatedEnvironment
    try:
        yield lambda: cast(Environment, kind(cells))
    finally:
        await cells.stop()
