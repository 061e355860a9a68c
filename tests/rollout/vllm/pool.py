"""Real engines that live as long as the session: each takes ten seconds to start.

`Borrowed` looks like an engine that a test makes, starts and closes; inside, engines go round.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch

from services.rollout.engine import EngineLoad
from services.rollout.vllm_engine import VllmEngine
from services.rollout.vllm_options import ServerOptions
from services.rollout.vllm_port import Sync
from services.rollout.vllm_server import VllmServer
from tests.rollout.vllm.gate import VARIABLE

CONTEXT = 96
UNHELD = 1 << 40
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class HeldEngine(VllmEngine):
    """An engine whose turns can be held at a token boundary."""

    def __init__(
        self, model_dir: Path, dtype: Any, folder: Path, *, record_routing: bool = False
    ) -> None:
        self.gate = folder / "gate"
        self.hold_at(None)
        options = ServerOptions(
            model_dir=model_dir,
            dtype=dtype,
            context_tokens=CONTEXT,
            max_running=8,
            step_tokens=64,
            kv_cache_bytes=16 << 20,
            record_routing=record_routing,
            scheduler_class="tests.rollout.vllm.held_scheduler.HeldScheduler",
        )
        self.server = VllmServer(options)
        super().__init__(
            self.server, dtype=DTYPES[dtype], context_tokens=CONTEXT, sync=Sync(swap_timeout_s=20)
        )

    def hold_at(self, num_tokens: int | None) -> None:
        """Let no turn get further than so many tokens; None: let them go."""
        limit = struct.pack("q", UNHELD if num_tokens is None else num_tokens)
        # In place: the scheduler has the file mapped.
        with self.gate.open("r+b" if self.gate.exists() else "wb") as file:
            file.write(limit)

    async def start(self) -> None:
        os.environ[VARIABLE] = str(self.gate)
        await super().start()

    async def forget(self) -> None:
        """Be as if just started."""
        self.hold_at(None)
        self.interrupt()
        while self._turns:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._version = -1
        self._sync = Sync(swap_timeout_s=20)


class Pool:
    def __init__(self) -> None:
        self._idle: dict[tuple[str, str], list[HeldEngine]] = {}
        self._all: list[HeldEngine] = []
        self.folder = Path(tempfile.mkdtemp(prefix="engines-"))
        self.started = 0

    async def take(self, model_dir: Path, dtype: str) -> HeldEngine:
        config = (model_dir / "config.json").read_text()
        idle = self._idle.setdefault((config, dtype), [])
        if idle:
            return idle.pop()
        self.started += 1
        folder = self.folder / str(self.started)
        folder.mkdir()
        shutil.copy(model_dir / "config.json", folder)
        mixture = '"qwen3_moe"' in config
        engine = HeldEngine(folder, dtype, folder, record_routing=mixture)
        self._all.append(engine)
        await engine.start()
        return engine

    async def give_back(self, engine: HeldEngine, model_dir: Path, dtype: str) -> None:
        if engine.failure:
            await engine.close()
            return
        await engine.forget()
        config = (model_dir / "config.json").read_text()
        self._idle[config, dtype].append(engine)

    async def close(self) -> None:
        for engine in self._all:
            await engine.close()
        shutil.rmtree(self.folder, ignore_errors=True)


POOL = Pool()


class Borrowed:
    """An engine of the pool between `start` and `close`."""

    def __init__(self, model_dir: Path, dtype: str) -> None:
        self._model_dir = model_dir
        self._dtype = dtype
        self._engine: HeldEngine | None = None
        self._closed = False

    async def start(self) -> None:
        self._engine = await POOL.take(self._model_dir, self._dtype)

    async def close(self) -> None:
        if self._engine is not None and not self._closed:
            self._closed = True
            await POOL.give_back(self._engine, self._model_dir, self._dtype)

    @property
    def failure(self) -> str:
        return "" if self._engine is None else self._engine.failure

    @property
    def version(self) -> int:
        return -1 if self._engine is None else self._engine.version

    def load(self) -> EngineLoad:
        return EngineLoad(0, 0, 0.0) if self._engine is None else self._engine.load()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
