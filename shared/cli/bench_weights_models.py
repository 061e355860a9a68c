"""The models of `make bench-weights`: synthetic ones of a given size, and saved versions.

Both are a full state that is moved on to its next version in place, like a learner's live weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from shared.cli.bench_weights_cases import Case
from shared.weights.bits import to_bits

State = dict[str, torch.Tensor]

POOL_ELEMENTS = 1 << 24
"""Weights are cut from a pool of so many normals at random places: drawing all of 10^9 takes longer
than everything that is measured, and zstd at level 1 looks back half a megabyte only."""
STANDARD_DEVIATION = 0.02
WIDTHS = ((8 * 10**8, 2048), (3 * 10**8, 1536), (3 * 10**7, 768), (0, 64))
"""Hidden size from so many elements on."""
CHUNK_ELEMENTS = 1 << 22
"""Changed at a time, so that the positions stay small."""


class Model(Protocol):
    """A state and its successors."""

    def first(self) -> State:
        """Return version 0, in memory of the caller's own."""
        ...

    def advance(self, state: State) -> None:
        """Turn the state last returned or advanced into its next version, in place."""
        ...


def open_model(case: Case, folder: Path) -> Model:
    """Return the model of a case; trained versions lie in `folder`."""
    if case.is_trained:
        return SavedVersions(folder / case.name)
    return Synthetic(case.num_elements, case.change_ratio)


class Synthetic:
    """A bf16 transformer of about `num_elements` random weights.

    From version to version a share of them, anywhere, moves up or down by one unit in the last
    place.
    """

    def __init__(self, num_elements: int, change_ratio: float, seed: int = 0) -> None:
        self._shapes = transformer_shapes(num_elements)
        self._change_ratio = change_ratio
        self._rng = np.random.default_rng(seed)

    def first(self) -> State:
        pool = torch.from_numpy(
            self._rng.standard_normal(POOL_ELEMENTS, dtype=np.float32) * STANDARD_DEVIATION
        ).to(torch.bfloat16)
        return {name: self._cut(pool, shape) for name, shape in self._shapes.items()}

    def advance(self, state: State) -> None:
        for name in sorted(state):
            bits = to_bits(state[name])
            for start in range(0, len(bits), CHUNK_ELEMENTS):
                chunk = bits[start : start + CHUNK_ELEMENTS]
                # Gaps of a Bernoulli sequence are geometric; six deviations more than expected.
                expected = len(chunk) * self._change_ratio
                gaps = self._rng.geometric(
                    self._change_ratio, int(expected + 6 * expected**0.5) + 6
                )
                positions = np.cumsum(gaps) - 1
                positions = positions[positions < len(chunk)]
                down = self._rng.integers(0, 2, len(positions), dtype=np.uint16)
                chunk[positions] += np.uint16(1) - (down << np.uint16(1))

    def _cut(self, pool: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        flat = tensor.view(-1)
        for start in range(0, len(flat), POOL_ELEMENTS // 2):
            part = flat[start : start + POOL_ELEMENTS // 2]
            place = int(self._rng.integers(0, POOL_ELEMENTS - len(part) + 1))
            part.copy_(pool[place : place + len(part)])
        return tensor


class SavedVersions:
    """Versions 0, 1, ... of a training run, as files; after the last one they are walked back.

    A step back changes the same elements as the step forth, so that a few versions give any number
    of repetitions.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(folder.glob("*.safetensors"))
        if len(self._files) < 2:
            raise ValueError(f"{folder} holds {len(self._files)} versions; two at least are needed")
        self._order: Iterator[Path] = itertools.cycle([*self._files, *self._files[-2:0:-1]])

    def first(self) -> State:
        return self._read(next(self._order))

    def advance(self, state: State) -> None:
        for name, tensor in self._read(next(self._order)).items():
            state[name].copy_(tensor)

    def _read(self, file: Path) -> State:
        from safetensors.torch import load_file  # takes a moment; synthetic models need none

        return load_file(file)


def transformer_shapes(num_elements: int) -> dict[str, tuple[int, ...]]:
    """Return tensors of a dense transformer with tied embeddings, by Hugging Face name.

    The embedding takes what whole layers leave over: the sum is at most one row below
    `num_elements`.
    """
    hidden = next(hidden for least, hidden in WIDTHS if num_elements >= least)
    middle, narrow = hidden * 11 // 4, hidden // 4
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (middle, hidden),
        "mlp.up_proj.weight": (middle, hidden),
        "mlp.down_proj.weight": (hidden, middle),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    layer_elements = sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(1, int(num_elements * 0.93) // layer_elements)
    rest = num_elements - layers * layer_elements - hidden
    if rest < hidden:
        raise ValueError(f"{num_elements} elements are too few for one layer of width {hidden}")
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (rest // hidden, hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(layers):
        for name, shape in layer.items():
            shapes[f"model.layers.{index}.{name}"] = shape
    return shapes
