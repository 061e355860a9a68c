"""Prometheus' view of a service: its own counters and gauges, busy time, and the bus.

Names: `lagwise_<role>_<what>[_<unit>]`, counters `_total`; no ids or versions as labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from shared.runtime.context import Context
from shared.wire.versioning import WIRE_VERSION

_ODD = re.compile(r"[^a-z0-9_]+")


def lagwise_version() -> str:
    """Version of the installed distribution; `dev` from a bare checkout."""
    try:
        return version("lagwise")
    except PackageNotFoundError:
        return "dev"


def metric_name(role: str, what: str) -> str:
    """Return the Prometheus name of a service's counter or gauge, without `_total`."""
    clean = _ODD.sub("_", what.lower()).strip("_").removesuffix("_total")
    return f"lagwise_{role}_{clean}"


def _spelled(what: str) -> str:
    """Spell units out: Prometheus' own linter refuses `_s`."""
    return f"{what.removesuffix('_s')}_seconds" if what.endswith("_s") else what


class ServiceCollector(Collector):
    """Reads a Context at scrape time, from the thread of the HTTP server."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def describe(self) -> list[Metric]:
        return []  # what there is shows only while it runs

    def collect(self) -> Iterator[Metric]:
        context = self._context
        role = context.role

        def counter(what: str, value: float, text: str) -> Metric:
            family = CounterMetricFamily(metric_name(role, _spelled(what)), text)
            family.add_metric([], value)
            return family

        def gauge(what: str, value: float, text: str) -> Metric:
            family = GaugeMetricFamily(metric_name(role, _spelled(what)), text)
            family.add_metric([], value)
            return family

        # Copies: the event loop goes on changing the originals.
        for what, value in sorted(dict(context.counters).items()):
            yield counter(what, value, f"{what}, since the process started")
        for what, value in sorted(dict(context.gauges).items()):
            yield gauge(what, value, f"{what}, now")
        for what, value in sorted(dict(context.measured).items()):
            yield gauge(what, value, f"{what}, latest")
        for (what, label), values in sorted(dict(context.labelled).items()):
            family = GaugeMetricFamily(
                metric_name(role, what), f"{what} by {label}, latest", labels=[label]
            )
            for key, value in sorted(dict(values).items()):
                family.add_metric([key], value)
            yield family
        for what, value in sorted(dict(context.bus.counters).items()):
            yield counter(f"bus_{what}", value, f"bus: {what}, since the process started")
        yield counter("busy_seconds", context.busy_s, "own work, waiting excluded")
        yield gauge("bus_connected", float(context.bus.connected), "1 while the bus is there")
        yield gauge("ready", float(context.health.ready), "what /readyz says")
        yield gauge("policy_version", context.version, "policy version held, -1 for none")
        info = InfoMetricFamily("lagwise_build", "what runs here")
        wire = ".".join(map(str, WIRE_VERSION))
        info.add_metric([], {"version": lagwise_version(), "wire": wire, "role": role})
        yield info


def register(context: Context, registry: CollectorRegistry) -> None:
    """Export a service and its process on a registry."""
    registry.register(ServiceCollector(context))
    ProcessCollector(registry=registry)
