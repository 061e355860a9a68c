"""A backend of several ranks in the hands of rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shared.algo.batching import PackedBatch, hollow
from shared.backends.base import Backend, LossFn, Snapshot
from shared.backends.expert_layers import ExpertLayers, check_routing
from shared.backends.hf_files import describe
from shared.backends.rank_commands import Collects, Command, Part, joined, noted, share_of
from shared.backends.rank_scoring import part_of, scored_by, whole
from shared.backends.routing import ROUTING

if TYPE_CHECKING:
    from shared.backends.ranks import Leader


class LedBackend:
    """`base.Backend`, every method of which all ranks perform (see there).

    `accumulate` takes the micro-batches of all data-parallel shares of the optimizer step, the
    first of each, then the second of each, and so on (`interleaved`).
    """

    def __init__(self, leader: Leader, number: int, local: Backend) -> None:
        """Lead backend `number`, of which `local` is rank 0's part."""
        self._leader = leader
        self._number = number
        self._local = local
        self.name = local.name
        self.dtype = local.dtype

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._local.vocab_size

    @property
    def expert_layers(self) -> ExpertLayers | None:
        """What recorded experts the model can replay."""
        return self._local.expert_layers

    @property
    def data_rank(self) -> int:
        """Rank 0's share."""
        return self._local.data_rank

    @property
    def data_ranks(self) -> int:
        """How many shares of the micro-batches `accumulate` takes."""
        return self._local.data_ranks

    def load_hf(self, path: Path) -> None:
        """Load a Hugging Face directory that every rank can read."""
        self._leader.perform(self._command("load_hf", path), lambda: self._local.load_hf(path))

    def export_hf(self, path: Path) -> None:
        """Write a Hugging Face directory; one rank writes."""
        self._leader.perform(self._command("export_hf", path), lambda: self._local.export_hf(path))

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the published tensors; gathered all at once, ranks cannot wait in between."""
        yield from self.state().items()

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the published tensors, gathered, on the CPU."""
        state, _ = self._leader.perform(
            self._command("state"), lambda: {n: t.cpu() for n, t in self._local.stream()}
        )
        return state

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace all weights on all ranks."""
        command = self._command("load_state", describe(state))
        self._leader.perform(
            command, lambda: self._local.load_state(state), (state[n] for n in state)
        )

    def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
        """Return logprobs_T on the CPU; every data-parallel share forwards its sequences."""
        self._check_routing(batch)
        shares, share = self.data_ranks, self.data_rank
        mine = part_of(batch, scored_by(batch.lengths, share, shares))
        own, answers = self._leader.perform(
            self._command("score", batch, temperature=temperature),
            lambda: self._local.score(mine, temperature=temperature).cpu(),
        )
        return whole(batch, {**dict(answers), share: own}, shares)

    def forward_backward(
        self, batch: PackedBatch, loss_fn: LossFn, *, temperature: float, with_entropy: bool
    ) -> float:
        """Accumulate gradients of one micro-batch; the other shares forward without tokens."""
        batches = [batch, *[hollow(batch)] * (self.data_ranks - 1)]
        return self.accumulate(batches, loss_fn, temperature=temperature, with_entropy=with_entropy)

    def accumulate(
        self,
        batches: Sequence[PackedBatch],
        loss_fn: LossFn,
        *,
        temperature: float,
        with_entropy: bool,
    ) -> float:
        """Accumulate gradients of all micro-batches of an optimizer step, shared out.

        What a loss that `Collects` noted on other ranks is merged into it.

        Raises:
            ValueError: the micro-batches are no multiple of the data-parallel ranks.
        """
        for batch in batches:
            self._check_routing(batch)
        shares, share = self.data_ranks, self.data_rank
        mine, before = share_of(batches, share, shares), len(noted(loss_fn))
        loss, answers = self._leader.perform(
            self._command(
                "accumulate",
                list(batches),
                loss_fn,
                temperature=temperature,
                with_entropy=with_entropy,
            ),
            lambda: self._local.accumulate(
                mine, loss_fn, temperature=temperature, with_entropy=with_entropy
            ),
        )
        own = noted(loss_fn)
        total, entries = joined([Part(share, loss, own[before:]), *answers], shares)
        if isinstance(loss_fn, Collects):
            loss_fn.merge([*own[:before], *entries])
        return total

    def step(self, lr: float, *, max_grad_norm: float) -> float:
        """Clip, apply one optimizer step, clear gradients; return the gradient norm."""
        norm, _ = self._leader.perform(
            self._command("step", lr, max_grad_norm=max_grad_norm),
            lambda: self._local.step(lr, max_grad_norm=max_grad_norm),
        )
        return norm

    def snapshot(self) -> Snapshot:
        """Copy weights and optimizer state to rank 0's host."""
        snapshot, _ = self._leader.perform(self._command("snapshot"), self._local.snapshot)
        return snapshot

    def save(self, path: Path) -> None:
        """Write a snapshot into a directory; rank 0 writes."""
        self.snapshot().write(path)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, from a folder that every rank can read."""
        self._leader.perform(self._command("load", path), lambda: self._local.load(path))

    def _check_routing(self, batch: PackedBatch) -> None:
        """Refuse rows before any rank begins: one with sound ones would wait for the others."""
        if ROUTING in batch.per_token:
            check_routing(batch, self._local.expert_layers)

    def _command(self, method: str, *args: object, **kwargs: object) -> Command:
        return Command(self._number, method, args, kwargs)
