"""What a step's numbers say is wrong with the objective or with the data. Pure.

Every guard has a bounded name, a verdict per step (None: this step cannot tell) and a state: raised
at the first bad verdict, lowered after `CLEAN_STEPS` good ones. Conditions, reasons and alerts are
the table of `docs/diagnostics.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from services.learner.config import LearnerConfig
from services.learner.guards import clips, corrects
from services.learner.trainer import StepOutcome
from shared.runtime.sections import EXACT_ROUTES

GUARDS: Mapping[str, str] = {
    "degenerate_objective": "S = 1 on tokens of older versions in the first minibatch: what stands "
    "for the old log-probs is the current policy; use an exact old_logprobs.route",
    "dead_mask": "D = 1 on every token: no correction on D can act; use an exact "
    "old_logprobs.route or learner.algo.corrections: []",
    "dead_clip": "S = 1 on tokens of older versions in every minibatch: the trust region cannot "
    "act; use learner.optimizer.minibatches: 2 or an exact old_logprobs.route",
    "sampler_mismatch": "the sampler's log-probs are not those of what it sampled, or belong to "
    "another temperature or model: compare its temperature and log-prob mode with sampling.*",
    "truncated_sampling": "tokens drawn with top_p or top_k and no recorded keep-set: their "
    "log-probs are of a renormalised distribution that the training side does not know; have the "
    "engine sample with top_p 1 and top_k 0",
    "mixed_kv": "tokens sampled over a KV cache of older weights under an exact route: they have "
    "no exact old log-prob; have the engine prefill again after a switch of weights",
    "fallback": "tokens whose version is gone are trained on current_recompute's numbers: keep "
    "versions longer (learner.checkpoint, admission.max_staleness)",
    "noise_floor": "at age 0, where S is 1 but for numerics, it takes more than a quarter of the "
    "clip: score in layout single, widen the clip, or use a higher model.dtype",
}
"""Name -> what it means and what to do."""

CLEAN_STEPS = 5
"""Good verdicts in a row that lower a raised guard: no flapping at a threshold."""

SAME_LOG = {"float64": 1e-10, "float32": 5e-5}
"""By dtype of the training forward: log-ratios closer to 0 than two layouts of the same weights
agree (docs/diagnostics.md). bfloat16 has no such number: there age 0 is the measure."""

MIN_TOKENS = 256
"""Fewer say nothing about the sampler."""
ABS_LOG_D = 0.25
TEMPERATURE_OFF = 0.05
TEMPERATURE_EXPLAINED = 0.25
MEAN_D_OFF = 0.1
MEAN_D_ERRORS = 5.0
CLIP_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What a step leaves for the guards."""

    version: int
    """Stepped from."""
    outcome: StepOutcome
    mixed_kv_tokens: int = 0
    """Among the sampled tokens of the batch."""
    truncated_sampling_tokens: int = 0
    """Likewise: drawn from a truncated distribution."""
    fallback_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GuardChange:
    """A guard was raised or lowered."""

    name: str
    raised: bool


@dataclass
class StepGuards:
    """The guards of one run."""

    config: LearnerConfig
    raised: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(GUARDS, False))
    bad_steps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GUARDS, 0))
    """Steps with a bad verdict since the process started."""
    _clean: dict[str, int] = field(default_factory=lambda: dict.fromkeys(GUARDS, 0))
    _left: int | None = None
    """Newest version that an optimizer step is known to have left."""

    def observe(self, facts: StepFacts) -> list[GuardChange]:
        """Judge one step; return the guards whose state it changed."""
        changes: list[GuardChange] = []
        for name, bad in self._verdicts(facts).items():
            if bad is None:
                continue
            self.bad_steps[name] += bad
            self._clean[name] = 0 if bad else self._clean[name] + 1
            raised = bad or (self.raised[name] and self._clean[name] < CLEAN_STEPS)
            if raised != self.raised[name]:
                self.raised[name] = raised
                changes.append(GuardChange(name, raised))
        outcome = facts.outcome
        if outcome.optimizer_steps > outcome.scalars.get("skipped_steps", 0.0):
            self._left = facts.version
        return changes

    def _verdicts(self, facts: StepFacts) -> dict[str, bool | None]:
        scalars, exact = facts.outcome.scalars, self.config.old_logprobs.route in EXACT_ROUTES
        unmoved = self._unmoved(facts)
        return {
            "degenerate_objective": unmoved,
            "dead_mask": self._dead_mask(scalars),
            "dead_clip": unmoved and self._stays(scalars),
            "sampler_mismatch": _mismatch(scalars, "sampler" if exact else "fresh"),
            "truncated_sampling": facts.truncated_sampling_tokens > 0,
            "mixed_kv": facts.mixed_kv_tokens > 0 if exact else None,
            "fallback": facts.fallback_tokens > 0 if exact else None,
            "noise_floor": self._noise(scalars),
        }

    def _unmoved(self, facts: StepFacts) -> bool | None:
        """Whether S is 1 on all tokens that an optimizer step lies behind."""
        if not clips(self.config) or self._left is None:
            return None
        arrays: Mapping[str, npt.NDArray[np.floating]] = facts.outcome.arrays
        if "age_s_abs_log_p99" not in arrays:
            return None
        same = self._same_log(facts.outcome.scalars)
        youngest = facts.version - self._left
        p99_A = arrays["age_s_abs_log_p99"][youngest:]
        aged_A = arrays["age_tokens"][youngest:] > 0
        if same is None or not aged_A.any():
            return None
        return bool((p99_A[aged_A] <= same).all())

    def _same_log(self, scalars: Mapping[str, float]) -> float | None:
        known = SAME_LOG.get(self.config.model.dtype)
        floor = scalars.get("noise_floor")
        return 2.0 * floor if known is None and floor is not None else known

    def _stays(self, scalars: Mapping[str, float]) -> bool:
        """Whether later minibatches move nothing either."""
        same = self._same_log(scalars) or 0.0
        return scalars.get("last_s_abs_log_max", 0.0) <= same

    def _dead_mask(self, scalars: Mapping[str, float]) -> bool | None:
        if not corrects(self.config) or "d_abs_log_max" not in scalars:
            return None
        return scalars["d_abs_log_max"] == 0.0

    def _noise(self, scalars: Mapping[str, float]) -> bool | None:
        """Whether noise at age 0 takes a quarter of the clip.

        An EWMA anchor is not the current policy at age 0 either: no floor can be read there.
        """
        objective = self.config.learner.algo.objective
        if "ewma" in self.config.old_logprobs.route or not clips(self.config):
            return None
        high = getattr(objective, "high", None)
        if high is None or "noise_floor" not in scalars:
            return None
        return scalars["noise_floor"] > CLIP_SHARE * math.log1p(high)


def _mismatch(scalars: Mapping[str, float], tokens: Literal["sampler", "fresh"]) -> bool | None:
    """Whether D is off where it measures engines only (`sampler_agreement`).

    With exact old log-probs that is everywhere; otherwise at age 0.
    """
    if scalars.get(f"{tokens}_tokens", 0.0) < MIN_TOKENS:
        return None
    temperature = (
        abs(scalars[f"{tokens}_temperature_off"]) > TEMPERATURE_OFF
        and scalars[f"{tokens}_temperature_explained"] > TEMPERATURE_EXPLAINED
    )
    bias = abs(scalars[f"{tokens}_mean_d"] - 1.0)
    unnormalised = bias > max(MEAN_D_OFF, MEAN_D_ERRORS * scalars[f"{tokens}_mean_d_error"])
    return temperature or unnormalised or scalars[f"{tokens}_abs_log_d"] > ABS_LOG_D
