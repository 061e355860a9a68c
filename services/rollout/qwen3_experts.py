"""The experts of a Qwen3 layer: which of them a token takes, and what they make of it.

Only the experts that were chosen are computed, each for its tokens at once.

Shapes: N tokens, padding left out, E experts, K experts per token, H hidden, F intermediate, P rows
that the experts compute: N K, and what rounds up every expert's share.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

Ints = npt.NDArray[np.int64]


def route(
    x_NH: torch.Tensor, router_EH: torch.Tensor, experts_per_token: int, *, renormalised: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights [N, K], in the dtype of x, and the ids i64 [N, K] of each token's experts.

    As transformers does it: logits in the model's dtype, everything after them in float32.
    """
    shares_NE = torch.softmax(F.linear(x_NH, router_EH), -1, dtype=torch.float32)
    weights_NK, experts_NK = torch.topk(shares_NE, experts_per_token, -1)
    if renormalised:
        weights_NK /= weights_NK.sum(-1, keepdim=True)
    return weights_NK.to(x_NH.dtype), experts_NK


def mix(
    x_NH: torch.Tensor,
    weights_NK: torch.Tensor,
    experts_NK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Return the weighted outputs [N, H] of the chosen experts.

    Args:
        x_NH: normed hidden states.
        weights_NK: of the chosen experts.
        experts_NK: their ids.
        gate_up: [E, 2 F, H].
        down: [E, H, F].
    """
    num_tokens, choices = experts_NK.shape
    tokens_P, rows_M, shares = _laid_out(experts_NK.numpy(), len(gate_up))
    x_PH = x_NH.index_select(0, torch.from_numpy(tokens_P))
    outputs: list[torch.Tensor] = []
    for expert, part in zip(shares, x_PH.split(list(shares.values())), strict=True):
        gate, up = F.linear(part, gate_up[expert]).chunk(2, -1)
        outputs.append(F.linear(F.silu(gate).mul_(up), down[expert]))
    chosen = torch.cat(outputs).index_select(0, torch.from_numpy(rows_M))
    return (chosen.view(num_tokens, choices, -1) * weights_NK[:, :, None]).sum(1)


def _laid_out(experts_NK: Ints, num_experts: int) -> tuple[Ints, Ints, dict[int, int]]:
    """Order the choices by expert, every expert's share rounded up to a power of two.

    Few distinct shapes occur that way: bfloat16 kernels are compiled per shape.

    Returns:
        The token of every row [P] (a padded one repeats token 0), the row of every choice [N K],
        and the rows of each chosen expert, ascending.
    """
    choices_M = experts_NK.reshape(-1)
    counts_E = np.bincount(choices_M, minlength=num_experts)
    sizes_E = np.where(counts_E > 0, 2 ** np.ceil(np.log2(np.maximum(counts_E, 1))), 0)
    sizes_E = sizes_E.astype(np.int64)
    # By how much the rows of an expert lie further back for the padding of those before it.
    shifts_E = np.cumsum(sizes_E) - sizes_E - (np.cumsum(counts_E) - counts_E)
    order_M = np.argsort(choices_M, kind="stable")
    rows_M = np.empty_like(order_M)
    rows_M[order_M] = np.arange(len(order_M)) + np.repeat(shifts_E, counts_E)
    tokens_P = np.zeros(int(sizes_E.sum()), dtype=np.int64)
    tokens_P[rows_M] = np.arange(len(rows_M)) // experts_NK.shape[1]
    return tokens_P, rows_M, {int(e): int(sizes_E[e]) for e in np.flatnonzero(counts_E)}
