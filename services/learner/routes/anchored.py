"""`ewma_prox`, `ppo_ewma_async`: a moving average of the weights stands in for θ_v.

One more copy of the weights (float32) and one forward under it per step. The average is moved at
the beginning of a step, when the ages of the batch about to be trained are known; it counts in
versions. Decisions are `shared/algo/ewma_control.py`'s.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from services.learner.routes.base import OldLogprobs, RouteBase, RouteContext, RouteCost
from services.learner.routes.carried import NOTHING
from services.learner.routes.forwards import Logprobs, as_scores, forward_members
from services.learner.staging import Scored
from shared.algo.ewma import blend, start_anchor
from shared.algo.ewma_control import (
    ASYNC,
    AnchorDecision,
    AnchorMeasured,
    AnchorState,
    EwmaSettings,
    advance,
)
from shared.backends.base import Backend, Snapshot
from shared.backends.hf_files import HfFiles
from shared.backends.snapshot import TensorSnapshot, take
from shared.backends.trajectory_scoring import score_dtype

_STEM, _STATE = "anchor", "anchor.json"


@dataclass(frozen=True)
class _AnchorSnapshot:
    tensors: TensorSnapshot
    facts: dict[str, Any]

    def write(self, folder: Path) -> None:
        self.tensors.write(folder)
        (folder / _STATE).write_text(json.dumps(self.facts))


class EwmaProx(RouteBase):
    """Fixed beta, bias-corrected (PPO-EWMA, arXiv 2110.00641)."""

    name = "ewma_prox"
    exact = False

    def __init__(self, context: RouteContext) -> None:
        super().__init__(context)
        self.settings: EwmaSettings = context.section.ewma or self._defaults()
        self.state = AnchorState()
        self._anchor: dict[str, torch.Tensor] | None = None
        self._measured: AnchorMeasured | None = None
        """Of the step taken last; None: no step since the anchor began."""
        self._scorer: Backend | None = None
        self._decision: AnchorDecision | None = None
        """At the step it was moved to last; None: nothing was measured before."""
        self._target_age = 0.0
        self._advanced = -1
        """Version it was moved to last."""

    @staticmethod
    def _defaults() -> EwmaSettings:
        return EwmaSettings()

    async def start(self) -> None:
        self._scorer = await asyncio.to_thread(self._context.make_scorer)
        if self._anchor is None:
            self._anchor = start_anchor(self._context.backend.state().items())

    async def advance(self, members: Sequence[Scored], version: int) -> None:
        if self._advanced == version:
            return
        self._advanced = version
        self._target_age = _mean_age(members, version)
        self._decision = None
        if self._measured is not None:
            self._decision = advance(
                self.state,
                self.settings,
                target_age=self._target_age,
                measured=self._measured,
            )
            self.state = self._decision.state
            await asyncio.to_thread(self._blend, self._decision.keep)

    async def at_step(self, members: Sequence[Scored], version: int) -> OldLogprobs:
        started = time.perf_counter()
        await self.advance(members, version)
        found, forwarded = await asyncio.to_thread(self._forward, members)
        dtype = score_dtype(self._context.backend.dtype)
        return OldLogprobs(
            {m.ticket_id: as_scores(m.trajectory, found[m.ticket_id], dtype) for m in members},
            RouteCost(time.perf_counter() - started, forwarded, self._held_bytes()),
            health=self._health(),
        )

    async def stepped(self, version: int, scalars: Mapping[str, float]) -> None:
        self._measured = AnchorMeasured(
            k3_anchor=scalars.get("d_k3"),
            k3_start=scalars.get("rho_k3"),
            drift_k3=scalars.get("s_k3"),
            drift_abs_log=scalars.get("s_abs_log_mean"),
            clipped=scalars.get("clipped_on_arrival"),
        )

    def snapshot(self) -> Snapshot:
        if self._anchor is None:
            return NOTHING
        measured = None if self._measured is None else asdict(self._measured)
        facts = {"state": asdict(self.state), "measured": measured}
        return _AnchorSnapshot(take({_STEM: self._anchor.items()}), facts)

    def load(self, folder: Path) -> None:
        if not (folder / _STATE).is_file():
            return
        facts = json.loads((folder / _STATE).read_text())
        self._anchor = dict(HfFiles(folder, _STEM).tensors())
        self.state = AnchorState(**facts["state"])
        measured = facts["measured"]
        self._measured = None if measured is None else AnchorMeasured(**measured)

    def _blend(self, keep: float) -> None:
        assert self._anchor is not None, "call start() first"
        blend(self._anchor, self._context.backend.state().items(), keep)

    def _forward(self, members: Sequence[Scored]) -> tuple[dict[str, Logprobs], int]:
        context, scorer, anchor = self._context, self._scorer, self._anchor
        assert scorer is not None, "call start() first"
        assert anchor is not None
        own = scorer.state()
        scorer.load_state({name: value.to(own[name].dtype) for name, value in anchor.items()})
        return forward_members(
            scorer, members, temperature=context.temperature, pack_tokens=context.pack_tokens
        )

    def _held_bytes(self) -> int:
        tensors = [*(self._anchor or {}).values()]
        if self._scorer is not None:
            tensors += self._scorer.state().values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _health(self) -> dict[str, float]:
        resets = self.state.resets
        return {
            "ewma_age": self.state.age,
            "ewma_target_age": self._target_age,
            "ewma_age_deficit": self._target_age - self.state.age,
            "ewma_age_std": self.state.age_std,
            "ewma_keep": 1.0 if self._decision is None else self._decision.keep,
            "ewma_worse_steps": float(self.state.worse_steps),
            **{f"ewma_resets_{cause}": float(count) for cause, count in resets.items()},
        }


class PpoEwmaAsync(EwmaProx):
    """Follows the ages of the data, and starts over when it no longer helps (R1 to R5)."""

    name = "ppo_ewma_async"

    @staticmethod
    def _defaults() -> EwmaSettings:
        return ASYNC


def _mean_age(members: Sequence[Scored], version: int) -> float:
    """Return the mean age in versions of the sampled tokens."""
    total = count = 0
    for member in members:
        for sequence in member.trajectory.sequences:
            for span in sequence.spans:
                total += (version - span.version) * (span.stop - span.start)
                count += span.stop - span.start
    return max(0.0, total / count) if count else 0.0
