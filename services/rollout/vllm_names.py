"""Names that the rollout and its engine's processes agree on.

Apart from `vllm_worker.py`, which prepares the process that imports it and therefore must not be
imported by the rollout: the engine is forked from it.
"""

from __future__ import annotations

BACKEND = "lagwise"
"""Of the weight transfer."""

WORKER_EXTENSION = "services.rollout.vllm_worker.RolloutWorker"

OWNER_VARIABLE = "LAGWISE_ROLLOUT_PID"
"""Environment variable with the rollout that the processes belong to."""
