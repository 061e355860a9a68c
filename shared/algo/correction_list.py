"""Which corrections may stand together, and reading them from a configuration. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from shared.algo.correction_specs import (
    SPECS,
    CorrectionSpec,
    IcePop,
    Importance,
    KlMask,
    SegmentTis,
    SelfNormalise,
    SeqTis,
    Tis,
    TokenMask,
    Trm,
    Unit,
    Veto,
    kind_of,
)

DEFAULT_CORRECTIONS: tuple[CorrectionSpec, ...] = (IcePop(), Veto())
"""`offpolicy.md` 11: IcePop [0.5, 5] and a veto at 1e-4."""

WEIGHTS = (Importance, Unit, Tis, SeqTis, SegmentTis)
"""The kinds that are a weight and nothing else; `IcePop` is a weight and a mask."""


def spec_from(entry: Mapping[str, Any]) -> CorrectionSpec:
    """Return the correction a configuration entry describes.

    Raises:
        ValueError: an unknown kind or parameter, listing the known ones; degenerate values.
    """
    values = dict(entry)
    cls = SPECS.get(str(values.pop("kind", None)))
    if cls is None:
        raise ValueError(f"corrections: kind {entry.get('kind')!r} is none of {', '.join(SPECS)}")
    known = {f.name: f for f in fields(cls) if f.name != "kind"}
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(
            f"corrections: {entry['kind']}: unknown {', '.join(unknown)}; it takes "
            f"{', '.join(known) or 'no parameters'}"
        )
    required = {name for name, f in known.items() if f.default is MISSING}
    if missing := sorted(required - values.keys()):
        raise ValueError(f"corrections: {entry['kind']}: set {', '.join(missing)}")
    return cls(**values)


def check(specs: Sequence[CorrectionSpec]) -> None:
    """Refuse a list that contradicts itself or holds a part that never acts.

    Raises:
        ValueError: naming the two entries and which to remove.
    """
    _unique(specs)
    _one_weight(specs)
    _no_dead_mask(specs)


def weight_of(specs: Sequence[CorrectionSpec]) -> CorrectionSpec:
    """Return the entry that makes the weight of a checked list, `Importance` when none does."""
    weights = [s for s in specs if isinstance(s, WEIGHTS)]
    return weights[0] if weights else Importance()


def _unique(specs: Sequence[CorrectionSpec]) -> None:
    seen: set[object] = set()
    for spec in specs:
        name = (spec.kind, spec.estimator, spec.agg) if isinstance(spec, KlMask) else spec.kind
        if name in seen:
            raise ValueError(f"corrections: {spec.kind} is listed twice; keep the stricter one")
        seen.add(name)


def _one_weight(specs: Sequence[CorrectionSpec]) -> None:
    weights = [s for s in specs if isinstance(s, WEIGHTS)]
    if len(weights) > 1:
        names = ", ".join(kind_of(s) for s in weights)
        raise ValueError(f"corrections: {names} are all weights and contradict; keep one")
    icepop = any(isinstance(s, IcePop) for s in specs)
    if icepop and weights and not isinstance(weights[0], Tis):
        raise ValueError(
            f"corrections: icepop weighs by D itself, beside {kind_of(weights[0])}; use "
            "token_mask for its mask alone"
        )
    if icepop and any(isinstance(s, TokenMask) for s in specs):
        raise ValueError("corrections: icepop and token_mask both bound D per token; keep one")
    if any(isinstance(s, SelfNormalise) for s in specs):
        if not weights and not icepop:
            raise ValueError(
                "corrections: self_normalise without weights; list importance, tis, seq_tis, "
                "segment_tis or icepop"
            )
        if weights and isinstance(weights[0], Unit):
            raise ValueError("corrections: self_normalise of unit weights changes nothing")


def _no_dead_mask(specs: Sequence[CorrectionSpec]) -> None:
    dropping = [s for s in specs if isinstance(s, Veto | Trm)]
    for outer in dropping:
        low, high = _bounds(outer)
        for other in specs:
            if other is outer or not isinstance(other, Veto | Trm | IcePop | TokenMask):
                continue
            other_low, other_high = _bounds(other)
            if low >= other_low and high <= other_high:
                raise ValueError(
                    f"corrections: {kind_of(other)} rejects nothing that {kind_of(outer)} has "
                    f"not dropped with its whole sequence: [{low}, {high}] lies within "
                    f"[{other_low}, {other_high}]; remove one"
                )


def _bounds(spec: Veto | Trm | IcePop | TokenMask) -> tuple[float, float]:
    if isinstance(spec, Veto):
        return spec.below, math.inf if spec.above is None else spec.above
    return spec.low, spec.high
