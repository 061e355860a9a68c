from __future__ import annotations

import pytest

from services.learner.keyframing import WANTED_PAUSE_S, keyframe_reason
from shared.wire.telemetry import Lease


def lease(**gauges: float) -> Lease:
    return Lease(
        role="rollout",
        pod="r0",
        incarnation="i",
        pid=1,
        sent_at=0.0,
        ready=True,
        gauges=gauges,
    )


@pytest.mark.parametrize(
    ("due", "gauges", "since_last_s", "reason"),
    [
        (False, {}, 1e9, None),
        (True, {}, 0.0, "due"),
        (True, {"keyframe_wanted": 1.0}, 0.0, "due"),
        (False, {"keyframe_wanted": 1.0}, WANTED_PAUSE_S + 1, "wanted"),
        (False, {"keyframe_wanted": 1.0}, WANTED_PAUSE_S - 1, None),
        (False, {"keyframe_wanted": 0.0}, 1e9, None),
    ],
)
def test_a_keyframe_is_published_when_due_or_when_a_follower_has_no_way_left(
    due, gauges, since_last_s, reason
):
    found = keyframe_reason(due=due, leases=[lease(), lease(**gauges)], since_last_s=since_last_s)
    assert found == reason
