"""Training again, offline: the learner's own take-over on a bus in memory that holds the archive.

Every journalled batch is executed by the code that executed it then, on the records it names, and
published into memory; nothing is decided again. Where the configuration changed, the learner stops
with a checkpoint and a second one resumes from it, as in the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from services.learner.building import load_backend, make_inputs, meet_ranks
from services.learner.config import LearnerConfig
from services.learner.desk import Desk
from services.learner.journal_log import JournalLog
from services.learner.learner import Learner
from services.learner.positions import Positions
from services.learner.publication import Publication, Slack
from services.learner.takeover import state_digest
from shared.backends.ranks import Ranks
from shared.runtime.bus import Record
from shared.runtime.context import Context
from shared.runtime.errors import ConfigError
from shared.runtime.leases import LeaseBoard
from shared.runtime.logs import Log
from shared.runtime.memory_bus import MemoryBus
from shared.runtime.memory_server import MemoryServer
from shared.runtime.sections import TaskSection
from shared.weights.assembly import make_publisher
from shared.weights.publisher import Publisher
from shared.wire.codec import encode
from shared.wire.messages import TaskRef
from shared.wire.subjects import StreamName, Subjects
from shared.wire.weights import Control

_UNBOUNDED = 1 << 62
OnVersion = Callable[[int, str], bool]
"""Takes a version and the digest of its bytes; False ends the replay."""
Meet = Callable[[LearnerConfig], Ranks]


@dataclass(frozen=True)
class Stretch:
    """A configuration and the newest version that is made under it."""

    config: LearnerConfig
    stop: int


class Replay:
    """One run in memory.

    Args:
        run: its name.
        records: by stream, ascending: journal, terminals, scores; with the manifests up to a
            checkpoint's version the replay begins there.
        folder: an empty one, for checkpoints; a checkpoint to begin from lies in it.
        meet: gives the ranks that compute, this process the first of them.
    """

    def __init__(
        self,
        run: str,
        records: Mapping[StreamName, Sequence[Record]],
        folder: Path,
        meet: Meet = meet_ranks,
    ) -> None:
        self._subjects = Subjects(run)
        self._server = MemoryServer(max_stream_bytes=_UNBOUNDED)
        self._records = records
        self._folder = folder
        self._meet = meet

    async def run(
        self, stretches: Sequence[Stretch], on_version: OnVersion, *, more: bool = False
    ) -> None:
        """Make the versions of all stretches again, as far as the journal goes.

        Args:
            stretches: in order.
            on_version: told each version.
            more: leave a checkpoint of the last version in the folder.

        Raises:
            ConfigError: the model is not the one the run began with.
            Fatal: a batch cannot be executed.
        """
        for number, stretch in enumerate(stretches):
            bus = MemoryBus(self._subjects, self._server)
            await bus.create_streams()
            if not number:
                self._restore()
            last = number == len(stretches) - 1 and not more
            if not await self._stretch(bus, stretch, number, on_version, last=last):
                return

    def _restore(self) -> None:
        for name, records in self._records.items():
            for record in records:
                self._server.restore(self._subjects.stream(name), record)

    async def _stretch(
        self, bus: MemoryBus, stretch: Stretch, number: int, on_version: OnVersion, *, last: bool
    ) -> bool:
        config = _offline(stretch.config, self._folder)
        context = Context("learner", "replay", f"replay-{number}", bus, Log("replay", "replay"))
        ranks = self._meet(config)
        backend = load_backend(config, ranks)
        make_scorer = partial(load_backend, config, ranks, trains=False)
        if not number and "manifests" not in self._records:
            await _check_model(bus, config, state_digest(backend))
        positions = Positions(bus)
        inputs = make_inputs(context, config, backend, positions, make_scorer)
        journal = JournalLog(bus)
        publisher = make_publisher(
            config.weights, bus, context.log, model_id=config.model.model_id, producer="replay"
        )
        publication = Publication(
            context,
            backend,
            publisher,
            LeaseBoard(bus, config.telemetry.lease_expiry_s),
            Slack(config.admission.sync_slack, config.learner.sync_wait_s),
            vocab_size=backend.vocab_size,
            context_tokens=config.sampling.context_tokens,
        )
        desk = Desk(
            context,
            config,
            journal,
            _NoTasks(config.task, config.run.seed),
            needs_scores=inputs.route.waits_for_scores,
        )
        learner = Learner(context, config, backend, desk, journal, publication, inputs, positions)
        try:
            await learner.begin()
            if not on_version(learner.version, publication.head_digest):
                return False
            while learner.version < stretch.stop and await learner.execute_again():
                if not on_version(learner.version, publication.head_digest):
                    return False
                await _tidy(bus, publisher, learner.version, config.admission.max_staleness)
            if not last:
                await learner.finish()
            return True
        finally:
            learner.close()
            await inputs.close()


class _NoTasks:
    """Stands for the task source: nothing is issued."""

    def __init__(self, section: TaskSection, seed: int) -> None:
        del section, seed

    def next_train(self) -> TaskRef:
        raise AssertionError("a replay issues nothing")

    def evaluation(self, num_tasks: int) -> tuple[TaskRef, ...]:
        raise AssertionError("a replay evaluates nothing")

    def cursor(self) -> dict[str, Any]:
        return {}

    def restore(self, cursor: dict[str, Any]) -> None:
        del cursor


def _offline(config: LearnerConfig, folder: Path) -> LearnerConfig:
    """Return the configuration without what reaches outside, or only looks on."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(folder)}),
            "weights": config.weights.model_copy(update={"keyframe_store": ""}),
            "old_logprobs": config.old_logprobs.model_copy(update={"shadow": ()}),
        }
    )


async def _check_model(bus: MemoryBus, config: LearnerConfig, digest: str) -> None:
    journal = JournalLog(bus)
    await journal.replay()
    run = journal.state.run
    if run is not None and run.model_digest != digest:
        raise ConfigError(
            f"model.source {config.model.source} is not the model that this run began with: "
            "name its directory with --set model.source=DIR"
        )


async def _tidy(bus: MemoryBus, publisher: Publisher, version: int, max_staleness: int) -> None:
    """Keep in memory only versions that a token may still be of."""
    oldest = max(0, version - max_staleness)
    if publisher.keyframe_due:
        await publisher.publish_keyframe(reason="due")
    await publisher.purge_below(oldest)
    control = Control(
        phase="running", head_version=version, oldest_needed=oldest, updated_at=time.time()
    )
    await bus.put_control("control", encode(control))
