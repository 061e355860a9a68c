"""The `algo` section of the learner's configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from shared.algo.correction_list import DEFAULT_CORRECTIONS
from shared.algo.correction_specs import SPECS, CorrectionSpec
from shared.algo.kl_spec import KlSpec
from shared.algo.objective import Objective
from shared.algo.objective_specs import OBJECTIVE_SPECS, ObjectiveSpec, Ppo
from shared.algo.presets import PRESETS
from shared.runtime.sections import Section


class AlgoSection(Section):
    """Advantage, corrections, objective and aggregation (docs/algorithms.md)."""

    preset: str = ""
    """A documented combination by the field's name; keys given beside it take precedence."""
    advantage: Literal["dr_grpo", "grpo", "rloo", "batch_std"] = "dr_grpo"
    """Of a reward relative to its group; `batch_std` divides by the deviation of the batch."""
    credit: Literal["trajectory", "turn"] = "trajectory"
    """turn: reward-to-go from each turn on, relative to the group's members at the same turn."""
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per turn; with `credit: turn` only."""
    corrections: tuple[Annotated[CorrectionSpec, Field(discriminator="kind")], ...] = (
        DEFAULT_CORRECTIONS
    )
    """On D = exp(old - sampler log-prob), the same version in two engines; any order."""
    objective: Annotated[ObjectiveSpec, Field(discriminator="kind")] = Ppo()
    """On S = exp(current - old log-prob), two versions in the same engine."""
    kl: KlSpec = KlSpec()
    """To the model that the run began with."""
    entropy_bonus: float = 0.0
    aggregation: Literal[
        "token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "token_sum_constant",
        "seq_mean_constant",
    ] = "token_mean"  # fmt: skip
    """Denominators are global counts before rejection."""
    horizon: float | None = None
    """The constant of the two `*_constant` aggregations, in tokens."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        keys = cast("dict[str, Any]", given)
        _check_entries("corrections", keys.get("corrections"), SPECS)
        _check_entries("objective", [keys.get("objective")], OBJECTIVE_SPECS)
        name = keys.get("preset")
        if not name:
            return keys
        if name not in PRESETS:
            raise ValueError(f"preset: {name!r} is none of {', '.join(PRESETS)}")
        return {**PRESETS[name], **keys}

    @model_validator(mode="after")
    def _not_degenerate(self) -> Self:
        if self.credit == "turn" and self.advantage == "batch_std":
            raise ValueError(
                "advantage: batch_std has one deviation for whole trajectories; with credit: turn "
                "take dr_grpo, grpo or rloo"
            )
        if self.credit == "trajectory" and self.gamma != 1.0:
            raise ValueError("gamma discounts turns: set credit: turn, or leave gamma at 1")
        self.settings()
        return self

    def settings(self) -> Objective:
        """Return the settings of `shared.algo.policy_loss.PolicyLoss`.

        Raises:
            ValueError: degenerate settings, naming the key and the fix; validation has already
                turned these into a ConfigError.
        """
        return Objective(
            corrections=self.corrections,
            objective=self.objective,
            kl=self.kl,
            entropy_bonus=self.entropy_bonus,
            aggregation=self.aggregation,
            horizon=self.horizon,
        )


def _check_entries(section: str, entries: object, specs: Mapping[str, type[Any]]) -> None:
    """Refuse an entry without a kind, or with a parameter that its kind does not have.

    Raises:
        ValueError: naming what there is instead. An unknown kind is left to the validation.
    """
    if not isinstance(entries, list | tuple):
        return
    for entry in cast("Sequence[object]", entries):
        if isinstance(entry, str) and entry in specs:
            raise ValueError(f"{section}: {entry}: write it as {{kind: {entry}}}")
        if not isinstance(entry, Mapping):
            continue
        values = cast("Mapping[str, Any]", entry)
        if "kind" not in values:
            raise ValueError(f"{section}: an entry has no kind; it is one of {', '.join(specs)}")
        if (cls := specs.get(str(values["kind"]))) is None:
            continue
        known = [f.name for f in fields(cls) if f.name != "kind"]
        if unknown := sorted(values.keys() - {"kind", *known}):
            raise ValueError(
                f"{section}: {values['kind']}: {', '.join(unknown)} is not a known key; it takes "
                f"{', '.join(known) or 'no parameters'}"
            )
