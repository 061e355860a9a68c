from __future__ import annotations

import numpy as np
import pytest
import torch

from shared.algo.batching import PackedBatch
from shared.weights.canary import (
    backend_scorer,
    canary_tokens,
    check_canary,
    make_canary,
    proves_something,
)
from shared.wire.base import Array
from shared.wire.weights import Canary


class _Bigram:
    """The least backend: log-prob of a token given the one before it, from one table."""

    dtype = torch.float32

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table

    def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
        ids = batch.token_ids_T
        logprobs = torch.log_softmax(self.table / temperature, -1)
        scored = torch.zeros(len(ids), dtype=self.table.dtype)
        scored[1:] = logprobs[ids[:-1], ids[1:]]
        scored[batch.positions_T == 0] = 0.0
        return scored


@pytest.fixture
def table() -> torch.Tensor:
    return torch.randn(11, 11, generator=torch.Generator().manual_seed(0))


def test_the_batch_is_fixed_by_its_seed_and_fits_the_context() -> None:
    tokens = canary_tokens(11, 192, 7)
    assert tokens.shape == (4, 16)
    assert tokens.dtype == np.int32
    assert (tokens >= 0).all()
    assert (tokens < 11).all()
    assert np.array_equal(tokens, canary_tokens(11, 192, 7))
    assert not np.array_equal(tokens, canary_tokens(11, 192, 8))
    assert canary_tokens(11, 5, 7).shape == (4, 5)
    with pytest.raises(ValueError, match="context"):
        canary_tokens(11, 1, 7)


def test_the_same_weights_pass_and_the_log_probs_are_those_of_the_next_tokens(table) -> None:
    backend = _Bigram(table)
    tokens = canary_tokens(11, 16, 0)
    canary = make_canary(backend_scorer(backend), tokens, torch.float32)
    expected = torch.log_softmax(table, -1).numpy()[tokens[:, :-1], tokens[:, 1:]]
    assert np.allclose(canary.logprobs.numpy(), expected, atol=1e-6)
    result = check_canary(canary, backend_scorer(backend))
    assert result.ok
    assert result.max_error == 0.0


def test_layout_noise_passes_and_another_version_fails(table) -> None:
    tokens = canary_tokens(11, 16, 0)
    canary = make_canary(backend_scorer(_Bigram(table)), tokens, torch.float32)
    noisy = check_canary(canary, backend_scorer(_Bigram(table * (1 + 1e-7))))
    assert noisy.ok
    moved = check_canary(canary, backend_scorer(_Bigram(table * 1.001)))
    assert not moved.ok
    assert moved.max_error > canary.tolerance


def test_weights_that_score_nan_never_pass_nor_are_published(table) -> None:
    tokens = canary_tokens(11, 16, 0)
    canary = make_canary(backend_scorer(_Bigram(table)), tokens, torch.float32)
    broken = backend_scorer(_Bigram(table * float("nan")))
    assert not check_canary(canary, broken).ok
    with pytest.raises(ValueError, match="diverged"):
        make_canary(broken, tokens, torch.float32)


def test_float64_models_are_held_to_a_float64_floor(table) -> None:
    tokens = canary_tokens(11, 16, 0)
    double = table.double()
    canary = make_canary(backend_scorer(_Bigram(double)), tokens, torch.float64)
    assert canary.logprobs.dtype == "f8"
    assert check_canary(canary, backend_scorer(_Bigram(double))).ok
    assert not check_canary(
        canary, backend_scorer(_Bigram(double.float().double() + 1e-7 * double))
    ).ok


@pytest.mark.parametrize(
    ("published", "scored", "does"),
    [
        (torch.float32, torch.float32, True),
        (torch.float32, torch.float64, True),
        (torch.float64, torch.float64, True),
        (torch.float64, torch.float32, False),
        (torch.float32, torch.bfloat16, False),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.float32, torch.float8_e4m3fn, False),
    ],
)
def test_a_floor_proves_something_to_a_forward_that_is_as_exact_and_wider_than_16_bits(
    table, published: torch.dtype, scored: torch.dtype, does: bool
) -> None:
    tokens = canary_tokens(11, 16, 0)
    canary = make_canary(backend_scorer(_Bigram(table.double())), tokens, published)
    assert proves_something(canary, scored) is does


def test_a_canary_without_sequences_is_met_by_everybody() -> None:
    canary = Canary(
        token_ids=Array.of(np.zeros((0, 2)), "i4"),
        logprobs=Array.of(np.zeros((0, 1)), "f4"),
        tolerance=0.0,
    )
    assert check_canary(canary, lambda ids: []).ok


def test_scores_of_another_shape_are_no_scores(table) -> None:
    tokens = canary_tokens(11, 16, 0)
    canary = make_canary(backend_scorer(_Bigram(table)), tokens, torch.float32)
    assert not check_canary(canary, lambda ids: [np.zeros(16)] * 3).ok
