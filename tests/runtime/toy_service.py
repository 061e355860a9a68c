"""A service for the life-cycle tests: `python tests/runtime/toy_service.py MODE [options]`."""

from __future__ import annotations

import asyncio
import errno
import sys
import time

from shared.runtime.context import Context
from shared.runtime.errors import Fatal, Fenced
from shared.runtime.sections import CommonConfig
from shared.runtime.service import launch

MODE = sys.argv.pop(1)


async def serve(context: Context, _config: CommonConfig) -> None:
    context.health.set_ready()
    context.set_version(3)
    match MODE:
        case "return":
            return
        case "fenced":
            raise Fenced("another learner owns run 'x'")
        case "fatal":
            async with asyncio.TaskGroup() as group:
                group.create_task(_raise(Fatal("the floor is lava")))
        case "bug":
            raise ZeroDivisionError("oops")
        case "disk":
            raise OSError(errno.ENOSPC, "No space left on device", "runs/x/checkpoint")
        case "deaf":
            await asyncio.sleep(3600)
        case "hung-thread":
            asyncio.get_running_loop().run_in_executor(None, time.sleep, 3600)
            await context.stop.wait()
        case "stall":
            time.sleep(3)  # noqa: ASYNC251 - on purpose
            await context.stop.wait()
        case _:
            await context.stop.wait()
            context.count("drained")


async def _raise(error: Exception) -> None:
    raise error


if __name__ == "__main__":
    launch("env_agents", CommonConfig, serve)
