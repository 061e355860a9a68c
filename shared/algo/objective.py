"""Settings of the training objective, with every degenerate combination refused. No torch.

Defaults: `offpolicy.md` 11.
"""

from __future__ import annotations

from dataclasses import dataclass

DISCREPANCY_BOUNDS: dict[str, tuple[float, float] | None] = {
    "icepop": (0.5, 5.0),
    "mask": (0.5, 2.0),
    "tis": (0.0, 2.0),
    "none": None,
}
"""Default (low, high) on D by kind; None: the kind has no bounds. `corrections.DISCREPANCIES`
holds the functions."""

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

    discrepancy: str = "icepop"
    discrepancy_low: float = 0.5
    discrepancy_high: float = 5.0
    veto: float | None = 1e-4
    """Drop a whole sequence when one loss token has D below; None: off."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """S is clipped to [1 - clip_low, 1 + clip_high]."""
    dual: float | None = 3.0
    """Bound on L/(-A) where A < 0; None: off."""
    entropy_bonus: float = 0.0
    aggregation: str = "token_mean"
    horizon: float | None = None
    """L of the constant-denominator aggregations."""

    def __post_init__(self) -> None:
        self._check_discrepancy()
        self._check_clip()
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

    def _check_discrepancy(self) -> None:
        kind, low, high = self.discrepancy, self.discrepancy_low, self.discrepancy_high
        if kind not in DISCREPANCY_BOUNDS:
            raise ValueError(
                f"discrepancy.kind: {kind!r} is none of {', '.join(DISCREPANCY_BOUNDS)}"
            )
        if kind in ("icepop", "mask") and not 0 <= low < 1 < high:
            raise ValueError(
                f"discrepancy: [{low}, {high}] must contain 1 in its interior and start at 0 or "
                "above, or tokens on which both engines agree are rejected; use low: 0.5, "
                "high: 5.0"
            )
        if kind == "tis" and not 0 <= low <= 1 <= high:
            raise ValueError(
                f"discrepancy: [{low}, {high}] must contain 1, or tokens on which both engines "
                "agree are re-weighted; use low: 0.0, high: 2.0"
            )
        if self.veto is not None and not 0 < self.veto < 1:
            raise ValueError(
                f"veto: {self.veto} must lie between 0 and 1, or every trajectory is dropped; "
                "use 1e-4, or null to switch it off"
            )

    def _check_clip(self) -> None:
        if not 0 < self.clip_low <= 1:
            raise ValueError(
                f"clip.low: {self.clip_low} must lie in (0, 1]: S is clipped from below at "
                "1 - low; use 0.2"
            )
        if not self.clip_high > 0:
            raise ValueError(
                f"clip.high: {self.clip_high} leaves no room above S = 1; use 0.28, or a large "
                "number for no upper clip"
            )
        if self.dual is not None and not self.dual > 1:
            raise ValueError(
                f"clip.dual: {self.dual} must be above 1, or tokens with S = 1 and A < 0 get no "
                "gradient; use 3.0, or null to switch it off"
            )
