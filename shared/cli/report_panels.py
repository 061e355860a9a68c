"""The words and tables of the report: each panel's reading, with its numbers."""

from __future__ import annotations

import shlex
from typing import Any, cast

import numpy as np

from shared.cli.audit import AuditResult
from shared.cli.ledger import Ledger
from shared.cli.records import RunRecords
from shared.cli.report_data import (
    Cloud,
    Regions,
    cloud,
    pooled,
    regions,
    series,
    steps,
)
from shared.cli.report_system import ROLE_COLOURS
from shared.cli.time_use import Life, lives, total
from shared.runtime.sections import EXACT_ROUTES

Context = dict[str, Any]

_BOOKS = (
    ("trained", "blue"), ("dropped", "amber"), ("failed", "violet"), ("unfinished", "muted"),
    ("lost", "red"),
)  # fmt: skip
_COUNTERS = {
    "learner": ("versions", "trained_trajectories", "trained_tokens"),
    "rollout": ("sampled_tokens", "tokens_sampled", "prefill_tokens", "swaps", "interrupted_turns"),
    "env_agents": ("episodes", "env_steps", "failed_episodes", "resumed_turns", "sample_retries"),
    "logit_oracle": ("trajectories", "scored_tokens", "moves", "canary_checks"),
}


def exactness(audit: AuditResult | None) -> Context:
    """The audit's counts."""
    promise = (
        "Every old log-prob must be the one that the sampled token's own policy version gives. The "
        "audit rescores random trained tokens with a float64 forward of its own, from the versions "
        "kept aside."
    )
    context: Context = {"exactness_reading": promise, "audit": None, "audit_reading": ""}
    if audit is None:
        return context
    if audit.stamp_tokens and not audit.audited_tokens:
        routes = ", ".join(route for route in audit.routes if route not in EXACT_ROUTES)
        context["exactness_reading"] = (
            f"Trained on {routes}, an approximation: no token was promised its own version's "
            "log-prob, and there is none to rescore. What can be checked is checked: the ledger, "
            "and the stamps, by the sampler's log-probs."
        )
        rms = [
            error**0.5
            for error in (
                audit.stamp_square_error,
                audit.stamp_square_error_before,
                audit.stamp_square_error_after,
            )
        ]
        context["audit_reading"] = (
            f"Over {audit.stamp_tokens:,} tokens the sampler's log-probs are {rms[0]:.1e} nats "
            f"(rms) from the stamped version, {rms[1]:.1e} from the one before and {rms[2]:.1e} "
            "from the one after."
        )
        return context
    rows = [
        ("its own version", audit.mismatches, audit.audited_tokens, "red"),
        ("the version before (control)", audit.control_mismatches, audit.control_tokens, "muted"),
        ("the sampler (control)", audit.sampler_mismatches, audit.audited_tokens, "muted"),
    ]
    return context | {
        "audit": [
            {
                "name": name, "mismatches": f"{count:,}", "of": f"{of:,}", "colour": colour,
                "share": count / of if of else 0.0,
            }
            for name, count, of, colour in rows
        ],
        "audit_reading": (
            f"Largest error {audit.max_error:.1e} nats over {audit.trajectories:,} trajectories "
            f"and {audit.versions:,} versions; a mismatch is more than {audit.tolerance:.0e}. "
            f"The median error is {audit.control_median_error:.1e} under the version before and "
            f"{audit.sampler_median_error:.1e} for the sampler's log-probs: this audit could "
            "have failed."
        ),
    }  # fmt: skip


def corrections(records: RunRecords) -> Context:
    """What the scatter shows and how much was rejected or clipped."""
    region, tokens = regions(records), cloud(records)
    exact = tokens is not None and tokens.exact
    reports = steps(records)
    shown = [
        ("rejected by the mask", "rej_any"),
        ("outside the clip on arrival", "clipped_on_arrival"),
        ("clipped with advantage > 0", "clip_high"),
        ("clipped with advantage < 0", "clip_low"),
    ]
    fractions = [
        f"{np.nanmean(values):.2%} {name}"
        for name, key in shown
        if np.isfinite(values := series(reports, key)).any()
    ]
    mask = region.mask
    mask_text = f"{np.exp(mask[0]):.3g} ≤ D ≤ {np.exp(mask[1]):.3g}" if mask else "any D"
    return {
        "region": region,
        "strip": mask is not None and exact,
        "mask_text": mask_text,
        "clip_text": f"{np.exp(region.clip[0]):.3g} ≤ S ≤ {np.exp(region.clip[1]):.3g}",
        "strip_text": mask_text.replace("D", "D·S"),
        "fractions": f"Of loss tokens, {', '.join(fractions)}." if fractions else "",
        "scatter_reading": _scatter_reading(tokens, region) if tokens else "",
        "scatter_of": "with exact old logits"
        if exact
        else f"under {tokens.route if tokens else ''}",
    }


def _scatter_reading(tokens: Cloud, region: Regions) -> str:
    if not tokens.exact:
        return (
            f"D and S as {tokens.route} has them, not the exact ones: no exact shadow looked on "
            "(old_logprobs.shadow: [snapshot_old]), so that what it masks and clips wrongly "
            "cannot be told here."
        )
    both, rectangle, strip = tokens.kept(region)
    whose = "" if tokens.route else " Exact D and S by a shadow; the run trained on another route."
    return (
        "With exact old logits the mask bounds only the discrepancy D between two engines and "
        "the clip only the staleness S between two versions: a rectangle. Without them the "
        "mask sees D·S, the diagonal strip, so that a stale token is rejected as if it were "
        "noise, while the clip starts from S = 1 at every step and holds nothing back. Of these "
        f"tokens {both:.1%} lie in both, {rectangle:.1%} in the rectangle alone and {strip:.1%} in "
        f"the strip alone.{whose}"
    )


def distributions(records: RunRecords, ledger: Ledger) -> Context:
    """Staleness and lengths in words."""
    bound = int(records.setting("admission.max_staleness", 4))
    kept = "never above the bound" if ledger.staleness_max <= bound else "ABOVE THE BOUND"
    reports = steps(records)
    dispatched, trained = (
        pooled(reports, name) for name in ("dispatched_lengths", "trained_lengths")
    )
    reading = ""
    if len(dispatched) and len(trained):
        ratio = trained.mean() / dispatched.mean()
        bias = "short" if ratio < 1 else "long"
        bias = "no bias towards short episodes" if abs(ratio - 1) < 0.03 else f"a bias: {bias} ones"
        reading = f"Trained trajectories are ×{ratio:.3f} as long as dispatched ones: {bias}."
    return {
        "staleness_reading": (
            f"Mean {ledger.staleness_mean:.2f}, largest {ledger.staleness_max}, {kept} of {bound}: "
            "counted per token from the engine's stamps."
        ),
        "lengths_reading": reading,
    }


def time_use(records: RunRecords, s: dict[str, Any]) -> Context:
    """Busy shares by process."""
    every = lives(records.leases)
    rows: list[Context] = []
    for pod in dict.fromkeys(life.pod for life in every):
        own = [life for life in every if life.pod == pod]
        wall_s = sum(life.wall_s for life in own)
        busy_s = sum(life.busy_s for life in own)
        rows.append(
            {
                "pod": pod, "share": min(1.0, busy_s / wall_s) if wall_s else 0.0,
                "busy_s": busy_s, "lives": len(own), "did": _did(own),
                "colour": ROLE_COLOURS.get(own[0].role, "muted"),
            }
        )  # fmt: skip
    ratio = s.get("oracle_forward_ratio")
    oracle = (
        f" The oracle forwarded {ratio:.2f} tokens per trajectory token (r), "
        "off the learner's critical path."
        if ratio
        else ""
    )
    waits = series(steps(records), "wait_s")
    waited = f" The learner waited {np.nansum(waits):.1f} s for batches." if len(waits) else ""
    return {
        "processes": rows,
        "roles": [
            (role, ROLE_COLOURS.get(role, "muted"))
            for role in dict.fromkeys(life.role for life in every)
            if role in s["time_share"]
        ],
        "time_reading": (
            f"{s['tokens_per_s_generated']:,.0f} tokens/s generated, "
            f"{s['tokens_per_s_trained']:,.0f} tokens/s trained. Generation, scoring and training "
            f"overlap; busy is self-measured work over wall time.{oracle}{waited}"
        ),
    }


def ledger_rows(records: RunRecords, ledger: Ledger) -> Context:
    """The balance and what stands beside it."""
    counts = ledger.training
    books = [("issued", f"{counts.issued:,}", "ink")]
    books += [(name, f"{getattr(counts, name):,}", colour) for name, colour in _BOOKS]
    e = ledger.evaluation
    rows = [
        ("tokens in the loss", f"{ledger.tokens_trained:,}"),
        ("sampled tokens of trained trajectories, masked and zero-variance ones included",
         f"{ledger.tokens_admitted:,}"),
        ("… of these scored under their own, verified version", f"{ledger.tokens_exact:,}"),
        ("evaluation tickets: issued, evaluated, failed, open",
         f"{e.issued:,}, {e.evaluated:,}, {e.failed:,}, {e.open:,}"),
        *((f"failed or dropped: {cause}", f"{n:,}") for cause, n in ledger.drop_causes.items()),
        ("dead letters", f"{records.num_dead_letters:,}"),
    ]  # fmt: skip
    issued = max(1, counts.issued)
    return {
        "books": books,
        "duplicated": f"{counts.duplicated:,}",
        "book_shares": [(getattr(counts, name) / issued, colour) for name, colour in _BOOKS],
        "ledger_rows": rows,
    }


def weights(records: RunRecords) -> Context:
    """Bytes and seconds of publication and synchronisation."""
    manifests = list(records.manifests.values())
    full = [keyframe.num_bytes for _, keyframe in records.full_copies()]
    deltas = [m.delta.num_bytes for m in manifests if m.delta is not None]
    every = lives(records.leases)
    swaps = total(every, "rollout", "swaps")
    parts: list[str] = []
    if full:
        parts.append(f"A full copy is {size_text(float(np.median(full)))}")
    if deltas and full:
        share = float(np.median(deltas)) / float(np.median(full))
        parts.append(f"the median delta {size_text(float(np.median(deltas)))} ({share:.1%} of it)")
    seconds = series(steps(records), "publish_s")
    if np.isfinite(seconds).any():
        parts.append(f"publication takes {1e3 * float(np.nanmedian(seconds)):.0f} ms (median)")
    if swaps:
        lag = total(every, "rollout", "sync_lag_s") / swaps
        pause = total(every, "rollout", "swap_s") / swaps
        parts.append(
            f"a rollout samples with it {1e3 * lag:.0f} ms after its manifest, "
            f"pausing {1e3 * pause:.0f} ms"
        )
    return {"weights_reading": "; ".join(parts) + "." if parts else ""}


def reproduce(records: RunRecords) -> Context:
    """Commands, and the versions of the packages."""
    command = cast("list[str]", records.facts.get("command") or [])
    run_dir = shlex.quote(str(records.run_dir))
    commands = [shlex.join(command)] if command else []
    commands += [
        f"lagwise up --config {run_dir}/resolved.yaml --fresh   # the same configuration again",
        f"lagwise audit {run_dir}                               # count and rescore this run",
        f"lagwise report {run_dir}                              # write this page again",
    ]
    packages = cast("dict[str, str]", records.facts.get("versions") or {})
    return {
        "commands": commands,
        "packages": " · ".join(f"{name} {version}" for name, version in packages.items()),
    }


def _did(own: list[Life]) -> str:
    """What a process counted, in words; the rest stays in `leases.bin`."""
    sums = {
        name: sum(life.counted(name) for life in own) for name in _COUNTERS.get(own[0].role, ())
    }
    return ", ".join(f"{n:,.0f} {name.replace('_', ' ')}" for name, n in sums.items() if n)


def size_text(value: float | None) -> str:
    """Return bytes as text, a dash for None."""
    if value is None:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"
