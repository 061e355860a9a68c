"""Names that the rollout and its engine's processes agree on.

Apart from `vllm_worker.py`, which prepares the process that imports it and therefore must not be
imported by the rollout: the engine is forked from it.
"""

from __future__ import annotations

BACKEND = "lagwise"
"""Of the weight transfer."""

ROUTING = "lagwise_routing"
"""In vLLM's additional configuration: whether routing is recorded. Also the call that takes it."""

ROUTING_KEY = "routing"
"""In a request's extra arguments: the key under which its routing is taken."""

ROUTING_HELD = "routing_held"
"""Likewise: [label, stop] of the rows that the caller has, if any."""

WORKER_EXTENSION = "services.rollout.vllm_worker.RolloutWorker"

OWNER_VARIABLE = "LAGWISE_ROLLOUT_PID"
"""Environment variable with the rollout that the processes belong to."""
