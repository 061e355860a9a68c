"""The corrections on D by name: parameters, defaults, and what is refused. No torch.

A configuration lists them, in any order:

    corrections:
      - {kind: icepop, low: 0.5, high: 5.0}
      - {kind: veto, below: 1.0e-4}

At most one of them is the weight (`importance`, `tis`, `seq_tis`, `segment_tis`, `icepop`,
`unit`; `icepop` and `tis` may stand together); without one, W = D, untruncated. The others
reject. Formulas and sources: the functions named in each docstring. `correction_list` says
which may stand together, `composition.compose` makes a list executable.

Every class raises ValueError at construction, naming the kind, the value and the fix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

LOG_BOUND = 20.0
"""`ratios.SAFETY_BOUND`: log D is clamped to ±20, so bounds beyond exp(±20) never act."""

_SMALLEST, _LARGEST = math.exp(-LOG_BOUND), math.exp(LOG_BOUND)


@dataclass(frozen=True)
class Spec:
    """What all corrections share."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a typo fails at start

    def _region(self, low: float, high: float, example: str) -> None:
        if not 0 <= low < 1 < high:
            self._refuse(
                f"[{low}, {high}] must contain 1 in its interior and start at 0 or above, or "
                f"tokens on which both engines agree are rejected; use {example}"
            )
        if low <= _SMALLEST and high >= _LARGEST:
            self._refuse(f"[{low}, {high}] never rejects; remove it or use {example}")

    def _truncation(self, low: float, high: float) -> None:
        if not 0 <= low <= 1 <= high:
            self._refuse(
                f"[{low}, {high}] must contain 1, or tokens on which both engines agree are "
                "re-weighted; use low: 0.0, high: 2.0"
            )
        if low == high:
            self._refuse("low = high = 1 makes every weight 1; use {kind: unit}")
        if low <= _SMALLEST and high >= _LARGEST:
            self._refuse(f"[{low}, {high}] never truncates; use {{kind: importance}}")

    def _refuse(self, why: str) -> None:
        raise ValueError(f"corrections: {kind_of(self)}: {why}")


@dataclass(frozen=True)
class Importance(Spec):
    """W = D, untruncated: what a list without a weight means, said aloud (NeMo-RL seq-mask-tis)."""

    kind: Literal["importance"] = "importance"


@dataclass(frozen=True)
class Unit(Spec):
    """W = 1: masks only (millioniron/ROLL `infer_is_mode: None`; SkyRL masks without TIS)."""

    kind: Literal["unit"] = "unit"


@dataclass(frozen=True)
class Tis(Spec):
    """`corrections.tis_token`."""

    kind: Literal["tis"] = "tis"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        self._truncation(self.low, self.high)


@dataclass(frozen=True)
class SeqTis(Spec):
    """`corrections.seq_tis`."""

    kind: Literal["seq_tis"] = "seq_tis"
    high: float = 2.0

    def __post_init__(self) -> None:
        if not self.high > 1:
            self._refuse(f"high: {self.high} must be above 1, or agreement is cut; use high: 2.0")


@dataclass(frozen=True)
class SegmentTis(Spec):
    """`segments.segment_tis`."""

    kind: Literal["segment_tis"] = "segment_tis"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        self._truncation(self.low, self.high)


@dataclass(frozen=True)
class IcePop(Spec):
    """`corrections.icepop`: weight and token mask in one."""

    kind: Literal["icepop"] = "icepop"
    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        self._region(self.low, self.high, "low: 0.5, high: 5.0")


@dataclass(frozen=True)
class TokenMask(Spec):
    """`corrections.token_mask`."""

    kind: Literal["token_mask"] = "token_mask"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        self._region(self.low, self.high, "low: 0.5, high: 2.0")


@dataclass(frozen=True)
class SeqMask(Spec):
    """`corrections.seq_mask` of the product; defaults of SkyRL."""

    kind: Literal["seq_mask"] = "seq_mask"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        self._region(self.low, self.high, "low: 0.5, high: 2.0")


@dataclass(frozen=True)
class SeqGeoMask(Spec):
    """`corrections.seq_mask` of the geometric mean; defaults of SkyRL."""

    kind: Literal["seq_geo_mask"] = "seq_geo_mask"
    low: float = 0.99
    high: float = 1.01

    def __post_init__(self) -> None:
        self._region(self.low, self.high, "low: 0.99, high: 1.01")


@dataclass(frozen=True)
class SegmentMask(Spec):
    """`segments.segment_mask`; defaults of alibaba/ROLL."""

    kind: Literal["segment_mask"] = "segment_mask"
    low: float = 0.8
    high: float = 1.2

    def __post_init__(self) -> None:
        self._region(self.low, self.high, "low: 0.8, high: 1.2")


@dataclass(frozen=True)
class KlMask(Spec):
    """`corrections.kl_mask`; several may stand together if estimator or agg differ."""

    kind: Literal["kl_mask"] = "kl_mask"
    estimator: Literal["k2", "k3"] = "k3"
    agg: Literal["token", "sum", "mean", "max"] = "mean"
    high: float = 0.01
    """verl: 0.001 to 0.01 for the mean of k3. The other aggregations need larger bounds."""

    def __post_init__(self) -> None:
        _one_of(self, "estimator", ("k2", "k3"))
        _one_of(self, "agg", ("token", "sum", "mean", "max"))
        if not 0 < self.high < math.inf:
            self._refuse(f"high: {self.high} must be positive and finite; use high: 0.01")


@dataclass(frozen=True)
class Veto(Spec):
    """`corrections.veto`."""

    kind: Literal["veto"] = "veto"
    below: float = 1e-4
    above: float | None = None
    """None: one-sided. SkyRL: 100."""

    def __post_init__(self) -> None:
        if not _SMALLEST < self.below < 1:
            self._refuse(
                f"below: {self.below} must lie between {_SMALLEST:.1e} (D is clamped there) and "
                "1, or no or every trajectory is dropped; use 1e-4"
            )
        if self.above is not None and not 1 < self.above < _LARGEST:
            self._refuse(
                f"above: {self.above} must lie between 1 and {_LARGEST:.1e} (D is clamped "
                "there); use 100, or null to switch it off"
            )


@dataclass(frozen=True)
class Trm(Spec):
    """`corrections.trm`."""

    kind: Literal["trm"] = "trm"
    low: float = 0.5
    high: float = 2.0

    def __post_init__(self) -> None:
        self._region(self.low, self.high, "low: 0.5, high: 2.0")


@dataclass(frozen=True)
class ProbDiff(Spec):
    """`corrections.prob_diff_mask`; defaults of alibaba/ROLL."""

    kind: Literal["prob_diff"] = "prob_diff"
    low: float = -0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        if not self.low < 0 < self.high:
            self._refuse(
                f"[{self.low}, {self.high}] must contain 0 in its interior; use -0.2 and 0.2"
            )
        if self.low <= -1 and self.high >= 1:
            self._refuse(f"[{self.low}, {self.high}] never rejects; use -0.2 and 0.2")


@dataclass(frozen=True)
class KPop(Spec):
    """`corrections.kpop_mask`; no default for the bound is published."""

    high: float
    kind: Literal["kpop"] = "kpop"

    def __post_init__(self) -> None:
        if not 0 < self.high < math.inf:
            self._refuse(f"high: {self.high} must be positive and finite")


@dataclass(frozen=True)
class SelfNormalise(Spec):
    """`corrections.self_normalise`, after truncation."""

    kind: Literal["self_normalise"] = "self_normalise"
    level: Literal["auto", "token", "sequence"] = "auto"
    """What the mean runs over; auto: sequences for `seq_tis`, tokens otherwise, as verl does."""

    def __post_init__(self) -> None:
        _one_of(self, "level", ("auto", "token", "sequence"))


CorrectionSpec = (
    Importance | Unit | Tis | SeqTis | SegmentTis | IcePop | TokenMask | SeqMask | SeqGeoMask
    | SegmentMask | KlMask | Veto | Trm | ProbDiff | KPop | SelfNormalise
)  # fmt: skip
"""One entry of `algo.corrections`, told apart by `kind`."""


def kind_of(spec: Spec) -> str:
    """Return the name of a correction."""
    return str(type(spec).__dataclass_fields__["kind"].default)


SPECS: Mapping[str, type[CorrectionSpec]] = {
    str(cls.__dataclass_fields__["kind"].default): cls for cls in get_args(CorrectionSpec)
}
"""By name."""


def _one_of(spec: Spec, name: str, allowed: Sequence[str]) -> None:
    if (value := getattr(spec, name)) not in allowed:
        raise ValueError(
            f"corrections: {kind_of(spec)}: {name}: {value!r} is none of {', '.join(allowed)}"
        )
