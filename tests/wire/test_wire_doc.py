"""docs/wire.md says what the code says."""

from __future__ import annotations

from pathlib import Path

from shared.cli import wire_doc
from shared.wire.base import Message

ROOT = Path(__file__).parents[2]


def test_the_document_is_current(capsys):
    assert wire_doc.main(["--check", "--file", str(ROOT / "docs/wire.md")]) == 0, (
        "run `python -m shared.cli.wire_doc --write`"
    )


def test_every_message_says_from_whom_to_whom_and_names_its_fields():
    text = wire_doc.render()
    types = wire_doc.message_types()
    assert set(types) == set(Message.__subclasses__())
    for cls in types:
        assert " -> " in (cls.__doc__ or "").splitlines()[0]
        for name in cls.model_fields:
            assert f"| `{name}` |" in text


def test_a_stale_document_fails_the_check_and_writing_heals_it_keeping_the_prose(tmp_path, capsys):
    document = tmp_path / "wire.md"
    document.write_text("# The wire\n\nProse.\n")
    assert wire_doc.main(["--check", "--file", str(document)]) == 1
    assert "wire_doc --write" in capsys.readouterr().err
    assert wire_doc.main(["--write", "--file", str(document)]) == 0
    assert wire_doc.main(["--check", "--file", str(document)]) == 0
    once = document.read_text()
    assert once.startswith("# The wire\n\nProse.\n")
    document.write_text(once.replace("`ticket_id`", "`ticket_nr`"))
    assert wire_doc.main(["--check", "--file", str(document)]) == 1
    assert wire_doc.main(["--write", "--file", str(document)]) == 0
    assert document.read_text() == once
