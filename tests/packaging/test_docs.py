"""The documents keep their word: what they name is there, and what there is they name."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from common.crypto import labels
from common.errors import Code
from common.protocol import wire

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
NOT_BUILT = "not built yet"


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@cache
def functions_in(path: str) -> frozenset[str]:
    file = ROOT / path
    return (
        frozenset(re.findall(r"^def (\w+)", file.read_text(), re.MULTILINE))
        if file.is_file()
        else frozenset()
    )


def unknown_tests(text: str) -> list[str]:
    return [
        f"{path}::{name}" for path, name in NAMED.findall(text) if name not in functions_in(path)
    ]


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    section = text.split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_a_document_names_exists(name):
    assert unknown_tests(page(name)) == []


def test_control_a_test_that_does_not_exist_is_noticed():
    here = "tests/packaging/test_docs.py"
    text = f"`{here}::test_that_nobody_wrote` and `tests/gone.py::test_gone` and `{here}::unknown_tests`"
    assert unknown_tests(text) == [f"{here}::test_that_nobody_wrote", "tests/gone.py::test_gone"]


@pytest.mark.parametrize(
    ("name", "heading"), [("THREAT_MODEL.md", "Threats"), ("PROTOCOL.md", "10. ")]
)
def test_every_row_names_a_test_or_says_that_it_is_not_built(name, heading):
    table = rows(page(name), heading)
    assert len(table) >= 14
    assert [row[0] for row in table] == [str(number + 1) for number in range(len(table))]
    empty = [row[0] for row in table if not NAMED.search(row[-1]) and row[-1] != NOT_BUILT]
    assert empty == []


def test_the_protocol_names_every_label():
    known = {value for name, value in vars(labels).items() if name.isupper()}
    table = page("PROTOCOL.md").split("## 3. ", 1)[1].split("## 4. ", 1)[0]
    named = {f"wardround/v1/{label}" for label in re.findall(r"`([a-z-]+)`", table)}
    assert known - named == set()


@pytest.mark.parametrize(
    "kind",
    [*wire.FROM_COORDINATOR, *wire.STATEMENTS, *wire.UPLOADS, wire.Head, wire.Receipt, wire.Header, wire.Link,
     wire.Encapsulations],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_the_protocol_names_every_message_and_every_field_of_it_in_order(kind):
    text = page("PROTOCOL.md")
    line = re.search(rf"^\| (?:↳ )?{kind.__name__}\b[^|]*\| (.*) \|$", text, re.MULTILINE)
    assert line is not None, "no row for this message"
    described, at = line[1], 0
    for name, _ in kind.FIELDS:
        found = re.search(rf"\b{name}\b", described[at:])
        assert found is not None, f"field {name} is missing or out of order"
        at += found.end()


@pytest.mark.parametrize("name", PAGES)
def test_every_error_code_that_a_document_names_exists(name):
    known = {code.label for code in Code}
    named = set(re.findall(r"\bWR-\d{4}\b", page(name)))
    assert named - known == set()


def test_the_protocol_names_every_code_of_handshakes_and_rounds():
    text = page("PROTOCOL.md")
    own = {code.label for code in Code if code.label.startswith(("WR-41", "WR-42"))}
    assert {label for label in own if label not in text} == set()
