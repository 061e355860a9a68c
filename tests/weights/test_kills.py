"""kill -9 of the publisher, of followers and of nats-server at random points."""

from __future__ import annotations

import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from shared.runtime import nats_server

ROLES = Path(__file__).parent


class Cast:
    """A nats-server, a publisher and two followers, each replaced as soon as it is killed."""

    def __init__(self, folder: Path, until: int) -> None:
        sys.path.insert(0, str(ROLES))
        import kill_roles

        self._roles = kill_roles
        self._folder = folder
        self._until = until
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["kill_roles"])
        port = nats_server.free_port()
        self.url = f"nats://127.0.0.1:{port}"
        self._config = folder / "nats.conf"
        nats_server.write_config(self._config, port=port, store_dir=folder / "store")
        self._server = self._serve()
        self._processes: dict[str, BaseProcess] = {}
        for name in ("publisher", "newest", "all"):
            self._start(name)

    def lines(self, name: str) -> list[str]:
        path = self._folder / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []

    def kill(self, name: str) -> None:
        """SIGKILL and start again at once."""
        if name == "nats":
            self._server.kill()
            self._server.wait()
            self._server = self._serve()
            return
        process = self._processes[name]
        assert process.is_alive(), f"{name} ended by itself with code {process.exitcode}"
        process.kill()
        process.join()
        self._start(name)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.join()
        self._server.kill()
        self._server.wait()
        sys.path.remove(str(ROLES))

    def _start(self, name: str) -> None:
        log = str(self._folder / f"{name}.log")
        process = (
            self._context.Process(
                target=self._roles.publish, args=(self.url, log, self._until), daemon=True
            )
            if name == "publisher"
            else self._context.Process(
                target=self._roles.follow,
                args=(self.url, log),
                kwargs={"keep_past": name == "all"},
                daemon=True,
            )
        )
        process.start()
        self._processes[name] = process

    def _serve(self):  # type: ignore[no-untyped-def]
        server = nats_server.start(self._config, self._folder / "nats.log")
        nats_server.wait_healthy(self.url, 20.0, server)
        return server


@pytest.fixture
def cast(tmp_path: Path) -> Iterator[Callable[[int], Cast]]:
    started: list[Cast] = []

    def make(until: int) -> Cast:
        started.append(Cast(tmp_path, until))
        return started[-1]

    yield make
    for one in started:
        one.close()


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def kill_and_converge(cast: Cast, num_kills: int, last: int, seed: int) -> None:
    rng = random.Random(seed)
    until(lambda: bool(cast.lines("newest")), 60.0, "no follower ever showed a version")
    for _ in range(num_kills):
        victim = rng.choice(["publisher", "newest", "all", "nats"])
        before = len(cast.lines("publisher"))
        cast.kill(victim)
        # Sometimes the next one dies while this one is still starting.
        if rng.random() < 0.7:
            until(
                lambda before=before: len(cast.lines("publisher")) > before, 60.0, "no publication"
            )
        time.sleep(rng.random() * 0.3)
    until(lambda: "done" in cast.lines("publisher"), 120.0, "the publisher never came to its end")
    for name in ("newest", "all"):
        until(
            lambda name=name: f"{last} ok" in cast.lines(name)[-20:],
            60.0,
            f"{name} never arrived: {cast.lines(name)[-3:]}",
        )
    for name in ("publisher", "newest", "all"):
        wrong = [line for line in cast.lines(name) if not line.endswith(("ok", "done"))]
        assert wrong == []
    published = [int(line.split()[0]) for line in cast.lines("publisher") if line != "done"]
    assert sorted(set(published)) == published, "a version was published twice"


@pytest.mark.e2e
def test_every_follower_converges_when_anything_is_killed(cast) -> None:
    kill_and_converge(cast(60), num_kills=8, last=60, seed=1)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_every_follower_converges_through_fifty_kills(cast) -> None:
    kill_and_converge(cast(400), num_kills=50, last=400, seed=2)
