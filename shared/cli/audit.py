"""`lagwise audit RUN`: a separate reader rescores random trained tokens with its own forward.

It reads the journal, the archived log and the archived versions, and shares no code with learner,
oracle or engines. A trained token's old log-prob must be the one that *its own* version gives;
two controls show that the measurement could fail: the same tokens under the version before, and
the sampler's log-probs. Together with the ledger this is the run's claim, checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.cli.audit_picks import choose
from shared.cli.audit_rescoring import Probe, Rescoring
from shared.cli.ledger import Ledger, of_run
from shared.cli.records import load
from shared.cli.reference_forward import ReferenceConfig
from shared.runtime.errors import ConfigError

TOLERANCE = 5e-5
"""Nats; the agreement of two float32 forwards of one version (offpolicy.md 10.3)."""
PREVIOUS_VERSION_MIN_RATIO = 0.3
SAMPLER_MIN_RATIO = 0.5
"""Controls: at least so many tokens must mismatch, or the audit could not have failed."""


@dataclass(frozen=True)
class AuditResult:
    """What was rescored and what did not agree."""

    audited_tokens: int
    trajectories: int
    versions: int
    """Whose weights were checked against their manifests and used."""
    mismatches: int
    max_error: float
    """Largest |old - reference| in nats, mismatches included."""
    p99_error: float
    control_tokens: int
    """Audited tokens with a version before theirs."""
    control_mismatches: int
    """Of `control_tokens`, under that version."""
    control_median_error: float
    sampler_mismatches: int
    """Of `audited_tokens`, the sampler's log-probs."""
    sampler_median_error: float
    old_logits_exact_ratio: float
    tolerance: float
    seed: int
    problems: tuple[str, ...]
    """One line each; the ledger's included."""

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def control_ratio(self) -> float:
        return self.control_mismatches / self.control_tokens if self.control_tokens else 0.0

    @property
    def sampler_ratio(self) -> float:
        return self.sampler_mismatches / self.audited_tokens if self.audited_tokens else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "problems": list(self.problems), "ok": self.ok}

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> AuditResult:
        """Read what `as_dict` wrote; fields of another release are ignored."""
        names = {field.name for field in fields(cls)}
        known: dict[str, Any] = {name: value for name, value in data.items() if name in names}
        known["problems"] = tuple(known["problems"])
        return cls(**known)


def run(run_dir: Path, *, tokens: int = 2400, seed: int = 0) -> AuditResult:
    """Audit a run: balance its ledger and rescore at least `tokens` random trained tokens.

    Raises:
        ConfigError: the folder holds no archive, or a model this audit cannot forward.
    """
    records = load(run_dir)
    ledger = of_run(records)
    try:
        config = ReferenceConfig.read(records.model_dir())
    except ValueError as error:
        raise ConfigError(f"audit: {error}") from error
    rng = np.random.default_rng(seed)
    picks = choose(ledger.lineage, records.terminals, tokens=tokens, rng=rng)
    rescoring = Rescoring(records, config)
    probes = [probe for pick in picks for probe in rescoring.probes(pick, rng)]
    num_versions = rescoring.fill(probes)
    result = _result(probes, num_versions, ledger, seed)
    judged = _judge(result, probes, min(tokens, ledger.tokens_trained))
    return replace(result, problems=(*ledger.problems, *rescoring.problems, *judged))


def _result(probes: list[Probe], num_versions: int, ledger: Ledger, seed: int) -> AuditResult:
    own = _joined([np.abs(p.own - p.old) for p in probes if p.own is not None])
    previous = _joined([np.abs(p.previous - p.old) for p in probes if p.previous is not None])
    sampler = _joined([np.abs(p.sampler - p.old) for p in probes if p.own is not None])
    return AuditResult(
        audited_tokens=len(own),
        trajectories=len({p.ticket_id for p in probes if p.own is not None}),
        versions=num_versions,
        mismatches=_count_above(own),
        max_error=float(own.max(initial=0.0)),
        p99_error=_quantile(own, 0.99),
        control_tokens=len(previous),
        control_mismatches=_count_above(previous),
        control_median_error=_quantile(previous, 0.5),
        sampler_mismatches=_count_above(sampler),
        sampler_median_error=_quantile(sampler, 0.5),
        old_logits_exact_ratio=ledger.exact_ratio,
        tolerance=TOLERANCE,
        seed=seed,
        problems=(),
    )


def _judge(result: AuditResult, probes: list[Probe], wanted: int) -> list[str]:
    problems: list[str] = []
    if result.audited_tokens < wanted or not result.audited_tokens:
        problems.append(f"only {result.audited_tokens} of {wanted} tokens could be audited")
    if result.mismatches:
        first = next(p for p in probes if p.own is not None and _count_above(np.abs(p.own - p.old)))
        problems.append(
            f"{result.mismatches} of {result.audited_tokens} audited tokens were trained with "
            f"an old log-prob that is not their version's (max error {result.max_error:.2g}; "
            f"first: {first.ticket_id} under v{first.version})"
        )
    if result.control_tokens and result.control_ratio < PREVIOUS_VERSION_MIN_RATIO:
        problems.append(
            f"control: only {result.control_ratio:.0%} of tokens mismatch under the version "
            f"before theirs, {PREVIOUS_VERSION_MIN_RATIO:.0%} needed: versions hardly differ"
        )
    if result.audited_tokens and result.sampler_ratio < SAMPLER_MIN_RATIO:
        problems.append(
            f"control: only {result.sampler_ratio:.0%} of the sampler's log-probs mismatch, "
            f"{SAMPLER_MIN_RATIO:.0%} needed: sampler and trainer hardly differ"
        )
    return problems


def table(result: AuditResult) -> str:
    """Return the result as text for a terminal."""
    rows = [
        ("trained tokens rescored", f"{result.audited_tokens:,}"),
        ("  in trajectories / versions", f"{result.trajectories:,} / {result.versions:,}"),
        ("mismatches under their own version", f"{result.mismatches:,}"),
        ("  largest / 99th percentile error", f"{result.max_error:.1e} / {result.p99_error:.1e}"),
        ("control: under the version before",
         f"{result.control_mismatches:,} of {result.control_tokens:,} mismatch"
         f" ({result.control_ratio:.0%})"),
        ("control: the sampler's log-probs",
         f"{result.sampler_mismatches:,} of {result.audited_tokens:,} mismatch"
         f" ({result.sampler_ratio:.0%})"),
        ("old_logits_exact_ratio", f"{result.old_logits_exact_ratio:.6g}"),
        ("tolerance", f"{result.tolerance:.0e} nats"),
    ]  # fmt: skip
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["audit: ok"] if result.ok else [f"audit: {problem}" for problem in result.problems]
    return "\n".join(lines)


def save(result: AuditResult, run_dir: Path) -> Path:
    """Write `audit.json` into the run folder."""
    path = run_dir / "audit.json"
    path.write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    return path


def _joined(parts: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _count_above(errors: npt.NDArray[np.float64]) -> int:
    # A NaN is a mismatch too.
    return int((~(errors <= TOLERANCE)).sum())


def _quantile(errors: npt.NDArray[np.float64], share: float) -> float:
    return float(np.quantile(errors, share)) if len(errors) else 0.0
