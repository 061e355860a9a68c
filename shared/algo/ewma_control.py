"""When and how far the EWMA anchor θ̄ moves: a pure state machine. No torch, no clock.

After every optimizer step, `advance(state, settings, measured)` returns λ for

    θ̄ ← λ·θ̄ + (1-λ)·θ          (`ewma.blend` does it to tensors)

and the next state: bias-correction weight W, mean age ā and E[age²] q of the mixture, in
optimizer steps. Whatever λ is, ā ← λ(ā+1) and q ← λ(q + 2ā + 1).

Decays (`EwmaSettings.decay`, `offpolicy.md` 6):
    fixed         W' = βW + 1, λ = βW/W' (PPO-EWMA, arXiv 2110.00641; openai/ppo-ewma)
    staleness     the same with β = s̄/(1+s̄) at each step
    age_tracking  λ = clip(s̄/(ā+1), 0, 1): the new mean age is exactly s̄, or the anchor is held
                  until it is that old. Weights sum to 1 always, so there is no bias to correct
where s̄ is the mean behaviour age of the batch about to be trained.

`age_tracking` and the automatic resets R1 to R5 are this project's own definition of the revised
PPO-EWMA of arXiv 2605.12070, whose formulas could not be had. For weights that move linearly the
anchor equals the snapshot of age ā; the error grows with the spread of ages in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

Decay = Literal["fixed", "staleness", "age_tracking"]

ResetCause = Literal[
    "fresh_data", "worse_than_current", "drift", "clipped", "discontinuity", "spread"
]
"""R1 `fresh_data`, R2 `worse_than_current`, R3 `drift` and `clipped`, R4 `discontinuity`,
R5 `spread`."""

Discontinuity = Literal[
    "checkpoint_load", "optimizer_restart", "lr_rewarmup", "step_rollback", "max_staleness_change"
]


@dataclass(frozen=True)
class EwmaSettings:
    """Settings of one anchor. `ewma_prox` = defaults; `ppo_ewma_async` = `ASYNC`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # a typo fails at start

    decay: Decay = "fixed"
    beta: float = 8 / 9
    """Of `fixed`: centre of mass 8 steps. The paper's default was not seen."""
    bias_correction: bool = True
    """False: λ = β from the start, which pulls θ̄ to θ_0 (for comparison)."""
    auto_reset: bool = False
    fresh_below: float = 0.5
    """R1: reset when s̄ is below."""
    patience: int = 3
    """R2: steps in a row on which θ̄ explains the samples worse than the current weights."""
    drift: float = 0.05
    """R3: reset when `drift_measure` of π_θ̄ → π_θ is above, nats."""
    drift_measure: Literal["k3", "abs_log"] = "k3"
    """The mean of k3, or of |log S̃|, which one clip width already exceeds."""
    clipped: float = 0.3
    """R3: reset when a larger share of tokens arrives outside the clip."""

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise ValueError(f"ewma.decay: {self.decay!r} is none of {', '.join(get_args(Decay))}")
        if self.drift_measure not in ("k3", "abs_log"):
            raise ValueError(f"ewma.drift_measure: {self.drift_measure!r} is none of k3, abs_log")
        if not 0 <= self.beta < 1:
            raise ValueError(f"ewma.beta: {self.beta} is not in [0, 1); use 0.889")
        for name in ("fresh_below", "drift", "clipped"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"ewma.{name}: {getattr(self, name)} is negative")
        if self.patience < 1:
            raise ValueError(f"ewma.patience: {self.patience} is below 1; use 3")


ASYNC = EwmaSettings(decay="age_tracking", auto_reset=True)
"""`ppo_ewma_async`."""


@dataclass(frozen=True)
class AnchorState:
    """What is known of θ̄ besides its tensors. The default is a fresh copy of θ."""

    weight: float = 1.0
    """W, the sum of the undivided weights of the `fixed` and `staleness` recursion."""
    age: float = 0.0
    """ā: mean age of the mixture, optimizer steps."""
    age_square: float = 0.0
    """q = E[age²]."""
    worse_steps: int = 0
    """Steps in a row on which θ̄ explained the samples worse than the current weights."""
    num_updates: int = 0
    resets: Mapping[str, int] = field(default_factory=dict[str, int])
    """By cause, since the start."""

    @property
    def age_std(self) -> float:
        """Spread of the mixture's ages: 0 for a snapshot."""
        return math.sqrt(max(0.0, self.age_square - self.age**2))


@dataclass(frozen=True)
class AnchorMeasured:
    """What the step just taken showed of θ̄, over its loss tokens; None: not measured."""

    k3_anchor: float | None = None
    """k3(μ‖π_θ̄)."""
    k3_start: float | None = None
    """k3(μ‖π_θ) at the first minibatch."""
    drift_k3: float | None = None
    """k3(π_θ̄‖π_θ)."""
    drift_abs_log: float | None = None
    """Mean |log S̃|."""
    clipped: float | None = None
    """Share of tokens with S̃ outside the clip on arrival."""


@dataclass(frozen=True)
class AnchorDecision:
    """What to do with θ̄ now, and what it then is."""

    keep: float
    """λ in [0, 1]. 0: copy θ; 1: leave θ̄ alone."""
    causes: tuple[ResetCause, ...]
    """Why it is reset; empty: it is not."""
    state: AnchorState
    target_age: float
    """s̄."""

    @property
    def age_deficit(self) -> float:
        """s̄ - ā: how much younger the anchor is than the data; S̃ understates staleness by it.

        Positive for about s̄ steps after a reset, while the anchor is held. Tighten the mask on
        D̃ meanwhile, or take the oldest live snapshot.
        """
        return self.target_age - self.state.age


def advance(
    state: AnchorState,
    settings: EwmaSettings,
    *,
    target_age: float,
    measured: AnchorMeasured | None = None,
    discontinuities: tuple[Discontinuity, ...] = (),
) -> AnchorDecision:
    """Decide on θ̄ after an optimizer step.

    Args:
        state: before.
        settings: of this anchor.
        target_age: s̄ of the batch about to be trained, in optimizer steps (`ewma.target_age`).
            `fixed` needs it for `age_deficit` only.
        measured: of the batch just trained.
        discontinuities: events since the last call after which old weights are no anchor.

    Raises:
        ValueError: a target that is negative or not finite.
    """
    if not 0 <= target_age < math.inf:
        raise ValueError(f"target_age: {target_age} is not a non-negative number of steps")
    measured = measured or AnchorMeasured()
    worse = _is_worse(measured)
    counted = (
        state if worse is None else replace(state, worse_steps=(state.worse_steps + 1) * worse)
    )
    keep, weight = _keep(counted, settings, target_age)
    moved = _moved(counted, keep, weight)
    causes: list[ResetCause] = []
    if settings.auto_reset:
        causes = _causes(moved, settings, target_age, measured)
        if discontinuities:
            causes.append("discontinuity")
    if causes:
        return reset(state, *causes, target_age=target_age)
    return AnchorDecision(keep, (), moved, target_age)


def reset(state: AnchorState, *causes: ResetCause, target_age: float = 0.0) -> AnchorDecision:
    """Decide to start over from the current weights (the recursion with β = 0)."""
    counts = dict(state.resets)
    for cause in causes:
        counts[cause] = counts.get(cause, 0) + 1
    fresh = AnchorState(num_updates=state.num_updates + 1, resets=counts)
    return AnchorDecision(0.0, causes, fresh, target_age)


def _is_worse(measured: AnchorMeasured) -> bool | None:
    if measured.k3_anchor is None or measured.k3_start is None:
        return None
    return measured.k3_anchor > measured.k3_start


def _keep(state: AnchorState, settings: EwmaSettings, target_age: float) -> tuple[float, float]:
    """Return (λ, W')."""
    if settings.decay == "age_tracking":
        return min(1.0, target_age / (state.age + 1.0)), state.weight
    beta = target_age / (1.0 + target_age) if settings.decay == "staleness" else settings.beta
    if settings.decay == "fixed" and not settings.bias_correction:
        return beta, state.weight
    weight = beta * state.weight + 1.0
    return beta * state.weight / weight, weight


def _moved(state: AnchorState, keep: float, weight: float) -> AnchorState:
    return replace(
        state,
        weight=weight,
        age=keep * (state.age + 1.0),
        age_square=keep * (state.age_square + 2.0 * state.age + 1.0),
        num_updates=state.num_updates + 1,
    )


def _causes(
    moved: AnchorState, settings: EwmaSettings, target_age: float, measured: AnchorMeasured
) -> list[ResetCause]:
    causes: list[ResetCause] = []
    if target_age < settings.fresh_below:
        causes.append("fresh_data")
    if moved.worse_steps >= settings.patience:
        causes.append("worse_than_current")
    by_k3 = settings.drift_measure == "k3"
    drift = measured.drift_k3 if by_k3 else measured.drift_abs_log
    if drift is not None and drift > settings.drift:
        causes.append("drift")
    if measured.clipped is not None and measured.clipped > settings.clipped:
        causes.append("clipped")
    if moved.age_std > 2.0 * (moved.age + 1.0):
        causes.append("spread")
    return causes


def center_of_mass(beta: float) -> float:
    """Return 1/(1-β) - 1: the mean age of the mixture in the limit."""
    return 1.0 / (1.0 - beta) - 1.0


def half_life(beta: float) -> float:
    """Return ln ½ / ln β, optimizer steps."""
    return math.log(0.5) / math.log(beta)


def mean_age(beta: float, num_updates: int) -> float:
    """Return the mean age of the bias-corrected mixture after n updates from a fresh copy."""
    power = beta ** (num_updates + 1)
    return beta / (1.0 - beta) - (num_updates + 1) * power / (1.0 - power)


def beta_of(center: float) -> float:
    """Return the β whose centre of mass is given, center/(1+center)."""
    return center / (1.0 + center)


def rescaled_beta(beta: float, factor: float) -> float:
    """Return β' = c·COM/(1+c·COM) for a batch divided by c (batch-size invariance, 2110.00641).

    Left out: the Adam step size and the advantage normalisation, which must be adjusted too.
    """
    return beta_of(factor * center_of_mass(beta))
