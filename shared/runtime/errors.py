"""What the runtime can refuse, and what a service shell does with it.

RuntimeFault
├── ConfigError        bad configuration or input: one line, exit code 2
├── BusError
│   ├── BusUnavailable  no connection or no answer within the bound: retry, readiness false
│   ├── Conflict        compare-and-set lost: someone else wrote first
│   ├── StreamFull      error 10077: a fault with an alert, not back-pressure
│   ├── PayloadTooLarge above the server's max_payload
│   └── Denied          a permission violation
├── Fenced             another learner owns the run: exit, do not retry
└── Fatal              cannot go on (disk full, fork, broken invariant): exit code 1 with the reason
"""

from __future__ import annotations


class RuntimeFault(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(RuntimeFault):
    """Configuration or input that cannot work. Names the offender and what to do."""


class BusError(RuntimeFault):
    """The message bus refused or did not answer."""


class BusUnavailable(BusError):
    """No connection, or no answer within the bound."""


class Conflict(BusError):
    """A compare-and-set append lost: the subject or stream is at another sequence."""

    def __init__(self, subject: str, expected: int) -> None:
        super().__init__(f"{subject}: expected last sequence {expected}, the log has moved on")
        self.subject = subject
        self.expected = expected


class StreamFull(BusError):
    """The stream is at its limit (NATS error 10077)."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"{subject}: the stream is full; raise its limit or purge")
        self.subject = subject


class PayloadTooLarge(BusError):
    """The payload is above the server's max_payload."""

    def __init__(self, subject: str, num_bytes: int, bound_bytes: int) -> None:
        super().__init__(f"{subject}: {num_bytes} bytes, the server accepts {bound_bytes}")
        self.subject = subject
        self.num_bytes = num_bytes
        self.bound_bytes = bound_bytes


class Denied(BusError):
    """The server denied a publish or subscribe."""


class Fenced(RuntimeFault):
    """Another process took over what this one owned."""


class Fatal(RuntimeFault):
    """The service cannot go on; the reason is one line."""
