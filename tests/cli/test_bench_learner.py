"""The learner benchmark: contenders take one and the same step, limits are judged as they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.cli import bench_learner
from shared.cli.bench_learner_cases import HEAD_LIMIT, QUICK, SIZES, judge
from shared.cli.bench_learner_checkpoint import main as checkpoint
from shared.cli.bench_learner_data import Sequences, draw, long_tailed
from shared.cli.bench_learner_hf import Flat, Loop, Padded, write_model
from shared.cli.bench_learner_ours import Learner, PlainLoss, score

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
SIZE = QUICK[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(SIZE.config, path)
    return path


@pytest.mark.parametrize("lengths", ["equal", "long_tailed"])
def test_all_contenders_take_the_same_step(model: Path, lengths: Any) -> None:
    data = score(model, draw(SIZE.lengths(lengths), SIZE.vocab))
    norms = [
        kind(model, data, SIZE.micro_tokens).step()
        for kind in (Learner, PlainLoss, Padded, Flat, Loop)
    ]
    assert norms[0] > 0.01
    assert norms == pytest.approx([norms[0]] * 5, rel=1e-4)


def test_sequences_come_back_from_their_file(tmp_path: Path) -> None:
    data = draw([5, 16, 9], 64)
    rows = [np.arange(n, dtype=np.float32) for n in (5, 16, 9)]
    data = data.with_old_logprobs(rows)
    data.save(tmp_path / "d.npz")
    back = Sequences.load(tmp_path / "d.npz")
    assert back.prompts == data.prompts == (1, 2, 1)
    assert back.num_loss_tokens == 26
    assert back.old_logprobs[1].tolist() == [0, 0, *range(2, 16)]
    for mine, theirs in zip(back.token_ids, data.token_ids, strict=True):
        assert mine.tolist() == theirs.tolist()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_long_tailed_lengths_have_the_same_sum_and_a_tail(size) -> None:
    lengths = size.lengths("long_tailed")
    assert sum(lengths) == sum(size.lengths("equal"))
    assert min(lengths) >= 16
    assert max(lengths) >= 3 * size.mean_tokens
    assert long_tailed(size.sequences, size.mean_tokens) == lengths


def test_log_probs_need_a_fraction_of_full_logits() -> None:
    full, chunked = (head(path, 600) for path in ("full", "chunked"))
    assert full["logits_bytes"] == 600 * 151_936 * 4
    assert full["extra_bytes"] > 3 * full["logits_bytes"]
    assert chunked["extra_bytes"] < full["extra_bytes"] / 3


def head(path: str, num_rows: int) -> dict[str, int]:
    """One path in a process of its own: a process has one peak."""
    command = [sys.executable, "-m", "shared.cli.bench_learner_head", path, str(num_rows)]
    return json.loads(subprocess.check_output(command, cwd=ROOT, timeout=100))


def test_a_checkpoint_is_timed_and_weighed(model: Path, tmp_path: Path) -> None:
    data = draw(SIZE.lengths("equal"), SIZE.vocab)
    data.save(tmp_path / "d.npz")
    told = checkpoint(model, tmp_path / "d.npz", SIZE.micro_tokens, tmp_path / "checkpoint")
    parameters = sum(p.numel() for p in Learner(model, data, 96).backend.state().values())
    assert told["checkpoint_bytes"] >= 3 * 4 * parameters
    assert 0 < told["stall_s"] <= told["write_s"]


def speed(lengths: str, **seconds: float) -> dict[str, Any]:
    return {
        "kind": "speed", "size": "s", "lengths": lengths,
        "cpu_s": {"ours": 1.0, **seconds}, "grad_norms": {"ours": 1.0, "trl": 1.0},
        "left_out": [],
    }  # fmt: skip


def test_limits_are_judged_against_the_fastest_and_a_gap_is_a_miss() -> None:
    rows = [speed("long_tailed", hf_padded=1.79, hf_flat=9.0, hf_loop=1.01, trl=1.0)]
    found = {v.text: (v.found, v.ok) for v in judge(rows)}
    assert found[">= 1.8x hf_padded"] == (1.79, False)
    assert found[">= 1x hf_flat or hf_loop"] == (1.01, True)
    assert found[">= 1x trl"] == (1.0, True)
    assert found["same step within 0.001"] == (0.0, True)
    verdicts = judge([speed("equal", hf_padded=1.0)])
    assert [v.ok for v in verdicts] == [True, False, True]
    assert "not measured" in verdicts[1].line
    without_flat = speed("long_tailed", hf_loop=1.2) | {"left_out": ["hf_flat"]}
    assert {v.text: v.ok for v in judge([without_flat])}[">= 1x hf_flat or hf_loop"]
    assert not {v.text: v.ok for v in judge([speed("long_tailed", hf_loop=1.2)])}[
        ">= 1x hf_flat or hf_loop"
    ]
    another = speed("equal") | {"grad_norms": {"ours": 1.0, "trl": 1.1}}
    assert not judge([another])[-1].ok
    for chunked, ok in ((10, True), (11, False)):
        row = {"kind": "head", "full_bytes": 10 * HEAD_LIMIT, "chunked_bytes": chunked}
        assert [v.ok for v in judge([row])] == [ok]


@pytest.mark.timeout(300)
def test_the_command_measures_what_it_can_and_names_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_learner, "find_spec", lambda name: None)
    out = tmp_path / "learner.json"
    assert bench_learner.main(["--quick", "--out", str(out), "--trl-python", "/none"]) == 1
    told = capsys.readouterr().out
    assert "NOT MEASURED: megatron: needs the extra megatron; trl: no /none" in told
    rows = json.loads(out.read_text())
    assert [row["kind"] for row in rows] == ["speed", "speed", "checkpoint"]
    for row in rows[:2]:
        assert set(row["cpu_s"]) == {"ours", "ours_plain_loss", "hf_padded", "hf_flat", "hf_loop"}
        assert all(seconds > 0 for seconds in row["cpu_s"].values())
