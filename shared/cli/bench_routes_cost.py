"""What each route costs: every route asked about the same batches of one run, then extrapolated.

Measured: seconds on the learner's critical path, CPU-seconds in all, bytes. Extrapolated to the
paper's models: from forwarded tokens, loads and what is held, under `ASSUMED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from shared.cli.bench_routes_cells import APPROXIMATE, Cell, Setting, Size

EXACT_ROUTES = ("oracle", "snapshot_old", "interrupt")
COST_ROUTES = (*EXACT_ROUTES, *APPROXIMATE)


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the paper's cost table."""

    name: str
    parameters: float
    active: float
    """Parameters that one token passes."""
    paper: Mapping[str, tuple[float, float]]
    """Route -> (GB of CPU memory, extra seconds per step), arXiv 2605.12070."""


MODELS = (
    Model(
        "Qwen3-4B", 4.02e9, 4.02e9, {"snapshot_old": (40.0, 25.0), "ppo_ewma_async": (7.9, 8.0)}
    ),
    Model(
        "Qwen3-30B-A3B", 30.5e9, 3.3e9,
        {"snapshot_old": (76.4, 150.0), "ppo_ewma_async": (15.2, 34.0)},
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Assumed:
    """Of the extrapolation; none of it is measured here."""

    tokens_per_step: float = 1e6
    """Of the trained batch, prompts included."""
    flops: float = 8 * 0.4 * 989e12
    """Eight GPUs of 989 TFLOP/s at 40 %."""
    load_bytes_per_s: float = 25e9
    """Host to device, one link."""
    train_flops_per_forward: float = 3.0
    bytes_per_parameter: float = 2.0
    """bfloat16 weights."""
    delta_ratio: float = 0.0082
    """Bytes of one version's delta over those of the weights at lr 1e-6 (`docs/weights.md`)."""
    versions: int = 12
    """Held besides the full copy."""


ASSUMED = Assumed()


def cost_cell(seed: int = 4000) -> Cell:
    """One run that asks every route at every version, with the product's own groups."""
    shadows = tuple(name for name in COST_ROUTES if name != "oracle")
    return Cell("cost", "oracle", "mixed8", "int4", seed, Setting(), shadows=shadows)


def cost_size(size: Size) -> Size:
    """Every version measured; the groups without loss are scored too, as in the product."""
    return replace(size, versions=min(size.versions, 16), measure_every=1, lean=False)


def costs(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row per route from the run of `cost_cell`."""
    measured = result["costs"]
    scoring, tokens = measured["scoring"], measured["current_recompute"]["forward_tokens"]
    sampling_s, training_s = measured["sampling"]["cpu_s"], measured["training"]["cpu_s"]
    rows: list[dict[str, Any]] = []
    for name in COST_ROUTES:
        own = measured[name]
        critical_s, extra_s = own["critical_s"], own["cpu_s"]
        forward_tokens, loads, held = own["forward_tokens"], 0.0, own["held_bytes"]
        idle_s = 0.0
        match name:
            case "oracle":
                # The work of snapshot_old (history, canary, packs of one version) in a process of
                # its own; rollouts, learner and oracle work at once, the slowest makes the step.
                own = measured["snapshot_old"]
                extra_s, held, loads = own["cpu_s"], own["held_bytes"], scoring["loads"]
                forward_tokens = own["forward_tokens"]
                idle_s = max(sampling_s, training_s, extra_s) - extra_s
            case "interrupt":
                # Nobody samples while the learner scores; no version but the present is loaded.
                forward_tokens = scoring["forward_tokens"]
                extra_s += scoring["cpu_s"]
                critical_s, idle_s = critical_s + scoring["cpu_s"], scoring["cpu_s"]
            case "snapshot_old":
                loads = scoring["loads"]
            case "ewma_prox" | "ppo_ewma_async":
                loads = 1.0
            case _:
                pass
        row: dict[str, Any] = {
            "route": name,
            "exact": name in EXACT_ROUTES,
            "critical_s": critical_s,
            "extra_cpu_s": extra_s,
            "idle_s": idle_s,
            "total_cpu_s": sampling_s + training_s + extra_s + idle_s,
            "held_bytes": held,
            "forward_ratio": forward_tokens / tokens if tokens else 0.0,
            "loads": loads,
        }
        row["extrapolated"] = {model.name: extrapolated(row, model) for model in MODELS}
        rows.append(row)
    return rows


def extrapolated(
    row: Mapping[str, Any], model: Model, assumed: Assumed = ASSUMED
) -> dict[str, float | None]:
    """Scale one measured row to a model of the paper."""
    forward_s = row["forward_ratio"] * assumed.tokens_per_step * 2.0 * model.active / assumed.flops
    weights = model.parameters * assumed.bytes_per_parameter
    # On the host; the model that scores is on a device in either case.
    match row["route"]:
        case "oracle" | "snapshot_old":
            held = weights * (1.0 + assumed.versions * assumed.delta_ratio)
        case "ewma_prox" | "ppo_ewma_async":
            held = 4.0 * model.parameters
        case _:
            held = 0.0
    load_s = row["loads"] * weights / assumed.load_bytes_per_s
    training_s = assumed.train_flops_per_forward * (
        assumed.tokens_per_step * 2.0 * model.active / assumed.flops
    )
    on_path = row["route"] != "oracle"
    paper = model.paper.get(row["route"], (None, None))
    return {
        "gb": held / 1e9,
        "critical_s": forward_s + load_s if on_path else 0.0,
        "total_s": forward_s + load_s,
        "share_of_training": (forward_s + load_s) / training_s,
        "paper_gb": paper[0],
        "paper_s": paper[1],
    }


def matched_versions(rows: list[dict[str, Any]], versions: int) -> int:
    """Return how many versions the exact route may take for what `rollout` pays for `versions`."""
    totals = {row["route"]: row["total_cpu_s"] for row in rows}
    return max(1, round(versions * totals["rollout"] / totals["oracle"]))


def assumptions() -> dict[str, float]:
    """Return what the extrapolation takes for granted."""
    return asdict(ASSUMED)
