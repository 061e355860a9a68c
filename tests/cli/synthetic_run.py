"""A run that never happened, with the records of one that did.

A tiny Qwen3 policy with a few versions, episodes of a text grid world whose tokens were "sampled"
by those versions, their true log-probs, a journal that trains them, leases and step reports.
Everything is in memory first, so that a test can falsify one thing before it is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from shared.cli.archive import ArchiveWriter, Record, archive_dir, safetensors_bytes
from shared.cli.reference_forward import Query, ReferenceConfig, ReferencePolicy, StoredTensor
from shared.runtime.sections import EXACT_ROUTES
from shared.wire.base import Array
from shared.wire.codec import content_digest, encode
from shared.wire.journal import (
    Batch,
    Disposed,
    Evaluated,
    Issued,
    JournalBody,
    JournalEntry,
    Member,
    RunFinished,
    RunStarted,
    TrainedGroup,
)
from shared.wire.messages import (
    Layout,
    Score,
    SequenceScore,
    TaskRef,
    Terminal,
    Ticket,
    VersionScore,
)
from shared.wire.telemetry import Lease, StepReport
from shared.wire.trajectory import Failure, SamplingParams, Sequence, Span, Trajectory, Turn
from shared.wire.weights import Artefact, Canary, Manifest, TensorSpec

ALPHABET = "@abcdefghijklmnopqrstuvwxyz0123456789.#>SFHG \n"
MAP = "SFFF\nFHFH\nFFFH\nHFFG\n"
SHADOWS = {"current_recompute": 0.03, "ppo_ewma_async": 0.012, "rollout": 0.016}
"""Routes that looked on, and their mean error at age 1."""
T0 = 1_780_000_000.0
STEP_S = 0.6


@dataclass
class Spec:
    """Size of the run."""

    versions: int = 6
    """Steps; versions 0..versions are published."""
    groups: int = 3
    """Per version."""
    size: int = 4
    max_staleness: int = 4
    eval_tasks: int = 24
    unfinished: int = 2
    drift: float = 0.01
    seed: int = 0
    route: str = "oracle"
    """`snapshot_old` stores scores that no batch points at, an approximate route none."""


CONFIG: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True, "vocab_size": len(ALPHABET), "hidden_act": "silu",
}  # fmt: skip


@dataclass
class SyntheticRun:
    """All records of the run, before they are written."""

    spec: Spec
    weights: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    journal: list[JournalBody] = field(default_factory=list)
    terminals: dict[int, Terminal] = field(default_factory=dict)
    scores: dict[int, Score] = field(default_factory=dict)
    steps: list[StepReport] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    queued: list[str] = field(default_factory=list)
    tickets: dict[str, Ticket] = field(default_factory=dict)

    def digest(self, terminal_seq: int) -> str:
        return content_digest(encode(self.terminals[terminal_seq]))

    def batches(self) -> list[Batch]:
        return [body for body in self.journal if isinstance(body, Batch)]

    def replace(self, old: JournalBody, new: JournalBody) -> None:
        self.journal[self.journal.index(old)] = new

    def write(self, run_dir: Path) -> Path:
        """Write the run folder and return it."""
        _write_model(run_dir / "base")
        with ArchiveWriter(archive_dir(run_dir)) as writer:
            for version, weights in self.weights.items():
                writer.write_version(version, [_safetensors(weights)])
                manifest = _manifest(version, weights)
                writer.append("manifests", [_record(version + 1, "manifest", manifest)])
            for seq, body in enumerate(self.journal, start=1):
                entry = JournalEntry(entry_id=str(seq), written_at=_time_of(body), body=body)
                writer.append("journal", [_record(seq, "journal", entry)])
            writer.append("terminals", [_record(s, "t", m) for s, m in self.terminals.items()])
            writer.append("scores", [_record(s, "s", m) for s, m in self.scores.items()])
            for seq, step in enumerate(self.steps, start=1):
                writer.append("stats", [_record(seq, "stats.step", step)])
            for lease in self.leases:
                writer.append_line("leases", _record(1, "lease", lease))
            writer.write_tickets_final(self.queued)
        end = T0 + 4 + self.spec.versions * STEP_S
        facts = {
            "started_at": T0 - 4.0, "finished_at": end + 3, "wall_s": end + 7 - T0,
            "install_s": 61.5, "restarts": {"rollout": 1},
            "kills": [{"pod": "rollout-1", "at": T0 + self.spec.versions * STEP_S / 2}],
            "peak_pss_bytes": 1_288_490_188, "command": ["lagwise", "demo", "--seed", "0"],
            "versions": {"python": "3.11.2", "torch": "2.13.0+cpu"},
        }  # fmt: skip
        (run_dir / "run.json").write_text(json.dumps(facts))
        (run_dir / "resolved.yaml").write_text(yaml.safe_dump(_values(run_dir, self.spec)))
        return run_dir


def build(spec: Spec | None = None) -> SyntheticRun:
    """Make the run up."""
    spec = spec or Spec()
    rng = np.random.default_rng(spec.seed)
    run = SyntheticRun(spec)
    weights = _base_weights(rng)
    for version in range(spec.versions + 1):
        run.weights[version] = weights
        weights = {
            n: (w + rng.normal(0, spec.drift, w.shape)).astype("f4") for n, w in weights.items()
        }
    run.journal.append(
        RunStarted(
            incarnation="i1", seed=spec.seed, model_digest="d0",
            # what the journal does not say is looked up in resolved.yaml
            config={"old_logprobs": {"route": spec.route}} if spec.route != "oracle" else {},
        )
    )  # fmt: skip
    _evaluate(run, "base", 0, rng)
    for version in range(spec.versions):
        _train(run, version, rng)
    _leave_unfinished(run, rng)
    _evaluate(run, "final", spec.versions, rng)
    _score_all(run, rng)
    _journal_batches(run)
    if spec.route not in EXACT_ROUTES:
        run.scores.clear()
    unfinished = [b for b in run.journal if isinstance(b, Issued)][-2].tickets
    names = tuple(t.ticket_id for t in unfinished) if spec.unfinished else ()
    run.journal.append(RunFinished(version=spec.versions, unfinished=names))
    _lease_all(run, rng)
    return run


def _train(run: SyntheticRun, version: int, rng: np.random.Generator) -> None:
    """Issue the groups of one batch some versions earlier and play them."""
    spec = run.spec
    for number in range(spec.groups):
        age = min(version, int(rng.integers(0, min(spec.max_staleness, 3) + 1)))
        success = 0.1 + 0.65 * (1 - math.exp(-2.5 * version / spec.versions))
        group_id = f"g{version * spec.groups + number:05d}"
        tickets = _tickets(run, "train", group_id, version - age, spec.size, 100 + number)
        for ticket in tickets:
            if number == 0 and version == 1 and ticket.member == 0:
                outcome: Trajectory | Failure = Failure(reason="env_error", detail="it raised")
            else:
                outcome = _episode(ticket, version, rng, success)
            _store(run, ticket, outcome)


def _evaluate(run: SyntheticRun, name: str, version: int, rng: np.random.Generator) -> None:
    spec = run.spec
    tickets = _tickets(run, "eval", f"eval-{name}-v{version}", version, spec.eval_tasks, 10_000)
    rewards = []
    for ticket in tickets:
        outcome = _episode(ticket, version, rng, 0.1 if name == "base" else 0.75)
        _store(run, ticket, outcome)
        rewards.append(outcome.reward)
    ids = tuple(t.ticket_id for t in tickets)
    indices = tuple(t.task.index for t in tickets)
    run.journal.append(Disposed(ticket_ids=ids, outcome="evaluated", cause=name))
    run.journal.append(
        Evaluated(version=version, name=name, task_indices=indices, rewards=tuple(rewards))
    )


def _leave_unfinished(run: SyntheticRun, rng: np.random.Generator) -> None:
    count = run.spec.unfinished
    if not count:
        return
    tickets = _tickets(run, "train", "g99999", run.spec.versions, count, 7)
    _store(run, tickets[0], _episode(tickets[0], run.spec.versions, rng, 0.5))
    run.queued.extend(t.ticket_id for t in tickets[1:])


def _tickets(
    run: SyntheticRun, purpose: Any, group_id: str, version: int, count: int, task: int
) -> tuple[Ticket, ...]:
    tickets = tuple(
        Ticket(
            ticket_id=f"{purpose[0]}{len(run.tickets) + member:07d}", purpose=purpose,
            group_id=group_id, member=member, group_size=count,
            task=TaskRef(
                dataset="grid", split=purpose, seed=task,
                index=member if purpose == "eval" else task,
            ),
            issue_version=version, min_version=version, deadline=T0 + 1e4,
            sampling=SamplingParams(stop_ids=(ALPHABET.index("\n"),)), seed=member,
        )
        for member in range(count)
    )  # fmt: skip
    run.tickets.update({t.ticket_id: t for t in tickets})
    run.journal.append(Issued(version=version, tickets=tickets))
    return tickets


def _episode(
    ticket: Ticket, last_version: int, rng: np.random.Generator, success: float
) -> Trajectory:
    """Play words at random; versions rise from the ticket's to `last_version`."""
    ids, mask, stamps, turns = _ids(MAP + "@00>"), [], [], []
    mask = [0] * len(ids)
    stamps = [-1] * len(ids)
    first = ticket.issue_version
    last = min(last_version, first + 1 + int(rng.random() < 0.2))
    num_turns = int(rng.integers(3, 7))
    switch = int(rng.integers(1, num_turns * 6))
    sampled = 0
    for turn in range(num_turns):
        word = str(rng.choice(["left", "down", "right", "up"])) + "\n"
        start = len(ids)
        for token in _ids(word):
            ids.append(token)
            mask.append(1)
            stamps.append(last if sampled >= switch else first)
            sampled += 1
        turns.append(Turn(start=start, stop=len(ids), finish="stop", pods=("rollout-0",)))
        if turn < num_turns - 1:
            glue = _ids(f"@{turn % 4}{(turn + 1) % 4}>")
            ids, mask, stamps = ids + glue, mask + [0] * len(glue), stamps + [-1] * len(glue)
    length = len(ids)
    sequence = Sequence(
        token_ids=Array.of(ids, "i4"),
        loss_mask=Array.of(mask, "u1"),
        spans=_spans(stamps),
        arrays={"sampler_logprobs": Array.of(np.zeros(length), "f4")},
        turns=tuple(turns),
    )
    return Trajectory(
        status="done",
        reward=float(rng.random() < success),
        sequences=(sequence,),
        task_digest=f"{ticket.purpose}-{ticket.task.seed}-{ticket.task.index}",
        played_s=float(rng.random()),
    )


def _spans(stamps: list[int]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for position, version in enumerate(stamps):
        if version < 0:
            continue
        if spans and spans[-1].version == version and spans[-1].stop == position:
            spans[-1] = Span(version=version, start=spans[-1].start, stop=position + 1)
        else:
            spans.append(Span(version=version, start=position, stop=position + 1))
    return tuple(spans)


def _store(run: SyntheticRun, ticket: Ticket, outcome: Trajectory | Failure) -> None:
    run.terminals[len(run.terminals) + 1] = Terminal(
        ticket_id=ticket.ticket_id, attempt_id="a1", purpose=ticket.purpose,
        group_id=ticket.group_id, member=ticket.member, issue_version=ticket.issue_version,
        producer="env-0", outcome=outcome,
    )  # fmt: skip


def _score_all(run: SyntheticRun, rng: np.random.Generator) -> None:
    """Fill in true old log-probs, noisy sampler log-probs, and write the scores."""
    config = ReferenceConfig.of(CONFIG)
    old = {
        seq: np.zeros(t.outcome.sequences[0].token_ids.shape[0])
        for seq, t in run.terminals.items()
        if isinstance(t.outcome, Trajectory)
    }
    for version, weights in run.weights.items():
        policy = ReferencePolicy(config, _stored(weights))
        owners, queries = [], []
        for seq in old:
            sequence = run.terminals[seq].outcome.sequences[0]
            spans = [s for s in sequence.spans if s.version == version]
            if spans:
                positions = np.concatenate([np.arange(s.start, s.stop) for s in spans])
                owners.append((seq, positions))
                queries.append(Query(sequence.token_ids.numpy(), positions))
        for (seq, positions), values in zip(owners, policy.logprobs(queries), strict=True):
            old[seq][positions] = values
    digests = {v: _digest(w) for v, w in run.weights.items()}
    for seq, values in old.items():
        terminal = run.terminals[seq]
        sequence = terminal.outcome.sequences[0]
        noise = rng.normal(0, 0.02, len(values)) * sequence.loss_mask.numpy()
        arrays = {"sampler_logprobs": Array.of(values + noise, "f4")}
        outcome = terminal.outcome.model_copy(
            update={"sequences": (sequence.model_copy(update={"arrays": arrays}),)}
        )
        run.terminals[seq] = terminal.model_copy(update={"outcome": outcome})
        versions = tuple(
            VersionScore(version=v, status="exact", digest=digests[v])
            for v in sorted({s.version for s in sequence.spans})
        )
        score = SequenceScore(old_logprobs=Array.of(values, "f4"), versions=versions)
        run.scores[len(run.scores) + 1] = Score(
            ticket_id=terminal.ticket_id, terminal_seq=seq, terminal_digest=run.digest(seq),
            sequences=(score,), producer="oracle-0", forward_tokens=len(values) * len(versions),
            layout=Layout(backend="torch", dtype="float32", kind="packed", num_threads=1),
        )  # fmt: skip


def _journal_batches(run: SyntheticRun) -> None:
    """Write the batches, now that terminals and scores have their final content."""
    score_of = {s.ticket_id: seq for seq, s in run.scores.items()}
    groups: dict[str, list[int]] = {}
    for seq, terminal in run.terminals.items():
        if terminal.purpose == "train" and terminal.group_id != "g99999":
            groups.setdefault(terminal.group_id, []).append(seq)
    names = sorted(groups)
    per_version = run.spec.groups
    for version in range(run.spec.versions):
        chosen = names[version * per_version : (version + 1) * per_version]
        trained = tuple(_trained_group(run, groups[name], score_of) for name in chosen)
        run.journal.append(Batch(version=version, groups=trained, seed=version))
        run.steps.append(_step_report(run, version + 1))


def _trained_group(run: SyntheticRun, seqs: list[int], score_of: dict[str, int]) -> TrainedGroup:
    terminals = [run.terminals[seq] for seq in seqs]
    played = [(s, t) for s, t in zip(seqs, terminals, strict=True) if t.outcome.kind != "failure"]
    rewards = [t.outcome.reward for _, t in played]
    mean = sum(rewards) / len(rewards)
    return TrainedGroup(
        group_id=terminals[0].group_id,
        issue_version=terminals[0].issue_version,
        members=tuple(
            Member(
                ticket_id=t.ticket_id, terminal_seq=seq, terminal_digest=run.digest(seq),
                score_seq=score_of[t.ticket_id] if run.spec.route == "oracle" else 0,
                reward=t.outcome.reward, advantage=t.outcome.reward - mean,
            )
            for seq, t in played
        ),
        failed=tuple(t.ticket_id for t in terminals if t.outcome.kind == "failure"),
        no_loss="zero_variance" if len(set(rewards)) == 1 else "",
    )  # fmt: skip


def _step_report(run: SyntheticRun, version: int) -> StepReport:
    rng = np.random.default_rng(version)
    ages = np.arange(run.spec.max_staleness + 1)
    tokens = rng.multinomial(600, [0.04, 0.3, 0.5, 0.13, 0.03][: len(ages)]).astype(float)
    log_s = rng.normal(0, 0.08, 24)
    started = T0 + 1 + version * STEP_S
    progress = 1 - math.exp(-2.5 * version / run.spec.versions)
    scalars = {
        "success": 0.1 + 0.65 * progress + rng.normal(0, 0.02), "reward_mean": 0.1 + 0.6 * progress,
        "staleness_mean": 1.8, "staleness_max": 4.0, "loss": 0.01, "grad_norm": 0.5, "lr": 1e-3,
        "entropy": 0.6, "loss_tokens": 600.0, "exact_tokens": 600.0, "tokens_trained": 600.0,
        "k3_d": 2e-4, "k3_s": 8e-3, "wait_s": 0.1, "train_s": 0.35, "publish_s": 0.05,
        "rej_any": 0.0004, "clip_high": 0.013, "clip_low": 0.009,
        "publish_bytes": 420_000.0 if version % 16 else 840_000.0, "checkpoint_s": 0.02,
        "outstanding_groups": 60.0, "ready_groups": 6.0, "optimizer_steps": 2.0 * version,
    }  # fmt: skip
    arrays = {
        "age_tokens": Array.of(tokens, "f8"),
        "age_k3_d": Array.of(tokens * 2e-4 * rng.normal(1, 0.05, len(ages)), "f8"),
        "age_k3_s": Array.of(tokens * 3e-3 * ages**1.3, "f8"),
        "scatter": Array.of(
            np.stack([rng.normal(0, 0.02, 24), log_s, rng.integers(0, 5, 24)], axis=1), "f4"
        ),
        "dispatched_lengths": Array.of(rng.integers(12, 32, 40), "i4"),
        "trained_lengths": Array.of(rng.integers(12, 32, 40), "i4"),
        **_shadow_sums(tokens, ages, rng),
    }
    scalars |= {"shadow_s": 0.004, "shadow_held_bytes": 2.0 * 2**20}
    for name, size in SHADOWS.items():
        scalars |= {
            f"shadow_{name}_{what}": size * share * rng.normal(1, 0.1)
            for what, share in (("error_mean", 1.0), ("error_p99", 6.0), ("error_bias", -0.2),
                                ("wrongly_rejected", 0.1), ("wrongly_kept", 0.02),
                                ("wrongly_cut", 0.01), ("wrongly_uncut", 0.2),
                                ("clipped_on_arrival", 0.3))
        }  # fmt: skip
    return StepReport(
        version=version, started_at=started, trained_at=started + 0.36 + 0.05 * rng.random(),
        published_at=started + 0.43 + 0.03 * rng.random(), scalars=scalars, arrays=arrays,
    )  # fmt: skip


def _shadow_sums(tokens: np.ndarray, ages: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """What the shadows would leave of a step, on a third of its tokens."""
    count = np.round(tokens / 3)
    exact = count * 2e-4 * rng.normal(1, 0.05, len(ages))
    found = {"shadow_oracle_age_count": count, "shadow_oracle_age_k3_d_sum": exact}
    for name, size in SHADOWS.items():
        flat = name == "rollout"
        growth = np.ones(len(ages)) if flat else ages**0.8
        found |= {
            f"shadow_{name}_age_count": count,
            f"shadow_{name}_age_k3_d_sum": count * (0 if flat else 2e-4 + 0.1 * size * ages**1.3),
            f"shadow_{name}_age_error_sum": count * size * growth,
            f"shadow_{name}_age_bias_sum": -0.2 * count * size * growth,
            f"shadow_{name}_age_wrong_sum": count * np.minimum(1, 0.3 * size * growth),
        }
    return {name: Array.of(values, "f8") for name, values in found.items()}


def _lease_all(run: SyntheticRun, rng: np.random.Generator) -> None:
    pods = [
        ("learner", "learner-0", 0.7, "i"), ("rollout", "rollout-0", 0.6, "i"),
        ("rollout", "rollout-1", 0.6, "i"), ("env_agents", "env-0", 0.15, "i"),
        ("env_agents", "env-1", 0.15, "i"), ("logit_oracle", "oracle-0", 0.3, "i"),
    ]  # fmt: skip
    duration = run.spec.versions * STEP_S + 4
    kill_at = run.spec.versions * STEP_S / 2
    for role, pod, share, incarnation in pods:
        busy, at = 0.0, 0.0
        while at < duration:
            if pod == "rollout-1" and incarnation == "i" and at > kill_at:
                incarnation, busy, at = "j", 0.0, at + 2.5
            counters = {"sampled_tokens": busy * 4000, "weight_bytes": busy * 1e6,
                        "sync_lag_s": busy * 0.05, "swaps": busy, "swap_s": busy * 0.02,
                        "interrupted_turns": busy // 3, "prefill_tokens": busy * 900,
                        "prefix_hit_tokens": busy * 8000, "moves": busy * 2,
                        "scored_tokens": busy * 9000, "forward_tokens": busy * 30000,
                        "trajectories": busy * 300, "canary_checks": busy, "versions": busy,
                        "trained_trajectories": busy * 200, "trained_tokens": busy * 5000,
                        "episodes": busy * 160, "env_steps": busy * 900}  # fmt: skip
            run.leases.append(
                Lease(role=role, pod=pod, incarnation=incarnation, pid=1, sent_at=T0 + at,
                      ready=True, busy_s=busy, counters=counters)
            )  # fmt: skip
            step = float(rng.uniform(0.5, 2.0))
            at, busy = at + step, busy + step * min(0.98, max(0.02, rng.normal(share, 0.1)))


def _base_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    hidden, inner, heads, kv_heads, head = 32, 48, 4, 2, 8
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (len(ALPHABET), hidden)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (heads * head, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_heads * head, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_heads * head, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * head),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    weights = {n: rng.normal(0, 0.2, s).astype("f4") for n, s in shapes.items()}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for name, size in (("input_layernorm", hidden), ("post_attention_layernorm", hidden),
                           ("self_attn.q_norm", head), ("self_attn.k_norm", head)):  # fmt: skip
            weights[f"{prefix}.{name}.weight"] = np.ones(size, "f4")
    weights["model.norm.weight"] = np.ones(hidden, "f4")
    return weights


def _stored(weights: dict[str, np.ndarray]) -> dict[str, StoredTensor]:
    return {n: StoredTensor("F32", w.shape, w.tobytes()) for n, w in weights.items()}


def _safetensors(weights: dict[str, np.ndarray]) -> bytes:
    return safetensors_bytes({n: ("F32", w.shape, w.tobytes()) for n, w in weights.items()})


def _digest(weights: dict[str, np.ndarray]) -> str:
    return hashlib.blake2b(_safetensors(weights), digest_size=16).hexdigest()


def _manifest(version: int, weights: dict[str, np.ndarray]) -> Manifest:
    sha256 = hashlib.sha256()
    for name in sorted(weights):
        shape = ",".join(str(n) for n in weights[name].shape)
        sha256.update(f"{name} F32 {shape}\n".encode() + weights[name].tobytes())
    return Manifest(
        version=version, parent=version - 1 if version else None, upload_id=f"u{version}",
        digest=_digest(weights), sha256=sha256.hexdigest(),
        keyframe=_artefact("keyframe", 847_872) if version % 16 == 0 else None,
        delta=_artefact("delta", 421_000 + 977 * (version * 7919 % 61)) if version else None,
        tensors=tuple(
            TensorSpec(name=n, dtype="F32", shape=w.shape, digest="0" * 16)
            for n, w in sorted(weights.items())
        ),
        canary=Canary(token_ids=Array.of([[0, 1]], "i4"), logprobs=Array.of([[0.0]], "f4"),
                      tolerance=1e-4),
        optimizer_steps=2 * version, published_at=T0 + 1.5 + version * STEP_S, producer="learner-0",
    )  # fmt: skip


def _artefact(kind: Any, num_bytes: int) -> Artefact:
    return Artefact(kind=kind, upload_id="u", num_chunks=1, num_bytes=num_bytes, digest="")


def _write_model(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(ALPHABET)}, unk_token="@"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(directory / "tokenizer.json"))


def _values(run_dir: Path, spec: Spec) -> dict[str, Any]:
    return {
        "config": {
            "run": {"name": "synthetic", "seed": spec.seed, "dir": "runs/synthetic"},
            "model": {"source": str(run_dir / "base"), "dtype": "float32"},
            "admission": {
                "max_staleness": spec.max_staleness, "groups_per_version": spec.groups,
                "group_size": spec.size,
            },
            "learner": {"versions": spec.versions, "eval": {"episodes": spec.eval_tasks}},
        },
        "rollout": {"replicas": 2},
        "env_agents": {"replicas": 2},
    }  # fmt: skip


def _record(seq: int, subject: str, message: Any) -> Record:
    return Record(seq, subject, encode(message), T0 + seq * 0.01)


def _time_of(body: JournalBody) -> float:
    match body:
        case Batch(version=version):
            return T0 + 1 + version * STEP_S
        case Evaluated(version=version) | RunFinished(version=version):
            return T0 + 1 + version * STEP_S + 0.5
        case _:
            return T0


def _ids(text: str) -> list[int]:
    return [ALPHABET.index(c) for c in text]
