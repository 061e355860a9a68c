"""KL to a reference model, per token: estimators, clamps, off-policy weighting.

Shapes: T tokens. `l_T` = ℓ with gradient, `l_ref_T` = ℓ^ref. With x = ℓ^ref - ℓ and samples from
π_θ, each estimates KL(π_θ‖π_ref) (`offpolicy.md` 7; Schulman, joschu.net/blog/kl-approx.html):

    k1 = -x        k2 = ½x²        k3 = e^x - 1 - x        k3+ = value of k3, gradient of k2

On-policy the gradient of k2 is that of the KL; those of k1 (0 in expectation) and k3 are not
(verl's remark, whose "+" is the straight-through form; arXiv 2506.09477 derives it).
"""

from __future__ import annotations

import torch

from shared.algo.diagnostics import k1, k2, k3
from shared.algo.kl_spec import Estimator as Estimator
from shared.algo.kl_spec import KlSpec as KlSpec
from shared.algo.loss_terms import Terms
from shared.algo.ratios import log_ratio, ratio


def kl_terms(
    l_T: torch.Tensor,
    l_ref_T: torch.Tensor,
    *,
    estimator: Estimator = "k3",
    log_weight_T: torch.Tensor | None = None,
    value_clamp: float | None = 10.0,
    input_clamp: float | None = 20.0,
) -> Terms:
    """Return the estimate per token; the caller multiplies by its coefficient and aggregates.

    Args:
        l_T: ℓ.
        l_ref_T: ℓ^ref; detached here.
        estimator: of the table above.
        log_weight_T: log S or log ρ, with the gradient of ℓ: the estimate is multiplied by its
            exp, because the samples are not from π_θ. The gradient flows through the weight for
            k1 and k3, which makes it that of the KL (DeepSeek-V3.2; slime `--use-unbiased-kl`,
            TRL `use_bias_correction_kl`), and not for k2 and k3+, whose gradient is right
            without it.
        value_clamp: bound on the magnitude of the estimate, before the weight.
        input_clamp: bound on |x| inside k3.

    Returns:
        Terms; `cut` marks by `kl_clamped` where the value was clamped (for k3+ the gradient is
        k2's all the same).
    """
    log_T = log_ratio(l_ref_T.detach(), l_T)
    bounded_T = log_T if input_clamp is None else log_T.clamp(-input_clamp, input_clamp)
    raw_T = {"k1": k1(log_T), "k2": k2(log_T)}.get(estimator)
    raw_T = k3(bounded_T) if raw_T is None else raw_T
    value_T = raw_T if value_clamp is None else raw_T.clamp(-value_clamp, value_clamp)
    clamped_T = value_T.detach() != raw_T.detach()
    if bounded_T is not log_T and estimator in ("k3", "k3+"):
        clamped_T = clamped_T | (bounded_T.detach() != log_T.detach())
    if estimator == "k3+":
        gradient_T = k2(log_T)
        value_T = gradient_T - gradient_T.detach() + value_T.detach()
    if log_weight_T is not None:
        keep_gradient = estimator in ("k1", "k3")
        weight_T = ratio(log_weight_T if keep_gradient else log_weight_T.detach())
        value_T = weight_T * value_T
    return Terms(value_T, {"kl_clamped": clamped_T})
