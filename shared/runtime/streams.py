"""Which stream a subject belongs to, and how subject filters match. Pure."""

from __future__ import annotations

from functools import lru_cache

from shared.wire.subjects import STREAMS, StreamName, Subjects

_BY_FIRST_TOKEN: dict[str, StreamName] = {
    spec.subject.partition(".")[0]: spec.name for spec in STREAMS
}


def stream_of(subjects: Subjects, subject: str) -> StreamName:
    """Return the stream that stores `subject`.

    Raises:
        ValueError: no stream of this run stores it.
    """
    prefix = subjects.prefix + "."
    first = subject.removeprefix(prefix).partition(".")[0]
    if not subject.startswith(prefix) or first not in _BY_FIRST_TOKEN:
        raise ValueError(f"{subject}: no stream of run {subjects.run!r} stores this subject")
    return _BY_FIRST_TOKEN[first]


@lru_cache(maxsize=4096)
def _tokens(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.split("."))


def matches(pattern: str, subject: str) -> bool:
    """Whether a NATS filter (`*` one token, `>` the rest) covers a concrete subject."""
    if pattern == subject:
        return True
    if "*" not in pattern and ">" not in pattern:
        return False
    wanted = _tokens(pattern)
    given = subject.split(".")
    for index, token in enumerate(wanted):
        if token == ">":
            return len(given) > index
        if index >= len(given) or token not in ("*", given[index]):
            return False
    return len(wanted) == len(given)
