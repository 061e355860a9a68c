"""The sizes of `make bench-learner` and what its figures must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shared.cli.bench_learner_data import long_tailed

Lengths = Literal["equal", "long_tailed"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Size:
    """A random Qwen3 (tied embeddings) and the optimizer step that it takes."""

    name: str
    vocab: int
    hidden: int
    middle: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    sequences: int
    mean_tokens: int
    micro_tokens: int
    """Tokens of a micro-batch, ours packed, theirs at the mean length."""
    repetitions: int
    left_out: tuple[str, ...] = ()
    """Contenders that are not measured at this size: all of them are in memory together."""
    give_back: bool = False
    """Whether the waiting ones return what they have freed; each step then pays for its pages."""

    @property
    def config(self) -> dict[str, int]:
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.middle,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 4096,
        }

    def lengths(self, kind: Lengths) -> list[int]:
        """Return the sequences' lengths; both kinds have the same sum."""
        if kind == "equal":
            return [self.mean_tokens] * self.sequences
        return long_tailed(self.sequences, self.mean_tokens)


SIZES = (
    Size("0.2M", 64, 96, 256, 2, 4, 2, 24, 64, 128, 4096, 9),
    Size("17M", 8192, 384, 1088, 8, 8, 4, 48, 32, 128, 2048, 3),
    Size("120M", 32768, 768, 2688, 12, 12, 4, 64, 16, 64, 512, 3, ("hf_flat",), True),
)
QUICK = (Size("quick", 64, 32, 64, 1, 4, 2, 8, 8, 24, 96, 1),)
"""For the test of the command."""


@dataclass(frozen=True)
class Limit:
    """Our speed against another's, as a ratio of median CPU seconds."""

    lengths: Lengths
    others: tuple[str, ...]
    """The fastest of them counts."""
    bound: float

    @property
    def text(self) -> str:
        return f">= {self.bound:g}x {' or '.join(self.others)}"


LIMITS = (
    Limit("equal", ("hf_padded",), 1.0),
    Limit("equal", ("trl",), 1.0),
    Limit("long_tailed", ("hf_padded",), 1.8),
    Limit("long_tailed", ("hf_flat", "hf_loop"), 1.0),
    Limit("long_tailed", ("trl",), 1.0),
)
HEAD_LIMIT = 12.0
"""Peak extra memory of full logits over ours, at least."""
SAME_STEP = 1e-3
"""Gradient norms of all contenders agree within this, relatively: they take the same step."""


@dataclass(frozen=True)
class Verdict:
    """A limit at one size and what was found."""

    case: str
    text: str
    found: float | None
    """None: not measured."""
    ok: bool

    @property
    def line(self) -> str:
        shown = "not measured" if self.found is None else f"{self.found:.2f}"
        return f"{'ok    ' if self.ok else 'MISSED'} {self.case:<18} {self.text:<28} {shown}"


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Return a verdict per limit and row; `rows` are those of `bench_learner`."""
    verdicts: list[Verdict] = []
    for row in rows:
        if row["kind"] == "speed":
            verdicts += _speed(row)
        elif row["kind"] == "head":
            found = row["full_bytes"] / row["chunked_bytes"]
            verdicts.append(
                Verdict("log-probs", f"<= 1/{HEAD_LIMIT:g} of full logits", found,
                        found >= HEAD_LIMIT)
            )  # fmt: skip
    return verdicts


def _speed(row: Row) -> list[Verdict]:
    case = f"{row['size']} {row['lengths']}"
    seconds = row["cpu_s"]
    verdicts: list[Verdict] = []
    for limit in LIMITS:
        if limit.lengths == row["lengths"]:
            names = [name for name in limit.others if name not in row["left_out"]]
            others = [seconds[name] for name in names if name in seconds]
            found = min(others) / seconds["ours"] if len(others) == len(names) else None
            ok = found is not None and found >= limit.bound
            verdicts.append(Verdict(case, limit.text, found, ok))
    norms = list(row["grad_norms"].values())
    spread = (max(norms) - min(norms)) / max(norms)
    verdicts.append(Verdict(case, f"same step within {SAME_STEP:g}", spread, spread <= SAME_STEP))
    return verdicts
