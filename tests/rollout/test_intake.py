from __future__ import annotations

from dataclasses import replace

import pytest

from services.rollout.engine import EngineLoad
from services.rollout.intake import Desk, Ignore, Limits, Serve, judge, pressure
from shared.wire.base import Array
from shared.wire.messages import Refused
from tests.rollout.pods import make_request

DESK = Desk(model_id="policy", open_ids={"open"}, num_open=1, max_concurrency=2)


def test_a_sound_request_is_served() -> None:
    assert judge(make_request(expires=10.0), "inbox", 9.0, DESK) == Serve()


@pytest.mark.parametrize(
    ("changes", "reply", "cause"),
    [
        ({"request_id": "open"}, "inbox", "duplicate"),
        ({"expires": 9.0}, "inbox", "expired"),
        ({}, "", "no_reply"),
        # Whoever waits for the first copy still gets its answer.
        ({"request_id": "open", "expires": 1.0}, "inbox", "duplicate"),
    ],
)
def test_what_nobody_waits_for_gets_no_answer(changes: dict, reply: str, cause: str) -> None:
    request = make_request(**{"expires": 10.0} | changes)
    assert judge(request, reply, 9.0, DESK) == Ignore(cause)  # type: ignore[arg-type]


def test_a_pod_that_cannot_serve_now_says_retry_and_why() -> None:
    full = replace(DESK, num_open=2)
    for desk, reason in ((replace(DESK, unable="draining"), "draining"), (full, "2 requests")):
        verdict = judge(make_request(expires=10.0), "inbox", 9.0, desk)
        assert isinstance(verdict, Refused)
        assert verdict.retryable
        assert reason in verdict.reason


@pytest.mark.parametrize(
    "token_ids", [Array.of([1.0, 2.0], "f4"), Array.of([[1, 2]], "i4"), Array.of([1], "i8")]
)
def test_token_ids_of_another_kind_are_refused_for_good(token_ids: Array) -> None:
    request = make_request(expires=10.0).model_copy(update={"token_ids": token_ids})
    # Even by a pod that is full: asking again elsewhere would not help.
    verdict = judge(request, "inbox", 9.0, replace(DESK, num_open=2))
    assert isinstance(verdict, Refused)
    assert not verdict.retryable
    assert "i4[T]" in verdict.reason


@pytest.mark.parametrize(
    ("load", "limits", "reason"),
    [
        (EngineLoad(8, 3, 0.99), Limits(), ""),
        (EngineLoad(8, 3, 0.99), Limits(max_waiting=4), ""),
        (EngineLoad(8, 4, 0.1), Limits(max_waiting=4), "4 turns wait in the engine"),
        (EngineLoad(8, 1, 0.9), Limits(max_kv_used_ratio=0.9), "0.90 of the cache is in use"),
        # A full cache that serves everybody is no pressure.
        (EngineLoad(8, 0, 1.0), Limits(max_kv_used_ratio=0.9), ""),
        (EngineLoad(8, 1, 0.8), Limits(max_kv_used_ratio=0.9), ""),
    ],
)
def test_the_engines_queue_and_cache_keep_requests_out_for_now(
    load: EngineLoad, limits: Limits, reason: str
) -> None:
    found = pressure(load, limits)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
    verdict = judge(make_request(expires=10.0), "inbox", 9.0, replace(DESK, pressure=found))
    if reason:
        assert isinstance(verdict, Refused)
        assert verdict.retryable
        assert reason in verdict.reason
    else:
        assert verdict == Serve()
