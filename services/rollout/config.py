"""Configuration of the rollout."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from shared.runtime.sections import CommonConfig, Section


class SyncSection(Section):
    """What a new version does to the turns that run (docs/vllm.md)."""

    mode: Literal["keep", "interrupt", "wait"] = "keep"
    """keep: they are frozen, their prefix is computed anew, they go on. interrupt: they are
    answered with what they have, and their callers resume. wait: they end first."""
    keep_kv: bool = False
    """keep: go on over keys and values of older weights. Such turns are marked `mixed_kv` and never
    count as exact."""
    wait_s: float = Field(default=30.0, gt=0)
    """wait: after so long, what still runs is interrupted."""
    swap_timeout_s: float = Field(default=120.0, gt=0)
    """A swap that takes longer counts as the engine's death."""

    @model_validator(mode="after")
    def _keeps_only_what_it_froze(self) -> Self:
        if self.keep_kv and self.mode != "keep":
            raise ValueError(f"sync.keep_kv needs sync.mode: keep, not {self.mode}")
        return self


class VllmSection(Section):
    """How vLLM is started; read when `engine` is vllm."""

    tensor_parallel_size: int = Field(default=1, gt=0)
    """Devices that share one copy of the model."""
    kv_cache_bytes: int = Field(default=0, ge=0)
    """Memory for keys and values, per device; 0: 256 MB on CPUs, what is free on GPUs."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for weights, activations, keys and values."""
    block_tokens: int = Field(default=32, gt=0)
    """Prefixes are kept and found in blocks of so many tokens; on CPUs a multiple of 32."""
    shared_dir: str = "/dev/shm"
    """Memory-backed folder for one copy of the weights in the engine's dtype."""


class RolloutSection(Section):
    """One rollout process: its engine, its limits, how long it waits for whom."""

    engine: Literal["torch", "vllm"] = "torch"
    """torch: small, on CPUs. vllm: needs an environment of its own (docs/vllm.md)."""
    dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """In which the engine holds the weights and computes; vLLM has no float64."""
    sync: SyncSection = SyncSection()
    vllm: VllmSection = VllmSection()
    max_running: int = Field(default=128, gt=0)
    """Turns sampled at once."""
    kv_slots: int = Field(default=256, gt=0)
    """Running turns plus finished prefixes kept for the next turn of their episode."""
    step_tokens: int = Field(default=1024, gt=0)
    """Most tokens forwarded in one step."""
    max_concurrency: int = Field(default=512, gt=0)
    """Requests accepted at once, running and waiting; further ones are refused as retryable."""
    max_waiting: int | None = Field(default=None, gt=0)
    """Turns in the engine's own queue beyond which requests are refused as retryable."""
    max_kv_used_ratio: float | None = Field(default=None, gt=0, le=1)
    """The same while turns wait and more than this share of the cache is in use."""
    heartbeat_s: float = Field(default=1.0, gt=0)
    """How often a running request hears from its pod."""
    behind_wait_s: float = Field(default=0.2, ge=0)
    """How long a request waits for a version that is on its way before the answer is `behind`."""
    drain_s: float = Field(default=5.0, gt=0)
    """At a stop: for sending what was sampled so far."""
    chunk_timeout_s: float = Field(default=5.0, gt=0)
    """How long to ask for a piece of the weights that is not there yet."""
    follow_retry_s: float = Field(default=2.0, gt=0)
    """First wait before a version that could not be fetched is tried again."""
    streams_timeout_s: float = Field(default=60.0, gt=0)
    """How long to wait at start until the learner has created the streams."""

    @model_validator(mode="after")
    def _slots_for_running(self) -> Self:
        if self.kv_slots < self.max_running:
            raise ValueError(
                f"kv_slots {self.kv_slots} is below max_running {self.max_running}: every running "
                "turn needs a slot"
            )
        return self

    @model_validator(mode="after")
    def _engine_can(self) -> Self:
        if self.engine == "vllm" and self.dtype == "float64":
            raise ValueError("dtype float64: vLLM computes in bfloat16 and float32")
        if self.engine == "torch" and self.sync.mode != "keep":
            raise ValueError(f"sync.mode {self.sync.mode}: the torch engine swaps with `keep`")
        if self.engine == "torch" and self.sync.keep_kv:
            raise ValueError("sync.keep_kv: the torch engine always computes prefixes anew")
        return self


class RolloutConfig(CommonConfig):
    """What a rollout reads."""

    rollout: RolloutSection = RolloutSection()
