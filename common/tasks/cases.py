"""The rules by which a study makes cases of encounters: public, signed, the same at every site.

A hospital's reader yields encounters (stays, visits); these rules say which of them qualify, what
the model sees of one, and what is to be predicted. Nothing in them is ever taken from data.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from common.config import Frozen, Rules
from common.fields import FilePath, Listed, Text, repeats

__all__ = [
    "DIAGNOSIS_SECTIONS",
    "Answer",
    "CaseRules",
    "CodeAnswer",
    "CodeInputs",
    "CodeRule",
    "GroupRules",
    "LabelPhrases",
    "MortalityAnswer",
    "NoteRules",
    "NumberAnswer",
    "Observable",
    "QualifyRules",
    "SeriesRules",
    "SurvivalAnswer",
    "System",
    "SystemChoice",
    "UnitFactor",
    "WindowRules",
]

System = Literal["icd9", "icd10", "snomed", "rxnorm", "ndc", "atc", "loinc", "name"]
"""Code systems; `name` is free text that no system defines."""

DIAGNOSIS_SECTIONS: Final = (
    *("diagnosis", "diagnoses", "discharge diagnosis", "discharge diagnoses"),
    *("final diagnosis", "final diagnoses", "principal diagnosis", "primary diagnosis"),
    *("primary diagnoses", "secondary diagnosis", "secondary diagnoses"),
    *("admission diagnosis", "admitting diagnosis", "working diagnosis"),
    *("preoperative diagnosis", "postoperative diagnosis", "pre-operative diagnosis"),
    *("post-operative diagnosis", "differential diagnosis", "clinical diagnosis"),
    *("assessment", "assessment and plan", "assessment & plan", "assessment/plan", "a/p", "a&p"),
    *("impression", "impressions", "impression and plan", "impression/plan"),
    *("clinical impression", "final impression", "ed diagnosis", "encounter diagnosis"),
    *("problem list", "active problems", "active problem list", "discharge problems"),
    *("hospital course", "brief hospital course", "summary of hospital course"),
    *("discharge instructions", "conclusion", "conclusions"),
)
"""Headings of English notes whose sections print the diagnosis, or were written knowing it."""

_Hours = Annotated[float, Field(ge=-87_600, le=87_600)]
_Keep = Literal["keep", "drop"]


class SystemChoice(Frozen):
    """A hospital's system: a folder of files in its own layout, or a database."""

    reader: Literal["eicu", "fhir", "mimic", "omop"] = Field(
        description="eicu: eICU-CRD 2.0; fhir: FHIR R4 as a bulk export leaves it; mimic: "
        "MIMIC-III or MIMIC-IV, which the tables tell; omop: OMOP CDM 5.3 or 5.4"
    )
    folder: FilePath | None = Field(
        None,
        description="of tables, .csv, .csv.gz or .parquet, or of .ndjson or .ndjson.gz; relative "
        "to the folder of this file",
    )
    database: FilePath | None = Field(
        None,
        description="with reader: omop, instead of a folder: a file with the address of a "
        "PostgreSQL database, postgresql://USER:PASSWORD@HOST/NAME, for its owner's eyes only",
    )
    schema_: Text | None = Field(
        None, alias="schema", description="of the database; absent: the connection's own"
    )
    images: FilePath | None = Field(
        None,
        description="a folder of DICOM images of the same patients, by the same ids (an export of "
        "the PACS), for studies that read one; relative to the folder of this file",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        either = (self.folder is None) != (self.database is None)
        rules.require(either, "folder", "is missing: name a folder, or a database; not both")
        in_database = self.database is not None
        told = f"cannot be read with reader: {self.reader}; only omop is"
        rules.require(not in_database or self.reader == "omop", "database", told)
        told = "has no effect without a database; remove it"
        rules.require(in_database or self.schema_ is None, "schema", told)
        rules.done()
        return self


class CodeRule(Frozen):
    """Codes of one system that stand for one label."""

    label: Text = Field(description="the label; it may have a rule for each of several systems")
    system: System = Field(description="where the codes come from")
    codes: Annotated[Listed[Text], Field(min_length=1, max_length=1000)] = Field(
        description="beginnings of codes (icd9, icd10, atc: dots and case do not matter; name: "
        "whole words), or whole codes (the other systems)"
    )


class CodeAnswer(Frozen):
    """The label from coded diagnoses or drugs."""

    kind: Literal["codes"] = Field(description="codes: labels from diagnoses or drugs")
    source: Literal["diagnoses", "drugs"] = Field(
        "diagnoses",
        description="drugs: those started after the observation window, where it has an end",
    )
    rank: Literal["principal", "any"] = Field(
        "principal", description="principal: the diagnosis of rank 1 alone; drugs: any"
    )
    several: Literal["first", "drop", "all"] = Field(
        "drop",
        description="an encounter with several labels: the first in the order of map, left out "
        "and counted, or all of them (multi-label)",
    )
    rest: Text | None = Field(
        None, description="the label of encounters whose codes match none; absent: left out"
    )
    map: Annotated[Listed[CodeRule], Field(min_length=1, max_length=2000)] = Field(
        description="which codes stand for which label"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        message = "has no effect with source: drugs; set it to any"
        rules.require(self.source == "diagnoses" or self.rank == "any", "rank", message)
        taken = {rule.label for rule in self.map}
        rules.require(self.rest not in taken, "rest", "is also a label of map")
        rules.require(
            self.rest is None or self.several != "all",
            "rest",
            "has no effect with several: all, where no label is an answer; remove it",
        )
        rules.done()
        return self


class MortalityAnswer(Frozen):
    """Whether the patient died in the encounter; it must outlast the observation window."""

    kind: Literal["mortality"] = Field(description="mortality: death before discharge")
    died: Text = Field("died", description="the label of those who died")
    survived: Text = Field("survived", description="the label of the others")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.died != self.survived, "survived", "is also the label of the dead")
        rules.done()
        return self


class SurvivalAnswer(Frozen):
    """Time from the end of the observation window to death, or to discharge (censored)."""

    kind: Literal["survival"] = Field(description="survival: time to death or discharge")
    unit: Literal["hours", "days"] = Field("days", description="of the time")


class UnitFactor(Frozen):
    """Another unit that is converted: value x factor + offset."""

    unit: Text = Field(description="as the source writes it; case and spaces do not matter")
    factor: float = Field(gt=0, le=1e12, description="multiplied with")
    offset: float = Field(0.0, ge=-1e6, le=1e6, description="added after")


class Observable(Frozen):
    """One number of the model's input: measured, or a fact about the patient."""

    name: Text = Field(description="the study's name for it")
    of: Literal["measurement", "age", "female"] = Field(
        "measurement", description="age: in years; female: 1, male: 0, else missing"
    )
    items: Annotated[Listed[Text], Field(max_length=200)] = Field(
        (), description="what sources call it: names or codes; case does not matter"
    )
    unit: Text | None = Field(None, description="absent: the quantity has none; not compared")
    convert: Annotated[Listed[UnitFactor], Field(max_length=50)] = Field(
        (), description="units that are converted; every other is left out and counted"
    )
    low: float = Field(ge=-1e100, le=1e100, description="public lower bound, after conversion")
    high: float = Field(ge=-1e100, le=1e100, description="public upper bound")
    outside: Literal["clip", "drop"] = Field(
        "clip", description="beyond the bounds: read as the bound, or as missing; counted"
    )
    take: Literal["first", "last", "mean", "min", "max", "sum"] = Field(
        "last", description="of several values in one hour, or in the window"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        measured = self.of == "measurement"
        rules.require(bool(self.items) or not measured, "items", "is missing")
        message = f"has no effect with of: {self.of}; remove it"
        rules.require(measured or not self.items, "items", message)
        rules.require(measured or self.unit is None, "unit", message)
        rules.require(
            self.unit is not None or not self.convert, "convert", "needs the unit to convert to"
        )
        rules.require(self.low < self.high, "high", f"must be more than low ({self.low:g})")
        rules.done()
        return self


class NumberAnswer(Frozen):
    """A number measured after the observation window."""

    kind: Literal["number"] = Field(description="number: a measurement to come")
    quantity: Observable = Field(description="what is measured")
    from_hours: _Hours = Field(description="after time zero; not before the window ends")
    to_hours: _Hours = Field(description="after time zero")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.from_hours < self.to_hours, "to_hours", "must be after from_hours")
        measured = self.quantity.of == "measurement"
        rules.require(measured, "quantity.of", "must be measurement")
        rules.done()
        return self


Answer = Annotated[
    CodeAnswer | MortalityAnswer | SurvivalAnswer | NumberAnswer, Field(discriminator="kind")
]


class WindowRules(Frozen):
    """What of an encounter the model may see."""

    zero: Literal["start", "end"] = Field(
        "start",
        description="the encounter's moment 0; end with to_hours: 72 also reads what was written "
        "in the days after",
    )
    from_hours: _Hours | None = Field(
        None, description="nothing before this is seen; absent: no limit"
    )
    to_hours: _Hours | None = Field(
        None, description="nothing after this is seen; absent: to the end of the encounter"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        both = self.from_hours is not None and self.to_hours is not None
        fits = not both or self.from_hours < self.to_hours  # type: ignore[operator]
        rules.require(fits, "to_hours", "must be after from_hours")
        rules.done()
        return self


class LabelPhrases(Frozen):
    """Words that give a label away where they stand in a text."""

    label: Text = Field(description="one of the study's labels")
    phrases: Annotated[Listed[Text], Field(min_length=1, max_length=100)] = Field(
        description="beside the label itself, which always counts"
    )


class NoteRules(Frozen):
    """Which notes become the text, and what is cut from them."""

    kinds: Annotated[Listed[Text], Field(max_length=200)] = Field(
        (), description="kinds of notes as the source names them; empty: every kind"
    )
    order: Literal["kind", "time"] = Field(
        "time", description="how they are joined: in the order of kinds, then time; or by time"
    )
    undated: _Keep = Field(
        "drop", description="notes without a time, where a window or a label time bounds them"
    )
    cut_sections: Annotated[Listed[Text], Field(max_length=500)] = Field(
        DIAGNOSIS_SECTIONS, description="headings whose sections are cut; empty: none"
    )
    phrases: Annotated[Listed[LabelPhrases], Field(max_length=2000)] = Field(
        (), description="further words to warn of, where they stand in texts of their label"
    )
    deidentify: bool = Field(
        default=False,
        description="replace dates, names after titles, numbers of records and phones by tags",
    )


class SeriesRules(Frozen):
    """Measurements hour by hour, from time zero on."""

    hours: int = Field(ge=1, le=24 * 90, description="T: rows of the series")
    quantities: Annotated[Listed[Observable], Field(min_length=1, max_length=1000)] = Field(
        description="F: columns of the series, in order"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for index in repeats(quantity.name for quantity in self.quantities):
            rules.require(False, f"quantities.{index}.name", "is listed twice")  # noqa: FBT003
        rules.done()
        return self


class CodeInputs(Frozen):
    """Codes that the model sees; those that stand for a label never do."""

    diagnoses: Annotated[Listed[System], Field(max_length=8)] = Field(
        (), description="systems of diagnoses that are taken"
    )
    drugs: Annotated[Listed[System], Field(max_length=8)] = Field(
        (), description="systems of drugs that are taken, started within the window"
    )
    characters: int | None = Field(
        None, ge=1, le=32, description="icd9, icd10 and atc codes are cut to this length"
    )
    undated: _Keep = Field(
        "drop", description="codes without a time; diagnoses coded at discharge have none"
    )
    most: int = Field(512, ge=1, le=65_536, description="codes of one encounter that are taken")


class QualifyRules(Frozen):
    """Which encounters take part."""

    min_age: float | None = Field(None, ge=0, le=150, description="years at the start")
    max_age: float | None = Field(
        None, ge=0, le=150, description="years; sources hide ages above 89, read as 90"
    )
    sex: Literal["female", "male"] | None = Field(None, description="absent: everybody")
    min_hours: float | None = Field(None, gt=0, le=87_600, description="shortest stay")
    most: int | None = Field(
        None, ge=1, le=4096, description="encounters of a patient: the first, in file order"
    )


class GroupRules(Frozen):
    """Subgroups whose results are compared."""

    sex: bool = Field(default=True, description="female, male, unknown")
    age_edges: Annotated[Listed[Annotated[int, Field(ge=1, le=120)]], Field(max_length=20)] = Field(
        (18, 45, 65, 80), description="years at which age bands begin, rising; empty: no bands"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rising = all(a < b for a, b in itertools.pairwise(self.age_edges))
        rules.require(rising, "age_edges", "must rise")
        rules.done()
        return self


class CaseRules(Frozen):
    """What a study makes of an encounter."""

    window: WindowRules = Field(WindowRules(), description="what of it may be seen")
    label: Answer = Field(description="what is predicted")
    after_label: _Keep = Field(
        "drop", description="whatever was written or measured after the label was known"
    )
    notes: NoteRules | None = Field(None, description="the text; absent: none")
    values: Annotated[Listed[Observable], Field(max_length=1000)] = Field(
        (), description="one number each, in the order of the model's inputs"
    )
    series: SeriesRules | None = Field(None, description="measurements by the hour; absent: none")
    codes: CodeInputs | None = Field(None, description="codes that are seen; absent: none")
    image: Literal["none", "first", "last"] = Field("none", description="which image is seen")
    qualify: QualifyRules = Field(QualifyRules(), description="which encounters take part")
    groups: GroupRules = Field(GroupRules(), description="subgroups")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        for index in repeats(quantity.name for quantity in self.values):
            rules.require(False, f"values.{index}.name", "is listed twice")  # noqa: FBT003
        end = self.window.to_hours
        if isinstance(self.label, NumberAnswer):
            fits = end is not None and self.label.from_hours >= end
            message = "must not be before window.to_hours: the answer would be seen"
            rules.require(fits, "label.from_hours", message)
        if self.series is not None:
            for index, quantity in enumerate(self.series.quantities):
                where = f"series.quantities.{index}.of"
                rules.require(quantity.of == "measurement", where, "must be measurement")
            rules.require(self.window.zero == "start", "window.zero", "must be start with series")
            rules.require(
                end is None or self.series.hours <= end,
                "series.hours",
                f"goes beyond window.to_hours ({end}): nothing would be there",
            )
        known = set(self.labels)
        for index, entry in enumerate(() if self.notes is None else self.notes.phrases):
            message = "is not a label of these rules"
            rules.require(entry.label in known, f"notes.phrases.{index}.label", message)
        rules.done()
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that these rules can give, in the order of the rules; none for numbers."""
        target = self.label
        if isinstance(target, CodeAnswer):
            found = dict.fromkeys(rule.label for rule in target.map)
            return (*found, *(() if target.rest is None else (target.rest,)))
        if isinstance(target, MortalityAnswer):
            return (target.survived, target.died)
        return ()
