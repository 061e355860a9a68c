import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.backends.packed_attention import (
    BUCKET_SEQUENCES,
    PAD_SLACK,
    packed_attention,
    plan_attention,
    take_rows,
)


def qkv(tokens: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(1, heads, tokens, 6, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    ]


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """One block-diagonal causal mask over all tokens: what packing must equal."""
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(len(owner))
    seen = (owner[:, None] == owner[None, :]) & (index[:, None] >= index[None, :])
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * 6**-0.5
    return (torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v).transpose(1, 2)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_a_plan_places_every_token_once_and_pads_little(lengths: list[int]):
    plan = plan_attention(lengths)
    total = sum(lengths)
    assert torch.equal(plan.pad_P[plan.unpad_T], torch.arange(total))
    assert plan.unpad_T.unique().numel() == total
    assert sum(count * length for count, length in plan.buckets) == plan.pad_P.numel()
    assert sum(count for count, _ in plan.buckets) == len(lengths)
    assert plan.pad_P.numel() * (1 - PAD_SLACK) <= total
    left = sorted(lengths, reverse=True)
    for count, _ in plan.buckets:
        bucket, left = left[:count], left[count:]
        assert count <= BUCKET_SEQUENCES or len(set(bucket)) == 1


def test_equal_lengths_stay_in_one_bucket_and_in_place():
    plan = plan_attention([9] * 40 + [5] * 3)
    assert plan.buckets == ((40, 9), (3, 5))
    assert plan.in_place


@pytest.mark.parametrize(
    ("lengths", "in_place"),
    [([7] * 20, True), ([9, 9, 4], True), ([9, 8], False), ([4, 9], False), ([16, 15] * 2, False)],
)
def test_what_needs_no_padding_in_its_order_is_not_moved(lengths: list[int], in_place: bool):
    assert plan_attention(lengths).in_place == in_place


@pytest.mark.parametrize("lengths", [[5, 1, 9, 5, 8], [1], [20] * 33, [3, 30, 4, 29], [9, 9, 4]])
def test_packed_attention_equals_a_block_diagonal_mask_with_its_gradients(lengths: list[int]):
    ours, theirs = qkv(sum(lengths)), qkv(sum(lengths))
    out, _ = packed_attention(
        torch.nn.Identity(), *ours, None, attention_plan=plan_attention(lengths)
    )
    want = dense(*theirs, lengths)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    weights = torch.randn_like(want)
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-12)


def test_its_cost_grows_with_the_sum_of_squares_not_with_the_square_of_the_sum():
    def slots(lengths: list[int]) -> int:
        return sum(count * length**2 for count, length in plan_attention(lengths).buckets)

    assert slots([50] * 64) == 64 * 50**2
    assert slots([1000] + [10] * 100) <= 1.1 * (1000**2 + 100 * 10**2)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"attention_plan": None}, "plan"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"dropout": 0.1}, "dropout"),
        ({"sliding_window": 3}, "window"),
    ],
)
def test_what_it_does_not_compute_is_refused(options: dict[str, object], names: str):
    arguments = {"attention_plan": plan_attention([4]), **options}
    with pytest.raises(ValueError, match=names):
        packed_attention(torch.nn.Identity(), *qkv(4), None, **arguments)


def test_a_window_no_sequence_exceeds_changes_nothing():
    q, k, v = qkv(8)
    plan = plan_attention([4, 4])
    plain, _ = packed_attention(torch.nn.Identity(), q, k, v, None, attention_plan=plan)
    windowed, _ = packed_attention(
        torch.nn.Identity(), q, k, v, None, attention_plan=plan, sliding_window=4
    )
    assert torch.equal(plain, windowed)


def test_taking_rows_passes_the_gradient_of_finite_differences():
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda x: take_rows(x, index), rows)
