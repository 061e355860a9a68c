"""The report's figures about learning and exactness, as inline SVG. One function each."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Polygon, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from shared.cli.ledger import Ledger
from shared.cli.records import RunRecords
from shared.cli.report_data import (
    F8,
    Cloud,
    Regions,
    evaluations,
    pooled,
    series,
    smoothed,
    start_of,
    steps,
)
from shared.cli.report_style import FULL, HALF, C, age_colour, figure, legend_above


def success(records: RunRecords) -> str:
    """Success against wall time, versions ticked, kills marked, evaluations with intervals."""
    reports, start = steps(records), start_of(records)
    with figure(FULL, 3.3) as sheet:
        axis = sheet.axes[0]
        at = np.array([report.published_at - start for report in reports])
        values = series(reports, "success")
        if len(at):
            axis.plot(at, values, ".", color=C["blue"], alpha=0.5, markersize=5, mew=0)
            window = max(1, min(9, len(at) // 3))
            axis.plot(at, smoothed(values, window), color=C["blue"], linewidth=1.8)
            _version_ticks(axis, at, [report.version for report in reports])
        shown = evaluations(records)
        last = max([*at, *(one.at_s for one in shown)])
        for one in shown:
            axis.errorbar(
                one.at_s, one.mean, yerr=[[one.mean - one.low], [one.high - one.mean]], fmt="o",
                color=C["ink"], markersize=5.5, capsize=3, linewidth=1.4, zorder=5,
            )  # fmt: skip
            if one.name in ("base", "final"):
                anchor = "center" if one.at_s > 0.06 * last else "left"
                axis.annotate(
                    f"{one.name} {one.mean:.2f}", (one.at_s, one.high), (0, 5), weight="bold",
                    textcoords="offset points", ha=anchor, va="bottom",
                )  # fmt: skip
        top = max([0.5, *values[np.isfinite(values)], *(one.high for one in shown)])
        axis.set_ylim(-0.09 * top, top * 1.12)
        _mark_kills(axis, records, label_at=top * 1.06)
        axis.set_xlim(left=0)
        axis.set_xlabel("seconds since start; ticks below: published versions")
        axis.set_ylabel("success")
    return sheet.svg


def scatter(cloud: Cloud, region: Regions, limit: int = 1200) -> str:
    """(log D, log S) of loss tokens: inside what mask and clip accept, and the cloud alone."""
    points = cloud.points
    if len(points) > limit:
        points = points[np.random.default_rng(0).choice(len(points), limit, replace=False)]
    reach = [max(1e-3, 1.25 * float(np.quantile(np.abs(points[:, i]), 0.995))) for i in (0, 1)]
    with figure(FULL, 4.0, columns=2) as sheet:
        whole, near = sheet.axes
        for axis in (whole, near):
            _draw_regions(axis, region, strip=cloud.exact)
            axis.axhline(0, color=C["line"], linewidth=1)
            axis.axvline(0, color=C["line"], linewidth=1)
            for age in np.unique(points[:, 2]).astype(int):
                chosen = points[points[:, 2] == age]
                axis.plot(
                    chosen[:, 0], chosen[:, 1], ".", color=age_colour(age), alpha=0.6, mew=0,
                    markersize=2.5 if axis is whole else 4.5,
                    label=f"age {age}" if axis is near else None,
                )  # fmt: skip
            axis.set_xlabel(
                "log D = old − sampler: two engines, one version"
                if cloud.exact
                else f"log D under {cloud.route}: its old − sampler"
            )
        left, right = region.mask or (-reach[0], reach[0])
        low, high = region.clip
        whole.set_xlim(min(1.2 * left, -reach[0]), max(1.2 * right, reach[0]))
        whole.set_ylim(min(1.3 * low, -reach[1]), max(1.3 * high, reach[1]))
        near.set_xlim(-reach[0], reach[0])
        near.set_ylim(-reach[1], reach[1])
        whole.add_patch(
            Rectangle(
                (-reach[0], -reach[1]), 2 * reach[0], 2 * reach[1], fill=False,
                edgecolor=C["muted"], linewidth=1, zorder=6,
            )
        )  # fmt: skip
        whole.set_ylabel(
            "log S = current − old: two versions, one engine"
            if cloud.exact
            else f"log S under {cloud.route}: current − its old"
        )
        whole.set_title("what is kept; the grey frame is enlarged beside")
        near.legend(
            loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=6, frameon=False, markerscale=2.2,
            handletextpad=0.0, columnspacing=1.0, borderpad=0.0, labelcolor=C["muted"],
        )  # fmt: skip
    return sheet.svg


def staleness(ledger: Ledger, bound: int) -> str:
    """Trained tokens by age, against the bound."""
    with figure(HALF, 2.8) as sheet:
        axis = sheet.axes[0]
        ages = range(max(bound, ledger.staleness_max) + 1)
        tokens = sum(ledger.age_tokens.values())
        for age in ages:
            share = ledger.age_tokens.get(age, 0) / tokens
            axis.bar(age, share, width=0.72, color=age_colour(age))
            axis.annotate(
                f"{share:.1%}" if share else "none", (age, share), (0, 3),
                textcoords="offset points", ha="center", color=C["muted"], fontsize=8,
            )  # fmt: skip
        axis.axvline(bound + 0.5, color=C["red"], linewidth=1.6)
        axis.annotate(
            f"bound {bound}", (bound + 0.5, 1.0), (5, -4), textcoords="offset points",
            xycoords=("data", "axes fraction"), color=C["red"], va="top",
        )  # fmt: skip
        axis.set_xlim(-0.6, max(ages) + 1.3)
        axis.margins(y=0.16)
        axis.set_xticks(list(ages))
        axis.set_xlabel("versions between sampling and training")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_ylabel("share of trained tokens")
    return sheet.svg


def lengths(records: RunRecords) -> str:
    """Sampled tokens per trajectory, as dispatched and as trained."""
    reports = steps(records)
    rows = [
        ("dispatched", pooled(reports, "dispatched_lengths"), C["muted"], True),
        ("trained", pooled(reports, "trained_lengths"), C["blue"], False),
    ]
    with figure(HALF, 2.8) as sheet:
        axis = sheet.axes[0]
        longest = max(int(values.max()) for _, values, *_ in rows if len(values))
        shortest = min(int(values.min()) for _, values, *_ in rows if len(values))
        stride = 1 + (longest - shortest) // 60
        edges = np.arange(shortest - 1, longest + stride + 2, stride)
        for name, values, colour, filled in rows:
            if not len(values):
                continue
            density = np.histogram(values, edges)[0] / len(values)
            axis.stairs(
                density, edges - 0.5, color=colour, fill=filled, alpha=0.3 if filled else 1.0,
                linewidth=1.8, label=f"{name}: {len(values):,}, mean {values.mean():.1f}",
            )  # fmt: skip
        legend_above(axis)
        axis.set_xlabel("sampled tokens per trajectory")
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_ylabel("share of trajectories")
    return sheet.svg


def _draw_regions(axis: Axes, region: Regions, *, strip: bool) -> None:
    left, right = region.mask or (-50.0, 50.0)
    low, high = region.clip
    axis.add_patch(
        Rectangle((left, low), right - left, high - low, facecolor=C["green"], alpha=0.1, zorder=0)
    )
    axis.add_patch(
        Rectangle(
            (left, low), right - left, high - low, fill=False, edgecolor=C["green"], linewidth=1.6,
            zorder=4,
        )
    )  # fmt: skip
    if region.mask is None or not strip:
        return
    # What the same mask accepts when old logits are recomputed: log D + log S in its bounds.
    wide = 50.0
    axis.add_patch(
        Polygon(
            [(left - wide, wide), (right - wide, wide), (right + wide, -wide),
             (left + wide, -wide)],
            fill=False, edgecolor=C["red"], linewidth=1.3, linestyle=(0, (4, 3)), zorder=4,
        )
    )  # fmt: skip


def _version_ticks(axis: Axes, at: F8, versions: list[int]) -> None:
    transform = axis.get_xaxis_transform()
    axis.vlines(at, 0.0, 0.025, transform=transform, color=C["muted"], linewidth=0.8, clip_on=False)
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(at) / s <= 12)
    labelled = -math.inf
    for x, version in zip(at, versions, strict=True):
        if version % stride == 0 and x - labelled > 0.03 * at[-1]:
            labelled = float(x)
            axis.text(
                x, 0.03, f"v{version}", transform=transform, ha="center", va="bottom",
                color=C["muted"], fontsize=7.5,
            )  # fmt: skip
    axis.xaxis.set_major_locator(MaxNLocator(12))


def _mark_kills(axis: Axes, records: RunRecords, label_at: float) -> None:
    start = start_of(records)
    for kill in records.facts.get("kills") or ():
        x = float(kill["at"]) - start
        axis.axvline(x, color=C["red"], linewidth=1.4, linestyle=(0, (3, 2)))
        axis.annotate(
            f"kill −9 {kill['pod']}", (x, label_at), (5, 0), textcoords="offset points",
            color=C["red"], va="center",
        )  # fmt: skip
