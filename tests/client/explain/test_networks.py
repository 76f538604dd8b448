"""Numbers, images and series, on networks whose important parts are known."""

import base64
import io

import numpy as np
import pytest
import torch
from torch import nn

from client.explain.attribution import Target, deletion, still
from client.explain.image import explain_image, overlay
from client.explain.numbers import explain_numbers
from client.explain.page import Case, page
from client.explain.series import Grid, explain_series
from client.privacy.recurrent import LoopLSTM, last_valid
from common.outcomes import Classes, Hazard, LabelSet, Number

TWO = Classes(("well", "ill"))
NAMES = ("age", "urea", "sex")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Rows(nn.Module):
    """A regression of two numbers and a category of two values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.0, 0, 0, 0], [2.0, -1.0, 0.5, 0.0]]))
            self.linear.bias.copy_(torch.tensor([0.3, 0.1]))
        self.train()

    def forward(self, values, categories):
        return self.linear(torch.cat([values, categories], dim=1))


def rows(values=(1.5, 2.0), outcome=TWO, column=1):
    network = Rows()
    inputs = (torch.tensor([values]), torch.tensor([[1.0, 0.0]]))
    return network, explain_numbers(
        network,
        inputs,
        Target(outcome, column),
        owner=np.array([0, 1, 2, 2]),
        names=NAMES,
        shown=("80", "9", "f"),
    )


def test_a_regression_gives_every_feature_its_own_term():
    network, found = rows()
    np.testing.assert_allclose(found.values, [3.0, -2.0, 0.5], atol=1e-6)
    assert found.found.balance.gap < 1e-5
    assert found.found.balance.difference == pytest.approx(1.5, abs=1e-5)
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(p.grad is None for p in network.parameters())


def test_a_missing_value_gets_nothing():
    _, found = rows(values=(0.0, 2.0))
    assert found.values[0] == 0


@pytest.mark.parametrize(
    ("outcome", "name", "scale"),
    [
        (LabelSet(("a", "b")), "b", 1.0),
        (Number(10.0, 30.0, "mmol"), "value", 20.0),
        (Hazard((1.0,)), "risk", 0.5),
    ],
)
def test_every_outcome_has_a_score_that_adds_up(outcome, name, scale):
    column = 1 if isinstance(outcome, LabelSet) else 0
    network = Rows()
    if isinstance(outcome, Number):
        with torch.no_grad():
            network.linear.weight.copy_(network.linear.weight.flip(0))
    inputs = (torch.tensor([[1.5, 2.0]]), torch.tensor([[1.0, 0.0]]))
    found = explain_numbers(
        network,
        inputs,
        Target(outcome, column),
        owner=np.array([0, 1, 2, 2]),
        names=NAMES,
        shown=NAMES,
    )
    assert found.found.explained == name
    np.testing.assert_allclose(found.values, np.array([3.0, -2.0, 0.5]) * scale, atol=1e-5)


def test_the_deletion_curve_of_known_parts_is_known():
    weights = np.array([3.0, 0.0, 1.0, -2.0])

    def chances(kept):
        return kept @ weights

    curve = deletion(chances, weights, points=4)
    assert curve.removed == (0, 0.25, 0.5, 0.75, 1)
    assert curve.ours == (2, -1, -2, -2, 0)
    assert curve.gain > 0
    assert deletion(chances, -weights, points=4).gain < 0, "control: the inverted order"
    assert deletion(chances, weights, points=4) == curve
    alone = deletion(lambda kept: np.full(len(kept), 0.7), np.zeros(0))
    assert alone.ours == (0.7,), "a record without parts"
    assert abs(alone.gain) < 1e-12


def test_still_gives_a_network_back_as_it_was():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5).eval())
    network[0].bias.requires_grad_(False)
    with pytest.raises(IndexError), still(network):
        _ = network[0 if any(part.training for part in network.modules()) else 7]
    assert network.training
    assert not network[1].training
    assert network[0].weight.requires_grad
    assert not network[0].bias.requires_grad


# ------------------------------------------------------------------------ images


class Spots(nn.Module):
    """Ill where something bright is; the place does not matter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 3, padding=1, stride=2)
        self.output = nn.Linear(4, 2)

    def forward(self, images):
        maps = torch.relu(self.last(torch.relu(self.first(images))))
        return self.output(maps.mean((2, 3)))


def image(place, stream):
    found = stream.random((32, 32)).astype(np.float32) * 0.3
    if place is not None:
        down, across = place
        found[down : down + 6, across : across + 6] += 0.6
    return torch.from_numpy(found)[None, None]


@pytest.fixture(scope="module")
def spots():
    """A network that has learned to find a bright spot."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    network, stream = Spots(), np.random.default_rng(0)
    images = torch.cat(
        [image(tuple(stream.integers(0, 26, 2)) if at % 2 else None, stream) for at in range(128)]
    )
    targets = torch.arange(128) % 2
    steps = torch.optim.AdamW(network.parameters(), lr=2e-2)
    for _ in range(60):
        loss = nn.functional.cross_entropy(network(images), targets)
        steps.zero_grad()
        loss.backward()
        steps.step()
    network.zero_grad(set_to_none=True)
    assert (network(images).argmax(1) == targets).float().mean() > 0.95
    return network


@pytest.mark.parametrize("place", [(2, 3), (20, 10), (12, 24)])
def test_both_overlays_show_where_the_spot_is(spots, place):
    given = image(place, np.random.default_rng(9))
    found = explain_image(spots, given, Target(TWO, 1))
    down, across = place
    inside = np.zeros((32, 32), bool)
    inside[down - 2 : down + 8, across - 2 : across + 8] = True
    for heat in (found.values, found.cam):
        share = np.abs(heat[inside]).sum() / np.abs(heat).sum()
        assert share > 3 * inside.mean()
    assert found.found.balance.complete
    assert found.found.curve.gain > 0.1
    assert found.cam_curve.gain > 0.1
    assert all(p.grad is None and p.requires_grad for p in spots.parameters())
    assert not any(part._forward_hooks or part._backward_hooks for part in spots.modules())


def test_control_another_network_does_not_find_the_spot():
    torch.manual_seed(0)
    given = image((20, 10), np.random.default_rng(9))
    found = explain_image(Spots(), given, Target(TWO, 1))
    assert abs(found.found.curve.gain) < 0.05


def test_the_overlay_is_a_png_with_orange_where_it_raises_and_blue_where_it_lowers():
    from PIL import Image

    picture = np.full((16, 16), 128, np.uint8)
    heat = np.zeros((16, 16))
    heat[:4, :4], heat[-4:, -4:] = 1.0, -1.0
    pixels = np.asarray(Image.open(io.BytesIO(overlay(picture, heat))))
    assert pixels.shape == (336, 336, 3)
    assert pixels[5, 5, 0] > pixels[5, 5, 2] + 60
    assert pixels[-5, -5, 2] > pixels[-5, -5, 0] + 60
    assert tuple(pixels[168, 168]) == (128, 128, 128)
    assert overlay(picture, heat) == overlay(picture, heat)


def test_an_image_page_holds_its_pictures_and_nothing_to_load(spots):
    found = explain_image(spots, image((2, 3), np.random.default_rng(1)), Target(TWO, 1))
    text = "".join(page([Case(2, None, found)]))
    assert text.count('src="data:image/png;base64,') == 3
    start = text.index("base64,", text.index("<img")) + 7
    assert base64.b64decode(text[start : text.index('"', start)])[1:4] == b"PNG"


# ------------------------------------------------------------------------ series


class Course(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = LoopLSTM(3, 8, 1)
        self.output = nn.Linear(8, 2)

    def forward(self, values, lengths):
        return self.output(last_valid(self.lstm(values, lengths)[0], lengths))


@pytest.fixture(scope="module")
def course():
    """A network that has learned that the second measurement at a late hour decides."""
    torch.set_num_threads(1)
    torch.manual_seed(2)
    network, stream = Course(), np.random.default_rng(0)
    values = torch.from_numpy(stream.normal(0, 1, (256, 6, 3)).astype(np.float32))
    targets = (values[:, 4, 1] > 0).long()
    lengths = torch.full((256,), 6)
    steps = torch.optim.AdamW(network.parameters(), lr=3e-2)
    for _ in range(80):
        loss = nn.functional.cross_entropy(network(values, lengths), targets)
        steps.zero_grad()
        loss.backward()
        steps.step()
    network.zero_grad(set_to_none=True)
    assert loss < 0.2
    return network


def test_the_hour_and_the_measurement_that_decide_are_found(course):
    stream = np.random.default_rng(5)
    gains = []
    for _ in range(8):
        series = stream.normal(0, 1, (6, 3))
        series[4, 1] = 1.5
        inputs = (torch.from_numpy(series[None].astype(np.float32)), torch.tensor([6]))
        found = explain_series(course, inputs, Target(TWO, 1), Grid.of(("a", "b", "c"), series))
        assert np.unravel_index(found.values.argmax(), found.values.shape) == (4, 1)
        assert found.by_hour.argmax() == 4
        assert found.by_measurement.argmax() == 1
        assert found.found.balance.complete
        gains.append(found.found.curve.gain)
    assert np.mean(gains) > 0.1
    assert all(p.grad is None and p.requires_grad for p in course.parameters())


def test_control_another_course_is_explained_by_other_measurements(course):
    series = np.random.default_rng(6).normal(0, 1, (6, 3))
    series[4, 1] = 0.0
    inputs = (torch.from_numpy(series[None].astype(np.float32)), torch.tensor([6]))
    found = explain_series(course, inputs, Target(TWO, 1), Grid.of(("a", "b", "c"), series))
    assert np.abs(found.values).argmax() != 4 * 3 + 1


class Sum(nn.Module):
    def forward(self, values, start):
        total = values.sum((1, 2)) + start[:, 0]
        return torch.stack([torch.zeros_like(total), total], dim=1)


def test_what_is_carried_forward_counts_for_the_hour_that_was_measured():
    series = np.array([[np.nan, 2.0], [1.0, np.nan], [np.nan, np.nan]])
    carried = torch.tensor([[[0.0, 2.0], [1.0, 2.0], [1.0, 2.0]]])
    inputs = (carried, torch.tensor([[2.0]]))
    grid = Grid.of(("a", "b"), series)
    found = explain_series(Sum(), inputs, Target(TWO, 1), grid, start=(1, 1))
    np.testing.assert_allclose(found.values, [[0, 8], [2, 0], [0, 0]], atol=1e-5)
    assert found.values.sum() == pytest.approx(found.found.balance.total)


def test_a_series_page_has_a_cell_for_every_hour():
    series = np.array([[np.nan, 2.0], [1.0, np.nan], [np.nan, np.nan]])
    inputs = (torch.tensor([[[0.0, 2.0], [1.0, 2.0], [1.0, 2.0]]]), torch.zeros(1, 1))
    found = explain_series(Sum(), inputs, Target(TWO, 1), Grid.of(("a<b>", "b"), series))
    text = "".join(page([Case(2, "p", found)]))
    assert text.count('<td class="m ') == 2
    assert "a&lt;b&gt;" in text
    assert "a<b>" not in text
