"""Settings of the KL term. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

Estimator = Literal["k1", "k2", "k3", "k3+"]


@dataclass(frozen=True)
class KlSpec:
    """The KL term: `coefficient` · estimate, on every loss token, rejected or not."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a typo fails at start

    coefficient: float = 0.0
    """0: off, and no reference model is needed."""
    estimator: Estimator = "k3"
    importance: Literal["none", "staleness", "total"] = "none"
    """Multiply by S or ρ: DeepSeek-V3.2's unbiased KL is k3 with `staleness`."""
    value_clamp: float | None = 10.0
    """Bound on the magnitude of the estimate (verl, ROLL, AReaL); null: off."""
    input_clamp: float | None = 20.0
    """Bound on |ℓ^ref - ℓ| before the exp of k3 (verl); null: off."""

    def __post_init__(self) -> None:
        if not self.coefficient >= 0:
            raise ValueError(
                f"kl.coefficient: {self.coefficient} drives the policy away from its reference; "
                "use 0 to switch it off, or a small positive number such as 0.001"
            )
        if self.estimator not in get_args(Estimator):
            raise ValueError(
                f"kl.estimator: {self.estimator!r} is none of {', '.join(get_args(Estimator))}"
            )
        if self.importance not in ("none", "staleness", "total"):
            raise ValueError(
                f"kl.importance: {self.importance!r} is none of none, staleness, total"
            )
        for name in ("value_clamp", "input_clamp"):
            bound = getattr(self, name)
            if bound is not None and not bound > 0:
                raise ValueError(f"kl.{name}: {bound} must be positive, or null to switch it off")
