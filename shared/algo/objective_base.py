"""What all objectives share before they run: facts and the checks of their parameters. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

Anchor = Literal["old", "rollout"]
"""What the ratio compares the current policy with. `old`: r = S, and the weight W of the
corrections on D multiplies the loss. `rollout`: r = ρ, which contains D already; W is not used,
and a truncation or self-normalisation of it would be dead (SkyRL forbids TIS there)."""


@dataclass(frozen=True)
class Spec:
    """What all objectives share."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a typo fails at start

    fixed_anchor: ClassVar[Anchor] = "old"
    """Of a kind without the parameter `anchor`."""
    whole_sequences: ClassVar[bool] = False
    """A sequence must lie wholly inside one micro-batch."""
    aggregation: ClassVar[str] = "token_mean"
    """The authors' choice; others are allowed."""
    needs_score: ClassVar[bool] = False
    """Needs the raw reward of every token's trajectory."""
    needs_prox: ClassVar[bool] = False
    """Needs log-probs of a trust-region anchor beside the old ones."""

    @property
    def ratio_anchor(self) -> Anchor:
        """What the ratio is anchored on."""
        return getattr(self, "anchor", self.fixed_anchor)

    @property
    def uses_weight(self) -> bool:
        """Whether W multiplies the loss."""
        return self.ratio_anchor == "old"

    def _positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < math.inf:
                self._refuse(name, "must be positive and finite")

    def _not_negative(self, name: str) -> None:
        if not 0 <= getattr(self, name) < math.inf:
            self._refuse(name, "must be finite and not negative")

    def _clip(self, low: float, high: float, dual: float | None = None) -> None:
        if not 0 < low <= 1:
            self._refuse("low", "must lie in (0, 1]: the ratio is clipped from below at 1 - low")
        if not high > 0:
            self._refuse("high", "leaves no room above a ratio of 1")
        if dual is not None and not dual > 1:
            self._refuse("dual", "must be above 1, or tokens with S = 1 and A < 0 get no gradient")

    def _anchored(self, cap: float = 1.0) -> None:
        self._word("anchor", get_args(Anchor))
        if not cap >= 1:
            self._refuse("cap", "must be at least 1, or agreement is re-weighted")

    def _word(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            self._refuse(name, f"is none of {', '.join(allowed)}")

    def _refuse(self, name: str, why: str) -> None:
        default = {f.name: f.default for f in fields(self)}[name]
        raise ValueError(
            f"objective.{name}: {getattr(self, name)!r} {why} (kind {kind_of(self)}); "
            f"use {default!r}"
        )


def kind_of(spec: Spec) -> str:
    """Return the name of an objective."""
    return str(type(spec).__dataclass_fields__["kind"].default)
