"""`python -m services.rollout --config FILE [--set a.b=c]`."""

from __future__ import annotations

from services.rollout.config import RolloutConfig
from shared.runtime.service import launch

if __name__ == "__main__":
    from services.rollout.service import serve  # torch: only to run

    launch("rollout", RolloutConfig, serve)
