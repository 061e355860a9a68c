"""`lagwise audit RUN`: a separate reader rescores random trained tokens with its own forward.

It reads the journal, the archived log and the archived versions, and shares no code with learner,
oracle or engines. Under an exact route a trained token's old log-prob must be the one that *its
own* version gives; two controls show that the measurement could fail: the same tokens under the
version before, and the sampler's log-probs. An approximate route promises no such number: there
the stamps are checked, by the sampler's log-probs, which must fit the stamped version better than
the ones beside it. Together with the ledger this is the run's claim, checked.
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
from shared.runtime.sections import EXACT_ROUTES

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
    routes: tuple[str, ...] = ()
    """Where the old log-probs of the lineage came from, in order of first use."""
    stamp_tokens: int = 0
    """Tokens of approximate routes whose stamp was checked."""
    stamp_square_error: float = 0.0
    """Mean squared error of the sampler's log-probs under the stamped version, nats²."""
    stamp_square_error_before: float = 0.0
    """The same under the version before."""
    stamp_square_error_after: float = 0.0
    """The same under the version after."""

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
        lists = {"problems": list(self.problems), "routes": list(self.routes)}
        return {**asdict(self), **lists, "ok": self.ok}

    @classmethod
    def of_dict(cls, data: Mapping[str, Any]) -> AuditResult:
        """Read what `as_dict` wrote; fields of another release are ignored."""
        names = {field.name for field in fields(cls)}
        known: dict[str, Any] = {name: value for name, value in data.items() if name in names}
        known |= {name: tuple(known.get(name, ())) for name in ("problems", "routes")}
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
    rescoring = Rescoring(records, config)
    exact = [b for b in ledger.lineage if ledger.routes[b.version] in EXACT_ROUTES]
    approximate = [b for b in ledger.lineage if ledger.routes[b.version] not in EXACT_ROUTES]
    probes = [
        probe
        for lineage in (exact, approximate)
        for pick in choose(lineage, records.terminals, tokens=tokens, rng=rng)
        for probe in rescoring.probes(pick, rng, ledger.routes[pick.batch_version])
    ]
    num_versions = rescoring.fill(probes)
    result = _result(probes, num_versions, ledger, seed)
    wanted = min(tokens, ledger.tokens_trained) - rescoring.disclaimed_tokens
    judged = _judge(result, probes, wanted)
    return replace(result, problems=(*ledger.problems, *rescoring.problems, *judged))


def _result(probes: list[Probe], num_versions: int, ledger: Ledger, seed: int) -> AuditResult:
    scored = [(p, p.old) for p in probes if p.old is not None]
    own = _joined([np.abs(p.own - old) for p, old in scored if p.own is not None])
    previous = _joined([np.abs(p.previous - old) for p, old in scored if p.previous is not None])
    sampler = _joined([np.abs(p.sampler - old) for p, old in scored if p.own is not None])
    stamped = [
        (p.own - p.sampler, p.previous - p.sampler, p.following - p.sampler)
        for p in probes
        if p.old is None
        and p.own is not None
        and p.previous is not None
        and p.following is not None
    ]
    under = [_joined([errors[i] for errors in stamped]) for i in range(3)]
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
        routes=tuple(dict.fromkeys(ledger.routes.values())),
        stamp_tokens=len(under[0]),
        stamp_square_error=_mean_square(under[0]),
        stamp_square_error_before=_mean_square(under[1]),
        stamp_square_error_after=_mean_square(under[2]),
    )


def _judge(result: AuditResult, probes: list[Probe], wanted: int) -> list[str]:
    problems: list[str] = []
    if any(route in EXACT_ROUTES for route in result.routes) or not result.routes:
        problems += _judge_exact(result, probes, wanted)
    if any(route not in EXACT_ROUTES for route in result.routes):
        problems += _judge_stamps(result)
    return problems


def _judge_stamps(result: AuditResult) -> list[str]:
    if not result.stamp_tokens:
        return ["no stamp could be checked: no version before and after a token's own is archived"]
    beside = {
        "before": result.stamp_square_error_before,
        "after": result.stamp_square_error_after,
    }
    return [
        f"stamps: the sampler's log-probs fit the version {name} the stamped one as well as it "
        f"(rms {error**0.5:.2g} and {result.stamp_square_error**0.5:.2g} nats over "
        f"{result.stamp_tokens} tokens): stamps are wrong, or versions hardly differ"
        for name, error in beside.items()
        if error <= result.stamp_square_error
    ]


def _judge_exact(result: AuditResult, probes: list[Probe], wanted: int) -> list[str]:
    problems: list[str] = []
    if not result.audited_tokens or (
        result.audited_tokens < wanted and all(r in EXACT_ROUTES for r in result.routes)
    ):
        problems.append(f"only {result.audited_tokens} of {wanted} tokens could be audited")
    if result.mismatches:
        first = next(p for p in probes if _mismatches(p))
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
    exact_rows = [
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
        ("tolerance", f"{result.tolerance:.0e} nats"),
    ]  # fmt: skip
    stamp_rows = [
        ("tokens whose stamp was checked", f"{result.stamp_tokens:,}"),
        ("  sampler's rms error: stamped version / before / after",
         f"{result.stamp_square_error**0.5:.1e} / {result.stamp_square_error_before**0.5:.1e}"
         f" / {result.stamp_square_error_after**0.5:.1e}"),
    ]  # fmt: skip
    rows = [
        ("old log-probs by route", ", ".join(map(_described, result.routes)) or "none"),
        *(exact_rows if result.audited_tokens or not result.stamp_tokens else ()),
        *(stamp_rows if result.stamp_tokens else ()),
        ("old_logits_exact_ratio", f"{result.old_logits_exact_ratio:.6g}"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["audit: ok"] if result.ok else [f"audit: {problem}" for problem in result.problems]
    return "\n".join(lines)


def save(result: AuditResult, run_dir: Path) -> Path:
    """Write `audit.json` into the run folder."""
    path = run_dir / "audit.json"
    path.write_text(json.dumps(result.as_dict(), indent=2) + "\n")
    return path


def _described(route: str) -> str:
    return route if route in EXACT_ROUTES else f"{route} (approximate: nothing to rescore)"


def _mismatches(probe: Probe) -> bool:
    if probe.own is None or probe.old is None:
        return False
    return _count_above(np.abs(probe.own - probe.old)) > 0


def _mean_square(errors: npt.NDArray[np.float64]) -> float:
    return float(np.square(errors).mean()) if len(errors) else 0.0


def _joined(parts: list[npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
    return np.concatenate(parts) if parts else np.zeros(0)


def _count_above(errors: npt.NDArray[np.float64]) -> int:
    # A NaN is a mismatch too.
    return int((~(errors <= TOLERANCE)).sum())


def _quantile(errors: npt.NDArray[np.float64], share: float) -> float:
    return float(np.quantile(errors, share)) if len(errors) else 0.0
