"""A mixture of experts in a real run: sampled in bfloat16, its routing recorded and replayed."""

from pathlib import Path

import pytest
import yaml
from harness import EXAMPLE, ROOT, assert_sound, small
from upcycled import CHOICES, LAYERS, upcycle

from shared.cli.records import load
from shared.wire.trajectory import Trajectory

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TARGETS = ("rollout-0", "logit-oracle-0")
VERSIONS = 2 * len(TARGETS) + 16


def test_replayed_routing_is_audited_across_kills(start, tmp_path: Path) -> None:
    model = tmp_path / "moe"
    upcycle(ROOT / "examples/frozen_lake/base", model)
    values = yaml.safe_load(EXAMPLE.read_text())
    values["config"]["model"] |= {"source": str(model), "routing": "replay"}
    config = tmp_path / "moe.yaml"
    config.write_text(yaml.safe_dump(values))
    run = start("up", "--config", str(config), "--audit", "600", *small(VERSIONS))
    run.kill_in_turn(TARGETS)
    assert run.wait(270) == 0, run.output()
    summary = run.summary()
    assert_sound(summary, VERSIONS)
    assert summary["audited_tokens"] >= 600
    assert summary["audit_mismatches"] == 0
    records = load(run.run_dir)
    played = [records.terminal(seq).outcome for seq in records.terminals]
    sequences = [s for one in played if isinstance(one, Trajectory) for s in one.sequences]
    assert len(sequences) > 1000
    assert {r.experts.shape[1:] for s in sequences for r in s.routing} == {(LAYERS, CHOICES)}
    # Some were sampled by several versions: each of them has recorded the prefix anew.
    assert any(len({r.version for r in s.routing if not r.start}) > 1 for s in sequences)
