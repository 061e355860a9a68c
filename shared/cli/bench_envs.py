"""`make bench-envs`: what env agents cost beside sampling, and `runs/bench/envs.json`.

The whole service on an in-memory bus, with a trivial environment and a rollout that answers at
once: tickets, episodes, rendering, requests and replies, terminals. Each case runs in a process of
its own. All episodes are held at their first request until every place is taken; then memory is
read (PSS of the process and of all that it started), and they run free.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.env_agents.config import EnvAgentsConfig
from services.env_agents.environment import Observation, StepResult
from services.env_agents.service import serve
from services.env_agents.text_renderer import TextRenderer
from shared.cli.processes import summed_pss_bytes
from shared.runtime.bus import CoreMessage
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.wire.base import Array
from shared.wire.codec import decode, encode
from shared.wire.messages import (
    Accepted,
    Done,
    SampledTokens,
    SampleReply,
    SampleRequest,
    TaskRef,
    Ticket,
)
from shared.wire.subjects import Subjects
from shared.wire.trajectory import SamplingParams, Span

MODEL = "examples/frozen_lake/base"
TURNS = 20

STEPS_PER_S_AT_LEAST = 2000
"""In-process, by CPU time, the rollout's answers included."""
MEMORY_MIB_BELOW = 1536
CASES: Mapping[str, dict[str, Any]] = {
    "in_process": {"mode": "none", "episodes": 800},
    "isolated": {"mode": "process", "episodes": 240},
}


class Trivial:
    """Ends after TURNS turns. Satisfies `Environment`."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        del options
        self._turns = 0

    async def reset(self, task: TaskRef) -> Observation:
        """Show the start."""
        del task
        return Observation("@00>")

    async def step(self, answer: str) -> StepResult:
        """Count."""
        del answer
        self._turns += 1
        over = self._turns >= TURNS
        return StepResult(Observation("@01>"), reward=float(over), terminated=over)

    def task_digest(self) -> str:
        return "0" * 16

    async def close(self) -> None: ...


class _Rollout:
    """Answers `left`; holds everything back until `hold` requests wait."""

    def __init__(self, bus: MemoryBus, hold: int) -> None:
        self._bus = bus
        self._hold = hold
        self._held: list[tuple[str, str]] = []
        self.memory_mib = 0.0
        ids = TextRenderer(MODEL, {}).observation("left\n")
        self._done = Done(
            sampled=SampledTokens(
                token_ids=Array.of(ids, "i4"),
                logprobs=Array.of([-0.1] * len(ids), "f4"),
                spans=(Span(version=0, start=0, stop=len(ids)),),
            ),
            finish="stop",
        )

    async def start(self) -> None:
        subjects = self._bus.subjects
        await self._bus.subscribe(subjects.sample("policy"), self._answer, queue="rollout")
        await self._bus.subscribe(subjects.sample_pod("pod"), self._answer)

    async def _answer(self, message: CoreMessage) -> None:
        request = decode(message.payload, SampleRequest)
        self._held.append((request.request_id, message.reply))
        if not self.memory_mib:
            if len(self._held) < self._hold:
                return
            self.memory_mib = summed_pss_bytes(os.getpid()) / 2**20
        held, self._held = self._held, []
        for request_id, inbox in held:
            for body in (Accepted(version=0), self._done):
                reply = SampleReply(request_id=request_id, pod="pod", body=body)
                await self._bus.publish(inbox, encode(reply))


async def play(mode: str, episodes: int, concurrency: int) -> dict[str, Any]:
    """Play the episodes of one case and return its row."""
    server = MemoryServer()
    subjects = Subjects("bench")
    bus = MemoryBus(subjects, server, name="bench")
    await bus.create_streams()
    rollout = _Rollout(bus, concurrency)
    await rollout.start()
    for index in range(episodes):
        ticket = _ticket(index)
        await bus.append(
            subjects.ticket(ticket.ticket_id), encode(ticket), expect_last_subject_seq=0
        )
    context = Context(
        role="env_agents", pod="env-0", incarnation="i", log=Log("env_agents", "env-0"),
        bus=MemoryBus(subjects, server, name="env-0"),
    )  # fmt: skip
    config = EnvAgentsConfig.model_validate(
        {
            "model": {"source": MODEL},
            "task": {"environment": "shared.cli.bench_envs:Trivial", "max_turns": TURNS},
            "sampling": {"context_tokens": 16 * TURNS},
            "env_agents": {
                "concurrency": concurrency,
                "heartbeat_s": 60.0,
                "env_timeout_s": 120.0,
                "isolation": {"mode": mode},
            },
        }
    )
    started, cpu = time.perf_counter(), _cpu_s()
    task = asyncio.create_task(serve(context, config))
    tickets = server.streams[subjects.stream("tickets")]
    while tickets.records and not task.done():  # noqa: ASYNC110 - the bus has no such event
        await asyncio.sleep(0.05)
    wall_s, cpu_s = time.perf_counter() - started, _cpu_s() - cpu
    context.stop.set()
    await task
    steps = int(context.counters["env_steps"])
    return {
        "case": "isolated" if mode == "process" else "in_process",
        "episodes": int(context.counters["episodes"]),
        "failed": int(context.counters.get("failed_episodes", 0)),
        "concurrent": concurrency,
        "steps": steps,
        "steps_per_cpu_s": steps / cpu_s,
        "steps_per_s": steps / wall_s,
        "memory_mib": rollout.memory_mib,
    }


def problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What misses its limit, by name; none: all hold."""
    found: list[str] = []
    for row in rows:
        if row["failed"] or row["steps"] != row["episodes"] * TURNS:
            found.append(f"{row['case']}: {row['failed']} episodes failed")
        if not 0 < row["memory_mib"] < MEMORY_MIB_BELOW:
            found.append(f"{row['case']}: {row['memory_mib']:.0f} MiB, below {MEMORY_MIB_BELOW}")
        if row["case"] == "in_process" and row["steps_per_cpu_s"] < STEPS_PER_S_AT_LEAST:
            found.append(
                f"{row['case']}: {row['steps_per_cpu_s']:.0f} steps per CPU second, "
                f"at least {STEPS_PER_S_AT_LEAST}"
            )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run every case in a process of its own; 0 when all limits hold."""
    parser = argparse.ArgumentParser(prog="python -m shared.cli.bench_envs")
    parser.add_argument("--case", choices=sorted(CASES), help="this one, here, as a JSON line")
    parser.add_argument("--concurrency", type=int, default=200, help="episodes at once")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/envs.json"))
    arguments = parser.parse_args(argv)
    if arguments.case:
        case = CASES[arguments.case]
        row = asyncio.run(play(case["mode"], case["episodes"], arguments.concurrency))
        print(json.dumps(row))
        return 0
    rows: list[dict[str, Any]] = []
    print(f"{'case':<12}{'concurrent':>11}{'steps/CPU s':>13}{'steps/s':>9}{'MiB':>7}")
    for name in CASES:
        command = [sys.executable, "-m", "shared.cli.bench_envs", "--case", name]
        ran = subprocess.run(
            [*command, "--concurrency", str(arguments.concurrency)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        row = json.loads(ran.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{name:<12}{row['concurrent']:>11}{row['steps_per_cpu_s']:>13.0f}"
            f"{row['steps_per_s']:>9.0f}{row['memory_mib']:>7.0f}",
            flush=True,
        )
    missed = problems(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"rows": rows, "problems": missed}, indent=2) + "\n")
    print("\n".join(["NOT OK:", *missed] if missed else ["OK"]))
    print(arguments.out)
    return 1 if missed else 0


def _cpu_s() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _ticket(index: int) -> Ticket:
    return Ticket(
        ticket_id=f"t{index}", purpose="train", group_id=f"g{index}", member=0, group_size=1,
        task=TaskRef(dataset="bench", split="train", index=index, seed=0),
        issue_version=0, min_version=0, deadline=time.time() + 600,
        sampling=SamplingParams(max_new_tokens=8), seed=index,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
