"""Codes have one normal form, roll up by public tables, and what is none is counted."""

from __future__ import annotations

import pytest

from client.knowledge.codes import (
    CHAPTERS,
    CodeRollUp,
    ancestors,
    atc_group,
    category,
    chapter,
    normal,
    parse,
    public_set,
    system_of_icd,
    tagged,
)


@pytest.mark.parametrize(
    ("system", "code", "found"),
    [
        ("icd9", "4280", "428.0"),
        ("icd9", "428.0", "428.0"),
        ("icd9", " 25000 ", "250.00"),
        ("icd9", "486", "486"),
        ("icd9", "v4501", "V45.01"),
        ("icd9", "E8120", "E812.0"),
        ("icd9", "E9800", "E980.0"),
        ("icd10", "I509", "I50.9"),
        ("icd10", "e87.70", "E87.70"),
        ("icd10", "C4A.0", "C4A.0"),
        ("atc", "c07ab02", "C07AB02"),
        ("ndc", "0071-0155-23", "00071015523"),
        ("ndc", "00071-155-23", "00071015523"),
        ("rxnorm", "617318", "617318"),
    ],
)
def test_a_code_has_one_normal_form(system, code, found):
    assert normal(system, code) == found
    assert normal(system, found) == found


@pytest.mark.parametrize(
    ("system", "code"),
    [
        ("icd9", "38.9"),  # a procedure; the diagnosis is 038.9
        ("icd9", "000.1"),
        ("icd9", "428.000"),
        ("icd9", "E81.20"),
        ("icd9", "V92"),
        ("icd9", "I50.9"),
        ("icd9", ""),
        ("icd10", "428.0"),
        ("icd10", "E95"),
        ("icd10", "I50."),
        ("icd10", "I50.12345"),
        ("atc", "X01"),
        ("atc", "C07A0"),
        ("ndc", "0071015523"),  # ten digits: which segment lacks its zero?
        ("ndc", "071-155-23"),
        ("name", "heart failure"),
        ("icd9", "٤٢٨"),
    ],
)
def test_what_is_no_code_of_its_system_has_no_normal_form(system, code):
    assert normal(system, code) is None
    assert tagged(system, code) is None


@pytest.mark.parametrize(
    ("code", "system"),
    [
        ("428.0", "icd9"),
        ("486", "icd9"),
        ("I50.9", "icd10"),
        ("E87.0", "icd10"),
        ("E980.0", "icd9"),
        ("E812", None),  # ICD-9 accident, or ICD-10 E81.2 without its dot
        ("V45.01", None),
        ("nonsense", None),
    ],
)
def test_the_icd_of_a_code_is_told_by_its_form_or_not_at_all(code, system):
    assert system_of_icd(code) == system


@pytest.mark.parametrize(
    ("system", "code", "number"),
    [
        ("icd9", "001", 1),
        ("icd9", "139.8", 1),
        ("icd9", "140", 2),
        ("icd9", "428.0", 7),
        ("icd9", "V91", 18),
        ("icd9", "E000", 19),
        ("icd10", "B99", 1),
        ("icd10", "D49", 2),
        ("icd10", "D50", 3),
        ("icd10", "H59", 7),
        ("icd10", "H60", 8),
        ("icd10", "O9A", 15),
        ("icd10", "Y99", 20),
        ("icd10", "U07.1", 22),
    ],
)
def test_codes_roll_up_to_the_chapters_of_the_public_table(system, code, number):
    assert chapter(system, code) == number


@pytest.mark.parametrize("system", ["icd9", "icd10"])
def test_every_category_stands_in_exactly_one_chapter(system):
    heads = [name.partition(":")[2] for name in public_set(f"{system}:categories")]
    assert len(heads) == len(set(heads)) > 1500
    for head in heads:
        holding = [c for c in CHAPTERS[system] if len(c[0]) == len(head) and c[0] <= head <= c[1]]
        assert len(holding) == 1, head
        assert category(system, head) == head


def test_there_is_a_set_of_chapters_and_no_set_of_anything_else():
    assert public_set("icd9:chapters")[6] == "icd9:chapter-07"
    assert len(public_set("icd10:chapters")) == 22
    assert public_set("icd9:428.0") is None
    assert public_set("atc:categories") is None


def test_the_third_atc_level_has_four_characters():
    assert atc_group("C07AB02") == "C07A"
    assert [atc_group("C07AB02", level) for level in (1, 2, 3, 4, 5)] == [
        "C",
        "C07",
        "C07A",
        "C07AB",
        "C07AB02",
    ]
    assert atc_group("C07") is None
    assert atc_group("metoprolol") is None


def test_ancestors_go_from_the_code_to_its_chapter():
    assert ancestors("icd9:428.0") == ("icd9:428.0", "icd9:428", "icd9:chapter-07")
    assert ancestors("icd10:I10") == ("icd10:I10", "icd10:chapter-09")
    assert ancestors("atc:C07AB") == ("atc:C07AB", "atc:C07A", "atc:C07", "atc:C")
    assert ancestors("rxnorm:617318") == ("rxnorm:617318",)
    assert ancestors("icd9:chapter-07") == ("icd9:chapter-07",)


def test_a_code_says_its_system_or_takes_the_studys():
    assert parse("icd9:4280", "icd10") == "icd9:428.0"
    assert parse("4280", "icd9") == "icd9:428.0"
    assert parse("428.0", "icd") == "icd9:428.0"
    assert parse("V45.01", "icd") is None
    assert parse("sex:female", "none") == "sex:female"
    assert parse("icd9:I50", "none") is None


def test_what_cannot_be_rolled_up_is_counted_and_never_guessed():
    rolled = CodeRollUp("icd", "category")
    assert rolled(["428.0", "428.1", "I50.9", "V45.01", "38.9", "junk"]) == (
        "icd9:428",
        "icd10:I50",
    )
    assert rolled.counts == {"not a code of its system": 3}


@pytest.mark.parametrize(
    ("level", "found"),
    [
        ("exact", ("icd9:428.0", "icd9:486")),
        ("category", ("icd9:428", "icd9:486")),
        ("chapter", ("icd9:chapter-07", "icd9:chapter-08")),
    ],
)
def test_codes_roll_up_to_the_level_asked_for(level, found):
    assert CodeRollUp("icd9", level)(["4280", "486"]) == found
