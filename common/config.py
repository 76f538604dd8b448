"""Reads the three YAML files people write, strictly, and names every mistake by line.

YAML has ways to hide what a file says: a second `epsilon:` line that wins silently, `no` that
becomes false, `1e-5` that becomes text, anchors that expand without end. None of them passes
here. Scalars follow the YAML 1.2 core schema; models are frozen and know every key they accept.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from common.errors import Code, ConfigError

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "ConfigFileError",
    "Document",
    "Frozen",
    "Problem",
    "Rules",
    "beside",
    "load",
    "parse",
    "read",
    "read_text",
]

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 16
_MAX_DIGITS: Final = 40
_SHOWN: Final = 40
_TAG: Final = "kind"  # the key that tells which of several sections a mapping is

Key = str | int
Loc = tuple[Key, ...]
M = TypeVar("M", bound=BaseModel)


class Frozen(BaseModel):
    """A configuration section: no unknown keys, no conversions, no changes after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        defer_build=True,  # most commands read one kind of file, and import several
    )


@dataclass(frozen=True)
class Problem:
    """One mistake: where it stands (1-based) and what is wrong."""

    file: str
    line: int
    column: int
    where: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}: "
        return place + (f"{self.where}: {self.message}" if self.where else self.message)


class ConfigFileError(ConfigError):
    """Everything that is wrong with one file, in the order of its lines."""

    def __init__(self, code: Code, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(code, "\n".join(str(problem) for problem in self.problems))

    def report(self) -> str:
        """One line per mistake, in the form that editors jump to, then what to do."""
        return f"{self.message}\n  what to do ({self.code.label}): {self.remedy}"


class Rules:
    """Collects what a model's own rules find wrong, each at its own key.

    A model validator calls `require` for every rule and `done` at its end; the loader then
    points each complaint at the line of the key named.
    """

    TYPE: Final = "wardround_rules"

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def require(self, holds: bool, where: str, message: str) -> None:  # noqa: FBT001 - reads as a sentence
        """Note `message` against the key `where` (dotted, list items by number) unless it holds."""
        if not holds:
            self._found.append((where, message))

    def done(self) -> None:
        """Raise everything noted, as one error; nothing happens where every rule holds."""
        if self._found:
            summary = "; ".join(f"{where}: {message}" for where, message in self._found)
            raise PydanticCustomError(
                "wardround_rules", "{summary}", {"summary": summary, "problems": self._found}
            )


# ---------------------------------------------------------------------------- text -> nodes


class _Loader(yaml.SafeLoader):
    """PyYAML's composer with everything refused that can hide what a file says."""

    # Scalars are resolved in `_scalar`, after YAML 1.2, and not by PyYAML's 1.1 table.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own class attribute
    depth = 0

    def fetch_directive(self) -> None:
        raise _Forbidden(self.get_mark(), "directives are not accepted")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _Forbidden(event.start_mark, "aliases are not accepted: write the value again")
        if event.anchor is not None:
            raise _Forbidden(event.start_mark, "anchors are not accepted")
        if getattr(event, "tag", None) is not None:
            raise _Forbidden(event.start_mark, "tags are not accepted")
        if self.depth >= MAX_DEPTH:
            raise _Forbidden(event.start_mark, f"nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Forbidden(Exception):  # noqa: N818 - internal signal, turned into a ConfigFileError
    """A part of YAML that we refuse, at a place."""

    def __init__(self, mark: Any, message: str) -> None:
        super().__init__(message)
        self.mark = mark
        self.message = message


def _fail(code: Code, name: str, mark: Any, message: str) -> ConfigFileError:
    """The error for one mistake at a PyYAML mark (or at the start where there is none)."""
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (1, 1)
    return ConfigFileError(code, [Problem(name, line, column, "", message)])


def _position(text: str, index: int) -> tuple[int, int]:
    """1-based line and column of a character."""
    before = text[:index]
    return before.count("\n") + 1, index - (before.rfind("\n") + 1) + 1


def _compose(text: str, name: str) -> yaml.Node:
    """The node tree of one YAML document. Raises ConfigFileError, and nothing else."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_single_node()
    except _Forbidden as refusal:
        raise _fail(Code.CONFIG_FORBIDDEN, name, refusal.mark, refusal.message) from None
    except yaml.reader.ReaderError as error:
        line, column = _position(text, int(error.position))
        message = f"the character U+{ord(text[int(error.position)]):04X} is not accepted"
        raise ConfigFileError(
            Code.CONFIG_SYNTAX, [Problem(name, line, column, "", message)]
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = _one_line(error.problem or error.context or "not well-formed YAML")
        raise _fail(Code.CONFIG_SYNTAX, name, mark, message) from None
    except (ValueError, OverflowError):
        # PyYAML passes an escape like "\UFFFFFFFF" straight to chr().
        mark = None if loader is None else loader.get_mark()
        raise _fail(Code.CONFIG_SYNTAX, name, mark, "an escape that is not a character") from None
    finally:
        if loader is not None:
            loader.dispose()
    if node is None:
        raise _fail(Code.CONFIG_SYNTAX, name, None, "the file is empty")
    return node


def _one_line(text: str) -> str:
    """`text` on one line and of bounded length."""
    return " ".join(text.split())[:200]


# ---------------------------------------------------------------------------- nodes -> values

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SPECIAL: Final[Mapping[str, object]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{sign + word: float("inf") for sign in ("", "+") for word in (".inf", ".Inf", ".INF")},
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


def _scalar(node: yaml.ScalarNode) -> object:
    """The value of a scalar under the YAML 1.2 core schema."""
    text: str = node.value
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _Forbidden(node.start_mark, "an escape that is not a character")
    if node.style is not None:
        return text
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.fullmatch(text):
        if len(text) > _MAX_DIGITS:
            raise _Forbidden(node.start_mark, f"a number of more than {_MAX_DIGITS} characters")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text) if _FLOAT.fullmatch(text) else text


def _value(node: yaml.Node) -> object:
    """The plain value of a node tree. Raises _Forbidden on a key that is no text or not unique."""
    if isinstance(node, yaml.MappingNode):
        found: dict[str, object] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise _Forbidden(key_node.start_mark, "a key must be text")
            if key in lines:
                message = f"duplicate key {_shown(key)} (first at line {lines[key]})"
                raise _Forbidden(key_node.start_mark, message)
            lines[key] = key_node.start_mark.line + 1
            found[key] = _value(value_node)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    assert isinstance(node, yaml.ScalarNode)  # noqa: S101 - PyYAML has no fourth kind
    return _scalar(node)


def _follow(root: yaml.Node, loc: Loc) -> tuple[yaml.Node, yaml.Node, bool]:
    """The key and the value at `loc`, or those of the nearest level above; and whether found."""
    key_node = value_node = root
    for key in loc:
        step = _child(value_node, key)
        if step is None:
            return key_node, value_node, False
        key_node, value_node = step
    return key_node, value_node, True


def _child(node: yaml.Node, key: Key) -> tuple[yaml.Node, yaml.Node] | None:
    """The key and value nodes of one child."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if key_node.value == key:
                return key_node, value_node
    elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
        return node.value[key], node.value[key]
    return None


# ---------------------------------------------------------------------------- values -> models


@dataclass(frozen=True)
class Document:
    """One YAML file, read and composed but not yet held against a model."""

    name: str
    root: yaml.Node
    data: Mapping[str, Any]

    @property
    def format(self) -> str | None:
        """What the file says it is, or None where it does not say."""
        kind = self.data.get("format")
        return kind if isinstance(kind, str) else None

    def validate(self, model: type[M]) -> M:
        """The file as a `model`.

        Raises:
            ConfigFileError: with every mistake at its line; rules that join several sections
                are judged once each section stands on its own.
        """
        self._check_format(model)
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            details = error.errors(include_url=False)
        problems = [p for detail in _relevant(details) for p in self._problems(model, detail)]
        problems.sort(key=lambda problem: (problem.line, problem.column))
        raise ConfigFileError(Code.CONFIG_INVALID, problems)

    def _check_format(self, model: type[BaseModel]) -> None:
        """A file of another kind gets one answer, not one per key it does not know."""
        field = model.model_fields.get("format")
        known = get_args(field.annotation) if field is not None else ()
        if not known or self.format in known:
            return
        key_node, value_node, _ = _follow(self.root, ("format",))
        wanted = " or ".join(str(kind) for kind in known)
        got = "the key is missing" if self.format is None else f"got {_shown(self.format)}"
        mark = (value_node if self.format is not None else key_node).start_mark
        raise _fail(Code.CONFIG_FORMAT, self.name, mark, f"format: must be {wanted} ({got})")

    def _problems(self, model: type[BaseModel], detail: ErrorDetails) -> Iterator[Problem]:
        """One pydantic error as the problems it stands for."""
        tagged: Loc = tuple(detail["loc"])
        loc = _untagged(self.data, tagged)
        kind = detail["type"]
        if kind == Rules.TYPE:
            for where, message in detail["ctx"]["problems"]:
                tail = tuple(int(key) if key.isdigit() else key for key in where.split(".") if key)
                yield self._at((*loc, *tail), message)
            return
        if kind == "extra_forbidden":
            message = _unknown(str(loc[-1]), _fields(model, tagged[:-1]))
            yield self._at(loc, message, key=True)
            return
        if kind in {"union_tag_invalid", "union_tag_not_found"}:
            loc = (*loc, detail["ctx"]["discriminator"].strip("'"))
        missing = kind in {"missing", "union_tag_not_found"}
        yield self._at(loc, _message(detail), key=missing)

    def problem(self, loc: Loc, message: str) -> Problem:
        """A complaint of the caller about the value at `loc`, at its line."""
        return self._at(loc, message)

    def _at(self, loc: Loc, message: str, *, key: bool = False) -> Problem:
        """A problem at the value, the key, or the nearest level above that the file has."""
        key_node, value_node, found = _follow(self.root, loc)
        mark = (key_node if key or not found else value_node).start_mark
        where = ".".join(str(part) for part in loc)
        return Problem(self.name, mark.line + 1, mark.column + 1, where, message)


def _relevant(details: Sequence[ErrorDetails]) -> Iterator[ErrorDetails]:
    """Without the length complaint that pydantic adds when items of a list are themselves wrong."""
    for detail in details:
        depth = len(detail["loc"])
        inner = any(d["loc"][:depth] == detail["loc"] and len(d["loc"]) > depth for d in details)
        if not (detail["type"] == "too_short" and inner):
            yield detail


def _untagged(data: object, loc: Loc) -> Loc:
    """`loc` as the file has it: pydantic adds the kind that chose between two sections."""
    plain: list[Key] = []
    for key in loc:
        if isinstance(data, Mapping):
            if key not in data and data.get(_TAG) == key:
                continue
            data = data.get(str(key))
        elif isinstance(data, list) and isinstance(key, int) and key < len(data):
            data = data[key]
        else:
            data = None
        plain.append(key)
    return tuple(plain)


def _fields(annotation: object, loc: Loc) -> list[str]:
    """The keys that the section at `loc`, kinds included, accepts."""
    models = _models(annotation)
    named = loc and isinstance(loc[0], str)
    if named and not any(loc[0] in model.model_fields for model in models):
        chosen = [m for m in models if loc[0] in _kinds(m)]
        return [name for model in chosen for name in _fields(model, loc[1:])]
    if not loc:
        fields = [item for model in models for item in model.model_fields.items()]
        return [field.alias or name for name, field in fields]
    if isinstance(loc[0], int):
        return _fields(annotation, loc[1:])
    inner = [m.model_fields[loc[0]].annotation for m in models if loc[0] in m.model_fields]
    return [name for item in inner for name in _fields(item, loc[1:])]


def _kinds(model: type[BaseModel]) -> tuple[object, ...]:
    """The kinds that a section of several may be told by."""
    field = model.model_fields.get(_TAG)
    return () if field is None else get_args(field.annotation)


def _models(annotation: object) -> list[type[BaseModel]]:
    """The models that an annotation mentions: `Site` in `tuple[Site, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _unknown(key: str, known: Sequence[str]) -> str:
    """The message for a key that no section has."""
    close = difflib.get_close_matches(key[:100], known, n=1)
    if close:
        return f"unknown key (did you mean {close[0]}?)"
    return f"unknown key (known here: {', '.join(known)})" if known else "unknown key"


def _shown(value: object) -> str:
    """A value as the reader of a message may see it: short, printable, never a whole section."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = ascii(value) if not (isinstance(value, str) and value.isprintable()) else f"'{value}'"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_WORDS: Final[Mapping[str, str]] = {
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "finite_number": "must be a finite number",
}
_BOUNDS: Final[Mapping[str, tuple[str, str]]] = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}


def _message(detail: ErrorDetails) -> str:
    """A pydantic error in the words of this house."""
    kind, context, got = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind in {"missing", "union_tag_not_found"}:
        return "is missing"
    if kind == "union_tag_invalid":
        return f"must be {_choice(context['expected_tags'])} (got {_shown(context['tag'])})"
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{words} {context[key]:g} (got {_shown(got)})"
    if kind in _WORDS:
        return f"{_WORDS[kind]} (got {_shown(got)})"
    special: Mapping[str, Callable[[], str]] = {
        "literal_error": lambda: f"must be {context['expected']} (got {_shown(got)})",
        "string_type": lambda: _text_expected(got),
        "too_short": lambda: f"must list at least {context['min_length']} (got {len(got)})",
        "too_long": lambda: f"must list at most {context['max_length']} (got {len(got)})",
        "string_too_short": lambda: "must not be empty",
        "string_too_long": lambda: f"must have at most {context['max_length']} characters",
        "value_error": lambda: str(context["error"]),
    }
    if kind in special:
        return special[kind]()
    return f"{detail['msg'][:1].lower()}{detail['msg'][1:]} (got {_shown(got)})"


def _choice(tags: str) -> str:
    """Pydantic's list of tags as its list of literals reads: 'a' or 'b'."""
    return " or ".join(tags.rsplit(", ", 1))


def _text_expected(got: object) -> str:
    """Numbers and true/false become text by quoting, which is the usual slip."""
    if isinstance(got, bool | int | float):
        return f"must be text (got {_shown(got)}): write it in quotes"
    return f"must be text (got {_shown(got)})"


# ---------------------------------------------------------------------------- the door


def read_text(text: str, name: str) -> Document:
    """Compose `text`; `name` is what messages call it. Raises ConfigFileError."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise _fail(Code.CONFIG_UNREADABLE, name, None, f"longer than {MAX_BYTES // 1024} KiB")
    root = _compose(text, name)
    try:
        data = _value(root)
    except _Forbidden as refusal:
        raise _fail(Code.CONFIG_FORBIDDEN, name, refusal.mark, refusal.message) from None
    if not isinstance(data, dict):
        message = "the file must be a mapping of keys to values"
        raise _fail(Code.CONFIG_SYNTAX, name, root.start_mark, message)
    return Document(name, root, data)


def read(path: str | Path) -> Document:
    """Read and compose the file at `path`. Raises ConfigFileError, and nothing else."""
    name = str(path)
    raw = _bytes_of(Path(path), name)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1) + 1
        problem = Problem(name, line, column, "", "not UTF-8 text")
        raise ConfigFileError(Code.CONFIG_UNREADABLE, [problem]) from None
    return read_text(text, name)


def _bytes_of(path: Path, name: str) -> bytes:
    """The content of a regular file of bounded size."""
    reason: Literal["a folder, not a file", "not a regular file", "no such file"] | str  # noqa: PYI051
    try:
        if path.is_dir():
            reason = "a folder, not a file"
        elif path.exists() and not path.is_file():
            reason = "not a regular file"
        else:
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
            if len(raw) <= MAX_BYTES:
                return raw
            reason = f"longer than {MAX_BYTES // 1024} KiB"
    except FileNotFoundError:
        reason = "no such file"
    except PermissionError:
        reason = "not readable by this user"
    except (OSError, ValueError):  # ValueError: a zero byte in the path
        reason = "cannot be read"
    raise _fail(Code.CONFIG_UNREADABLE, name, None, reason)


def parse(text: str, name: str, model: type[M]) -> M:
    """`text` as a `model`; `name` is what messages call it. Raises ConfigFileError."""
    return read_text(text, name).validate(model)


def load(path: str | Path, model: type[M]) -> M:
    """The file at `path` as a `model`.

    Raises:
        ConfigFileError: with every mistake as `file:line:column: key: what is wrong`.
    """
    return read(path).validate(model)


def beside(config: str | Path, path: str) -> Path:
    """`path` as the file `config` means it: relative to the folder that `config` lies in."""
    return Path(config).parent / Path(path).expanduser()
