"""Log-prob and entropy of given tokens from hidden states, without the full logits in memory.

Shapes: N rows (positions whose next token is wanted), D hidden size, V vocabulary.

The head is computed in the dtype of hidden states and weight; logits are upcast to at least
float32 before temperature and log-softmax (`offpolicy.md` 10.1). Both sides of an exact
comparison must use this same function.
"""

from __future__ import annotations

from typing import Any

import torch

CHUNK_ELEMENTS = 1 << 24
"""Logits of one chunk: 64 MiB in float32."""


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in at least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def token_logprobs_reference(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    num_vocab: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (logprobs_N, entropy_N) the plain way: all logits at once."""
    logits_NV = wide(torch.nn.functional.linear(hidden_ND, head_VD, bias_V))
    logp_NV = torch.log_softmax(logits_NV[:, :num_vocab] / temperature, dim=-1)
    logprobs_N = logp_NV.gather(1, targets_N[:, None])[:, 0]
    return logprobs_N, -(logp_NV.exp() * logp_NV).sum(-1)


def token_logprobs(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    num_vocab: int | None = None,
    with_entropy: bool = True,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (logprobs_N, entropy_N) chunk by chunk.

    The backward pass computes each chunk's logits again, but for the last one's, which are kept:
    where all rows fit into one chunk nothing is computed twice.

    Args:
        hidden_ND: final hidden states.
        head_VD: output embedding.
        targets_N: i64, the token whose log-prob is wanted.
        bias_V: the head's bias.
        temperature: divides the logits; the sampler's.
        num_vocab: rows of the head that are real; the padded rest is excluded.
        with_entropy: False returns None in its place.
        chunk: rows at a time; None: what keeps a chunk's logits below `CHUNK_ELEMENTS`.

    Returns:
        fp32 tensors (fp64 for fp64 inputs), differentiable once in hidden, head and bias.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    size = max(1, chunk or CHUNK_ELEMENTS // max(1, head_VD.shape[0]))
    bias = head_VD.new_zeros(0) if bias_V is None else bias_V
    vocab = head_VD.shape[0] if num_vocab is None else num_vocab
    logprobs_N, entropy_N = _ChunkedHead.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden_ND, head_VD, bias, targets_N, temperature, vocab, with_entropy, size
    )
    return logprobs_N, (entropy_N if with_entropy else None)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        bias_V: torch.Tensor,
        targets_N: torch.Tensor,
        temperature: float,
        num_vocab: int,
        with_entropy: bool,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = hidden_ND.shape[0]
        dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        logprobs_N = hidden_ND.new_empty(num_rows, dtype=dtype)
        entropy_N = hidden_ND.new_zeros(num_rows if with_entropy else 0, dtype=dtype)
        lse_N = torch.empty_like(logprobs_N)
        logits_CV = None
        for start in range(0, num_rows, chunk):
            rows = slice(start, start + chunk)
            del logits_CV  # before the next ones are there
            logits_CV = _logits(hidden_ND[rows], head_VD, bias_V, temperature, num_vocab)
            lse_C = torch.logsumexp(logits_CV, dim=-1)
            lse_N[rows] = lse_C
            logprobs_N[rows] = logits_CV.gather(1, targets_N[rows, None])[:, 0] - lse_C
            if with_entropy:
                logits_CV.sub_(lse_C[:, None])
                entropy_N[rows] = -torch.exp(logits_CV).mul_(logits_CV).sum(-1)
        ctx.kept = logits_CV  # log-probs already where there are entropies
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, targets_N, lse_N, entropy_N)
        ctx.settings = (temperature, num_vocab, with_entropy, chunk)
        return logprobs_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_logprobs_N: torch.Tensor, grad_entropy_N: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, head_VD, bias_V, targets_N, lse_N, entropy_N = ctx.saved_tensors
        temperature, num_vocab, with_entropy, chunk = ctx.settings
        grad_hidden_ND = torch.zeros_like(hidden_ND)
        grad_head_VD = torch.zeros_like(head_VD, dtype=lse_N.dtype)
        grad_bias_V = torch.zeros_like(bias_V, dtype=lse_N.dtype)
        for start in range(0, hidden_ND.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits_CV = None
            if start + chunk >= hidden_ND.shape[0]:  # the last one's are overwritten here
                logits_CV, ctx.kept = ctx.kept, None
            are_logprobs = logits_CV is not None and with_entropy
            if logits_CV is None:
                logits_CV = _logits(hidden_ND[rows], head_VD, bias_V, temperature, num_vocab)
            grad_CV = logits_gradient(
                logits_CV if are_logprobs else logits_CV.sub_(lse_N[rows, None]),
                targets_N[rows],
                grad_logprobs_N[rows],
                grad_logprobs_N[rows],
                (entropy_N[rows], grad_entropy_N[rows]) if with_entropy else None,
            )
            del logits_CV
            if temperature != 1.0:
                grad_CV /= temperature
            grad_logits_CV = grad_CV.to(hidden_ND.dtype)
            grad_hidden_ND[rows] = grad_logits_CV @ head_VD[:num_vocab]
            if grad_head_VD.dtype == grad_logits_CV.dtype:
                grad_head_VD[:num_vocab].addmm_(grad_logits_CV.t(), hidden_ND[rows])
            else:
                grad_head_VD[:num_vocab] += grad_logits_CV.t() @ hidden_ND[rows]
            if bias_V.numel():
                grad_bias_V[:num_vocab] += grad_CV.sum(0)
            del grad_CV, grad_logits_CV
        return (
            grad_hidden_ND, grad_head_VD.to(head_VD.dtype), grad_bias_V.to(bias_V.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def logits_gradient(
    logp_CV: torch.Tensor,
    columns_C: torch.Tensor,
    own_C: torch.Tensor,
    grad_C: torch.Tensor,
    entropy: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """Return the gradient of log-probs and entropies with respect to a chunk of logits.

    p · (-g - w · (log p + H)), and + g at the target. Overwrites `logp_CV`: no more than one
    buffer of its size is added.

    Args:
        logp_CV: log-probs of C rows, or this rank's columns of them.
        columns_C: i64, each row's target among these columns.
        own_C: g where the target is among these columns, else 0.
        grad_C: g, the gradient of the row's log-prob.
        entropy: (H_C, w_C), the row's entropy and its gradient; None: no entropies.
    """
    grad_CV = torch.exp(logp_CV)
    if entropy is None:
        grad_CV.mul_(-grad_C[:, None])
    else:
        entropy_C, weight_C = entropy
        factor_CV = logp_CV.add_(entropy_C[:, None]).mul_(-weight_C[:, None])
        grad_CV.mul_(factor_CV.sub_(grad_C[:, None]))
    return grad_CV.scatter_add_(1, columns_C[:, None], own_C[:, None])


def _logits(
    hidden_CD: torch.Tensor,
    head_VD: torch.Tensor,
    bias_V: torch.Tensor,
    temperature: float,
    num_vocab: int,
) -> torch.Tensor:
    bias = bias_V[:num_vocab] if bias_V.numel() else None
    logits_CV = wide(torch.nn.functional.linear(hidden_CD, head_VD[:num_vocab], bias))
    return logits_CV if temperature == 1.0 else logits_CV / temperature
