import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.algo.logprobs import token_logprobs, token_logprobs_reference


def inputs(rows: int = 7, vocab: int = 11, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(rows * 100 + vocab)
    hidden = torch.randn(rows, 5, dtype=dtype, generator=generator).requires_grad_()
    head = torch.randn(vocab, 5, dtype=dtype, generator=generator).requires_grad_()
    bias = torch.randn(vocab, dtype=dtype, generator=generator).requires_grad_()
    return hidden, head, bias, torch.randint(0, vocab, (rows,), generator=generator)


def test_two_tokens_by_hand():
    hidden = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    head = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(2.0)]])
    logprobs, entropy = token_logprobs(hidden, head, torch.tensor([0, 0]))
    # row 0: logits log 3, 0 -> probabilities 3/4, 1/4; row 1: 0, log 4 -> 1/5, 4/5
    assert logprobs.tolist() == pytest.approx([math.log(3 / 4), math.log(1 / 5)])
    assert entropy is not None
    by_hand = [
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
        -(0.2 * math.log(0.2) + 0.8 * math.log(0.8)),
    ]
    assert entropy.tolist() == pytest.approx(by_hand)


def test_temperature_two_halves_the_logits():
    hidden, head = torch.tensor([[1.0]]), torch.tensor([[math.log(9.0)], [0.0]])
    logprobs, _ = token_logprobs(hidden, head, torch.tensor([0]), temperature=2.0)
    assert logprobs.item() == pytest.approx(math.log(3 / 4))


@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 12),
    chunk=st.integers(1, 10),
    temperature=st.floats(0.2, 3.0),
    biased=st.booleans(),
)
def test_chunks_give_values_and_gradients_of_the_plain_computation(
    rows: int, vocab: int, chunk: int, temperature: float, biased: bool
):
    hidden, head, bias, targets = inputs(rows, vocab)
    weights = torch.linspace(-1, 2, rows, dtype=torch.float64)
    results = []
    for function, extra in (
        (token_logprobs, {"chunk": chunk}),
        (token_logprobs_reference, {}),
    ):
        logprobs, entropy = function(
            hidden, head, targets, bias_V=bias if biased else None, temperature=temperature, **extra
        )
        assert entropy is not None
        loss = (weights * logprobs).sum() + (weights.square() * entropy).sum()
        wanted = [hidden, head, *([bias] if biased else [])]
        results.append([logprobs, entropy, *torch.autograd.grad(loss, wanted)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-11)


def test_its_gradient_is_that_of_finite_differences():
    hidden, head, bias, targets = inputs(4, 6)

    def both(h, w, b):
        return token_logprobs(h, w, targets, bias_V=b, temperature=0.7, chunk=3)

    assert torch.autograd.gradcheck(both, (hidden, head, bias))


def test_padded_vocabulary_rows_take_no_probability_and_no_gradient():
    hidden, head, bias, targets = inputs(5, 8)
    targets = targets % 6
    real, _ = token_logprobs(hidden, head[:6], targets, bias_V=bias[:6])
    padded, _ = token_logprobs(hidden, head, targets, bias_V=bias, num_vocab=6, chunk=2)
    torch.testing.assert_close(padded, real, rtol=0, atol=1e-14)
    padded.sum().backward()
    assert head.grad is not None
    assert head.grad[6:].abs().max() == 0


def test_a_bfloat16_head_is_normalised_in_float32():
    hidden, head, _, targets = inputs(6, 9, torch.bfloat16)
    logprobs, entropy = token_logprobs(hidden, head, targets)
    assert entropy is not None
    assert (logprobs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    logits = (hidden @ head.T).float()
    assert torch.equal(logprobs, logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1))
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_the_largest_tensor_it_allocates_is_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch):
    import shared.algo.logprobs as module

    rows_seen = []
    inner = module._logits

    def spy(hidden, *rest):
        rows_seen.append(hidden.shape[0])
        return inner(hidden, *rest)

    monkeypatch.setattr(module, "_logits", spy)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 33)
    hidden, head, _, targets = inputs(7, 11)
    logprobs, _ = token_logprobs(hidden, head, targets)
    logprobs.sum().backward()
    # forward, then backward, for which the last chunk's are kept
    assert rows_seen == [3, 3, 1, 3, 3]


@pytest.mark.parametrize("chunk", [3, 7, 20])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_the_kept_chunk_changes_nothing_also_in_a_second_backward(chunk: int, with_entropy: bool):
    hidden, head, _, targets = inputs(7, 11)
    plain, plain_entropy = token_logprobs_reference(hidden, head, targets, temperature=0.7)
    ours, entropy = token_logprobs(
        hidden, head, targets, temperature=0.7, chunk=chunk, with_entropy=with_entropy
    )
    if entropy is not None:
        plain, ours = plain + 0.3 * plain_entropy, ours + 0.3 * entropy
    want = torch.autograd.grad(plain.square().sum(), (hidden, head))
    loss = ours.square().sum()
    for retain in (True, False):
        got = torch.autograd.grad(loss, (hidden, head), retain_graph=retain)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_a_temperature_that_is_not_positive_is_refused():
    hidden, head, _, targets = inputs()
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, head, targets, temperature=0.0)
