"""Recorded experts on several ranks: scores and training against one expert after the other."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from comparing import MAX_ERROR, MAX_LOGPROB_ERROR, MAX_SHARE, differences, same
from models import LR, packs, plain_logprobs, train_plainly, write_model
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="needs the extra megatron")
CASES = {
    "fsdp2": ("torch_cases", 2, {}),
    "fsdp2_recomputed": ("torch_cases", 2, {"recompute": True}),
    "one": ("megatron_cases", 1, {"layout": {}}),
    "ep2": ("megatron_cases", 2, {"layout": {"ep": 2}}),
    "tp2_sp": ("megatron_cases", 2, {"layout": {"tp": 2, "sp": True}}),
    "pp2_recomputed": ("megatron_cases", 2, {"layout": {"pp": 2}, "recompute": True}),
}
LAYERS, SEEDS = 4, (0, 1, 2)
"""Two layers a stage: a stage that takes another's rows, or rows in another order, is seen."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[tuple[Path, int]]:
    folder = tmp_path_factory.mktemp("models")
    return [(write_model(folder / f"moe{s}", "qwen3_moe", s, layers=LAYERS), s) for s in SEEDS]


@pytest.fixture(scope="module")
def plainly(models) -> dict[Path, tuple[dict, dict]]:
    return {path: train_plainly(path, seed, routed=LAYERS) for path, seed in models}


@pytest.fixture(
    scope="module",
    params=[pytest.param(c, marks=megatron if "mega" in CASES[c][0] else ()) for c in CASES],
)
def trained(request, run_ranks, models) -> Path:
    module, ranks, arguments = CASES[request.param]
    runs = [(str(path), seed) for path, seed in models]
    case = f"{module}:parameters_after_steps"
    return run_ranks(case, ranks, runs=runs, routed=LAYERS, **arguments)


def test_parameters_after_three_steps_are_those_of_the_experts_taken(trained, models, plainly):
    assert LR >= 1e-3
    figures = {}
    for number, (path, _) in enumerate(models):
        before, want = plainly[path]
        got = load_file(trained / f"after{number}.safetensors")
        figures[path.name] = differences(before, want, got)
    print({name: f"{error:.1e} {share:.1e}" for name, (error, share) in figures.items()})
    assert max(error for error, _ in figures.values()) <= MAX_ERROR, figures
    assert max(share for _, share in figures.values()) <= MAX_SHARE, figures


def test_the_limits_tell_these_experts_from_the_routers_own(models, plainly):
    for path, seed in models:
        before, want = plainly[path]
        error, share = differences(before, want, train_plainly(path, seed)[1])
        assert error > 10 * MAX_ERROR
        assert share > 10 * MAX_SHARE


def test_scores_are_those_of_the_experts_taken_and_bit_equal_for_the_oracle(trained, models):
    for number, (path, seed) in enumerate(models):
        [batch] = packs(seed, 0, [[0, 1, 2, 3]], routed=LAYERS)
        got = load_file(trained / f"scores{number}.safetensors")["scores"]
        wanted = got != 0  # the torch backend computes what its mask asks for
        assert wanted.sum() > 40
        want = plain_logprobs(path, batch)
        assert (got - want)[wanted].abs().max() <= MAX_LOGPROB_ERROR
        own = plain_logprobs(path, packs(seed, 0, [[0, 1, 2, 3]])[0])
        assert (got - own)[wanted].abs().max() > 0.1
        after = load_file(trained / f"oracle{number}.safetensors")
        assert torch.equal(after["learner"], after["oracle"])


@megatron
def test_recomputed_layers_of_a_pipeline_train_to_the_same_bits(run_ranks, models):
    """Several micro-batches are under way at once, each with rows of its own."""
    path, seed = models[0]
    case, given = "megatron_cases:parameters_after_steps", {"runs": [(str(path), seed)]}
    given |= {"layout": {"pp": 2}, "routed": LAYERS}
    plain, recomputed = (run_ranks(case, 2, **given, recompute=r) for r in (False, True))
    name = "after0.safetensors"
    assert same(load_file(plain / name), load_file(recomputed / name))


@megatron
def test_rows_of_another_model_are_refused_by_every_rank(run_ranks, models):
    given = {"runs": [(str(models[0][0]), 0)], "layout": {"pp": 2}, "routed": LAYERS}
    out = run_ranks("megatron_cases:routing_refusal", 2, **given)
    assert "routing [32, 5, 2] is not" in (out / "refusal.txt").read_text()
