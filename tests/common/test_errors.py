"""Every code once, every code explained, the page in docs/ up to date."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from common import errors
from common.check import BLOCKS, errors_markdown
from common.cli import EXIT_STATUS
from common.errors import Code, WardroundError

ROOT = Path(__file__).parents[2]
LEAVES = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, WardroundError) and cls is not WardroundError
]


def test_every_code_has_a_label_of_its_own() -> None:
    labels = [code.label for code in Code]
    assert len(labels) == len(set(labels))
    # An Enum folds two equal members into one: the file itself must not list one twice.
    written = re.findall(r'"(WR-\d{4})"', (ROOT / "common/codes.py").read_text())
    assert sorted(written) == sorted(labels)


@pytest.mark.parametrize("code", list(Code), ids=lambda code: code.label)
def test_every_code_says_what_is_wrong_and_what_to_do(code: Code) -> None:
    assert re.fullmatch(r"WR-\d{4}", code.label)
    assert code.label[3:5] in BLOCKS
    for text in (code.meaning, code.remedy):
        assert text[0].isupper() or text[0] == "`" or text.startswith("pip ")
        assert text.endswith((".", ")"))
        assert "\n" not in text


def test_the_page_of_errors_is_up_to_date() -> None:
    page = (ROOT / "docs/ERRORS.md").read_text()
    assert page == errors_markdown(), "run `wardround errors --markdown > docs/ERRORS.md`"


def test_the_page_lists_every_code_once() -> None:
    page = errors_markdown()
    for code in Code:
        assert page.count(f"| {code.label} |") == 1


def test_every_kind_of_fault_has_an_exit_status_of_its_own_that_is_documented() -> None:
    statuses = [cls.exit_status for cls in LEAVES]
    assert len(statuses) == len(set(statuses)) == 6
    assert set(statuses) <= set(EXIT_STATUS)
    assert 0 not in statuses


def test_an_error_carries_its_code_and_the_better_remedy() -> None:
    error = errors.RefusedError(Code.APPROVAL_STOPPED, "No.", remedy="Yes.")
    assert str(error) == "WR-3101: No."
    assert error.report() == "WR-3101: No.\n  what to do: Yes."
    plain = errors.RefusedError(Code.APPROVAL_STOPPED, "No.")
    assert plain.remedy == Code.APPROVAL_STOPPED.remedy


def _given(source: str) -> set[str]:
    """The codes that a source raises or tells; one that it only compares with is not among them."""
    tree = ast.parse(source)
    compared = {
        id(node)
        for comparison in ast.walk(tree)
        if isinstance(comparison, ast.Compare)
        for node in ast.walk(comparison)
    }
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Code"
        and id(node) not in compared
    }


def _named(text: str) -> set[str]:
    """The codes that a text names, by `Code.NAME` or by label."""
    words = set(re.findall(r"\bCode\.(\w+)|\b(WR-\d{4})\b", text))
    told = {part for pair in words for part in pair}
    return {code.name for code in Code if code.name in told or code.label in told}


def test_every_code_is_raised_somewhere() -> None:
    sources = [
        path.read_text()
        for package in ("common", "client", "server")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "codes.py"
    ]
    given = set().union(*(_given(source) for source in sources))
    assert [code.name for code in Code if code.name not in given] == []


def test_every_code_is_named_by_a_test_of_what_raises_it() -> None:
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    named = _named("\n".join(path.read_text() for path in tests))
    assert [code.name for code in Code if code.name not in named] == []


def test_control_a_code_that_nobody_raises_or_names_is_found() -> None:
    source = (
        "def f(error):\n    if error.code is Code.USAGE:\n        raise E(Code.ROUND_KIND, 'x')\n"
    )
    assert _given(source) == {"ROUND_KIND"}
    assert _named("Code.ROUND_KINDS, ROUND_KIND, WR-42, WR-42041, xWR-4204") == set()
    assert _named("Code.ROUND_KIND") == _named('"WR-4204"') == {"ROUND_KIND"}
