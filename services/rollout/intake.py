"""What to do with a request that has just come in. Pure."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from services.rollout.engine import EngineLoad
from shared.wire.messages import Refused, SampleRequest


@dataclass(frozen=True, slots=True)
class Desk:
    """State of the pod, as far as intake depends on it."""

    model_id: str
    open_ids: Container[str]
    """Requests accepted and not answered yet."""
    num_open: int
    max_concurrency: int
    unable: str = ""
    """Why nothing can be served now (draining, no engine); empty when it can."""
    pressure: str = ""
    """Why the engine should get nothing more for now; empty when it may."""


@dataclass(frozen=True, slots=True)
class Ignore:
    """No answer: nobody waits for one, or one is on its way."""

    cause: Literal["expired", "duplicate", "no_reply"]


@dataclass(frozen=True, slots=True)
class Serve:
    """Accept it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How full the engine may become; None: as full as it gets."""

    max_waiting: int | None = None
    max_kv_used_ratio: float | None = None


def pressure(load: EngineLoad, limits: Limits) -> str:
    """Return what keeps further requests out of the engine, or nothing."""
    if limits.max_waiting is not None and load.waiting >= limits.max_waiting:
        return f"{load.waiting} turns wait in the engine, max_waiting is {limits.max_waiting}"
    most = limits.max_kv_used_ratio
    if most is not None and load.waiting and load.kv_used_ratio >= most:
        return f"{load.kv_used_ratio:.2f} of the cache is in use, max_kv_used_ratio is {most:g}"
    return ""


def judge(request: SampleRequest, reply: str, now: float, desk: Desk) -> Serve | Ignore | Refused:
    """Decide about a request at `now` (Unix seconds); `reply` is the inbox it names."""
    if not reply:
        return Ignore("no_reply")
    if request.request_id in desk.open_ids:
        return Ignore("duplicate")
    if request.expires <= now:
        return Ignore("expired")
    if request.model_id != desk.model_id:
        return Refused(reason=f"model {request.model_id!r} is not {desk.model_id!r}, served here")
    if request.adapter_id is not None:
        return Refused(reason=f"adapter {request.adapter_id!r}: this engine has no adapters")
    flaw = _flaw(request)
    if flaw:
        return Refused(reason=flaw)
    if desk.unable:
        return Refused(reason=desk.unable, retryable=True)
    if desk.num_open >= desk.max_concurrency:
        return Refused(
            reason=f"{desk.num_open} requests are open, max_concurrency is {desk.max_concurrency}",
            retryable=True,
        )
    if desk.pressure:
        return Refused(reason=desk.pressure, retryable=True)
    return Serve()


def _flaw(request: SampleRequest) -> str:
    """What makes the token ids unreadable, or nothing; their values are the engine's to check."""
    ids = request.token_ids
    if ids.dtype != "i4" or len(ids.shape) != 1:
        return f"token_ids are {ids.dtype}{list(ids.shape)}: send i4[T]"
    return ""
