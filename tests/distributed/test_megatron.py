"""The megatron backend on gloo ranks against plain Hugging Face training, per layout."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from comparing import MAX_ERROR, MAX_LOGPROB_ERROR, MAX_SHARE, differences, same
from models import LR, TEMPERATURE, packs, plain_logprobs, train_plainly, write_model
from safetensors.torch import load_file

from shared.backends.torch_backend import TorchBackend

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(400),
    pytest.mark.skipif(find_spec("megatron") is None, reason="needs the extra megatron"),
]

DENSE = ("qwen3", "qwen3_tied", "llama")
LAYOUTS = {
    "one": (1, {}, (*DENSE, "qwen3_moe")),
    "dp2": (2, {}, ("qwen3_tied", "llama")),
    "tp2": (2, {"tp": 2}, DENSE),
    "tp2_sp": (2, {"tp": 2, "sp": True}, DENSE),
    "pp2": (2, {"pp": 2}, DENSE),
    "pp2_dp2": (4, {"pp": 2}, ("qwen3_tied",)),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}, ("qwen3_tied",)),
    "ep2": (2, {"ep": 2}, ("qwen3_moe",)),
    "tp2_sp_experts": (2, {"tp": 2, "sp": True}, ("qwen3_moe",)),
    "tp2_sp_ep2": (2, {"tp": 2, "sp": True, "ep": 2}, ("qwen3_moe",)),
    "tp2_sp_ep2_dp2": (4, {"tp": 2, "sp": True, "ep": 2}, ("qwen3_moe",)),
    "tp2_sp_pp2_experts": (4, {"tp": 2, "sp": True, "pp": 2}, ("qwen3_moe",)),
}
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=LAYOUTS)
def trained(request, run_ranks, tmp_path_factory) -> tuple[Path, list[tuple[Path, int]]]:
    ranks, layout, kinds = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("models")
    runs = [(write_model(folder / f"{k}{s}", k, s), s) for k in kinds for s in SEEDS]
    out = run_ranks(
        "megatron_cases:parameters_after_steps",
        ranks,
        runs=[(str(path), seed) for path, seed in runs],
        layout=layout,
    )
    return out, runs


def test_parameters_after_three_steps_equal_plain_training(trained, record_property):
    out, runs = trained
    figures = {}
    assert LR >= 1e-3
    for number, (path, seed) in enumerate(runs):
        before, want = train_plainly(path, seed)
        figures[path.name] = differences(
            before, want, load_file(out / f"after{number}.safetensors")
        )
    print({name: f"{error:.1e} {share:.1e}" for name, (error, share) in figures.items()})
    assert max(error for error, _ in figures.values()) <= MAX_ERROR, figures
    assert max(share for _, share in figures.values()) <= MAX_SHARE, figures


def test_scores_agree_with_the_torch_backend(trained):
    out, runs = trained
    for number, (path, seed) in enumerate(runs):
        plain = TorchBackend()
        plain.load_hf(path)
        batch = packs(seed, 0, [[0, 1, 2, 3]])[0]
        del batch.per_token["loss_mask"]
        want = plain.score(batch, temperature=TEMPERATURE)
        got = load_file(out / f"scores{number}.safetensors")["scores"]
        assert (got - want).abs().max() <= 5e-5


def test_log_probs_of_the_mapping_are_those_of_transformers(trained):
    """On every layout: what cutting and joining adds stays within the mapping's own bound."""
    out, runs = trained
    errors = {}
    for number, (path, seed) in enumerate(runs):
        batch = packs(seed, 0, [[0, 1, 2, 3]])[0]
        got = load_file(out / f"scores{number}.safetensors")["scores"]
        errors[path.name] = float((got - plain_logprobs(path, batch)).abs().max())
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) <= MAX_LOGPROB_ERROR, errors


def test_learner_and_oracle_agree_bit_for_bit_in_one_layout(trained):
    out, runs = trained
    for number in range(len(runs)):
        scores = load_file(out / f"oracle{number}.safetensors")
        assert torch.equal(scores["learner"], scores["oracle"])


def test_an_export_is_the_loaded_directory_bit_for_bit(trained):
    out, runs = trained
    for number, (path, _) in enumerate(runs):
        exported = out / f"export{number}"
        assert same(
            load_file(exported / "model.safetensors"), load_file(path / "model.safetensors")
        )
        theirs, ours = (json.loads((p / "config.json").read_text()) for p in (path, exported))
        assert ours == theirs
        assert (exported / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("kind", "first", "then"),
    [
        ("qwen3_tied", (2, {"tp": 2}), (2, {"pp": 2})),
        ("qwen3_tied", (2, {"pp": 2}), (1, {})),
        ("qwen3_moe", (2, {"ep": 2}), (1, {})),
        ("qwen3_moe", (2, {"tp": 2, "sp": True}), (2, {"ep": 2})),
    ],
)
def test_a_checkpoint_goes_on_bit_for_bit_and_on_another_layout(
    run_ranks, tmp_path, kind: str, first, then
):
    path = write_model(tmp_path / "m", kind, 7)
    runs = [(str(path), 7)]
    out = run_ranks("megatron_cases:save_and_load", first[0], runs=runs, layout=first[1])
    straight = load_file(out / "straight.safetensors")
    assert same(straight, load_file(out / "resumed.safetensors"))
    elsewhere = run_ranks(
        "megatron_cases:continue_from",
        then[0],
        runs=runs,
        layout=then[1],
        checkpoint=str(out / "checkpoint"),
    )
    before, got = (
        load_file(p) for p in (path / "model.safetensors", elsewhere / "resumed.safetensors")
    )
    error, share = differences(before, straight, got)
    assert error <= MAX_ERROR
    assert share <= MAX_SHARE


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("qwen3", {"tp": 2}), ("qwen3_moe", {"tp": 2, "sp": True})],
)
def test_bfloat16_with_masters_trains_and_resumes(run_ranks, tmp_path, kind: str, layout: dict):
    path = write_model(tmp_path / "m", kind, 3)
    out = run_ranks(
        "megatron_cases:save_and_load",
        2,
        runs=[(str(path), 3)],
        layout=layout,
        dtype="bfloat16",
    )
    straight = load_file(out / "straight.safetensors")
    assert same(straight, load_file(out / "resumed.safetensors"))
    assert {tensor.dtype for tensor in straight.values()} == {torch.bfloat16}


def test_recomputed_layers_train_to_the_same_bits(run_ranks, tmp_path):
    path = write_model(tmp_path / "m", "qwen3", 4)
    runs, layout = [(str(path), 4)], {"tp": 2}
    case = "megatron_cases:parameters_after_steps"
    plain = run_ranks(case, 2, runs=runs, layout=layout)
    recomputed = run_ranks(case, 2, runs=runs, layout=layout, recompute=True)
    name = "after0.safetensors"
    assert same(load_file(plain / name), load_file(recomputed / name))


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ({"tp": 2}, "num_key_value_heads 1"),
        ({"pp": 2}, "num_hidden_layers 3"),
        ({"ep": 2}, "no experts"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_is_refused(
    run_ranks, tmp_path, layout: dict, names: str
):
    path = write_model(tmp_path / "m", "qwen3", 0, layers=3, kv_heads=1)
    out = run_ranks("megatron_cases:refusal", 2, runs=[(str(path), 0)], layout=layout)
    reason = (out / "refusal.txt").read_text()
    assert names in reason
    assert "\n" not in reason
