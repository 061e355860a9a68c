"""An engine's tensors as a layout sees them: checked, as integers of their bits, box by box.

Any device, contiguous or with strides. Shapes: S dimensions of a source, L of a local tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import torch

from shared.weights.bits import code_of, dtype_of
from shared.weights.layouts import Layout, Placement, c_strides

LocalTensors = Mapping[str, torch.Tensor]
"""Local name -> tensor; names outside the layout are the engine's own affair."""

_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def signed_of(element_bytes: int) -> torch.dtype:
    """Return the integer dtype that carries the bits of elements of so many bytes.

    Signed, because few devices compute with the unsigned ones; sums are the same modulo 2^width.
    """
    return _SIGNED[element_bytes]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements' bits as signed integers, sharing memory, shape and strides."""
    return tensor.detach().view(signed_of(tensor.element_size()))


def check_local(
    local: LocalTensors, layout: Layout, dtypes: Mapping[str, str] | None = None
) -> None:
    """Check that the tensors are those the layout describes.

    Args:
        local: the engine's tensors.
        layout: of this rank.
        dtypes: published dtype code by source, where it must be the local one, as for a delta:
            a step between two bf16 numbers says nothing about their fp32 casts.

    Raises:
        ValueError: names the first tensor that is missing, of another shape or dtype, or whose
            elements share memory with each other or with another tensor's, so that a change would
            be applied twice.
    """
    spans: list[tuple[str, int, int, str]] = []
    for name, described in layout.tensors.items():
        tensor = local.get(name)
        if tensor is None:
            raise ValueError(f"local tensor {name!r} is in the layout, the engine has none")
        if tuple(tensor.shape) != described.shape:
            raise ValueError(
                f"local tensor {name!r}: layout {list(described.shape)}, "
                f"engine {list(tensor.shape)}"
            )
        if dtypes is not None:
            for placement in described.placements:
                _check_dtype(name, tensor, placement.source, dtypes[placement.source])
        if tensor.numel():
            start, end = _memory(name, tensor)
            spans.append((str(tensor.device), start, end, name))
    spans.sort()
    for (device, _, end, name), (next_device, start, _, next_name) in itertools.pairwise(spans):
        if device == next_device and start < end:
            raise ValueError(
                f"local tensors {name!r} and {next_name!r} share memory: a layout describes "
                "tied tensors once"
            )


def box_of(tensor: torch.Tensor, placement: Placement) -> torch.Tensor:
    """Return the placement's box of a local tensor as a view, shaped [size], in source order."""
    index: list[int | slice] = list(placement.offset)
    for dim, size, step in zip(placement.dims, placement.size, placement.step, strict=True):
        start = placement.offset[dim]
        index[dim] = slice(start, start + max(0, (size - 1) * step + 1) if size else start, step)
    view = tensor.detach()[tuple(index)]
    ascending = sorted(placement.dims)
    return view.permute([ascending.index(dim) for dim in placement.dims])


def write_whole(
    local: LocalTensors,
    layout: Layout,
    state: Mapping[str, torch.Tensor],
    names: Collection[str] | None = None,
) -> None:
    """Overwrite whole sources, cast to the local dtype: loading, and the way of cast layouts.

    Args:
        local: the engine's tensors, written in place.
        layout: of this rank.
        state: the published version in full, or at least the sources of this rank in `names`.
        names: the sources to write; all by default.

    Raises:
        ValueError: before anything is written; as `check_local`, and for a source that is missing
            or of another shape.
    """
    check_local(local, layout)
    wanted = [
        (name, placement)
        for name, placement in layout.placements()
        if names is None or not set(placement.names).isdisjoint(names)
    ]
    for _, placement in wanted:
        source = state.get(placement.source)
        if source is None or tuple(source.shape) != placement.source_shape:
            found = "nothing" if source is None else str(list(source.shape))
            raise ValueError(
                f"source {placement.source!r}: layout {list(placement.source_shape)}, "
                f"published {found}"
            )
    with torch.inference_mode():
        for name, placement in wanted:
            box = box_of(local[name], placement)
            part = tuple(
                slice(start, start + size)
                for start, size in zip(placement.start, placement.size, strict=True)
            )
            box.copy_(state[placement.source].detach()[part])


class FlatView:
    """A local tensor as a line of integers in C order, whatever its strides."""

    def __init__(self, tensor: torch.Tensor) -> None:
        bits = bits_of(tensor)
        self._shape = tuple(bits.shape)
        self._strides = tuple(bits.stride())
        self._is_contiguous = bits.is_contiguous()
        if self._is_contiguous:
            self._line = bits.view(-1)
        else:
            self._line = bits.as_strided((_span(bits),), (1,), bits.storage_offset())

    def read(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the bits at positions i8[K]."""
        return self._line.index_select(0, self._in_memory(positions))

    def write(self, positions: torch.Tensor, bits: torch.Tensor) -> None:
        """Overwrite the bits at positions i8[K], all different."""
        self._line.index_copy_(0, self._in_memory(positions), bits)

    def _in_memory(self, positions: torch.Tensor) -> torch.Tensor:
        if self._is_contiguous:
            return positions
        found = torch.zeros_like(positions)
        rest = positions
        for logical, stride in zip(c_strides(self._shape), self._strides, strict=True):
            found += rest.div(logical, rounding_mode="floor") * stride
            rest = rest.remainder(logical)
        return found


def _check_dtype(name: str, tensor: torch.Tensor, source: str, code: str) -> None:
    if tensor.dtype != dtype_of(code):
        raise ValueError(
            f"local tensor {name!r} is {code_of(tensor.dtype)}, its source {source!r} is "
            f"published as {code}: a delta is exact in the published dtype only; write whole "
            "tensors instead"
        )


def _memory(name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses [start, end) between which the elements lie."""
    if any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise ValueError(f"local tensor {name!r} is expanded: its elements share memory")
    start = tensor.data_ptr()
    return start, start + _span(tensor) * tensor.element_size()


def _span(tensor: torch.Tensor) -> int:
    """Return how many elements of memory lie between the first and the last one, both included."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)
