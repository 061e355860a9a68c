# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""What vLLM says about itself: its load, counters over its life, its own Prometheus families."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from vllm.v1.metrics.loggers import StatLoggerBase

from services.rollout.engine import EngineLoad

PREFIX = "vllm:"
DROPPED_LABELS = frozenset({"model_name", "engine"})
"""The same for every series of this process."""


class EngineStats:
    """The latest statistics of one engine, and sums since it was started."""

    def __init__(self) -> None:
        self._running = 0
        self._waiting = 0
        self._kv_used_ratio = 0.0
        self._busy_since: float | None = None
        self._sums: dict[str, float] = dict.fromkeys(
            (
                "sampled_tokens", "prefill_tokens", "prefix_query_tokens", "prefix_hit_tokens",
                "preemptions", "steps", "busy_s",
            ),
            0.0,
        )  # fmt: skip

    def logger(self, vllm_config: Any, engine_index: int = 0) -> Any:
        """Make the logger that vLLM calls after every step."""
        return _StepLogger(self)

    def load(self, *, num_open: int) -> EngineLoad:
        """Return a snapshot; `num_open` turns are in the engine, as this process sees it."""
        running = min(self._running, num_open)
        return EngineLoad(
            running=running,
            waiting=num_open - running,
            kv_used_ratio=self._kv_used_ratio,
            counters=dict(self._sums),
        )

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Take in what one step reports; either part may be missing."""
        sums = self._sums
        if scheduler is not None:
            self._running = scheduler.num_running_reqs
            self._waiting = scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self._kv_used_ratio = scheduler.kv_cache_usage
            sums["prefix_query_tokens"] += scheduler.prefix_cache_stats.queries
            sums["prefix_hit_tokens"] += scheduler.prefix_cache_stats.hits
            self._clock()
        if iteration is not None:
            sums["steps"] += 1
            sums["sampled_tokens"] += iteration.num_generation_tokens
            sums["prefill_tokens"] += iteration.prompt_token_stats.computed
            sums["preemptions"] += iteration.num_preempted_reqs

    def _clock(self) -> None:
        """Count the time with turns in the engine as its work."""
        now = time.perf_counter()
        if self._busy_since is not None:
            self._sums["busy_s"] += now - self._busy_since
        self._busy_since = now if self._running or self._waiting else None


class _StepLogger(StatLoggerBase):
    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        self._stats.record(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class VllmCollector(Collector):
    """vLLM's own metrics, which it keeps on the process's default registry.

    Their names stay (`vllm:...`). Labels that are the same everywhere are dropped; the others take
    few values by construction (finish reasons, bucket bounds).
    """

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        for family in REGISTRY.collect():
            if family.name.startswith(PREFIX):
                yield _without_labels(family)


def _without_labels(family: Metric) -> Metric:
    copy = Metric(family.name, family.documentation, family.type, family.unit)
    for sample in family.samples:
        labels = {k: v for k, v in sample.labels.items() if k not in DROPPED_LABELS}
        copy.samples.append(sample._replace(labels=labels))
    return copy
