"""What bare vLLM gives, by the number of episodes it plays at once; `bench_async` runs it.

Prints {"1": tokens/s, "2": ..}. The episodes have several turns, each with the text before it as
its prefix: what the engine spends on prompts counts, what happens between turns does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

from services.rollout.engine import SampleSpec
from services.rollout.vllm_engine import VllmEngine
from services.rollout.vllm_options import ServerOptions
from services.rollout.vllm_port import Sync
from services.rollout.vllm_server import DTYPES, VllmServer
from shared.cli.bench_random_weights import random_weights
from shared.wire.trajectory import SamplingParams

TURNS = 4


async def measure(
    options: ServerOptions, turn_tokens: int, concurrent: Sequence[int], repetitions: int
) -> dict[int, float]:
    """Return the most tokens/s by number of episodes at once."""
    server = VllmServer(options)
    dtype = DTYPES[options.dtype]
    engine = VllmEngine(server, dtype=dtype, context_tokens=options.context_tokens, sync=Sync())
    await engine.start()
    try:
        await engine.update(0, random_weights(server.shapes, 0.02), None)
        rates: dict[int, float] = {}
        for count in concurrent:
            spent = [
                await _spent_s(server, count, turn_tokens, f"{count}-{n}")
                for n in range(repetitions)
            ]
            rates[count] = count * TURNS * turn_tokens / min(spent)
        return rates
    finally:
        await engine.close()


async def _spent_s(server: VllmServer, count: int, turn_tokens: int, name: str) -> float:
    async def play(number: int) -> None:
        ids = [1 + (number >> bit & 1) for bit in range(8)]
        for turn in range(TURNS):
            spec = SampleSpec(
                request_id=f"{name}-{number}-{turn}",
                token_ids=tuple(ids),
                sampling=SamplingParams(max_new_tokens=turn_tokens),
                max_new_tokens=turn_tokens,
                seed=number * TURNS + turn,
            )
            ids += [*(await server.generate(spec, name)).token_ids, 0]

    started = time.perf_counter()
    await asyncio.gather(*[play(number) for number in range(count)])
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--max-running", type=int, default=8)
    parser.add_argument("--step-tokens", type=int, default=1024)
    parser.add_argument("--kv-cache-bytes", type=int, default=1 << 29)
    parser.add_argument("--context", type=int, default=1152)
    parser.add_argument("--turn-tokens", type=int, default=64)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args(argv)
    options = ServerOptions(
        arguments.model_dir,
        arguments.dtype,
        arguments.context,
        max_running=arguments.max_running,
        step_tokens=arguments.step_tokens,
        kv_cache_bytes=arguments.kv_cache_bytes,
    )
    rates = asyncio.run(
        measure(options, arguments.turn_tokens, arguments.concurrent, arguments.repetitions)
    )
    print(json.dumps(rates))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
