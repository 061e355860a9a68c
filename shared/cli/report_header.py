"""The report's first lines: verdict, figures at a glance, configuration."""

from __future__ import annotations

import time
from typing import Any

import yaml

from shared.cli.records import RunRecords
from shared.cli.report_data import evaluations, start_of
from shared.cli.report_panels import Context, size_text


def header(records: RunRecords, s: dict[str, Any]) -> Context:
    """Verdict, tiles, configuration."""
    kills = len(records.facts.get("kills") or ())
    wall = s.get("wall_s")
    parts = [f"{_seconds(wall)} on one machine" if wall else ""]
    parts += [_count(kills, "kill −9"), _count(s["restarts"], "restart", "restarts")]
    parts += [f"installation {_seconds(s['install_s'])} apart" if s.get("install_s") else ""]
    tiles = [
        (_arrow(s["success_base"], s["success_final"]), f"success, {s['eval_episodes']} held-out"),
        _audited(s),
        (_percent(s["old_logits_exact_ratio"]), "old logits exact"),
        (f"{s['trajectories_lost']} / {s['trajectories_duplicated']}", "lost / duplicated"),
        (f"{s['staleness_mean']:.2f}, max {s['staleness_max']}",
         f"staleness in versions, bound {s['staleness_bound']}"),
        (f"{s['policy_versions']:,}", f"versions, {s['optimizer_steps']:,} optimizer steps"),
        (f"{s['tokens_per_s_trained']:,.0f}/s", f"tokens trained, {s['tokens_trained']:,} in all"),
        (size_text(s.get("peak_memory_bytes")), "peak memory, summed PSS"),
    ]  # fmt: skip
    return {
        "title": f"Lagwise: {s['run']}",
        "verdict": _verdict(s),
        "subtitle": " · ".join(part for part in parts if part),
        "started": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(start_of(records))),
        "tiles": tiles,
        "config": yaml.safe_dump(records.values, sort_keys=False) if records.values else "-",
        "success_reading": _success_reading(records, s),
        "footer": f"Written from {records.run_dir}/archive. Log-probs in nats.",
    }


def _verdict(s: dict[str, Any]) -> str:
    if not s["sound"]:
        return "Not sound: " + s["problems"][0]
    exact = "not audited yet"
    if s["audited_tokens"]:
        exact = "every audited token was trained with its own version's log-prob"
    elif s["audit_stamp_tokens"]:
        exact = f"trained on {', '.join(s['old_logprobs_routes'])}, an approximation"
    whole = "nothing was lost or trained twice"
    if s["learned"] is None:
        return f"Sound: {exact}, {whole}."
    verb = "It learned" if s["learned"] else "It did not learn"
    return f"{verb}: success {_arrow(s['success_base'], s['success_final'])}; {exact}; {whole}."


def _audited(s: dict[str, Any]) -> tuple[str, str]:
    if s["audited_tokens"]:
        return f"{s['audit_mismatches']} of {s['audited_tokens']:,}", "audited tokens mismatch"
    if s["audit_stamp_tokens"]:
        return f"{s['audit_stamp_tokens']:,}", "tokens whose stamp was checked"
    return "not audited", "audited tokens mismatch"


def _success_reading(records: RunRecords, s: dict[str, Any]) -> str:
    final = [e for e in evaluations(records) if e.name == "final"]
    text = "Dots: success of the trajectories each version was trained on; line: their moving mean."
    if s["success_lift_ci"] and final:
        low, high = s["success_lift_ci"]
        text += (
            f" Points: {final[-1].episodes} held-out episodes with 95 % intervals. Paired lift "
            f"{s['success_lift']:+.3f} ({low:+.3f} to {high:+.3f}); "
            f"{s['eval_tasks_seen_in_training']} of the held-out tasks occurred in training."
        )
    return text


def _arrow(base: float | None, final: float | None) -> str:
    if base is None or final is None:
        return "–"
    return f"{base:.2f} → {final:.2f}"


def _percent(ratio: float) -> str:
    # 100 % only when it is: 0.99996 must not round up to it.
    return "100 %" if ratio == 1.0 else f"{min(100 * ratio, 99.99):.2f} %"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one}" if number else ""


def _seconds(value: float) -> str:
    return f"{value:.0f} s"
