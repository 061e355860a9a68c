from __future__ import annotations

import numpy as np
import pytest
import torch

from services.rollout.sampling import check_sampling, draw, seed_bits, uniforms
from shared.wire.trajectory import SamplingParams


def u64(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_a_uniform_number_depends_on_its_seed_and_index_alone() -> None:
    together = uniforms(u64(1, 2, 3), u64(10, 20, 30))
    alone = [uniforms(u64(s), u64(i))[0] for s, i in ((1, 10), (2, 20), (3, 30))]
    assert together.tolist() == alone


def test_uniform_numbers_are_pinned() -> None:
    # Computed with Python's integers. A change here changes every sampled token: turns resumed
    # on another pod of a running fleet would diverge.
    numbers = uniforms(u64(0, 7, seed_bits(-1)), u64(0, 3, 2**40))
    assert numbers.tolist() == [0.28176129772258496, 0.30794958315676224, 0.9101868707046061]


def test_uniform_numbers_fill_the_interval_evenly_over_seeds_and_indices() -> None:
    index = np.arange(64, dtype=np.uint64)
    seeds = np.arange(1024, dtype=np.uint64)
    grid = uniforms(np.repeat(seeds, 64), np.tile(index, 1024))
    assert grid.min() >= 0
    assert grid.max() < 1
    counts = np.histogram(grid, bins=64, range=(0, 1))[0]
    chi2 = float(((counts - 1024) ** 2 / 1024).sum())
    assert 25 < chi2 < 120  # 63 degrees of freedom
    table = grid.reshape(1024, 64)
    assert abs(np.corrcoef(table[:-1].ravel(), table[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(table[:, :-1].ravel(), table[:, 1:].ravel())[0, 1]) < 0.02
    assert len(np.unique(grid)) == grid.size


def test_neighbouring_seeds_do_not_share_a_shifted_stream() -> None:
    index = np.arange(200, dtype=np.uint64)
    streams = [set(uniforms(np.full(200, s, np.uint64), index).tolist()) for s in range(50)]
    assert len(set.union(*streams)) == 50 * 200


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(1))
    num = 40_000
    numbers = uniforms(np.arange(num, dtype=np.uint64), np.zeros(num, np.uint64))
    tokens, logprobs = draw(logits.expand(num, 9), np.full(num, temperature), numbers)
    expected = torch.softmax(logits / temperature, -1).double().numpy()
    counts = np.bincount(tokens, minlength=9)
    chi2 = float(((counts - num * expected) ** 2 / (num * expected)).sum())
    assert chi2 < 26  # 8 degrees of freedom, p = 0.001
    assert np.allclose(logprobs, np.log(expected)[tokens], atol=1e-5)


def test_the_ends_of_the_interval_choose_the_first_and_last_possible_token() -> None:
    logits = torch.tensor([[float("-inf"), 1.0, 1.0, float("-inf")]] * 2)
    tokens, _ = draw(logits, np.ones(2), np.array([0.0, 1 - 2.0**-52]))
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_a_logprob_that_is_not(
    dtype: torch.dtype, bad: float
) -> None:
    logits = torch.tensor([[0.0, bad, 0.0], [0.0, 0.0, 0.0]], dtype=dtype)
    _, logprobs = draw(logits, np.ones(2), np.array([0.5, 0.5]))
    assert np.isfinite(logprobs).tolist() == [False, True]


def test_drawing_leaves_the_logits_as_they_are() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64)
    before = logits.clone()
    draw(logits, np.ones(4), np.full(4, 0.3))
    assert torch.equal(logits, before)


def test_truncated_sampling_is_refused() -> None:
    check_sampling(SamplingParams())
    for params in (SamplingParams(top_p=0.99), SamplingParams(top_k=1)):
        with pytest.raises(ValueError, match="keep-set"):
            check_sampling(params)
