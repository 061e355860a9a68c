"""The training-side model on megatron-core (see `base.Backend`).

Dtypes: as in the torch backend. bfloat16 trains float32 masters that the distributed optimizer
keeps; gradients are summed in float32.

Shapes: T tokens of a packed batch, N of them whose log-prob is wanted, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shared.algo.batching import PackedBatch
from shared.backends.adamw import AdamWSettings
from shared.backends.base import ForwardOutput, LossFn
from shared.backends.expert_layers import ExpertLayers, check_routing
from shared.backends.hf_files import HfFiles, check_given, write_hf
from shared.backends.megatron import core, cpu
from shared.backends.megatron.building import (
    Ranks,
    build_module,
    open_ranks,
    transformer_config,
    with_gradients,
)
from shared.backends.megatron.layout import Layout, Shape
from shared.backends.megatron.optimizer import ShardedAdamW
from shared.backends.megatron.packing import packed_params, padded
from shared.backends.megatron.weights import ShardedWeights, values
from shared.backends.packed_attention import take_rows
from shared.backends.packed_model import check_token_ids, on_device, spread, wanted_rows
from shared.backends.snapshot import TensorSnapshot, take
from shared.backends.vocab_parallel import vocab_parallel_logprobs


@dataclass(frozen=True)
class _Loaded:
    shape: Shape
    ranks: Ranks
    source: Path
    config: Any
    model: Any
    """What megatron-core's schedules run: the module, wrapped where it trains."""
    module: Any
    weights: ShardedWeights
    optimizer: ShardedAdamW | None
    """None: it only scores."""


class MegatronBackend:
    """Score and train one causal language model over the ranks of a layout."""

    name = "megatron"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        layout: Layout | None = None,
        optimizer: AdamWSettings | None = None,
        recompute: bool = False,
        trains: bool = True,
    ) -> None:
        """Hold no model yet; torch.distributed must be initialised.

        One that does not train has neither gradient buffers nor an optimizer.

        Raises:
            ValueError: a dtype that megatron-core does not train.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"backend megatron trains float32 and bfloat16, not {dtype}")
        self.dtype = dtype
        self.device = torch.device("cuda" if cpu.HAVE_CUDA else "cpu")
        self.settings = optimizer or AdamWSettings()
        self._layout = layout or Layout()
        self._recompute = recompute
        self._trains = trains
        self._loaded: _Loaded | None = None

    @property
    def _at(self) -> _Loaded:
        if self._loaded is None:
            raise ValueError("MegatronBackend holds no model yet: call load_hf first")
        return self._loaded

    @property
    def _optimizer(self) -> ShardedAdamW:
        if self._at.optimizer is None:
            raise ValueError("a backend that only scores has no optimizer")
        return self._at.optimizer

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._at.shape.vocab_size

    @property
    def expert_layers(self) -> ExpertLayers | None:
        """What recorded experts the model can replay, None where it has none."""
        return self._at.shape.expert_layers

    @property
    def data_rank(self) -> int:
        """Which share of the micro-batches is this process's."""
        return self._at.ranks.data

    @property
    def data_ranks(self) -> int:
        """How many shares there are."""
        return self._at.ranks.data_ranks

    def load_hf(self, path: Path) -> None:
        """Load a Hugging Face directory; a fresh optimizer.

        Raises:
            ValueError: unreadable, an architecture or layout that is not supported, missing,
                surplus or misshapen tensors; one line.
        """
        try:
            shape = Shape.of(json.loads((path / "config.json").read_text()))
            shape.check(self._layout)
        except (OSError, ValueError) as error:
            raise ValueError(f"model {path}: {' '.join(str(error).split())}") from error
        ranks = open_ranks(self._layout)
        config = transformer_config(shape, self._layout, self.dtype, recompute=self._recompute)
        module = build_module(shape, ranks, config)
        # Before weights are read: it moves the parameters into buffers of its own.
        model = with_gradients(module, config) if self._trains else module
        weights = ShardedWeights(shape, ranks, module)
        files = HfFiles(path)
        files.check(weights.shapes, ignored=["lm_head.weight"] if shape.tied else [])
        for entry in weights.entries:
            if weights.copies(entry):
                weights.write(entry, {n: files.read(n).to(self.dtype) for n in entry.tensors})
        optimizer = (
            ShardedAdamW(model, self.settings, weights, self.dtype) if self._trains else None
        )
        self._loaded = _Loaded(shape, ranks, path, config, model, module, weights, optimizer)

    def export_hf(self, path: Path) -> None:
        """Write a Hugging Face directory; every rank takes part, the first one writes."""
        writes = dist.get_rank() == 0
        write_hf(path, self._at.source, self.stream(), dtype=self.dtype, writes=writes)

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the published tensors, one at a time, on every rank."""
        return self._at.weights.stream(values, self.dtype)

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the published tensors, gathered, on every rank."""
        return dict(self.stream())

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace all weights; the optimizer's moments stay.

        Raises:
            ValueError: names, shapes or dtypes differ; nothing is written then.
        """
        shapes = self._at.weights.shapes
        check_given(state, {name: (shape, self.dtype) for name, shape in shapes.items()})
        for entry in self._at.weights.entries:
            self._at.weights.write(entry, state)
        if self._at.optimizer is not None:
            self._at.optimizer.reload_masters()

    def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
        """Return logprobs_T without gradient, on every rank of the share."""
        at = self._at
        with torch.no_grad():
            outputs = self._run([batch], None, temperature, with_entropy=False)
            logprobs_T = torch.zeros(batch.num_tokens, device=self.device)
            if at.ranks.last:
                logprobs_T.copy_(outputs[0])
            if at.ranks.layout.pp > 1:
                group = core.parallel_state.get_pipeline_model_parallel_group()
                source = core.parallel_state.get_pipeline_model_parallel_last_rank()
                dist.broadcast(logprobs_T, src=source, group=group)
        return logprobs_T.to(batch.token_ids_T.device)

    def forward_backward(
        self, batch: PackedBatch, loss_fn: LossFn, *, temperature: float, with_entropy: bool
    ) -> float:
        """As `accumulate` of one micro-batch."""
        return self.accumulate([batch], loss_fn, temperature=temperature, with_entropy=with_entropy)

    def accumulate(
        self,
        batches: Sequence[PackedBatch],
        loss_fn: LossFn,
        *,
        temperature: float,
        with_entropy: bool,
    ) -> float:
        """Accumulate gradients of this rank's micro-batches, pipelined; return their losses' sum.

        The loss is computed on the last stage; the other stages return 0.
        """
        with torch.enable_grad():
            losses = self._run(batches, loss_fn, temperature, with_entropy=with_entropy)
        return float(sum(float(loss) for loss in losses))

    def step(self, lr: float, *, max_grad_norm: float) -> float:
        """Clip, step, clear gradients; return the norm before clipping."""
        return self._optimizer.step(lr, max_grad_norm=max_grad_norm)

    def snapshot(self) -> TensorSnapshot:
        """Copy weights and optimizer state, by Hugging Face name, to the first rank's host."""
        streams = {"weights": self.stream(), "optimizer": self._optimizer.stream()}
        return take(streams, keeps=dist.get_rank() == 0)

    def save(self, path: Path) -> None:
        """Write a snapshot; every rank takes part, the first one writes."""
        self.snapshot().write(path)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, on this or another layout.

        Raises:
            ValueError: a file is missing, unreadable, or belongs to another model.
        """
        weights, moments = HfFiles(path, "weights"), HfFiles(path, "optimizer")
        weights.check(self._at.weights.shapes)
        self._optimizer.check_state(moments.shapes)
        for entry in self._at.weights.entries:
            if self._at.weights.copies(entry):
                self._at.weights.write(entry, {n: weights.read(n) for n in entry.tensors})
        self._optimizer.reload_masters()
        self._optimizer.load_state(moments.read, moments.names)

    def _run(
        self,
        batches: Sequence[PackedBatch],
        loss_fn: LossFn | None,
        temperature: float,
        *,
        with_entropy: bool,
    ) -> list[torch.Tensor]:
        """Run the pipeline's schedule; return the last stage's losses or log-probs."""
        for batch in batches:
            check_token_ids(batch, self.vocab_size)
            check_routing(batch, self.expert_layers)
        forward_backward = core.schedules.get_forward_backward_func()
        found: list[torch.Tensor] = forward_backward(
            forward_step_func=partial(self._forward_step, loss_fn, temperature, with_entropy),
            data_iterator=iter(batches),
            model=[self._at.model],
            num_microbatches=len(batches),
            seq_length=max(batch.num_tokens for batch in batches),
            micro_batch_size=1,
            forward_only=loss_fn is None,
            collect_non_loss_data=loss_fn is None,
        )
        return found

    def _forward_step(
        self,
        loss_fn: LossFn | None,
        temperature: float,
        with_entropy: bool,
        batches: Iterator[PackedBatch],
        model: Any,
    ) -> tuple[torch.Tensor, Any]:
        batch = on_device(next(batches), self.device)
        parts = self._layout.tp if self._layout.sp else 1
        even = padded(batch, parts)
        hidden_T1D = model(
            input_ids=even.token_ids_T[None],
            position_ids=even.positions_T[None],
            attention_mask=None,
            packed_seq_params=packed_params(even, self._at.ranks.tp if parts > 1 else 0, parts),
        )
        if not self._at.ranks.last:
            return hidden_T1D, None
        output = self._output(batch, hidden_T1D, temperature, with_entropy=with_entropy)
        if loss_fn is None:
            return output.logprobs_T, _as_data
        loss = loss_fn(output, batch)
        if not loss.requires_grad:  # every rank takes part in the backward pass
            loss = loss + 0.0 * output.logprobs_T.sum()
        return loss, _as_loss

    def _output(
        self,
        batch: PackedBatch,
        hidden_T1D: torch.Tensor,
        temperature: float,
        *,
        with_entropy: bool,
    ) -> ForwardOutput:
        at, rows_N = self._at, wanted_rows(batch)
        parallel = core.tensor_parallel
        if self._layout.sp:
            hidden_T1D = parallel.gather_from_sequence_parallel_region(hidden_T1D)
        else:
            hidden_T1D = parallel.copy_to_tensor_model_parallel_region(hidden_T1D)
        rows = at.shape.padded_vocab(self._layout.tp) // self._layout.tp
        first = at.ranks.tp * rows
        logprobs_N, entropy_N = vocab_parallel_logprobs(
            take_rows(hidden_T1D[:, 0], rows_N - 1),
            self._head,
            batch.token_ids_T[rows_N],
            first_row=first,
            num_rows=min(rows, at.shape.vocab_size - first),
            group=core.parallel_state.get_tensor_model_parallel_group(),
            temperature=temperature,
            with_entropy=with_entropy,
        )
        return spread(batch, rows_N, logprobs_N, entropy_N)

    @property
    def _head(self) -> torch.Tensor:
        module = self._at.module
        if self._at.shape.tied:
            return module.shared_embedding_or_output_weight()
        return module.output_layer.weight


def _as_data(logprobs_T: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    return logprobs_T.detach()


def _as_loss(loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (what is differentiated, a token count that nobody divides by, what is kept)."""
    return loss, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach()
