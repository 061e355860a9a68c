"""A user's classes by import path: checked at start, every refusal names the offender."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from services.env_agents.loading import environment_class, renderer
from shared.runtime.errors import ConfigError

ROOT = Path(__file__).parents[2]

GOOD = """
from services.env_agents.environment import Observation, StepResult

class Echo:
    def __init__(self, options):
        self.options = dict(options)
        if "refuse" in options:
            raise KeyError("refuse")
    async def reset(self, task):
        return Observation("@00>")
    async def step(self, answer):
        return StepResult(Observation("@00>"), reward=1.0, terminated=True)
    def task_digest(self):
        return "d"
    async def close(self):
        pass

class NoStep:
    def __init__(self, options): ...
    async def reset(self, task): ...
    def task_digest(self): ...
    async def close(self): ...

class SyncStep(NoStep):
    def step(self, answer): ...

class Renders:
    stop_ids = (0,)
    def __init__(self, model_dir, options): ...
    def prompt(self, text): return [1]
    def observation(self, text): return [1]
    def decode(self, ids): return ""

class NoStopIds(Renders):
    stop_ids = None

not_a_class = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = "user_env_for_loading"
    (tmp_path / f"{name}.py").write_text(GOOD)
    (tmp_path / "broken_user_env.py").write_text("1/0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


def test_a_class_outside_the_repository_is_loaded_and_given_its_options(user_module: str) -> None:
    found = environment_class(f"{user_module}:Echo", {"a": 1})
    assert found({"a": 1}).options == {"a": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no_colon", "write it as package.module:Class"),
        ("no_such_module_here:X", "PYTHONPATH"),
        ("broken_user_env:X", "ZeroDivisionError"),
        ("user_env_for_loading:Missing", "has no class Missing"),
        ("user_env_for_loading:not_a_class", "has no class not_a_class"),
        ("user_env_for_loading:NoStep", "has no method `step`"),
        ("user_env_for_loading:SyncStep", "`step` must be `async def`"),
    ],
)
def test_what_cannot_be_an_environment_is_refused_by_path_and_reason(
    user_module: str, path: str, problem: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        environment_class(path, {})
    assert problem in str(refusal.value)
    assert str(refusal.value).startswith(f"task.environment {path}: ")
    assert "\n" not in str(refusal.value)


def test_options_that_the_environment_refuses_are_a_config_error(user_module: str) -> None:
    with pytest.raises(ConfigError, match=r"refuses task\.options: KeyError"):
        environment_class(f"{user_module}:Echo", {"refuse": 1})


def test_a_renderer_is_loaded_the_same_way(user_module: str, tmp_path: Path) -> None:
    assert renderer(f"{user_module}:Renders", "anywhere", {}).stop_ids == (0,)
    with pytest.raises(ConfigError, match="no tuple `stop_ids`"):
        renderer(f"{user_module}:NoStopIds", "anywhere", {})
    with pytest.raises(ConfigError, match="has no method `prompt`"):
        renderer(f"{user_module}:Echo", "anywhere", {})
    with pytest.raises(ConfigError, match="tokenizer"):
        renderer("services.env_agents.text_renderer:TextRenderer", str(tmp_path), {})


def test_the_service_imports_where_torch_and_transformers_are_blocked() -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'safetensors', 'vllm', 'megatron'):\n"
        "    sys.modules[name] = None\n"
        "import services.env_agents.service, services.env_agents.config\n"
        "import services.env_agents.text_renderer, services.env_agents.tasks.frozen_lake\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
