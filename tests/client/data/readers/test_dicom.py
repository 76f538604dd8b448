"""DICOM files made here: what is shown, what is kept, and every planted fault."""

import io
import logging
import warnings
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, generate_uid

from client.data.images import Look, read_image
from client.data.readers.dicom import DicomReader, read_pixels
from common.errors import Code, DataError

CANARY = "Canary^Ada"


def refused(code: Code, where: str = ""):
    def right(error):
        return error.code is code and where in error.message and "Canary" not in error.message

    return pytest.raises(DataError, check=right)


def stored(height=16, width=16):
    return (np.add.outer(np.arange(height), np.arange(width)) * 100).astype(np.uint16)


def dicom(pixels=None, **tags):
    """A chest image with 12 of 16 bits; tags override, None removes."""
    pixels = stored() if pixels is None else pixels
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    made.SOPInstanceUID = generate_uid()
    made.PatientName, made.PatientID, made.PatientSex = CANARY, "p1", "F"
    made.PatientAge, made.StudyInstanceUID = "045Y", "1.2.3"
    made.StudyDate, made.StudyTime = "20240131", "083000.25"
    made.InstitutionName = made.StudyDescription = made.PatientComments = CANARY
    made.Rows, made.Columns = pixels.shape[:2]
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
    made.PixelRepresentation = 0
    made.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(made, name)
        else:
            setattr(made, name, value)
    return made


def saved(path, made=None, **tags):
    (dicom(**tags) if made is None else made).save_as(path, enforce_file_format=True)
    return path


# ---------------------------------------------------------------------- what is shown


def test_without_a_window_the_image_runs_from_its_least_to_its_greatest_value(tmp_path):
    found = read_pixels(saved(tmp_path / "a.dcm"))
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.rint(stored() / 3000 * 255))


def test_black_is_white_where_the_file_says_so(tmp_path):
    plain = read_pixels(saved(tmp_path / "a.dcm"))
    turned = read_pixels(saved(tmp_path / "b.dcm", PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(turned, 255 - plain)


def test_values_are_rescaled_before_they_are_windowed(tmp_path):
    """Hounsfield units: air at -1000 is black, bone above the window white."""
    tags = {"RescaleSlope": "2", "RescaleIntercept": "-1000"}
    tags |= {"WindowCenter": "40", "WindowWidth": "400"}
    found = read_pixels(saved(tmp_path / "a.dcm", **tags))
    units = stored() * 2.0 - 1000
    expected = np.clip((units - 39.5) / 399 + 0.5, 0, 1) * 255  # PS3.3 C.11.2.1.2.1
    assert np.array_equal(found, np.rint(expected))
    assert found[0, 0] == 0
    assert found[-1, -1] == 255


def test_the_study_window_goes_before_the_files(tmp_path):
    path = saved(tmp_path / "a.dcm", WindowCenter=["40", "500"], WindowWidth=["400", "900"])
    own, studys = read_pixels(path), read_pixels(path, window=(1500.0, 3001.0))
    assert own[0, 0] == 102  # half a width below its center of 40: 0.4
    assert own[8, 8] == 255
    assert 130 > studys[7, 8] > 120
    look = Look(16, 1, window=(1500.0, 3001.0))
    assert np.array_equal(read_image(path, look), studys)


def test_linear_exact_and_sigmoid_windows_are_told_apart(tmp_path):
    tags = {"WindowCenter": "1500", "WindowWidth": "1000"}
    exact = read_pixels(saved(tmp_path / "a.dcm", VOILUTFunction="LINEAR_EXACT", **tags))
    smooth = read_pixels(saved(tmp_path / "b.dcm", VOILUTFunction="SIGMOID", **tags))
    assert exact[7, 8] == smooth[7, 8] == 128
    assert exact[0, 10] == 0
    assert smooth[0, 10] == round(255 / (1 + np.exp(2)))


def test_signed_values_keep_their_sign_and_overlays_in_unused_bits_are_left_out(tmp_path):
    signed = np.array([[-2048, -1], [0, 2047]], np.int16).repeat(8, 0).repeat(8, 1)
    path = saved(tmp_path / "a.dcm", dicom(signed, PixelRepresentation=1))
    assert read_pixels(path)[::8, ::8].tolist() == [[0, 127], [128, 255]]
    overlaid = stored() | 0x8000
    path = saved(tmp_path / "b.dcm", dicom(overlaid))
    assert np.array_equal(read_pixels(path), read_pixels(saved(tmp_path / "c.dcm")))


def test_padding_does_not_stretch_the_range(tmp_path):
    padded = stored() // 2 + 1000
    padded[0] = 0
    plain = read_pixels(saved(tmp_path / "a.dcm", dicom(padded)))
    real = read_pixels(saved(tmp_path / "b.dcm", dicom(padded, PixelPaddingValue=0)))
    assert plain[1, 0] > 80
    assert real[1, 0] == 0
    assert not real[0].any()


def test_eight_bits_runs_and_colour_are_read(tmp_path):
    eight = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
    gray = (stored() // 16).astype(np.uint8)
    window = {"WindowCenter": "128", "WindowWidth": "256"}
    assert np.array_equal(
        read_pixels(saved(tmp_path / "a.dcm", dicom(gray, **eight, **window))), gray
    )
    rgb = np.stack([gray, gray[::-1], 255 - gray], axis=-1)
    tags = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    assert np.array_equal(read_pixels(saved(tmp_path / "b.dcm", dicom(rgb, **eight, **tags))), rgb)
    packed = dicom()
    packed.compress(RLELossless)
    assert np.array_equal(
        read_pixels(saved(tmp_path / "c.dcm", packed)), read_pixels(saved(tmp_path / "d.dcm"))
    )


def test_a_named_frame_of_several_is_read(tmp_path):
    frames = np.stack([stored(), stored().T[::-1]])
    made = dicom(frames, Rows=16, Columns=16, NumberOfFrames=2)
    path = saved(tmp_path / "a.dcm", made)
    one = read_pixels(saved(tmp_path / "b.dcm", dicom(frames[1])))
    assert np.array_equal(read_pixels(path, frame=1), one)
    with refused(Code.IMAGE_KIND, "2 frames"):
        read_pixels(path)
    with refused(Code.IMAGE_KIND, "no frame 2"):
        read_pixels(path, frame=2)


# ---------------------------------------------------------------------- planted faults


def _cut(path):
    whole = saved(path).read_bytes()
    path.write_bytes(whole[: len(whole) - 100])


def _cut_header(path):
    path.write_bytes(saved(path).read_bytes()[:300])


def _deflated(path):
    content = io.BytesIO()
    made = dicom()
    meta, made.file_meta = made.file_meta, FileMetaDataset()
    meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    pydicom.dcmwrite(content, made, implicit_vr=False, little_endian=True)
    packer = zlib.compressobj(wbits=-15)
    body = packer.compress(content.getvalue()) + packer.flush()
    head = io.BytesIO()
    pydicom.filewriter.write_file_meta_info(head, meta, enforce_standard=False)
    path.write_bytes(b"\0" * 128 + b"DICM" + head.getvalue() + body)


def _unknown_compression(path):
    made = dicom()
    made.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.80"  # JPEG-LS
    made.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + CANARY.encode() + b"\xff\xd9"])
    made["PixelData"].VR = "OB"
    saved(path, made)


FAULTS = {
    "without pixels": ({"PixelData": None}, Code.IMAGE_KIND),
    "without rows": ({"Rows": None}, Code.IMAGE_KIND),
    "burned in": ({"BurnedInAnnotation": "YES"}, Code.IMAGE_TEXT),
    "burned in, odd": ({"BurnedInAnnotation": "PARTLY"}, Code.IMAGE_TEXT),
    "32 bits": ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, Code.IMAGE_KIND),
    "single bits": ({"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0}, Code.IMAGE_KIND),
    "more bits than there are": ({"BitsStored": 17, "HighBit": 16}, Code.IMAGE_KIND),
    "shifted bits": ({"HighBit": 15}, Code.IMAGE_KIND),
    "palette": ({"PhotometricInterpretation": "PALETTE COLOR"}, Code.IMAGE_KIND),
    "two samples": ({"SamplesPerPixel": 2}, Code.IMAGE_KIND),
    "too large": ({"Rows": 60000, "Columns": 60000}, Code.IMAGE_KIND),
    "many frames": ({"NumberOfFrames": "2000000000"}, Code.IMAGE_KIND),
    "zero rows": ({"Rows": 0}, Code.IMAGE_KIND),
    "tiny": ({"Rows": 4, "Columns": 64}, Code.IMAGE_KIND),
    "slope 0": ({"RescaleSlope": "0", "RescaleIntercept": "0"}, Code.IMAGE_KIND),
    "window of width 0": ({"WindowCenter": "5", "WindowWidth": "0"}, Code.IMAGE_KIND),
    "window without width": ({"WindowCenter": "5"}, Code.IMAGE_KIND),
    "more rows than pixels": ({"Rows": 32}, Code.DATA_UNREADABLE),
    "depth missing": ({"BitsStored": None}, Code.DATA_UNREADABLE),
    "cut": (_cut, Code.DATA_UNREADABLE),
    "cut header": (_cut_header, Code.IMAGE_KIND),
    "deflated": (_deflated, Code.IMAGE_KIND),
    "unknown compression": (_unknown_compression, Code.IMAGE_KIND),
    "text": (lambda p: p.write_text(CANARY * 50), Code.DATA_UNREADABLE),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused_by_file_and_code_and_quotes_nothing(tmp_path, name, caplog):
    make, code = FAULTS[name]
    path = tmp_path / f"{name}.dcm"
    if callable(make):
        make(path)
    else:
        saved(path, **make)
    with caplog.at_level(logging.DEBUG), refused(code, f"{name}.dcm"):
        read_pixels(path)
    assert "Canary" not in caplog.text


def test_the_control_without_a_fault_is_read(tmp_path):
    assert read_pixels(saved(tmp_path / "a.dcm", BurnedInAnnotation="NO")).shape == (16, 16)


# ---------------------------------------------------------------------- folders


def test_a_folder_becomes_one_encounter_a_study_with_its_images_in_order(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    saved(tmp_path / "b.dcm", InstanceNumber=2)
    saved(
        tmp_path / "c.DCM", InstanceNumber=1, AcquisitionDate="20240131", AcquisitionTime="090000"
    )
    saved(tmp_path / "deep" / "er" / "IM0001", PatientID="p2", StudyInstanceUID="9", PatientSex="M")
    saved(tmp_path / "d.dcm", StudyInstanceUID="1.2.4", StudyDate="20250131")
    reader = DicomReader(tmp_path)
    found = list(reader.encounters())
    assert [(e.patient, e.encounter, len(e.images)) for e in found] == [
        ("p1", "1.2.3", 2),
        ("p1", "1.2.4", 1),
        ("p2", "9", 1),
    ]
    first = found[0]
    assert [image.path.name for image in first.images] == ["c.DCM", "b.dcm"]
    assert str(first.images[0].time) == "2024-01-31 09:00:00"
    assert str(first.start) == "2024-01-31 08:30:00"
    assert first.images[1].time == first.start
    assert (first.age, first.sex, found[2].sex) == (45.0, "female", "male")
    assert read_pixels(first.images[0].path).shape == (16, 16)
    assert list(DicomReader(tmp_path).encounters()) == found


def test_no_text_about_a_patient_is_kept(tmp_path):
    saved(tmp_path / "a.dcm")
    (found,) = DicomReader(tmp_path).encounters()
    told = [getattr(found, name) for name in found.__slots__]
    assert "Canary" not in str(told)
    assert "Canary" in (tmp_path / "a.dcm").read_bytes().decode("latin-1")  # control
    assert "p1" not in repr(found)


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    saved(tmp_path / "good.dcm")
    saved(tmp_path / "report.dcm", Rows=None, Columns=None, PixelData=None)
    saved(tmp_path / "nobody.dcm", PatientID="")
    saved(tmp_path / "nowhere.dcm", StudyInstanceUID=None)
    saved(tmp_path / "burned.dcm", BurnedInAnnotation="YES")
    saved(tmp_path / "frames.dcm", NumberOfFrames="2")
    (tmp_path / "notes.txt").write_text("not ours")
    (tmp_path / "VERSION").write_text("not ours either")
    (tmp_path / "link.dcm").symlink_to(tmp_path / "good.dcm")
    (tmp_path / "loop").symlink_to(tmp_path)
    reader = DicomReader(tmp_path)
    (found,) = reader.encounters()
    assert len(found.images) == 1
    assert reader.tally.counts == {
        "without pixels": 1,
        "without a patient id": 1,
        "without a study id": 1,
        "text burned into the pixels": 1,
        "several frames": 1,
        "not a DICOM file": 2,
        "a link, not followed": 2,
        "burned-in text neither stated nor denied (kept)": 1,
    }


@pytest.mark.parametrize(
    ("tags", "age"),
    [
        ({"PatientAge": "018M"}, 1.5),
        ({"PatientAge": "095Y"}, 90.0),
        ({"PatientAge": "old", "PatientBirthDate": "19940131"}, 30.0),
        ({"PatientAge": "", "PatientBirthDate": "18000101"}, 90.0),
        ({"PatientAge": "", "PatientBirthDate": "20250101"}, None),
        ({"PatientAge": "", "PatientBirthDate": "someday"}, None),
        ({"PatientAge": "", "StudyDate": "", "PatientBirthDate": "19940131"}, None),
    ],
)
def test_ages_are_in_years_and_high_or_impossible_ones_are_hidden(tmp_path, tags, age):
    made = dicom()
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in tags.items():
            setattr(made, name, value)
        saved(tmp_path / "a.dcm", made)
    (found,) = DicomReader(tmp_path).encounters()
    assert found.age == (age if age is None else pytest.approx(age, abs=0.01))


def test_a_damaged_file_ends_the_reading_and_an_empty_folder_is_refused(tmp_path):
    with refused(Code.DATA_EMPTY):
        list(DicomReader(tmp_path).encounters())
    with refused(Code.DATA_UNREADABLE):
        DicomReader(tmp_path / "absent")
    saved(tmp_path / "a.dcm")
    (tmp_path / "b.dcm").write_text(CANARY)
    with refused(Code.DATA_UNREADABLE, "b.dcm"):
        list(DicomReader(tmp_path).encounters())
