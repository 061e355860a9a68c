"""The weights benchmark: its models, its limits, and the whole command at tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.cli import bench_weights, bench_weights_load
from shared.cli.bench_weights_cases import Training, full, trained_case
from shared.cli.bench_weights_limits import LIMITS, figure, header, judge, line
from shared.cli.bench_weights_models import SavedVersions, Synthetic, transformer_shapes
from shared.cli.bench_weights_training import Trainer, train_cases
from shared.weights.bits import same_bits, to_bits

FIELDS = {
    "case", "dtype", "lr", "steps_per_version", "model_bytes", "changed_ratio", "delta_ratio",
    "encode_over_memcpy", "apply_over_memcpy", "zstd_full_ratio", "history5_over_copy",
    "publish_to_applied_s", "local_file_s", "peak_rss_bytes",
}  # fmt: skip
"""What every row must have, whatever is added."""

GOOD = {
    "case": "1gb-1pct", "model_bytes": 10**9, "changed_ratio": 0.01, "delta_ratio": 0.007,
    "encode_over_memcpy": 0.6, "apply_over_memcpy": 2.5, "zstd_full_ratio": 0.68,
    "history5_over_copy": 1.03, "publish_to_applied_s": {"1": 1.0, "2": 1.4}, "local_file_s": 0.5,
    "peak_rss_bytes": 1_600_000_000, "others_cpu_ratio": 0.0,
}  # fmt: skip


def test_a_row_within_its_limits_is_ok_and_says_which_aims_it_reached() -> None:
    verdicts = {verdict.limit.figure: verdict for verdict in judge([GOOD])}
    assert set(verdicts) == {"encode_over_memcpy", "apply_over_memcpy", "publish_over_local_file"}
    assert all(verdict.ok for verdict in verdicts.values())
    assert "aim >= 2 reached" in verdicts["apply_over_memcpy"].text
    assert "aim >= 0.9)" in verdicts["encode_over_memcpy"].text
    assert line(GOOD).endswith("ok")


@pytest.mark.parametrize(
    "change",
    [
        {"encode_over_memcpy": 0.49},
        {"apply_over_memcpy": 0.99},
        {"local_file_s": 0.46},
        {"publish_to_applied_s": {"1": 1.0}},
        {"encode_over_memcpy": None},
    ],
)
def test_one_figure_over_its_limit_or_absent_is_a_miss(change: dict) -> None:
    row = GOOD | change
    assert sum(not verdict.ok for verdict in judge([row])) == 1
    assert line(row).endswith("MISS")


def test_memory_is_judged_above_the_models_size() -> None:
    row = GOOD | {"case": "2gb-1pct", "model_bytes": 2 * 10**9, "peak_rss_bytes": 3 * 10**9}
    assert all(verdict.ok for verdict in judge([row]))
    row["peak_rss_bytes"] += 10**7
    assert [v.limit.figure for v in judge([row]) if not v.ok] == ["rss_above_model_gb"]


def test_every_limit_names_a_case_and_a_figure_that_exist() -> None:
    names = {case.name for case in full()}
    assert {limit.case for limit in LIMITS} <= names
    assert all(figure(GOOD, limit.figure) is not None for limit in LIMITS)


def test_lines_of_the_table_fit_its_header_and_a_busy_machine_is_marked() -> None:
    assert line(GOOD).index("  ok") == header().index("  ok")
    assert line(GOOD | {"others_cpu_ratio": 0.5}).endswith("ok (busy)")
    assert "exit code 1" in line({"case": "x", "error": "codec: exit code 1"})


def test_the_load_of_others_is_what_we_and_our_children_did_not_use(monkeypatch) -> None:
    busy, own, clock = iter([10.0, 14.0]), iter([1.0, 2.0]), iter([0.0, 2.0])
    monkeypatch.setattr(bench_weights_load, "_busy_s", lambda: next(busy))
    monkeypatch.setattr(bench_weights_load, "_own_s", lambda: next(own))
    monkeypatch.setattr(bench_weights_load.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench_weights_load.os, "cpu_count", lambda: 2)
    assert bench_weights_load.OtherLoad().ratio() == 0.75


@pytest.mark.parametrize("num_elements", [10**6, 5 * 10**7, 5 * 10**8, 10**9])
def test_synthetic_shapes_add_up_to_the_size_that_was_asked_for(num_elements: int) -> None:
    shapes = transformer_shapes(num_elements)
    hidden = shapes["model.norm.weight"][0]
    assert 0 <= num_elements - sum(int(np.prod(s)) for s in shapes.values()) < hidden
    assert len(shapes) < 400


def test_a_synthetic_version_moves_the_wanted_share_of_elements_by_one_unit() -> None:
    model = Synthetic(10**6, 0.05)
    old = model.first()
    assert 0.019 < float(old["model.embed_tokens.weight"].float().std()) < 0.021
    new = {name: tensor.clone() for name, tensor in old.items()}
    model.advance(new)
    steps = np.concatenate(
        [(to_bits(new[name]) - to_bits(old[name])).view(np.int16) for name in sorted(old)]
    )
    assert set(np.unique(steps)) == {-1, 0, 1}
    assert np.mean(steps != 0) == pytest.approx(0.05, abs=0.002)
    assert np.mean(steps) == pytest.approx(0.0, abs=0.002)


def test_saved_versions_are_walked_to_the_last_and_back(tmp_path: Path) -> None:
    for version in range(3):
        save_file({"w": torch.full((2,), float(version))}, tmp_path / f"{version:03d}.safetensors")
    model = SavedVersions(tmp_path)
    state = model.first()
    seen = [float(state["w"][0])]
    for _ in range(6):
        model.advance(state)
        seen.append(float(state["w"][0]))
    assert seen == [0, 1, 2, 1, 0, 1, 2]


def test_one_saved_version_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "000.safetensors")
    with pytest.raises(ValueError, match="holds 1 versions"):
        SavedVersions(tmp_path)


TINY = Training(
    hidden=32, layers=1, vocab=16, warmup_steps=30, warmup_lr=1e-2, settling_steps=2, versions=2
)


def test_training_learns_and_leaves_versions_that_differ(tmp_path: Path) -> None:
    cases = [trained_case(1e-3, 1), trained_case(1e-3, 4), trained_case(1e-3, 1, dtype="F32")]
    told = train_cases(TINY, cases, tmp_path)
    assert set(told) == {"lr1e-3-k1", "lr1e-3-k4", "lr1e-3-k1-fp32"}
    for case in cases:
        assert told[case.name]["loss_at_end"] < told[case.name]["loss_at_start"] - 0.5
        versions = [load_file(file) for file in sorted((tmp_path / case.name).iterdir())]
        assert len(versions) == TINY.versions + 1
        embedding = [version["model.embed_tokens.weight"] for version in versions]
        assert not same_bits(embedding[0], embedding[1])
        assert embedding[0].dtype == (torch.float32 if case.dtype == "F32" else torch.bfloat16)


def test_branches_start_from_the_same_optimizer_state() -> None:
    trainer = Trainer(TINY)
    trainer.train(3, 1e-3)
    warm = trainer.checkpoint()
    before = {name: tensor.clone() for name, tensor in trainer.weights("BF16").items()}
    trainer.train(2, 1e-2)
    assert not all(same_bits(before[n], t) for n, t in trainer.weights("BF16").items())
    trainer.restore(warm)
    assert all(same_bits(before[n], t) for n, t in trainer.weights("BF16").items())
    again = trainer.checkpoint()
    assert warm.keys() == again.keys()
    assert all(torch.equal(warm[name], again[name]) for name in warm)


@pytest.mark.timeout(300)  # seven processes start: seconds, but not on a busy machine
def test_the_command_measures_every_field_over_a_real_bus(tmp_path: Path, capsys) -> None:
    out = tmp_path / "weights.json"
    assert bench_weights.main(["--quick", "--only", "quick-1pct", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    assert row.keys() >= FIELDS
    assert row["changed_ratio"] == pytest.approx(0.01, abs=0.001)
    assert 0.005 < row["delta_ratio"] < 0.03
    assert 1.0 < row["history5_over_copy"] < 1.15
    assert row["publish_to_applied_s"].keys() == {"1", "2"}
    assert row["peak_rss_bytes_by_join"].keys() == {"store", "bus"}
    assert row["resyncs"] == 0
    assert row["peak_rss_bytes"] > row["model_bytes"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert "quick-1pct" in capsys.readouterr().out


def test_a_part_that_fails_is_reported_and_nothing_is_judged(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench_weights, "quick", lambda: (TINY, [trained_case(1e-3, 1)]))
    monkeypatch.setattr(bench_weights._Bench, "train", lambda *_: {})
    out = tmp_path / "weights.json"
    assert bench_weights.main(["--quick", "--out", str(out)]) == 1
    (row,) = json.loads(out.read_text())
    assert "codec: exit code 1" in row["error"]
    assert "holds 0 versions" in out.with_suffix(".log").read_text()


def test_an_unknown_case_is_refused_with_the_names_there_are(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as refused:
        bench_weights.main(["--only", "3gb", "--out", str(tmp_path / "weights.json")])
    assert refused.value.code == 2
    assert "1gb-1pct" in capsys.readouterr().err
