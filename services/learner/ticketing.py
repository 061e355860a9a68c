"""Which tickets to write: numbers, seeds and contents. Pure."""

from __future__ import annotations

import hashlib

from services.learner.journal import JournalState, evaluation_group
from services.learner.task_source import TaskSource
from shared.runtime.sections import CommonConfig
from shared.wire.messages import TaskRef, Ticket


def training_groups(
    num_groups: int,
    state: JournalState,
    source: TaskSource,
    config: CommonConfig,
    *,
    version: int,
    now: float,
) -> tuple[Ticket, ...]:
    """Deal `num_groups` tasks and return their tickets, numbered on from the journal's count."""
    size = config.admission.group_size
    tickets: list[Ticket] = []
    for group in range(num_groups):
        task = source.next_train()
        group_id = f"g{state.num_train_groups + group:06d}"
        for member in range(size):
            number = state.num_train_tickets + group * size + member
            tickets.append(
                Ticket(
                    ticket_id=f"t{number:07d}",
                    purpose="train",
                    group_id=group_id,
                    member=member,
                    group_size=size,
                    task=task,
                    issue_version=version,
                    min_version=version,
                    deadline=now + config.admission.ticket_deadline_s,
                    sampling=config.sampling.params(),
                    seed=derive_seed(config.run.seed, "train", number),
                    model_id=config.model.model_id,
                )
            )
    return tuple(tickets)


def evaluation_tickets(
    name: str,
    tasks: tuple[TaskRef, ...],
    state: JournalState,
    config: CommonConfig,
    *,
    version: int,
    deadline: float,
    samples: int = 1,
) -> tuple[Ticket, ...]:
    """Return `samples` tickets per held-out task; the group id names the evaluation."""
    played = [(task, sample) for task in tasks for sample in range(samples)]
    return tuple(
        Ticket(
            ticket_id=f"e{state.num_eval_tickets + index:07d}",
            purpose="eval",
            group_id=evaluation_group(name, version),
            member=index,
            group_size=len(played),
            task=task,
            issue_version=version,
            min_version=version,
            deadline=deadline,
            sampling=config.sampling.params(),
            # Equal for equal tasks in every evaluation: differences are the policy's.
            seed=derive_seed(config.run.seed, f"eval{sample or ''}", task.index),
            model_id=config.model.model_id,
        )
        for index, (task, sample) in enumerate(played)
    )


def derive_seed(run_seed: int, purpose: str, number: int) -> int:
    """Return a 62-bit seed, independent for every (run, purpose, number)."""
    digest = hashlib.blake2b(f"{run_seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
