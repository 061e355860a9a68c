"""One forward from packed tokens to log-probs and entropies, as a module.

A module of its own because sharding (`fsdp.py`) gathers the parameters of what it calls: head,
embedding and norm are used inside this forward, where they are whole.

Shapes: T tokens of a packed batch, N of them whose log-prob is wanted, D hidden size, L layers with
experts, K experts per token.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from shared.algo.batching import PackedBatch
from shared.algo.logprobs import token_logprobs
from shared.backends.base import ForwardOutput
from shared.backends.last_mlp import LastMlpRows
from shared.backends.packed_attention import plan_attention, take_rows
from shared.backends.routing_replay import ROWS, RoutingReplay

HEAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25}


class PackedModel(torch.nn.Module):
    """A transformers causal language model that scores packed tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.last_mlp = LastMlpRows(model)
        self.routing = RoutingReplay(model)
        self.num_vocab = int(model.get_output_embeddings().weight.shape[0])

    def forward(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        lengths: tuple[int, ...],
        rows_N: torch.Tensor,
        temperature: float,
        with_entropy: bool,
        routing_TLK: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return logprobs_N and entropy_N of the tokens at `rows_N` (none of them a first one).

        `routing_TLK` are experts to take (see `routing.ROUTING`), checked by the caller.
        """
        hidden_TD = self.hidden(token_ids_T, positions_T, lengths, rows_N - 1, routing_TLK)
        head = self.model.get_output_embeddings()
        return token_logprobs(
            take_rows(hidden_TD, rows_N - 1),
            head.weight,
            token_ids_T[rows_N],
            bias_V=head.bias,
            temperature=temperature,
            with_entropy=with_entropy,
        )

    def hidden(
        self,
        token_ids_T: torch.Tensor,
        positions_T: torch.Tensor,
        lengths: tuple[int, ...],
        rows_N: torch.Tensor,
        routing_TLK: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return final hidden states [T, D], of which only the rows `rows_N` are meaningful."""
        replayed = {} if routing_TLK is None else {ROWS: routing_TLK}
        with self.last_mlp.only(rows_N):
            return self.model.base_model(
                input_ids=token_ids_T[None],
                position_ids=positions_T[None],
                use_cache=False,
                attention_plan=plan_attention(lengths, token_ids_T.device),
                **replayed,
            ).last_hidden_state[0]

    def check_head(self, source: Path) -> None:
        """Refuse a model whose logits are not its head applied to the final hidden states.

        Raises:
            ValueError: names the directory it was loaded from; one line.
        """
        head = self.model.get_output_embeddings()
        size = min(5, self.num_vocab)
        ids_T = torch.arange(size, device=head.weight.device)
        rows_N = torch.tensor([size - 1], device=ids_T.device)
        with torch.no_grad():
            want_V = self.model(
                input_ids=ids_T[None],
                position_ids=ids_T[None],
                use_cache=False,
                attention_plan=plan_attention((size,), ids_T.device),
            ).logits[0, -1]
            hidden_TD = self.hidden(ids_T, ids_T, (size,), rows_N)
            got_V = torch.nn.functional.linear(hidden_TD[rows_N[0]], head.weight, head.bias)
        error = float((want_V.double() - got_V.double()).abs().max())
        tolerance = HEAD_TOLERANCE[head.weight.dtype] * max(1.0, float(got_V.abs().max()))
        if not (math.isfinite(error) and error <= tolerance):
            raise ValueError(
                f"model {source}: {type(self.model).__name__} computes logits that are not its "
                f"head applied to its hidden states (off by {error:.3g}); it is not supported"
            )


def wanted_rows(batch: PackedBatch) -> torch.Tensor:
    """Return i64[N]: the tokens whose log-prob is computed (see `base.ForwardOutput`)."""
    wanted_T = batch.positions_T > 0
    mask_T = batch.per_token.get("loss_mask")
    if mask_T is not None:
        wanted_T &= mask_T.bool()
    return wanted_T.nonzero()[:, 0]


def check_token_ids(batch: PackedBatch, num_vocab: int) -> None:
    """Refuse token ids that the model has no row for.

    Raises:
        ValueError: names the range found and the vocabulary.
    """
    ids_T = batch.token_ids_T
    if not 0 <= int(ids_T.min()) <= int(ids_T.max()) < num_vocab:
        raise ValueError(
            f"token ids {int(ids_T.min())}..{int(ids_T.max())} are outside the model's "
            f"vocabulary of {num_vocab}"
        )


def spread(
    batch: PackedBatch,
    rows_N: torch.Tensor,
    logprobs_N: torch.Tensor,
    entropy_N: torch.Tensor | None,
) -> ForwardOutput:
    """Lay the computed rows out over the packed tokens, 0 elsewhere."""
    zeros_T = logprobs_N.new_zeros(batch.token_ids_T.shape[0])
    return ForwardOutput(
        logprobs_T=zeros_T.index_copy(0, rows_N, logprobs_N),
        entropy_T=None if entropy_N is None else zeros_T.index_copy(0, rows_N, entropy_N),
    )


def on_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Return the batch there; the same object where it already is."""
    if batch.token_ids_T.device == device:
        return batch
    return PackedBatch(
        token_ids_T=batch.token_ids_T.to(device),
        positions_T=batch.positions_T.to(device),
        lengths=batch.lengths,
        per_token={name: x.to(device) for name, x in batch.per_token.items()},
    )
