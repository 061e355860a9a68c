"""A mixture of experts in a real run: sampled in bfloat16, its routing recorded and replayed."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from harness import ROOT, assert_sound, example, small
from safetensors.torch import load_file
from upcycled import CHOICES, LAYERS, sequences_of, upcycle

from shared.backends.torch_backend import TorchBackend
from shared.backends.trajectory_scoring import Piece, pieces_of, score_pieces
from shared.cli.archive import version_path
from shared.cli.records import RunRecords, load
from shared.wire.trajectory import Trajectory

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

TARGETS = ("rollout-0", "logit-oracle-0")
VERSIONS = 2 * len(TARGETS) + 10

F8 = npt.NDArray[np.float64]


def test_replayed_routing_is_audited_across_kills(start, tmp_path: Path) -> None:
    model = tmp_path / "moe"
    upcycle(ROOT / "examples/frozen_lake/base", model)
    config = example(
        tmp_path / "moe.yaml",
        model={"source": str(model), "routing": "replay"},
        rollout={"max_running": 2},  # slow: versions change in mid-episode
    )
    run = start("up", "--config", str(config), "--audit", "600", *small(VERSIONS))
    run.kill_in_turn(TARGETS)
    assert run.wait(270) == 0, run.output()
    summary = run.summary()
    assert_sound(summary, VERSIONS)
    assert summary["audited_tokens"] >= 600
    assert summary["audit_mismatches"] == 0
    records = load(run.run_dir)
    sequences = sequences_of(records)
    assert len(sequences) >= 64 * VERSIONS
    assert {r.experts.shape[1:] for s in sequences for r in s.routing} == {(LAYERS, CHOICES)}
    # Some were sampled by several versions: each of them has recorded the prefix anew.
    assert any(len({r.version for r in s.routing if not r.start}) > 1 for s in sequences)
    replayed, recomputed = discrepancies(records, model)
    print(f"k3(D) {k3(replayed):.2g} replayed, {k3(recomputed):.2g} recomputed")
    assert (np.abs(replayed - recomputed) > 1e-4).mean() > 0.01
    assert np.abs(replayed).max() < min(0.05, np.abs(recomputed).max())
    assert k3(replayed) < k3(recomputed)


def discrepancies(records: RunRecords, model: Path) -> tuple[F8, F8]:
    """Return log D of every token of the first versions, with recorded and with chosen experts."""
    pieces: defaultdict[int, list[tuple[Piece, F8]]] = defaultdict(list)
    for seq in records.terminals:
        outcome = records.terminal(seq).outcome
        if isinstance(outcome, Trajectory):
            for piece in pieces_of(outcome, kind="packed", temperature=1.0):
                sampler = outcome.sequences[piece.sequence].arrays["sampler_logprobs"].numpy()
                pieces[piece.version].append((piece, sampler[piece.positions]))
    backend = TorchBackend(torch.float32, trains=False)
    backend.load_hf(model)
    found: tuple[list[F8], list[F8]] = ([], [])
    for version in range(12):
        backend.load_state(load_file(version_path(records.archive, version)))
        own = [piece for piece, _ in pieces[version]]
        free = [replace(piece, records=()) for piece in own]
        for rows, asked in zip(found, (own, free), strict=True):
            for old, (_, sampler) in zip(
                score_pieces(backend, asked, "packed"), pieces[version], strict=True
            ):
                rows.append(old.astype(np.float64) - sampler)
    return np.concatenate(found[0]), np.concatenate(found[1])


def k3(log_d: F8) -> float:
    return float(np.mean(np.exp(log_d) - 1 - log_d))
