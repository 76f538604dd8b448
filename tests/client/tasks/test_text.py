import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.tasks.backbone import load_backbone
from client.tasks.text import Cleaner, Encoder, Reading, batch_inputs

PLAIN = Reading(12, "truncate", 6, 4, "none", "none")


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_backbone(str(tiny("bert"))).tokenizer


def test_truncated_rows_are_what_the_tokenizer_gives_everyone(tokenizer):
    texts = ["fever", "", "old man with swollen legs , no fever . " * 4, "zzz"]
    encoded = Encoder(tokenizer, PLAIN)(texts)
    stock = tokenizer(texts, truncation=True, max_length=12)["input_ids"]
    assert [list(row) for row in encoded.rows] == stock
    assert encoded.starts.tolist() == [0, 1, 2, 3, 4]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(0, 80),
    stride=st.integers(1, 11),
    most=st.integers(1, 64),
)
def test_windows_cover_the_note_in_order_until_the_limit(tokenizer, length, stride, most):
    reading = Reading(12, "window", stride, most, "none", "none")
    words = (["fever", "cough", "wheeze", "legs", "."] * 16)[:length]
    rows = Encoder(tokenizer, reading)([" ".join(words)]).rows
    body = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    assert 1 <= len(rows) <= most
    assert all(len(row) <= 12 and row[0] == 2 and row[-1] == 3 for row in rows)
    step = min(stride, 10)
    seen = set()
    for index, row in enumerate(rows):
        inner = list(row[1:-1])
        assert inner == body[index * step : index * step + 10]
        seen.update(range(index * step, index * step + len(inner)))
    if len(rows) < most:
        assert seen == set(range(length))


def test_the_classical_pipeline_is_off_by_default():
    text = "The patient, who was 71, denies FEVER."
    assert Cleaner(PLAIN)(text) is text


def test_stop_words_go_but_negations_stay():
    clean = Cleaner(Reading(12, "truncate", 6, 4, "english", "none"))
    assert clean("There was no fever and the lungs are not clear, without pain") == (
        "no fever lungs not clear , without pain"
    )


def test_stemming_joins_forms_of_a_word():
    clean = Cleaner(Reading(12, "truncate", 6, 4, "none", "english"))
    assert clean("infections infected infection 3.5") == "infect infect infect 3.5"


def test_batches_are_padded_on_the_right():
    ids, mask = batch_inputs([(2, 5, 3), (2, 3)], pad=1)
    assert ids.tolist() == [[2, 5, 3], [2, 3, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
