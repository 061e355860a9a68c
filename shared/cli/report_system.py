"""The report's figures about the machine: overlap of the services, weight synchronisation."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from shared.cli.records import RunRecords
from shared.cli.report_data import start_of, steps
from shared.cli.report_style import FULL, HALF, C, figure, legend_above
from shared.cli.time_use import ROLE_ORDER, BusyGrid, Life

ROLE_COLOURS: dict[str, str] = dict(
    zip(ROLE_ORDER, ("blue", "green", "amber", "violet"), strict=True)
)


def role_colour(role: str) -> str:
    """Return the colour of a service."""
    return C[ROLE_COLOURS.get(role, "muted")]


def overlap(records: RunRecords, processes: tuple[Life, ...], grid: BusyGrid) -> str:
    """Who worked when: a band per process, as high as it was busy; learner steps as spans."""
    start = start_of(records)
    roles = {life.pod: life.role for life in processes}
    rows = ["steps", *grid.pods]
    with figure(FULL, 0.55 + 0.34 * len(rows)) as sheet:
        axis = sheet.axes[0]
        _draw_steps(axis, records, start, row=0)
        edges = grid.edges - start
        for row, pod in enumerate(grid.pods, start=1):
            colour = role_colour(roles.get(pod, ""))
            shares = grid.shares[row - 1]
            dead = np.isnan(shares)
            base = np.full(len(shares), row + 0.4)
            axis.hlines(row + 0.4, edges[0], edges[-1], color=C["line"], linewidth=0.8)
            axis.stairs(
                base - 0.8 * np.where(dead, 0.0, shares), edges, baseline=base[0], fill=True,
                color=colour, alpha=0.75,
            )  # fmt: skip
            for left, right in _runs(dead, edges):
                if edges[0] < left and right < edges[-1]:  # between two lives
                    axis.hlines(row + 0.4, left, right, color=C["red"], linewidth=2.5)
        for kill in records.facts.get("kills") or ():
            axis.axvline(
                float(kill["at"]) - start, color=C["red"], linewidth=1.2, linestyle=(0, (3, 2))
            )
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.4, -0.55)
        axis.set_xlim(0, edges[-1])
        axis.grid(visible=False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("seconds since start; height of a band: busy share")
    return sheet.svg


def _draw_steps(axis: Axes, records: RunRecords, start: float, row: int) -> None:
    reports = steps(records)
    training = [(r.started_at - start, r.trained_at - r.started_at) for r in reports]
    publishing = [(r.trained_at - start, max(0.0, r.published_at - r.trained_at)) for r in reports]
    axis.broken_barh(training, (row - 0.35, 0.7), facecolors=C["blue"], linewidth=0)
    axis.broken_barh(publishing, (row - 0.35, 0.7), facecolors=C["ink"], linewidth=0)


def _runs(flags: np.ndarray, edges: np.ndarray) -> list[tuple[float, float]]:
    """Return the intervals in which `flags` hold."""
    padded = np.concatenate([[False], flags, [False]]).astype(int)
    changes = np.flatnonzero(np.diff(padded))
    return [(float(edges[a]), float(edges[b])) for a, b in changes.reshape(-1, 2)]


def weight_bytes(records: RunRecords) -> str:
    """Bytes of every published version: delta and keyframe."""
    manifests = [records.manifests[version] for version in sorted(records.manifests)]
    deltas = [(m.version, m.delta) for m in manifests if m.delta is not None]
    full = records.full_copies()
    largest = max((a.num_bytes for _, a in (*full, *deltas)), default=1)
    unit, size = ("MB", 1e6) if largest >= 2e6 else ("kB", 1e3)
    with figure(HALF, 2.6) as sheet:
        axis = sheet.axes[0]
        rows = (
            ("keyframe", C["amber"], full),
            ("delta", C["blue"], deltas),
        )
        for name, colour, artefacts in rows:
            if artefacts:
                versions = [version for version, _ in artefacts]
                amounts = [artefact.num_bytes / size for _, artefact in artefacts]
                axis.vlines(versions, 0, amounts, color=colour, alpha=0.35, linewidth=1.2)
                axis.plot(versions, amounts, ".", color=colour, markersize=5, label=name)
        axis.set_ylim(bottom=0)
        legend_above(axis)
        axis.set_xlabel("version")
        axis.set_ylabel(f"published, {unit}")
    return sheet.svg


def publish_seconds(records: RunRecords) -> str:
    """Seconds from the end of a step to its version's manifest, and the step's own."""
    reports = steps(records)
    with figure(HALF, 2.6) as sheet:
        axis = sheet.axes[0]
        versions = [r.version for r in reports]
        rows = (
            ("optimizer step", C["blue"], [r.trained_at - r.started_at for r in reports]),
            ("publication", C["amber"], [r.published_at - r.trained_at for r in reports]),
        )
        for name, colour, seconds in rows:
            axis.plot(versions, seconds, color=colour, linewidth=1.5, label=name)
        axis.set_ylim(bottom=0)
        legend_above(axis)
        axis.set_xlabel("version")
        axis.set_ylabel("seconds")
    return sheet.svg
