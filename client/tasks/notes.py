"""The task `diagnosis` with an encoder of its own: small, trained from the start, any language.

For notes in a language or a jargon that no pretrained encoder at hand reads. A note is one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from client.data.records import Record
from client.knowledge.mentions import mentions_of
from client.tasks.diagnosis import invented_notes
from client.tasks.rows import Encoded, described, first_values
from client.tasks.text import Cleaner, Reading
from client.tasks.vocabulary import TextConvolution, spread_embedding, text_tensor
from common.tasks.diagnosis import DiagnosisTask
from common.tasks.encoders import TextEncoder

__all__ = ["NoteClassifier", "architecture", "encode", "network", "probes"]

# Invented notes of several lengths, two of one patient: what a network is tried on at admission.
_PROBE: Final = (
    ("first", "咳嗽、发热三天。 Cough and fever for three days."),
    ("second", "糖尿病五年。近日口渴、多尿。 Known diabetes, thirsty. " * 4),
    ("second", "好转"),
    ("third", "Fall at home; no fracture seen, wound cleaned and dressed. " * 20),
)


def _encoder(task: DiagnosisTask) -> TextEncoder:
    if task.encoder is None:
        raise TypeError("this task's encoder is a pretrained one")
    return task.encoder


def architecture(task: DiagnosisTask) -> tuple[bytes, str]:
    """(digest, description) of the network: what stands for a backbone in the study bundle."""
    facts = task.model_dump(
        mode="json",
        include={"labels", "several", "max_tokens", "stop_words", "stemming", "encoder"},
    )
    if task.graph is not None:
        facts["graph"] = task.graph.model_dump(exclude={"files"})
    return described("notes", facts)


class NoteClassifier(nn.Module):
    """A text encoder and a linear classifier, and another over what a graph knows of the note.

    Shapes: (B, T) int64, with a graph also (B, G) float32, to (B, outputs).
    """

    def __init__(self, encoder: TextEncoder, outputs: int, known: int = 0) -> None:
        super().__init__()
        self.text = TextConvolution(encoder)
        self.output = nn.Linear(encoder.features, outputs)
        self.graph = nn.Linear(known, outputs, bias=False) if known else None

    def forward(self, places: Tensor, *known: Tensor) -> Tensor:
        """The logits of each note."""
        found: Tensor = self.output(self.text(places))
        if self.graph is not None:
            found = found + self.graph(known[0])
        return found


def network(task: DiagnosisTask) -> nn.Module:
    """The network at its first values: an output layer of zeros favours no label."""
    known = 0 if task.graph is None else task.graph.width
    module = NoteClassifier(_encoder(task), task.outcome.outputs, known)
    first_values(module)
    spread_embedding(module.text)
    with torch.no_grad():
        module.output.weight.zero_()
        if module.graph is not None:
            module.graph.weight.zero_()
    return module


def encode(task: DiagnosisTask, records: Sequence[Record]) -> Encoded:
    """The notes as places in the public vocabulary, and what the graph knows of them.

    Names are looked for in the whole note, before words are cut, removed or stemmed.

    Shapes: (N, max_tokens) int64; with a graph also (N, G) float32.
    """
    clean = Cleaner(Reading.of(task))
    texts = [clean(record.text) for record in records]
    places = text_tensor(_encoder(task), texts, task.max_tokens)
    if task.graph is None:
        return Encoded(None, (places,))
    known = mentions_of(task.graph).rows([record.text for record in records])
    return Encoded(None, (places, torch.from_numpy(known)))


def probes(task: DiagnosisTask) -> tuple[Record, ...]:
    """Four invented notes of three patients."""
    return invented_notes(task, _PROBE)
