"""Public vocabularies: the same everywhere, spelled out by a rule and not by data."""

from __future__ import annotations

import pytest
import torch

from client.tasks.vocabulary import (
    TextConvolution,
    characters,
    text_places,
    text_tensor,
    vocabulary_size,
)
from common.tasks.encoders import TextEncoder

torch.set_num_threads(1)
HAN = TextEncoder(vocabulary="gb2312")
COMMON = TextEncoder(vocabulary="gb2312-level-1")
WORDS = TextEncoder(buckets=1000)


def test_the_lists_of_characters_are_those_of_the_standard():
    def han(name):
        return [one for one in characters(name) if "\u4e00" <= one <= "\u9fff"]

    assert len(han("gb2312-level-1")) == 3755
    assert len(han("gb2312")) == 6763
    assert (han("gb2312")[0], han("gb2312")[3754]) == ("啊", "座")
    assert list(characters("gb2312").values()) == list(range(2, 2 + len(characters("gb2312"))))
    # The common characters have the same places in both lists.
    assert characters("gb2312-level-1").items() <= characters("gb2312").items()


def test_places_are_frozen():
    """A model that is saved today must be read alike tomorrow."""
    assert text_places(HAN, "发热ＣＲＰ 3", 9) == [822, 2458, 37, 52, 50, 21]
    assert text_places(WORDS, "Fever, CRP 3.5 fever", 9) == [491, 213, 726, 491]


def test_unknown_characters_are_one_and_spaces_none():
    assert text_places(HAN, "🙂 €", 9) == [1, 1]
    rare = "癞"  # of the second level
    assert text_places(COMMON, rare, 9) == [1]
    assert text_places(HAN, rare, 9) != [1]


@pytest.mark.parametrize("encoder", [HAN, COMMON, WORDS])
def test_every_place_lies_in_the_table(encoder):
    text = "".join(characters("gb2312")) + " patient with 38.5 degrees and a cough"
    places = text_places(encoder, text, 10_000)
    assert min(places) >= 1
    assert max(places) < vocabulary_size(encoder)


def test_long_texts_are_cut_and_short_ones_filled():
    found = text_tensor(WORDS, ["one two three four", "one", ""], 3)
    assert found.shape == (3, 3)
    assert found[0, 0] == found[1, 0] > 1
    assert found[1, 1:].tolist() == [0, 0]
    assert found[2].tolist() == [0, 0, 0]


def test_the_network_sees_order_and_not_what_stands_after_the_end():
    torch.manual_seed(1)
    module = TextConvolution(TextEncoder(width=8, channels=4, kernels=(1, 2)))
    assert module(torch.tensor([[5, 6, 0, 0]])).shape == (1, 8)
    first, turned = module(torch.tensor([[5, 6, 7, 0], [7, 6, 5, 0]]))
    assert not torch.allclose(first, turned)
    longer = module(torch.tensor([[5, 6, 7, 0, 0, 0]]))[0]
    assert torch.allclose(first, longer, atol=1e-6)
