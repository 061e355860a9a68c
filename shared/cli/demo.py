"""`lagwise demo`: a fresh run, a rollout killed with -9 in the middle, an audit, a verdict."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from shared.cli.config_cmd import read
from shared.cli.run_folder import Facts
from shared.cli.session import Request, Running, run_session
from shared.cli.supervision import Finished

DEFAULT_CONFIG = Path("examples/frozen_lake/values.yaml")
KILL_AT = 0.45
"""Share of the run's versions after which a rollout is killed."""

AUDITED_TOKENS = 2400


def kill_version(versions: int) -> int:
    """Return the published version at which the kill comes."""
    return max(1, math.floor(KILL_AT * versions))


async def kill_a_rollout(running: Running) -> None:
    """Kill the last live rollout once the middle of the run is reached."""
    due = kill_version(running.versions)
    while not running.supervisor.stopping:
        pods = sorted(running.supervisor.pods("rollout"))
        if running.progress.version >= due and pods:
            running.supervisor.kill(pods[-1], version=running.progress.version)
            return
        await asyncio.sleep(0.05)


def run_demo(
    *,
    config: Path,
    overrides: Sequence[str],
    run_dir: Path,
    kill: bool,
    as_json: bool,
    command: list[str],
) -> int:
    """Run the demo and print the verdict; return the exit code.

    Raises:
        ConfigError: bad input.
    """
    out = sys.stderr if as_json else sys.stdout
    request = Request(
        values=read(config, overrides),
        run_dir=run_dir,
        title="lagwise demo",
        command=command,
        fresh=True,
    )
    beside = [kill_a_rollout] if kill else []
    finished, facts = asyncio.run(run_session(request, out, beside))
    if finished.code:
        sys.stderr.write(f"lagwise: the run stopped: {finished.reason}\n")
        return finished.code
    summary = conclude(run_dir, facts, audited_tokens=AUDITED_TOKENS, out=out)
    if as_json:
        print(json.dumps(summary, indent=2))
    return 0 if summary["ok"] else 1


def conclude(run_dir: Path, facts: Facts, *, audited_tokens: int, out: TextIO) -> Mapping[str, Any]:
    """Audit (unless 0 tokens), write summary and report, print the verdict."""
    from shared.cli import audit, report, summary

    if audited_tokens:
        out.write(f"auditing {audited_tokens:,} trained tokens...\n")
        out.flush()
        audit.save(audit.run(run_dir, tokens=audited_tokens), run_dir)
    facts.write()
    facts_of_run = summary.write(run_dir)
    page = report.write(run_dir)
    out.write(verdict(facts_of_run, page) + "\n")
    return facts_of_run


def verdict(summary: Mapping[str, Any], page: Path) -> str:
    """Return the last lines of a run."""
    lines = [
        _success(summary),
        f"old logits: {_share(summary.get('old_logits_exact_ratio'))} exact; {_audited(summary)}",
        f"staleness mean {_rate(summary.get('staleness_mean'))},"
        f" max {summary.get('staleness_max')}; trajectories:"
        f" {summary.get('trajectories_issued')} issued,"
        f" {summary.get('trajectories_trained')} trained,"
        f" {summary.get('trajectories_lost')} lost,"
        f" {summary.get('trajectories_duplicated')} duplicated",
        f"{_seconds(summary.get('wall_s'))} in all"
        f" (installation {_seconds(summary.get('install_s'))}), restarts"
        f" {summary.get('restarts')}",
        f"report: {page}",
    ]
    problems = [f"  - {problem}" for problem in summary["problems"]]
    head = "OK: it learned, and nothing was lost" if summary["ok"] else "NOT OK:"
    return "\n".join([*lines, head, *problems])


def _success(summary: Mapping[str, Any]) -> str:
    """Return how success rose; with several samples per task as avg@k and pass@k."""
    k = summary.get("eval_samples", 1)
    change = f"{_rate(summary.get('success_base'))} -> {_rate(summary.get('success_final'))}"
    lift = _interval(summary.get("success_lift_ci"))
    if k == 1:
        return (
            f"success {change} on held-out maps"
            f" (lift {lift}, {summary.get('eval_episodes')} episodes)"
        )
    passes = f"{_rate(summary.get('pass_at_k_base'))} -> {_rate(summary.get('pass_at_k_final'))}"
    return (
        f"avg@{k} {change} (lift {lift}), pass@{k} {passes}"
        f" (lift {_interval(summary.get('pass_at_k_lift_ci'))})"
        f" on {summary.get('eval_episodes')} held-out tasks"
    )


def _audited(summary: Mapping[str, Any]) -> str:
    if summary.get("audit_stamp_tokens") and not summary.get("audited_tokens"):
        routes = ", ".join(summary["old_logprobs_routes"])
        return (
            f"{routes} is an approximation, nothing to rescore;"
            f" {summary['audit_stamp_tokens']:,} stamps checked"
        )
    return (
        f"{summary.get('audited_tokens', 0):,} tokens rescored,"
        f" {summary.get('audit_mismatches')} mismatches"
        f" (controls: {summary.get('audit_control_mismatches')})"
    )


def resume_hint(finished: Finished, run_dir: Path, config: Path) -> str:
    """Return what to say when a run stopped before its end."""
    again = f"lagwise up --config {config} --run-dir {run_dir} --resume"
    return f"stopped: {finished.reason}. Nothing is lost; go on with: {again}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.4g} %"


def _seconds(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0f} s"


def _interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"
