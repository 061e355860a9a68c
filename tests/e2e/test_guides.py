"""docs/train_your_agent.md, followed to the letter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from guides import files, write
from harness import ROOT

from shared.cli.config_cmd import read, validate

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    script = ROOT / "examples/tiny_chat/make_model.py"
    made = subprocess.run([sys.executable, str(script), "--out", "runs/tiny-chat"], cwd=tmp_path)
    assert made.returncode == 0
    return tmp_path


def test_every_values_file_of_the_page_is_valid(tmp_path: Path) -> None:
    write(tmp_path)
    names = [name for name in files() if name.endswith(".yaml")]
    assert names == ["my_shop.yaml", "my_agent.yaml", "my_server.yaml"]
    for name in names:
        validate(read(tmp_path / name))


@pytest.mark.parametrize("name", ["my_shop", "my_agent"])
def test_the_guide_runs_as_written_and_loses_nothing(folder: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shared.cli.main", "up", "--config", f"{name}.yaml"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout
    assert "0 lost" in done.stdout
    assert list((folder / "runs").glob("my-*/report.html"))
    if name == "my_agent":
        assert list((folder / "runs/my-agent-traces").iterdir())
