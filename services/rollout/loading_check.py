"""Whether a module computes with the weights it was given. No vLLM needed.

Two comparisons, both bit for bit. What a module loaded, in its fused and sharded layout, is
compared with the source. What it packed of that is asked for by the forward itself: a row of zeros
with a single one, times the packed matrix, is a column of it, and exact in every dtype. A few
columns per update, others each time, find a copy that was not made anew.

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


class WrongCopy(RuntimeError):
    """A module does not hold what was published."""


class LoadingCheck:
    """Watches modules pack their weights (vLLM: `quant_method.process_weights_after_loading`)."""

    def __init__(self, model: torch.nn.Module, layout: Layout) -> None:
        self.enabled = True
        self._model = model
        self._layout = layout
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
            module, _, name = local.rpartition(".")
            if module in chosen and local not in self._compared:
                tensor = self._model.get_submodule(module).get_parameter(name)
                self._compare(local, tensor, source)
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
            if not torch.equal(bits_of(box_of(tensor, placement)), bits_of(expected)):
                raise WrongCopy(f"{local!r} does not hold {placement.piece} as it was published")

    def _probe(self, local: str, module: torch.nn.Module, weight_NK: torch.Tensor) -> None:
        num_inputs = weight_NK.shape[1]
        count = min(PROBED_COLUMNS, num_inputs)
        self._num_probes += 1
        columns = (torch.arange(count) * (num_inputs // count) + self._num_probes) % num_inputs
        columns_M = columns.to(weight_NK.device)
        rows_MK = weight_NK.new_zeros(count, num_inputs)
        rows_MK[torch.arange(count), columns_M] = 1
        method: Any = module.quant_method
        with torch.inference_mode():
            found_MN = method.apply(module, rows_MK)
            expected_MN = weight_NK[:, columns_M].T
            if torch.equal(found_MN, expected_MN):
                return
            # 0 * nan is nan: outputs of a row that is not finite say nothing.
            finite_N = weight_NK.isfinite().all(dim=1)
            if not torch.equal(found_MN[:, finite_N], expected_MN[:, finite_N]):
                raise WrongCopy(f"the packed copy of {local!r} is not of what was loaded")


def _packs(module: torch.nn.Module) -> bool:
    method = getattr(module, "quant_method", None)
    weight = getattr(module, "weight", None)
    return hasattr(method, "process_weights_after_loading") and isinstance(weight, torch.Tensor)
