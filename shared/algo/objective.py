"""Settings of the training objective, with every degenerate combination refused. No torch.

Defaults: `offpolicy.md` 11.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.algo.correction_list import DEFAULT_CORRECTIONS, check, weight_of
from shared.algo.correction_specs import CorrectionSpec, SelfNormalise, Unit
from shared.algo.kl_spec import KlSpec
from shared.algo.objective_specs import ObjectiveSpec, Ppo

AGGREGATION_MODES = (
    "token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_mean",
    "token_sum_constant",
    "seq_mean_constant",
)
"""`losses.AGGREGATIONS` holds the functions."""

HORIZON_MODES = frozenset({"token_sum_constant", "seq_mean_constant"})
"""Aggregations that divide by the constant L."""


@dataclass(frozen=True)
class Objective:
    """What `policy_loss` optimises.

    Raises:
        ValueError: at construction, naming the key (as below `algo.`) and what to do.
    """

    corrections: tuple[CorrectionSpec, ...] = DEFAULT_CORRECTIONS
    """On D: `correction_specs`."""
    objective: ObjectiveSpec = field(default_factory=Ppo)
    """On S, or on ρ: `objective_specs`."""
    kl: KlSpec = field(default_factory=KlSpec)
    entropy_bonus: float = 0.0
    aggregation: str = "token_mean"
    horizon: float | None = None
    """L of the constant-denominator aggregations."""

    def __post_init__(self) -> None:
        check(self.corrections)
        self._check_weights()
        if self.aggregation not in AGGREGATION_MODES:
            raise ValueError(
                f"aggregation: {self.aggregation!r} is none of {', '.join(AGGREGATION_MODES)}"
            )
        if (self.aggregation in HORIZON_MODES) != (self.horizon is not None):
            raise ValueError(
                f"horizon: set it with aggregation {' or '.join(sorted(HORIZON_MODES))}, and "
                f"only then (aggregation is {self.aggregation})"
            )
        if self.horizon is not None and not self.horizon > 0:
            raise ValueError(f"horizon: {self.horizon} is not positive; use the token limit")
        if not self.entropy_bonus >= 0:
            raise ValueError(
                f"entropy_bonus: {self.entropy_bonus} rewards certainty; use 0 or a small "
                "positive number such as 0.005"
            )

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """(low, high) of the region around S = 1 that diagnostics call inside the clip."""
        low, high = getattr(self.objective, "low", 0.2), getattr(self.objective, "high", 0.28)
        return float(low), float(high)

    def _check_weights(self) -> None:
        """Refuse weights on D under an objective whose ratio contains D already."""
        if self.objective.uses_weight:
            return
        kind = self.objective.kind
        weight = weight_of(self.corrections)
        if weight in self.corrections and not isinstance(weight, Unit):
            raise ValueError(
                f"corrections: {weight.kind} has no effect, the ratio of objective {kind} is "
                "that to the sampler and contains D; remove it"
            )
        if any(isinstance(spec, SelfNormalise) for spec in self.corrections):
            raise ValueError(
                f"corrections: self_normalise has no effect with objective {kind}; remove it"
            )
