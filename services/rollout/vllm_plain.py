"""vLLM as it comes, on the engine that a rollout runs: what the benchmark compares with."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from services.rollout.vllm_server import VllmServer


async def plain_update_s(server: VllmServer, names: Sequence[str], label: str) -> float:
    """Return the seconds of vLLM's own calls for an update whose tensors lie ready, unchecked."""
    llm: Any = server._llm  # pyright: ignore[reportPrivateUsage]
    await llm.collective_rpc("lagwise_checking", args=(False,))
    started = time.perf_counter()
    await llm.pause_generation(mode="keep", clear_cache=True)
    await server.swap(names, label)
    await llm.resume_generation()
    spent = time.perf_counter() - started
    await llm.collective_rpc("lagwise_checking", args=(True,))
    return spent
