"""The strict loader: every mistake by line, nothing hidden, nothing but ConfigError."""

from __future__ import annotations

from typing import Annotated, Self

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from common.config import (
    MAX_BYTES,
    ConfigFileError,
    Frozen,
    Rules,
    beside,
    load,
    parse,
    read_text,
)
from common.errors import Code, ConfigError
from common.fields import Listed
from common.study import Study

MINIMAL = """\
format: wardround-study/1
name: trial
task:
  kind: diagnosis
  labels: [flu, cold]
model:
  backbone: hub/model
privacy:
  mode: local
  epsilon: 3
  delta: 1e-5
  clip_norm: 1
sites:
  - id: st-mary
  - id: lakeside
  - id: harbour
"""


class Inner(Frozen):
    rate: float = 0.5
    count: int = 1
    ready: bool = False


class Outer(Frozen):
    name: str = "x"
    number: float | None = None
    inner: Inner = Inner()
    items: Annotated[Listed[Inner], Field(max_length=3)] = ()

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.inner.count < 100, "inner.count", "is a hundred or more")
        for index, item in enumerate(self.items):
            rules.require(item.count < 100, f"items.{index}.count", "is a hundred or more")
        rules.done()
        return self


def lines_of(text: str, model: type[Frozen] = Study) -> list[str]:
    with pytest.raises(ConfigFileError) as caught:
        parse(text, "study.yaml", model)
    return [str(problem) for problem in caught.value.problems]


def changed(old: str, new: str) -> str:
    assert MINIMAL.count(old) == 1
    return MINIMAL.replace(old, new)


# Each planted mistake with every message it must give, exactly.
MISTAKES = [
    (
        changed("  epsilon: 3\n", "  epsion: 3\n"),
        ["study.yaml:10:3: privacy.epsion: unknown key (did you mean epsilon?)"],
    ),
    (
        changed("name: trial\n", "name: trial\nrounds: 3\n"),
        [
            (
                "study.yaml:3:1: rounds: unknown key (known here: format, name, task, model, training, "
                "aggregation, privacy, evaluation, acceptance, sites, quorum, deadlines, cases, simulation)"
            )
        ],
    ),
    (
        changed("  epsilon: 3\n", ""),
        ["study.yaml:8:1: privacy.epsilon: is needed with mode: local"],
    ),
    (
        changed("name: trial\n", ""),
        ["study.yaml:1:1: name: is missing"],
    ),
    (
        changed("  backbone: hub/model\n", "  tuning: head\n"),
        ["study.yaml:6:1: model.backbone: is missing"],
    ),
    (
        changed("  - id: lakeside\n", "  - weight: 2\n"),
        ["study.yaml:15:5: sites.1.id: is missing"],
    ),
    (
        changed("epsilon: 3", "epsilon: '3'"),
        ["study.yaml:10:12: privacy.epsilon: must be a number (got '3')"],
    ),
    (
        changed("epsilon: 3", "epsilon: yes"),
        ["study.yaml:10:12: privacy.epsilon: must be a number (got 'yes')"],
    ),
    (
        changed("epsilon: 3", "epsilon: true"),
        ["study.yaml:10:12: privacy.epsilon: must be a number (got true)"],
    ),
    (
        changed("epsilon: 3", "epsilon: .inf"),
        ["study.yaml:10:12: privacy.epsilon: must be a finite number (got inf)"],
    ),
    (
        changed("epsilon: 3", "epsilon: 1e999"),
        ["study.yaml:10:12: privacy.epsilon: must be a finite number (got inf)"],
    ),
    (
        changed("epsilon: 3", "epsilon:"),
        ["study.yaml:10:11: privacy.epsilon: is needed with mode: local"],
    ),
    (
        changed("delta: 1e-5", "delta: 0.01"),
        ["study.yaml:11:10: privacy.delta: must be less than 0.001 (got 0.01)"],
    ),
    (
        changed("clip_norm: 1", "clip_norm: 0"),
        ["study.yaml:12:14: privacy.clip_norm: must be at least 0.001 (got 0)"],
    ),
    (
        changed("mode: local", "mode: central"),
        ["study.yaml:9:9: privacy.mode: must be 'joint', 'local' or 'none' (got 'central')"],
    ),
    (
        changed("labels: [flu, cold]", "labels: [flu]"),
        ["study.yaml:5:11: task.labels: must list at least 2 (got 1)"],
    ),
    (
        changed("labels: [flu, cold]", "labels: [0, 1]"),
        [
            "study.yaml:5:12: task.labels.0: must be text (got 0): write it in quotes",
            "study.yaml:5:15: task.labels.1: must be text (got 1): write it in quotes",
        ],
    ),
    (
        changed("labels: [flu, cold]", "labels: flu"),
        ["study.yaml:5:11: task.labels: must be a list (got 'flu')"],
    ),
    (
        changed("name: trial", "name: [a]"),
        ["study.yaml:2:7: name: must be text (got a list)"],
    ),
    (
        changed("task:\n  kind: diagnosis\n  labels: [flu, cold]\n", "task: 7\n"),
        ["study.yaml:3:7: task: must be a mapping of keys to values (got 7)"],
    ),
    (
        MINIMAL + "training: {rounds: 2.5}\n",
        ["study.yaml:17:20: training.rounds: must be a whole number (got 2.5)"],
    ),
    (
        MINIMAL + "aggregation: {ring_bits: 16}\n",
        ["study.yaml:17:26: aggregation.ring_bits: must be 24 or 32 (got 16)"],
    ),
]


@pytest.mark.parametrize(("text", "expected"), MISTAKES)
def test_a_mistake_is_named_with_file_line_column_key_and_fix(
    text: str, expected: list[str]
) -> None:
    assert lines_of(text) == expected


def test_the_study_that_the_mistakes_were_planted_in_is_right() -> None:
    study = parse(MINIMAL, "study.yaml", Study)
    assert study.privacy.delta == 1e-5
    assert study.privacy.epsilon == 3.0
    assert isinstance(study.privacy.epsilon, float)


def test_all_mistakes_of_a_file_come_at_once_and_in_the_order_of_its_lines() -> None:
    text = MINIMAL.replace("epsilon: 3", "epsion: 3").replace("hub/model", "''")
    text = text.replace("- id: harbour", "- id: Harbour!").replace("name: trial", "nam: trial")
    assert lines_of(text) == [
        "study.yaml:1:1: name: is missing",
        "study.yaml:2:1: nam: unknown key (did you mean name?)",
        "study.yaml:7:13: model.backbone: must not be empty",
        "study.yaml:10:3: privacy.epsion: unknown key (did you mean epsilon?)",
        (
            "study.yaml:16:9: sites.2.id: must be 1 to 63 of a-z, 0-9 and inner hyphens "
            "(got 'Harbour!')"
        ),
    ]


def test_a_rule_across_keys_points_at_the_key_it_names() -> None:
    text = "inner:\n  count: 100\nitems:\n  - {rate: 1}\n  - {count: 200}\n"
    assert lines_of(text, Outer) == [
        "study.yaml:2:10: inner.count: is a hundred or more",
        "study.yaml:5:13: items.1.count: is a hundred or more",
    ]


def test_a_rule_about_a_default_points_at_the_nearest_section_in_the_file() -> None:
    text = changed("  labels: [flu, cold]\n", "  labels: [a, b]\n  max_tokens: 32\n")
    text = text.replace("  max_tokens: 32\n", "  max_tokens: 32\n  long_notes: window\n")
    (line,) = lines_of(text)
    assert line.startswith("study.yaml:3:1: task.window_stride: must be less than max_tokens (32)")


# YAML that hides what it says, the message, and what PyYAML makes of it.
HIDING = [
    ("name: a\nname: b\n", "2:1: duplicate key 'name' (first at line 1)", {"name": "b"}),
    (
        "inner: {count: 1, count: 2}\n",
        "1:19: duplicate key 'count' (first at line 1)",
        {"inner": {"count": 2}},
    ),
    ("name: &x hidden\n", "1:7: anchors are not accepted", {"name": "hidden"}),
    ("a: &x 1\nb: *x\n", "1:4: anchors are not accepted", {"a": 1, "b": 1}),
    ("b: *x\n", "1:4: aliases are not accepted: write the value again", None),
    ("name: !!str 5\n", "1:7: tags are not accepted", {"name": "5"}),
    ("name: ! 5\n", "1:7: tags are not accepted", {"name": 5}),
    ("%YAML 1.1\n---\nname: a\n", "1:1: directives are not accepted", {"name": "a"}),
    ("1: a\n", "1:1: a key must be text", {1: "a"}),
    ("? [a]\n: b\n", "1:3: a key must be text", None),
    ("null: a\n", "1:1: a key must be text", {None: "a"}),
    ("name: " + "[" * 16 + "]" * 16, "1:22: nested deeper than 16 levels", ...),
    ("number: " + "9" * 41, "1:9: a number of more than 40 characters", {"number": int("9" * 41)}),
    ('name: "\\ud800"', "1:7: an escape that is not a character", ...),
]


@pytest.mark.parametrize(("text", "message", "accepted"), HIDING)
def test_yaml_that_hides_what_it_says_is_refused(text: str, message: str, accepted: object) -> None:
    with pytest.raises(ConfigFileError) as caught:
        parse(text, "f.yaml", Outer)
    assert caught.value.code is Code.CONFIG_FORBIDDEN
    assert [str(problem) for problem in caught.value.problems] == [f"f.yaml:{message}"]
    # Control: the plain loader takes it, so the refusal is ours.
    if accepted is None:
        with pytest.raises(yaml.YAMLError):
            yaml.safe_load(text)
    elif accepted is not ...:
        assert yaml.safe_load(text) == accepted
    else:
        yaml.safe_load(text)


SCALARS = [
    ("1e-5", 1e-5, "1e-5"),
    ("no", "no", False),
    ("on", "on", True),
    ("12:30:45", "12:30:45", 45045),
    ("0777", 777, 511),
    ("2026-11-23", "2026-11-23", ...),
    ("0o17", 15, "0o17"),
    ("0x1f", 31, 31),
    ("1_000", "1_000", 1000),
    ("+12", 12, 12),
    (".5", 0.5, 0.5),
    ("5.", 5.0, 5.0),
    ("-1.5E+3", -1500.0, -1500.0),
    ("true", True, True),
    ("True", True, True),
    ("~", None, None),
    ("", None, None),
    ("'1'", "1", "1"),
    ("=", "=", ...),
    ("<<", "<<", ...),
]


@pytest.mark.parametrize(("text", "value", "plain"), SCALARS)
def test_scalars_follow_yaml_1_2(text: str, value: object, plain: object) -> None:
    got = read_text(f"a: {text}\n", "f").data["a"]
    assert got == value
    assert type(got) is type(value)
    if plain is not ...:  # control: what YAML 1.1 makes of it, where PyYAML has an answer
        assert yaml.safe_load(f"a: {text}\n")["a"] == plain


SYNTAX = [
    ("", "1:1: the file is empty"),
    ("# nothing\n", "1:1: the file is empty"),
    ("- a\n", "1:1: the file must be a mapping of keys to values"),
    ("just text\n", "1:1: the file must be a mapping of keys to values"),
    ("a: [1\n", "2:1: expected ',' or ']', but got '<stream end>'"),
    ("a:\tb\n\tc: d\n", "1:3: found character '\\t' that cannot start any token"),
    ("a: \x07\n", "1:4: the character U+0007 is not accepted"),
    ("a: 1\n---\nb: 2\n", "2:1: but found another document"),
    ('"\\UFFFFFFFF": 1\n', "1:4: an escape that is not a character"),
]


@pytest.mark.parametrize(("text", "message"), SYNTAX)
def test_text_that_is_no_yaml_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(ConfigFileError) as caught:
        parse(text, "f.yaml", Outer)
    assert caught.value.code is Code.CONFIG_SYNTAX
    assert caught.value.message == f"f.yaml:{message}"


def test_a_file_of_another_kind_gets_one_answer(tmp_path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("format: wardround-site/1\nsite: a\n")
    with pytest.raises(ConfigFileError) as caught:
        load(path, Study)
    assert caught.value.code is Code.CONFIG_FORMAT
    assert caught.value.message == (
        f"{path}:1:9: format: must be wardround-study/1 (got 'wardround-site/1')"
    )
    with pytest.raises(ConfigFileError, match=r"1:1: format: must be .* \(the key is missing\)"):
        parse("site: a\n", "s.yaml", Study)


def test_what_cannot_be_read_is_a_config_error(tmp_path) -> None:
    (tmp_path / "bytes").write_bytes(b"name: a\nb: \xff\n")
    (tmp_path / "big").write_bytes(b"#" * (MAX_BYTES + 1))
    expected = {
        tmp_path: "a folder, not a file",
        tmp_path / "gone": "no such file",
        tmp_path / "bytes" / "below": "cannot be read",
        tmp_path / "bytes": "not UTF-8 text",
        tmp_path / "big": "longer than 256 KiB",
        "/dev/null": "not a regular file",
        "a\0b": "cannot be read",
    }
    for path, reason in expected.items():
        with pytest.raises(ConfigFileError) as caught:
            load(path, Outer)
        assert caught.value.code is Code.CONFIG_UNREADABLE
        assert caught.value.message.endswith(reason)
    with pytest.raises(ConfigFileError, match="bytes:2:4: not UTF-8"):
        load(tmp_path / "bytes", Outer)


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbfname: a\r\nnumber: 1\r\n")
    assert load(path, Outer) == Outer(name="a", number=1)


def test_a_message_never_shows_more_than_forty_characters_of_a_value() -> None:
    (line,) = lines_of("number: " + "x" * 5000, Outer)
    assert len(line) < 120
    (line,) = lines_of('number: "a\\nb\\e[31m"', Outer)
    assert "\n" not in line
    assert "\x1b" not in line


def test_a_loaded_file_cannot_be_changed() -> None:
    study = parse(MINIMAL, "s", Study)
    with pytest.raises(ValueError, match="frozen"):
        study.privacy.epsilon = 100.0  # type: ignore[misc]


def test_a_path_is_meant_relative_to_the_file_that_names_it() -> None:
    assert str(beside("configs/site.yaml", "data/a.csv")) == "configs/data/a.csv"
    assert str(beside("configs/site.yaml", "/data/a.csv")) == "/data/a.csv"


def only_config_error(text: str) -> None:
    for model in (Outer, Study):
        try:
            parse(text, "f.yaml", model)
        except ConfigError as error:
            assert len(error.message) < 200_000  # noqa: PT017


YAMLISH = st.text(
    alphabet=st.sampled_from(
        list("abn:-?[]{},#&*!|>'\"%@`\\ \t\n\r~.0123456789eExo<=+_Uu\ufeff\ud800\x85")
    ),
    max_size=120,
)


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=200), YAMLISH))
@example('"\\UFFFFFFFF"')
@example('"\\xg"')
@example("%YAML " + "9" * 5000 + ".1\n---\na: 1")
@example("a: " + "9" * 5000)
@example("\ud800: 1")
def test_random_text_never_raises_anything_but_a_config_error(text: str) -> None:
    only_config_error(text)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_study_never_raises_anything_but_a_config_error(data: st.DataObject) -> None:
    text = MINIMAL
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(len(text), start + 20)))
        text = text[:start] + data.draw(YAMLISH) + text[stop:]
    only_config_error(text)


@settings(max_examples=150, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "format",
                        "name",
                        "task",
                        "model",
                        "sites",
                        "id",
                        "privacy",
                        "simulation",
                        "faults",
                        "split",
                        "items",
                        "inner",
                        "count",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=25,
    )
)
def test_any_tree_of_values_never_raises_anything_but_a_config_error(tree: object) -> None:
    only_config_error(yaml.safe_dump(tree, allow_unicode=True))
    if isinstance(tree, dict):
        tree["format"] = "wardround-study/1"
        only_config_error(yaml.safe_dump(tree, allow_unicode=True))


EVIL = ["[" * 250_000, "{" * 250_000, "- " * 120_000, "? " * 120_000, "!" * 250_000, "a: " * 80_000]
EVIL += [
    "a: &a [&b [&c [*b,*b],*b],*b]",
    "#" * 250_000,
    '"' + "\\x41" * 60_000,
    "|" + "\n" * 250_000,
]


@pytest.mark.parametrize("text", EVIL, ids=lambda text: repr(text[:6]))
def test_text_made_to_exhaust_a_parser_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text, "f.yaml", Outer)


def test_control_the_plain_loader_recurses_until_it_dies_on_what_we_refuse() -> None:
    with pytest.raises(RecursionError):
        yaml.safe_load("[" * 20_000)
