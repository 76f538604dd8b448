"""A visit's codes as a study's model sees them: rolled up, in a public vocabulary. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from client.data.records import Record
from client.knowledge.codes import ancestors, parse, public_set, tagged
from common.tasks.medication import MedicationTask

__all__ = ["known_codes", "seen", "unseen", "vocabulary"]


def vocabulary(task: MedicationTask) -> tuple[str, ...]:
    """Every code that the model knows, in order: sets named by the study are spelled out."""
    spelled: dict[str, None] = {}
    for name in task.codes:
        for code in public_set(name) or (_normal(name),):
            spelled[code] = None
    return tuple(spelled)


def _normal(name: str) -> str:
    """A listed code in normal form; a word of the study's own as it stands."""
    system, colon, rest = name.partition(":")
    return (tagged(system, rest) if colon else None) or name


def known_codes(task: MedicationTask, record: Record) -> tuple[str, ...]:
    """The codes of a visit that are codes at all, with their system, each once."""
    found = (parse(text, task.code_system) for text in record.codes)
    return tuple(dict.fromkeys(code for code in found if code is not None))


def seen(
    task: MedicationTask, record: Record, place: Mapping[str, int], counts: Counter[str]
) -> list[int]:
    """The places in a vocabulary of a visit's codes and the groups above them, finest first.

    `counts`: what has no place is added here, by reason, in fixed words.
    """
    found: dict[int, None] = {}
    for text in record.codes:
        code = parse(text, task.code_system)
        if code is None:
            counts["codes in no form of their system"] += 1
            continue
        known = [place[name] for name in ancestors(code) if name in place]
        if not known:
            counts["codes that the vocabulary does not hold"] += 1
        found.update(dict.fromkeys(known))
    return list(found)


def unseen(task: MedicationTask, records: Iterable[Record]) -> Counter[str]:
    """What of the records' codes the model does not see, counted by reason, in fixed words."""
    place = {code: at for at, code in enumerate(vocabulary(task))}
    counts: Counter[str] = Counter()
    for record in records:
        found = seen(task, record, place, counts)
        if len(found) > task.max_codes:
            counts["codes and groups beyond task.max_codes"] += len(found) - task.max_codes
    return counts
