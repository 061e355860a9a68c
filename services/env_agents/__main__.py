"""`python -m services.env_agents --config FILE [--set a.b=c]`."""

from __future__ import annotations

import sys

from services.env_agents.config import EnvAgentsConfig
from services.env_agents.service import serve
from shared.runtime.service import launch

if __name__ == "__main__":
    sys.exit(launch("env_agents", EnvAgentsConfig, serve))
