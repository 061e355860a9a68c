"""The last layer's MLP on the rows whose log-prob is wanted, and no others.

In multi-turn episodes a third of the tokens are sampled. Attention needs every token of every
layer, but the output of the last MLP is read only where a next token is scored: a sixth of all
multiplications is saved in a two-layer model, 1/(3·layers) in general.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from shared.backends.packed_attention import take_rows


class LastMlpRows:
    """Wraps `layers[-1].mlp` of a decoder; a model without a plain MLP there is left alone."""

    def __init__(self, model: Any) -> None:
        self._rows_N: torch.Tensor | None = None
        layers = getattr(model.base_model, "layers", None)
        mlp = getattr(layers[-1], "mlp", None) if layers is not None and len(layers) else None
        if mlp is not None and isinstance(getattr(mlp, "down_proj", None), torch.nn.Linear):
            self._inner = mlp.forward
            mlp.forward = self._forward

    @contextmanager
    def only(self, rows_N: torch.Tensor) -> Generator[None]:
        """Restrict the MLP to these rows (distinct) of the packed tokens; the others get 0."""
        self._rows_N = rows_N
        try:
            yield
        finally:
            self._rows_N = None

    def _forward(self, hidden_1TD: torch.Tensor) -> torch.Tensor:
        rows_N = self._rows_N
        if rows_N is None or rows_N.shape[0] == hidden_1TD.shape[1]:
            return self._inner(hidden_1TD)
        out_ND = self._inner(take_rows(hidden_1TD[0], rows_N))
        zeros_TD = out_ND.new_zeros(hidden_1TD.shape[1], out_ND.shape[1])
        return zeros_TD.index_copy(0, rows_N, out_ND)[None]
