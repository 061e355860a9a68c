"""Whether a module computes with the weights it was given. No vLLM needed.

Two comparisons, both bit for bit. What a module loaded, in its fused and sharded layout, is
compared with the source. What it packed of that is asked for by the forward itself: a row of zeros
with a single one, times the packed matrix, is a column of it, and exact in every dtype. A few
columns per update, others each time, find a copy that was not made anew. Weights that are packed in
place and enter no single product (experts) are compared with a packing of the source, whole.

Shapes: M probed columns, N outputs, K inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from shared.weights.layouts import Layout
from shared.weights.local_tensors import bits_of, box_of

PROBED_COLUMNS = 8

Source = Mapping[str, torch.Tensor]
Pack = Callable[[torch.Tensor], torch.Tensor]


def as_loaded(module: torch.nn.Module, name: str) -> Pack | None:
    """Say of no parameter that it is packed in place."""
    return None


class WrongCopy(RuntimeError):
    """A module does not hold what was published."""


class LoadingCheck:
    """Watches modules pack their weights (vLLM: `quant_method.process_weights_after_loading`).

    Args:
        model: of the engine.
        layout: where it keeps the published tensors once they are loaded.
        packing: how a module packs a parameter in place; None: it stays as it was loaded.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layout: Layout,
        packing: Callable[[torch.nn.Module, str], Pack | None] = as_loaded,
    ) -> None:
        self.enabled = True
        self._model = model
        self._layout = layout
        self._packing = packing
        self._source: Source | None = None
        self._num_probes = 0
        self._compared: set[str] = set()
        """Local tensors compared while they were loaded: packing may have emptied them since."""
        names = {name: module for name, module in model.named_modules() if _packs(module)}
        self._names = {module: f"{name}.weight" for name, module in names.items()}
        for module in names.values():
            method: Any = module.quant_method
            pack = method.process_weights_after_loading
            method.process_weights_after_loading = functools.partial(self._watch, pack)

    @contextmanager
    def watching(self, source: Source) -> Generator[None]:
        """Check every module that packs inside against `source`.

        Raises:
            WrongCopy: from whatever made a module pack.
        """
        self._source = source if self.enabled else None
        try:
            yield
        finally:
            self._source = None

    def compare(self, modules: Iterable[str], source: Source) -> None:
        """Compare what the named modules hold and was not compared while they packed.

        Raises:
            WrongCopy: names the tensor.
        """
        chosen = set(modules) if self.enabled else set[str]()
        for local in self._layout.tensors:
            path, _, name = local.rpartition(".")
            if path in chosen and local not in self._compared:
                module = self._model.get_submodule(path)
                tensor, pack = module.get_parameter(name), self._packing(module, name)
                if pack is None:
                    self._compare(local, tensor, source)
                else:
                    self._compare_packed(local, tensor, pack, source)
        self._compared = set()

    def _watch(self, pack: Callable[[torch.nn.Module], None], module: torch.nn.Module) -> None:
        source, local = self._source, self._names.get(module, "")
        if source is None or not local:
            pack(module)
            return
        weight = module.get_parameter("weight").detach()
        if local in self._layout.tensors:
            self._compare(local, weight, source)
            self._compared.add(local)
        pack(module)
        self._probe(local, module, weight)

    def _compare(self, local: str, tensor: torch.Tensor, source: Source) -> None:
        for placement in self._layout.tensors[local].placements:
            start, size = placement.start, placement.size
            box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
            expected = source[placement.source][box].to(tensor.device)
            if not same_bits(box_of(tensor, placement), expected):
                raise WrongCopy(f"{local!r} does not hold {placement.piece} as it was published")

    def _compare_packed(self, local: str, tensor: torch.Tensor, pack: Pack, source: Source) -> None:
        """Pack the source once more: whatever shape packing has, the bits must agree."""
        loaded = tensor.new_zeros(self._layout.tensors[local].shape)
        for placement in self._layout.tensors[local].placements:
            start, size = placement.start, placement.size
            box = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
            box_of(loaded, placement).copy_(source[placement.source][box])
        expected = pack(loaded)
        if expected.shape != tensor.shape or not same_bits(expected, tensor):
            raise WrongCopy(f"the packed {local!r} is not of what was published")

    def _probe(self, local: str, module: torch.nn.Module, weight_NK: torch.Tensor) -> None:
        num_inputs = weight_NK.shape[1]
        count = min(PROBED_COLUMNS, num_inputs)
        # Neighbours: a row of the weight is one line of the cache to read, not one per column.
        first = self._num_probes * count % (num_inputs - count + 1)
        self._num_probes += 1
        rows_MK = weight_NK.new_zeros(count, num_inputs)
        rows_MK[:, first : first + count].fill_diagonal_(1)
        method: Any = module.quant_method
        with torch.inference_mode():
            found_MN = method.apply(module, rows_MK)
            expected_MN = weight_NK[:, first : first + count].T
            if torch.equal(found_MN, expected_MN):
                return
            # 0 * nan is nan: outputs of a row that is not finite say nothing.
            finite_N = weight_NK.isfinite().all(dim=1)
            if not torch.equal(found_MN[:, finite_N], expected_MN[:, finite_N]):
                raise WrongCopy(f"the packed copy of {local!r} is not of what was loaded")


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype have the same bits, -0.0 and NaN included.

    Eight bytes at a time where rows allow it: a third of the time of two at a time.
    """
    sides = tuple(side.detach() for side in (left, right))
    if all(_in_words(side) for side in sides):
        return torch.equal(*(side.view(torch.int64) for side in sides))
    return torch.equal(*(bits_of(side) for side in sides))


def _in_words(tensor: torch.Tensor) -> bool:
    """Whether every row consists of whole, aligned 8-byte words."""
    width = tensor.element_size()
    if tensor.dim() == 0 or tensor.stride(-1) != 1 or tensor.storage_offset() * width % 8:
        return False
    strides = tensor.stride()[:-1]
    return tensor.shape[-1] * width % 8 == 0 and all(s * width % 8 == 0 for s in strides)


def _packs(module: torch.nn.Module) -> bool:
    method = getattr(module, "quant_method", None)
    weight = getattr(module, "weight", None)
    return hasattr(method, "process_weights_after_loading") and isinstance(weight, torch.Tensor)
