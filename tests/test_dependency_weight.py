"""Each service imports in a process where what only the others need is blocked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("matplotlib", "jinja2", "rich", "psutil", "pytest", "vllm", "megatron", "kubernetes")
BLOCKED = {
    "env_agents": ("torch", "transformers", "safetensors", *TOOLS),
    "rollout": ("transformers", "gymnasium", "tokenizers", *TOOLS),
    "logit_oracle": ("gymnasium", *TOOLS[:4], *TOOLS[5:]),
    "learner": ("gymnasium", *TOOLS[:4], *TOOLS[5:]),
}


@pytest.mark.parametrize("service", sorted(BLOCKED))
def test_a_service_imports_without_what_only_others_need(service: str) -> None:
    code = (
        "import sys\n"
        f"for name in {BLOCKED[service]!r}:\n"
        "    sys.modules[name] = None\n"
        f"import services.{service}.service, services.{service}.config\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
