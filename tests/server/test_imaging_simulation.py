"""Whole studies of images as configs/ shows them: to the model's answers, and every bad row."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from client.data.intake import receive
from client.data.synthetic_images import films
from client.predict import predict
from common.cli import main
from common.errors import Code, DataError
from common.tasks.imaging import ImagingTask

torch.set_num_threads(1)
CONFIGS = Path(__file__).parents[2] / "configs"
STUDY = CONFIGS / "imaging.yaml"
TABLE = CONFIGS / "data" / "synthetic-films.csv"
SHARED = Path(os.environ.get("WARDROUND_DATA", Path(__file__).parents[3] / "shared" / "data"))
PRIVATE = {"epsilon": 8.0, "delta": 1e-4, "clip_norm": 1.0}
MODES = {
    "none": {},
    "local": {
        "privacy": {"mode": "local", **PRIVATE},
        "training": {
            "rounds": 2,
            "local_steps": 2,
            "sampling_rate": 0.5,
            "expected_batch": 12,
            "optimizer": {"name": "sgd", "learning_rate": 0.2},
        },
        "evaluation": {"every": 2, "score_bins": 16},
    },
    "joint": {
        "privacy": {"mode": "joint", **PRIVATE},
        "training": {
            "rounds": 3,
            "local_steps": 1,
            "sampling_rate": 0.5,
            "expected_batch": 12,
        },
        "aggregation": {"optimizer": {"name": "fedavgm", "learning_rate": 0.2}},
        "evaluation": {"every": 3, "score_bins": 16},
    },
}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    made = {}

    def play(mode):
        if mode not in made:
            folder = tmp_path_factory.mktemp(mode)
            study = yaml.safe_load(STUDY.read_text()) | MODES[mode]
            study["simulation"]["data"]["files"] = [str(TABLE)]
            (folder / "study.yaml").write_text(yaml.safe_dump(study))
            out = folder / "run"
            assert main(["simulate", str(folder / "study.yaml"), "--out", str(out)]) == 0
            made[mode] = out
        return made[mode]

    return play


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_ends_with_a_measured_model_and_a_card(played, mode):
    run = played(mode)
    final = json.loads((run / "metrics.json").read_text())["final_metrics"]
    assert {"auroc", "accuracy"} <= set(final)
    assert len(final["per_site"]) == 3
    card = (run / "MODEL_CARD.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert "residual network" in card
    spent = json.loads((run / "privacy.json").read_text()).get("epsilon_spent")
    assert (spent is None) == (mode == "none")
    assert spent is None or 0 < spent <= 8


def test_the_example_learns(played):
    final = json.loads((played("none") / "metrics.json").read_text())["final_metrics"]
    assert final["auroc"] > 0.7


def test_the_model_folder_predicts_without_the_study(played, tmp_path):
    from client.data.images import look_of, read_image
    from client.saved import SavedRows

    run, out = played("none"), tmp_path / "answers.csv"
    count = predict(run / "model", TABLE, out, patient="patient")
    with out.open(newline="") as told, TABLE.open(newline="") as truth:
        answers, rows = list(csv.DictReader(told)), list(csv.DictReader(truth))
    assert count == len(answers) == len(rows)
    assert [a["patient"] for a in answers] == [r["patient"] for r in rows]
    right = sum(a["label"] == r["label"] for a, r in zip(answers, rows, strict=True))
    assert right / count > 0.65
    # The exported network itself, on pixels read by hand.
    saved = SavedRows(run / "model", "cpu")
    look = look_of(saved.task)
    pixels = np.stack([read_image(TABLE.parent / row["image"], look) for row in rows])
    with torch.no_grad():
        shares = saved.network(torch.from_numpy(pixels)[:, None]).softmax(1)[:, 1].numpy()
    assert np.allclose([float(a["p(opacity)"]) for a in answers], shares, atol=1e-5)


def test_plan_and_check_speak_of_images(capsys):
    assert main(["check", str(STUDY)]) == 0
    assert "2 labels" in capsys.readouterr().out
    assert main(["plan", str(STUDY)]) == 0
    assert "72 in all" in capsys.readouterr().out
    assert main(["client", "data", "check", str(STUDY), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert told["usable"] is True


def test_the_examples_films_are_made_here():
    with TABLE.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    made = films()
    assert len(rows) == len(made)
    for row, (patient, hospital, file, label, pixels) in zip(rows, made, strict=True):
        assert list(row.values()) == [patient, hospital, file, label]
        assert np.array_equal(np.asarray(Image.open(TABLE.parent / file)), pixels)
    assert len({pixels.tobytes() for *_, pixels in made}) == len(made)
    assert not np.array_equal(films(1)[0][4], made[0][4])


# ---------------------------------------------------------------------- tables of images


def task(**terms):
    base = {"kind": "imaging", "labels": ["clear", "opacity"], "size": 16}
    return ImagingTask.model_validate(base | terms)


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


GRAY = (np.add.outer(np.arange(16), np.arange(16)) * 8).astype(np.uint8)


def table(folder, *rows, head="patient,image,label"):
    (folder / "good.png").write_bytes(png(GRAY))
    path = folder / "films.csv"
    path.write_text("\n".join([head, "p1,good.png,clear", *rows]) + "\n")
    return path


def dicom(path, **tags):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3.4"
    made.PatientName = "Canary^Ada"
    made.Rows = made.Columns = 16
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
    made.PixelRepresentation = 0
    made.PixelData = (GRAY.astype(np.uint16) * 10).tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    made.save_as(path, enforce_file_format=True)


def test_a_table_may_name_pngs_and_dicom_files(tmp_path):
    dicom(tmp_path / "film.dcm", PhotometricInterpretation="MONOCHROME1")
    found = receive(task(), [table(tmp_path, "p2,film.dcm,opacity")]).records
    assert [(r.patient, r.label, r.text) for r in found] == [
        ("p1", "clear", ""),
        ("p2", "opacity", ""),
    ]
    assert np.array_equal(found[0].image, GRAY)
    assert found[1].image[0, 0] == 255
    assert found[1].image[-1, -1] == 0


def test_of_each_patient_the_first_images_are_read_and_the_rest_is_counted(tmp_path):
    path = table(tmp_path, "p1,good.png,clear", "p1,good.png,clear", "p2,good.png,opacity")
    found = receive(task(max_images=2), [path])
    assert [r.patient for r in found.records] == ["p1", "p1", "p2"]
    assert dict(found.dropped) == {"p1": 1}


COLOUR = np.stack([GRAY, GRAY.T[::-1], 255 - GRAY], axis=-1)
FAULTS = {
    "absent": ("gone.png", None, Code.DATA_UNREADABLE),
    "no name": ("  ", None, Code.DATA_VALUE),
    "outside": ("../x.png", None, Code.IMAGE_PATH),
    "absolute": ("/etc/x.png", None, Code.IMAGE_PATH),
    "other kind": ("x.tif", b"II*\0", Code.IMAGE_KIND),
    "no suffix": ("x", b"", Code.IMAGE_KIND),
    "empty": ("x.png", b"", Code.DATA_UNREADABLE),
    "truncated": ("x.png", png(COLOUR[:, :, 1])[:50], Code.DATA_UNREADABLE),
    "a jpeg by name": ("x.jpg", png(GRAY), Code.DATA_UNREADABLE),
    "text": ("x.png", b"Canary, Ada", Code.DATA_UNREADABLE),
    "colour": ("x.png", png(COLOUR), Code.IMAGE_KIND),
    "too small": ("x.png", png(GRAY[:4, :4]), Code.IMAGE_KIND),
    "not DICOM": ("x.dcm", b"Canary, Ada", Code.DATA_UNREADABLE),
    "DICOM without pixels": ("x.dcm", {"PixelData": None}, Code.IMAGE_KIND),
    "burned-in text": ("x.dcm", {"BurnedInAnnotation": "YES"}, Code.IMAGE_TEXT),
    "several frames": ("x.dcm", {"NumberOfFrames": 2}, Code.IMAGE_KIND),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_image_is_named_by_the_tables_line(tmp_path, fault):
    name, content, code = FAULTS[fault]
    if isinstance(content, dict):
        dicom(tmp_path / name, **content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    path = table(tmp_path, f"p2,{name},opacity")
    with pytest.raises(DataError) as caught:
        receive(task(), [path])
    assert caught.value.code is code
    assert f"{path}:3" in caught.value.message
    assert "Canary" not in caught.value.message


@pytest.mark.parametrize(
    ("row", "head", "code"),
    [
        ("p2,good.png,cloudy", "patient,image,label", Code.DATA_LABEL),
        ("p2,good.png,", "patient,image,label", Code.DATA_VALUE),
        (",good.png,clear", "patient,image,label", Code.DATA_VALUE),
        ("p2,good.png", "patient,image,label", Code.DATA_RAGGED),
        ("p2,good.png,clear", "patient,film,label", Code.DATA_COLUMNS),
        ("p2,good.png,clear", "image,image,label", Code.DATA_COLUMNS),
    ],
)
def test_a_bad_row_is_named_before_any_image_is_opened(tmp_path, monkeypatch, row, head, code):
    path = table(tmp_path, row, head=head)
    monkeypatch.setattr("client.data.images.image_of", lambda *asked, **more: pytest.fail("opened"))
    with pytest.raises(DataError) as caught:
        receive(task(), [path])
    assert caught.value.code is code
    assert str(path) in caught.value.message


# ---------------------------------------------------------------------- archives


def test_an_archive_is_unpacked_as_tables_that_a_study_reads(tmp_path, capsys):
    arrays = {}
    for part, count in (("train", 6), ("test", 3)):
        arrays[f"{part}_images"] = np.stack([np.roll(GRAY, at) for at in range(count)])
        arrays[f"{part}_labels"] = np.arange(count)[:, None] % 2
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    words = ["client", "data", "unpack", str(tmp_path / "a.npz"), str(tmp_path / "films")]
    assert main([*words, "--labels", "clear,opacity"]) == 0
    assert "train.csv: 6 images" in capsys.readouterr().out
    found = receive(task(), [tmp_path / "films" / "train.csv"]).records
    assert [r.label for r in found] == ["clear", "opacity"] * 3
    assert len({r.patient for r in found}) == 6
    assert all(np.array_equal(r.image, np.roll(GRAY, at)) for at, r in enumerate(found))
    assert not (tmp_path / "films" / "val.csv").exists()
    # What is there is never written over.
    assert main(words) != 0
    assert "is already there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arrays", "labels", "said"),
    [
        ({"x": GRAY}, "clear,opacity", "train_images"),
        (
            {"train_images": GRAY[None], "train_labels": np.array([[2]])},
            "clear,opacity",
            "without a label",
        ),
    ],
)
def test_an_archive_that_is_none_leaves_no_folder(tmp_path, capsys, arrays, labels, said):
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    words = ["client", "data", "unpack", str(tmp_path / "a.npz"), str(tmp_path / "films")]
    assert main([*words, "--labels", labels]) != 0
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_pneumoniamnist_is_read_whole(tmp_path):
    from client.data.images import read_medmnist

    archive = SHARED / "pneumoniamnist" / "pneumoniamnist.npz"
    if not archive.is_file():
        pytest.skip(f"there is no {archive}")
    sizes = {
        part: len(read_medmnist(archive, part, ("normal", "pneumonia")))
        for part in ("train", "val", "test")
    }
    assert sizes == {"train": 4708, "val": 524, "test": 624}
