"""What the figures of `make bench-weights` must be, and the table they are printed in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]

GB = 10**9
BUSY_RATIO = 0.1
"""A row measured while others used more of the machine's cores than this is marked."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One figure of one case and its bound."""

    case: str
    figure: str
    """A field of the row, or `publish_over_local_file` and `rss_above_model_gb`, derived here."""
    side: Literal["<=", ">="]
    bound: float
    aim: float | None = None
    """Better than the bound; missing it is no miss."""


LIMITS = (
    Limit("lr1e-6-k1", "delta_ratio", "<=", 0.009),
    Limit("lr1e-6-k1", "history5_over_copy", "<=", 1.06),
    Limit("lr1e-5-k1", "history5_over_copy", "<=", 1.30),
    Limit("0.1gb-1pct", "encode_over_memcpy", ">=", 0.5, aim=0.9),
    Limit("0.1gb-1pct", "apply_over_memcpy", ">=", 1.0, aim=2.0),
    Limit("1gb-1pct", "encode_over_memcpy", ">=", 0.5, aim=0.9),
    Limit("1gb-1pct", "apply_over_memcpy", ">=", 1.0, aim=2.0),
    Limit("1gb-1pct", "publish_over_local_file", "<=", 3.0),
    Limit("2gb-1pct", "encode_over_memcpy", ">=", 0.5, aim=0.9),
    Limit("2gb-1pct", "apply_over_memcpy", ">=", 1.0, aim=2.0),
    Limit("2gb-1pct", "rss_above_model_gb", "<=", 1.0),
    Limit("2gb-5pct", "rss_above_model_gb", "<=", 1.0),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A limit and what was found."""

    limit: Limit
    value: float | None
    """None: the row lacks the figure."""

    @property
    def ok(self) -> bool:
        return self.value is not None and _holds(self.value, self.limit.side, self.limit.bound)

    @property
    def text(self) -> str:
        """One line: figure, bound, ok or miss."""
        limit = self.limit
        found = "no figure" if self.value is None else f"{self.value:.4g}"
        line = (
            f"{'ok  ' if self.ok else 'MISS'} {limit.case:<12} {limit.figure:<24} {found:>9}"
            f"  (must be {limit.side} {limit.bound:g}"
        )
        if limit.aim is not None:
            reached = self.value is not None and _holds(self.value, limit.side, limit.aim)
            line += f", aim {limit.side} {limit.aim:g}{' reached' if reached else ''}"
        return line + ")"


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Return a verdict per limit of the cases that were run."""
    by_case = {row["case"]: row for row in rows if "error" not in row}
    return [
        Verdict(limit, figure(by_case[limit.case], limit.figure))
        for limit in LIMITS
        if limit.case in by_case
    ]


def figure(row: Row, name: str) -> float | None:
    """Return a figure of a row, None when it is not there."""
    if name == "publish_over_local_file":
        times = row.get("publish_to_applied_s") or {}
        local = row.get("local_file_s")
        return times["2"] / local if "2" in times and local else None
    if name == "rss_above_model_gb":
        peak = row.get("peak_rss_bytes")
        return None if peak is None else (peak - row["model_bytes"]) / GB
    value = row.get(name)
    return None if value is None else float(value)


COLUMNS = (
    # title, width, field, format
    ("MB", 6, "model_bytes", lambda x: f"{x / 1e6:.0f}"),
    ("changed", 8, "changed_ratio", lambda x: f"{x:.2%}"),
    ("delta", 7, "delta_ratio", lambda x: f"{x:.2%}"),
    ("zstd", 6, "zstd_full_ratio", lambda x: f"{x:.0%}"),
    ("hist 5", 6, "history5_over_copy", lambda x: f"{x:.3f}"),
    ("enc/cpy", 7, "encode_over_memcpy", lambda x: f"{x:.2f}"),
    ("app/cpy", 7, "apply_over_memcpy", lambda x: f"{x:.2f}"),
    ("1 fol s", 7, "publish_to_applied_s", lambda x: _seconds(x, "1")),
    ("2 fol s", 7, "publish_to_applied_s", lambda x: _seconds(x, "2")),
    ("file s", 7, "local_file_s", lambda x: f"{x:.3f}"),
    ("x file", 6, "publish_over_local_file", lambda x: f"{x:.2f}"),
    ("RSS-S GB", 8, "rss_above_model_gb", lambda x: f"{x:.2f}"),
)


def header() -> str:
    """Return the table's first line."""
    titles = " ".join(f"{title:>{width}}" for title, width, _, _ in COLUMNS)
    return f"{'case':<14} {titles}  ok"


def line(row: Row) -> str:
    """Return one case as a line of the table."""
    if "error" in row:
        return f"{row['case']:<14} {row['error']}"
    return f"{row['case']:<14} {' '.join(_cells(row))}  {_mark(row)}"


def _cells(row: Row) -> Iterator[str]:
    for _, width, field, shown in COLUMNS:
        value = row.get(field) if field in row else figure(row, field)
        yield f"{'-' if value is None else shown(value):>{width}}"


def _mark(row: Row) -> str:
    verdicts = judge([row])
    mark = "-" if not verdicts else "ok" if all(v.ok for v in verdicts) else "MISS"
    return f"{mark} (busy)" if row.get("others_cpu_ratio", 0.0) > BUSY_RATIO else mark


def _seconds(times: Mapping[str, float], followers: str) -> str:
    return f"{times[followers]:.3f}" if followers in times else "-"


def _holds(value: float, side: str, bound: float) -> bool:
    return value <= bound if side == "<=" else value >= bound
