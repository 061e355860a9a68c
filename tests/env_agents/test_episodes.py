"""One episode as lists: what happened in, what to do next out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.env_agents.episodes import (
    Ask,
    DeadlinePassed,
    End,
    EnvFailed,
    Episode,
    Limits,
    Observed,
    Replied,
    ResetEnv,
    Started,
    StepEnv,
    Stepped,
    Unanswered,
    turn_seed,
)
from shared.wire.base import Array
from shared.wire.messages import (
    Behind,
    Done,
    Partial,
    Refused,
    SampledTokens,
    TaskRef,
    Ticket,
)
from shared.wire.trajectory import Failure, SamplingParams, Span, Trajectory

STOP = 9
LIMITS = Limits(max_turns=3, context_tokens=32, backoff_s=0.1, backoff_max_s=0.5)
PROMPT = [1, 2, 3]


def make_ticket(**changes: object) -> Ticket:
    return Ticket(
        ticket_id="t1",
        purpose="train",
        group_id="g",
        member=0,
        group_size=8,
        task=TaskRef(dataset="d", split="train", index=0, seed=0),
        issue_version=4,
        min_version=4,
        deadline=1000.0,
        sampling=SamplingParams(max_new_tokens=6, stop_ids=(STOP,)),
        seed=11,
    ).model_copy(update=changes)


def make_episode(limits: Limits = LIMITS, **changes: object) -> Episode:
    return Episode(make_ticket(**changes), "a", limits, (STOP,), jitter=lambda: 1.0)


def tokens(*ids: int, version: int = 4, mixed_kv: bool = False) -> SampledTokens:
    return SampledTokens(
        token_ids=Array.of(list(ids), "i4"),
        logprobs=Array.of([-0.5 * i for i in ids], "f4"),
        spans=(Span(version=version, start=0, stop=len(ids)),) if ids else (),
        mixed_kv=mixed_kv,
    )


def done(*ids: int, version: int = 4, pod: str = "p1", request: str = "a-1") -> Replied:
    return Replied(request, pod, Done(sampled=tokens(*ids, version=version), finish="stop"))


def partial(*ids: int, version: int = 4, pod: str = "p1", request: str = "a-1") -> Replied:
    return Replied(request, pod, Partial(sampled=tokens(*ids, version=version), reason="drain"))


def play(episode: Episode, *events: object, now: float = 10.0) -> list[list[object]]:
    return [list(episode.handle(event, now)) for event in events]  # type: ignore[arg-type]


def begun(episode: Episode) -> Ask:
    """The first request of an episode."""
    first, second = play(episode, Started(), Observed(PROMPT, "digest"))
    assert first == [ResetEnv()]
    (ask,) = second
    assert isinstance(ask, Ask)
    return ask


def the_ask(actions: list[object]) -> Ask:
    (ask,) = actions
    assert isinstance(ask, Ask), ask
    return ask


def the_outcome(actions: list[object]) -> Trajectory | Failure:
    (end,) = actions
    assert isinstance(end, End), end
    return end.outcome


def test_a_two_turn_episode_asks_steps_and_ends_with_a_trajectory() -> None:
    episode = make_episode()
    ask = begun(episode)
    assert ask.pod is None
    assert ask.delay_s == 0
    request = ask.request
    assert request.token_ids.numpy().tolist() == PROMPT
    assert (request.max_new_tokens, request.seed_offset, request.min_version) == (6, 0, 4)
    assert request.seed == turn_seed(11, 0)
    assert request.expires == 1000.0

    assert play(episode, done(5, STOP)) == [[StepEnv([5, STOP])]]
    ask = the_ask(play(episode, Stepped([7, 8], 0.25, False, False))[0])
    assert ask.pod == "p1", "the following turn goes to the pod that holds the prefix"
    assert ask.request.token_ids.numpy().tolist() == [1, 2, 3, 5, STOP, 7, 8]
    assert ask.request.seed == turn_seed(11, 1)

    play(episode, done(6, STOP, version=5, request="a-2"))
    outcome = the_outcome(play(episode, Stepped([7], 1.0, True, False, {"goal": 1.0}), now=14.0)[0])
    assert isinstance(outcome, Trajectory)
    assert (outcome.status, outcome.reward, outcome.rewards) == ("done", 1.25, {"goal": 1.0})
    assert outcome.task_digest == "digest"
    assert outcome.played_s == 4.0
    (sequence,) = outcome.sequences
    assert sequence.token_ids.numpy().tolist() == [1, 2, 3, 5, STOP, 7, 8, 6, STOP]
    assert sequence.loss_mask.numpy().tolist() == [0, 0, 0, 1, 1, 0, 0, 1, 1]
    assert sequence.spans == (Span(version=4, start=3, stop=5), Span(version=5, start=7, stop=9))
    logprobs = sequence.arrays["sampler_logprobs"].numpy().tolist()
    assert logprobs == [0, 0, 0, -2.5, -4.5, 0, 0, -3.0, -4.5]
    first, second = sequence.turns
    assert (first.start, first.stop, first.pods) == (3, 5, ("p1",))
    assert first.rewards == {"reward": 0.25}
    assert second.rewards == {"goal": 1.0, "reward": 1.0}
    assert first.sampling is None


def test_a_partial_turn_is_resumed_anywhere_with_its_tokens_and_the_rest_of_its_budget() -> None:
    episode = make_episode()
    begun(episode)
    ask = the_ask(play(episode, partial(5, 6))[0])
    assert ask.pod is None
    assert ask.delay_s == 0
    assert ask.request.request_id == "a-2"
    assert ask.request.token_ids.numpy().tolist() == [1, 2, 3, 5, 6]
    assert (ask.request.max_new_tokens, ask.request.seed_offset) == (4, 2)
    assert ask.request.seed == turn_seed(11, 0), "the same turn draws from the same seed"
    assert play(episode, done(7, STOP, version=5, pod="p2", request="a-2")) == [
        [StepEnv([5, 6, 7, STOP])]
    ]
    outcome = the_outcome(play(episode, Stepped([], 0.0, True, False))[0])
    assert isinstance(outcome, Trajectory)
    sequence = outcome.sequences[0]
    assert sequence.spans == (Span(version=4, start=3, stop=5), Span(version=5, start=5, stop=7))
    assert sequence.turns[0].pods == ("p1", "p2")
    assert episode.num_resumed == 1
    assert episode.num_retries == 0


def test_a_resumed_turn_under_the_same_version_is_one_span() -> None:
    episode = make_episode()
    begun(episode)
    play(episode, partial(5, 6), done(STOP, request="a-2"))
    outcome = the_outcome(play(episode, Stepped([], 0.0, True, False))[0])
    assert isinstance(outcome, Trajectory)
    assert outcome.sequences[0].spans == (Span(version=4, start=3, stop=6),)


def test_tokens_over_an_old_cache_are_marked_mixed() -> None:
    episode = make_episode()
    begun(episode)
    mixed = Done(sampled=tokens(5, STOP, mixed_kv=True), finish="stop")
    play(episode, Replied("a-1", "p1", mixed))
    outcome = the_outcome(play(episode, Stepped([], 0.0, True, False))[0])
    assert isinstance(outcome, Trajectory)
    assert outcome.sequences[0].mixed_kv == (Span(version=4, start=3, stop=5),)


@pytest.mark.parametrize(("ids", "finish"), [((5, STOP), "stop"), ((5, 5, 5, 5, 5, 5), "length")])
def test_a_partial_turn_with_nothing_left_to_sample_is_complete(
    ids: tuple[int, ...], finish: str
) -> None:
    episode = make_episode()
    begun(episode)
    assert play(episode, partial(*ids)) == [[StepEnv(list(ids))]]
    outcome = the_outcome(play(episode, Stepped([], 0.0, True, False))[0])
    assert isinstance(outcome, Trajectory)
    assert outcome.sequences[0].turns[0].finish == finish


@pytest.mark.parametrize(
    "setback",
    [
        Replied("a-1", "p1", Behind(version=3)),
        Replied("a-1", "p1", Refused(reason="draining", retryable=True)),
        Replied("a-1", "p1", Partial(sampled=tokens(), reason="drain")),
        Replied("a-1", "p1", Done(sampled=tokens(), finish="stop")),
        done(*range(7)),
        done(5, STOP, version=3),
        Unanswered("a-1", "no_responders"),
    ],
)
def test_what_nobody_can_serve_now_is_asked_again_after_a_growing_back_off(
    setback: Replied,
) -> None:
    episode = make_episode()
    begun(episode)
    delays: list[float] = []
    for number in range(1, 6):
        ask = the_ask(play(episode, replace(setback, request_id=f"a-{number}"))[0])
        assert ask.pod is None
        assert ask.request.request_id == f"a-{number + 1}"
        assert ask.request.token_ids.numpy().tolist() == PROMPT
        delays.append(ask.delay_s)
    assert delays == [0.1, 0.2, 0.4, 0.5, 0.5]
    assert episode.num_retries == 5


def test_jitter_spreads_the_back_off_down_to_half() -> None:
    episode = Episode(make_ticket(), "a", LIMITS, (STOP,), jitter=lambda: 0.0)
    begun(episode)
    ask = the_ask(play(episode, Unanswered("a-1", "no_responders"))[0])
    assert ask.delay_s == pytest.approx(0.05)


def test_a_silent_pod_has_already_cost_time_so_the_group_is_asked_at_once() -> None:
    episode = make_episode()
    begun(episode)
    ask = the_ask(play(episode, Unanswered("a-1", "silence"))[0])
    assert (ask.pod, ask.delay_s) == (None, 0.0)


@pytest.mark.parametrize(
    "setback",
    [
        Unanswered("a-2", "no_responders"),
        Unanswered("a-2", "silence"),
        Replied("a-2", "p1", Behind(version=3)),
        Replied("a-2", "p1", Refused(reason="draining", retryable=True)),
    ],
)
def test_the_group_is_asked_at_once_when_only_the_pod_of_the_prefix_cannot(
    setback: Replied | Unanswered,
) -> None:
    episode = make_episode()
    begun(episode)
    play(episode, done(5, STOP))
    assert the_ask(play(episode, Stepped([7], 0.0, False, False))[0]).pod == "p1"
    ask = the_ask(play(episode, setback)[0])
    assert (ask.pod, ask.delay_s) == (None, 0.0)
    play(episode, done(5, STOP, pod="p2", request="a-3"))
    assert the_ask(play(episode, Stepped([7], 0.0, False, False))[0]).pod == "p2"


def test_replies_to_other_requests_are_ignored() -> None:
    episode = make_episode()
    begun(episode)
    the_ask(play(episode, Unanswered("a-1", "silence"))[0])
    assert play(episode, done(5, STOP), Unanswered("a-1", "silence")) == [[], []]
    assert play(episode, done(6, STOP, request="a-2")) == [[StepEnv([6, STOP])]]
    assert play(episode, done(6, STOP, request="a-2")) == [[]], "a duplicate"


def test_a_request_that_can_never_be_served_fails_the_episode() -> None:
    episode = make_episode()
    begun(episode)
    outcome = the_outcome(play(episode, Replied("a-1", "p1", Refused(reason="too long")))[0])
    assert outcome == Failure(reason="sample_refused", detail="p1: too long")


@pytest.mark.parametrize("reason", ["env_error", "env_timeout", "env_lost"])
def test_a_failing_environment_fails_the_episode_in_reset_and_in_step(reason: str) -> None:
    failed = EnvFailed(reason, "boom")  # type: ignore[arg-type]
    episode = make_episode()
    play(episode, Started())
    assert play(episode, failed) == [[End(Failure(reason=reason, detail="boom"))]]  # type: ignore[arg-type]
    episode = make_episode()
    begun(episode)
    assert play(episode, failed) == [[]], "nobody asked the environment anything"
    play(episode, done(5, STOP))
    assert play(episode, failed) == [[End(Failure(reason=reason, detail="boom"))]]  # type: ignore[arg-type]


def test_a_ticket_past_its_deadline_is_never_started() -> None:
    (actions,) = play(make_episode(), Started(), now=1000.0)
    outcome = the_outcome(actions)
    assert isinstance(outcome, Failure)
    assert outcome.reason == "deadline"


def test_the_deadline_names_what_was_waited_for() -> None:
    episode = make_episode()
    begun(episode)
    outcome = the_outcome(play(episode, DeadlinePassed())[0])
    assert outcome == Failure(reason="deadline", detail="after 0 turns, waiting for a rollout")
    assert play(episode, DeadlinePassed(), done(5, STOP)) == [[], []], "it ends once"


def test_a_deadline_while_no_rollout_serves_is_a_sample_timeout() -> None:
    episode = make_episode()
    begun(episode)
    play(episode, Replied("a-1", "p1", Behind(version=3)))
    outcome = the_outcome(play(episode, DeadlinePassed())[0])
    assert outcome == Failure(
        reason="sample_timeout", detail="no rollout served it: p1 is at version 3"
    )


def test_a_prompt_that_leaves_no_room_is_too_long() -> None:
    episode = make_episode(replace(LIMITS, context_tokens=3))
    play(episode, Started())
    outcome = the_outcome(play(episode, Observed(PROMPT, "d"))[0])
    assert isinstance(outcome, Failure)
    assert outcome.reason == "too_long"


def test_the_last_turn_asks_only_for_what_fits_the_context() -> None:
    episode = make_episode(replace(LIMITS, context_tokens=7))
    assert begun(episode).request.max_new_tokens == 4


def test_an_observation_that_leaves_no_room_truncates_with_the_reward_so_far() -> None:
    episode = make_episode(replace(LIMITS, context_tokens=7))
    begun(episode)
    play(episode, done(5, STOP))
    outcome = the_outcome(play(episode, Stepped([7, 7], 0.5, False, False))[0])
    assert isinstance(outcome, Trajectory)
    assert (outcome.status, outcome.reward) == ("truncated", 0.5)
    assert outcome.sequences[0].token_ids.shape == (5,), "without the observation nobody read"


@pytest.mark.parametrize("truncated_by_env", [True, False])
def test_limits_of_environment_and_run_truncate_with_a_real_reward(truncated_by_env: bool) -> None:
    episode = make_episode(replace(LIMITS, max_turns=10 if truncated_by_env else 1))
    begun(episode)
    play(episode, done(5, STOP))
    outcome = the_outcome(play(episode, Stepped([7], 0.5, False, truncated_by_env))[0])
    assert isinstance(outcome, Trajectory)
    assert (outcome.status, outcome.reward) == ("truncated", 0.5)


def test_stop_ids_come_from_the_renderer_where_the_ticket_has_none_and_are_recorded() -> None:
    episode = make_episode(sampling=SamplingParams(max_new_tokens=6))
    assert begun(episode).request.sampling.stop_ids == (STOP,)
    play(episode, done(5, STOP))
    outcome = the_outcome(play(episode, Stepped([], 0.0, True, False))[0])
    assert isinstance(outcome, Trajectory)
    sampling = outcome.sequences[0].turns[0].sampling
    assert sampling is not None
    assert sampling.stop_ids == (STOP,)


def test_turn_seeds_differ_by_ticket_and_turn_and_fit_63_bits() -> None:
    seeds = {turn_seed(ticket, turn) for ticket in range(50) for turn in range(10)}
    assert len(seeds) == 500
    assert all(0 <= seed < 2**63 for seed in seeds)
