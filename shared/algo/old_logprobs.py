"""The old log-prob by its definition: what every exact route must agree with.

    ℓ^old_t = log_softmax( F(θ_v, x_0..x_T-1)[t-1] / τ )[x_t],  v = the version that sampled x_t

F is the training-side forward of the *whole* sequence, processed by one version at a time: tokens
of the environment and of other versions included (`offpolicy.md` 9.3 and 10.1; arXiv 2605.12070).
Routes do the same in fewer tokens (`version_scoring`); this is the plain way, for comparison.

Shapes: T tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shared.algo.logprobs import wide

Forward = Callable[[int, torch.Tensor], torch.Tensor]
"""(version, token_ids_T) -> logits_TV: row t says what follows tokens 0..t."""


def old_logprobs(
    token_ids_T: torch.Tensor,
    m_T: torch.Tensor,
    versions_T: torch.Tensor,
    forward: Forward,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return ℓ^old [T], 0 outside the loss mask.

    Args:
        token_ids_T: the sequence, prompt and environment tokens included.
        m_T: loss mask; its first token has no prefix and cannot be sampled.
        versions_T: stamps, read at loss tokens only.
        forward: of any of the stamped versions.
        temperature: the sampler's.

    Raises:
        ValueError: the first token is in the loss mask.
    """
    mask_T = m_T.bool()
    if bool(mask_T[:1].any()):
        raise ValueError("the first token of a sequence has no prefix: it cannot be in the mask")
    found_T: torch.Tensor | None = None
    for version in versions_T[mask_T].unique().tolist():
        logp_TV = torch.log_softmax(wide(forward(int(version), token_ids_T)) / temperature, -1)
        own_T = mask_T & (versions_T == version)
        rows_N = own_T.nonzero()[:, 0]
        if found_T is None:
            found_T = logp_TV.new_zeros(token_ids_T.shape[0])
        found_T[rows_N] = logp_TV[rows_N - 1, token_ids_T[rows_N]]
    return torch.zeros(token_ids_T.shape[0]) if found_T is None else found_T
