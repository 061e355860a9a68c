"""The loss benchmark: what it times is the learner's step, and what it refuses to judge."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.learner.trainer import Trainer
from shared.algo.policy_loss import PolicyLoss
from shared.backends.torch_backend import TorchBackend
from shared.cli import bench_loss
from shared.cli.bench_loss import (
    CASES,
    LIMIT,
    MIN_PARAMETERS,
    MIN_TOKENS,
    SMALL,
    VERSION,
    Size,
    TimedBackend,
    config_of,
    make_batch,
    measure,
    write_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_model(SMALL, path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_the_timed_step_is_the_learners(model: Path, case: str) -> None:
    section = config_of(case, lr=1e-2).learner
    states: list[dict[str, torch.Tensor]] = []
    losses: list[float] = []
    for kind in (TorchBackend, TimedBackend):
        backend = kind()
        backend.load_hf(model)
        items = make_batch(SMALL, backend)
        start = {name: tensor.clone() for name, tensor in backend.state().items()}
        outcome = Trainer(backend, section, temperature=1.0, num_ages=8).step(
            items, version=VERSION, seed=0
        )
        states.append({name: tensor.clone() for name, tensor in backend.state().items()})
        losses.append(outcome.scalars["loss"])
    assert losses[0] == losses[1]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-5)
    assert max(float((states[0][n] - start[n]).abs().max()) for n in start) > 5e-3


def test_time_spent_in_the_loss_is_seen(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = measure("default", SMALL, model, 1)
    compute = PolicyLoss.compute

    def slow(*args: Any, **options: Any) -> Any:
        until = time.process_time() + 0.2
        while time.process_time() < until:
            pass
        return compute(*args, **options)

    monkeypatch.setattr(PolicyLoss, "compute", slow)
    slowed = measure("default", SMALL, model, 1)
    assert slowed["loss_s"] > plain["loss_s"] + 0.19
    assert slowed["loss_share"] > 0.8
    assert slowed["step_s"] - slowed["loss_s"] < 0.19


def test_a_share_above_the_limit_fails_and_a_small_size_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "loss.json"
    assert bench_loss.main(["--small", "--repetitions", "1", "--out", str(out)]) == 0
    assert "not judged" in capsys.readouterr().out
    rows = json.loads(out.read_text())
    assert [row["case"] for row in rows] == list(CASES)
    for share, code in ((LIMIT, 0), (LIMIT + 0.001, 1)):
        row = rows[0] | {"loss_share": share, "parameters": MIN_PARAMETERS, "tokens": MIN_TOKENS}
        monkeypatch.setattr(bench_loss, "measure", lambda *_, row=row: row)
        assert bench_loss.main(["--small", "--out", str(out)]) == code


def test_the_default_size_counts() -> None:
    size = Size()
    assert size.sequences * size.turns * size.turn_tokens >= MIN_TOKENS
    assert replace(size) == Size(hidden=384, layers=8, vocab=8192)
