"""One rank that holds the whole vocabulary; several are in tests/distributed."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shared.algo.logprobs import token_logprobs
from shared.backends.vocab_parallel import vocab_parallel_logprobs


@pytest.fixture
def group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_rank_equals_the_plain_head_with_its_gradients(group, chunk: int, temperature: float):
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 3, 11, 12, 5, 5, 2])
    results = []
    for parallel in (True, False):
        generator.manual_seed(0)
        hidden = torch.randn(7, 6, dtype=torch.float64, generator=generator, requires_grad=True)
        head = torch.randn(16, 6, dtype=torch.float64, generator=generator, requires_grad=True)
        options = {"temperature": temperature, "with_entropy": True, "chunk": chunk}
        if parallel:
            options |= {"first_row": 0, "num_rows": 13, "group": group}
            logprobs, entropy = vocab_parallel_logprobs(hidden, head, targets, **options)
        else:
            logprobs, entropy = token_logprobs(hidden, head, targets, num_vocab=13, **options)
        weights = torch.linspace(-1, 2, 7, dtype=torch.float64)
        (logprobs * weights - 0.3 * entropy * weights.flip(0)).sum().backward()
        results.append((logprobs.detach(), entropy.detach(), hidden.grad, head.grad))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    assert results[0][3][13:].eq(0).all()


def test_bad_arguments_are_refused(group):
    hidden, head, targets = torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match="temperature"):
        vocab_parallel_logprobs(
            hidden, head, targets, first_row=0, num_rows=3, group=group, temperature=0.0
        )
    with pytest.raises(ValueError, match="row of the vocabulary"):
        vocab_parallel_logprobs(hidden, head, targets, first_row=3, num_rows=0, group=group)
