"""Images: first values, inputs, variation, and what privacy needs of the networks."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from client.data.images import MIN_SIDE
from client.data.records import Record
from client.privacy.admission import admit
from client.privacy.engine import choose_engine
from client.tasks import convolution, imaging
from client.tasks.convolution import library_network, made_safe
from common.errors import Code, DataError, RefusedError
from common.tasks.imaging import ImagingTask

torch.set_num_threads(1)
SMALL = {"kind": "resnet", "widths": [8, 16], "blocks": 1, "groups": 4}
VARIED = {
    "flip": "both",
    "shift": 0.1,
    "rotate": 15.0,
    "zoom": 0.1,
    "brightness": 0.1,
    "contrast": 0.2,
}


def task(**terms):
    base = {"kind": "imaging", "labels": ["normal", "pneumonia"], "size": 16, "network": SMALL}
    return ImagingTask.model_validate(base | terms)


def refused(kind, code: Code, where: str = ""):
    return pytest.raises(kind, check=lambda e: e.code is code and where in e.message)


class Patients:
    """A learner over a network and images; patient p owns the rows `owner` == p."""

    def __init__(self, module, images, owner=None):
        self.module, self.images = module, images
        self.owner = np.arange(len(images)) if owner is None else np.array(owner)
        self.labels = torch.arange(len(images)) % 2

    def trainable(self):
        return dict(sorted(self.module.named_parameters()))

    def patient_count(self):
        return int(self.owner.max()) + 1

    def held_out_count(self):
        return 0

    def rows_of(self, patients):
        rows = [np.flatnonzero(self.owner == patient) for patient in patients]
        whose = [np.full(len(r), at) for at, r in enumerate(rows)]
        return np.concatenate([*rows, np.array([], int)]), np.concatenate(
            [*whose, np.array([], int)]
        )

    def losses(self, rows):
        logits = self.module(self.images[rows])
        return functional.cross_entropy(logits, self.labels[rows], reduction="none")

    def measure(self):
        raise NotImplementedError


def images(terms, count=4):
    """Bytes as `encode` gives them, of probes and more of their kind."""
    records = [
        replace(
            imaging.probes(terms)[at % 4], image=np.roll(imaging.probes(terms)[at % 4].image, at)
        )
        for at in range(count)
    ]
    return imaging.encode(terms, records).tensors[0]


def started(module):
    """With a last layer that is not zero, so that every layer gets a gradient."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return module


# ---------------------------------------------------------------------- networks


def test_first_values_are_the_same_every_time_and_favour_no_label():
    terms = task()
    torch.manual_seed(1)
    first = imaging.network(terms).state_dict()
    torch.manual_seed(2)
    second = imaging.network(terms).state_dict()
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert float(first["stem.weight"].std()) > 0.1
    assert not imaging.network(terms)(images(terms)).any()


def test_the_architecture_is_what_the_bundle_names():
    digest, told = imaging.architecture(task())
    assert imaging.architecture(task()) == (digest, told)
    assert "wardround-imaging/1" in told
    wider = {**SMALL, "widths": [8, 32]}
    for other in ({"network": wider}, {"size": 24}, {"channels": 3}, {"labels": ["a", "b"]}):
        assert imaging.architecture(task(**other))[0] != digest
    # How images are varied is a term of the study and no part of the network.
    assert imaging.architecture(task(augmentation=VARIED))[0] == digest


@pytest.mark.parametrize(
    ("terms", "size"),
    [
        ({"channels": 3}, 16),
        ({"network": {**SMALL, "stem_stride": 2}}, 32),
        ({"network": {**SMALL, "stem_stride": 4, "blocks": 2}}, 64),
        ({"labels": ["a", "b", "c"]}, 16),
    ],
)
def test_a_network_gives_one_number_for_each_label(terms, size):
    terms = task(**terms, size=size)
    found = imaging.network(terms)(images(terms))
    assert found.shape == (4, len(terms.labels))


def test_bytes_and_numbers_between_0_and_1_look_the_same():
    terms = task()
    module, pixels = started(imaging.network(terms)), images(terms)
    assert torch.allclose(module(pixels), module(pixels.float() / 255), atol=1e-6)


def test_a_row_depends_on_its_own_image_alone():
    terms = task()
    module, pixels = started(imaging.network(terms)), images(terms)
    alone = module(pixels[:1])
    assert torch.allclose(module(pixels)[:1], alone, atol=1e-5)
    assert not torch.allclose(module(pixels)[1:2], alone, atol=1e-2)


# ---------------------------------------------------------------------- encoding


def test_images_are_brought_to_the_studys_size_and_kept_as_bytes():
    terms = task(channels=3)
    record = replace(imaging.probes(terms)[0], image=np.full((20, 40), 9, np.uint8))
    (found,) = imaging.encode(terms, [record]).tensors
    assert (found.dtype, found.shape) == (torch.uint8, (1, 3, 16, 16))
    assert found[0, :, 8, 8].tolist() == [9, 9, 9]
    assert not found[0, :, 0].any()


def test_a_record_without_an_image_or_with_an_unfit_one_is_refused_by_its_place():
    terms = task()
    record = imaging.probes(terms)[0]
    with refused(DataError, Code.DATA_VALUE, "probe:1"):
        imaging.encode(terms, [replace(record, image=None)])
    colour = np.stack([record.image, record.image, 255 - record.image], axis=-1)
    with refused(DataError, Code.IMAGE_KIND, "probe:1"):
        imaging.encode(terms, [replace(record, image=colour)])
    with refused(DataError, Code.IMAGE_KIND, "probe:1"):
        imaging.encode(terms, [replace(record, image=record.image[: MIN_SIDE - 1])])


@pytest.mark.parametrize("channels", [1, 3])
def test_probes_are_three_patients_with_images_that_differ(channels):
    found = imaging.probes(task(channels=channels))
    assert len({record.patient for record in found}) == 3
    assert {record.label for record in found} == {"normal", "pneumonia"}
    assert len({record.image.tobytes() for record in found}) == len(found)
    assert isinstance(found[0], Record)


# ---------------------------------------------------------------------- variation


def varied(terms, pixels, seed=0):
    numbers = torch.rand((len(pixels), 8), generator=torch.Generator().manual_seed(seed))
    (found,) = imaging.augment(terms, (pixels,), numbers)
    return found


def test_without_terms_nothing_is_varied():
    pixels = images(task())
    assert varied(task(), pixels) is pixels


@pytest.mark.parametrize("name", VARIED)
def test_each_term_varies_images_within_their_range(name):
    terms = task(augmentation={name: VARIED[name]})
    pixels = images(terms)
    found = varied(terms, pixels)
    assert found.shape == pixels.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert float((found - pixels / 255).abs().max()) > 0.02
    assert torch.equal(found, varied(terms, pixels))
    assert not torch.equal(found, varied(terms, pixels, seed=1))


def test_images_of_one_batch_are_varied_differently():
    terms = task(augmentation={"rotate": 30.0})
    same = images(terms)[:1].expand(6, -1, -1, -1)
    found = varied(terms, same)
    assert len({image.numpy().tobytes() for image in found}) == 6


def test_a_flip_is_a_mirror():
    terms = task(augmentation={"flip": "horizontal"})
    pixels = images(terms)[1:2].expand(8, -1, -1, -1)
    plain = pixels[0] / 255
    found = varied(terms, pixels)
    mirrored = [torch.allclose(one, plain.flip(2), atol=1e-4) for one in found]
    left = [torch.allclose(one, plain, atol=1e-4) for one in found]
    assert 0 < sum(mirrored) < 8
    assert sum(mirrored) + sum(left) == 8


def test_a_shift_moves_by_its_part_of_the_size():
    terms = task(augmentation={"shift": 0.25})
    pixels = images(terms)[1:2]
    numbers = torch.full((1, 8), 0.5)
    numbers[0, 4] = 1.0  # the most: what lies a quarter of 16 pixels further to the right is seen
    (moved,), whole = imaging.augment(terms, (pixels,), numbers), pixels / 255
    assert torch.allclose(moved[..., :12], whole[..., 4:], atol=1e-4)
    assert not torch.allclose(moved, whole, atol=0.1)


def test_no_image_enters_anothers_variation():
    """Control: the mean of the batch, subtracted, does."""
    terms = task(augmentation=VARIED)
    pixels = images(terms)
    other = pixels.clone()
    other[3] = 255 - other[3]
    first, second = varied(terms, pixels), varied(terms, other)
    assert torch.equal(first[:3], second[:3])
    assert not torch.equal(first[3], second[3])
    mixing = [x.float() - x.float().mean(0) for x in (pixels, other)]
    assert not torch.equal(mixing[0][:3], mixing[1][:3])


# ---------------------------------------------------------------------- privacy


@pytest.mark.parametrize("kind", ["bookkeeping", "opacus"])
@pytest.mark.parametrize("channels", [1, 3])
def test_clipped_sums_are_those_of_one_record_at_a_time(kind, channels):
    """Two images of patient 0, one of each other; some are clipped, some not."""
    terms = task(channels=channels, network={**SMALL, "blocks": 2})
    learner = Patients(started(imaging.network(terms)), images(terms, 5), [0, 1, 0, 2, 3])
    alone = []
    for patient in range(4):
        rows, _ = learner.rows_of([patient])
        loss = learner.losses(rows).mean()
        alone.append(torch.autograd.grad(loss, list(learner.trainable().values())))
    norms = [math.sqrt(sum(float(g.double().square().sum()) for g in one)) for one in alone]
    clip = sum(sorted(norms)[1:3]) / 2
    engine = choose_engine(kind, learner.module, learner.trainable(), clip)
    rows, owner = learner.rows_of(range(4))
    found = engine.clipped_sum(learner.losses(rows), owner, 4).gradients
    engine.close()
    off = size = 0.0
    for at, name in enumerate(learner.trainable()):
        factors = [min(1.0, clip / norm) for norm in norms]
        expected = sum(factor * one[at] for factor, one in zip(factors, alone, strict=True))
        off += float((found[name] - expected).double().square().sum())
        size += float(expected.double().square().sum())
    assert min(factors) < 1 == max(factors)
    assert math.sqrt(off / size) < 1e-5


def test_the_network_is_admitted_by_the_book_keeping_engine():
    for network in (SMALL, {**SMALL, "blocks": 2, "stem_stride": 2}):
        terms = task(network=network)
        told = admit(Patients(started(imaging.network(terms)), images(terms)))
        assert told.startswith("bookkeeping")
        assert admit(Patients(imaging.network(terms), images(terms))).startswith("bookkeeping")


def normed(module):
    """Control: the same network with batch norms."""
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, nn.BatchNorm2d(child.num_channels))
        else:
            normed(child)
    return module


def test_the_same_network_with_batch_norms_is_refused_and_mixes_patients():
    terms = task()
    module, pixels = normed(started(imaging.network(terms))), images(terms)
    with refused(RefusedError, Code.MODEL_BATCH_NORM):
        admit(Patients(module, pixels))
    assert not torch.allclose(module(pixels)[:1], module(pixels[:2])[:1], atol=1e-3)


# ---------------------------------------------------------------------- libraries' architectures


class Act(nn.BatchNorm2d):
    """As timm's: a batch norm with its activation."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, values):
        return self.act(super().forward(values))


class StochasticDepth(nn.Module):
    def forward(self, values):
        return values * (torch.rand(1) > 0.5)


class Handmade(nn.Module):
    """What libraries' networks are made of."""

    def __init__(self, outputs=2, *, left=None):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 12, 3, padding=1, bias=False), Act(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 30, 3, stride=2), nn.BatchNorm2d(30)
        self.inner = nn.Sequential(nn.ReLU6(inplace=True), nn.Dropout2d(0.5), StochasticDepth())
        self.left = left or nn.Identity()
        self.drop, self.fc = nn.Dropout(0.9), nn.Linear(30, outputs)

    def forward(self, values):
        values = self.norm2(self.conv2(self.norm1(self.conv1(values))))
        return self.fc(self.drop(self.left(self.inner(values)).mean((2, 3))))


@pytest.fixture
def library(monkeypatch):
    """A library whose architectures are ours; returns what it was asked."""
    asked = []

    def make(factory, name, short, outputs):
        asked.append((name, short, outputs))
        return {
            "handmade": lambda: Handmade(outputs),
            "deaf": lambda: Handmade(outputs + 1),
            "strict": lambda: nn.Sequential(nn.Flatten(), nn.Linear(7, outputs)),
        }[short]()

    class Library:
        pass

    monkeypatch.setattr(convolution.importlib, "import_module", lambda name: Library)
    monkeypatch.setattr(convolution, "_make", make)
    return asked


def test_a_librarys_network_is_made_safe_and_admitted(library):
    terms = task(network={"kind": "backbone", "name": "timm:handmade", "groups": 8})
    module = imaging.network(terms)
    kinds = {type(layer).__name__ for layer in module.modules()}
    assert not kinds & {"BatchNorm2d", "Act", "Dropout", "Dropout2d", "StochasticDepth"}
    assert not any(getattr(layer, "inplace", False) for layer in module.modules())
    groups = [x.num_groups for x in module.modules() if isinstance(x, nn.GroupNorm)]
    assert groups == [4, 2]  # what divides 12 and 30, of 8
    assert module.training
    assert admit(Patients(started(module), images(terms))).startswith("bookkeeping")
    digest, told = imaging.architecture(terms)
    assert "timm:handmade" in told
    assert digest != imaging.architecture(task())[0]
    assert library[0] == ("timm", "handmade", 2)


def test_the_librarys_network_as_it_comes_is_refused():
    """Control."""
    with refused(RefusedError, Code.MODEL_BATCH_NORM):
        admit(Patients(Handmade(), images(task(channels=3)).float()))


class FrozenBatchNorm2d(nn.Module):
    def forward(self, values):
        return values


def test_a_batch_norm_that_is_not_known_as_one_is_refused_by_its_name(library, monkeypatch):
    left = Handmade(left=FrozenBatchNorm2d())
    monkeypatch.setattr(convolution, "_make", lambda *asked: left)
    with refused(RefusedError, Code.MODEL_BATCH_NORM):
        library_network("timm:handmade", 2, size=16, groups=8)


def test_a_library_that_is_absent_or_an_architecture_that_does_not_fit_is_told(
    library, monkeypatch
):
    with refused(DataError, Code.MODEL_FOLDER, "one number for each label"):
        library_network("timm:deaf", 2, size=16, groups=8)
    with refused(DataError, Code.MODEL_FOLDER, "16 by 16"):
        library_network("torchvision:strict", 2, size=16, groups=8)
    monkeypatch.undo()

    def without(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(convolution.importlib, "import_module", without)
    for name in ("timm:resnet18", "torchvision:resnet18"):
        with refused(DataError, Code.MODEL_FOLDER, "not installed"):
            library_network(name, 2, size=32, groups=8)


def test_scales_that_a_library_sets_are_kept_and_all_else_is_public(monkeypatch):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.gamma = nn.Parameter(torch.full((4,), 1e-3))

        def forward(self, values):
            return self.fc(self.conv(values).mean((2, 3)) * self.gamma)

    monkeypatch.setattr(convolution, "_make", lambda *asked: Scaled())
    monkeypatch.setattr(convolution.importlib, "import_module", lambda name: None)
    terms = task(network={"kind": "backbone", "name": "timm:scaled"})
    first, second = imaging.network(terms), imaging.network(terms)
    assert first.network.gamma.tolist() == pytest.approx([1e-3] * 4)
    assert torch.equal(first.network.conv.weight, second.network.conv.weight)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
@pytest.mark.filterwarnings("ignore")
def test_a_real_architecture_is_admitted_where_its_library_is_installed(name):
    pytest.importorskip(name.partition(":")[0])
    terms = task(size=32, network={"kind": "backbone", "name": name})
    module = imaging.network(terms)
    assert admit(Patients(started(module), images(terms, 2))).startswith("bookkeeping")


def test_an_unknown_architecture_of_a_real_library_is_told():
    pytest.importorskip("torchvision")
    with refused(DataError, Code.MODEL_FOLDER, "not known"):
        library_network("torchvision:nothing_of_the_kind", 2, size=32, groups=8)


def test_made_safe_leaves_other_layers_as_they_are():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    before = [id(layer) for layer in module]
    assert [id(layer) for layer in made_safe(module, 8)] == before


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t"])
def test_a_real_librarys_network_is_made_safe_and_admitted(name):
    library, _, short = name.partition(":")
    pytest.importorskip(library, reason=f"{library} is not installed")
    terms = task(size=32, network={"kind": "backbone", "name": name, "groups": 8})
    module = imaging.network(terms)
    assert not any(isinstance(x, nn.modules.batchnorm._BatchNorm) for x in module.modules())
    assert admit(Patients(started(module), images(terms))).startswith("bookkeeping")
    with refused(DataError, Code.MODEL_FOLDER, "not known"):
        library_network(f"{library}:no_such_network", 2, size=32, groups=8)
    assert short in imaging.architecture(terms)[1]
