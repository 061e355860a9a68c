"""A core of its own for the engine, as a GPU would be: what trains must not slow what samples.

Without it a trainer, an engine and its front end share two cores, and asynchrony costs what it
hides.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress

import psutil

ENGINE = "VLLM::EngineCore"
"""Name of vLLM's engine process."""
LOOK_S = 0.2


@contextmanager
def engine_apart() -> Generator[None]:
    """Keep this process and its children off the first core, and their engines on it alone.

    Does nothing on one core.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        yield
        return
    os.sched_setaffinity(0, cores[1:])
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(cores[0], stop), daemon=True)
    watch.start()
    try:
        yield
    finally:
        stop.set()
        watch.join()
        os.sched_setaffinity(0, cores)


def _watch(core: int, stop: threading.Event) -> None:
    me = psutil.Process()
    while not stop.wait(LOOK_S):
        for process in me.children(recursive=True):
            with suppress(psutil.Error, OSError):
                if process.name().startswith(ENGINE[:15]):
                    for thread in process.threads():
                        os.sched_setaffinity(thread.id, {core})
