"""Whatever interrupts an episode, ids, masks, stamps and log-probs are those of its tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.env_agents.episodes import (
    Ask,
    End,
    Episode,
    Event,
    Limits,
    Observed,
    Replied,
    ResetEnv,
    Started,
    StepEnv,
    Stepped,
    Unanswered,
)
from shared.wire.base import Array
from shared.wire.messages import (
    Behind,
    Done,
    Partial,
    Refused,
    SampledTokens,
    SampleRequest,
    TaskRef,
    Ticket,
)
from shared.wire.trajectory import SamplingParams, Span, Trajectory

STOP = 1
LIMITS = Limits(max_turns=5, context_tokens=60, backoff_s=0.01, backoff_max_s=0.1)
TICKET = Ticket(
    ticket_id="t",
    purpose="train",
    group_id="g",
    member=0,
    group_size=8,
    task=TaskRef(dataset="d", split="train", index=0, seed=0),
    issue_version=0,
    min_version=0,
    deadline=1e9,
    sampling=SamplingParams(max_new_tokens=7, stop_ids=(STOP,)),
    seed=3,
)


@dataclass
class World:
    """A rollout and an environment that do anything they may, and write down what they did."""

    rng: random.Random
    trouble: float
    version: int = 0
    reference: list[tuple[int, int, int, float]] = field(default_factory=list)
    """Per token: id, mask, version (-1 for the environment's), log-prob."""
    history: dict[tuple[int, int], int] = field(default_factory=dict)

    def observe(self) -> list[int]:
        ids = [self.rng.randint(2, 9) for _ in range(self.rng.randint(1, 5))]
        return ids

    def keep(self, ids: list[int]) -> None:
        self.reference += [(token, 0, -1, 0.0) for token in ids]

    def answer(self, request: SampleRequest) -> Event:
        known = [token for token, *_ in self.reference]
        assert request.token_ids.numpy().tolist() == known, "the prefix is every token so far"
        roll = self.rng.random()
        if roll < self.trouble:
            return self.rng.choice(
                [
                    Unanswered(request.request_id, "silence"),
                    Unanswered(request.request_id, "no_responders"),
                    Replied(request.request_id, "p", Behind(version=-1)),
                    Replied(request.request_id, "p", Refused(reason="r", retryable=True)),
                    Replied("stale", "p", Done(sampled=_tokens([(5, 0, -1.0)]), finish="stop")),
                ]
            )
        drawn: list[tuple[int, int, float]] = []
        cut = self.rng.randint(0, 7) if roll < 2 * self.trouble else 99
        while len(drawn) < request.max_new_tokens and len(drawn) < cut:
            if self.rng.random() < 0.2:
                self.version += 1
            token = self.rng.choice([STOP, 2, 3, 4, 5])
            drawn.append((token, self.version, -self.rng.random()))
            if token == STOP:
                break
        finished = bool(drawn) and (drawn[-1][0] == STOP or len(drawn) == request.max_new_tokens)
        self.reference += [(token, 1, version, logprob) for token, version, logprob in drawn]
        sampled = _tokens(drawn)
        pod = self.rng.choice(["p", "q"])
        if finished and cut == 99:
            finish = "stop" if drawn[-1][0] == STOP else "length"
            return Replied(request.request_id, pod, Done(sampled=sampled, finish=finish))
        return Replied(request.request_id, pod, Partial(sampled=sampled, reason="interrupt"))


def _tokens(drawn: list[tuple[int, int, float]]) -> SampledTokens:
    # One span per token, never merged: merging is the episode's business.
    return SampledTokens(
        token_ids=Array.of([token for token, *_ in drawn], "i4"),
        logprobs=Array.of([logprob for *_, logprob in drawn], "f4"),
        spans=tuple(
            Span(version=version, start=i, stop=i + 1) for i, (_, version, _) in enumerate(drawn)
        ),
    )


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), trouble=st.sampled_from([0.0, 0.2, 0.45]))
def test_randomised_interruptions_keep_ids_masks_stamps_and_logprobs_exact(
    seed: int, trouble: float
) -> None:
    world = World(random.Random(seed), trouble)
    episode = Episode(TICKET, "a", LIMITS, (), jitter=lambda: 0.5)
    seen: set[str] = set()
    event: Event = Started()
    asked: SampleRequest | None = None
    answer_start = 0
    answers: list[list[int]] = []
    while True:
        actions = episode.handle(event, 0.0)
        if not actions:  # a stale reply: the request is still open
            assert isinstance(event, Replied)
            assert asked is not None
            event = world.answer(asked)
            continue
        (action,) = actions
        match action:
            case ResetEnv():
                ids = world.observe()
                world.keep(ids)
                answer_start = len(world.reference)
                event = Observed(ids, "digest")
            case Ask(request=request):
                assert request.request_id not in seen, "a retry has a new id"
                seen.add(request.request_id)
                assert request.seed_offset == len(world.reference) - answer_start
                asked = request
                event = world.answer(request)
            case StepEnv(token_ids=token_ids):
                assert token_ids == [token for token, *_ in world.reference[answer_start:]]
                answers.append(token_ids)
                ids = world.observe()
                ends = world.rng.random() < 0.1
                event = Stepped(ids, 0.125, ends, False)
                fits = len(world.reference) + len(ids) < LIMITS.context_tokens
                if not ends and len(answers) < LIMITS.max_turns and fits:
                    world.keep(ids)
                    answer_start = len(world.reference)
            case End(outcome=outcome):
                break
    assert isinstance(outcome, Trajectory)
    (sequence,) = outcome.sequences
    ids, mask, versions, logprobs = map(list, zip(*world.reference, strict=True))
    assert sequence.token_ids.numpy().tolist() == ids
    assert sequence.loss_mask.numpy().tolist() == mask
    stamped = [-1] * len(ids)
    for span in sequence.spans:
        stamped[span.start : span.stop] = [span.version] * (span.stop - span.start)
    assert stamped == versions
    for left, right in zip(sequence.spans, sequence.spans[1:], strict=False):
        assert left.stop < right.start or left.version != right.version, "merged"
    expected = Array.of(logprobs, "f4").data
    assert sequence.arrays["sampler_logprobs"].data == expected
    assert [ids[turn.start : turn.stop] for turn in sequence.turns] == answers
    assert outcome.reward == 0.125 * len(answers)
