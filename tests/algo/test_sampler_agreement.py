"""Which mistakes about the sampler's log-probs leave a pattern, and which noise does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.algo.sampler_agreement import sampler_agreement

VOCAB, TOKENS = 50, 4000


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def drawn(
    *, sampled_at: float = 1.0, recorded_at: float | None = None, trained_at: float | None = None,
    noise: float = 0.0, seed: int = 0,
) -> dict[str, float]:  # fmt: skip
    """Tokens drawn from contexts of varied entropy, and what is said of them."""
    rng = np.random.default_rng(seed)
    recorded_at = sampled_at if recorded_at is None else recorded_at
    trained_at = sampled_at if trained_at is None else trained_at
    logits = rng.normal(size=(TOKENS, VOCAB)) * rng.uniform(0.3, 5.0, size=(TOKENS, 1))
    theirs = logits + noise * rng.normal(size=logits.shape)
    mu = log_softmax(theirs / sampled_at)
    tokens = (mu + rng.gumbel(size=mu.shape)).argmax(1)
    at = (np.arange(TOKENS), tokens)
    inf = log_softmax(theirs / recorded_at)[at]
    log_d = log_softmax(logits / trained_at)[at] - inf
    return sampler_agreement(torch.from_numpy(log_d), torch.from_numpy(inf))


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3])
def test_noise_of_any_size_keeps_the_mean_of_d_at_one_and_explains_nothing(noise: float):
    said = drawn(noise=noise)
    assert abs(said["mean_d"] - 1.0) < 5.0 * said["mean_d_error"]
    assert said["temperature_explained"] < 0.25


@pytest.mark.parametrize(("sampled_at", "trained_at"), [(1.0, 0.8), (0.8, 1.0), (1.0, 1.3)])
def test_another_temperature_is_found_with_its_size(sampled_at: float, trained_at: float):
    said = drawn(sampled_at=sampled_at, trained_at=trained_at, noise=0.02)
    assert said["temperature_explained"] > 0.25
    assert said["temperature_off"] == pytest.approx(sampled_at / trained_at - 1.0, abs=0.08)
    assert abs(said["mean_d"] - 1.0) < 0.1  # both sides are normalised: the mean cannot tell


def test_raw_logprobs_of_a_processed_distribution_move_the_mean_of_d():
    said = drawn(sampled_at=0.6, recorded_at=1.0)
    assert said["mean_d"] > 1.1
    assert said["mean_d"] - 1.0 > 5.0 * said["mean_d_error"]


def test_one_far_token_is_no_temperature():
    log_d, inf = torch.zeros(400).double(), -torch.rand(400).double()
    log_d[7], inf[7] = -3.0, -12.0
    assert sampler_agreement(log_d, inf)["temperature_explained"] == 0.0


def test_equal_logprobs_and_no_tokens():
    inf = -torch.rand(8).double()
    said = sampler_agreement(torch.zeros(8).double(), inf)
    assert said["mean_d"] == 1.0
    assert said["abs_log_d"] == said["temperature_off"] == said["temperature_explained"] == 0.0
    assert sampler_agreement(torch.zeros(0), torch.zeros(0)) == {}
