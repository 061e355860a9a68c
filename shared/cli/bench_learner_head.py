"""Peak memory of log-probs and entropies at a real vocabulary: `bench_learner_head PATH [ROWS]`.

A process of its own per path: hidden states, head and targets are there, then forward and backward
run once. The peak of its resident memory over what it held before is the figure. Hidden states are
narrow, so that logits dominate; the path `full` keeps all of them, as
`token_logprobs_reference` does, `chunked` is what the backends use.

Shapes: N rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

import json
import resource
import sys

import torch

from shared.algo.logprobs import token_logprobs, token_logprobs_reference
from shared.cli.peak_memory import peak_rss_bytes

NUM_ROWS, VOCAB, HIDDEN = 2048, 151_936, 64


def main(path: str, num_rows: int = NUM_ROWS, vocab: int = VOCAB) -> dict[str, int]:
    """Run one path; return bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden_ND = torch.randn(num_rows, HIDDEN, requires_grad=True)
    head_VD = torch.randn(vocab, HIDDEN, requires_grad=True)
    targets_N = torch.randint(0, vocab, (num_rows,))
    compute = {"full": token_logprobs_reference, "chunked": token_logprobs}[path]
    compute(hidden_ND[:2], head_VD[:64], targets_N[:2] % 64)  # libraries come into memory
    held = _resident_bytes()
    logprobs_N, entropy_N = compute(hidden_ND, head_VD, targets_N)
    assert entropy_N is not None
    (logprobs_N.sum() + 0.01 * entropy_N.sum()).backward()
    return {"extra_bytes": peak_rss_bytes() - held, "logits_bytes": num_rows * vocab * 4}


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
