"""`python -m shared.cli.bus_check --config FILE`: what `helm test` runs against a release.

A real request and its reply with the operator's account, a write that the server must refuse, and
a lease from every role that has pods. One line per question; exit code 1 when one is answered
wrongly.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.cli.config_cmd import read
from shared.runtime.bus import Bus, CoreMessage
from shared.runtime.config import ROLES
from shared.runtime.errors import BusUnavailable, ConfigError, Denied
from shared.runtime.logs import Log
from shared.runtime.nats_bus import connect
from shared.runtime.sections import CommonConfig
from shared.runtime.signals import leave_at_sigterm
from shared.wire.codec import decode
from shared.wire.errors import WireError
from shared.wire.subjects import Subjects
from shared.wire.telemetry import Lease


@dataclass(frozen=True, slots=True)
class Answer:
    """One question and how it was answered."""

    question: str
    ok: bool
    said: str


async def check(common: CommonConfig, wait_s: float, roles: Sequence[str] = ROLES) -> list[Answer]:
    """Ask everything; leases of `roles`.

    Raises:
        BusUnavailable: no connection, or the streams do not exist within `wait_s`.
    """
    bus = await connect(common.bus, Subjects(common.run.name), "check", Log("check"))
    try:
        await bus.wait_for_streams(wait_s)
        state = await bus.stream_state("journal")
        answers = [Answer("request and reply", True, f"journal holds {state.num_messages} entries")]
        if common.bus.user:
            answers.append(await _is_refused(bus))
        answers += await leases(bus, wait_s, roles)
        return answers
    finally:
        await bus.close()


async def _is_refused(bus: Bus) -> Answer:
    question = "a write by the operator's account"
    try:
        await bus.append(bus.subjects.journal, b"")
    except Denied:
        return Answer(question, True, "refused by the server, as it should be")
    return Answer(question, False, "was accepted: the accounts are not in force")


async def leases(bus: Bus, wait_s: float, roles: Sequence[str]) -> list[Answer]:
    """Wait until every one of `roles` has said that it lives, at most `wait_s`."""
    heard: dict[str, set[str]] = {role: set() for role in roles}
    complete = asyncio.Event()

    async def take(message: CoreMessage) -> None:
        try:
            lease = decode(message.payload, Lease)
        except WireError:
            return
        if lease.role in heard:
            heard[lease.role].add(lease.pod)
        if all(heard.values()):
            complete.set()

    subscription = await bus.subscribe(bus.subjects.leases, take)
    started = time.monotonic()
    try:
        async with asyncio.timeout(wait_s):
            await complete.wait()
    except TimeoutError:
        pass
    await subscription.close()
    waited_s = time.monotonic() - started
    return [
        Answer(
            f"leases of {role}",
            bool(pods),
            f"{len(pods)} heard" if pods else f"none within {waited_s:.0f} s",
        )
        for role, pods in heard.items()
    ]


def _roles(text: str) -> tuple[str, ...]:
    roles = tuple(text.split(","))
    if unknown := set(roles) - set(ROLES):
        raise argparse.ArgumentTypeError(f"{min(unknown)}: not one of {', '.join(ROLES)}")
    return roles


def main(argv: Sequence[str] | None = None) -> int:
    """Check; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m shared.cli.bus_check")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--wait", type=float, default=60.0, metavar="S")
    parser.add_argument("--roles", type=_roles, default=ROLES, metavar="ROLE,...")
    arguments = parser.parse_args(argv)
    leave_at_sigterm(143)
    try:
        common = read(arguments.config).common()
        answers = asyncio.run(check(common, arguments.wait, arguments.roles))
    except (ConfigError, BusUnavailable) as error:
        sys.stderr.write(f"bus_check: {error}\n")
        return 2
    for answer in answers:
        print(f"{'ok  ' if answer.ok else 'FAIL'} {answer.question}: {answer.said}")
    return 0 if all(answer.ok for answer in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
