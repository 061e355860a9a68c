"""T1-T9 and T11 of the exactness tests: the backend and the algorithms against an oracle.

The oracle is `reference_logprobs` of conftest: float64, one sequence, one version at a time, no
code in common. Interruption (T6), eviction (T10) and stale caches (T12) belong to the services.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.algo import diagnostics
from shared.algo.batching import PackedBatch, pack
from shared.algo.objective import Objective
from shared.algo.objective_specs import Ppo
from shared.algo.policy_loss import PolicyLoss, count
from shared.algo.version_scoring import parts_by_version
from shared.backends.torch_backend import TorchBackend

TEMPERATURE = 0.9
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-5}
State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Stamp:
    version: int
    start: int
    stop: int


@dataclass(frozen=True)
class Played:
    """A trajectory: prompt, turns with version switches inside, environment tokens between."""

    ids: np.ndarray
    spans: tuple[Stamp, ...]

    @property
    def mask(self) -> np.ndarray:
        return self.versions >= 0

    @property
    def versions(self) -> np.ndarray:
        stamps = np.full(len(self.ids), -1)
        for span in self.spans:
            stamps[span.start : span.stop] = span.version
        return stamps


@dataclass(frozen=True)
class World:
    """Real AdamW versions of one model, and trajectories stamped by them."""

    backend: TorchBackend
    follower: TorchBackend
    history: dict[int, State]
    played: tuple[Played, ...]
    tables: list[dict[int, torch.Tensor]]
    """By trajectory and version: the oracle's log-probs of the whole trajectory."""

    @property
    def truth(self) -> list[torch.Tensor]:
        """ℓ*: every token under its own version, 0 outside the mask."""
        rows = []
        for item, table in zip(self.played, self.tables, strict=True):
            row = torch.zeros(len(item.ids), dtype=torch.float64)
            for span in item.spans:
                row[span.start : span.stop] = table[span.version][span.start : span.stop]
            rows.append(row)
        return rows


def trajectories(rng: np.random.Generator) -> tuple[Played, ...]:
    layouts = [
        [(0, 4, 7), (1, 7, 9), (1, 12, 15)],
        [(1, 5, 9), (3, 11, 12), (2, 12, 16), (3, 18, 20)],
        [(2, 3, 8)],
        [(0, 6, 8), (3, 8, 11)],
        [(3, 2, 6), (3, 9, 13)],
    ]
    return tuple(
        Played(rng.integers(0, 37, spans[-1][2] + 2), tuple(Stamp(*s) for s in spans))
        for spans in layouts
    )


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def world(request: pytest.FixtureRequest, model_dir: Path, reference) -> World:
    torch.set_num_threads(1)
    dtype: torch.dtype = request.param
    rng = np.random.default_rng(11)
    backend, follower = TorchBackend(dtype), TorchBackend(dtype)
    backend.load_hf(model_dir)
    follower.load_hf(model_dir)
    played = trajectories(rng)
    history = {0: copy(backend.state())}
    for version in range(1, 4):
        batch = pack([rng.integers(0, 37, 20) for _ in range(4)])
        backend.forward_backward(
            batch, lambda o, b: -o.logprobs_T.mean(), temperature=1.0, with_entropy=False
        )
        backend.step(2e-2, max_grad_norm=1.0)
        history[version] = copy(backend.state())
    tables = [
        {v: reference(state, item.ids, TEMPERATURE) for v, state in history.items()}
        for item in played
    ]
    return World(backend, follower, history, played, tables)


def copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def digest(state: State) -> str:
    sha = hashlib.sha256()
    for name in sorted(state):
        sha.update(name.encode())
        sha.update(state[name].contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def route(
    backend: TorchBackend,
    history: Mapping[int, State],
    played: Sequence[Played],
    *,
    temperature: float = TEMPERATURE,
    single: bool = False,
) -> list[torch.Tensor]:
    """The exact route: per version, load it, score every prefix, keep its own positions."""
    rows = [torch.zeros(len(p.ids), dtype=backend.dtype) for p in played]
    work: dict[int, list[tuple[int, int, np.ndarray]]] = {}
    for index, item in enumerate(played):
        for part in parts_by_version(item.spans):
            work.setdefault(part.version, []).append((index, part.prefix_len, part.positions))
    for version, items in sorted(work.items()):
        backend.load_state(history[version])
        prefixes = [played[i].ids[:length] for i, length, _ in items]
        packs = [[p] for p in prefixes] if single else [prefixes]
        scores = []
        for prefix_pack in packs:
            batch = pack(prefix_pack)
            scores += batch.split(backend.score(batch, temperature=temperature))
        for (index, _, positions), scored in zip(items, scores, strict=True):
            rows[index][positions] = scored[positions]
    return rows


def assert_exact(world: World, rows: Sequence[torch.Tensor]) -> None:
    """T1 within tolerance, and nothing outside the mask."""
    bound = TOLERANCE[world.backend.dtype]
    for row, want in zip(rows, world.truth, strict=True):
        assert (row.double() - want).abs().max() <= bound


def assert_told_apart(world: World, rows: Sequence[torch.Tensor]) -> None:
    """T3: every segment fits its own version best, every other at least 100 tolerances worse."""
    bound = TOLERANCE[world.backend.dtype]
    for item, row, table in zip(world.played, rows, world.tables, strict=True):
        for span in item.spans:
            own = row[span.start : span.stop].double()
            errors = {
                v: float((own - logp[span.start : span.stop]).abs().max())
                for v, logp in table.items()
            }
            ranked = sorted(errors, key=errors.__getitem__)
            assert ranked[0] == span.version
            assert errors[ranked[0]] <= bound
            assert errors[ranked[1]] >= 100 * bound


def test_t1_every_token_matches_the_oracle_under_its_own_version(world: World):
    assert_exact(world, route(world.follower, world.history, world.played))
    assert_exact(world, route(world.follower, world.history, world.played, single=True))


def test_t1_a_kept_version_reproduces_the_live_forward_bit_for_bit(model_dir: Path, world: World):
    learner = TorchBackend(world.backend.dtype)
    learner.load_hf(model_dir)
    batch = pack([world.played[1].ids])
    kept, live = [], []
    for _ in range(3):
        kept.append(copy(learner.state()))
        live.append(learner.score(batch, temperature=TEMPERATURE))
        learner.forward_backward(
            batch, lambda o, b: -o.logprobs_T.mean(), temperature=1.0, with_entropy=False
        )
        learner.step(2e-2, max_grad_norm=1.0)
    for state, scored in reversed(list(zip(kept, live, strict=True))):
        world.follower.load_state(state)
        assert torch.equal(world.follower.score(batch, temperature=TEMPERATURE), scored)
    assert not torch.equal(live[0], live[1])


def test_t1_oracle_and_snapshot_agree_bit_for_bit_in_one_layout(world: World):
    oracle = route(world.follower, world.history, world.played, single=True)
    before = copy(world.backend.state())
    snapshot = route(world.backend, world.history, world.played, single=True)
    world.backend.load_state(before)
    assert all(torch.equal(a, b) for a, b in zip(oracle, snapshot, strict=True))


def test_t2_order_and_company_stay_within_the_tolerance(world: World):
    order = [3, 0, 4, 2, 1]
    shuffled = route(world.follower, world.history, [world.played[i] for i in order])
    rows = [shuffled[order.index(i)] for i in range(len(order))]
    assert_exact(world, rows)
    halves = [
        *route(world.follower, world.history, world.played[:2]),
        *route(world.follower, world.history, world.played[2:]),
    ]
    assert_exact(world, halves)


def test_t3_every_segment_is_explained_by_its_stamp_and_by_no_other_version(world: World):
    assert_told_apart(world, route(world.follower, world.history, world.played))


def test_t4_a_version_is_the_same_bytes_when_published_and_when_scored(world: World):
    published = {v: digest(state) for v, state in world.history.items()}
    assert len(set(published.values())) == len(published)
    route(world.follower, world.history, world.played)
    assert {v: digest(state) for v, state in world.history.items()} == published
    for version, state in world.history.items():
        world.follower.load_state(state)
        world.follower.score(pack([world.played[0].ids]), temperature=1.0)
        assert digest(world.follower.state()) == published[version]


def off_by_one_stamp(world: World) -> list[torch.Tensor]:
    late = [
        replace(p, spans=tuple(replace(s, version=min(3, s.version + 1)) for s in p.spans))
        for p in world.played
    ]
    return route(world.follower, world.history, late)


def one_wrong_stamp(world: World) -> list[torch.Tensor]:
    first, *rest = world.played
    spans = (first.spans[0], replace(first.spans[1], version=0), first.spans[2])
    return route(world.follower, world.history, [replace(first, spans=spans), *rest])


def shifted_alignment(world: World) -> list[torch.Tensor]:
    return [row.roll(1) for row in route(world.follower, world.history, world.played)]


def snapshot_updated_in_place(world: World) -> list[torch.Tensor]:
    aliased = dict.fromkeys(world.history, world.backend.state())  # never cloned
    return route(world.follower, aliased, world.played)


def segment_without_prefix(world: World) -> list[torch.Tensor]:
    rows = [torch.zeros(len(p.ids), dtype=world.follower.dtype) for p in world.played]
    for row, item in zip(rows, world.played, strict=True):
        for span in item.spans:
            world.follower.load_state(world.history[span.version])
            alone = item.ids[span.start - 1 : span.stop]
            scored = world.follower.score(pack([alone]), temperature=TEMPERATURE)
            row[span.start : span.stop] = scored[1:]
    return rows


def environment_token_unmasked(world: World) -> list[torch.Tensor]:
    first, *rest = world.played
    spans = (*first.spans[:2], Stamp(1, 9, 10), first.spans[2])
    return route(world.follower, world.history, [replace(first, spans=spans), *rest])


def wrong_temperature(world: World) -> list[torch.Tensor]:
    return route(world.follower, world.history, world.played, temperature=1.0)


def current_weights_for_all(world: World) -> list[torch.Tensor]:
    return route(world.follower, dict.fromkeys(world.history, world.history[3]), world.played)


def skipped_last_bit(world: World) -> list[torch.Tensor]:
    narrow = {
        v: {n: t.bfloat16().to(t.dtype) for n, t in state.items()}
        for v, state in world.history.items()
    }
    return route(world.follower, narrow, world.played)


Mutant = Callable[[World], list[torch.Tensor]]


@pytest.mark.parametrize(
    "mutant",
    [
        off_by_one_stamp,
        one_wrong_stamp,
        shifted_alignment,
        snapshot_updated_in_place,
        segment_without_prefix,
        environment_token_unmasked,
        wrong_temperature,
        current_weights_for_all,
        skipped_last_bit,
    ],
)
def test_t5_every_known_mistake_is_caught(world: World, mutant: Mutant):
    rows = mutant(world)
    with pytest.raises(AssertionError):
        assert_exact(world, rows)


@pytest.mark.parametrize(
    "mutant",
    [off_by_one_stamp, one_wrong_stamp, snapshot_updated_in_place, current_weights_for_all],
)
def test_t5_a_wrong_version_is_caught_by_telling_versions_apart(world: World, mutant: Mutant):
    with pytest.raises(AssertionError):
        assert_told_apart(world, mutant(world))


def test_t5_a_live_view_is_not_a_snapshot_and_a_clone_is(world: World):
    before = copy(world.backend.state())
    view = world.backend.state()
    first, second = (world.history[0], world.history[1])
    world.backend.load_state(first)
    assert digest(view) == digest(first)
    world.backend.load_state(second)
    assert digest(view) == digest(second)
    world.backend.load_state(before)


def training_batch(world: World, old: Sequence[torch.Tensor], seed: int = 0) -> PackedBatch:
    rng = np.random.default_rng(seed)
    return pack(
        [p.ids for p in world.played],
        {
            "loss_mask": [p.mask for p in world.played],
            "old_logprobs": [row.numpy() for row in old],
            "sampler_logprobs": [
                t.numpy() + 0.01 * rng.normal(size=len(t)) * p.mask
                for t, p in zip(world.truth, world.played, strict=True)
            ],
            "advantages": [np.full(len(p.ids), rng.normal()) for p in world.played],
            "versions": [p.versions for p in world.played],
        },
    )


def gradients(
    world: World, batch: PackedBatch, objective: Objective, *, version: int = 3
) -> tuple[float, list[torch.Tensor]]:
    backend = world.follower
    backend.load_state(world.history[version])
    step = PolicyLoss(objective).minibatch(count([batch]), version_now=version)
    loss = backend.forward_backward(batch, step, temperature=TEMPERATURE, with_entropy=False)
    grads = [p.grad.clone() for p in backend._at.model.parameters()]
    backend.step(0.0, max_grad_norm=1.0)
    return loss, grads


def test_t7_loss_and_gradients_with_the_route_are_those_with_the_live_log_probs(world: World):
    by_route = route(world.follower, world.history, world.played, single=True)
    again = route(world.follower, world.history, world.played, single=True)
    loss, grads = gradients(world, training_batch(world, by_route), Objective())
    same_loss, same_grads = gradients(world, training_batch(world, again), Objective())
    assert loss == same_loss
    assert all(torch.equal(a, b) for a, b in zip(grads, same_grads, strict=True))
    true_loss, true_grads = gradients(world, training_batch(world, world.truth), Objective())
    bound = 100 * TOLERANCE[world.backend.dtype]
    assert loss == pytest.approx(true_loss, abs=bound)
    for a, b in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=bound)


def test_t8_without_staleness_the_ratio_is_exactly_one_and_routes_agree(world: World):
    fresh = [replace(p, spans=tuple(replace(s, version=3) for s in p.spans)) for p in world.played]
    today = replace(world, played=tuple(fresh))
    world.follower.load_state(world.history[3])
    batch = training_batch(today, today.truth)
    exact = world.follower.score(batch, temperature=TEMPERATURE)
    losses = []
    for old in (exact, world.follower.score(batch, temperature=TEMPERATURE)):
        batch.per_token["old_logprobs"] = old
        step = PolicyLoss(Objective()).minibatch(count([batch]), version_now=3)
        world.follower.forward_backward(batch, step, temperature=TEMPERATURE, with_entropy=False)
        world.follower.step(0.0, max_grad_norm=1.0)
        scalars, _ = step.report()
        assert (scalars["s_min"], scalars["s_max"]) == (1.0, 1.0)
        assert scalars["staleness_max"] == 0
        assert scalars["clipped_on_arrival"] == 0
        losses.append(step.loss)
    assert losses[0] == losses[1]


def test_t9_without_masks_and_clips_the_gradient_does_not_depend_on_the_old_log_probs(
    world: World,
):
    free = Objective(corrections=(), objective=Ppo(low=1.0, high=1e9, dual=None))
    exact = route(world.follower, world.history, world.played)
    noise = [row + 0.5 * torch.randn_like(row) for row in exact]
    _, grads = gradients(world, training_batch(world, exact), free)
    _, other = gradients(world, training_batch(world, noise), free)
    assert max(float(g.abs().max()) for g in grads) > 1e-3
    rtol = 1e-9 if world.backend.dtype == torch.float64 else 1e-4
    for a, b in zip(grads, other, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)
    _, clipped = gradients(world, training_batch(world, noise), Objective())
    differs = [not torch.allclose(a, b, rtol=1e-3) for a, b in zip(grads, clipped, strict=True)]
    assert any(differs)


def test_t11_the_discrepancy_is_flat_in_age_only_with_exact_old_log_probs(world: World):
    rng = np.random.default_rng(5)
    many = [
        Played(rng.integers(0, 37, 30), tuple(Stamp(v, 4 + 6 * v, 10 + 6 * v) for v in range(4)))
        for _ in range(12)
    ]
    exact = route(world.follower, world.history, many)
    recomputed = route(world.follower, dict.fromkeys(world.history, world.history[3]), many)
    k3_by_age = {}
    for name, rows in (("exact", exact), ("current", recomputed)):
        log_d, ages = [], []
        for item, row, own in zip(many, rows, exact, strict=True):
            sampler = own + 0.02 * torch.from_numpy(rng.normal(size=len(own)))
            log_d.append((row - sampler)[item.mask])
            ages.append(3 - torch.from_numpy(item.versions[item.mask]))
        sums = diagnostics.per_age(torch.cat(ages), {"k3": diagnostics.k3(torch.cat(log_d))})
        k3_by_age[name] = sums["age_k3_sum"] / sums["age_count"]
    assert k3_by_age["exact"].max() < 2 * k3_by_age["exact"].min()
    assert k3_by_age["current"][0] == pytest.approx(k3_by_age["exact"][0], rel=1.0)
    assert np.all(np.diff(k3_by_age["current"]) > 10 * k3_by_age["exact"].max())
