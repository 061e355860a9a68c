"""What a configuration can never do although it says so. Pure, and without torch but for proxies.

A part of the objective that can never act is refused at start with key, reason and fix; baselines
that want exactly that name it in `learner.allow_degenerate`, and it becomes a warning. What only
the data show is `step_guards.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from shared.algo.correction_list import WEIGHTS
from shared.algo.correction_specs import (
    CorrectionSpec,
    IcePop,
    Importance,
    TokenMask,
    Unit,
    kind_of,
)
from shared.algo.objective_specs import Opsm, Ppo

if TYPE_CHECKING:
    from services.learner.config import LearnerConfig

_PROXY_ROUTES = {"interp_prox_loglinear": "loglinear", "interp_prox_linear": "linear"}
_CORRECTIONS, _ROUTE = "learner.algo.corrections", "old_logprobs.route"


class Objection(NamedTuple):
    """One thing that cannot work as configured."""

    key: str
    reason: str
    fix: str
    name: str
    """Of the guard, as in `learner.allow_degenerate`; "" where nothing is refused."""

    @property
    def line(self) -> str:
        override = f", or learner.allow_degenerate: [{self.name}]" if self.name else ""
        return f"{self.key}: {self.reason}; {self.fix}{override}"


def objections(config: LearnerConfig) -> list[Objection]:
    """Return everything that is dead, degenerate or misleading, the refusable first."""
    return [*_refusable(config), *_misleading(config)]


def refused(config: LearnerConfig) -> list[Objection]:
    """Return the objections that no `learner.allow_degenerate` overrides."""
    allowed = config.learner.allow_degenerate
    return [one for one in _refusable(config) if one.name not in allowed]


def corrects(config: LearnerConfig) -> list[CorrectionSpec]:
    """Return the corrections that do anything to a token with D other than 1."""
    specs = config.learner.algo.corrections
    return [spec for spec in specs if not isinstance(spec, Importance | Unit)]


def clips(config: LearnerConfig) -> bool:
    """Return whether the objective's trust region acts on S."""
    return config.learner.algo.objective.ratio_anchor == "old"


# --- refused
def _refusable(config: LearnerConfig) -> Iterator[Objection]:
    if (why := _discrepancy_is_one(config)) and (dead := corrects(config)):
        names = ", ".join(dict.fromkeys(kind_of(spec) for spec in dead))
        yield Objection(
            _CORRECTIONS,
            f"{why}, so that {names} can never act",
            f"use {_CORRECTIONS}: [] or an exact {_ROUTE}",
            "dead_mask",
        )
    if not clips(config) or not (why := _staleness_is_one(config)):
        return
    kind = config.learner.algo.objective.kind
    yield Objection(
        "learner.optimizer.minibatches",
        f"{why} and one minibatch per version make S = 1 at every age, so that the trust region "
        f"of {kind} can never act",
        f"use minibatches: 2 or more, or an exact {_ROUTE}",
        "dead_clip",
    )
    if not any(_bounds(spec) for spec in config.learner.algo.corrections):
        yield Objection(
            _ROUTE,
            f"{why}: S = 1 and no correction bounds D, so that nothing limits what stale tokens do",
            f"use an exact {_ROUTE}, or list a mask or truncation in {_CORRECTIONS}",
            "degenerate_objective",
        )


def _discrepancy_is_one(config: LearnerConfig) -> str:
    """Return why D is 1 on every token, empty where it is not."""
    route, oldest = config.old_logprobs.route, config.admission.max_staleness
    if route == "rollout":
        return f"{_ROUTE} rollout makes D = 1"
    if route in _PROXY_ROUTES and oldest <= 1:
        return (
            f"{_ROUTE} {route} is the sampler itself up to age 1 (admission.max_staleness "
            f"{oldest}) and makes D = 1"
        )
    return ""


def _staleness_is_one(config: LearnerConfig) -> str:
    """Return why S is 1 on tokens of any age, empty where it is not.

    Without staleness it is 1 on every route, and nothing is wrong with that.
    """
    oldest = config.admission.max_staleness
    if config.learner.optimizer.minibatches > 1 or oldest == 0:
        return ""
    route, ewma = config.old_logprobs.route, config.old_logprobs.ewma
    if route == "current_recompute":
        return f"{_ROUTE} current_recompute"
    if route in ("ewma_prox", "ppo_ewma_async") and ewma is not None:
        if ewma.decay == "fixed" and ewma.beta == 0:
            return f"{_ROUTE} {route} with old_logprobs.ewma.beta 0"
        if ewma.auto_reset and ewma.fresh_below > oldest:
            return (
                f"{_ROUTE} {route} with old_logprobs.ewma.fresh_below {ewma.fresh_below:g} above "
                f"admission.max_staleness {oldest} (reset at every step)"
            )
    return ""


def _bounds(spec: CorrectionSpec) -> bool:
    """Return whether a correction bounds what a token with a large D weighs."""
    return not isinstance(spec, Importance | Unit) and kind_of(spec) != "self_normalise"


# --- warned about
def _misleading(config: LearnerConfig) -> Iterator[Objection]:
    route, algo = config.old_logprobs.route, config.learner.algo
    stale = config.admission.max_staleness > 0
    masks = [s for s in algo.corrections if _bounds(s) and not isinstance(s, WEIGHTS)]
    if route == "current_recompute" and stale and masks:
        names = ", ".join(dict.fromkeys(kind_of(spec) for spec in masks))
        yield Objection(
            _ROUTE,
            f"under current_recompute D carries the staleness too: {names} will reject old tokens "
            "as if they were off the sampler's",
            f"use an exact {_ROUTE}, or read it as a baseline",
            "",
        )
    if route not in ("rollout", *_PROXY_ROUTES) and not clips(config) and not corrects(config):
        yield Objection(
            _ROUTE,
            f"objective {algo.objective.kind} compares with the sampler and no correction reads D: "
            f"the old log-probs of {route} are computed and not used",
            f"use {_ROUTE}: rollout",
            "",
        )
    if route in _PROXY_ROUTES and config.admission.max_staleness > 1:
        yield from _never_binding(config, route)


def _never_binding(config: LearnerConfig, route: str) -> Iterator[Objection]:
    """Thresholds of clip and mask that the other one makes dead at every age (5.3)."""
    from shared.algo.proximal import reparameterised  # torch: only where a proxy is configured

    objective = config.learner.algo.objective
    mask = next((s for s in corrects(config) if isinstance(s, IcePop | TokenMask)), None)
    if mask is None or not isinstance(objective, Ppo | Opsm):
        return
    ages = range(1, config.admission.max_staleness + 1)
    dead = [
        set(
            reparameterised(
                "loglinear" if route == "interp_prox_loglinear" else "linear",
                (age - 1) / age,
                clip_low=objective.low,
                clip_high=objective.high,
                mask_low=mask.low,
                mask_high=mask.high,
            ).dead
        )
        for age in ages
    ]
    if names := sorted(set[str].intersection(*dead)):
        yield Objection(
            _CORRECTIONS if names[0].startswith("mask") else "learner.algo.objective",
            f"under {route} clip and mask bound the same ratio, and {', '.join(names)} never "
            f"binds at ages 1 to {ages[-1]}",
            "narrow the dead side, or use an exact old_logprobs.route",
            "",
        )
