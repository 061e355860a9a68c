"""Ids sampled = ids trained, held against transformers' `apply_chat_template`, any number of times.

    python -m tests.env_agents.chat.fidelity --count 10000

Each conversation goes through the real state machine and the real renderer; only the environment
and the rollout are played by a random generator. At every request, the tokens that the policy did
not sample must be, one by one, those of `apply_chat_template` outside the assistant's answers; and
in the end the loss mask must be 1 on exactly the ids that were sampled, at their places.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from typing import Any

from services.env_agents.chat.conversation import ChatConversation
from services.env_agents.environment import Observation
from services.env_agents.episode_events import Ask, Observed, Replied, Started, StepEnv, Stepped
from services.env_agents.episodes import Episode, Limits
from shared.wire.base import Array
from shared.wire.messages import Done, SampledTokens, TaskRef, Ticket
from shared.wire.trajectory import SamplingParams, Span, Trajectory
from tests.env_agents.chat.conversations import (
    FAMILIES,
    Meaning,
    meaning,
    reference,
    renderer,
    sampled_ids,
    sentence,
    tools,
    written,
)

LIMITS = Limits(max_turns=99, context_tokens=32768, backoff_s=0.1, backoff_max_s=1.0)
TICKET = Ticket(
    ticket_id="t", purpose="train", group_id="g", member=0, group_size=1,
    task=TaskRef(dataset="d", split="train", index=0, seed=0),
    issue_version=0, min_version=0, deadline=1e12,
    sampling=SamplingParams(max_new_tokens=4096), seed=0,
)  # fmt: skip


class Check:
    """One conversation."""

    def __init__(self, family: str, seed: int) -> None:
        self.family = family
        self.rng = random.Random(f"{family}/{seed}")
        self.counts: Counter[str] = Counter()
        self.messages: list[dict[str, Any]] = []
        """As the reference is told them: meanings, never what was parsed."""
        self.tools = tools(self.rng) if self.rng.random() < 0.8 else ()
        self.answers: list[tuple[int, int, list[int]]] = []
        """Sequence, position, ids."""
        self.as_the_template: list[bool] = []
        """Whether the ids are those that the template's text has, stop token included."""
        self.begun_with = 0
        """Tokens of the current sequence that came as its prompt."""
        self.sequence = 0
        self.unstopped: set[int] = set()
        """Positions of stop tokens that the policy did not write, in the current sequence."""
        self.num_calls = 0

    def play(self) -> Counter[str]:
        episode = Episode(TICKET, "a", LIMITS, renderer(self.family).stop_ids, lambda: 0.0)
        conversation = renderer(self.family).conversation()
        if self.rng.random() < 0.5:
            self.messages.append({"role": "system", "content": sentence(self.rng)})
        self.messages.append({"role": "user", "content": sentence(self.rng)})
        first = Observation(messages=tuple(self.messages), tools=self.tools)
        episode.handle(Started(), 0.0)
        ids = conversation.begin(first)
        self.begun_with = len(ids)
        (action,) = episode.handle(Observed(ids, "digest"), 0.0)
        for _ in range(self.rng.randint(1, 4)):
            assert isinstance(action, Ask)
            self.check_request(action)
            action = self.turn(episode, conversation, action)
        assert isinstance(action, Ask)
        self.check_request(action)
        (step,) = episode.handle(self.reply(action, *self.answer()), 0.0)
        assert isinstance(step, StepEnv)
        (end,) = episode.handle(Stepped([], 1.0, terminated=True, truncated=False), 0.0)
        self.check_trajectory(end.outcome)  # type: ignore[union-attr]
        self.counts["conversations"] += 1
        return self.counts

    # --- the policy
    def answer(self) -> tuple[Meaning, list[int]]:
        canonical = self.rng.random() < 0.4
        meant = meaning(self.family, self.rng, self.num_calls)
        if self.family == "mistral" and not self.tools:
            meant.calls, meant.content = [], meant.content or "yes"
        self.num_calls += len(meant.calls)
        text = written(self.family, meant, self.rng, canonical=canonical)
        ids = sampled_ids(self.family, text, self.rng, canonical=canonical)
        self.counts["canonical" if canonical else "cut or spelt otherwise"] += 1
        if self.rng.random() < 0.9:
            stops = renderer(self.family).stop_ids
            own = renderer(self.family).tokenizer.encode(reference(self.family).eos_token)
            ids.append(own[0] if canonical else self.rng.choice(stops))
            self.as_the_template.append(canonical)
        else:
            self.as_the_template.append(False)
        return meant, ids

    def reply(self, ask: Ask, meant: Meaning, ids: list[int]) -> Replied:
        del meant
        stops = ids[-1] in renderer(self.family).stop_ids
        self.answers.append((self.sequence, ask.request.token_ids.shape[0], ids))
        self.counts["answers"] += 1
        self.counts["sampled tokens"] += len(ids)
        sampled = SampledTokens(
            token_ids=Array.of(ids, "i4"),
            logprobs=Array.of([-0.5] * len(ids), "f4"),
            spans=(Span(version=3, start=0, stop=len(ids)),),
        )
        done = Done(sampled=sampled, finish="stop" if stops else "length")
        return Replied(ask.request.request_id, "pod", done)

    def turn(self, episode: Episode, conversation: ChatConversation, ask: Ask) -> Any:
        meant, ids = self.answer()
        (step,) = episode.handle(self.reply(ask, meant, ids), 0.0)
        assert isinstance(step, StepEnv)
        assert step.token_ids == ids
        conversation.read(step.token_ids)
        length = ask.request.token_ids.shape[0] + len(ids)
        self.messages.append(meant.message())
        new: list[dict[str, Any]] = [
            {"role": "tool", "tool_call_id": call_id, "content": sentence(self.rng)}
            for _, _, call_id in meant.calls
        ]
        if not new or self.rng.random() < 0.15:
            new.append({"role": "user", "content": sentence(self.rng)})
        self.messages += new
        observation = self.observation(new, meant)
        read = conversation.follow(observation)
        if read.rewrites:
            self.counts["rewritten histories"] += 1
            self.sequence += 1
            self.begun_with, self.unstopped = len(read.token_ids), set()
        elif ids[-1] not in renderer(self.family).stop_ids:
            self.counts["answers without a stop"] += 1
            self.unstopped.add(length)
        stepped = Stepped(read.token_ids, 0.0, False, False, rewrites=read.rewrites)
        (action,) = episode.handle(stepped, 0.0)
        return action

    def observation(self, new: list[dict[str, Any]], meant: Meaning) -> Observation:
        if self.rng.random() < 0.5:
            return Observation(messages=tuple(new))
        # As an agent sends it: everything again, answers as they came out of the server.
        history = self.messages[: -len(new) - 1]
        echoed = [{k: v for k, v in m.items() if k != "reasoning_content"} for m in history] + [
            meant.message(echo=True),
            *new,
        ]
        self.counts["histories sent whole"] += 1
        return Observation(messages=tuple(echoed), tools=self.tools, whole=True)

    # --- the reference
    def check_request(self, ask: Ask) -> None:
        ids = ask.request.token_ids.numpy().tolist()
        rendered = reference(self.family).apply_chat_template(
            self.messages,
            tools=list(self.tools) or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            date_string="02 Jan 2026",
        )
        expected, answered = rendered["input_ids"], rendered["assistant_masks"]
        start = self.begun_with
        assert ids[:start] == expected[:start], "the prompt is the template's"
        ours = set(self.answer_positions(ids))
        context = [
            token
            for position, token in enumerate(ids)
            if position >= start and position not in ours and position not in self.unstopped
        ]
        theirs = [t for t, a in zip(expected[start:], answered[start:], strict=True) if not a]
        assert context == theirs, "glue is the template's, token for token"
        self.check_answers(expected, answered)
        self.counts["requests"] += 1
        self.counts["context tokens"] += len(context) + start

    def check_answers(self, expected: list[int], answered: list[int]) -> None:
        """What the template writes for earlier answers is what was sampled."""
        runs: list[list[int]] = []
        for position in range(self.begun_with, len(expected)):
            if not answered[position]:
                continue
            if position == self.begun_with or not answered[position - 1]:
                runs.append([])
            runs[-1].append(expected[position])
        ours = [
            (ids, exact)
            for (s, _, ids), exact in zip(self.answers, self.as_the_template, strict=True)
            if s == self.sequence
        ]
        tokenizer = renderer(self.family).tokenizer
        for (ids, exact), written_ids in zip(ours, runs, strict=True):
            if exact:
                assert ids == written_ids, "the history holds what was sampled"
                self.counts["answers equal to the template's, token for token"] += 1
            texts = tokenizer.decode(ids), tokenizer.decode(written_ids)
            thinks = ["</think>" in text for text in texts]
            assert thinks[0] == thinks[1], "the history holds what was sampled"

    def answer_positions(self, ids: list[int]) -> list[int]:
        """Positions of the current sequence's answers, each of which stands as it was sampled."""
        found: list[int] = []
        for sequence, position, answer in self.answers:
            if sequence == self.sequence:
                assert ids[position : position + len(answer)] == answer
                found += range(position, position + len(answer))
        return found

    def check_trajectory(self, outcome: object) -> None:
        assert isinstance(outcome, Trajectory)
        assert len(outcome.sequences) == self.sequence + 1
        for index, sequence in enumerate(outcome.sequences):
            assert sequence.parent == (index - 1 if index else None)
            mask = sequence.loss_mask.numpy().astype(bool)
            trained = sequence.token_ids.numpy()[mask].tolist()
            sampled = [i for s, _, answer in self.answers if s == index for i in answer]
            assert trained == sampled, "ids trained are the ids sampled"
            turns = [(start, a) for s, start, a in self.answers if s == index]
            for turn, (start, answer) in zip(sequence.turns, turns, strict=True):
                assert turn.start == start
                assert sequence.token_ids.numpy()[turn.start : turn.stop].tolist() == answer
                assert mask[turn.start : turn.stop].all()
            self.counts["trained tokens"] += len(trained)
        self.counts["sequences"] += len(outcome.sequences)


def run(count: int, first: int = 0) -> Counter[str]:
    """Play `count` conversations over all families."""
    total: Counter[str] = Counter()
    for number in range(first, first + count):
        total += Check(FAMILIES[number % len(FAMILIES)], number).play()
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    started = time.perf_counter()
    for name, value in run(arguments.count).items():
        print(f"{value:>10,}  {name}")
    print(f"0 re-tokenised answers, all masks exact; {time.perf_counter() - started:.0f} s")
    sys.exit(0)
