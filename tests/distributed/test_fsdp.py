import json
from pathlib import Path

import pytest
import torch
from comparing import MAX_ERROR, MAX_SHARE, differences, same
from models import LR, MODELS, TEMPERATURE, packs, train_plainly, write_model
from safetensors.torch import load_file

from shared.backends.torch_backend import TorchBackend

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def trained(run_ranks, tmp_path_factory) -> tuple[Path, list[tuple[Path, int]]]:
    folder = tmp_path_factory.mktemp("models")
    runs = [(write_model(folder / f"{k}{s}", k, s), s) for k in MODELS for s in SEEDS]
    out = run_ranks("torch_cases:parameters_after_steps", 2, runs=[(str(p), s) for p, s in runs])
    return out, runs


def test_parameters_after_three_steps_equal_plain_training(trained):
    out, runs = trained
    figures = {}
    assert LR >= 1e-3
    for number, (path, seed) in enumerate(runs):
        before, want = train_plainly(path, seed)
        got = load_file(out / f"after{number}.safetensors")
        figures[path.name] = differences(before, want, got)
    print(json.dumps(figures, indent=1))
    assert max(error for error, _ in figures.values()) <= MAX_ERROR
    assert max(share for _, share in figures.values()) <= MAX_SHARE


def test_sharded_scores_are_those_of_one_process_bit_for_bit(trained):
    out, runs = trained
    for number, (path, seed) in enumerate(runs):
        plain = TorchBackend()
        plain.load_hf(path)
        want = plain.score(packs(seed, 0, [[0, 1, 2, 3]])[0], temperature=TEMPERATURE)
        assert torch.equal(load_file(out / f"scores{number}.safetensors")["scores"], want)


def test_learner_and_oracle_agree_bit_for_bit_in_one_layout(trained, run_ranks):
    """The oracle only scores; in bfloat16 it holds no float32 masters, which the learner casts."""
    out, runs = trained
    of_bfloat16 = [(str(path), seed) for path, seed in runs[:1]]
    narrow = run_ranks("torch_cases:parameters_after_steps", 2, runs=of_bfloat16, dtype="bfloat16")
    for out, number in [(out, n) for n in range(len(runs))] + [(narrow, 0)]:
        scores = load_file(out / f"oracle{number}.safetensors")
        assert scores["learner"].abs().max() > 1
        assert torch.equal(scores["learner"], scores["oracle"])


def test_an_export_is_the_loaded_directory_bit_for_bit(trained):
    out, runs = trained
    for number, (path, _) in enumerate(runs):
        exported = out / f"export{number}"
        assert same(
            load_file(exported / "model.safetensors"), load_file(path / "model.safetensors")
        )
        for name in ("tokenizer.json", "generation_config.json"):
            assert (exported / name).read_bytes() == (path / name).read_bytes()
        theirs, ours = (json.loads((p / "config.json").read_text()) for p in (path, exported))
        assert ours == theirs


def test_more_ranks_than_packs_and_recomputed_layers_change_nothing(run_ranks, tmp_path):
    path = write_model(tmp_path / "m", "qwen3", 5)
    out = run_ranks(
        "torch_cases:parameters_after_steps",
        2,
        runs=[(str(path), 5)],
        recompute=True,
        max_tokens=1000,
    )
    before, want = train_plainly(path, 5)
    error, share = differences(before, want, load_file(out / "after0.safetensors"))
    assert error <= MAX_ERROR
    assert share <= MAX_SHARE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_goes_on_bit_for_bit_and_on_one_rank(run_ranks, tmp_path, dtype: str):
    path = write_model(tmp_path / "m", "qwen3_tied", 7)
    runs = [(str(path), 7)]
    out = run_ranks("torch_cases:save_and_load", 2, runs=runs, dtype=dtype)
    straight = load_file(out / "straight.safetensors")
    assert same(straight, load_file(out / "resumed.safetensors"))
    alone = run_ranks(
        "torch_cases:continue_from",
        1,
        runs=runs,
        dtype=dtype,
        checkpoint=str(out / "checkpoint"),
    )
    before = load_file(path / "model.safetensors")
    error, share = differences(
        {n: t.to(getattr(torch, dtype)).float() for n, t in before.items()},
        {n: t.float() for n, t in straight.items()},
        {n: t.float() for n, t in load_file(alone / "resumed.safetensors").items()},
    )
    assert error <= (MAX_ERROR if dtype == "float32" else 0.01)
    assert share <= (MAX_SHARE if dtype == "float32" else 0.5)
