"""The fence of the `interrupt` route: who has still to say that nobody samples the old version.

A pure state machine: `handle(event, now) -> list[Action]`, no IO; the clock handed in stands still
while the bus is away.

    Raise(v) -> Announce(g+1, floor v+1) -> Seen ... Seen -> Fenced -> (score, step, publish)
    Resume, Lower(v) -> Announce(g+1, floor v): nothing has left v, so it may be sampled again

A generation is acknowledged by a process (pod *and* incarnation), never by a name. Whoever joins
has to acknowledge, too; whoever's lease runs out is excluded, and what it sampled and did not hand
in can never be scored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# --- events


@dataclass(frozen=True, slots=True)
class Resume:
    """A learner process stands at `version`; the bucket holds this generation and floor."""

    version: int
    generation: int
    min_version: int


@dataclass(frozen=True, slots=True)
class Raise:
    """`version` is about to be left."""

    version: int


@dataclass(frozen=True, slots=True)
class Lower:
    """`version` is not left after all: the batch that was ready is not any more."""

    version: int


@dataclass(frozen=True, slots=True)
class EnvAgent:
    """One process, as its latest lease says."""

    pod: str
    incarnation: str
    generation: int
    """Newest one acknowledged."""
    interrupted: int = 0
    """Turns it interrupted for it."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Who lives now."""

    live: Sequence[EnvAgent]


Event = Resume | Raise | Lower | Seen

# --- actions


@dataclass(frozen=True, slots=True)
class Announce:
    """Write generation and floor into the control document."""

    generation: int
    min_version: int


@dataclass(frozen=True, slots=True)
class Fenced:
    """Nobody that lives samples the old version any more, or the bound is over."""

    acknowledged: tuple[str, ...]
    """Pods."""
    excluded: tuple[str, ...]
    """Pods whose lease ran out, or whose process was replaced, before they acknowledged."""
    silent: tuple[str, ...]
    """Pods that live and did not acknowledge within the bound."""
    interrupted: int


Action = Announce | Fenced


class Fence:
    """One learner process's view of the fence.

    Args:
        timeout_s: longest wait for acknowledgements.
        deaf_until: before this time an env agent may live without having been heard: nobody is
            taken for absent earlier.
    """

    def __init__(self, *, timeout_s: float, deaf_until: float) -> None:
        self.generation = 0
        self.min_version = 0
        self._timeout_s = timeout_s
        self._deaf_until = deaf_until
        self._raised_at: float | None = None
        """None: no fence is under way."""
        self._known: dict[tuple[str, str], bool] = {}
        """(pod, incarnation) -> whether it has acknowledged the present generation."""

    def handle(self, event: Event, now: float) -> list[Action]:
        """Advance by one event at `now` (seconds)."""
        match event:
            case Resume(version, generation, min_version):
                self.generation, self.min_version = generation, min_version
                return [] if min_version <= version else self._announce(version)
            case Lower(version):
                self._raised_at = None
                return self._announce(version)
            case Raise(version):
                self._raised_at = now
                return self._announce(version + 1)
            case Seen(live):
                return [] if self._raised_at is None else self._seen(live, now, self._raised_at)

    def _announce(self, min_version: int) -> list[Action]:
        self.generation += 1
        self.min_version = min_version
        self._known = {}
        return [Announce(self.generation, min_version)]

    def _seen(self, live: Sequence[EnvAgent], now: float, raised_at: float) -> list[Action]:
        for agent in live:
            self._known[agent.pod, agent.incarnation] = agent.generation >= self.generation
        present = {(agent.pod, agent.incarnation) for agent in live}
        waited_for = [name for name in present if not self._known[name]]
        over = now - raised_at >= self._timeout_s
        if not over and (waited_for or now < self._deaf_until):
            return []
        self._raised_at = None
        gone = [name for name, acknowledged in self._known.items() if not acknowledged]
        return [
            Fenced(
                acknowledged=_pods(name for name, done in self._known.items() if done),
                excluded=_pods(name for name in gone if name not in present),
                silent=_pods(waited_for),
                interrupted=sum(a.interrupted for a in live if a.generation >= self.generation),
            )
        ]


def _pods(names: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(sorted(pod for pod, _ in names))
