"""Every objective by its specification, on the same inputs.

A further objective is a function in one of the objective files, a class in `objective_specs`,
and a case here.
"""

from __future__ import annotations

from typing import assert_never

import torch

from shared.algo import divergence_objectives as divergence
from shared.algo import sequence_objectives as sequence
from shared.algo import staleness_objectives as staleness
from shared.algo.four_policy import four_policy, split_four
from shared.algo.loss_terms import Terms, Tokens
from shared.algo.objective_specs import (
    Cispo,
    DppoKl,
    DppoTv,
    FourPolicy,
    Gspo,
    GspoToken,
    Ipo,
    M2po,
    ObjectiveSpec,
    Opsm,
    Ppo,
    PrimeRlDefault,
    Reinforce,
    RolloutDoubleSided,
    Sapo,
    Topr,
    Vespo,
)
from shared.algo.ratios import ratio


def objective_terms(tokens: Tokens, spec: ObjectiveSpec) -> Terms:
    """Return the terms of an objective, times W where its ratio is anchored on ℓ^old.

    Raises:
        ValueError: the kind needs a score, or an anchor's log-probs, and there is none.
    """
    terms = _terms(tokens, spec)
    return terms.times(tokens.weight_T) if spec.uses_weight else terms


def _terms(tokens: Tokens, spec: ObjectiveSpec) -> Terms:
    l_T, adv_T, layout = tokens.l_T, tokens.adv_T, tokens.layout
    log_r_T = tokens.log_ratio(spec.ratio_anchor)
    match spec:
        case Ppo(low=low, high=high, dual=dual):
            return staleness.ppo(log_r_T, adv_T, clip_low=low, clip_high=high, dual=dual)
        case Gspo(low=low, high=high):
            return sequence.gspo(log_r_T, adv_T, layout, clip_low=low, clip_high=high)
        case GspoToken(low=low, high=high):
            return sequence.gspo_token(log_r_T, adv_T, layout, clip_low=low, clip_high=high)
        case Cispo(low=low, high=high):
            return staleness.cispo(l_T, log_r_T, adv_T, clip_low=low, clip_high=high)
        case Reinforce(cap=cap):
            return staleness.reinforce(l_T, log_r_T, adv_T, cap=cap)
        case Topr():
            return _topr(tokens, spec)
        case Sapo(tau_positive=up, tau_negative=down):
            return staleness.sapo(log_r_T, adv_T, tau_positive=up, tau_negative=down)
        case DppoTv(low=low, high=high, cap=cap):
            l_p_T = tokens.anchor_logprobs(spec.ratio_anchor)
            return divergence.dppo_tv(l_T, l_p_T, adv_T, low=low, high=high, cap=cap)
        case DppoKl(low=low, high=high, cap=cap):
            l_p_T = tokens.anchor_logprobs(spec.ratio_anchor)
            return divergence.dppo_kl(l_T, l_p_T, adv_T, low=low, high=high, cap=cap)
        case PrimeRlDefault(low=low, high=high, kappa=kappa):
            inf_T = tokens.l_inf_T
            return divergence.prime_rl_default(l_T, inf_T, adv_T, low=low, high=high, kappa=kappa)
        case Ipo(low=low, high=high, kappa=kappa):
            return divergence.ipo(l_T, tokens.l_inf_T, adv_T, low=low, high=high, kappa=kappa)
        case Vespo():
            return sequence.vespo(
                l_T,
                log_r_T,
                adv_T,
                layout,
                k_positive=spec.k_positive,
                lambda_positive=spec.lambda_positive,
                k_negative=spec.k_negative,
                lambda_negative=spec.lambda_negative,
            )
        case Opsm():
            return _opsm(tokens, spec)
        case M2po(threshold=threshold):
            return staleness.m2po(log_r_T, adv_T, layout.m_T, threshold=threshold)
        case RolloutDoubleSided(low=low, high=high):
            return staleness.double_sided(l_T, log_r_T, adv_T, low=low, high=high)
        case FourPolicy():
            return _four_policy(tokens, spec)
        case _:
            assert_never(spec)


def _topr(tokens: Tokens, spec: Topr) -> Terms:
    if tokens.score_T is None:
        raise ValueError("objective topr needs the raw reward of every token's trajectory")
    log_r_T = tokens.log_ratio(spec.ratio_anchor)
    if spec.level == "sequence":
        log_r_T = sequence.sequence_log_ratio(log_r_T, tokens.layout)
    return staleness.topr(tokens.l_T, log_r_T, tokens.adv_T, tokens.score_T)


def _four_policy(tokens: Tokens, spec: FourPolicy) -> Terms:
    if tokens.l_prox_T is None:
        raise ValueError("objective four_policy needs log-probs of an anchor: old_logprobs.anchor")
    ratios = split_four(
        tokens.l_T, tokens.l_prox_T, tokens.l_old_T, tokens.l_inf_T, tokens.layout.m_T
    )
    s1_T = ratio(ratios.log_s1_T)
    return four_policy(
        ratios,
        tokens.adv_T,
        w_T=torch.ones_like(s1_T),  # W of the corrections is multiplied by the caller
        u_T=s1_T if spec.anchor_cap is None else s1_T.clamp(max=spec.anchor_cap),
        clip_low=spec.low,
        clip_high=spec.high,
        dual=spec.dual,
        max_ratio=spec.max_ratio,
    )


def _opsm(tokens: Tokens, spec: Opsm) -> Terms:
    log_s_T, adv_T = tokens.log_ratio("old"), tokens.adv_T
    low, high, dual = spec.low, spec.high, spec.dual
    terms = staleness.ppo(log_s_T, adv_T, clip_low=low, clip_high=high, dual=dual)
    log_r_T = tokens.log_ratio(spec.reference)
    keep_T = sequence.opsm_keep(log_r_T, adv_T, tokens.layout, delta=spec.delta)
    return Terms(torch.where(keep_T, terms.loss_T, 0.0), {**terms.cut, "opsm": ~keep_T})
