"""Drawing tokens: a counter-based uniform number, then the inverse of the distribution function.

Shapes: X rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from shared.wire.trajectory import SamplingParams

# 2^64 / golden ratio, and the multipliers of splitmix64 (Steele et al., OOPSLA 2014).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_27, _30, _31 = np.uint64(27), np.uint64(30), np.uint64(31)
_SPARE_BITS = np.uint64(12)
_SEED_MASK = (1 << 64) - 1


def check_sampling(sampling: SamplingParams) -> None:
    """Refuse what an engine without recorded keep-sets cannot honour.

    Raises:
        ValueError: truncated sampling.
    """
    if sampling.top_p < 1 or sampling.top_k:
        raise ValueError(
            f"truncated sampling (top_p {sampling.top_p:g}, top_k {sampling.top_k}) needs a "
            "recorded keep-set: use top_p 1 and top_k 0"
        )


def seed_bits(seed: int) -> int:
    """Return the 64 bits of a seed, negative ones included."""
    return seed & _SEED_MASK


def draw_bits(
    seeds_X: npt.NDArray[np.uint64], indices_X: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Return the 64 random bits that (seed, token index) stands for.

    Stateless: they depend on neither the batch nor on what was drawn before. Seeds are mixed
    before the index is added, so that the streams of neighbouring seeds do not overlap.
    """
    return _mixed(_mixed(seeds_X * _GOLDEN + _GOLDEN) + indices_X * _GOLDEN)


def uniforms(
    seeds_X: npt.NDArray[np.uint64], indices_X: npt.NDArray[np.uint64]
) -> npt.NDArray[np.float64]:
    """Return the number in [0, 1) that (seed, token index) stands for (`draw_bits`)."""
    bits = draw_bits(seeds_X, indices_X)
    # 52 bits: the product with a total near one then never rounds up to the total.
    return (bits >> _SPARE_BITS).astype(np.float64) * 2.0**-52


def draw(
    logits_XV: torch.Tensor,
    temperatures_X: npt.NDArray[np.float64],
    uniforms_X: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Sample one token per row; return (token_ids_X, logprobs_X).

    The log-probs are those of the distribution sampled from, temperature included; a row whose
    logits are not finite gets a log-prob that is not finite.
    """
    temperatures = torch.from_numpy(temperatures_X).to(logits_XV.dtype)[:, None]
    logprobs_XV = torch.log_softmax(logits_XV / temperatures, -1)
    cumulated_XV = logprobs_XV.double().exp().cumsum_(-1)
    targets_X1 = torch.from_numpy(uniforms_X)[:, None] * cumulated_XV[:, -1:]
    # The first token whose cumulated probability exceeds the target; never one of probability 0.
    chosen_X1 = (cumulated_XV <= targets_X1).sum(-1, keepdim=True)
    logprobs_X = logprobs_XV.gather(-1, chosen_X1).squeeze(-1)
    return chosen_X1.squeeze(-1).numpy(), logprobs_X.double().numpy()


def _mixed(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return the splitmix64 finaliser of each element."""
    bits = (bits ^ (bits >> _30)) * _MIX_1
    bits = (bits ^ (bits >> _27)) * _MIX_2
    return bits ^ (bits >> _31)
