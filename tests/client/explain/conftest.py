"""A small BERT that has really learned the package's invented notes, and notes it never saw."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from client.data.synthetic import LABELS, generate


@pytest.fixture(scope="session")
def learned(tmp_path_factory, save_tokenizer):
    """(folder of a trained classifier, records of patients it never saw)."""
    import torch
    import transformers as hf

    torch.set_num_threads(1)
    records = generate(3)
    patients = sorted({record.patient for record in records})
    held_out = set(patients[::6])
    train = [record for record in records if record.patient not in held_out]
    test = [record for record in records if record.patient in held_out]
    counts = Counter(
        word for record in train for word in re.findall(r"\w+|[^\w\s]", record.text.lower())
    )
    folder = tmp_path_factory.mktemp("learned")
    words = sorted(word for word, count in counts.items() if count > 2)
    size = save_tokenizer(folder, words)
    torch.manual_seed(5)
    config = hf.BertConfig(
        vocab_size=size, pad_token_id=1, hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=96, max_position_embeddings=160, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.0, num_labels=len(LABELS), id2label=dict(enumerate(LABELS)),
    )  # fmt: skip
    model = hf.BertForSequenceClassification(config)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    _train(model, tokenizer, train)
    model.save_pretrained(folder)
    return folder, test


def _train(model, tokenizer, records):
    import torch

    steps = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    stream = torch.Generator().manual_seed(0)
    targets = torch.tensor([LABELS.index(record.label) for record in records])
    model.train()
    for _ in range(8):
        order = torch.randperm(len(records), generator=stream)
        for part in torch.split(order, 32):
            texts = [records[at].text for at in part]
            given = tokenizer(texts, padding=True, return_tensors="pt")
            # Words are blanked in training, so that a blanked word is nothing unheard of.
            drop = torch.rand(given["input_ids"].shape, generator=stream) < 0.15
            ids = given["input_ids"].masked_fill(drop & (given["input_ids"] > 3), 1)
            outputs = model(input_ids=ids, attention_mask=given["attention_mask"])
            loss = torch.nn.functional.cross_entropy(outputs.logits, targets[part])
            steps.zero_grad()
            loss.backward()
            steps.step()
