"""Images that cannot be used are found, bounded and counted; those that can come out as RGB, upright."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from data_makers import SIZE, captions, encoded, noise, shows, write_parquet

from modeling_tvrn.data import ImageError, load_pairs
from modeling_tvrn.data.images import check_image, decode_image


def saved(image, image_format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(image_format):
    options = {"quality": 95} if image_format in ("JPEG", "WEBP") else {}
    content = encoded(3, image_format, **options)
    for how in ("header", "full"):
        check_image(content, how)
    assert shows(decode_image(content), 3)


@pytest.mark.parametrize("how", ["header", "full"])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_files_cut_short_are_found_by_the_cheap_check_too(image_format, how):
    content = noise(image_format)
    check_image(content, how)
    for kept in (0, 20, len(content) // 2, len(content) - 200):
        with pytest.raises(ImageError, match="corrupt image"):
            check_image(content[:kept], how)


def test_bytes_behind_an_image_do_not_condemn_it():
    """Cameras append data; the end is then not where the cheap check looks, and the image is decoded to decide."""
    for image_format in ("JPEG", "PNG", "WEBP"):
        check_image(noise(image_format) + b"\0" * 500, "header")


def test_size_is_bounded_before_decoding():
    header = struct.pack(">I4sIIBBBBB", 13, b"IHDR", 30_000, 20_000, 8, 2, 0, 0, 0)  # 1.8 gigabytes decoded
    header = b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", zlib.crc32(header[4:]))
    for how in ("header", "full"):
        with pytest.raises(ImageError, match=r"over the pixel limit"):
            check_image(header + encoded(1)[33:], how)
    with pytest.raises(ImageError, match=r"13 x 9, over 116 pixels"):
        decode_image(encoded(1), max_pixels=116)
    assert decode_image(encoded(1), max_pixels=117).size == SIZE


def test_other_programs_formats_are_not_opened():
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    with pytest.raises(ImageError, match="not an image: .*PostScript"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(image_format):
    """Wherever the format keeps it: images that hold none are not searched for it."""
    image = PIL.Image.new("RGB", (20, 10), "red")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert decode_image(saved(image, image_format, exif=exif)).size == (10, 20)


def test_orientation_in_xmp_is_applied():
    xmp = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="8"/>'
    content = saved(PIL.Image.new("RGB", (20, 10), "red"), "JPEG", xmp=xmp)
    assert decode_image(content).size == (10, 20)


@pytest.mark.parametrize("image_format", ["BMP", "PPM", "PNG"])
def test_a_decoded_image_does_not_depend_on_its_file(tmp_path, image_format):
    """Pillow maps files whose pixels are not compressed into memory."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    path = tmp_path / "picture"
    path.write_bytes(saved(PIL.Image.fromarray(pixels), image_format))
    image = decode_image(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert np.array_equal(np.asarray(image), pixels) and type(image) is PIL.Image.Image


def test_modes_become_rgb():
    clear = PIL.Image.new("RGBA", (4, 4), (200, 10, 10, 0))
    assert decode_image(saved(clear)).getpixel((0, 0)) == (255, 255, 255)  # not the colour under the transparency
    grey16 = PIL.Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    assert decode_image(saved(grey16)).getpixel((0, 0)) == (128, 128, 128)  # scaled, not clipped
    palette = PIL.Image.new("RGB", (4, 4), (20, 40, 60)).convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    assert decode_image(saved(palette)).getpixel((0, 0)) == (20, 40, 60)
    for mode in ("L", "1", "CMYK", "LA"):
        image_format = "JPEG" if mode == "CMYK" else "PNG"
        assert decode_image(saved(PIL.Image.new(mode, (4, 4)), image_format)).mode == "RGB"


@pytest.fixture
def damaged(tmp_path):
    """Five rows: good, no image at all, cut short, damaged in the middle, null."""
    whole = noise("JPEG")
    middle = bytearray(noise("PNG"))
    middle[len(middle) // 2] ^= 0xFF
    table = {
        "image": [encoded(0), b"not an image", whole[:-300], bytes(middle), None],
        "caption": [captions(n) for n in range(5)],
        "img_id": list(range(5)),
    }
    write_parquet(tmp_path / "a.parquet", table)
    return tmp_path


class TestReport:
    def test_header_check(self, damaged, caplog):
        records = load_pairs(damaged)
        assert records.image_ids == [0, 3]
        assert dict(records.skipped) == {"not an image": 1, "corrupt image": 1, "missing image": 1}
        assert records.skipped.total == 3 and "2: corrupt image" in records.skipped.examples["corrupt image"][0]
        assert "1: not an image: 12 bytes: text ('not an image')" in records.skipped.examples["not an image"][0]
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "1 x corrupt image (such as 2: " in caplog.text

    def test_what_the_header_check_cannot_see_is_named_when_read(self, damaged):
        records = load_pairs(damaged)
        with pytest.raises(ValueError, match=r"record 1 \(image id 3, all/000003\) of .*corrupt.*verify='full'"):
            records[1]

    def test_full_check(self, damaged):
        records = load_pairs(damaged, verify="full")
        assert [record["image_id"] for record in records] == [0]
        assert dict(records.skipped) == {"not an image": 1, "corrupt image": 2, "missing image": 1}

    def test_no_check(self, damaged):
        records = load_pairs(damaged, verify=False)
        assert len(records) == 5 and not records.skipped
        with pytest.raises(ImageError, match="record 4"):
            records[-1]

    def test_stream_goes_on_and_reports_at_the_end(self, damaged, caplog):
        stream = load_pairs(damaged, streaming=True)
        for _ in range(2):  # a second pass counts anew
            caplog.clear()
            assert [record["image_id"] for record in stream] == [0]
            assert dict(stream.skipped) == {"not an image": 1, "corrupt image": 2, "missing image": 1}
            assert len(caplog.records) == 1 and "2 x corrupt image" in caplog.text

    def test_pixel_limit(self, damaged):
        with pytest.raises(ValueError, match=r"no usable record is left; skipped: .*over the pixel limit"):
            load_pairs(damaged, max_pixels=100)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_empty_captions(self, tmp_path, streaming, caplog):
        table = {
            "image": [encoded(n) for n in range(3)],
            "caption": [["one", "", "  ", "two"], ["", None], [" padded "]],
            "sentids": [[0, 1, 2, 3], [4, 5], [6]],
            "img_id": [0, 1, 2],
        }
        write_parquet(tmp_path / "a.parquet", table)
        records = load_pairs(tmp_path, streaming=streaming)
        read = [(record["captions"], record["caption_ids"]) for record in records]
        assert read == [(["one", "two"], [0, 3]), (["padded"], [6])]
        assert dict(records.skipped) == {"empty caption": 4, "no caption left": 1}
        assert "4 x empty caption (such as a caption of 0)" in caplog.text

    @pytest.mark.parametrize("streaming", [False, True])
    def test_nothing_left_is_an_error(self, tmp_path, streaming):
        write_parquet(tmp_path / "a.parquet", {"image": [b"", b"\x80"], "caption": ["one", "two"]})
        with pytest.raises(ValueError, match=r"no usable record is left; skipped: 2 x corrupt image"):
            list(load_pairs(tmp_path, streaming=streaming))
