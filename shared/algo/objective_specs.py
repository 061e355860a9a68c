"""The objectives on S (or ρ) by name: parameters, defaults, and what is refused. No torch.

A configuration picks one:

    objective: {kind: gspo, low: 3.0e-4, high: 4.0e-4}

`objective_terms.objective_terms` makes it executable; formulas and sources stand at the
functions named in each docstring (`offpolicy.md` 4). Not offered: GIPO (arXiv 2603.03955), SAT
(2607.18722) and GAC (2603.01501), of which only abstracts were available.

Every class raises ValueError at construction, naming the parameter, the value and the fix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from shared.algo.objective_base import Anchor, Spec


@dataclass(frozen=True)
class Ppo(Spec):
    """`staleness_objectives.ppo`: the default."""

    kind: Literal["ppo"] = "ppo"
    low: float = 0.2
    high: float = 0.28
    dual: float | None = 3.0

    def __post_init__(self) -> None:
        self._clip(self.low, self.high, self.dual)


@dataclass(frozen=True)
class _SequenceClip(Spec):
    whole_sequences: ClassVar[bool] = True
    aggregation: ClassVar[str] = "seq_mean_token_mean"

    low: float = 3e-4
    high: float = 4e-4

    def __post_init__(self) -> None:
        self._clip(self.low, self.high)


@dataclass(frozen=True)
class Gspo(_SequenceClip):
    """`sequence_objectives.gspo`, bounds of the paper."""

    kind: Literal["gspo"] = "gspo"


@dataclass(frozen=True)
class GspoToken(_SequenceClip):
    """`sequence_objectives.gspo_token`."""

    kind: Literal["gspo_token"] = "gspo_token"


@dataclass(frozen=True)
class Cispo(Spec):
    """`staleness_objectives.cispo`; anchor as SkyRL's `cispo_anchor`."""

    kind: Literal["cispo"] = "cispo"
    low: float = 1.0
    """1 or more: no lower bound on the weight."""
    high: float = 4.0
    anchor: Anchor = "old"

    def __post_init__(self) -> None:
        self._anchored()
        self._not_negative("low")
        if not self.high > 0:
            self._refuse("high", "leaves no room above a ratio of 1")


@dataclass(frozen=True)
class Reinforce(Spec):
    """`staleness_objectives.reinforce`; on ρ it is verl's bypass policy gradient."""

    kind: Literal["reinforce"] = "reinforce"
    cap: float = 2.0
    anchor: Anchor = "rollout"

    def __post_init__(self) -> None:
        self._anchored(self.cap)


@dataclass(frozen=True)
class Topr(Spec):
    """`staleness_objectives.topr`: per token as ROLL, per sequence as the paper."""

    whole_sequences: ClassVar[bool] = True
    needs_score: ClassVar[bool] = True

    kind: Literal["topr"] = "topr"
    level: Literal["token", "sequence"] = "token"
    anchor: Anchor = "old"

    def __post_init__(self) -> None:
        self._anchored()
        self._word("level", ("token", "sequence"))


@dataclass(frozen=True)
class Sapo(Spec):
    """`staleness_objectives.sapo`."""

    aggregation: ClassVar[str] = "seq_mean_token_mean"

    kind: Literal["sapo"] = "sapo"
    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        self._positive("tau_positive", "tau_negative")


@dataclass(frozen=True)
class _Divergence(Spec):
    low: float = 0.2
    """Where A <= 0."""
    high: float = 0.2
    """Where A > 0."""
    cap: float = 20.0
    anchor: Anchor = "rollout"

    def __post_init__(self) -> None:
        self._positive("low", "high")
        self._anchored(self.cap)


@dataclass(frozen=True)
class DppoTv(_Divergence):
    """`divergence_objectives.dppo_tv`."""

    kind: Literal["dppo_tv"] = "dppo_tv"


@dataclass(frozen=True)
class DppoKl(_Divergence):
    """`divergence_objectives.dppo_kl`; bounds that SkyRL recommends."""

    kind: Literal["dppo_kl"] = "dppo_kl"
    low: float = 0.05
    high: float = 0.05


@dataclass(frozen=True)
class _PrimeRl(Spec):
    fixed_anchor: ClassVar[Anchor] = "rollout"

    low: float = 0.2
    high: float = 0.2
    kappa: float = 1e-3

    def __post_init__(self) -> None:
        self._positive("low", "high")
        self._not_negative("kappa")


@dataclass(frozen=True)
class PrimeRlDefault(_PrimeRl):
    """`divergence_objectives.prime_rl_default`."""

    kind: Literal["prime_rl_default"] = "prime_rl_default"


@dataclass(frozen=True)
class Ipo(_PrimeRl):
    """`divergence_objectives.ipo`."""

    kind: Literal["ipo"] = "ipo"
    low: float = 0.1
    high: float = 0.1


@dataclass(frozen=True)
class Vespo(Spec):
    """`sequence_objectives.vespo`."""

    whole_sequences: ClassVar[bool] = True

    kind: Literal["vespo"] = "vespo"
    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    anchor: Anchor = "rollout"

    def __post_init__(self) -> None:
        self._anchored()
        self._positive("k_positive", "lambda_positive", "k_negative", "lambda_negative")


@dataclass(frozen=True)
class Opsm(Spec):
    """`staleness_objectives.ppo` under the mask of `sequence_objectives.opsm_keep`."""

    whole_sequences: ClassVar[bool] = True

    kind: Literal["opsm"] = "opsm"
    low: float = 0.2
    high: float = 0.28
    dual: float | None = 3.0
    delta: float = 1e-4
    """slime's; TRL suggests 0.5 with `reference: rollout`."""
    reference: Anchor = "old"
    """Of the mask: slime `old`, TRL and DeepSeek-V3.2 `rollout`."""

    def __post_init__(self) -> None:
        self._word("reference", get_args(Anchor))
        self._clip(self.low, self.high, self.dual)
        self._not_negative("delta")


@dataclass(frozen=True)
class M2po(Spec):
    """`staleness_objectives.m2po`; the paper's ratio is against the sampler."""

    kind: Literal["m2po"] = "m2po"
    threshold: float = 0.04
    anchor: Anchor = "rollout"

    def __post_init__(self) -> None:
        self._anchored()
        self._positive("threshold")


@dataclass(frozen=True)
class RolloutDoubleSided(Spec):
    """`staleness_objectives.double_sided`."""

    fixed_anchor: ClassVar[Anchor] = "rollout"

    kind: Literal["rollout_double_sided"] = "rollout_double_sided"
    low: float = 0.2
    high: float = 0.28

    def __post_init__(self) -> None:
        self._clip(self.low, self.high)


@dataclass(frozen=True)
class FourPolicy(Spec):
    """`four_policy.four_policy`: the clip lies around an anchor π_prox other than π_old.

    `old_logprobs.anchor` says which. W acts on D, u on S1 = π_prox/π_old, the clip on
    S2 = π_θ/π_prox.
    """

    needs_prox: ClassVar[bool] = True

    kind: Literal["four_policy"] = "four_policy"
    low: float = 0.2
    high: float = 0.28
    dual: float | None = 3.0
    anchor_cap: float | None = None
    """u = min(S1, anchor_cap); null: u = S1."""
    max_ratio: float | None = None
    """Cap on ρ, openai/ppo-ewma's `imp_samp_max` (100 there)."""

    def __post_init__(self) -> None:
        self._clip(self.low, self.high, self.dual)
        for name in ("anchor_cap", "max_ratio"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                self._refuse(name, "must be at least 1, or agreement is re-weighted")


ObjectiveSpec = (
    Ppo | Gspo | GspoToken | Cispo | Reinforce | Topr | Sapo | DppoTv | DppoKl | PrimeRlDefault
    | Ipo | Vespo | Opsm | M2po | RolloutDoubleSided | FourPolicy
)  # fmt: skip
"""`algo.objective`, told apart by `kind`."""


OBJECTIVE_SPECS: Mapping[str, type[ObjectiveSpec]] = {
    str(cls.__dataclass_fields__["kind"].default): cls for cls in get_args(ObjectiveSpec)
}
"""By name."""


def objective_from(entry: Mapping[str, Any]) -> ObjectiveSpec:
    """Return the objective a configuration entry describes.

    Raises:
        ValueError: an unknown kind or parameter, listing the known ones; degenerate values.
    """
    values = dict(entry)
    kind = values.pop("kind", "ppo")
    cls = OBJECTIVE_SPECS.get(str(kind))
    if cls is None:
        raise ValueError(f"objective.kind: {kind!r} is none of {', '.join(OBJECTIVE_SPECS)}")
    known = [f.name for f in fields(cls) if f.name != "kind"]
    if unknown := sorted(values.keys() - set(known)):
        raise ValueError(
            f"objective: {kind} has no {', '.join(unknown)}; it takes {', '.join(known)}"
        )
    return cls(**values)
