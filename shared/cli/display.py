"""The live view: feeds `Progress` from the bus, draws it on a terminal or prints plain lines."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, TextIO

from shared.cli.progress import Progress, Snapshot, plain_line
from shared.runtime.bus import Bus, CoreMessage
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.telemetry import Lease, StepReport

if TYPE_CHECKING:
    from rich.console import Group

_PLAIN_PERIOD_S = 5.0
_LIVE_PERIOD_S = 0.5
_QUEUE_PERIOD_S = 2.0


class Display:
    """Shows one run until cancelled."""

    def __init__(self, progress: Progress, title: str, out: TextIO = sys.stdout) -> None:
        self.progress = progress
        self._title = title
        self._out = out
        self._live = out.isatty()

    def on_event(self, event: dict[str, Any]) -> None:
        """Take a line of `events.jsonl`."""
        self._say(self.progress.on_event(event))

    async def follow(self, bus: Bus) -> None:
        """Feed the picture from the bus."""
        leases = await bus.subscribe(bus.subjects.leases, self._take_lease)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read_steps(bus))
                group.create_task(self._poll_queues(bus))
        finally:
            await leases.close()

    async def draw(self) -> None:
        """Draw until cancelled."""
        if not self._live:
            while True:
                await asyncio.sleep(_PLAIN_PERIOD_S)
                self._print(plain_line(self.progress.snapshot(time.time())))
        async with self._terminal() as update:
            while True:
                update()
                await asyncio.sleep(_LIVE_PERIOD_S)

    @asynccontextmanager
    async def _terminal(self) -> AsyncGenerator[Callable[[], None]]:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._out)
        with Live(console=console, auto_refresh=False) as live:
            yield lambda: live.update(
                render(self.progress.snapshot(time.time()), self._title), refresh=True
            )

    async def _take_lease(self, message: CoreMessage) -> None:
        try:
            lease = decode(message.payload, Lease)
        except WireError:
            return  # another version of the software: it shows as silent
        self._say(self.progress.on_lease(lease, time.time()))

    async def _read_steps(self, bus: Bus) -> None:
        async with aclosing(bus.read("stats", 1, subject=bus.subjects.stats("step"))) as batches:
            async for batch in batches:
                for record in batch:
                    try:
                        self.progress.on_step(decode(record.payload, StepReport))
                    except WireError:
                        continue  # see above

    async def _poll_queues(self, bus: Bus) -> None:
        while True:
            self.progress.tickets = (await bus.stream_state("tickets")).num_messages
            await asyncio.sleep(_QUEUE_PERIOD_S)

    def _say(self, line: str | None) -> None:
        if line is not None and not self._live:
            self._print(f"[{time.time() - self.progress.started_at:6.1f}s] {line}")

    def _print(self, line: str) -> None:
        self._out.write(line + "\n")
        self._out.flush()


def render(shot: Snapshot, title: str) -> Group:
    """Return the picture as rich renderables."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    done = max(shot.version, 0)
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(title, style="bold"),
        ProgressBar(total=shot.versions, completed=done, width=32),
        Text(f"version {done}/{shot.versions}"),
        Text(f"{shot.elapsed_s:5.0f} s", style="dim"),
    )
    facts = Table.grid(padding=(0, 3))
    facts.add_row(
        f"success [bold]{_number(shot.success)}[/]",
        f"staleness {_number(shot.staleness_mean)} max {_number(shot.staleness_max, 0)}"
        f" of {shot.staleness_bound}",
        f"tickets {shot.tickets}  unscored {shot.backlog}",
        f"tokens/s {shot.generated_per_s:,.0f} generated, {shot.trained_per_s:,.0f} trained",
        f"restarts {shot.restarts}",
    )
    services = Table.grid(padding=(0, 2))
    for service in shot.services:
        services.add_row(
            Text(service.pod, style="" if service.ready else "yellow"),
            f"v{service.version}" if service.version >= 0 else "",
            ProgressBar(total=1.0, completed=service.busy_share, width=16),
            f"{service.busy_share:.0%} busy",
            Text("" if service.ready else service.reason, style="yellow"),
        )
    events = [
        Text(f"{elapsed_s:6.1f}s {text}", style="bold red" if alarming else "green")
        for elapsed_s, text, alarming in shot.events
    ]
    return Group(head, facts, services, *events)


def _number(value: float | None, places: int = 2) -> str:
    return "-" if value is None else f"{value:.{places}f}"
