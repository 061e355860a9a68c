"""`lagwise explain` at the terminal: ids, help, table, JSON, the report's panel, gaps."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shared.cli import explain, report_explained
from shared.cli.explained import Explained
from shared.cli.ledger import of_run
from shared.cli.main import main
from shared.cli.records import load
from shared.cli.token_text import fit, shown, width
from tests.cli.explain_world import (
    configure,
    crafted,
    pick,
    sampled,
)
from tests.cli.synthetic_run import Spec, SyntheticRun, build

HEAD_KEYS = {
    "schema", "ticket_id", "attempt_id", "group_id", "purpose", "fate", "status", "issue_version",
    "versions", "reward", "advantage", "pods", "switch_inside_turn", "batch_version", "route",
    "old_source", "corrections", "objective", "aggregation", "places", "notes", "tokens",
}  # fmt: skip
TOKEN_KEYS = {
    "sequence", "position", "token_id", "text", "sampled", "turn", "version", "age", "sampler",
    "old", "status", "mixed_kv", "current", "reference", "log_d", "log_s", "d", "s", "weight",
    "in_loss", "masked", "clipped", "truncated", "advantage", "gradient", "gradient_step",
}  # fmt: skip


@pytest.fixture
def run() -> SyntheticRun:
    return build(Spec(versions=4))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(Spec(versions=4)).write(tmp_path_factory.mktemp("runs") / "run")


def test_an_unknown_id_is_one_line_with_ids_that_would_do(
    honest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "nowhere", str(honest)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "no ticket or trajectory 'nowhere'; some that it has: t" in line
    named = line.split(": ")[-1].strip().split(", ")
    assert len(named) == 5
    assert main(["explain", named[0], str(honest)]) == 0
    assert main(["explain", "g00000", str(honest)]) == 2
    assert "is a group; its tickets are t" in capsys.readouterr().err
    assert main(["explain", "t1", str(honest / "nothing")]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_the_help_names_the_id_and_the_default_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["explain", "--help"])
    text = capsys.readouterr().out
    assert "ID" in text
    assert "runs/demo" in text
    assert "--json" in text


def test_the_json_has_these_keys_and_no_nan(
    honest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = load(honest)
    ticket = of_run(records).lineage[1].groups[0].members[0].ticket_id
    assert main(["explain", ticket, str(honest), "--json"]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    tree = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert tree["schema"] == 1
    assert set(tree) == HEAD_KEYS
    assert all(set(token) == TOKEN_KEYS for token in tree["tokens"])
    assert all(
        place is None
        or set(place) == {"minibatch", "minibatches", "num_tokens", "num_sequences", "horizon"}
        for place in tree["places"]
    )
    assert "".join(t["text"] for t in tree["tokens"]).startswith("SFFF\nFHFH\n")
    assert tree["tokens"][0]["turn"] is None
    assert [t["position"] for t in tree["tokens"]] == list(range(len(tree["tokens"])))


def test_an_attempt_id_finds_its_trajectory(run: SyntheticRun, tmp_path: Path) -> None:
    _, _, member = pick(run, lambda b, g, m: True)
    terminal = run.terminals[member.terminal_seq]
    run.terminals[member.terminal_seq] = terminal.model_copy(update={"attempt_id": "env-0-abc"})
    assert explain.run(run.write(tmp_path / "run"), "env-0-abc").ticket_id == member.ticket_id


@pytest.mark.parametrize("columns", [40, 80, 100, 200])
def test_the_table_fits_the_terminal(honest: Path, columns: int) -> None:
    member = of_run(load(honest)).lineage[2].groups[0].members[0]
    text = explain.table(explain.run(honest, member.ticket_id), columns)
    assert max(width(line) for line in text.splitlines()) <= columns
    assert "not sampled) SFFF⏎" in text
    assert ("too narrow for: " in text) == (columns < 200)
    assert "recomputed" in text


def test_text_of_tokens_cannot_steer_a_terminal() -> None:
    assert shown("a b\n\x1b[2J") == "a·b⏎\\x1b[2J"
    assert width("日本") == 4
    assert fit("日本語", 5) == "日本…"
    assert fit("ab", 4) == "ab  "


def test_a_missing_version_leaves_masks_and_says_what_is_unknown(
    run: SyntheticRun, tmp_path: Path
) -> None:
    batch, _, member = pick(run, lambda b, g, m: m.advantage > 0)
    crafted(run, member, batch.version, [6.0], [])
    run_dir = run.write(tmp_path / "run")
    (run_dir / "archive" / "versions" / f"{batch.version:06d}.safetensors").unlink()
    explained = explain.run(run_dir, member.ticket_id)
    tokens = sampled(explained)
    assert tokens[0].masked == ("token_high",)
    assert all(math.isnan(t.s) and math.isnan(t.gradient) and not t.clipped for t in tokens)
    assert any(f"version {batch.version} cannot be read" in note for note in explained.notes)


def test_a_configuration_of_another_release_is_named(run: SyntheticRun, tmp_path: Path) -> None:
    _, _, member = pick(run, lambda b, g, m: True)
    run_dir = configure(run.write(tmp_path / "run"), learner={"algo": {"clipp": 1}})
    explained = explain.run(run_dir, member.ticket_id)
    assert "`learner.algo.clipp` is not a known key" in explained.notes[0]
    assert all(math.isnan(t.gradient) and not math.isnan(t.log_s) for t in sampled(explained))


def test_the_report_shows_a_bounded_number_of_tokens(honest: Path) -> None:
    member = of_run(load(honest)).lineage[2].groups[0].members[0]
    explained = explain.run(honest, member.ticket_id)
    long = Explained(**{**vars_of(explained), "tokens": explained.tokens * 200})
    panel = report_explained.trajectory(long)
    assert len(panel["token_rows"]) == 200
    assert len(panel["flow"]) == 2000
    assert f"lagwise explain {member.ticket_id}" in panel["trajectory_notes"][-1]
    short = report_explained.trajectory(explained)
    assert len(short["flow"]) == len(explained.tokens)
    assert short["trajectory_notes"] == list(explained.notes)


def vars_of(explained: Explained) -> dict[str, Any]:
    return {name: getattr(explained, name) for name in Explained.__dataclass_fields__}
