"""The experts of a layer against a loop over tokens that shares nothing with them."""

from __future__ import annotations

import pytest
import torch

from services.rollout.qwen3_experts import mix, route

HIDDEN, INNER = 6, 5


def _one_by_one(
    x_NH: torch.Tensor,
    weights_NK: torch.Tensor,
    experts_NK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    for x_H, weights_K, experts_K in zip(x_NH, weights_NK, experts_NK, strict=True):
        total_H = torch.zeros(HIDDEN, dtype=x_H.dtype)
        for weight, expert in zip(weights_K, experts_K, strict=True):
            gate, up = gate_up[expert, :INNER] @ x_H, gate_up[expert, INNER:] @ x_H
            total_H = total_H + weight * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(total_H)
    return torch.stack(rows)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33])
@pytest.mark.parametrize(("num_experts", "choices"), [(1, 1), (4, 4), (9, 3), (40, 2)])
def test_tokens_grouped_by_expert_come_out_as_one_by_one(
    num_tokens: int, num_experts: int, choices: int
) -> None:
    torch.manual_seed(num_tokens)
    x_NH = torch.randn(num_tokens, HIDDEN, dtype=torch.float64)
    gate_up = torch.randn(num_experts, 2 * INNER, HIDDEN, dtype=torch.float64)
    down = torch.randn(num_experts, HIDDEN, INNER, dtype=torch.float64)
    router = torch.randn(num_experts, HIDDEN, dtype=torch.float64)
    weights, experts = route(x_NH, router, choices, renormalised=True)
    assert torch.allclose(weights.sum(-1), torch.ones(num_tokens, dtype=torch.float64), atol=1e-6)
    found = mix(x_NH, weights, experts, gate_up, down)
    expected = _one_by_one(x_NH, weights, experts, gate_up, down)
    assert (found - expected).abs().max() < 1e-13


def test_experts_that_nobody_chose_are_not_read() -> None:
    x_NH = torch.randn(3, HIDDEN)
    gate_up, down = torch.randn(5, 2 * INNER, HIDDEN), torch.randn(5, HIDDEN, INNER)
    gate_up[[0, 4]], down[[0, 4]] = float("nan"), float("nan")
    weights, experts = torch.full((3, 2), 0.5), torch.tensor([[1, 2], [2, 3], [3, 1]])
    assert mix(x_NH, weights, experts, gate_up, down).isfinite().all()


def test_weights_are_shares_of_all_experts_unless_they_are_renormalised() -> None:
    x_NH, router = torch.randn(4, HIDDEN), torch.randn(8, HIDDEN)
    shares = torch.softmax(x_NH @ router.T, -1)
    plain, experts = route(x_NH, router, 3, renormalised=False)
    assert torch.allclose(plain, shares.gather(1, experts))
    rescaled, same = route(x_NH, router, 3, renormalised=True)
    assert torch.equal(experts, same)
    assert torch.allclose(rescaled, plain / plain.sum(-1, keepdim=True))
    assert (plain.sum(-1) < 0.999).any()
