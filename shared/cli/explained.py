"""One trajectory token by token: what was sampled, what it was trained with, what became of it.

Plain data and its JSON form. Log-probs in nats; NaN in memory and null in JSON is "not known, or
does not apply". How each number comes about is in `explain_records`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

SCHEMA = 1
"""Of the JSON form: raised when a key changes its meaning or goes away."""

OldSource = Literal["archived", "sampler", "recomputed", "interpolated", "unknown"]
"""archived: the stored score the learner joined. sampler: the route's own definition.
recomputed: by the audit's float64 forward from archived weights. interpolated: by the loss, from
the sampler's and the recomputed current one. unknown: cannot be had from the archive."""


@dataclass(frozen=True)
class Token:
    """One token of a sequence, prompt and environment tokens included."""

    sequence: int
    """Index in the trajectory."""
    position: int
    token_id: int
    text: str
    sampled: bool
    turn: int = -1
    """From 0; -1 where nothing was sampled."""
    version: int = -1
    """Stamp; -1 where nothing was sampled."""
    age: int | None = None
    """Version stepped from, minus the stamp; None where no step trained it."""
    sampler: float = math.nan
    old: float = math.nan
    status: str = ""
    """Provenance of `old`: exact, approximate, unverified, unscorable; empty: no old log-prob."""
    mixed_kv: bool = False
    """Sampled over a KV cache of older weights: no single version produced it."""
    current: float = math.nan
    """Recomputed under the version stepped from."""
    reference: float = math.nan
    """Under its own version, by the audit's forward."""
    log_d: float = math.nan
    """ℓ^old - ℓ^inf."""
    log_s: float = math.nan
    """ℓ - ℓ^old."""
    weight: float = math.nan
    """W: what is left of D after truncation; NaN outside the loss."""
    in_loss: bool = False
    """In the loss mask, rejected or not."""
    masked: tuple[str, ...] = ()
    """Why it has no gradient, by cause: over_age, unscorable and the like, no_loss:<verdict>, or
    every correction that rejects it."""
    clipped: tuple[str, ...] = ()
    """Where the objective cuts its gradient: clip_high (A > 0), clip_low, dual (A < 0), or
    another objective's name for it."""
    truncated: bool = False
    """A bound changed its weight without removing it."""
    advantage: float = math.nan
    gradient: float = math.nan
    """dL/dℓ of the summed loss, before the denominator."""
    gradient_step: float = math.nan
    """dL/dℓ of the optimizer step's loss, after it."""

    @property
    def d(self) -> float:
        return math.exp(self.log_d)

    @property
    def s(self) -> float:
        return math.exp(self.log_s)


@dataclass(frozen=True)
class Place:
    """Where one sequence stood in the step."""

    minibatch: int
    """From 0: this many optimizer steps were taken between the version stepped from and the
    weights that its forward saw."""
    minibatches: int
    num_tokens: float
    """Loss tokens of the optimizer step, before rejection."""
    num_sequences: float
    horizon: float


@dataclass(frozen=True)
class Explained:
    """A trajectory, how it was trained, and what of that could be established."""

    ticket_id: str
    attempt_id: str
    group_id: str
    purpose: str
    fate: str
    """trained, or how else its ticket ended."""
    status: str
    """done, truncated or failed."""
    issue_version: int
    versions: tuple[int, ...]
    """That sampled it."""
    reward: float = math.nan
    advantage: float = math.nan
    pods: tuple[str, ...] = ()
    switch_inside_turn: bool = False
    batch_version: int | None = None
    """The version that the step trained it from."""
    route: str = ""
    old_source: OldSource = "unknown"
    corrections: tuple[str, ...] = ()
    objective: str = ""
    aggregation: str = ""
    places: tuple[Place | None, ...] = ()
    """By sequence; None for one without a loss token."""
    notes: tuple[str, ...] = ()
    """What is recomputed, and what could not be had."""
    tokens: tuple[Token, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON form (docs/explain.md)."""
        head = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("tokens", "places")
        }
        tree = {
            "schema": SCHEMA,
            **head,
            "places": [None if place is None else asdict(place) for place in self.places],
            "tokens": [_token(token) for token in self.tokens],
        }
        return {name: _plain(value) for name, value in tree.items()}


def ends(token: Token) -> str:
    """Return what keeps a token from its full gradient, in words; empty when nothing does."""
    return ", ".join([*token.masked, *token.clipped, *(["truncated"] if token.truncated else [])])


def _token(token: Token) -> dict[str, Any]:
    values = asdict(token)
    if not token.sampled:
        values |= {"turn": None, "version": None}
    values |= {"d": token.d, "s": token.s}
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return list(value) if isinstance(value, tuple) else value
