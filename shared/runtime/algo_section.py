"""The `algo` section of the learner's configuration. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.algo.objective import DISCREPANCY_BOUNDS, Objective
from shared.runtime.sections import Section


class DiscrepancySection(Section):
    """Correction on D = exp(old - sampler log-prob), the same version in two engines."""

    kind: Literal["icepop", "tis", "mask", "none"] = "icepop"
    low: float | None = None
    """None: the kind's default (icepop 0.5, mask 0.5, tis 0)."""
    high: float | None = None
    """None: the kind's default (icepop 5, mask 2, tis 2)."""

    def bounds(self) -> tuple[float, float]:
        """Return (low, high) with the kind's defaults filled in.

        Raises:
            ValueError: bounds for a kind that has none.
        """
        default = DISCREPANCY_BOUNDS[self.kind]
        if default is None:
            if self.low is not None or self.high is not None:
                raise ValueError(
                    f"discrepancy: kind {self.kind} takes no bounds; remove low and high"
                )
            return 0.0, float("inf")
        low, high = default
        return (low if self.low is None else self.low, high if self.high is None else self.high)


class ClipSection(Section):
    """Trust region on S = exp(current - old log-prob), two versions in the same engine."""

    low: float = 0.2
    high: float = 0.28
    dual: float | None = 3.0


class AlgoSection(Section):
    """Advantage, corrections, clip and aggregation (docs/algorithms.md)."""

    advantage: Literal["dr_grpo", "grpo", "rloo"] = "dr_grpo"
    discrepancy: DiscrepancySection = DiscrepancySection()
    veto: float | None = 1e-4
    """Drop a trajectory with a loss token of D below; null: off."""
    clip: ClipSection = ClipSection()
    entropy_bonus: float = 0.0
    aggregation: Literal[
        "token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum_constant",
        "seq_mean_constant",
    ] = "token_mean"  # fmt: skip
    """Denominators are global counts before rejection."""
    horizon: float | None = None
    """The constant of the two `*_constant` aggregations, in tokens."""
    kl_coef: float = Field(default=0.0)
    """Reserved for KL to a reference model."""

    @model_validator(mode="after")
    def _not_degenerate(self) -> Self:
        if self.kl_coef != 0:
            raise ValueError("kl_coef: no reference model is served yet; set kl_coef: 0.0")
        self.objective()
        return self

    def objective(self) -> Objective:
        """Return the settings of `shared.algo.policy_loss.PolicyLoss`.

        Raises:
            ValueError: degenerate settings, naming the key and the fix; validation has already
                turned these into a ConfigError.
        """
        low, high = self.discrepancy.bounds()
        return Objective(
            discrepancy=self.discrepancy.kind,
            discrepancy_low=low,
            discrepancy_high=high,
            veto=self.veto,
            clip_low=self.clip.low,
            clip_high=self.clip.high,
            dual=self.clip.dual,
            entropy_bonus=self.entropy_bonus,
            aggregation=self.aggregation,
            horizon=self.horizon,
        )
