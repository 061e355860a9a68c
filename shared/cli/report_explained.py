"""The report's panel on one trajectory: its reading and a bounded number of its tokens."""

from __future__ import annotations

from typing import Any

from shared.cli.explained import Explained, Token, ends

Context = dict[str, Any]

_VERSION_COLOURS = ("blue", "amber", "violet", "green", "red")
_MAX_ROWS = 200
"""Of the table; the rest is a command away."""
_MAX_TEXT = 2000
"""Tokens of the running text, around the first sampled one."""
_LEAD = 400
"""Of these, at most so many before it."""


def trajectory(t: Explained | None) -> Context:
    """The explained trajectory's heading and rows."""
    if t is None:
        return {
            "t": None, "trajectory_reading": "", "version_colours": {}, "token_rows": [],
            "flow": [], "trajectory_notes": [],
        }  # fmt: skip
    colours = {v: _VERSION_COLOURS[i % len(_VERSION_COLOURS)] for i, v in enumerate(t.versions)}
    sampled = [token for token in t.tokens if token.sampled]
    flow = _flow(t.tokens)
    return {
        "t": t,
        "trajectory_reading": _reading(t),
        "version_colours": colours,
        "token_rows": _rows(sampled[:_MAX_ROWS]),
        "flow": flow,
        "trajectory_notes": [*t.notes, *_left_out(t, len(sampled), len(flow))],
    }


def _reading(t: Explained) -> str:
    return (
        f"Ticket {t.ticket_id} (group {t.group_id}), issued at v{t.issue_version}, sampled by "
        f"{' and '.join(f'v{v}' for v in t.versions)} on {', '.join(t.pods) or 'a rollout'}, "
        f"{t.status}, reward {t.reward:g}, advantage {t.advantage:+.3f}; trained in the step from "
        f"v{t.batch_version}. D = exp(old − sampler), S = exp(current − old), W what the "
        "corrections leave of D, dL/dℓ the gradient on the token's log-prob before and after the "
        "denominator; the audit's own forward stands beside the old log-prob."
    )


def _rows(tokens: list[Token]) -> list[Context]:
    rows: list[Context] = []
    previous: Token | None = None
    for token in tokens:
        switch = ""
        if previous is not None and token.version != previous.version:
            where = "inside the turn" if token.turn == previous.turn else "between turns"
            switch = (
                f"v{previous.version} → v{token.version} {where}: the prefix is recomputed under "
                f"v{token.version}, from here on tokens carry its stamp"
            )
        rows.append({"token": token, "switch": switch, "ends": ends(token)})
        previous = token
    return rows


def _flow(tokens: tuple[Token, ...]) -> tuple[Token, ...]:
    """Return the running text, cut to size; a long prompt shows its end."""
    first = next((i for i, token in enumerate(tokens) if token.sampled), 0)
    start = max(0, first - _LEAD) if len(tokens) > _MAX_TEXT else 0
    return tokens[start : start + _MAX_TEXT]


def _left_out(t: Explained, num_sampled: int, num_shown: int) -> list[str]:
    if num_sampled <= _MAX_ROWS and num_shown == len(t.tokens):
        return []
    return [
        f"shown: {min(num_sampled, _MAX_ROWS):,} of {num_sampled:,} sampled tokens, {num_shown:,} "
        f"of {len(t.tokens):,} in the text; all of them: lagwise explain {t.ticket_id}"
    ]
