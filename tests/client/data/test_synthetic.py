import re
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional

from client.data.partition import partition
from client.data.synthetic import HOSPITALS, LABELS, generate, write_csv
from client.data.tables import TableColumns, read_table
from common.errors import Code, StorageError
from common.study import Split

COLUMNS = TableColumns("text", "patient", "label", "hospital")


def test_the_same_seed_gives_the_same_bytes_and_another_gives_others(tmp_path):
    paths = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv")]
    for path, seed in zip(paths, (0, 0, 1), strict=True):
        write_csv(path, generate(seed))
    first, second, third = (path.read_bytes() for path in paths)
    assert first == second
    assert first != third


def test_every_row_is_labelled_synthetic_but_the_note_is_not(tmp_path):
    path = tmp_path / "demo.csv"
    write_csv(path, generate())
    lines = path.read_text("utf-8").splitlines()
    assert lines[0] == "patient,hospital,label,text,origin"
    assert all(line.endswith(",SYNTHETIC") for line in lines[1:])
    assert not any("synthetic" in record.text.lower() for record in generate())


def test_the_file_reads_back_as_five_hospitals_that_differ(tmp_path):
    path = tmp_path / "demo.csv"
    made = generate()
    write_csv(path, made)
    records = read_table(path, COLUMNS, labels=LABELS)
    assert [(r.patient, r.text, r.label, r.site) for r in records] == [
        (r.patient, r.text, r.label, r.site) for r in made
    ]
    split = Split.model_validate({"by": "column", "column": "hospital"})
    done = partition(records, split, labels=LABELS, seed=0)
    assert [len(ids) for ids in done.patients.values()] == [
        h.patients for h in sorted(HOSPITALS, key=lambda h: h.name)
    ]
    assert done.warnings == ()
    largest = {
        site: Counter(records[at].label for at in positions).most_common(1)[0][0]
        for site, positions in done.records.items()
    }
    assert len(set(largest.values())) >= 3
    assert len(records) > len({r.patient for r in records}), "some patients have two notes"


def _bag_of_words(records):
    documents = [re.findall(r"[a-z0-9+]+", r.text.lower()) for r in records]
    frequent = Counter(word for words in documents for word in set(words))
    places = {w: i for i, w in enumerate(sorted(w for w in frequent if frequent[w] > 2))}
    features = torch.zeros(len(records), len(places))
    for row, words in enumerate(documents):
        for word in words:
            if word in places:
                features[row, places[word]] = 1.0
    return features


def _fit(features, labels):
    weight = torch.zeros(features.shape[1], len(LABELS), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=80, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = functional.cross_entropy(features @ weight, labels) + 3e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def test_the_task_is_learnable_but_nobody_scores_everything():
    torch.set_num_threads(1)
    records = generate()
    features = _bag_of_words(records)
    labels = torch.tensor([LABELS.index(r.label) for r in records])
    patients = sorted({r.patient for r in records})
    held = set(np.random.default_rng(0).choice(patients, len(patients) // 4, replace=False))
    test = torch.tensor([r.patient in held for r in records])

    def accuracy(train):
        found = (features[test] @ _fit(features[train], labels[train])).argmax(dim=1)
        return (found == labels[test]).float().mean().item()

    together = accuracy(~test)
    alone = [accuracy(~test & torch.tensor([r.site == h.name for r in records])) for h in HOSPITALS]
    assert 0.7 < together < 0.95
    assert together > max(alone)
    assert together > np.mean(alone) + 0.15


def test_an_unwritable_place_is_an_error(tmp_path):
    with pytest.raises(StorageError) as caught:
        write_csv(tmp_path / "no" / "demo.csv", ())
    assert caught.value.code is Code.MODEL_OUTPUT
