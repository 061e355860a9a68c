"""The command: fast help, and exit code 2 with one line for bad input."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = "examples/frozen_lake/values.yaml"


def lagwise(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shared.cli.main", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["--version"]])
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nsys.argv[0] = 'lagwise'\n"
        "for name in ('torch', 'transformers', 'nats', 'pydantic', 'numpy', 'rich'):\n"
        "    sys.modules[name] = None\n"
        f"from shared.cli.main import main\nmain({arguments!r})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "lagwise" in result.stdout


def test_config_check_accepts_the_example_and_refuses_a_typo() -> None:
    assert lagwise("config", "check", EXAMPLE).stdout == f"{EXAMPLE}: ok\n"
    line = one_line(lagwise("config", "check", EXAMPLE, "--set", "learner.lrr=1"))
    assert line == f"lagwise: config file {EXAMPLE}: `learner.lrr` is not a known key"


def test_config_show_is_a_values_file_again(tmp_path: Path) -> None:
    shown = lagwise("config", "show", EXAMPLE, "--set", "run.seed=5")
    (tmp_path / "again.yaml").write_text(shown.stdout)
    again = lagwise("config", "show", str(tmp_path / "again.yaml"), "--json")
    tree = json.loads(again.stdout)
    assert tree["config"]["run"]["seed"] == 5
    assert tree["rollout"] == {"replicas": 2}


def test_a_missing_file_a_missing_model_and_a_taken_folder_are_one_line_each(
    tmp_path: Path,
) -> None:
    assert "nowhere.yaml" in one_line(lagwise("up", "--config", "nowhere.yaml"))
    run_dir = str(tmp_path / "run")
    up = ("up", "--config", EXAMPLE, "--run-dir", run_dir)
    assert "model.source" in one_line(lagwise(*up, "--set", f"model.source={tmp_path}/gone"))
    assert not Path(run_dir).exists()
    assert "no run folder" in one_line(lagwise(*up, "--resume"))
    assert "no run folder" in one_line(lagwise(*up, "--resume", "must"))
    assert not Path(run_dir).exists()
    (tmp_path / "run").write_text("a file")
    assert run_dir in one_line(lagwise(*up))


def test_resume_never_refuses_a_folder_that_has_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    up = ("up", "--config", EXAMPLE, "--run-dir", str(tmp_path))
    line = one_line(lagwise(*up, "--resume", "never"))
    assert line.startswith(f"lagwise: --resume never: {tmp_path} has a run")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert "invalid choice" in lagwise(*up, "--resume", "perhaps").stderr


def test_an_unreachable_nats_is_one_line(tmp_path: Path) -> None:
    url = "nats://127.0.0.1:1"
    run_dir = str(tmp_path / "run")
    line = one_line(
        lagwise(
            "up", "--config", EXAMPLE, "--nats", url, "--run-dir", run_dir,
            "--set", "bus.connect_timeout_s=0.5",
        )
    )  # fmt: skip
    assert url in line
    assert not Path(run_dir).exists()
    assert url in one_line(lagwise("status", "--nats", url, "--run", "demo"))


def test_a_port_in_use_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        line = one_line(
            lagwise(
                "up", "--config", EXAMPLE, "--nats-port", port, "--run-dir", str(tmp_path / "run")
            )
        )
    assert not (tmp_path / "run").exists()
    assert f"port {port}" in line
    assert "--nats-port" in line


def test_audit_and_report_refuse_a_folder_that_is_no_run(tmp_path: Path) -> None:
    for command in ("audit", "report"):
        assert str(tmp_path) in one_line(lagwise(command, str(tmp_path)))


def test_status_of_a_run_that_has_ended_says_so(tmp_path: Path) -> None:
    facts = {"exit": "done", "run": "demo", "nats_url": "nats://127.0.0.1:1"}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    said = one_line(lagwise("status", "--run-dir", str(tmp_path)))
    assert f"{tmp_path} is not running (its end: done)" in said


def test_status_without_any_run_says_what_to_give(tmp_path: Path) -> None:
    assert "--run-dir" in one_line(lagwise("status", cwd=tmp_path))
