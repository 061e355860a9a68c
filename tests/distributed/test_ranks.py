"""Backends led by rank 0 over gloo ranks, as learner and oracle use them, against one process."""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import led_cases
import pytest
import torch
from comparing import MAX_ERROR, MAX_SHARE, differences, same
from models import TEMPERATURE, packs, write_model
from safetensors.torch import load_file

from shared.backends.torch_backend import TorchBackend
from shared.runtime.nats_server import free_port

HERE = Path(__file__).parent
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="needs the extra megatron")
LAYOUTS = [
    pytest.param("torch", 2, {}, id="fsdp2"),
    pytest.param("torch", 3, {}, id="fsdp2-3"),
    pytest.param("megatron", 2, {"tp": 2}, id="tp2", marks=megatron),
    pytest.param("megatron", 2, {"pp": 2}, id="pp2", marks=megatron),
    pytest.param("megatron", 4, {"tp": 2}, id="tp2-dp2", marks=megatron),
]


def _lived(run_ranks, path: Path, kind: str, ranks: int, layout: dict, **more: Any) -> Path:
    return run_ranks(
        "led_cases:services_life",
        ranks,
        worker="rank_worker.py",
        model=str(path),
        kind=kind,
        layout=layout,
        **more,
    )


class LaidOut(TorchBackend):
    """One process that lays its micro-batches out as for several and trains all of them."""

    shares = 1

    @property
    def data_ranks(self) -> int:
        return self.shares


def _alone(path: Path, shares: int, **arguments: Any) -> tuple[TorchBackend, list[Any], Any]:
    backend = LaidOut()
    backend.shares = shares
    backend.load_hf(path)
    before = {name: t.clone() for name, t in backend.state().items()}
    outcomes = led_cases.train(backend, arguments, range(2))
    return backend, outcomes, before


def _close(got: Any, want: Any, where: str) -> None:
    """Reports agree to what fp32 leaves of a forward in another layout."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), where
        for key in want:
            _close(got[key], want[key], f"{where}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), where
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            _close(a, b, f"{where}[{index}]")
    elif isinstance(want, float) and not math.isnan(want):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-5), where
    else:
        assert got == want or (math.isnan(got) and math.isnan(want)), where


def _check(out: Path, path: Path, shares: int, **arguments: Any) -> None:
    backend, outcomes, before = _alone(path, shares, **arguments)
    error, share = differences(before, dict(backend.state()), load_file(out / "after2.safetensors"))
    print(f"parameters after 4 steps: {error:.1e}, {share:.1e} of the steps' size")
    assert error <= MAX_ERROR
    assert share <= MAX_SHARE
    led_cases.write_outcomes(out, "alone.json", outcomes)
    got, want = (json.loads((out / n).read_text()) for n in ("outcomes.json", "alone.json"))
    for step in (*got, *want):
        del step["scalars"]["compute_s"]
    _close(got, want, "report")
    assert [step["failure"] for step in got] == ["", ""]


@pytest.mark.parametrize(("kind", "ranks", "layout"), LAYOUTS)
def test_a_led_learner_trains_reports_and_resumes_as_one_process_does(
    run_ranks, tmp_path, kind: str, ranks: int, layout: dict
):
    path = write_model(tmp_path / "m", "qwen3_tied", 3)
    out = _lived(run_ranks, path, kind, ranks, layout)
    _check(out, path, ranks // (layout.get("tp", 1) * layout.get("pp", 1)))
    assert same(load_file(out / "after3.safetensors"), load_file(out / "resumed3.safetensors"))
    scores = load_file(out / "scores.safetensors")
    assert torch.equal(scores["trained"], scores["scorer"])
    plain = TorchBackend()
    plain.load_hf(path)
    want = plain.score(packs(0, 0, [[0, 1, 2, 3]])[0], temperature=TEMPERATURE)
    assert (scores["before"] - want).abs().max() <= 5e-5
    assert same(
        load_file(out / "export" / "model.safetensors"), load_file(path / "model.safetensors")
    )


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param("torch", {}, id="fsdp2"),
        pytest.param("megatron", {"ep": 2}, id="ep2", marks=megatron),
        pytest.param("megatron", {"tp": 2, "sp": True, "ep": 2}, id="tp2-ep2", marks=megatron),
    ],
)
def test_a_led_learner_replays_recorded_experts_as_one_process_does(
    run_ranks, tmp_path, kind: str, layout: dict
):
    path = write_model(tmp_path / "m", "qwen3_moe", 3)
    out = _lived(run_ranks, path, kind, 2, layout, routed=2)
    _check(out, path, 2 // layout.get("tp", 1), routed=2)
    scores = load_file(out / "scores.safetensors")
    assert torch.equal(scores["trained"], scores["scorer"])
    plain = TorchBackend()
    plain.load_hf(path)
    [pack] = packs(0, 0, [[0, 1, 2, 3]], routed=2)
    want = plain.score(pack, temperature=TEMPERATURE)
    assert (scores["before"] - want).abs().max() <= 5e-5
    own = plain.score(packs(0, 0, [[0, 1, 2, 3]])[0], temperature=TEMPERATURE)
    assert (scores["before"] - own).abs().max() > 0.1


def test_a_rank_without_sequences_of_its_own_takes_part_and_adds_nothing(run_ranks, tmp_path):
    path = write_model(tmp_path / "m", "qwen3", 4)
    given = {"lengths": [29], "minibatches": 1}
    _check(_lived(run_ranks, path, "torch", 2, {}, **given), path, 2, **given)


def test_a_loss_without_gradient_on_one_rank_leaves_the_others_theirs(run_ranks, tmp_path):
    path = write_model(tmp_path / "m", "qwen3", 4)
    out = run_ranks(
        "led_cases:constant_loss", 2, worker="rank_worker.py", model=str(path), timeout_s=20
    )
    alone = TorchBackend()
    alone.load_hf(path)
    [pack] = packs(0, 0, [[0, 2]])
    loss = led_cases.MaskedAway()
    alone.forward_backward(pack, loss, temperature=TEMPERATURE, with_entropy=False)
    norm = json.loads((out / "norm.json").read_text())
    assert norm == pytest.approx(alone.step(1e-3, max_grad_norm=1.0), rel=1e-5)


def test_nodes_of_a_group_started_as_the_chart_does_make_one_job(tmp_path):
    """Two launchers of one rank each, on this machine; rank 0 listens for other machines then."""
    path, port = write_model(tmp_path / "m", "qwen3", 6), free_port()
    (tmp_path / "arguments.json").write_text(json.dumps({"model": str(path), "out": str(tmp_path)}))
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "shared.cli.torchrun", "--nnodes=2", f"--node-rank={node}",
             "--master-addr=127.0.0.1", f"--master-port={port}", "--nproc-per-node=1",
             "--max-restarts=0", str(HERE / "rank_worker.py"), "led_cases:services_life",
             str(tmp_path / "arguments.json")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])},
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        assert [node.wait(timeout=200) for node in nodes] == [0, 0]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    _check(tmp_path, path, 2)


def test_what_every_rank_refuses_leaves_the_backend_as_it_was(run_ranks, tmp_path):
    path = write_model(tmp_path / "m", "qwen3", 5)
    out = run_ranks("led_cases:refusals", 2, worker="rank_worker.py", model=str(path))
    absent, state, checkpoint, reason = json.loads((out / "said.json").read_text())
    assert "absent" in absent
    assert "load_state" in state
    assert "absent" in checkpoint
    assert reason == ""
    assert same(load_file(out / "after.safetensors"), load_file(path / "model.safetensors"))
