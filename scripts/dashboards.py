"""`python scripts/dashboards.py --check|--write`: the Grafana dashboards, as code.

The chart ships the JSON files; `tests/charts/test_dashboards.py` runs every expression against a
real Prometheus. Needs the extra `chart` (grafana-foundation-sdk).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

from shared.cli.generated import Render, command

FOLDER = Path("charts/lagwise/dashboards")
WHO = 'release="$release",namespace="$namespace"'
SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
HALF, HEIGHT = 12, 7


@dataclass(frozen=True)
class Panel:
    """One graph: expressions by legend; WHO stands for the release."""

    title: str
    unit: str
    why: str
    lines: dict[str, str]


def rate(metric: str, by: str = "") -> str:
    """Return the summed rate of a counter of the release."""
    return f"sum {f'by ({by}) ' if by else ''}(rate({metric}{{{WHO}}}[$__rate_interval]))"


def of(metric: str, labels: str = "") -> str:
    """Return a metric of the release."""
    return f"{metric}{{{WHO}{',' if labels else ''}{labels}}}"


def of_any_role(what: str) -> str:
    """Return the rate of a counter that every role has, by role."""
    names = f'__name__=~"lagwise_.+_{what}_total"'
    return f"sum by (component) (rate({{{names},{WHO}}}[$__rate_interval]))"


def per_swap(metric: str) -> str:
    """Return seconds per swap of weights."""
    return f"{rate(metric)} / {rate('lagwise_rollout_swaps_total')}"


STREAM_SHARE = (
    f"{of('lagwise_learner_stream_bytes')} / on (release, namespace) group_left "
    f"max by (release, namespace) ({of('lagwise_learner_stream_limit_bytes')})"
)

TRAINING: dict[str, list[Panel]] = {
    "Progress": [
        Panel(
            "Policy version",
            "short",
            "What each role holds; the gap is what followers lag.",
            {
                "learner": of("lagwise_learner_policy_version"),
                "rollout {{pod}}": of("lagwise_rollout_policy_version"),
                "oracle {{pod}}": of("lagwise_logit_oracle_policy_version"),
            },
        ),
        Panel(
            "Trained",
            "short",
            "Per second.",
            {
                "trajectories": rate("lagwise_learner_trained_trajectories_total"),
                "tokens": rate("lagwise_learner_trained_tokens_total"),
                "versions": rate("lagwise_learner_versions_total"),
            },
        ),
        Panel(
            "Busy shares",
            "percentunit",
            "Self-measured work over wall time.",
            {
                "learner": of("lagwise:learner_busy:ratio"),
                "rollouts": of("lagwise:rollout_busy:ratio"),
                "oracles": of("lagwise:logit_oracle_busy:ratio"),
            },
        ),
        Panel(
            "Groups",
            "short",
            "Issued and not finished; complete and waiting for a step.",
            {
                "outstanding": of("lagwise_learner_outstanding_groups"),
                "ready": of("lagwise_learner_ready_groups"),
                "unscored trajectories": of("lagwise_learner_unscored_trajectories"),
            },
        ),
    ],
    "Off-policyness": [
        Panel(
            "Staleness (versions)",
            "short",
            "Of trained tokens, against the bound.",
            {
                "mean": of("lagwise_learner_step_staleness_mean"),
                "max": of("lagwise_learner_step_staleness_max"),
                "bound": of("lagwise_learner_staleness_bound"),
            },
        ),
        Panel(
            "Exact old log-probs",
            "percentunit",
            "1 on an exact route, or an alert.",
            {
                "exact": of("lagwise_learner_step_old_logits_exact_ratio"),
            },
        ),
        Panel(
            "k3 of the discrepancy by age",
            "short",
            "Flat when old log-probs are exact.",
            {
                "age {{age}}": of("lagwise_learner_k3_discrepancy"),
            },
        ),
        Panel(
            "k3 of the staleness ratio by age",
            "short",
            "Grows with age: that is staleness.",
            {
                "age {{age}}": of("lagwise_learner_k3_staleness"),
            },
        ),
        Panel(
            "Effective sample size",
            "percentunit",
            "Of each ratio.",
            {
                "{{pair}}": of("lagwise_learner_ratio_ess_ratio"),
            },
        ),
        Panel(
            "Rejected and cut",
            "percentunit",
            "Tokens masked on D, cut on S, by cause.",
            {
                "rejected {{cause}}": of("lagwise_learner_rejected_ratio"),
                "cut {{cause}}": of("lagwise_learner_cut_ratio"),
            },
        ),
    ],
    "Optimisation": [
        Panel(
            "Loss and gradient",
            "short",
            "Of the last step.",
            {
                "loss": of("lagwise_learner_step_loss"),
                "gradient norm": of("lagwise_learner_step_grad_norm"),
            },
        ),
        Panel(
            "Entropy",
            "short",
            "Mean per token, nats.",
            {
                "entropy": of("lagwise_learner_step_entropy_mean"),
            },
        ),
        Panel("Learning rate", "sci", "Of the last step.", {"lr": of("lagwise_learner_step_lr")}),
        Panel("Guards", "short", "1 while raised.", {"{{name}}": of("lagwise_learner_guard")}),
    ],
}

SYSTEM: dict[str, list[Panel]] = {
    "Scaling": [
        Panel(
            "Rollouts wanted and serving",
            "short",
            "The autoscaler's signal.",
            {
                "wanted": of("lagwise_rollout_wanted"),
                "serving": of("lagwise:rollout_serving:pods"),
            },
        ),
        Panel(
            "Demand and supply",
            "short",
            "Tokens/s the learner would take; tokens per busy second of a rollout.",
            {
                "demand": of("lagwise:learner_demand:tokens_per_second"),
                "supply of one": of("lagwise:rollout_supply:tokens_per_busy_second"),
            },
        ),
        Panel(
            "Env agents wanted",
            "short",
            "Places for every ticket.",
            {
                "wanted": of("lagwise_env_agents_wanted"),
            },
        ),
        Panel(
            "Oracles wanted",
            "short",
            "At 70 % busy.",
            {
                "wanted": of("lagwise_logit_oracle_wanted"),
            },
        ),
    ],
    "Rollouts": [
        Panel(
            "Sampled tokens",
            "short",
            "Per second and pod.",
            {
                "{{pod}}": rate("lagwise_rollout_sampled_tokens_total", "pod"),
            },
        ),
        Panel(
            "Requests",
            "short",
            "In the engine and waiting.",
            {
                "running {{pod}}": of("lagwise_rollout_running"),
                "waiting {{pod}}": of("lagwise_rollout_waiting"),
            },
        ),
        Panel(
            "KV cache used",
            "percentunit",
            "By pod.",
            {
                "{{pod}}": of("lagwise_rollout_kv_used_ratio"),
            },
        ),
        Panel(
            "Weight swaps",
            "s",
            "Seconds per swap; publication to use.",
            {
                "swap": per_swap("lagwise_rollout_swap_seconds_total"),
                "lag": per_swap("lagwise_rollout_sync_lag_seconds_total"),
            },
        ),
    ],
    "Env agents": [
        Panel(
            "Episodes",
            "short",
            "Running; finished per second.",
            {
                "running {{pod}}": of("lagwise_env_agents_episodes_running"),
                "finished": rate("lagwise_env_agents_episodes_total"),
            },
        ),
        Panel(
            "Retries",
            "short",
            "Per second.",
            {
                "asked again": rate("lagwise_env_agents_sample_retries_total"),
                "turns resumed": rate("lagwise_env_agents_resumed_turns_total"),
            },
        ),
    ],
    "Logit oracle": [
        Panel(
            "Work",
            "short",
            "Tokens per second.",
            {
                "scored": rate("lagwise_logit_oracle_scored_tokens_total"),
                "forwarded": rate("lagwise_logit_oracle_forward_tokens_total"),
            },
        ),
        Panel(
            "Backlog",
            "short",
            "Parts queued; trajectories held.",
            {
                "backlog {{pod}}": of("lagwise_logit_oracle_backlog"),
                "in flight {{pod}}": of("lagwise_logit_oracle_in_flight"),
            },
        ),
        Panel(
            "Canaries",
            "short",
            "Per second.",
            {
                "checked": rate("lagwise_logit_oracle_canary_checks_total"),
                "failed": rate("lagwise_logit_oracle_canary_failures_total"),
            },
        ),
        Panel(
            "History",
            "bytes",
            "Weights held.",
            {
                "memory {{pod}}": of("lagwise_logit_oracle_held_bytes"),
                "spilled {{pod}}": of("lagwise_logit_oracle_spilled_bytes"),
            },
        ),
    ],
    "Bus": [
        Panel(
            "Streams",
            "percentunit",
            "Of config.bus.max_stream_bytes; a full stream stops the run.",
            {
                "{{stream}}": STREAM_SHARE,
            },
        ),
        Panel(
            "Messages stored",
            "short",
            "By stream.",
            {
                "{{stream}}": of("lagwise_learner_stream_messages"),
            },
        ),
        Panel(
            "Trouble",
            "short",
            "Per second, by role.",
            {
                "redelivered to {{component}}": of_any_role("bus_redeliveries"),
                "dead letters of {{component}}": of_any_role("dead_letters"),
            },
        ),
        Panel(
            "Memory",
            "bytes",
            "Resident, by pod.",
            {
                "{{pod}}": of("process_resident_memory_bytes"),
            },
        ),
    ],
}


def build(uid: str, title: str, rows: dict[str, list[Panel]]) -> str:
    """Return a dashboard as JSON."""
    board = (
        Dashboard(title)
        .uid(uid)
        .tags(["lagwise"])
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(DatasourceVariable("datasource").type("prometheus"))
        .with_variable(variable("namespace", "label_values(lagwise_learner_ready, namespace)"))
        .with_variable(
            variable(
                "release", 'label_values(lagwise_learner_ready{namespace="$namespace"}, release)'
            )
        )
    )
    for name, panels in rows.items():
        board = board.with_row(Row(name))
        for panel in panels:
            board = board.with_panel(graph(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(board.build()) + "\n"


def variable(name: str, query: str) -> QueryVariable:
    """Return a choice that a query fills."""
    return (
        QueryVariable(name)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
    )


def graph(panel: Panel) -> timeseries.Panel:
    """Return one panel."""
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.why)
        .unit(panel.unit)
        .datasource(SOURCE)
        .span(HALF)
        .height(HEIGHT)
    )
    if panel.unit == "percentunit":
        built = built.min(0)
    for legend, expr in panel.lines.items():
        built = built.with_target(prometheus.Dataquery().expr(expr).legend_format(legend))
    return built


FILES: dict[Path, Render] = {
    FOLDER / "training.json": lambda _: build("lagwise-training", "Lagwise: training", TRAINING),
    FOLDER / "system.json": lambda _: build("lagwise-system", "Lagwise: system", SYSTEM),
}

if __name__ == "__main__":
    sys.exit(command("scripts.dashboards", FILES))
