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


def test_what_the_chart_runs_beside_the_services_imports_without_torch_or_kubernetes() -> None:
    """The bus check runs in the env agents' image, the annotator in one of its own."""
    code = (
        "import sys\n"
        f"for name in {('torch', 'transformers', *TOOLS)!r}:\n"
        "    sys.modules[name] = None\n"
        "import shared.cli.bus_check, shared.cli.deletion_costs, shared.runtime.model_source\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_recorder_runs_in_the_learners_image() -> None:
    code = (
        "import sys\n"
        f"for name in {BLOCKED['learner']!r}:\n"
        "    sys.modules[name] = None\n"
        "import shared.cli.recorder, shared.cli.recording\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
