"""A learner's side of the bus in miniature: publishes versions, plays episodes, reads scores."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.logit_oracle.config import LogitOracleConfig
from services.logit_oracle.service import serve
from shared.backends.torch_backend import TorchBackend
from shared.runtime.bus import Bus
from shared.runtime.context import Context
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.weights.canary import backend_scorer, canary_tokens, make_canary
from shared.weights.publisher import Publisher
from shared.wire.base import Array
from shared.wire.codec import decode, encode
from shared.wire.messages import Score, Terminal
from shared.wire.subjects import Subjects
from shared.wire.trajectory import Failure, Sequence, Span, Trajectory, Turn
from shared.wire.weights import Canary, Control

VOCAB = 41
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For every test of the folder."""


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3 with deliberately large logits, as a Hugging Face directory."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


def make_sequence(
    spans: list[tuple[int, int, int]], *, length: int = 24, seed: int = 0, **changes: Any
) -> Sequence:
    """A sequence of random tokens with the stamps [(version, start, stop)]."""
    rng = np.random.default_rng(seed)
    loss_mask = np.zeros(length, np.uint8)
    for _, start, stop in spans:
        loss_mask[start:stop] = 1
    fields: dict[str, Any] = {
        "token_ids": Array.of(rng.integers(0, VOCAB, length), "i4"),
        "loss_mask": Array.of(loss_mask, "u1"),
        "spans": tuple(Span(version=v, start=a, stop=b) for v, a, b in spans),
        "arrays": {"sampler_logprobs": Array.of(-loss_mask.astype(np.float32), "f4")},
        "turns": tuple(Turn(start=a, stop=b, finish="stop") for _, a, b in spans),
    }
    return Sequence(**(fields | changes))


def make_trajectory(*sequences: Sequence) -> Trajectory:
    return Trajectory(status="done", reward=1.0, sequences=sequences, task_digest="00")


@dataclass
class Rig:
    """One run: the server, the learner's bus, the published states."""

    model_dir: Path
    dtype: str
    server: MemoryServer = field(default_factory=MemoryServer)
    states: list[dict[str, torch.Tensor]] = field(default_factory=list)
    num_tickets: int = 0
    oracles: int = 0

    async def open(self, keyframe_every: int = 16, bus: Bus | None = None) -> None:
        self.bus = bus or MemoryBus(Subjects("test"), self.server, name="learner")
        await self.bus.create_streams()
        self.backend = TorchBackend(DTYPES[self.dtype])
        self.backend.load_hf(self.model_dir)
        self.state = {name: t.clone() for name, t in self.backend.state().items()}
        self.publisher = Publisher(
            self.bus,
            model_id="policy",
            producer="learner-0",
            keyframe_every=keyframe_every,
            log=Log("test"),
        )
        await self.publisher.start()

    async def publish(self, count: int = 1, *, spoil: Callable[[Canary], Canary] | None = None):
        """Publish further versions; every one differs from its parent in every weight."""
        for _ in range(count):
            version = len(self.states)
            if version:
                g = torch.Generator().manual_seed(version)
                for tensor in self.state.values():
                    noise = torch.randn(tensor.shape, generator=g, dtype=torch.float64)
                    tensor.mul_(1 + (0.02 * noise).to(tensor.dtype))
            self.backend.load_state(self.state)
            canary = make_canary(
                backend_scorer(self.backend), canary_tokens(VOCAB, 16, 0), self.backend.dtype
            )
            await self.publisher.publish(
                self.state,
                canary=spoil(canary) if spoil else canary,
                epoch=0,
                optimizer_steps=version,
            )
            if self.publisher.keyframe_due:
                await self.publisher.publish_keyframe(reason="due")
            self.states.append({name: tensor.clone() for name, tensor in self.state.items()})

    async def control(self, oldest_needed: int) -> None:
        control = Control(
            phase="running",
            head_version=len(self.states) - 1,
            oldest_needed=oldest_needed,
            updated_at=time.time(),
        )
        await self.bus.put_control("control", encode(control))

    async def play(self, outcome: Trajectory | Failure, *, purpose: str = "train") -> Terminal:
        """Store a terminal as an env agent would."""
        self.num_tickets += 1
        terminal = Terminal(
            ticket_id=f"t{self.num_tickets}",
            attempt_id="a",
            purpose=purpose,
            group_id="g",
            member=0,
            issue_version=0,
            producer="env-0",
            outcome=outcome,
        )
        subject = self.bus.subjects.terminal(terminal.ticket_id)
        await self.bus.append(subject, encode(terminal), expect_last_subject_seq=0)
        return terminal

    async def score(self, terminal: Terminal, timeout_s: float = 20.0) -> Score:
        """Wait for a terminal's score."""
        subject = self.bus.subjects.score(terminal.ticket_id)
        async with asyncio.timeout(timeout_s):
            while (record := await self.bus.last(subject)) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return decode(record.payload, Score)

    async def all_acknowledged(self, timeout_s: float = 20.0) -> None:
        consumer = self.server.streams[self.bus.subjects.stream("terminals")].consumers[
            "logit_oracle"
        ]
        stream = self.server.streams[self.bus.subjects.stream("terminals")]
        async with asyncio.timeout(timeout_s):
            while consumer.pending or consumer.position <= stream.last_seq:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def config(self, **section: Any) -> LogitOracleConfig:
        return LogitOracleConfig.model_validate(
            {
                "run": {"name": "test"},
                "model": {"source": str(self.model_dir), "dtype": self.dtype},
                "logit_oracle": {
                    "max_wait_s": 0.02,
                    "control_poll_s": 0.05,
                    "fetch_timeout_s": 0.1,
                    "ask_retry_s": 0.05,
                    "drain_s": 1.0,
                }
                | section,
            }
        )

    def new_context(self) -> Context:
        self.oracles += 1
        pod = f"oracle-{self.oracles}"
        bus = MemoryBus(Subjects("test"), self.server, name=pod)
        return Context(
            role="logit_oracle", pod=pod, incarnation=pod, bus=bus, log=Log("logit_oracle", pod)
        )

    @asynccontextmanager
    async def oracle(self, **section: Any) -> AsyncIterator[Context]:
        """Run one oracle service beside the test, and stop it in good order."""
        context = self.new_context()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(serve(context, self.config(**section)))
            yield context
            context.stop.set()
            async with asyncio.timeout(20):
                await task


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def rig(model_dir: Path, request: pytest.FixtureRequest) -> Rig:
    """A run in float64 unless the test is parametrised indirectly with another dtype."""
    rig = Rig(model_dir, getattr(request, "param", "float64"))
    await rig.open()
    return rig


@pytest.fixture
def reference(model_dir: Path, rig: Rig) -> Callable[..., np.ndarray]:
    """Log-probs [T] of one sequence alone, by plain transformers with all logits.

    No packing, no prefix cut, no masks: nothing of our backend. transformers rounds norms (and
    eager softmax) to float32 inside a float64 model; here they stay in float64.
    """
    from transformers import Qwen3ForCausalLM

    dtype = DTYPES[rig.dtype]
    model = Qwen3ForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa")
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__ == "Qwen3RMSNorm":
                module.forward = lambda x, m=module: (
                    m.weight * x / (x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon).sqrt()
                )

    def logprobs(
        state: dict[str, torch.Tensor], token_ids: np.ndarray, temperature: float = 1.0
    ) -> np.ndarray:
        model.load_state_dict(state, strict=False)
        ids_T = torch.from_numpy(token_ids.astype(np.int64))
        with torch.no_grad():
            logits_TV = model(ids_T[None]).logits[0] / temperature
        logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
        found = logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0]
        return np.concatenate([[0.0], found.numpy()])

    return logprobs


@pytest.fixture
def sequence() -> Callable[..., Sequence]:
    return make_sequence


@pytest.fixture
def trajectory() -> Callable[..., Trajectory]:
    return make_trajectory


@pytest.fixture
def eventually() -> Callable[..., Any]:
    return until
