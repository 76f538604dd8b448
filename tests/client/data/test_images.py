"""Pictures as a hospital has them; every planted fault is refused by its own code."""

import io
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from client.data.images import (
    MAX_PIXELS,
    Look,
    file_bytes,
    fitted,
    image_of,
    image_path,
    look_of,
    read_image,
    read_medmnist,
)
from common.errors import Code, DataError
from common.tasks.imaging import ImagingTask

GRAY = Look(16, 1)
COLOUR = Look(16, 3)
CANARY = "canary-5c1e"


def refused(code: Code, where: str = ""):
    def right(error):
        return error.code is code and where in error.message and CANARY not in error.message

    return pytest.raises(DataError, check=right)


def ramp(height=16, width=16):
    return (np.add.outer(np.arange(height), np.arange(width)) * 7 % 256).astype(np.uint8)


def colours(height=16, width=16):
    gray = ramp(height, width)
    return np.stack([gray, gray[::-1], 255 - gray], axis=-1)


def saved(path, pixels, mode=None, **options):
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(width, height, *, depth=8, colour=0, body=b""):
    """A PNG with a header of our own and whatever body."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    packed = chunk(b"IDAT", zlib.compress(body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + packed + chunk(b"IEND", b"")


# ---------------------------------------------------------------------- what is read


def test_gray_pngs_are_read_bit_for_bit(tmp_path):
    pixels = ramp()
    assert np.array_equal(read_image(saved(tmp_path / "a.png", pixels), GRAY), pixels)
    assert np.array_equal(read_image(saved(tmp_path / "b.PNG", pixels), GRAY), pixels)


def test_colour_pngs_are_read_bit_for_bit_and_gray_ones_become_three_equal_channels(tmp_path):
    pixels = colours()
    assert np.array_equal(read_image(saved(tmp_path / "a.png", pixels), COLOUR), pixels)
    gray = read_image(saved(tmp_path / "b.png", ramp()), COLOUR)
    assert np.array_equal(gray, np.repeat(ramp()[:, :, None], 3, axis=2))


def test_jpegs_are_read_and_turned_as_their_camera_held_them(tmp_path):
    tall = np.zeros((32, 16), np.uint8)
    tall[:16] = 255
    plain = read_image(saved(tmp_path / "a.jpg", tall, quality=95), Look(32, 1, "stretch"))
    assert plain[:12].min() > 240
    assert plain[20:].max() < 15
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    path = saved(tmp_path / "b.jpeg", tall, quality=95, exif=exif)
    turned = read_image(path, Look(32, 1, "stretch"))
    assert turned[:12].max() < 15


def test_gray_saved_as_rgb_and_opaque_alpha_are_read_as_gray(tmp_path):
    for mode in ("RGB", "LA", "RGBA"):
        path = saved(tmp_path / f"{mode}.png", ramp(), mode)
        assert np.array_equal(read_image(path, GRAY), ramp()), mode


def test_palettes_and_single_bits_are_read_as_the_colours_that_they_stand_for(tmp_path):
    image = Image.fromarray(ramp() // 128).convert("P")
    image.putpalette([0, 0, 0, 200, 10, 60])
    image.save(tmp_path / "p.png")
    found = read_image(tmp_path / "p.png", COLOUR)
    assert {tuple(pixel) for pixel in found.reshape(-1, 3).tolist()} == {(0, 0, 0), (200, 10, 60)}
    bits = saved(tmp_path / "bit.png", (ramp() > 100).astype(np.uint8) * 255, "1")
    assert set(np.unique(read_image(bits, GRAY))) == {0, 255}


def test_images_that_are_not_square_are_padded_cropped_or_stretched_as_the_study_says():
    wide = np.full((16, 32), 200, np.uint8)
    wide[:, :8] = wide[:, 24:] = 100
    padded = fitted(wide, Look(32, 1, "pad"), where="x")
    assert not padded[:8].any()
    assert padded[8:24].min() == 100
    cropped = fitted(wide, Look(16, 1, "crop"), where="x")
    assert cropped.min() == cropped.max() == 200
    stretched = fitted(wide, Look(16, 1, "stretch"), where="x")
    assert stretched[0, 0] == 100
    assert stretched[0, 8] == 200
    for found in (padded, cropped, stretched):
        assert found.dtype == np.uint8


def test_shrinking_averages_rather_than_skipping_pixels():
    lines = np.zeros((64, 64), np.uint8)
    lines[::2] = 255
    found = fitted(lines, Look(16, 1), where="x")
    assert abs(int(found[8, 8]) - 128) < 5
    assert lines[::4].min() == 255  # control: skipping would show white alone


# ---------------------------------------------------------------------- planted faults


def _truncated_png(path):
    content = saved(path, np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8))
    content.write_bytes(content.read_bytes()[:2000])


def _truncated_jpeg(path):
    content = saved(path, np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8))
    content.write_bytes(content.read_bytes()[:1500])


def _animated(path):
    frames = [Image.fromarray(ramp()), Image.fromarray(255 - ramp())]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _transparent(path):
    image = Image.fromarray(ramp()).convert("RGBA")
    image.putpixel((3, 3), (0, 0, 0, 0))
    image.save(path)


def _transparent_palette(path):
    image = Image.fromarray(ramp() // 128).convert("P")
    image.save(path, transparency=0)


FAULTS = {
    "16 bits.png": (lambda p: saved(p, ramp().astype(np.uint16) * 256), Code.IMAGE_KIND),
    "bomb.png": (lambda p: p.write_bytes(png(60_000, 60_000)), Code.IMAGE_KIND),
    "large.png": (lambda p: p.write_bytes(png(8193, 8193)), Code.IMAGE_KIND),
    "zero.png": (lambda p: p.write_bytes(png(0, 16)), Code.DATA_UNREADABLE),
    "tiny.png": (lambda p: saved(p, ramp(7, 20)), Code.IMAGE_KIND),
    "colour.png": (lambda p: saved(p, colours()), Code.IMAGE_KIND),
    "cmyk.jpg": (lambda p: saved(p, colours(), "CMYK"), Code.IMAGE_KIND),
    "animated.png": (_animated, Code.IMAGE_KIND),
    "transparent.png": (_transparent, Code.IMAGE_KIND),
    "transparent palette.png": (_transparent_palette, Code.IMAGE_KIND),
    "cut.png": (_truncated_png, Code.DATA_UNREADABLE),
    "cut.jpg": (_truncated_jpeg, Code.DATA_UNREADABLE),
    "no pixels.png": (lambda p: p.write_bytes(png(16, 16, body=b"\0" * 20)), Code.DATA_UNREADABLE),
    "text.png": (lambda p: p.write_text(CANARY), Code.DATA_UNREADABLE),
    "gif.png": (lambda p: saved(p, ramp(), format="GIF"), Code.DATA_UNREADABLE),
    "jpeg.png": (lambda p: saved(p, ramp(), format="JPEG"), Code.DATA_UNREADABLE),
    "empty.png": (lambda p: p.touch(), Code.DATA_UNREADABLE),
    "folder.png": (lambda p: p.mkdir(), Code.DATA_UNREADABLE),
    "pipe.png": (os.mkfifo, Code.DATA_UNREADABLE),
    "missing.png": (lambda p: None, Code.DATA_UNREADABLE),
    "picture.bmp": (lambda p: saved(p, ramp()), Code.IMAGE_KIND),
    "picture.tif": (lambda p: saved(p, ramp()), Code.IMAGE_KIND),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused_by_file_and_code(tmp_path, name):
    make, code = FAULTS[name]
    make(tmp_path / name)
    with refused(code, name):
        read_image(tmp_path / name, GRAY)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """The body of this one is fine: only its size is wrong."""
    side = 8193
    assert side * side > MAX_PIXELS
    path = tmp_path / "a.png"
    path.write_bytes(png(side, side, depth=1, body=bytes(side * (1 + (side + 7) // 8))))
    assert path.stat().st_size < 100_000
    with refused(Code.IMAGE_KIND, "million pixels"):
        read_image(path, GRAY)
    control = tmp_path / "b.png"
    control.write_bytes(png(64, 64, depth=1, body=bytes(64 * 9)))
    assert not read_image(control, GRAY).any()


@pytest.mark.parametrize(
    "name",
    ["../out.png", "a/../../out.png", "/etc/out.png", "..", "", ".", "a\\b.png", "a\0.png"],
)
def test_a_path_outside_of_the_folder_is_refused(tmp_path, name):
    saved(tmp_path / "out.png", ramp())
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    with refused(Code.IMAGE_PATH):
        image_path(folder, name)


def test_links_are_refused_wherever_they_stand_on_the_way(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    saved(outside / "a.png", ramp())
    (folder / "link.png").symlink_to(outside / "a.png")
    (folder / "sub").symlink_to(outside)
    for name in ("link.png", "sub/a.png"):
        with refused(Code.IMAGE_PATH):
            image_path(folder, name)
    with refused(Code.IMAGE_PATH, "link.png"):  # put there after the name was looked at
        read_image(folder / "link.png", GRAY)
    inside = saved(folder / "b.png", ramp())
    assert image_path(folder, "b.png") == inside


def test_a_name_without_a_known_end_is_refused(tmp_path):
    for name in ("a.gif", "a", "a.png.exe"):
        with refused(Code.IMAGE_KIND):
            image_path(tmp_path, name)


def test_a_file_above_the_limit_is_not_read(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", ramp())
    monkeypatch.setattr("client.data.images.MAX_FILE_BYTES", path.stat().st_size)
    assert file_bytes(path) == path.read_bytes()
    monkeypatch.setattr("client.data.images.MAX_FILE_BYTES", path.stat().st_size - 1)
    with refused(Code.IMAGE_KIND, "a.png"):
        file_bytes(path)


def test_a_table_names_its_images_and_mistakes_name_the_tables_line(tmp_path):
    (tmp_path / "sub").mkdir()
    saved(tmp_path / "sub" / "a.png", ramp())
    assert np.array_equal(image_of(tmp_path, "sub/a.png", GRAY, where="t.csv:2"), ramp())
    with refused(Code.DATA_UNREADABLE, "t.csv:3: "):
        image_of(tmp_path, "sub/b.png", GRAY, where="t.csv:3")
    with refused(Code.IMAGE_PATH, "t.csv:4: "):
        image_of(tmp_path, f"../{CANARY}.png", GRAY, where="t.csv:4")


def test_the_studys_terms_say_how_pictures_look():
    terms = {"kind": "imaging", "labels": ["a", "b"], "size": 16, "channels": 3}
    assert look_of(ImagingTask.model_validate(terms)) == Look(16, 3, "pad", None)
    window = {"center": 40.0, "width": 400.0}
    found = look_of(ImagingTask.model_validate({**terms, "window": window, "fit": "crop"}))
    assert (found.window, found.fit) == ((40.0, 400.0), "crop")


def test_arrays_that_are_no_pictures_are_refused():
    for pixels in (ramp().astype(np.float32), ramp()[0], colours()[:, :, :2]):
        with refused(Code.IMAGE_KIND, "here"):
            fitted(pixels, GRAY, where="here")


# ---------------------------------------------------------------------- MedMNIST


def archive(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_a_medmnist_part_becomes_one_record_an_image(tmp_path):
    images = np.stack([ramp(28, 28), 255 - ramp(28, 28)])
    path = archive(
        tmp_path / "a.npz", train_images=images, train_labels=np.array([[1], [0]], np.uint8)
    )
    first, second = read_medmnist(path, "train", ("normal", "ill"))
    assert (first.label, second.label) == ("ill", "normal")
    assert first.patient != second.patient
    assert np.array_equal(second.image, images[1])
    assert CANARY not in repr(first)


def test_an_archive_with_objects_is_refused_without_running_them(tmp_path):
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (ran.touch, ())

    images = np.empty(2, object)
    images[:] = [Trap(), Trap()]
    path = archive(tmp_path / "a.npz", train_images=images, train_labels=np.zeros((2, 1), np.uint8))
    with refused(Code.DATA_UNREADABLE, "a.npz"):
        read_medmnist(path, "train", ("a", "b"))
    assert not ran.exists()
    np.load(path, allow_pickle=True)["train_images"]  # control: the trap is armed
    assert ran.exists()


def test_other_faults_of_an_archive_are_refused(tmp_path):
    images, labels = np.zeros((2, 28, 28), np.uint8), np.zeros((2, 1), np.uint8)

    def part(name, **arrays):
        return archive(tmp_path / name, **arrays)

    faults = [
        (part("a.npz", val_images=images, val_labels=labels), Code.DATA_COLUMNS),
        (part("b.npz", train_images=images, train_labels=labels + 2), Code.DATA_LABEL),
        (part("c.npz", train_images=images, train_labels=labels[:, 0]), Code.DATA_VALUE),
        (part("d.npz", train_images=images[:0], train_labels=labels[:0]), Code.IMAGE_KIND),
        (part("e.npz", train_images=images * 1.0, train_labels=labels), Code.IMAGE_KIND),
        (part("f.npz", train_images=images[None, None], train_labels=labels), Code.IMAGE_KIND),
    ]
    for path, code in faults:
        with refused(code, path.name):
            read_medmnist(path, "train", ("a", "b"))
    whole = faults[1][0].read_bytes()
    (tmp_path / "g.npz").write_bytes(whole[: len(whole) // 2])
    with refused(Code.DATA_UNREADABLE, "g.npz"):
        read_medmnist(tmp_path / "g.npz", "train", ("a", "b"))


def test_an_archive_whose_header_promises_more_than_it_holds_is_refused(tmp_path):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (1 << 44, 28, 28)}
    )
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("train_images.npy", head.getvalue())
    with refused(Code.DATA_UNREADABLE, "a.npz"):
        read_medmnist(path, "train", ("a", "b"))
