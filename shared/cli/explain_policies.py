"""Log-probs of a trajectory's sampled tokens under archived weights, by the audit's forward.

Shapes: T tokens of one sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shared.algo.ewma import blend, start_anchor
from shared.cli.archive import version_path
from shared.cli.audit_rescoring import Rescoring, query_of
from shared.cli.records import RunRecords
from shared.cli.reference_forward import (
    ReferenceConfig,
    ReferencePolicy,
    StoredTensor,
    read_safetensors,
)
from shared.runtime.errors import ConfigError
from shared.wire.trajectory import Sequence, Trajectory

Logprobs = list[npt.NDArray[np.floating[Any]]]
"""One array [T] per sequence, NaN where nothing was sampled or the weights are not at hand."""

_KEPT = 2
"""Policies held at once: the version stepped from and the one in use."""
_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ArchivedPolicies:
    """The run's versions, as the audit forwards them."""

    def __init__(self, records: RunRecords) -> None:
        self._records = records
        self._held: dict[int, ReferencePolicy | None] = {}
        self._anchors: dict[int, ReferencePolicy | None] = {}
        self._rescoring: Rescoring | None = None
        self._config: ReferenceConfig | None = None
        self._own_problems: list[str] = []
        try:
            self._config = ReferenceConfig.read(records.model_dir())
            self._rescoring = Rescoring(records, self._config)
        except (ValueError, ConfigError) as error:
            self._own_problems.append(f"nothing can be recomputed: {error}")

    @property
    def problems(self) -> list[str]:
        """Why weights are not at hand, each once."""
        theirs = self._rescoring.problems if self._rescoring else []
        return list(dict.fromkeys([*self._own_problems, *theirs]))

    def under(
        self, version: int, ticket_id: str, played: Trajectory, temperature: float | None = None
    ) -> Logprobs:
        """Return log-probs under one version.

        Args:
            version: whose weights.
            ticket_id: of the trajectory.
            played: the trajectory.
            temperature: of every token; None: the one it was sampled at.
        """
        return self._forward(self._policy(version), ticket_id, played, temperature)

    def stamped(self, ticket_id: str, played: Trajectory) -> Logprobs:
        """Return log-probs of every token under its own version."""
        found = _nothing(played)
        for version in sorted({s.version for q in played.sequences for s in q.spans}):
            policy = self._policy(version)
            for number, values in enumerate(
                self._forward(policy, ticket_id, played, None, version=version)
            ):
                known = np.isfinite(values)
                found[number][known] = values[known]
        return found

    def anchored(self, version: int, ticket_id: str, played: Trajectory) -> Logprobs:
        """Return log-probs under the moving average that the step from `version` scored with."""
        if version not in self._anchors:
            self._anchors[version] = self._anchor(version)
        return self._forward(self._anchors[version], ticket_id, played, None)

    def _forward(
        self,
        policy: ReferencePolicy | None,
        ticket_id: str,
        played: Trajectory,
        temperature: float | None,
        *,
        version: int | None = None,
    ) -> Logprobs:
        found = _nothing(played)
        if policy is None or self._rescoring is None:
            return found
        for number, sequence in enumerate(played.sequences):
            at: defaultdict[float, list[int]] = defaultdict(list)
            for position in _sampled(sequence, version):
                drawn_at = self._rescoring.temperature(ticket_id, sequence, position)
                at[drawn_at if temperature is None else temperature].append(position)
            for shared, positions in at.items():
                where = np.array(positions)
                query = query_of(sequence, version, where, shared)
                try:
                    found[number][where] = policy.logprobs([query])[0]
                except (ValueError, IndexError) as error:  # what no version can score: refused then
                    problem = f"{ticket_id}: sequence {number} is not of this model: {error}"
                    self._own_problems.append(problem)
        return found

    def _policy(self, version: int) -> ReferencePolicy | None:
        if version not in self._held:
            while len(self._held) >= _KEPT:
                del self._held[next(iter(self._held))]
            self._held[version] = self._rescoring.policy(version) if self._rescoring else None
        return self._held[version]

    def _anchor(self, version: int) -> ReferencePolicy | None:
        """Move the average as the learner did, with the weights λ that its reports carry."""
        if self._config is None:
            return None
        anchor: dict[str, torch.Tensor] = {}
        stored: dict[str, StoredTensor] = {}
        for step in range(version + 1):
            report = self._records.steps.get(step + 1)
            if report is None or "ewma_keep" not in report.scalars:
                self._own_problems.append(
                    f"the average of the weights: the step from v{step} reports no ewma_keep"
                )
                return None
            try:
                stored = read_safetensors(version_path(self._records.archive, step))
            except ValueError as error:
                self._own_problems.append(f"the average of the weights: {error}")
                return None
            state = {name: _tensor(tensor) for name, tensor in stored.items()}
            anchor = anchor or start_anchor(state.items())
            blend(anchor, state.items(), report.scalars["ewma_keep"])
        rounded = {n: t.to(_TORCH[stored[n].dtype]).double() for n, t in anchor.items()}
        return ReferencePolicy(
            self._config,
            {
                n: StoredTensor("F64", tuple(t.shape), t.numpy().astype("<f8").tobytes())
                for n, t in rounded.items()
            },
        )


def _nothing(played: Trajectory) -> Logprobs:
    return [np.full(s.token_ids.shape[0], np.nan) for s in played.sequences]


def _sampled(sequence: Sequence, version: int | None) -> Iterable[int]:
    """Yield sampled positions, of one version or of all; position 0 has no prediction."""
    for span in sequence.spans:
        if version is None or span.version == version:
            yield from range(max(1, span.start), span.stop)


def _tensor(stored: StoredTensor) -> torch.Tensor:
    return torch.from_numpy(stored.float64().copy()).to(_TORCH[stored.dtype])  # pyright: ignore[reportUnknownMemberType]
