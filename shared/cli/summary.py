"""`summary.json`: what a run did, in numbers that anyone can recount from its archive."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from shared.algo.pass_at_k import pass_at_k
from shared.cli.archive import archive_dir
from shared.cli.audit import AuditResult
from shared.cli.ledger import Ledger, of_run
from shared.cli.records import RunRecords, load
from shared.cli.time_use import busy_shares, lives, rate
from shared.wire.journal import Evaluated, JournalBody, RunStarted

LEARNED_LIFT = 0.20
"""Paired lift in success from which a run counts as having learned, its interval above 0."""

GENERATED_COUNTERS = ("sampled_tokens", "tokens_sampled")
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Lift:
    """Success before and after, paired by task."""

    episodes: int
    """Tasks played in both evaluations."""
    base: float
    final: float
    lift: float
    low: float
    high: float
    """Bounds of the 95 % bootstrap interval of the lift."""

    @property
    def learned(self) -> bool:
        return self.lift >= LEARNED_LIFT and self.low > 0


def write(run_dir: Path, *, audit: AuditResult | None = None) -> dict[str, Any]:
    """Write `summary.json` and return it.

    `sound`: nothing was lost, duplicated, too old or inexact, and held-out tasks were held out.
    `learned`: success rose (null without evaluations). `ok`: both, and an audit that was made
    agrees. An earlier `audit.json` is used as long as the run has not gone on since.

    Raises:
        ConfigError: the folder holds no archive.
    """
    records = load(run_dir)
    ledger = of_run(records)
    summary = summarise(records, ledger, audit or read_audit(run_dir))
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def summarise(records: RunRecords, ledger: Ledger, audit: AuditResult | None) -> dict[str, Any]:
    """Return the summary; pure."""
    lift = paired_lift(records.bodies)
    samples = int(records.setting("learner.eval.samples", 1))
    passes = passes_lift(
        records.bodies, samples, float(records.setting("learner.eval.success_reward", 1.0))
    )
    overlap = num_shared_tasks(records)
    processes = lives(records.leases)
    unsound = [
        *ledger.problems,
        *(
            problem
            for problem in (audit.problems if audit else ())
            if problem not in ledger.problems
        ),
        *(f"{text}: {count} payloads" for text, count in records.unreadable.items()),
        *([f"{overlap} evaluation tasks were trained on (equal content)"] if overlap else []),
    ]
    problems = [*unsound, *_not_learned(records, lift)]
    return {
        "ok": not problems,
        "sound": not unsound,
        "learned": lift.learned if lift else None,
        "problems": problems,
        "run": records.setting("run.name", records.run_dir.name),
        "seed": _seed(records),
        "install_s": records.facts.get("install_s"),
        "wall_s": records.facts.get("wall_s"),
        "policy_versions": len(records.manifests),
        "optimizer_steps": max((m.optimizer_steps for m in records.manifests.values()), default=0),
        "tokens_trained": ledger.tokens_trained,
        "success_base": lift.base if lift else None,
        "success_final": lift.final if lift else None,
        "success_lift": lift.lift if lift else None,
        "success_lift_ci": [lift.low, lift.high] if lift else None,
        "eval_episodes": lift.episodes if lift else 0,
        "eval_samples": samples,
        "pass_at_k_base": passes.base if passes else None,
        "pass_at_k_final": passes.final if passes else None,
        "pass_at_k_lift": passes.lift if passes else None,
        "pass_at_k_lift_ci": [passes.low, passes.high] if passes else None,
        "eval_tasks_seen_in_training": overlap,
        "staleness_max": ledger.staleness_max,
        "staleness_mean": ledger.staleness_mean,
        "staleness_bound": int(records.setting("admission.max_staleness", 4)),
        "old_logprobs_routes": list(dict.fromkeys(ledger.routes.values())),
        "old_logits_exact_ratio": ledger.exact_ratio,
        "audited_tokens": audit.audited_tokens if audit else 0,
        "audit_mismatches": audit.mismatches if audit else None,
        "audit_max_error": audit.max_error if audit else None,
        "audit_control_tokens": audit.control_tokens if audit else None,
        "audit_control_mismatches": audit.control_mismatches if audit else None,
        "audit_control_ratio": audit.control_ratio if audit else None,
        "audit_sampler_mismatches": audit.sampler_mismatches if audit else None,
        "audit_sampler_ratio": audit.sampler_ratio if audit else None,
        "audit_stamp_tokens": audit.stamp_tokens if audit else 0,
        **{f"trajectories_{name}": count for name, count in asdict(ledger.training).items()},
        "evaluation": asdict(ledger.evaluation),
        "restarts": num_restarts(records.facts),
        "kills": len(records.facts.get("kills") or ()),
        "tokens_per_s_generated": rate(processes, "rollout", *GENERATED_COUNTERS),
        "tokens_per_s_trained": _trained_rate(records, ledger),
        "time_share": busy_shares(processes),
        "peak_memory_bytes": records.facts.get("peak_pss_bytes"),
        "oracle_forward_ratio": _forward_ratio(records),
        "dead_letters": records.num_dead_letters,
        "package_versions": records.facts.get("versions", {}),
    }


def read_audit(run_dir: Path) -> AuditResult | None:
    """Return the audit saved in the run folder, None when there is none of its present journal."""
    path = run_dir / "audit.json"
    journal = archive_dir(run_dir) / "journal.bin"
    if not path.is_file() or path.stat().st_mtime_ns < journal.stat().st_mtime_ns:
        return None
    return AuditResult.of_dict(json.loads(path.read_text()))


def _not_learned(records: RunRecords, lift: Lift | None) -> list[str]:
    if lift is None:
        asked = int(records.setting("learner.eval.episodes", 0))
        return ["no base and final evaluation to compare"] if asked else []
    if lift.learned:
        return []
    return [
        f"it did not learn: lift {lift.lift:+.3f} (95 % {lift.low:+.3f} to {lift.high:+.3f}), "
        f"needed {LEARNED_LIFT:+.2f} and an interval above 0"
    ]


def paired_lift(bodies: Iterable[JournalBody], *, seed: int = 0) -> Lift | None:
    """Return success of the `final` against the `base` evaluation, None without both.

    Pairs by task index, samples of one task averaged; the interval is a percentile bootstrap over
    tasks.
    """
    return _paired(bodies, lambda rewards: sum(rewards) / len(rewards), 1, seed)


def passes_lift(
    bodies: Iterable[JournalBody], samples: int, success: float, *, seed: int = 0
) -> Lift | None:
    """Return the same for pass@k, k = `samples`; None also where k is 1: then it is success.

    Args:
        bodies: of the journal.
        samples: k; a task that was played less often is left out.
        success: a reward from here on is a success.
        seed: of the bootstrap.
    """
    if samples == 1:
        return None

    def chance(rewards: list[float]) -> float:
        return pass_at_k(len(rewards), sum(r >= success for r in rewards), samples)

    return _paired(bodies, chance, samples, seed)


def _paired(
    bodies: Iterable[JournalBody], figure: Callable[[list[float]], float], least: int, seed: int
) -> Lift | None:
    """Return the lift of a figure of one task's rewards, over tasks with at least `least`."""
    figures: dict[str, dict[int, float]] = {}
    for body in bodies:
        if isinstance(body, Evaluated) and body.name in ("base", "final"):
            samples: dict[int, list[float]] = {}
            for index, reward in zip(body.task_indices, body.rewards, strict=True):
                samples.setdefault(index, []).append(reward)
            figures[body.name] = {i: figure(r) for i, r in samples.items() if len(r) >= least}
    common = sorted(figures.get("base", {}).keys() & figures.get("final", {}).keys())
    if not common:
        return None
    base = np.array([figures["base"][index] for index in common])
    final = np.array([figures["final"][index] for index in common])
    low, high = bootstrap_mean(final - base, seed=seed)
    return Lift(
        episodes=len(common),
        base=float(base.mean()),
        final=float(final.mean()),
        lift=float((final - base).mean()),
        low=low,
        high=high,
    )


def bootstrap_mean(values: npt.NDArray[np.float64], *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean."""
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    # Resampling n values with replacement = a multinomial over the distinct ones: few for rewards.
    draws = rng.multinomial(len(values), counts / len(values), size=_RESAMPLES)
    low, high = np.quantile(draws @ distinct / len(values), [0.025, 0.975])
    return float(low), float(high)


def num_shared_tasks(records: RunRecords) -> int:
    """Count evaluation tasks whose content was also played in training."""
    by_purpose: dict[str, set[str]] = {"train": set(), "eval": set()}
    for facts in records.terminals.values():
        if facts.task_digest:
            by_purpose[facts.purpose].add(facts.task_digest)
    return len(by_purpose["train"] & by_purpose["eval"])


def num_restarts(facts: dict[str, Any]) -> int:
    """Return how often the supervisor restarted a process."""
    restarts = cast("dict[str, int] | int", facts.get("restarts") or 0)
    return restarts if isinstance(restarts, int) else sum(restarts.values())


def _seed(records: RunRecords) -> int:
    started = next((b for b in records.bodies if isinstance(b, RunStarted)), None)
    return started.seed if started else int(records.setting("run.seed", 0))


def _trained_rate(records: RunRecords, ledger: Ledger) -> float:
    if not records.steps:
        return 0.0
    reports = records.steps.values()
    wall_s = max(r.published_at for r in reports) - min(r.started_at for r in reports)
    return ledger.tokens_trained / wall_s if wall_s > 0 else 0.0


def _forward_ratio(records: RunRecords) -> float | None:
    """Return the oracle's r: tokens forwarded per token of the trajectories it scored."""
    scored = [score for score in records.scores.values() if score.forward_tokens]
    lengths = [
        records.terminals[score.terminal_seq].length
        for score in scored
        if score.terminal_seq in records.terminals
    ]
    return sum(score.forward_tokens for score in scored) / sum(lengths) if lengths else None
