"""`lagwise explain`: one trajectory of a run, token by token."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from shared.cli.explain_records import Trained, explain_terminal
from shared.cli.explained import Explained, Token, ends
from shared.cli.ledger import Ledger, of_run
from shared.cli.records import RunRecords, load
from shared.cli.token_text import fit, shown, width
from shared.runtime.errors import ConfigError
from shared.wire.errors import WireError
from shared.wire.journal import Disposed, Issued

_SUGGESTED = 5


def run(run_dir: Path, name: str) -> Explained:
    """Explain the trajectory of a ticket id or an attempt id.

    Raises:
        ConfigError: the folder holds no archive, or knows no such id; a few that it knows are
            named.
    """
    records = load(run_dir)
    ledger = of_run(records)
    seq = _terminal_of(records, name)
    if seq is None:
        raise ConfigError(_unknown(records, ledger, name))
    ticket_id = records.terminals[seq].ticket_id
    trained = trained_in(ledger, ticket_id)
    fate = _fate(records, ledger, ticket_id, trained)
    return explain_terminal(records, trained.member.terminal_seq if trained else seq, trained,
                            fate=fate)  # fmt: skip


def trained_in(ledger: Ledger, ticket_id: str) -> Trained | None:
    """Return where a ticket's trajectory was trained, None when it was not."""
    for batch in ledger.lineage:
        for group in batch.groups:
            for member in group.members:
                if member.ticket_id == ticket_id:
                    return Trained(batch, group, member)
    return None


def _terminal_of(records: RunRecords, name: str) -> int | None:
    for seq, facts in records.terminals.items():
        if facts.ticket_id == name:
            return seq
    for seq in records.terminals:
        try:
            if records.terminal(seq).attempt_id == name:
                return seq
        except WireError:
            continue
    return None


def _fate(records: RunRecords, ledger: Ledger, ticket_id: str, trained: Trained | None) -> str:
    if trained is not None:
        return "trained without loss" if trained.group.no_loss else "trained"
    for body in records.bodies:
        if isinstance(body, Disposed) and ticket_id in body.ticket_ids:
            return f"{body.outcome}: {body.cause}"
    for batch in ledger.lineage:
        if any(ticket_id in group.failed for group in batch.groups):
            return "failed in a trained group"
    return "lost" if ticket_id in ledger.lost else "unfinished"


def _unknown(records: RunRecords, ledger: Ledger, name: str) -> str:
    """Say what is wrong with an id and name a few that would do."""
    issued = [t for b in records.bodies if isinstance(b, Issued) for t in b.tickets]
    if any(ticket.ticket_id == name for ticket in issued):
        return f"ticket {name} was issued but has no terminal yet: there is nothing to explain"
    in_group = [ticket.ticket_id for ticket in issued if ticket.group_id == name]
    if in_group:
        return f"{name} is a group; its tickets are {', '.join(in_group)}"
    known = [facts.ticket_id for facts in records.terminals.values()]
    trained = (
        member.ticket_id
        for batch in reversed(ledger.lineage)
        for group in batch.groups
        if not group.no_loss
        for member in group.members[:1]
    )
    near = difflib.get_close_matches(name, known, n=_SUGGESTED, cutoff=0.8)
    some = near or list(islice(trained, _SUGGESTED)) or known[:_SUGGESTED]
    hint = f"; some that it has: {', '.join(some)}" if some else "; it has none at all"
    return f"run folder {records.run_dir}: no ticket or trajectory {name!r}{hint}"


# --- text
@dataclass(frozen=True)
class _Column:
    title: str
    value: Callable[[Token], str]
    rank: int = 0
    """The highest go first where the terminal is too narrow; 0 stays."""
    left: bool = False


_COLUMNS = (
    _Column("pos", lambda t: str(t.position)),
    _Column("token", lambda t: shown(t.text), left=True),
    _Column("turn", lambda t: str(t.turn + 1), 7),
    _Column("ver", lambda t: f"v{t.version}"),
    _Column("age", lambda t: "–" if t.age is None else str(t.age)),
    _Column("sampler", lambda t: _number(t.sampler, ".4f"), 4),
    _Column("old", lambda t: _number(t.old, ".4f"), 3),
    _Column("current", lambda t: _number(t.current, ".4f"), 2),
    _Column("D", lambda t: _number(t.d, ".3f")),
    _Column("S", lambda t: _number(t.s, ".3f")),
    _Column("W", lambda t: _number(t.weight, ".3f"), 8),
    _Column("old is", lambda t: t.status + (" mixed_kv" if t.mixed_kv else ""), 6, left=True),
    _Column("mask, clip", ends, left=True),
    _Column("A", lambda t: _number(t.advantage, "+.3f"), 5),
    _Column("dL/dl", lambda t: _number(t.gradient, "+.4f")),
    _Column("/denom", lambda t: _number(t.gradient_step, "+.1e"), 1),
)  # fmt: skip
_TOKEN_COLUMNS = 14
_MIN_COLUMNS = 40


def table(explained: Explained, columns: int) -> str:
    """Return the explanation as text of at most so many columns (40 at least)."""
    columns = max(columns, _MIN_COLUMNS)
    lines = _heading(explained)
    sampled = [token for token in explained.tokens if token.sampled]
    if sampled:
        lines.append("")
        lines += _token_lines(explained.tokens, sampled, columns)
        lines.append("")
    lines += [f"- {note}" for note in explained.notes]
    return "\n".join(folded for line in lines for folded in _wrapped(line, columns))


def _heading(e: Explained) -> list[str]:
    lines = [
        f"ticket {e.ticket_id} (group {e.group_id}, attempt {e.attempt_id}): {e.fate}; {e.status}"
        f"{'' if math.isnan(e.reward) else f', reward {e.reward:g}'}"
    ]
    if e.versions:
        versions = ", ".join(f"v{version}" for version in e.versions)
        lines.append(f"issued at v{e.issue_version}, sampled by {versions} ({e.purpose})")
    if e.batch_version is not None:
        lines.append(f"trained in the step from v{e.batch_version}, advantage {e.advantage:+.4f}")
    if e.objective:
        corrections = ", ".join(e.corrections) or "none"
        lines.append(
            f"route {e.route}; corrections on D: {corrections}; objective {e.objective}, "
            f"{e.aggregation}"
        )
    for number, place in enumerate(e.places):
        if place is not None:
            lines.append(
                f"sequence {number}: minibatch {place.minibatch + 1} of {place.minibatches}, with "
                f"{place.num_tokens:.0f} loss tokens of {place.num_sequences:.0f} trajectories"
            )
    return lines


def _token_lines(tokens: Sequence[Token], sampled: Sequence[Token], columns: int) -> list[str]:
    """Lay the tokens out; a run of prompt and environment tokens takes one line."""
    shown_columns = list(_COLUMNS)
    while True:
        cells = {id(t): [column.value(t) for column in shown_columns] for t in sampled}
        widths = [
            min(
                max(width(column.title), *(width(row[i]) for row in cells.values())),
                _TOKEN_COLUMNS if column.title == "token" else columns,
            )
            for i, column in enumerate(shown_columns)
        ]
        if sum(widths) + 2 * (len(widths) - 1) <= columns:
            break
        droppable = [column for column in shown_columns if column.rank]
        if not droppable:
            break
        shown_columns.remove(max(droppable, key=lambda column: column.rank))
    hidden = [column.title for column in _COLUMNS if column not in shown_columns]
    lines = [_row([c.title for c in shown_columns], shown_columns, widths, columns)]
    context: list[Token] = []
    previous: Token | None = None
    for token in tokens:
        if previous is not None and token.sequence != previous.sequence:
            lines += [*_context(context, columns), f"-- sequence {token.sequence}"]
            context = []
        previous = token
        if not token.sampled:
            context.append(token)
            continue
        lines += _context(context, columns)
        context = []
        lines.append(_row(cells[id(token)], shown_columns, widths, columns))
    lines += _context(context, columns)
    if hidden:
        lines.append(f"(too narrow for: {', '.join(hidden)}; all of it: --json)")
    return lines


def _row(
    cells: Sequence[str], shown_columns: Sequence[_Column], widths: Sequence[int], columns: int
) -> str:
    parts = [
        fit(cell, size) if column.left else cell.rjust(size)
        for cell, column, size in zip(cells, shown_columns, widths, strict=True)
    ]
    line = "  ".join(parts).rstrip()
    return line if width(line) <= columns else fit(line, columns)


def _context(tokens: Sequence[Token], columns: int) -> list[str]:
    """Return one line for tokens that nobody sampled."""
    if not tokens:
        return []
    text = "".join(shown(token.text) for token in tokens)
    first, last = tokens[0].position, tokens[-1].position
    where = str(first) if first == last else f"{first}-{last}"
    line = f"{where}  ({len(tokens)} not sampled) {text}"
    return [line if width(line) <= columns else fit(line, columns).rstrip()]


def _wrapped(line: str, columns: int) -> list[str]:
    """Fold at spaces; table rows fit already."""
    lines: list[str] = []
    while width(line) > columns:
        cut = line.rfind(" ", 1, columns)
        cut = cut if cut > columns // 3 else columns
        lines.append(line[:cut].rstrip())
        line = "  " + line[cut:].lstrip()
    return [*lines, line]


def _number(value: float, form: str) -> str:
    return "–" if math.isnan(value) else format(value, form)
