"""An unmodified openai-SDK agent is trained on over a real bus, and audits like a native one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness import ROOT, Run, assert_sound

from shared.cli.records import load
from shared.wire.trajectory import Trajectory

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

VERSIONS = 4


def values(folder: Path, environment: str, options: dict[str, str]) -> Path:
    model = folder / "model"
    script = ROOT / "examples/tiny_chat/make_model.py"
    subprocess.run([sys.executable, str(script), "--out", str(model)], check=True)
    config = {
        "run": {"name": "agent", "seed": 0},
        "model": {"source": str(model)},
        "task": {
            "dataset": "stock",
            "environment": environment,
            "options": options,
            "renderer": "services.env_agents.chat.renderer:ChatRenderer",
            "max_turns": 8,
        },
        "sampling": {"max_new_tokens": 24, "context_tokens": 1024},
        "admission": {"groups_per_version": 4, "group_size": 4, "max_outstanding_groups": 12},
        "learner": {
            "versions": VERSIONS,
            "optimizer": {"lr": 3e-3, "schedule": "constant"},
            "eval": {"episodes": 0},
            "checkpoint": {"every_versions": 2},
        },
        "rollout": {"max_running": 32, "kv_slots": 64},
        "env_agents": {"concurrency": 32},
    }
    path = folder / "values.yaml"
    tree = {role: {"replicas": 1} for role in ("learner", "rollout", "env_agents", "logit_oracle")}
    path.write_text(yaml.safe_dump({**tree, "config": config}))
    return path


@pytest.mark.parametrize("kind", ["agent", "native"])
def test_every_trained_token_of_a_tool_conversation_has_its_exact_old_logprob(
    start: Callable[..., Run], tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / kind
    folder.mkdir()
    traces = folder / "traces"
    if kind == "agent":
        path = values(
            folder,
            "services.env_agents.gateway.environment:AgentEnvironment",
            {"agent": "tests.e2e.openai_agent:play", "trace_dir": str(traces)},
        )
    else:
        path = values(folder, "tests.e2e.openai_agent:Native", {})
    run = start("up", "--config", str(path), "--audit", "400")
    assert run.wait(240) == 0, run.output()
    summary = run.summary()
    assert_sound(summary, VERSIONS)
    assert summary["audited_tokens"] >= 400
    assert summary["audit_mismatches"] == 0
    assert summary["audit_control_ratio"] > 0.3, "the version before gives other numbers"
    records = load(run.run_dir)
    outcomes = [records.terminal(seq).outcome for seq in records.terminals]
    played = [outcome for outcome in outcomes if isinstance(outcome, Trajectory)]
    assert len(played) == len(outcomes) >= VERSIONS * 16
    turns = [sum(len(s.turns) for s in outcome.sequences) for outcome in played]
    assert max(turns) >= 3
    if kind == "agent":
        _assert_traces_are_what_was_recorded(traces, played)


def _assert_traces_are_what_was_recorded(traces: Path, played: list[Trajectory]) -> None:
    """What the agent was answered, token for token, is what the trajectories hold."""
    recorded = {
        tuple(sequence.token_ids.numpy()[turn.start : turn.stop].tolist())
        for outcome in played
        for sequence in outcome.sequences
        for turn in sequence.turns
    }
    answered = 0
    for path in traces.iterdir():
        events = [json.loads(line) for line in path.read_text().splitlines()]
        if events[-1]["event"] != "end":
            continue  # still played when the run ended
        for event in events:
            if event["event"] == "answer":
                answered += 1
                assert tuple(event["token_ids"]) in recorded
    assert answered >= 3 * VERSIONS * 16
