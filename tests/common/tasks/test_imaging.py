"""What a study of images may say."""

import pytest
from pydantic import ValidationError

from common.outcomes import Classes
from common.tasks.imaging import Augmentation, ImagingTask

LABELS = ["normal", "pneumonia"]


def task(**terms):
    return ImagingTask.model_validate({"kind": "imaging", "labels": LABELS} | terms)


def wrong(**terms):
    with pytest.raises(ValidationError) as caught:
        task(**terms)
    return str(caught.value)


def test_the_defaults_are_a_small_network_for_small_gray_images_without_variation():
    made = task()
    assert (made.size, made.channels, made.network.kind) == (28, 1, "resnet")
    assert not made.augmentation.active
    assert made.outcome == Classes(("normal", "pneumonia"))
    assert made.predicted == ("label",)
    assert made.network_name == "16-32-64 residual network"


@pytest.mark.parametrize(
    ("terms", "told"),
    [
        ({"labels": ["one"]}, "at least 2"),
        ({"labels": ["one", "one"]}, "listed twice"),
        ({"channels": 2}, "1 or 3"),
        ({"size": 4}, "greater than or equal to 8"),
        ({"columns": {"image": "patient"}}, "also the patient column"),
        ({"columns": {"label": "image"}}, "also another column"),
        ({"network": {"kind": "resnet", "widths": [12], "groups": 8}}, "multiple of groups"),
        ({"network": {"kind": "resnet", "widths": [8] * 5}}, "pixels a side"),
        ({"network": {"kind": "resnet", "stem_stride": 3}}, "1, 2 or 4"),
        ({"network": {"kind": "backbone", "name": "hub:resnet18"}}, "pattern"),
        ({"network": {"kind": "backbone", "name": "timm:../x"}}, "pattern"),
        ({"network": {"kind": "unet"}}, "resnet"),
        ({"augmentation": {"shift": 0.6}}, "less than or equal to 0.5"),
        ({"augmentation": {"mixup": 0.2}}, "Extra inputs"),
        ({"window": {"center": 0.0, "width": 0.0}}, "greater than or equal to 1"),
    ],
)
def test_what_makes_no_sense_is_named(terms, told):
    assert told in wrong(**terms)


@pytest.mark.parametrize(
    "terms",
    [{"flip": "both"}, {"shift": 0.1}, {"rotate": 5.0}, {"zoom": 0.1}, {"contrast": 0.1}],
)
def test_any_variation_switches_it_on(terms):
    assert Augmentation.model_validate(terms).active


def test_a_backbone_is_told_by_its_name():
    made = task(size=224, channels=3, network={"kind": "backbone", "name": "timm:resnet18"})
    assert made.network_name == "timm:resnet18"
