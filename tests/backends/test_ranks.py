"""What leader and followers make of commands: plain backends in threads, no process group."""

import pickle
import queue
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.algo.batching import PackedBatch, hollow, pack, share
from shared.backends.base import Backend
from shared.backends.building import BackendSpec, build, device_of
from shared.backends.expert_layers import ExpertLayers
from shared.backends.hf_files import check_given
from shared.backends.led_backend import LedBackend
from shared.backends.rank_codec import ArrivingState, dumps, loads
from shared.backends.rank_commands import Command, Part, RanksFailed, joined, share_of
from shared.backends.rank_ends import Address
from shared.backends.rank_follower import Follower
from shared.backends.rank_lines import FollowerLine, LeaderLines
from shared.backends.rank_world import World
from shared.backends.ranks import Leader
from shared.backends.routing import ROUTING


class Queued:
    """Tensors through queues, one for each follower."""

    def __init__(self, num: int) -> None:
        self.queues: list[queue.Queue[torch.Tensor]] = [queue.Queue() for _ in range(num)]

    def send(self, tensor: torch.Tensor) -> None:
        for one in self.queues:
            one.put(tensor.clone())

    def at(self, follower: int) -> "Receiving":
        return Receiving(self.queues[follower])


class Receiving:
    def __init__(self, tensors: queue.Queue[torch.Tensor]) -> None:
        self._tensors = tensors

    def send(self, tensor: torch.Tensor) -> None:
        raise AssertionError

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = self._tensors.get(timeout=5)
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        return tensor


class Noting:
    """A loss that notes the first token of every micro-batch."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, output: Any, batch: PackedBatch) -> torch.Tensor:
        self.seen.append(int(batch.token_ids_T[0]))
        return torch.tensor(float(batch.token_ids_T[0]))

    def collected(self) -> list[int]:
        return list(self.seen)

    def merge(self, entries: Any) -> None:
        self.seen = list(entries)


@dataclass
class Shard:
    """A backend that remembers what it was told; `share` and `last` as in a layout."""

    share: int
    shares: int
    last: bool = True
    fails: Exception | None = None
    told: list[Any] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    name: str = "fake"
    dtype: torch.dtype = torch.float32
    vocab_size: int = 100

    @property
    def data_rank(self) -> int:
        return self.share

    @property
    def data_ranks(self) -> int:
        return self.shares

    def stream(self) -> Any:
        yield from self.weights.items()

    def load_state(self, state: Any) -> None:
        check_given(state, {n: (tuple(t.shape), t.dtype) for n, t in self.weights.items()})
        self.weights = {name: state[name].clone() for name in reversed(list(self.weights))}

    def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
        self.told.append(("score", batch.num_tokens, temperature))
        return batch.token_ids_T.float() * temperature

    def accumulate(self, batches: Any, loss_fn: Any, **_: Any) -> float:
        if not self.last:
            return 0.0
        return sum(float(loss_fn(None, batch)) for batch in batches)

    def step(self, lr: float, *, max_grad_norm: float) -> float:
        if self.fails:
            raise self.fails
        self.told.append(("step", lr))
        return 1.5


class Job:
    """One leader and its followers."""

    def __init__(self, *shards: Shard, timeout_s: float = 5.0) -> None:
        num = len(shards) - 1
        self.shards, path = shards, Queued(num)
        self.lines = LeaderLines(num, host="127.0.0.1", timeout_s=timeout_s)
        address = Address("127.0.0.1", self.lines.port, self.lines.token)
        accepting = threading.Thread(target=self.lines.accept)
        accepting.start()
        self.threads: list[threading.Thread] = []
        for rank, shard in enumerate(shards[1:], start=1):
            line = FollowerLine(rank, address, timeout_s=timeout_s, leave=lambda _: None)
            follower = Follower(line, path.at(rank - 1), lambda _, shard=shard: shard)  # type: ignore[arg-type,return-value]
            self.threads.append(
                threading.Thread(target=self._follow, args=(follower, line), daemon=True)
            )
            self.threads[-1].start()
        accepting.join(5)
        self.leader = Leader(self.lines, path, lambda _: shards[0], timeout_s=timeout_s)  # type: ignore[arg-type,return-value]
        backend = self.leader.build(BackendSpec(source=None))  # type: ignore[arg-type]
        assert isinstance(backend, LedBackend)
        self.backend = backend

    def _follow(self, follower: Follower, line: FollowerLine) -> None:
        try:
            follower.run()
        except Exception:
            line._end.cut()  # as the end of the process would

    def close(self) -> None:
        self.leader.close()
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive()


def micro(first: int, tokens: int = 3) -> PackedBatch:
    return pack([np.arange(first, first + tokens)], {"loss_mask": [np.ones(tokens, dtype=bool)]})


def options() -> dict[str, Any]:
    return {"temperature": 1.0, "with_entropy": False}


# --- shares
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_interleaved_shares_give_every_rank_its_own_packs(ranks: int):
    shares = share([9, 8, 7, 6, 5, 4], 9, ranks)
    packs = [one for step in zip(*shares, strict=True) for one in step]
    for rank in range(ranks):
        assert share_of(packs, rank, ranks) == shares[rank]


def test_micro_batches_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="3 micro-batches for 2 data-parallel ranks"):
        share_of([1, 2, 3], 0, 2)


def test_a_hollow_pack_is_one_token_without_loss_of_the_same_tensors():
    batch = pack(
        [np.array([7, 8])], {"loss_mask": [np.array([True, True])], "versions": [np.array([3, 4])]}
    )
    empty = hollow(batch)
    assert empty.num_tokens == 1
    assert empty.per_token.keys() == batch.per_token.keys()
    assert {n: t.dtype for n, t in empty.per_token.items()} == {
        n: t.dtype for n, t in batch.per_token.items()
    }
    assert not empty.per_token["loss_mask"].any()
    assert batch.per_token["loss_mask"].all()


def test_entries_are_joined_in_the_order_of_the_micro_batches():
    parts = [Part(0, 1.0, ["a0", "a1"]), Part(1, 2.0, ["b0", "b1"])]
    assert joined(parts, 2) == (3.0, ["a0", "b0", "a1", "b1"])
    assert joined(parts[::-1], 2) == (3.0, ["a0", "b0", "a1", "b1"])


def test_of_one_share_the_stage_that_saw_the_loss_speaks_once():
    first, last, twin = Part(0, 0.0, []), Part(0, 4.0, ["x"]), Part(0, 4.0, ["y"])
    assert joined([first, last, twin], 1) == (4.0, ["x"])


# --- commands
def test_every_rank_trains_its_share_and_the_loss_sees_all_of_them_in_order():
    job = Job(Shard(0, 3), Shard(1, 3), Shard(2, 3))
    loss = Noting()
    total = job.backend.accumulate([micro(n) for n in (10, 20, 30, 40, 50, 60)], loss, **options())
    assert loss.seen == [10, 20, 30, 40, 50, 60]
    assert total == 210.0
    # a second call adds to what was noted
    job.backend.accumulate([micro(n) for n in (1, 2, 3)], loss, **options())
    assert loss.seen == [10, 20, 30, 40, 50, 60, 1, 2, 3]
    job.close()


def test_of_a_pipeline_what_the_last_stage_noted_comes_back():
    job = Job(Shard(0, 1, last=False), Shard(0, 1))
    loss = Noting()
    assert job.backend.accumulate([micro(5), micro(6)], loss, **options()) == 11.0
    assert loss.seen == [5, 6]
    job.close()


def test_one_micro_batch_goes_to_one_share_and_the_others_forward_without_tokens():
    job = Job(Shard(0, 2), Shard(1, 2))
    loss = Noting()
    job.backend.forward_backward(micro(8), loss, **options())
    assert loss.seen == [8, 8]  # the hollow pack's first token is that of the pack
    job.close()


def test_large_tensors_travel_beside_the_command_and_arrive_whole():
    job = Job(Shard(0, 1), Shard(0, 1), Shard(0, 1))
    batch = micro(0, tokens=5000)
    got = job.backend.score(batch, temperature=0.5)
    assert torch.equal(got, batch.token_ids_T * 0.5)
    job.close()
    assert [shard.told for shard in job.shards] == [[("score", 5000, 0.5)]] * 3


@pytest.mark.parametrize("lengths", [(4, 9, 2, 7, 1), (3,), (5, 5)])
@pytest.mark.parametrize("shares", [1, 2, 3])
def test_every_share_scores_its_sequences_and_the_pack_is_whole_again(
    lengths: tuple[int, ...], shares: int
):
    job = Job(*(Shard(share_, shares) for share_ in range(shares)), Shard(0, shares))
    ids = np.arange(sum(lengths))
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    batch = pack(parts, {"loss_mask": [np.ones(len(part), dtype=bool) for part in parts]})
    assert torch.equal(job.backend.score(batch, temperature=2.0), batch.token_ids_T * 2.0)
    job.close()
    assert all(shard.told[0][0] == "score" for shard in job.shards)  # ranks work in lockstep
    if len(lengths) > 1 and shares > 1:
        assert max(shard.told[0][1] for shard in job.shards) < sum(lengths)


ROUTERS = ExpertLayers(layers=3, per_token=2, experts=9)


@dataclass
class Routed(Shard):
    """Scores a token by the experts that came with it."""

    expert_layers: ExpertLayers = ROUTERS

    def score(self, batch: PackedBatch, *, temperature: float) -> torch.Tensor:
        self.told.append(("score", batch.num_tokens, temperature))
        weights_LK = torch.tensor([[1.0, 10.0], [1e2, 1e3], [1e4, 1e5]])
        return (batch.per_token[ROUTING] * weights_LK).sum((1, 2))

    def accumulate(self, batches: Any, loss_fn: Any, **_: Any) -> float:
        self.told += [batch.per_token[ROUTING] for batch in batches]
        return 0.0


def routed(lengths: tuple[int, ...], experts: int = 9) -> PackedBatch:
    rng = np.random.default_rng(1)
    every = np.arange(experts, dtype=np.int16)
    rows = [rng.permuted(np.tile(every, (n, 3, 1)), axis=-1)[..., :2] for n in lengths]
    return pack([np.arange(n) for n in lengths], {ROUTING: rows})


@pytest.mark.parametrize("lengths", [(4, 9, 2), (500, 700, 3, 600)])
@pytest.mark.parametrize("shares", [1, 2, 3])
def test_recorded_experts_travel_with_their_tokens(lengths: tuple[int, ...], shares: int):
    job = Job(*(Routed(share_, shares) for share_ in range(shares)), Routed(0, shares))
    batch = routed(lengths)
    want = Routed(0, 1).score(batch, temperature=1.0)
    assert len(want.unique()) > 10
    assert torch.equal(job.backend.score(batch, temperature=1.0), want)
    job.backend.accumulate([batch, *[hollow(batch)] * (shares - 1)], Noting(), **options())
    job.close()
    rows_TLK = batch.per_token[ROUTING]
    for shard in job.shards:
        assert torch.equal(shard.told[1], rows_TLK if shard.share == 0 else rows_TLK[:1])


def test_experts_that_one_share_would_refuse_are_refused_before_any_rank_begins():
    job = Job(Routed(0, 2), Routed(1, 2))
    for refuse in (
        lambda: job.backend.score(routed((4, 9), 12), temperature=1.0),
        lambda: job.backend.accumulate([routed((4,)), routed((9,), 12)], Noting(), **options()),
    ):
        with pytest.raises(ValueError, match=r"expert 1\d, but the model has 9"):
            refuse()
    job.backend.score(routed((4, 9)), temperature=1.0)
    job.close()
    assert [len(shard.told) for shard in job.shards] == [1, 1]


def test_a_state_arrives_tensor_by_tensor_whatever_order_it_is_read_in():
    names = [f"w{n}" for n in range(9)]
    weights = {name: torch.full((2, 3), float(n)) for n, name in enumerate(names)}
    job = Job(*(Shard(0, 1, weights={n: torch.zeros(2, 3) for n in names}) for _ in range(3)))
    job.backend.load_state(weights)
    job.close()
    for shard in job.shards:
        assert all(torch.equal(shard.weights[n], weights[n]) for n in names)
    assert job.backend.name == "fake"


def test_every_method_of_a_backend_is_led_and_followed():
    methods = {
        name
        for name, value in vars(Backend).items()
        if callable(value) and not name.startswith("_")
    }
    led = LedBackend(Recording(), 0, Shard(0, 1))  # type: ignore[arg-type]
    assert len(methods) >= 10
    assert methods <= set(dir(led))
    # stream is a state, forward_backward an accumulate of one, save writes a snapshot
    for name in methods - {"stream", "forward_backward", "save"}:
        follower = Follower(None, None, lambda _: None)  # type: ignore[arg-type,return-value]
        follower._backends[0] = AnyBackend()  # type: ignore[assignment]
        arguments = {
            "accumulate": ([], Noting()),
            "score": (micro(1),),
            "load_state": ({},),
        }.get(name, ())
        options = {"score": {"temperature": 1.0}}.get(name, {})
        follower._perform(Command(0, name, arguments, options))


class Recording:
    """A leader that is not asked."""


class AnyBackend:
    """Answers to any method."""

    data_rank, data_ranks = 0, 1

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: torch.zeros(3) if name == "score" else []


def test_a_state_that_is_refused_leaves_the_job_of_use():
    job = Job(*(Shard(0, 1, weights={"w": torch.zeros(2)}) for _ in range(2)))
    with pytest.raises(ValueError, match=r"w is torch\.float32"):
        job.backend.load_state({"w": torch.ones(5000)})
    job.backend.load_state({"w": torch.ones(2)})
    job.close()
    assert torch.equal(job.shards[1].weights["w"], torch.ones(2))


def test_a_tensor_that_is_read_in_order_is_let_go():
    path = Queued(1)
    described = {f"w{n}": ((2,), torch.float32) for n in range(20)}
    for n in range(20):
        path.send(torch.full((2,), float(n)))
    state = ArrivingState(described, path.at(0))
    check_given(state, described)  # reads nothing
    assert not state._kept
    for n in range(20):
        assert float(state[f"w{n}"][0]) == n
        assert float(state[f"w{n}"][0]) == n  # a second place of the same tensor
        assert len(state._kept) <= 6
    with pytest.raises(KeyError):
        _ = state["w0"]


# --- failures
def test_a_follower_that_fails_alone_ends_the_job_with_its_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shared.backends.rank_lines.LOSS_S", 0.2)
    job = Job(Shard(0, 1), Shard(0, 1, fails=RuntimeError("out of memory")))
    with pytest.raises(RanksFailed, match="rank 1: step: RuntimeError: out of memory"):
        job.backend.step(0.1, max_grad_norm=1.0)
    with pytest.raises(RanksFailed, match="out of memory"):
        job.backend.step(0.1, max_grad_norm=1.0)
    assert job.leader.reason
    job.close()


def test_a_follower_that_refuses_what_rank_0_did_ends_the_job():
    job = Job(Shard(0, 1), Shard(0, 1, fails=ValueError("no such checkpoint")))
    with pytest.raises(RanksFailed, match="rank 1: step: no such checkpoint"):
        job.backend.step(0.1, max_grad_norm=1.0)
    job.close()


def test_a_failure_of_rank_0_alone_is_its_own_and_ends_the_job(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shared.backends.ranks.LOSS_S", 0.2)
    job = Job(Shard(0, 1, fails=OSError("no space left")), Shard(0, 1))
    with pytest.raises(OSError, match="no space left"):
        job.backend.step(0.1, max_grad_norm=1.0)
    with pytest.raises(RanksFailed, match="rank 0: step: no space left"):
        job.backend.step(0.1, max_grad_norm=1.0)
    job.close()


def test_a_rank_that_hangs_in_a_command_is_named_within_the_bound():
    hanging = threading.Event()

    class Hanging(Shard):
        def step(self, lr: float, *, max_grad_norm: float) -> float:
            hanging.wait(10)
            return 0.0

    job = Job(Shard(0, 1), Hanging(0, 1), timeout_s=1.0)
    with pytest.raises(RanksFailed, match="rank 1: did not end step within 1 s of rank 0"):
        job.backend.step(0.1, max_grad_norm=1.0)
    hanging.set()
    job.close()


# --- building
def test_a_command_pickles_small_tensors_and_sends_large_ones_once():
    large, small = torch.arange(4096), torch.arange(3)
    payload, apart = dumps({"a": large, "b": large, "c": small})
    assert [t is large for t in apart] == [True]
    assert len(payload) < 2000
    received = loads(payload, lambda shape, dtype: large.clone().reshape(shape).to(dtype))
    assert received["a"] is received["b"]
    assert torch.equal(received["c"], small)


def test_the_number_of_processes_must_be_the_configured_one():
    alone, pair = World.of({}), World(0, 2, 0, 2)
    assert (alone.rank, alone.size) == (0, 1)
    alone.check(1, "learner.ranks")
    with pytest.raises(ValueError, match=r"learner.ranks 2: 1 process started .* torchrun"):
        alone.check(2, "learner.ranks")
    with pytest.raises(ValueError, match=r"logit_oracle.ranks 1: 2 processes started"):
        pair.check(1, "logit_oracle.ranks")


def test_what_torchrun_says_is_read_and_what_it_forgot_is_named():
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "node0"}  # fmt: skip
    world = World.of(said)
    assert world == World(3, 4, 1, 2, "node0")
    assert not world.one_machine
    del said["MASTER_ADDR"]
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        World.of(said)


def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="shows no CUDA device"):
        device_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert device_of("auto", 1) == torch.device("cuda", 1)
    assert chosen == [1]
    assert device_of("cpu", 5) == torch.device("cpu")
    with pytest.raises(ValueError, match="local rank 2 needs a device of its own"):
        device_of("auto", 2)


def test_an_absent_extra_is_one_line_that_names_it(monkeypatch: pytest.MonkeyPatch):
    for name in list(sys.modules):
        if name.startswith(("megatron", "shared.backends.megatron.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron", None)
    with pytest.raises(ValueError, match=r"model.backend megatron needs .* extra megatron") as said:
        build(BackendSpec(Path("m"), kind="megatron"), torch.device("cpu"))
    assert "\n" not in str(said.value)


def test_the_loss_of_a_step_and_its_shadows_can_be_shipped():
    from services.learner.trainer import _Watched
    from shared.algo.losses import Denominators
    from shared.algo.policy_loss import PolicyLoss
    from shared.algo.shadow import ShadowLosses, ShadowRoute
    from shared.runtime.algo_section import AlgoSection

    objective = AlgoSection().settings()
    loss = PolicyLoss(objective).minibatch(Denominators(3.0, 1.0, 0.0), version_now=2)
    shadows = ShadowLosses(
        objective, [ShadowRoute("rollout", "sampler")], trained="oracle", reference="oracle"
    )
    watched = _Watched(loss, shadows.step(loss.denominators, version_now=2))
    copied = pickle.loads(pickle.dumps(watched))
    assert copied.collected() == []
