"""The training-side model: one Protocol that learner and oracle share.

Shapes: T tokens of a packed batch, B sequences in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from shared.algo.batching import PackedBatch
from shared.backends.expert_layers import ExpertLayers


@dataclass(frozen=True)
class ForwardOutput:
    """What a training forward hands to the loss; both carry gradient.

    Position t holds the quantity of token t given the tokens before it in its own sequence
    (0 at each sequence's first token): no caller ever shifts. Where the batch carries a
    `loss_mask`, positions outside it are not computed and hold 0; without one, all are.
    """

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor | None


LossFn = Callable[[ForwardOutput, PackedBatch], torch.Tensor]
"""Returns the scalar to differentiate (already divided by the global denominator)."""


class Snapshot(Protocol):
    """State as it was at one moment, in memory of its own: written while training goes on."""

    def write(self, folder: Path) -> None:
        """Write files into a folder; callable from another thread.

        Raises:
            OSError: the disk is full or not writable.
        """
        ...


class Backend(Protocol):
    """Score and train one causal language model, on one process or on the ranks of a layout.

    The published weights are `state()`: names, dtypes and values that a follower's `load_state`
    turns into the same forward, bit for bit in the same layout.

    On several ranks every method is a collective: all ranks call the same ones in the same order,
    with the same batches inside one data-parallel share (`docs/backends.md`). Services hold a
    `LedBackend` then, which has the other ranks do as it does; a method that is added here is added
    there, and to what followers perform.
    """

    name: str
    dtype: torch.dtype

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        ...

    @property
    def expert_layers(self) -> ExpertLayers | None:
        """What rows a batch may carry as `routing.ROUTING`; None where the model has no experts.

        A forward of such a batch takes the given experts; other rows are a ValueError.

        Raises:
            ValueError: the model has experts and cannot replay a record of them.
        """
        ...

    @property
    def data_rank(self) -> int:
        """Which data-parallel share of the micro-batches is this process's, from 0."""
        ...

    @property
    def data_ranks(self) -> int:
        """How many shares there are; gradients are summed over them."""
        ...

    def load_hf(self, path: Path) -> None:
        """Load a Hugging Face directory.

        Raises:
            ValueError: missing, unreadable, or an unknown architecture; one line.
        """
        ...

    def export_hf(self, path: Path) -> None:
        """Write a Hugging Face directory: published tensors, config, tokenizer; one rank writes."""
        ...

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the published tensors one at a time, in a fixed order, whatever the layout.

        Every rank must run it to its end.
        """
        ...

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the published parameters and buffers by Hugging Face name, tied ones once.

        May be live views: clone before keeping.
        """
        ...

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace all weights (names, shapes and dtypes must match exactly).

        Raises:
            ValueError: names both sides of the first disagreement.
        """
        ...

    def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
        """Return logprobs_T without gradient, dtype fp32 (fp64 for an fp64 model)."""
        ...

    def forward_backward(
        self, batch: PackedBatch, loss_fn: LossFn, *, temperature: float, with_entropy: bool
    ) -> float:
        """Accumulate gradients of one micro-batch; return the loss value."""
        ...

    def accumulate(
        self,
        batches: Sequence[PackedBatch],
        loss_fn: LossFn,
        *,
        temperature: float,
        with_entropy: bool,
    ) -> float:
        """Accumulate gradients of all micro-batches of this rank's share of an optimizer step.

        As `forward_backward` on each in turn, but a pipeline may keep its stages busy with them.
        Returns the sum of the loss values.
        """
        ...

    def step(self, lr: float, *, max_grad_norm: float) -> float:
        """Clip, apply one optimizer step, clear gradients; return the gradient norm.

        A non-finite norm skips the update (gradients cleared, the norm returned).
        """
        ...

    def snapshot(self) -> Snapshot:
        """Copy weights and optimizer state to the host; empty on ranks that do not write."""
        ...

    def save(self, path: Path) -> None:
        """Write a snapshot into a directory; one rank writes."""
        ...

    def load(self, path: Path) -> None:
        """Restore what a snapshot wrote on any layout of the same backend.

        Raises:
            ValueError: a file is missing, unreadable, or belongs to another model.
        """
        ...
