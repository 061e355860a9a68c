# pyright: reportMissingImports=false
"""In the engine's processes: what has to be so before vLLM computes, and how tokens are drawn.

vLLM mixes `RolloutWorker` into its worker class (`worker_extension_cls`). Importing this module
registers the weight transfer and prepares the process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import Any, Literal

import numpy as np
import torch
from vllm.platforms import current_platform

from services.rollout.sampling import draw_bits
from services.rollout.vllm_names import OWNER_VARIABLE
from services.rollout.vllm_routing import install_recorder
from services.rollout.vllm_transfer import register_backend

WATCH_S = 0.5

Seeding = Literal["counted", "native"]


class RolloutWorker:
    """Methods that the rollout calls by name on every worker."""

    model_runner: Any
    use_v2_model_runner: bool
    weight_transfer_engine: Any

    def lagwise_prepare(self) -> Seeding:
        """Make token i of an answer a function of (seed, i) and the logits, and say how.

        native: the newer model runner draws by (seed, position), which is that already. counted:
        the older one draws from a generator per request, whose state a resumed turn would not
        have, and which CPUs cannot rewind after a partial prefill; it draws by counter instead.
        """
        transfer = self.weight_transfer_engine
        if transfer.router_outputs is not None:
            assert not self.use_v2_model_runner, "its steps are not recorded"
            transfer.recorder = install_recorder(self.model_runner, transfer.router_outputs)
        if self.use_v2_model_runner:
            return "native"
        CountedDraws(self.model_runner).install()
        return "counted"

    def lagwise_routing(self, key: str) -> list[Any]:
        """Take the routing of a request that ended: [label, first token, dtype, shape, bytes]..."""
        recorder = self.weight_transfer_engine.recorder
        return [
            [s.label, s.start, s.rows.dtype.str, list(s.rows.shape), s.rows.tobytes()]
            for s in (recorder.take(key) if recorder is not None else ())
        ]

    def lagwise_checking(self, enabled: bool) -> None:
        """Compare what is loaded, or (for the benchmark) do not."""
        self.weight_transfer_engine.check.enabled = enabled


class CountedDraws:
    """Stands in for the last step of the sampler, `TopKTopPSampler.forward`."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._sampler = runner.sampler.topk_topp_sampler
        self._native = self._sampler.forward
        self._on_cpu = current_platform.is_cpu()
        self._generators: list[torch.Generator] = []

    def install(self) -> None:
        """Replace the sampler's forward."""
        self._sampler.forward = self._forward

    def _forward(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        bits = self._bits(logits.shape[0])
        if self._on_cpu and k is None and p is None:
            # What `forward_cpu` does, with these seeds instead of its generators'.
            logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
            seeds = torch.from_numpy((bits >> np.uint64(33)).astype(np.int64))
            return torch.ops._C.fused_gumbel_argmax(logits.float(), seeds), logprobs
        while len(self._generators) < len(bits):
            self._generators.append(torch.Generator(device=logits.device))
        counted = {
            row: self._generators[row].manual_seed(seed) for row, seed in enumerate(bits.tolist())
        }
        return self._native(logits, counted, k, p)

    def _bits(self, num_rows: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        seeds, indices = np.zeros(num_rows, np.uint64), np.zeros(num_rows, np.uint64)
        for row, request_id in enumerate(self._runner.input_batch.req_ids[:num_rows]):
            state = self._runner.requests[request_id]
            given = state.sampling_params.extra_args
            if given:
                seeds[row] = given["seed"]
                indices[row] = given["seed_offset"] + len(state.output_token_ids)
        return draw_bits(seeds, indices)


def _prepare_process() -> None:
    if multiprocessing.parent_process() is None:
        return  # imported outside an engine
    if current_platform.is_cpu():
        # Tiles must be asked for before the first bf16 product, which dies with SIGILL otherwise.
        torch.cpu._init_amx()  # pyright: ignore[reportPrivateUsage]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the rollout drains first
        # A forked engine shares the rollout's wake-up socket: its own SIGTERM would read there as
        # a second one to the rollout, which then leaves at once.
        signal.set_wakeup_fd(-1)
    owner = os.environ.get(OWNER_VARIABLE, "")
    if owner:
        name = "rollout-watch"
        threading.Thread(target=_follow, args=(int(owner),), name=name, daemon=True).start()


def _follow(owner: int) -> None:
    """End with the rollout: killed with -9 it cannot end its engine."""
    direct = os.getppid() == owner
    while os.getppid() == owner if direct else _lives(owner):
        time.sleep(WATCH_S)
    if not direct and os.getppid() > 1:
        os.kill(os.getppid(), signal.SIGKILL)  # the engine core between us
    os._exit(1)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


register_backend()
_prepare_process()
