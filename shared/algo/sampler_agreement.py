"""Whether the sampler's log-probs are those of the distribution it sampled from. Pure.

An honest sampler may differ from the training side by rounding or quantisation, and D is then
noise. Two mistakes leave a pattern that noise cannot:

* **Another distribution was recorded** (raw log-probs of a processed distribution, a penalty or a
  truncation left out). For any normalised π and tokens drawn from μ, E[π/μ] = Σ π = 1, however far
  apart the two are. If μ' ≠ μ was recorded, the mean of D is Σ μπ/μ' instead: τ = 1 recorded for
  tokens drawn at τ gives 1 + χ²(μ‖μ').
* **Another temperature.** If the sides differ by a factor c = τ_sampler/τ_training, then
  log D = (c - 1)·ℓ^inf + a term that depends on the context only, to first order (c - 1)·H. In a
  regression of log D on ℓ^inf with explained share R², cov/var is (c - 1)·R², so that
  c - 1 = var(log D)/cov(log D, ℓ^inf). Noise of size σ explains about σ² only.

Shapes: N loss tokens before rejection. Detached, float64.
"""

from __future__ import annotations

import numpy as np
import torch

from shared.algo.ratios import SAFETY_BOUND

_FOLDS = 4
"""Every fold must show the pattern: one far token cannot make it in all of them."""


def sampler_agreement(log_d_N: torch.Tensor, l_inf_N: torch.Tensor) -> dict[str, float]:
    """Return what log D says about the sampler's log-probs; empty for no tokens.

    `tokens`; `abs_log_d`, the mean of |log D|; `mean_d` and `mean_d_error`, its standard error;
    `temperature_off`, c - 1 as above, the smallest of four folds of tokens (0 where they disagree
    about the sign), and `temperature_explained`, the smallest R² of the folds.
    """
    log_d = log_d_N.detach().double().cpu().numpy()
    inf = l_inf_N.detach().double().cpu().numpy()
    if log_d.size == 0:
        return {}
    d = np.exp(np.clip(log_d, -SAFETY_BOUND, SAFETY_BOUND))
    off, explained = _temperature(log_d, inf)
    return {
        "tokens": float(log_d.size),
        "abs_log_d": float(np.abs(log_d).mean()),
        "mean_d": float(d.mean()),
        "mean_d_error": float(d.std() / np.sqrt(d.size)),
        "temperature_off": off,
        "temperature_explained": explained,
    }


def _temperature(log_d: np.ndarray, inf: np.ndarray) -> tuple[float, float]:
    offs: list[float] = []
    explained = 1.0
    for fold in range(_FOLDS):
        y, x = log_d[fold::_FOLDS], inf[fold::_FOLDS]
        if y.size < 2:
            return 0.0, 0.0
        y, x = y - y.mean(), x - x.mean()
        spread, wide, common = float(y @ y), float(x @ x), float(x @ y)
        if not (spread > 0 and wide > 0 and common):
            return 0.0, 0.0
        explained = min(explained, common * common / (spread * wide))
        offs.append(spread / common)
    agree = len({value > 0 for value in offs}) == 1
    return (min(offs, key=abs) if agree else 0.0), explained
