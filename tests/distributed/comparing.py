"""How far two sets of parameters are apart, against the size of what training changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

MAX_ERROR, MAX_SHARE = 1e-4, 0.03
MAX_LOGPROB_ERROR = 5e-6
"""Of a float32 log-prob against the plain Hugging Face forward, in one process."""


def differences(
    before: Mapping[str, torch.Tensor],
    want: Mapping[str, torch.Tensor],
    got: Mapping[str, torch.Tensor],
) -> tuple[float, float]:
    """Return the largest difference of a parameter, and ‖got - want‖ / ‖want - before‖."""
    assert got.keys() == want.keys()
    largest = max(float((got[n] - want[n]).abs().max()) for n in want)
    error = sum(float((got[n] - want[n]).square().sum()) for n in want) ** 0.5
    step = sum(float((want[n] - before[n]).square().sum()) for n in want) ** 0.5
    return largest, error / step


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
