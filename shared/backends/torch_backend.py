"""The training-side model on plain torch: a Hugging Face model over packed sequences.

One process, one device. Learner and oracle use the same class, so that old and current
log-probs come from the same forward.

Dtypes: parameters, activations and the head's product are in the backend's dtype; logits are
upcast to at least float32 before log-softmax. bfloat16 trains a float32 master copy that is not
published. With one thread every call is deterministic: the same layout gives the same bits.

Shapes: T tokens of a packed batch, N of them whose log-prob is wanted, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.algo.batching import PackedBatch
from shared.algo.logprobs import token_logprobs
from shared.backends.adamw import AdamWSettings, MasterAdamW
from shared.backends.base import ForwardOutput, LossFn
from shared.backends.hf_model import export_model, load_model, published_tensors
from shared.backends.last_mlp import LastMlpRows
from shared.backends.packed_attention import plan_attention, take_rows
from shared.backends.tensor_files import read_tensors, write_tensors

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
HEAD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.25}


@dataclass(frozen=True)
class _Loaded:
    model: Any
    source: Path
    optimizer: MasterAdamW
    last_mlp: LastMlpRows
    num_vocab: int


class TorchBackend:
    """Score and train one causal language model on one device (see `base.Backend`)."""

    name = "torch"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        optimizer: AdamWSettings | None = None,
        device: str = "cpu",
    ) -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.settings = optimizer or AdamWSettings()
        self._loaded: _Loaded | None = None

    @property
    def _at(self) -> _Loaded:
        if self._loaded is None:
            raise ValueError("TorchBackend holds no model yet: call load_hf first")
        return self._loaded

    @property
    def num_parameters(self) -> int:
        """Published values."""
        return sum(tensor.numel() for tensor in self.state().values())

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._at.num_vocab

    def load_hf(self, path: Path) -> None:
        """Load a Hugging Face directory; a fresh optimizer.

        Raises:
            ValueError: see `hf_model.load_model`, or a model whose logits are more than its
                head applied to its hidden states (soft-capping, logit scaling); one line.
        """
        model = load_model(path, dtype=self.dtype, device=self.device)
        loaded = _Loaded(
            model=model,
            source=path,
            optimizer=MasterAdamW(dict(model.named_parameters()), self.settings),
            last_mlp=LastMlpRows(model),
            num_vocab=int(model.get_output_embeddings().weight.shape[0]),
        )
        self._check_head(loaded)
        self._loaded = loaded

    def export_hf(self, path: Path) -> None:
        """Write a Hugging Face directory with the source's tokenizer and other files."""
        export_model(self._at.model, self._at.source, path)

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return live views of the published parameters and buffers, tied ones once."""
        return published_tensors(self._at.model)

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace all weights; the optimizer's moments stay.

        Raises:
            ValueError: names, shapes or dtypes differ; nothing is written then.
        """
        own = self.state()
        for name in own.keys() - state.keys():
            raise ValueError(f"load_state: the model has {name}, the given state does not")
        for name in state.keys() - own.keys():
            raise ValueError(f"load_state: the given state has {name}, the model does not")
        for name, tensor in own.items():
            given = state[name]
            if given.shape != tensor.shape or given.dtype != tensor.dtype:
                raise ValueError(
                    f"load_state: {name} is {given.dtype} {tuple(given.shape)} in the given "
                    f"state, {tensor.dtype} {tuple(tensor.shape)} in the model"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
        self._at.optimizer.reload_masters()

    def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
        """Return logprobs_T without gradient (see `base.ForwardOutput` for `loss_mask`)."""
        with torch.no_grad():
            output = self._forward(self._here(batch), temperature, with_entropy=False)
        return output.logprobs_T.to(batch.token_ids_T.device)

    def forward_backward(
        self, batch: PackedBatch, loss_fn: LossFn, *, temperature: float, with_entropy: bool
    ) -> float:
        """Accumulate gradients of one micro-batch; return the loss value."""
        with torch.enable_grad():
            here = self._here(batch)
            loss = loss_fn(self._forward(here, temperature, with_entropy=with_entropy), here)
            if loss.requires_grad:
                loss.backward()
        return float(loss.detach())

    def step(self, lr: float, *, max_grad_norm: float) -> float:
        """Clip, step, clear gradients; return the norm before clipping.

        A non-finite norm skips the update.
        """
        return self._at.optimizer.step(lr, max_grad_norm=max_grad_norm)

    def save(self, path: Path) -> None:
        """Write weights and optimizer state as safetensors into a directory."""
        path.mkdir(parents=True, exist_ok=True)
        write_tensors(path / WEIGHTS_FILE, self.state())
        write_tensors(path / OPTIMIZER_FILE, self._at.optimizer.state())

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, bit for bit.

        Raises:
            ValueError: a file is missing, unreadable, or belongs to another model.
        """
        weights, moments = (read_tensors(path / f) for f in (WEIGHTS_FILE, OPTIMIZER_FILE))
        self._at.optimizer.check_state(moments)
        self.load_state(weights)
        self._at.optimizer.load_state(moments)

    def _here(self, batch: PackedBatch) -> PackedBatch:
        if batch.token_ids_T.device == self.device:
            return batch
        return PackedBatch(
            token_ids_T=batch.token_ids_T.to(self.device),
            positions_T=batch.positions_T.to(self.device),
            lengths=batch.lengths,
            per_token={name: x.to(self.device) for name, x in batch.per_token.items()},
        )

    def _forward(
        self, batch: PackedBatch, temperature: float, *, with_entropy: bool
    ) -> ForwardOutput:
        at, ids_T, positions_T = self._at, batch.token_ids_T, batch.positions_T
        if not 0 <= int(ids_T.min()) <= int(ids_T.max()) < at.num_vocab:
            raise ValueError(
                f"token ids {int(ids_T.min())}..{int(ids_T.max())} are outside the model's "
                f"vocabulary of {at.num_vocab}"
            )
        wanted_T = positions_T > 0
        mask_T = batch.per_token.get("loss_mask")
        if mask_T is not None:
            wanted_T &= mask_T.bool()
        rows_N = wanted_T.nonzero()[:, 0]
        hidden_TD = _hidden(at, batch, ids_T, positions_T, at.last_mlp.only(rows_N - 1))
        head = at.model.get_output_embeddings()
        logprobs_N, entropy_N = token_logprobs(
            take_rows(hidden_TD, rows_N - 1),
            head.weight,
            ids_T[rows_N],
            bias_V=head.bias,
            temperature=temperature,
            with_entropy=with_entropy,
        )
        zeros_T = logprobs_N.new_zeros(ids_T.shape[0])
        return ForwardOutput(
            logprobs_T=zeros_T.index_copy(0, rows_N, logprobs_N),
            entropy_T=None if entropy_N is None else zeros_T.index_copy(0, rows_N, entropy_N),
        )

    def _check_head(self, at: _Loaded) -> None:
        """Refuse a model whose logits are not its head applied to the final hidden states."""
        size = min(5, at.num_vocab)
        ids_T = torch.arange(size, device=self.device)
        batch = PackedBatch(ids_T, ids_T.clone(), (size,))
        rows_N = torch.tensor([size - 1], device=self.device)
        head = at.model.get_output_embeddings()
        with torch.no_grad():
            want_V = at.model(
                input_ids=ids_T[None],
                position_ids=ids_T[None],
                use_cache=False,
                attention_plan=plan_attention((size,), self.device),
            ).logits[0, -1]
            hidden_TD = _hidden(at, batch, ids_T, ids_T, at.last_mlp.only(rows_N))
            got_V = torch.nn.functional.linear(hidden_TD[rows_N[0]], head.weight, head.bias)
        error = float((want_V.double() - got_V.double()).abs().max())
        tolerance = HEAD_TOLERANCE[self.dtype] * max(1.0, float(got_V.abs().max()))
        if not (math.isfinite(error) and error <= tolerance):
            raise ValueError(
                f"model {at.source}: {type(at.model).__name__} computes logits that are not its "
                f"head applied to its hidden states (off by {error:.3g}); it is not supported"
            )


def _hidden(
    at: _Loaded,
    batch: PackedBatch,
    ids_T: torch.Tensor,
    positions_T: torch.Tensor,
    rows: AbstractContextManager[None],
) -> torch.Tensor:
    """Return final hidden states [T, D], of which only the rows in scope are meaningful."""
    with rows:
        return at.model.base_model(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            use_cache=False,
            attention_plan=plan_attention(batch.lengths, ids_T.device),
        ).last_hidden_state[0]
