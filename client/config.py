"""`site.yaml`: what one hospital decides alone, and no study and no coordinator can change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from common.address import split_address
from common.config import Frozen, Rules, beside
from common.fields import FilePath, Listed, Name, Text
from common.study import MAX_SITES, MIN_SITES
from common.tasks.cases import SystemChoice

__all__ = [
    "FORMAT",
    "Budget",
    "Ceilings",
    "ColumnNames",
    "DataFiles",
    "Link",
    "SiteConfig",
    "Window",
]

FORMAT: Final = "wardround-site/1"


def _any_or_list(value: Any) -> Any:
    """The word `any` opens a list on purpose; an empty value must not do so by accident."""
    if value == "any":
        return None
    if value is None:
        raise ValueError("must be a list of digests, or the word any (got nothing)")
    return value


_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# None stands for the word `any`.
Approved = Annotated[
    Annotated[Listed[_Digest], Field(max_length=1000)] | None, BeforeValidator(_any_or_list)
]


class ColumnNames(Frozen):
    """This hospital's own column names, where they differ from the study's."""

    patient: Text | None = Field(None, description="who the record is about")
    text: Text | None = Field(None, description="the clinical note")
    label: Text | None = Field(None, description="the diagnosis")


class DataFiles(Frozen):
    """Where this hospital's records lie."""

    files: Annotated[Listed[FilePath], Field(max_length=10_000)] = Field(
        (), description="CSV, Parquet or NDJSON; relative to the folder of this file"
    )
    columns: ColumnNames = Field(ColumnNames(), description="own names of the study's columns")
    system: SystemChoice | None = Field(
        None, description="instead of files: the hospital's system; studies say what is a case"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        either = bool(self.files) != (self.system is not None)
        rules.require(either, "files", "is missing: name files, or a system; not both")
        told = "has no effect with a system; remove it"
        rules.require(self.system is None or self.columns == ColumnNames(), "columns", told)
        rules.done()
        return self


class Budget(Frozen):
    """What all studies together may ever spend on one patient of this hospital."""

    epsilon: float = Field(gt=0, le=100, description="cap of the privacy ledger")
    delta: float = Field(gt=0, lt=1e-3, description="at this delta; well below 1 / patients")


class Ceilings(Frozen):
    """The most that one study may ask for; a study beyond them is refused, never trimmed."""

    epsilon: float = Field(gt=0, le=100, description="largest privacy.epsilon of one study")
    delta: float = Field(1e-5, gt=0, lt=1e-3, description="largest privacy.delta")
    rounds: int = Field(ge=1, le=10_000, description="largest training.rounds")
    minimum_sites: int = Field(
        MIN_SITES, ge=MIN_SITES, le=MAX_SITES, description="fewest hospitals in a study"
    )
    require_privacy: bool = Field(
        default=True, description="refuse studies with privacy.mode: none"
    )
    accept_joint: bool = Field(
        default=True,
        description="accept privacy.mode: joint, whose epsilon counts on other hospitals' noise",
    )
    approved_studies: Approved = Field(
        description="digests of studies that this hospital has reviewed, or any"
    )
    approved_backbones: Approved = Field(
        None, validate_default=False, description="digests of model folders, or any"
    )
    approved_code: Approved = Field(
        None, validate_default=False, description="digests of releases, or any"
    )


def _proxy(value: str) -> str:
    scheme, _, address = value.partition("://")
    if scheme != "http" or "@" in address:
        raise ValueError(f"must be http://host:port, without a password (got {value[:70]!a})")
    split_address(address)
    return value


class Window(Frozen):
    """The local hours in which large transfers may run; it may pass midnight."""

    start: int = Field(alias="from", ge=0, le=23, description="first hour, 0 to 23")
    end: int = Field(alias="to", ge=0, le=24, description="the hour it ends at, 0 to 24")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.start != self.end, "to", "is also `from`: the window is empty")
        rules.done()
        return self


class Link(Frozen):
    """How this hospital reaches the coordinator; the address itself comes from the invite."""

    proxy: Annotated[str, Field(max_length=300), AfterValidator(_proxy)] | None = Field(
        None, description="HTTPS proxy, http://host:port; absent: HTTPS_PROXY of the environment"
    )
    megabits: float | None = Field(
        None, gt=0, le=100_000, description="most megabits per second, each way; absent: no limit"
    )
    window: Window | None = Field(
        None, description="local hours of large transfers; absent: always"
    )

    @property
    def bits_per_second(self) -> int | None:
        """The bandwidth cap."""
        return None if self.megabits is None else max(1, round(self.megabits * 1_000_000))

    @property
    def hours(self) -> tuple[int, int] | None:
        """The window's first hour, and the one it ends at."""
        return None if self.window is None else (self.window.start, self.window.end)


class SiteConfig(Frozen):
    """One hospital's own settings."""

    format: Literal["wardround-site/1"] = Field(description="this file's kind and version")
    site: Name = Field(description="this hospital's id in the roster")
    data: DataFiles = Field(description="the hospital's records")
    state: FilePath = Field(
        description="folder of keys, journal, ledger and audit log; one for each patient "
        "population, on a disk that is not rolled back"
    )
    budget: Budget = Field(description="what all studies together may spend")
    ceilings: Ceilings = Field(description="what one study may ask for")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where training runs")
    knowledge: FilePath | None = Field(
        None, description="folder of the knowledge graphs that studies may name; absent: none"
    )
    link: Link = Field(Link(), description="how this hospital reaches the coordinator")
    kill_switch: FilePath | None = Field(
        None, description="a file whose existence stops all training; absent: STATE/stop"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(
            self.ceilings.epsilon <= self.budget.epsilon,
            "ceilings.epsilon",
            f"is more than all studies together may spend ({self.budget.epsilon:g})",
        )
        rules.done()
        return self

    def state_folder(self, config: str | Path) -> Path:
        """The state folder as the file `config` means it."""
        return beside(config, self.state)

    def knowledge_folder(self, config: str | Path) -> Path | None:
        """The folder of knowledge graphs as the file `config` means it."""
        return None if self.knowledge is None else beside(config, self.knowledge)

    def kill_switch_file(self, config: str | Path) -> Path:
        """The kill switch as the file `config` means it."""
        if self.kill_switch is None:
            return self.state_folder(config) / "stop"
        return beside(config, self.kill_switch)
