"""`make bench-rollout`: the rollout service against bare vLLM; writes `runs/bench/rollout.json`.

One engine, one process: *bare* is AsyncLLM with the parameters that the service gives a request;
*service* is the same turns through requests and replies over a real nats-server. They take turns on
the same prompts, so that whatever else the machine does meets both. Everything is a ratio of one
run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.env_agents.sampler_client import SamplerClient
from services.rollout.config import RolloutConfig
from services.rollout.engine import SampleSpec
from services.rollout.engine_host import EngineHost
from services.rollout.service import Rollout
from services.rollout.vllm_engine import VllmEngine
from services.rollout.vllm_options import ServerOptions
from services.rollout.vllm_plain import plain_update_s
from services.rollout.vllm_port import Mode, Sync
from services.rollout.vllm_server import VllmServer
from shared.cli.bench_random_weights import random_weights
from shared.runtime import nats_server
from shared.runtime.context import Context
from shared.runtime.logs import Log, configure
from shared.runtime.nats_bus import NatsBus, connect
from shared.runtime.sections import BusSection
from shared.weights.canary import canary_tokens, make_canary
from shared.weights.publisher import Publisher
from shared.wire.base import Array
from shared.wire.messages import Done, SampleRequest
from shared.wire.subjects import Subjects
from shared.wire.trajectory import SamplingParams

State = dict[str, torch.Tensor]

CONTEXT = 1024
MODELS: dict[str, dict[str, int]] = {
    "0.85M": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab": 256},
    "60M": {"hidden_size": 640, "intermediate_size": 1920, "num_hidden_layers": 12, "vocab": 4096},
}
"""Head size 64; 0.85 M and 64 M parameters."""

LIMITS = {"60M": 0.90, "0.85M": 0.60}
"""Least tokens/s of the service over bare vLLM's at 32 episodes."""
PAUSE_LIMIT = 1.2


@dataclass
class Side:
    """One way to have turns sampled."""

    sample: Callable[[SampleSpec], Awaitable[Sequence[int]]]
    tokens: int = 0
    spent_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list[float])

    def row(self) -> dict[str, float]:
        quantiles = (
            statistics.quantiles(self.latencies_s, n=100) if self.latencies_s else [0.0] * 99
        )
        return {
            "tokens_per_s": self.tokens / self.spent_s,
            "p50_s": quantiles[49],
            "p99_s": quantiles[98],
        }


class Bench:
    """One engine under measurement, the service around it, and a caller."""

    def __init__(self, engine: VllmEngine, server: VllmServer, state: State) -> None:
        self.engine = engine
        self.server = server
        self.state = state
        self.version = 0
        self._number = 0

    async def throughput(
        self, ask: Callable[[SampleSpec], Awaitable[Sequence[int]]], episodes: int, turns: int,
        rounds: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Play the same episodes on both sides, alternately."""
        salt = str(self.version)

        async def bare(spec: SampleSpec) -> Sequence[int]:
            return (await self.server.generate(spec, salt)).token_ids

        sides = {"bare": Side(bare), "service": Side(ask)}
        for number in range(rounds):
            order = ("bare", "service") if number % 2 == 0 else ("service", "bare")
            for name in order:
                await self._play(sides[name], episodes, turns, seed=number)
        rows = {name: side.row() for name, side in sides.items()}
        ratio = rows["service"]["tokens_per_s"] / rows["bare"]["tokens_per_s"]
        return {"episodes": episodes, **rows, "ratio": ratio}

    async def _play(self, side: Side, episodes: int, turns: int, seed: int) -> None:
        async def episode(index: int) -> None:
            random = np.random.default_rng([seed, index])
            ids: list[int] = random.integers(0, 200, 24 + index % 16).tolist()
            for turn in range(turns):
                self._number += 1
                spec = SampleSpec(
                    request_id=f"b{self._number}",
                    token_ids=tuple(ids),
                    sampling=SamplingParams(max_new_tokens=256),
                    max_new_tokens=int(random.integers(64, 257)),
                    seed=seed * 1000 + index * 10 + turn,
                )
                started = time.perf_counter()
                answer = list(await side.sample(spec))
                side.latencies_s.append(time.perf_counter() - started)
                side.tokens += len(answer)
                ids += [*answer, *random.integers(0, 200, 8).tolist()]

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for index in range(episodes):
                group.create_task(episode(index))
        side.spent_s += time.perf_counter() - started

    async def pauses(self, mode: Mode, count: int) -> dict[str, Any]:
        """Swap under load; seconds from the version's end to the next one's begin."""
        self.engine._sync = Sync(mode=mode, wait_s=60)  # pyright: ignore[reportPrivateUsage]
        spent: list[float] = []
        async with asyncio.TaskGroup() as group:
            load = group.create_task(self._load(8))
            for _ in range(count):
                await asyncio.sleep(0.2)
                before = self.engine.load().counters["swap_s"]
                await self._update()
                spent.append(self.engine.load().counters["swap_s"] - before)
            load.cancel()
        self.engine._sync = Sync()  # pyright: ignore[reportPrivateUsage]
        return {"mode": mode, "swap_s": statistics.median(spent)}

    async def plain(self, count: int) -> dict[str, Any]:
        """The same updates by vLLM's own calls alone and by ours, alternately, under load."""
        ours: list[float] = []
        plain: list[float] = []
        names = list(self.server.shapes)
        async with asyncio.TaskGroup() as group:
            load = group.create_task(self._load(8))
            for _ in range(count):
                await asyncio.sleep(0.1)
                plain.append(await plain_update_s(self.server, names, str(self.version)))
                await asyncio.sleep(0.1)
                before = self.engine.load().counters["swap_s"]
                await self._update()
                ours.append(self.engine.load().counters["swap_s"] - before)
            load.cancel()
        row = {"swap_s": statistics.median(ours), "plain_s": statistics.median(plain)}
        return row | {"ratio": row["swap_s"] / row["plain_s"]}

    async def lost_share(self, every_s: float, for_s: float) -> float:
        """Share of the time in which no version is there, at one version per `every_s`."""
        before = self.engine.load().counters["swap_s"]
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            load = group.create_task(self._load(8))
            while time.perf_counter() - started < for_s:
                await asyncio.sleep(every_s)
                await self._update()
            load.cancel()
        spent = time.perf_counter() - started
        return (self.engine.load().counters["swap_s"] - before) / spent

    async def _update(self) -> None:
        self.version += 1
        await self.engine.update(self.version, self.state, None)

    async def _load(self, episodes: int) -> None:
        side = Side(self._resumed)
        while True:
            await self._play(side, episodes, 1, seed=self._number)

    async def _resumed(self, spec: SampleSpec) -> Sequence[int]:
        got: list[int] = []
        while len(got) < spec.max_new_tokens:
            self._number += 1
            rest = replace(
                spec,
                request_id=f"l{self._number}",
                token_ids=(*spec.token_ids, *got),
                max_new_tokens=spec.max_new_tokens - len(got),
                seed_offset=len(got),
            )
            got += (await self.engine.sample(rest)).sampled.token_ids.numpy().tolist()
        return got


async def measure(model: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure one model; everything that runs is gone afterwards."""
    model_dir, state = make_model(model, folder / "model")
    server = VllmServer(
        ServerOptions(
            model_dir, "bfloat16", CONTEXT, max_running=128, step_tokens=1024,
            kv_cache_bytes=1 << 30,
        )
    )  # fmt: skip
    engine = VllmEngine(server, dtype=torch.bfloat16, context_tokens=CONTEXT, sync=Sync())
    bus_section = BusSection(url=f"nats://127.0.0.1:{_start_nats(folder)}")
    subjects, log = Subjects("bench"), Log("bench")
    bus = await connect(bus_section, subjects, "caller", log)
    own = await connect(bus_section, subjects, "rollout", log)
    await bus.create_streams()
    await _publish(bus, state, log)
    context = Context("rollout", "pod", "i", own, log)
    config = RolloutConfig.model_validate(
        {"model": {"source": str(model_dir)}, "sampling": {"context_tokens": CONTEXT}}
    )
    host = EngineHost(lambda: engine, torch.bfloat16, log)
    client = SamplerClient(Context("env_agents", "caller", "i", bus, log), silence_s=60)
    result: dict[str, Any] = {"model": model, "parameters": sum(t.numel() for t in state.values())}
    try:
        await host.start()
        bench = Bench(engine, server, state)
        serving = asyncio.ensure_future(Rollout(context, config, host).run())
        while not context.health.ready:
            await asyncio.sleep(0.05)
            if serving.done():
                serving.result()
        rows = result["throughput"] = []
        for episodes in arguments.episodes:
            row = await bench.throughput(
                _asker(client, bus), episodes, arguments.turns, arguments.rounds
            )
            rows.append(row)
            print(_line(model, row), flush=True)
        context.stop.set()
        await serving
        result["update"] = await bench.plain(arguments.updates)
        result["modes"] = [
            await bench.pauses(mode, arguments.updates) for mode in ("keep", "interrupt", "wait")
        ]
        result["lost_share_at_one_version_per_2_s"] = await bench.lost_share(2.0, 12.0)
    finally:
        await host.close()
        await bus.close()
        await own.close()
    return result


def make_model(model: str, folder: Path) -> tuple[Path, State]:
    """Write a config and return random weights for it, float32."""
    from services.rollout.vllm_options import published_shapes

    sizes = MODELS[model]
    heads = sizes["hidden_size"] // 64
    raw = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 64,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "vocab_size": sizes["vocab"],
        **{k: v for k, v in sizes.items() if k != "vocab"},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder, random_weights(published_shapes(raw), 0.02)


def judge(results: Iterable[dict[str, Any]]) -> list[str]:
    """Return a line per limit."""
    lines: list[str] = []
    for result in results:
        model = result["model"]
        for row in result["throughput"]:
            if row["episodes"] == 32:
                ok = row["ratio"] >= LIMITS[model]
                lines.append(
                    f"{_verdict(ok)} {model}: service / bare at 32 episodes {row['ratio']:.2f}, "
                    f"limit {LIMITS[model]}"
                )
        ratio = result["update"]["ratio"]
        lines.append(
            f"{_verdict(ratio <= PAUSE_LIMIT)} {model}: swap / vLLM's own update {ratio:.2f}, "
            f"limit {PAUSE_LIMIT}"
        )
    return lines


def _verdict(ok: bool) -> str:
    return "ok    " if ok else "MISSED"


def _line(model: str, row: dict[str, Any]) -> str:
    bare, service = row["bare"], row["service"]
    return (
        f"{model:>6} {row['episodes']:4d} episodes: bare {bare['tokens_per_s']:7.0f} tokens/s "
        f"(p50 {bare['p50_s']:.2f} p99 {bare['p99_s']:.2f} s), service "
        f"{service['tokens_per_s']:7.0f} (p50 {service['p50_s']:.2f} p99 {service['p99_s']:.2f}), "
        f"ratio {row['ratio']:.2f}"
    )


def _asker(client: SamplerClient, bus: NatsBus) -> Callable[[SampleSpec], Awaitable[Sequence[int]]]:
    async def ask(spec: SampleSpec) -> Sequence[int]:
        request = SampleRequest(
            request_id=f"s{spec.request_id}",
            ticket_id="t",
            token_ids=Array.of(spec.token_ids, "i4"),
            sampling=spec.sampling,
            max_new_tokens=spec.max_new_tokens,
            min_version=0,
            seed=spec.seed,
            expires=time.time() + 600,
        )
        answer = await client.ask(request, None)
        body = getattr(answer, "body", None)
        if not isinstance(body, Done):
            raise RuntimeError(f"the service answered {answer}")
        return body.sampled.token_ids.numpy().tolist()

    return ask


def _start_nats(folder: Path) -> int:
    port = nats_server.free_port()
    path = folder / "nats.conf"
    nats_server.write_config(path, port=port, store_dir=folder / "nats")
    process = nats_server.start(path, folder / "nats.log")
    nats_server.wait_healthy(f"nats://127.0.0.1:{port}", 30, process)
    _PROCESSES.append(process)
    return port


_PROCESSES: list[Any] = []


async def _publish(bus: NatsBus, state: State, log: Log) -> None:
    publisher = Publisher(bus, model_id="policy", producer="bench", log=log)
    await publisher.start()
    canary = make_canary(
        lambda ids: [np.zeros(len(row), np.float32) for row in ids],
        canary_tokens(200, 16, 0),
        torch.float32,
    )
    await publisher.publish(state, epoch=0, optimizer_steps=0, canary=canary)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, print; a missed limit is printed, and 1 with --strict."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--episodes", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/rollout.json"))
    parser.add_argument("--strict", action="store_true")
    arguments = parser.parse_args(argv)
    configure("WARNING")
    results: list[dict[str, Any]] = []
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for model in arguments.models:
        with tempfile.TemporaryDirectory(prefix="bench-rollout-") as folder:
            try:
                results.append(asyncio.run(measure(model, arguments, Path(folder))))
            finally:
                for process in _PROCESSES:
                    with suppress(ProcessLookupError):
                        process.terminate()
                    process.wait(timeout=10)
                _PROCESSES.clear()
        report = {
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg(),
            "device": "cpu",
            "results": results,
            "asynchronous_over_synchronous": "not measured",
            "gpu": "not measured",
        }
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps({k: v for k, v in results[-1].items() if k != "throughput"}), flush=True)
    lines = judge(results)
    print("\n".join(lines))
    print("not measured: anything on a GPU")
    print(arguments.out)
    return 1 if arguments.strict and any(line.startswith("MISSED") for line in lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
