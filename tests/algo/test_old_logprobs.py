"""The definition of the old log-prob, on a model small enough to forward by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.old_logprobs import old_logprobs
from shared.algo.version_scoring import parts_by_version
from shared.wire.trajectory import Span

VOCAB, HIDDEN = 5, 3
GENERATOR = torch.Generator().manual_seed(0)
E = torch.randn(3, VOCAB, HIDDEN, generator=GENERATOR, dtype=torch.float64)
U = torch.randn(3, HIDDEN, VOCAB, generator=GENERATOR, dtype=torch.float64)
"""By version: embedding and head."""

IDS = torch.tensor([0, 1, 2, 3, 1, 4, 0, 2, 2, 1])
MASK = torch.tensor([0, 0, 1, 1, 1, 0, 0, 1, 1, 0])
STAMPS = torch.tensor([-1, -1, 0, 0, 1, -1, -1, 1, 2, -1])


def forward(version: int, ids: torch.Tensor) -> torch.Tensor:
    """A causal model: the mean of the embeddings so far, through the head."""
    counts = torch.arange(1, len(ids) + 1, dtype=torch.float64)[:, None]
    return (E[version][ids].cumsum(0) / counts) @ U[version]


def by_hand(ids: list[int], t: int, embed: list[int], head: int, temperature: float = 1.0) -> float:
    """Token t, its prefix embedded by the versions in `embed`, the head of `head`."""
    hidden = [sum(float(E[embed[s], ids[s], h]) for s in range(t)) / t for h in range(HIDDEN)]
    logits = [
        sum(hidden[h] * float(U[head, h, v]) for h in range(HIDDEN)) / temperature
        for v in range(VOCAB)
    ]
    return logits[ids[t]] - math.log(sum(math.exp(x) for x in logits))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_token_has_its_whole_prefix_processed_by_its_own_version(temperature: float):
    found = old_logprobs(IDS, MASK, STAMPS, forward, temperature=temperature)
    ids = IDS.tolist()
    for t, sampled in enumerate(MASK.tolist()):
        version = int(STAMPS[t])
        want = by_hand(ids, t, [version] * t, version, temperature) if sampled else 0.0
        assert float(found[t]) == pytest.approx(want, abs=1e-12)


def test_the_known_wrong_answers_differ():
    found, ids = old_logprobs(IDS, MASK, STAMPS, forward).tolist(), IDS.tolist()
    sampled = MASK.nonzero()[:, 0].tolist()
    newest = [by_hand(ids, t, [2] * t, 2) for t in sampled]
    segment_only = [by_hand(ids[t - 1 :], 1, [int(STAMPS[t])], int(STAMPS[t])) for t in sampled]
    # the cache of a kept prefix: each token embedded by the version that was there at the time
    live = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    stale = [by_hand(ids, t, live[:t], int(STAMPS[t])) for t in sampled]
    exact = [found[t] for t in sampled]
    assert max(abs(a - b) for a, b in zip(newest, exact, strict=True)) > 0.1
    assert max(abs(a - b) for a, b in zip(segment_only, exact, strict=True)) > 0.1
    gaps = [abs(a - b) for a, b in zip(stale, exact, strict=True)]
    assert gaps[:2] == pytest.approx([0.0, 0.0], abs=1e-12)  # version 0 had no older cache
    assert min(gaps[2:]) > 1e-3


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2)), min_size=1, max_size=12))
def test_prefixes_up_to_the_last_own_token_are_enough(drawn: list[tuple[bool, int]]):
    ids = torch.arange(len(drawn) + 1) % VOCAB
    mask = torch.tensor([False, *(sampled for sampled, _ in drawn)])
    stamps = torch.tensor([-1, *(version if sampled else -1 for sampled, version in drawn)])
    spans = [
        Span(version=version, start=t, stop=t + 1)
        for t, (sampled, version) in enumerate(drawn, start=1)
        if sampled
    ]
    found = old_logprobs(ids, mask, stamps, forward)
    for part in parts_by_version(spans):
        logp = torch.log_softmax(forward(part.version, ids[: part.prefix_len]), -1)
        for t in part.positions.tolist():
            assert float(found[t]) == pytest.approx(float(logp[t - 1, ids[t]]), abs=1e-12)


def test_a_sampled_first_token_is_refused_and_nothing_sampled_gives_zeros():
    with pytest.raises(ValueError, match="no prefix"):
        old_logprobs(IDS, torch.ones(10), STAMPS, forward)
    assert old_logprobs(IDS, torch.zeros(10), STAMPS, forward).tolist() == [0.0] * 10
