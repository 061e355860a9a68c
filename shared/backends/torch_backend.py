"""The training-side model on plain torch: a Hugging Face model over packed sequences.

On one device, or sharded over the ranks of a mesh (`fsdp.py`). Learner and oracle use the same
class, so that old and current log-probs come from the same forward.

Dtypes: parameters, activations and the head's product are in the backend's dtype; logits are
upcast to at least float32 before log-softmax. bfloat16 trains a float32 master copy that is not
published. With one thread every call is deterministic: the same layout gives the same bits.

Shapes: T tokens of a packed batch, N of them whose log-prob is wanted, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from shared.algo.batching import PackedBatch
from shared.backends import fsdp
from shared.backends.adamw import AdamWSettings, MasterAdamW
from shared.backends.base import ForwardOutput, LossFn
from shared.backends.expert_layers import ExpertLayers, check_routing
from shared.backends.hf_files import HfFiles, check_given, write_hf
from shared.backends.hf_model import ignored_tensors, load_empty, load_model, widen_norms
from shared.backends.hf_names import Place, owners, published_places, stream, write
from shared.backends.layer_options import LayerOptions, apply_options
from shared.backends.packed_model import (
    PackedModel,
    check_token_ids,
    on_device,
    spread,
    wanted_rows,
)
from shared.backends.routing import ROUTING
from shared.backends.snapshot import TensorSnapshot, take


@dataclass(frozen=True)
class _Loaded:
    packed: PackedModel
    source: Path
    optimizer: MasterAdamW | None
    """None: it only scores."""
    places: dict[str, Place]

    @property
    def model(self) -> Any:
        return self.packed.model


class TorchBackend:
    """Score and train one causal language model (see `base.Backend`)."""

    name = "torch"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        optimizer: AdamWSettings | None = None,
        device: str = "cpu",
        options: LayerOptions | None = None,
        mesh: DeviceMesh | None = None,
        trains: bool = True,
    ) -> None:
        """Hold no model yet; with a `mesh` of one dimension, shard over its ranks.

        One that does not train has no optimizer and no float32 copy of narrower weights.
        """
        self.dtype = dtype
        self.device = torch.device(device)
        self.settings = optimizer or AdamWSettings()
        self._options = options or LayerOptions()
        self._mesh = mesh
        self._trains = trains
        self._loaded: _Loaded | None = None

    @property
    def _at(self) -> _Loaded:
        if self._loaded is None:
            raise ValueError("TorchBackend holds no model yet: call load_hf first")
        return self._loaded

    @property
    def _optimizer(self) -> MasterAdamW:
        if self._at.optimizer is None:
            raise ValueError("a backend that only scores has no optimizer")
        return self._at.optimizer

    @property
    def num_parameters(self) -> int:
        """Published values."""
        held = owners(self._at.model)
        return sum(held[name].numel() for name in {p.owner for p in self._at.places.values()})

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self._at.packed.num_vocab

    @property
    def expert_layers(self) -> ExpertLayers | None:
        """What recorded experts the model can replay, None where it has none.

        Raises:
            ValueError: it has some, and its routers cannot take recorded ones; one line.
        """
        return self._at.packed.routing.has

    @property
    def data_rank(self) -> int:
        """Which share of the micro-batches is this process's."""
        return self._mesh.get_local_rank() if self._mesh else 0

    @property
    def data_ranks(self) -> int:
        """How many shares there are."""
        return self._mesh.size() if self._mesh else 1

    def load_hf(self, path: Path) -> None:
        """Load a Hugging Face directory; a fresh optimizer.

        Raises:
            ValueError: see `hf_model.load_model`, or a model whose logits are more than its
                head applied to its hidden states (soft-capping, logit scaling); one line.
        """
        packed = self._load_whole(path) if self._mesh is None else self._load_shards(path)
        loaded = _Loaded(
            packed=packed,
            source=path,
            optimizer=self._make_optimizer(packed) if self._trains else None,
            places=published_places(packed.model),
        )
        if self._mesh is None:
            packed.check_head(path)
        self._loaded = loaded

    def _make_optimizer(self, packed: PackedModel) -> MasterAdamW:
        return MasterAdamW(
            dict(packed.model.named_parameters()),
            self.settings,
            parameters_are_masters=self._keeps_masters,
        )

    @property
    def _held_dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        if self._mesh is None or not self._trains:
            return self.dtype
        return fsdp.master_dtype(self.dtype)

    @property
    def _keeps_masters(self) -> bool:
        """Whether the model's parameters are wider than what is published."""
        return self._held_dtype != self.dtype

    def _load_whole(self, path: Path) -> PackedModel:
        packed = PackedModel(load_model(path, dtype=self.dtype, device=self.device))
        apply_options(packed.model, self._options)
        return packed

    def _load_shards(self, path: Path) -> PackedModel:
        assert self._mesh is not None
        model = load_empty(path, dtype=self._held_dtype)
        files = HfFiles(path)
        files.check(fsdp.published_shapes(model), ignored=ignored_tensors(model, files.names))
        packed = PackedModel(model)
        apply_options(model, self._options)
        fsdp.shard(packed, self._mesh, self.dtype)
        fsdp.allocate(packed, self.device)
        fsdp.read_weights(model, files, self.dtype)
        if self.dtype == torch.float64:
            widen_norms(model)
        return packed

    def export_hf(self, path: Path) -> None:
        """Write a Hugging Face directory with the source's tokenizer and other files.

        Every rank takes part; the first one writes.
        """
        write_hf(path, self._at.source, self.stream(), dtype=self.dtype, writes=self.data_rank == 0)

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what `state` holds, one tensor at a time; every rank must run it to its end."""
        return stream(self._at.model, self._at.places, self.dtype if self._keeps_masters else None)

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the published parameters and buffers, tied ones once.

        Live views on one device, gathered copies where the model is sharded.
        """
        return dict(self.stream())

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Replace all weights; the optimizer's moments stay.

        Raises:
            ValueError: names, shapes or dtypes differ; nothing is written then.
        """
        shapes, held = fsdp.published_shapes(self._at.model), owners(self._at.model)
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, place in self._at.places.items():
            dtype = held[place.owner].dtype
            narrowed = self._keeps_masters and dtype.is_floating_point
            wanted[name] = (shapes[name], self.dtype if narrowed else dtype)
        check_given(state, wanted)
        with torch.no_grad():
            for name, place in self._at.places.items():
                write(held[place.owner], place, state[name])
        if self._at.optimizer is not None:
            self._at.optimizer.reload_masters()

    def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
        """Return logprobs_T without gradient (see `base.ForwardOutput` for `loss_mask`)."""
        with torch.no_grad():
            here = on_device(batch, self.device)
            output = self._forward(here, temperature, with_entropy=False)
        fsdp.reshard(self._at.packed)
        return output.logprobs_T.to(batch.token_ids_T.device)

    def forward_backward(
        self, batch: PackedBatch, loss_fn: LossFn, *, temperature: float, with_entropy: bool
    ) -> float:
        """Accumulate gradients of one micro-batch; return the loss value."""
        with torch.enable_grad():
            here = on_device(batch, self.device)
            output = self._forward(here, temperature, with_entropy=with_entropy)
            loss = loss_fn(output, here)
            if self._mesh is not None and not loss.requires_grad:
                loss = loss + 0.0 * output.logprobs_T.sum()  # every rank takes part in the backward
            if loss.requires_grad:
                loss.backward()
        fsdp.reshard(self._at.packed)
        return float(loss.detach())

    def accumulate(
        self,
        batches: Sequence[PackedBatch],
        loss_fn: LossFn,
        *,
        temperature: float,
        with_entropy: bool,
    ) -> float:
        """Accumulate gradients of this rank's micro-batches; return their losses' sum."""
        return sum(
            self.forward_backward(
                batch, loss_fn, temperature=temperature, with_entropy=with_entropy
            )
            for batch in batches
        )

    def step(self, lr: float, *, max_grad_norm: float) -> float:
        """Clip, step, clear gradients; return the norm before clipping.

        A non-finite norm skips the update.
        """
        return self._optimizer.step(lr, max_grad_norm=max_grad_norm)

    def snapshot(self) -> TensorSnapshot:
        """Copy weights and optimizer state to the host; every rank takes part, the first keeps it.

        What it writes does not depend on the number of ranks.
        """
        streams = {"weights": self.stream(), "optimizer": self._optimizer.stream()}
        return take(streams, keeps=self.data_rank == 0)

    def save(self, path: Path) -> None:
        """Write a snapshot; every rank takes part, the first one writes."""
        self.snapshot().write(path)

    def load(self, path: Path) -> None:
        """Restore what `save` wrote, bit for bit, on any number of ranks.

        Raises:
            ValueError: a file is missing, unreadable, or belongs to another model.
        """
        weights, moments = HfFiles(path, "weights"), HfFiles(path, "optimizer")
        self._optimizer.check_state(moments.shapes)
        self.load_state(dict(weights.tensors()))
        self._optimizer.load_state(moments.tensors())

    def _forward(
        self, batch: PackedBatch, temperature: float, *, with_entropy: bool
    ) -> ForwardOutput:
        check_token_ids(batch, self.vocab_size)
        routing_TLK = batch.per_token.get(ROUTING)
        if routing_TLK is not None:
            check_routing(batch, self.expert_layers)
        rows_N = wanted_rows(batch)
        logprobs_N, entropy_N = self._at.packed(
            batch.token_ids_T,
            batch.positions_T,
            batch.lengths,
            rows_N,
            temperature,
            with_entropy,
            routing_TLK,
        )
        return spread(batch, rows_N, logprobs_N, entropy_N)
