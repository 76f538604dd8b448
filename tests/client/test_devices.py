import torch

from client.devices import choose_device


def test_a_device_is_taken_at_its_word_and_auto_is_a_gpu_where_there_is_one():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
