"""Rows by cache slot and version, on an engine whose blocks go round; and what is sent of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from services.rollout.vllm_port import Recorded
from services.rollout.vllm_recorder import RoutingRecorder, Segment, SlotRows
from services.rollout.vllm_records import records_of
from shared.wire.trajectory import Span

BLOCK, NUM_BLOCKS = 4, 24
LAYERS, CHOICES = 3, 2


def row_of(text: int, token: int, label: str) -> np.ndarray:
    """What the router of version `label` makes of a token of a text: [L, K], of 256 experts."""
    seed = hash((text, token, label)) % (1 << 32)
    return np.random.default_rng(seed).integers(0, 256, (LAYERS, CHOICES)).astype(np.uint8)


class Engine:
    """Blocks, steps and preemptions as vLLM has them; blocks are handed out again at once."""

    def __init__(self, num_experts: int = 256, max_ended: int = 50) -> None:
        self.blocks: dict[str, list[int]] = {}
        self.free = list(range(NUM_BLOCKS))
        self.computed: dict[str, int] = {}
        self.label = ""
        slots = SlotRows((NUM_BLOCKS * BLOCK, LAYERS, CHOICES), num_experts, torch.device("cpu"))
        self.recorder = RoutingRecorder(slots, BLOCK, self.blocks.__getitem__, max_ended)
        self.update("0")

    def update(self, label: str) -> None:
        self.recorder.begin_update()
        self.label = label
        self.recorder.finish_update(label)

    def forward(
        self, text: int, stop: int, cached: str = "", held: tuple[str, int] | None = None
    ) -> None:
        """Compute a text's tokens up to `stop`; at its start, share the full blocks of another."""
        name = f"r{text}"
        anew = name not in self.blocks
        if anew:
            shared = self.blocks.get(cached, [])[: self.computed.get(cached, 0) // BLOCK]
            self.blocks[name] = list(shared)
            self.computed[name] = len(shared) * BLOCK
        begin, blocks = self.computed[name], self.blocks[name]
        while len(blocks) * BLOCK < stop:
            blocks.append(self.free.pop(0))
        slots = [blocks[t // BLOCK] * BLOCK + t % BLOCK for t in range(begin, stop)]
        rows = np.stack(
            [row_of(text if not cached else 0, t, self.label) for t in range(begin, stop)]
        )
        self.recorder.put(torch.tensor(slots), torch.from_numpy(rows.astype(np.int32)))
        self.recorder.forwarded(name, f"k{text}", begin, stop, anew=anew, held=held)
        self.computed[name] = stop

    def preempt(self, text: int, *, told: bool = True) -> None:
        if told:
            self.recorder.lose_blocks(f"r{text}")
        self.free += self.blocks.pop(f"r{text}")
        self.computed.pop(f"r{text}")

    def end(self, text: int) -> None:
        self.recorder.end(f"r{text}")
        self.free += self.blocks.pop(f"r{text}")

    def check(
        self, segments: list[Segment], text: int, label: str, stop: int, start: int = 0
    ) -> None:
        """Segments of a label follow each other and hold what the router said."""
        mine = [s for s in segments if s.label == label]
        assert [s.start for s in mine] == [start, *[s.stop for s in mine[:-1]]]
        assert mine[-1].stop == stop
        rows = np.concatenate([s.rows for s in mine])
        assert np.array_equal(rows, np.stack([row_of(text, t, label) for t in range(start, stop)]))


def test_rows_come_out_by_token_however_the_blocks_lie() -> None:
    engine = Engine()
    for text in (1, 2, 3):
        engine.forward(text, 3)
    for stop in (9, 10, 11):
        for text in (3, 1, 2):
            engine.forward(text, stop)
    for text in (1, 2, 3):
        engine.end(text)
        engine.check(engine.recorder.take(f"k{text}"), text, "0", 11)


def test_rows_of_a_prefix_that_was_found_in_the_cache_come_with_it() -> None:
    engine = Engine()
    engine.forward(0, 10)
    engine.forward(5, 14, cached="r0")
    engine.end(5)
    engine.check(engine.recorder.take("k5"), 0, "0", 14)


def test_rows_that_the_caller_holds_are_not_copied_but_those_of_another_version_are() -> None:
    engine = Engine()
    engine.forward(1, 14, held=("0", 9))
    engine.update("1")
    engine.preempt(1, told=False)
    engine.forward(1, 16, held=("0", 9))
    engine.end(1)
    segments = engine.recorder.take("k1")
    engine.check(segments, 1, "0", 14, start=9)
    engine.check(segments, 1, "1", 16)


def test_a_preempted_request_keeps_its_rows_and_goes_on() -> None:
    engine = Engine()
    engine.forward(1, 10)
    engine.preempt(1)
    engine.forward(2, 40)  # in the blocks that it had
    engine.forward(1, 6)
    engine.preempt(1)
    engine.forward(1, 13)
    engine.end(1)
    engine.check(engine.recorder.take("k1"), 1, "0", 13)


def test_an_update_separates_what_two_versions_computed() -> None:
    engine = Engine()
    engine.forward(1, 10)
    engine.forward(2, 5)
    engine.preempt(2)
    # The cache is cleared: all lose their blocks in the scheduler, the worker hears of it later.
    blocks = engine.blocks["r1"]
    engine.update("1")
    engine.preempt(1)
    engine.free = blocks + [b for b in engine.free if b not in blocks]
    engine.forward(2, 9)
    engine.forward(1, 12)
    for text, ends in ((1, (10, 12)), (2, (5, 9))):
        engine.end(text)
        segments = engine.recorder.take(f"k{text}")
        engine.check(segments, text, "0", ends[0])
        engine.check(segments, text, "1", ends[1])


def test_over_a_cache_that_was_kept_the_later_version_has_the_rows_that_it_computed() -> None:
    engine = Engine()
    engine.forward(1, 10)
    engine.update("1")
    engine.forward(1, 12)
    engine.end(1)
    segments = engine.recorder.take("k1")
    engine.check(segments, 1, "0", 10)
    engine.check(segments, 1, "1", 12, start=10)


def test_rows_can_be_taken_before_the_step_that_ends_the_request_and_are_gone_then() -> None:
    engine = Engine()
    engine.forward(1, 10)
    engine.check(engine.recorder.take("k1"), 1, "0", 10)
    assert engine.recorder.take("k1") == []
    engine.end(1)
    assert engine.recorder.take("k1") == []
    assert engine.recorder.take("never forwarded") == []


def test_of_requests_that_nobody_asks_for_a_bounded_number_is_remembered() -> None:
    engine = Engine(max_ended=3)
    for text in range(10):
        engine.forward(text, 5)
        engine.end(text)
    assert [bool(engine.recorder.take(f"k{text}")) for text in range(10)] == [False] * 7 + [
        True
    ] * 3


def test_more_than_256_experts_take_two_bytes() -> None:
    slots = SlotRows((8, 1, 2), 40_000, torch.device("cpu"))
    slots.put(torch.tensor([6, 1]), torch.tensor([[[39_999, 0]], [[300, 1]]], dtype=torch.int32))
    rows = slots.take(np.array([1, 6]))
    assert rows.dtype == np.uint16
    assert rows.tolist() == [[[300, 1]], [[39_999, 0]]]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_mixed_up_in_random_histories(seed: int) -> None:
    rng = random.Random(seed)
    engine, lengths, version = Engine(), dict[int, dict[str, int]](), 0
    for _ in range(300):
        text = rng.randrange(8)
        stopped = engine.computed.get(f"r{text}", 0)
        match rng.choice(["forward"] * 6 + ["preempt", "end", "update"]):
            case "forward" if len(engine.free) > 8 and stopped < 16:
                stop = stopped + rng.randint(1, 6)
                engine.forward(text, stop)
                by_label = lengths.setdefault(text, {})
                by_label[engine.label] = max(by_label.get(engine.label, 0), stop)
            case "preempt" if stopped:
                engine.preempt(text)
            case "end" if stopped:
                early = rng.random() < 0.5
                segments = engine.recorder.take(f"k{text}") if early else []
                engine.end(text)
                engine.computed.pop(f"r{text}")
                segments = segments if early else engine.recorder.take(f"k{text}")
                for label, stop in lengths.pop(text).items():
                    engine.check(segments, text, label, stop)
            case "update":
                version += 1
                running = [int(name[1:]) for name in engine.blocks]
                engine.update(str(version))
                for other in running:
                    engine.preempt(other, told=rng.random() < 0.5)
            case _:
                pass


SPANS = (Span(version=3, start=0, stop=2), Span(version=5, start=2, stop=6))


def recorded(label: str, start: int, stop: int) -> Recorded:
    return Recorded(label, start, np.arange(start * 2, stop * 2, dtype=np.uint8).reshape(-1, 1, 2))


@pytest.mark.parametrize(
    ("parts", "held", "expected"),
    [
        # Prefix of 10: version 3 sampled tokens 10 and 11, version 5 up to 15.
        ([("3", 0, 12), ("5", 0, 16)], None, [(3, 0, 11), (5, 0, 15)]),
        ([("3", 0, 11), ("4", 0, 11), ("5", 0, 15)], None, [(3, 0, 11), (5, 0, 15)]),
        ([("3", 0, 8), ("3", 8, 11), ("5", 0, 15)], (3, 9), [(3, 9, 11), (5, 0, 15)]),
        ([("3", 0, 11), ("5", 0, 15)], (3, 11), [(5, 0, 15)]),
        ([("3", 0, 11), ("5", 0, 15)], (5, 10), [(3, 0, 11), (5, 10, 15)]),
        ([("3", 0, 11), ("5", 11, 15)], (2, 10), [(3, 0, 11), (5, 11, 15)]),
        ([], None, []),
    ],
)  # fmt: skip
def test_the_context_of_what_was_sampled_is_sent_and_what_is_held_is_not(
    parts: list[tuple[str, int, int]],
    held: tuple[int, int] | None,
    expected: list[tuple[int, int, int]],
) -> None:
    records = records_of([recorded(*part) for part in parts], SPANS, 10, held)
    assert [(r.version, r.start, r.stop) for r in records] == expected
    for record in records:
        assert record.experts.dtype == "u1"
        tokens = record.experts.numpy()[:, 0, 0] // 2
        assert tokens.tolist() == list(range(record.start, record.stop))
