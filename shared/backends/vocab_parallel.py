"""Log-prob and entropy of given tokens from a head whose rows are shared out over ranks.

`shared.algo.logprobs.token_logprobs` for one rank of several: chunk by chunk, each rank computes
the logits of its own rows, one MAX and one fused SUM all-reduce give everybody the result. Full
logits never exist, on no rank, and padded rows take no part.

Shapes: N rows, C of them in a chunk, D hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from shared.algo.logprobs import CHUNK_ELEMENTS, logits_gradient, wide


def vocab_parallel_logprobs(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    first_row: int,
    num_rows: int,
    group: dist.ProcessGroup,
    temperature: float = 1.0,
    with_entropy: bool = True,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (logprobs_N, entropy_N), the same on every rank of the group.

    The gradient of `hidden_ND` is this rank's part: the caller sums it over the group.

    Args:
        hidden_ND: final hidden states, the same on every rank.
        head_VD: this rank's rows of the output embedding.
        targets_N: i64, ids in the whole vocabulary.
        first_row: id of this rank's first row.
        num_rows: of `head_VD`, those that are real, at least one; the rest is padding.
        group: the ranks that share the vocabulary.
        temperature: divides the logits.
        with_entropy: False returns None in its place.
        chunk: rows at a time; None: what keeps a chunk's logits below `CHUNK_ELEMENTS`.

    Raises:
        ValueError: a temperature that is not positive, or no real row.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if num_rows < 1:
        raise ValueError("vocab_parallel_logprobs: a rank without a row of the vocabulary")
    size = max(1, chunk or CHUNK_ELEMENTS // num_rows)
    logprobs_N, entropy_N = _Head.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden_ND, head_VD, targets_N, first_row, num_rows, group, temperature, with_entropy, size
    )
    return logprobs_N, (entropy_N if with_entropy else None)


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        targets_N: torch.Tensor,
        first_row: int,
        num_rows: int,
        group: dist.ProcessGroup,
        temperature: float,
        with_entropy: bool,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = hidden_ND.shape[0]
        dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        logprobs_N = hidden_ND.new_empty(total, dtype=dtype)
        entropy_N = hidden_ND.new_zeros(total if with_entropy else 0, dtype=dtype)
        lse_N = torch.empty_like(logprobs_N)
        real_VD = head_VD[:num_rows]
        for start in range(0, total, chunk):
            rows = slice(start, start + chunk)
            logits_CV = wide(torch.nn.functional.linear(hidden_ND[rows], real_VD)) / temperature
            top_C = logits_CV.amax(dim=-1)
            dist.all_reduce(top_C, dist.ReduceOp.MAX, group=group)
            shifted_CV = logits_CV.sub_(top_C[:, None])
            exp_CV = shifted_CV.exp()
            mine_C, column_C = _mine(targets_N[rows], first_row, num_rows)
            target_C = shifted_CV.gather(1, column_C[:, None])[:, 0]
            parts = [exp_CV.sum(-1), torch.where(mine_C, target_C, 0.0)]
            if with_entropy:
                parts.append(exp_CV.mul_(shifted_CV).sum(-1))
            sums = torch.stack(parts)
            dist.all_reduce(sums, group=group)
            log_sum_C = sums[0].log()
            lse_N[rows] = top_C + log_sum_C
            logprobs_N[rows] = sums[1] - log_sum_C
            if with_entropy:
                entropy_N[rows] = log_sum_C - sums[2] / sums[0]
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, lse_N, entropy_N)
        ctx.settings = (first_row, num_rows, temperature, with_entropy, chunk)
        return logprobs_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs_N: torch.Tensor, grad_entropy_N: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, head_VD, targets_N, lse_N, entropy_N = ctx.saved_tensors
        first_row, num_rows, temperature, with_entropy, chunk = ctx.settings
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD, dtype=lse_N.dtype)
        real_VD = head_VD[:num_rows]
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_CV = wide(torch.nn.functional.linear(hidden_ND[rows], real_VD)) / temperature
            mine_C, column_C = _mine(targets_N[rows], first_row, num_rows)
            grad_C = grad_logprobs_N[rows]
            grad_CV = logits_gradient(
                logits_CV.sub_(lse_N[rows, None]),
                column_C,
                torch.where(mine_C, grad_C, 0.0),
                grad_C,
                (entropy_N[rows], grad_entropy_N[rows]) if with_entropy else None,
            )
            grad_logits_CV = grad_CV.div_(temperature).to(hidden_ND.dtype)
            grad_hidden_ND[rows] = grad_logits_CV @ real_VD
            grad_head_VD[:num_rows] += grad_logits_CV.t() @ hidden_ND[rows]
        return (
            grad_hidden_ND, grad_head_VD.to(head_VD.dtype),
            None, None, None, None, None, None, None,
        )  # fmt: skip


def _mine(
    targets_C: torch.Tensor, first_row: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bool[C], whether a target is among this rank's rows, and its row (else 0)."""
    row_C = targets_C - first_row
    mine_C = (row_C >= 0) & (row_C < num_rows)
    return mine_C, torch.where(mine_C, row_C, 0)
