"""What `make bench-routes` runs: one cell is one training run. Pure; sizes, grids and seeds.

`docs/routes_protocol.md` fixes the confirmatory part in words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Sampler = Literal["int4", "bf16", "fp32"]
Lag = Literal["0", "2", "4", "8", "16", "mixed8", "jump"]

EXACT = "oracle"
"""Stands for the three exact routes, which give the same numbers."""

APPROXIMATE = (
    "current_recompute", "rollout", "interp_prox_loglinear", "interp_prox_linear", "ewma_prox",
    "ppo_ewma_async",
)  # fmt: skip
METHODS = (EXACT, *APPROXIMATE)
SAMPLERS: tuple[Sampler, ...] = ("int4", "bf16")
LAGS: tuple[Lag, ...] = ("0", "2", "4", "8", "16", "mixed8")

TUNE_SEEDS = range(1000, 1002)
ERROR_SEEDS = range(2000, 2002)
SWEEP_SEEDS = range(3000, 3001)
CONFIRM_SEEDS = range(10_000, 10_030)
NUM_SHARED = 10
"""Confirmation seeds, the first ones, on which the shared setting is run as well."""

BETAS = (0.5, 0.7, 0.8, 0.8889, 0.94, 0.98)
MASKS = ((0.9, 1.11), (0.8, 1.25), (0.5, 2.0), (0.2, 5.0))
CLIPS = (0.1, 0.2, 0.5)


@dataclass(frozen=True, slots=True)
class Size:
    """How large a world is."""

    hidden: int = 48
    intermediate: int = 128
    layers: int = 2
    warmup_steps: int = 90
    demonstrations: int = 48
    """Per warm-up step."""
    versions: int = 32
    groups: int = 8
    group_size: int = 8
    eval_every: int = 4
    """Versions between progress evaluations."""
    eval_episodes: int = 64
    final_episodes: int = 384
    measure_every: int = 4
    """Versions between comparisons with the exact answer."""
    lean: bool = True
    """Whether groups without variance, which carry no loss, are left out before they are scored.
    The product scores them: it does not wait for a group to end."""


QUICK = Size(
    hidden=32, intermediate=48, layers=1, warmup_steps=40, demonstrations=24, versions=6, groups=6,
    group_size=8, eval_every=3, eval_episodes=8, final_episodes=8, measure_every=2,
)  # fmt: skip
"""Tiny, for tests: figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A point of the tuning grid."""

    lr: float = 1e-3
    clip: float = 0.5
    mask: tuple[float, float] = (0.5, 2.0)

    @property
    def label(self) -> str:
        return f"lr {self.lr:g}, clip {self.clip:g}, mask [{self.mask[0]:g}, {self.mask[1]:g}]"


GRID = tuple(
    Setting(lr, clip, mask)
    for lr in (1e-3, 3e-3)
    for clip in (0.2, 0.5)
    for mask in ((0.8, 1.25), (0.5, 2.0))
)
"""In the order in which ties are broken."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run."""

    stage: str
    route: str
    lag: Lag
    sampler: Sampler
    seed: int
    setting: Setting = Setting()
    versions: int = 0
    """0: those of the size; fewer in compute-matched runs."""
    shadows: tuple[str, ...] = ()
    """Further routes asked about the batches of this run, never trained on."""
    measured: bool = False
    """Whether an approximate route is held against the exact answer on its own run."""
    beta: float | None = None
    """Of `ewma_prox`; None: the route's default."""
    auto_reset: bool | None = None
    """Of the EWMA routes; None: the route's default."""
    label: str = ""
    """Why it is run, where the rest does not say so: `shared`, `tuned`, `matched`."""

    @property
    def key(self) -> str:
        """Digest of what determines the result; the stage and label are not part of it."""
        facts = {k: v for k, v in asdict(self).items() if k not in ("stage", "label")}
        return hashlib.blake2b(
            json.dumps(facts, sort_keys=True).encode(), digest_size=8
        ).hexdigest()


def cell_of(facts: dict[str, Any]) -> Cell:
    """Return the cell that `asdict` was made from."""
    at: dict[str, Any] = facts["setting"]
    setting = Setting(lr=at["lr"], clip=at["clip"], mask=(at["mask"][0], at["mask"][1]))
    others: dict[str, Any] = {**facts, "shadows": tuple(facts["shadows"]), "setting": setting}
    return Cell(**others)


def error_cells(seeds: Sequence[int] = ERROR_SEEDS) -> list[Cell]:
    """Every lag and discrepancy, trained with exact logits, all routes asked. Exploratory."""
    return [
        Cell("error", EXACT, lag, sampler, seed, shadows=APPROXIMATE)
        for seed in seeds
        for sampler in SAMPLERS
        for lag in LAGS
    ]


def tune_cells(seeds: Sequence[int] = TUNE_SEEDS) -> list[Cell]:
    """The same grid for every method, at the lag of the confirmation."""
    return [
        Cell("tune", route, "mixed8", sampler, seed, setting)
        for seed in seeds
        for sampler in SAMPLERS
        for setting in GRID
        for route in METHODS
    ]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What tuning found for one discrepancy."""

    shared: Setting
    tuned: dict[str, Setting]
    """By method."""


def confirm_cells(
    chosen: dict[Sampler, Chosen], matched_versions: int, seeds: Sequence[int] = CONFIRM_SEEDS
) -> list[Cell]:
    """The confirmation of `docs/routes_protocol.md`, seed by seed."""
    cells: list[Cell] = []
    for seed in seeds:
        for sampler, found in chosen.items():
            at = Cell("confirm", EXACT, "mixed8", sampler, seed, found.shared)
            cells.append(replace(at, shadows=APPROXIMATE, label="error"))
            cells += [replace(at, route=r, setting=found.tuned[r], label="tuned") for r in METHODS]
            if seed in seeds[:NUM_SHARED]:
                cells += [replace(at, route=route, label="shared") for route in METHODS]
            cells.append(
                replace(at, setting=found.tuned[EXACT], versions=matched_versions, label="matched")
            )
    return cells


def sweep_cells(seeds: Sequence[int] = SWEEP_SEEDS) -> list[Cell]:
    """Thresholds, decays, resets, and the return at every fixed lag. Exploratory."""
    cells: list[Cell] = []
    for seed in seeds:
        for sampler in SAMPLERS:
            at = Cell("sweeps", EXACT, "mixed8", sampler, seed, Setting(lr=3e-3))
            cells += [
                replace(at, route=route, setting=Setting(3e-3, clip, mask), label="thresholds")
                for route in (EXACT, "current_recompute")
                for mask in MASKS
                for clip in CLIPS
            ]
            looked_at = replace(at, measured=True)
            cells += [replace(looked_at, route="ewma_prox", beta=b, label="beta") for b in BETAS]
            cells += [
                replace(looked_at, route="ppo_ewma_async", auto_reset=reset, label="beta")
                for reset in (None, False)
            ]
            cells += [
                replace(looked_at, route=route, lag="jump", auto_reset=reset, label="reset")
                for route in ("ewma_prox", "ppo_ewma_async")
                for reset in (False, True)
            ]
            cells += [
                replace(at, route=route, lag=lag, setting=Setting(), label="lags")
                for lag in LAGS
                for route in METHODS
                if lag != "mixed8"
            ]
    return cells
