"""Lines between ranks, over real sockets, leader and followers as threads."""

import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from shared.backends.rank_ends import HELLO, Address
from shared.backends.rank_lines import FollowerLine, LeaderLines

TIMEOUT_S = 2.0


class Left:
    """What a follower's `leave` was told, in place of the end of the process."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.told = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.told.set()


def connect(
    num: int, timeout_s: float = TIMEOUT_S
) -> tuple[LeaderLines, list[FollowerLine], list[Left]]:
    lines = LeaderLines(num, host="127.0.0.1", timeout_s=timeout_s)
    address = Address("127.0.0.1", lines.port, lines.token)
    accepting = threading.Thread(target=lines.accept)
    accepting.start()
    left = [Left() for _ in range(num)]
    followers = [
        FollowerLine(rank + 1, address, timeout_s=timeout_s, leave=left[rank])
        for rank in range(num)
    ]
    accepting.join(5)
    return lines, followers, left


def until(condition: Callable[[], bool], bound_s: float) -> None:
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_commands_reach_every_follower_in_order_and_answers_keep_their_rank():
    lines, followers, _ = connect(2)
    for number in range(3):
        lines.send(b"command%d" % number)
    for rank, follower in enumerate(followers, start=1):
        assert [follower.command() for _ in range(3)] == [b"command0", b"command1", b"command2"]
        follower.answer(b"from%d" % rank)
    assert [lines.answer(rank, 5) for rank in (1, 2)] == [b"from1", b"from2"]
    lines.stop()
    assert [follower.command() for follower in followers] == [None, None]
    assert not lines.reason


def test_an_idle_job_outlives_the_bound_by_its_beats():
    lines, _followers, left = connect(2, timeout_s=0.5)
    time.sleep(1.5)
    assert not lines.reason
    assert not any(one.reasons for one in left)
    lines.stop()


def test_a_follower_that_ends_is_named_at_once_and_frees_who_waits_for_it():
    lines, followers, _ = connect(2, timeout_s=60)
    followers[1]._end.cut()
    began = time.monotonic()
    assert lines.answer(1, 30) is None
    until(lambda: bool(lines.reason), 5)
    assert time.monotonic() - began < 5
    assert lines.reason == "rank 2: its process ended"


def test_of_a_lost_rank_the_others_are_told_and_blame_nobody():
    lines, followers, left = connect(2, timeout_s=60)
    followers[0]._end.cut()
    # what the loss broke here is no reason of its own
    assert followers[1].last_words("accumulate: connection closed by peer")
    until(lambda: bool(lines.reason), 5)
    assert lines.reason == "rank 1: its process ended"
    assert not left[1].reasons


def test_last_words_are_the_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shared.backends.rank_lines.LOSS_S", 0.2)
    lines, followers, _ = connect(1)
    assert not followers[0].last_words("step: out of memory")
    followers[0]._end.cut()
    until(lambda: bool(lines.reason), 5)
    assert lines.reason == "rank 1: step: out of memory"


def test_a_silent_follower_is_named_within_the_bound(monkeypatch: pytest.MonkeyPatch):
    killed: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, _: killed.append(pid))
    lines, followers, _ = connect(2, timeout_s=1.0)
    followers[0]._ended.set()  # its beats stop, the connection stays
    began = time.monotonic()
    until(lambda: bool(lines.reason), 5)
    assert 0.5 < time.monotonic() - began < 3
    assert lines.reason == "rank 1: silent for 1 s"
    until(lambda: len(killed) == 1, 5)


def test_followers_leave_when_the_leader_is_gone_or_silent():
    lines, _, left = connect(1, timeout_s=60)
    for end in lines._ends.values():
        end.cut()
    assert left[0].told.wait(5)
    assert left[0].reasons[0] == "the leader is gone"

    lines, _, left = connect(1, timeout_s=1.0)
    lines._closing = True  # ends its beats
    assert left[0].told.wait(5)
    assert left[0].reasons[0] == "the leader has been silent for 1 s"


def test_a_follower_that_cannot_stop_in_time_leaves_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("shared.backends.rank_lines.STOP_S", 0.2)
    lines, _, left = connect(1)
    lines.stop()
    assert left[0].told.wait(5)
    assert left[0].reasons == [""]


def test_a_stranger_without_the_token_is_no_rank_and_stops_nobody():
    lines = LeaderLines(1, host="127.0.0.1", timeout_s=5)
    accepting = threading.Thread(target=lines.accept)
    accepting.start()
    as_rank_1 = struct.pack("!32sII", bytes(32), 1, 1)
    for said in (as_rank_1, b"GET / HTTP/1.1\r\n"):
        with socket.create_connection(("127.0.0.1", lines.port)) as stranger:
            stranger.sendall(said)
    address = Address("127.0.0.1", lines.port, lines.token)
    follower = FollowerLine(1, address, timeout_s=5, leave=Left())
    accepting.join(5)
    lines.send(b"hello")
    assert follower._commands.get(timeout=5) == b"hello"
    lines.stop()


def test_ranks_that_do_not_come_are_named_within_the_bound():
    lines = LeaderLines(3, host="127.0.0.1", timeout_s=0.5)
    address = Address("127.0.0.1", lines.port, lines.token)
    FollowerLine(2, address, timeout_s=5, leave=Left())
    with pytest.raises(TimeoutError, match=r"rank 1, 3 did not connect within 0.5 s"):
        lines.accept()


BIG = b"x" * (64 << 20)
"""More than sockets hold: a frozen process reads none of it."""


def test_a_command_to_a_follower_that_does_not_read_is_given_up_and_the_rank_named():
    lines = LeaderLines(1, host="127.0.0.1", timeout_s=TIMEOUT_S)
    frozen = socket.create_connection(("127.0.0.1", lines.port))
    frozen.sendall(HELLO.pack(lines.token, 1, 0))
    lines._one_machine = False  # it is this process: not to be killed
    lines.accept()
    began = time.monotonic()
    lines.send(BIG)
    assert lines.lost.wait(TIMEOUT_S)
    # what still fits into the sockets' buffers starts the clock again, a few times
    assert time.monotonic() - began < 10 * TIMEOUT_S
    assert lines.reason.startswith("rank 1: ")
    frozen.close()


def test_an_answer_to_a_leader_that_does_not_read_ends_the_follower():
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        left = Left()
        address = Address("127.0.0.1", frozen.getsockname()[1], b"t" * 32)
        follower = FollowerLine(1, address, timeout_s=TIMEOUT_S, leave=left)
        answering = threading.Thread(target=follower.answer, args=(BIG,), daemon=True)
        answering.start()
        answering.join(10 * TIMEOUT_S)
        assert not answering.is_alive()
        assert left.told.wait(2 * TIMEOUT_S)
        assert left.reasons[0].startswith("the leader")
