"""What a step shows outside: guards and diagnostics as metrics, scalars and log lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from services.learner.config import LearnerConfig
from services.learner.guards import objections
from services.learner.staging import Scored
from services.learner.step_guards import GUARDS, GuardChange, StepFacts, StepGuards
from services.learner.trainer import StepOutcome
from shared.algo.loss_report import BY_MINIBATCH
from shared.runtime.context import Context
from shared.wire.trajectory import Sequence as TokenSequence

PAIRS = {"d": "discrepancy", "s": "staleness", "rho": "total"}
"""Prefix of the scalars -> value of the label `pair`."""
PAIR_SCALARS = (
    "mean", "std", "p1", "p50", "p99", "min", "max", "abs_log_mean", "abs_log_max",
    "abs_prob_diff_mean", "k1", "k2", "k3", "chi2", "ess_ratio", "seq_chi2", "seq_ess_ratio",
    "ppl_gap", "ppl_ratio",
)  # fmt: skip
"""Exported as `lagwise_learner_ratio_<name>{pair}`."""
CUTS = (
    "clip_high", "clip_low", "dual", "opsm", "m2po", "outside_low", "outside_high", "dppo_low",
    "dppo_high",
)  # fmt: skip
"""Where a trust region stops the gradient; of the survivors."""
SHADOW_SCALARS = (
    "error_mean", "error_p99", "error_bias", "wrongly_rejected", "wrongly_kept", "wrongly_cut",
    "wrongly_uncut", "wrong_any", "d_k3", "s_k3", "clipped_on_arrival", "unanswered",
)  # fmt: skip
"""Exported as `lagwise_learner_shadow_<name>{route}`; errors in nats."""
SCALARS = (
    "loss", "grad_norm", "lr", "entropy_mean", "clipped_on_arrival", "contributing",
    "zero_advantage", "truncated_frac", "eff_sample_ratio", "weight_mean", "weight_max",
    "noise_floor", "d_k3_age_slope", "staleness_mean", "staleness_max", "versions_per_trajectory",
    "version_span_max", "version_span_mean", "mixed_version_ratio", "old_logits_exact_ratio",
    "sampler_mean_d", "sampler_temperature_off", "skipped_steps", "num_segments",
    "old_logprobs_s", "old_logprobs_forward_tokens", "old_logprobs_held_bytes",
    "snapshot_loads", "snapshot_misses", "snapshot_hit_ratio", "snapshot_resident_bytes",
    "ewma_age", "ewma_target_age", "ewma_age_deficit", "ewma_age_std", "ewma_keep",
    "ewma_worse_steps",
    "shadow_s",
    "shadow_forward_tokens", "shadow_held_bytes", "shadow_trajectories",
)  # fmt: skip
"""Exported as `lagwise_learner_step_<name>`, where EXPORTED does not spell it out."""
EXPORTED = {
    "d_k3_age_slope": "discrepancy_k3_age_slope",
    "sampler_mean_d": "sampler_mean_discrepancy",
    "d_k3": "discrepancy_k3",
    "s_k3": "staleness_k3",
    "s_abs_log_mean": "staleness_abs_log_mean",
    "s_mean": "staleness_mean",
}
"""Prometheus' linter takes a lone `d` for days and a lone `s` for seconds."""


def bounds(config: LearnerConfig) -> dict[str, float]:
    """Return the configured bounds that alerts and scaling compare with, as gauges."""
    return {
        "staleness_bound": float(config.admission.max_staleness),
        "groups_per_version": float(config.admission.groups_per_version),
        "target_version": float(config.learner.versions),
        "checkpoint_every_versions": float(config.learner.checkpoint.every_versions),
        "stream_limit_bytes": float(config.bus.max_stream_bytes),
        "exact_route": float(config.old_logprobs.route in ("oracle", "snapshot_old", "interrupt")),
    }


class StepTelemetry:
    """The learner's last step, for whoever scrapes it."""

    def __init__(self, context: Context, config: LearnerConfig) -> None:
        self._context = context
        self._guards = StepGuards(config)
        self._shadows = (config.old_logprobs.route, *config.old_logprobs.shadow)
        for name in GUARDS:
            context.count(f"guard_{name}_steps", 0.0)
        context.count("skipped_steps", 0.0)
        self._show_guards()

    def warn_of(self, config: LearnerConfig) -> None:
        """Log what the configuration is warned about, once."""
        for one in objections(config):
            self._context.log.warning(
                "configuration", key=one.key, reason=one.reason, fix=one.fix, guard=one.name
            )

    def judge(
        self, version: int, outcome: StepOutcome, members: Iterable[Scored], fallback_tokens: int
    ) -> None:
        """Run the guards on the step from `version` and add their state to its scalars."""
        sequences = [s for member in members for s in member.trajectory.sequences]
        mixed_kv = sum(span.stop - span.start for s in sequences for span in s.mixed_kv)
        truncated = _truncated_tokens(sequences)
        before = dict(self._guards.bad_steps)
        facts = StepFacts(version, outcome, mixed_kv, truncated, fallback_tokens)
        for change in self._guards.observe(facts):
            self._log(change, version + 1, outcome.scalars)
        for name, total in self._guards.bad_steps.items():
            self._context.count(f"guard_{name}_steps", total - before[name])
        outcome.scalars["mixed_kv_tokens"] = float(mixed_kv)
        outcome.scalars["truncated_sampling_tokens"] = float(truncated)
        outcome.scalars.update({f"guard_{n}": float(up) for n, up in self._guards.raised.items()})
        self._show_guards()

    def show(self, outcome: StepOutcome) -> None:
        """Export a step's scalars and per-age means."""
        scalars, labelled = outcome.scalars, self._context.labelled
        self._context.measured |= {
            f"step_{EXPORTED.get(name, name)}": scalars[name] for name in SCALARS if name in scalars
        }
        for name in PAIR_SCALARS:
            labelled[f"ratio_{name}", "pair"] = {
                pair: scalars[f"{prefix}_{name}"]
                for prefix, pair in PAIRS.items()
                if f"{prefix}_{name}" in scalars
            }
        labelled["rejected_ratio", "cause"] = {
            name.removeprefix("rej_"): value
            for name, value in scalars.items()
            if name.startswith("rej_")
        }
        labelled["cut_ratio", "cause"] = {name: scalars[name] for name in CUTS if name in scalars}
        labelled["ewma_resets", "cause"] = {
            name.removeprefix("ewma_resets_"): value
            for name, value in scalars.items()
            if name.startswith("ewma_resets_")
        }
        for name in BY_MINIBATCH:
            values = outcome.arrays.get(f"minibatch_{name}", ())
            labelled[f"minibatch_{EXPORTED.get(name, name)}", "minibatch"] = {
                str(number): float(value)
                for number, value in enumerate(values)
                if math.isfinite(value)
            }
        for name in SHADOW_SCALARS:
            found = {r: scalars.get(f"shadow_{r}_{name}") for r in self._shadows}
            if any(value is not None for value in found.values()):
                labelled[f"shadow_{EXPORTED.get(name, name)}", "route"] = {
                    route: value for route, value in found.items() if value is not None
                }
        ages = outcome.arrays.get("age_tokens")
        if ages is not None:
            labelled["tokens", "age"] = _by_age(ages, np.ones_like(ages))
            labelled["k3_discrepancy", "age"] = _by_age(outcome.arrays["age_k3_d"], ages)
            labelled["k3_staleness", "age"] = _by_age(outcome.arrays["age_k3_s"], ages)

    def _show_guards(self) -> None:
        self._context.labelled["guard", "name"] = {
            name: float(raised) for name, raised in self._guards.raised.items()
        }

    def _log(self, change: GuardChange, version: int, scalars: Mapping[str, float]) -> None:
        if not change.raised:
            self._context.log.info("guard_lowered", guard=change.name, version=version)
            return
        shown = ("noise_floor", "d_abs_log_max", "sampler_abs_log_d", "fresh_abs_log_d")
        self._context.log.warning(
            "guard_raised",
            guard=change.name,
            version=version,
            reason=GUARDS[change.name],
            **{name: scalars[name] for name in shown if name in scalars},
        )


def _truncated_tokens(sequences: Sequence[TokenSequence]) -> int:
    """Count sampled tokens whose turn was drawn with top_p or top_k."""
    return sum(
        int(sequence.loss_mask.numpy()[turn.start : turn.stop].sum())
        for sequence in sequences
        for turn in sequence.turns
        if turn.sampling is not None and (turn.sampling.top_p < 1 or turn.sampling.top_k)
    )


def _by_age(
    sums_A: npt.NDArray[np.floating], counts_A: npt.NDArray[np.floating]
) -> dict[str, float]:
    return {
        str(age): float(total / count)
        for age, (total, count) in enumerate(zip(sums_A, counts_A, strict=True))
        if count > 0
    }
