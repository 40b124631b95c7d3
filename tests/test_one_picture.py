"""One picture, one set of pixels: whatever form it has, and whichever part of the package it is given to."""

import http.server
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from data_makers import encoded, noise
from hub_makers import pixel_model
from transformers import ViTImageProcessorPil

from modeling_tvrn import TVRNProcessor
from modeling_tvrn.data import ImageError, load_pairs
from modeling_tvrn.data.images import decode_image
from modeling_tvrn.data.training_pairs import image_inputs
from modeling_tvrn.demo import read_upload
from modeling_tvrn.explain.scene import open_image
from modeling_tvrn.export.tvrn_onnx import OnnxModel
from modeling_tvrn.export.writing import _pixel_recipe
from modeling_tvrn.processing_tvrn import build_word_tokenizer
from modeling_tvrn.teachers.teacher import ImagePreparation

SIDE = 12
PROCESSOR = TVRNProcessor(ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}), build_word_tokenizer(["a dog"]))
WIDE, HIGH = 16, 10
GREY = np.linspace(0, 1, WIDE * HIGH).reshape(HIGH, WIDE)  # of the brightest
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def bytes_of(values: np.ndarray) -> np.ndarray:
    return np.rint(255 * values).astype(np.uint8)


def camera_held(orientation: int) -> PIL.Image.Exif:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    return exif


def turned(orientation: int) -> PIL.Image.Image:
    """What a viewer shows of `COLOUR` with that EXIF orientation."""
    picture = PIL.Image.fromarray(bytes_of(COLOUR))
    picture.getexif()[0x0112] = orientation
    return PIL.ImageOps.exif_transpose(picture)


TRANSPARENT = np.dstack([bytes_of(COLOUR), bytes_of(GREY)])
PICTURES: dict[str, tuple[PIL.Image.Image, str, dict[str, Any]]] = {
    **{
        f"exif {number} {kind}": (PIL.Image.fromarray(bytes_of(COLOUR)), kind, {"exif": camera_held(number)})
        for number, kind in ((2, "PNG"), (3, "TIFF"), (5, "PNG"), (6, "PNG"), (6, "TIFF"), (8, "PNG"))
    },
    "exif 6 WEBP": (
        PIL.Image.fromarray(bytes_of(COLOUR)), "WEBP", {"exif": camera_held(6), "lossless": True, "quality": 100}
    ),
    "16 bits": (PIL.Image.fromarray((65535 * GREY).astype(np.uint16)), "PNG", {}),
    "16 bits, TIFF": (PIL.Image.fromarray((65535 * GREY).astype(np.uint16)), "TIFF", {}),
    "32 bits of 255": (PIL.Image.fromarray((255 * GREY).astype(np.int32)), "TIFF", {}),
    "32 bits of 65535": (PIL.Image.fromarray((65535 * GREY).astype(np.int32)), "TIFF", {}),
    "32 bits of 2^31": (PIL.Image.fromarray((0x7FFFFFFF * GREY).astype(np.int32)), "TIFF", {}),
    "floats of 1": (PIL.Image.fromarray(GREY.astype(np.float32)), "TIFF", {}),
    "floats of 255": (PIL.Image.fromarray((255 * GREY).astype(np.float32)), "TIFF", {}),
    "floats of 65535": (PIL.Image.fromarray((65535 * GREY).astype(np.float32)), "TIFF", {}),
    "grey": (PIL.Image.fromarray(bytes_of(GREY)), "PNG", {}),
    "CMYK": (PIL.Image.fromarray(bytes_of(COLOUR)).convert("CMYK"), "TIFF", {}),
    "LAB": (PIL.Image.frombytes("LAB", (WIDE, HIGH), bytes_of(COLOUR).tobytes()), "TIFF", {}),
    "transparent": (PIL.Image.fromarray(TRANSPARENT), "PNG", {}),
    "grey transparent": (PIL.Image.fromarray(TRANSPARENT).convert("LA"), "PNG", {}),
    "palette": (PIL.Image.fromarray(bytes_of(COLOUR)).convert("P"), "PNG", {}),
    "transparent palette": (PIL.Image.fromarray(bytes_of(COLOUR)).convert("P"), "PNG", {"transparency": 3}),
    "transparent colour": (PIL.Image.fromarray(bytes_of(COLOUR)), "PNG", {"transparency": (255, 0, 0)}),
    "black and white": (PIL.Image.fromarray(bytes_of(GREY)).convert("1"), "PNG", {}),
    "animation": (PIL.Image.fromarray(bytes_of(GREY)), "GIF", {"save_all": True}),
}  # fmt: skip


@pytest.fixture(params=PICTURES)
def file(request: Any, tmp_path: Path) -> Path:
    picture, kind, options = PICTURES[request.param]
    path = tmp_path / f"picture.{kind.lower()}"
    if options.get("save_all"):
        options = options | {"append_images": [PIL.ImageOps.invert(picture)]}
    picture.save(path, kind, **options)
    return path


def opened(path: Path) -> PIL.Image.Image:
    """Not decoded yet, as users have pictures; and no file that an animation would keep open."""
    return PIL.Image.open(io.BytesIO(path.read_bytes()))


def by_record(path: Path) -> Any:
    (path.parent / "captions.csv").write_text(f"filename,caption\n{path.name},a dog\n")
    return PROCESSOR(**image_inputs([load_pairs(path.parent)[0]]))["pixel_values"]


def by_onnx(given: Any) -> Any:
    model = OnnxModel.__new__(OnnxModel)  # no graphs: its pictures alone
    model.manifest = {"pixels": _pixel_recipe(PROCESSOR, (3, SIDE, SIDE))}
    return torch.from_numpy(model.pixels([given]))


def of(picture: Any) -> Any:
    return PROCESSOR(images=picture)["pixel_values"]


WAYS: dict[str, Callable[[Path], Any]] = {
    "a picture for the processor": lambda path: of(opened(path)),
    "a copy": lambda path: of(opened(path).copy()),
    "a path for the processor": lambda path: of(str(path)),
    "a Path among several": lambda path: of([path, path])[:1],
    "bytes": lambda path: of(path.read_bytes()),
    "tvrn score": lambda path: of(decode_image(path)),
    "decode_image of a picture": lambda path: of(decode_image(opened(path))),
    "turned by the user": lambda path: of(PIL.ImageOps.exif_transpose(opened(path))),
    "load_pairs": by_record,
    "records of the user's": lambda path: PROCESSOR(**image_inputs([{"image": opened(path)}]))["pixel_values"],
    "explain and search": lambda path: of(open_image(path)),
    "explain and search, a picture": lambda path: of(open_image(opened(path))),
    "the page": lambda path: of(read_upload(path)),
    "ONNX, a path": by_onnx,
    "ONNX, a picture": lambda path: by_onnx(opened(path)),
    "a teacher": lambda path: ImagePreparation(PROCESSOR.image_processor)([opened(path)])["pixel_values"],
}


def test_every_way_in_gives_the_same_pixels(file: Path) -> None:
    wanted = of(decode_image(file))
    assert wanted.std() > 0.2  # neither black nor white
    assert [name for name, way in WAYS.items() if not torch.equal(way(file), wanted)] == []


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        *((f"exif {number} {kind}", np.asarray(turned(number)))
          for number, kind in ((2, "PNG"), (3, "TIFF"), (5, "PNG"), (6, "WEBP"), (8, "PNG"))),
        *((kind, np.repeat(bytes_of(GREY)[..., None], 3, axis=-1))
          for kind in ("16 bits", "16 bits, TIFF", "32 bits of 255", "32 bits of 65535", "32 bits of 2^31",
                       "floats of 1", "floats of 255", "floats of 65535")),
    ],
)  # fmt: skip
def test_the_pixels_are_those_that_a_viewer_shows(kind: str, shown: np.ndarray, tmp_path: Path) -> None:
    picture, form, options = PICTURES[kind]
    picture.save(tmp_path / "picture", form, **options)
    found = np.asarray(decode_image(tmp_path / "picture"))
    assert found.shape == shown.shape
    assert np.abs(found.astype(int) - shown).max() <= 1


def test_a_picture_turned_once_is_not_turned_again(tmp_path: Path) -> None:
    PIL.Image.fromarray(bytes_of(COLOUR)).save(tmp_path / "a.jpg", exif=camera_held(6))
    once = decode_image(tmp_path / "a.jpg")
    assert once.size == (HIGH, WIDE) and decode_image(once).size == (HIGH, WIDE)
    assert torch.equal(of(once), of(PIL.Image.open(tmp_path / "a.jpg")))


# -- arrays -----------------------------------------------------------------------------------------------------------


def channels_first(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


ARRAYS: dict[str, Any] = {
    "uint8": bytes_of(COLOUR),
    "channels first": bytes_of(COLOUR).transpose(2, 0, 1),
    "a batch": bytes_of(COLOUR)[None],
    "nested lists": [[bytes_of(COLOUR)]],
    "uint16": (65535 * COLOUR).round().astype(np.uint16),
    "int64": bytes_of(COLOUR).astype(np.int64),
    "int64 of 65535": bytes_of(COLOUR).astype(np.int64) * 257,
    "float64": COLOUR,
    "float32 of 255": bytes_of(COLOUR).astype(np.float32),
    "float16": (bytes_of(COLOUR) / 255).astype(np.float16),
    "uint8 tensor": channels_first(bytes_of(COLOUR)),
    "float tensor": channels_first(COLOUR.astype(np.float32)),
    "bfloat16 tensor": channels_first(bytes_of(COLOUR)).to(torch.bfloat16),
    "tensor with grad": channels_first(COLOUR.astype(np.float32)).requires_grad_(),
    "a list of tensors": [channels_first(bytes_of(COLOUR))],
    "a batch of tensors": channels_first(bytes_of(COLOUR))[None],
    "a generator": (each for each in [bytes_of(COLOUR)]),
    "not writable": np.broadcast_to(bytes_of(COLOUR), (1, HIGH, WIDE, 3)),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_of_any_kind_are_the_picture(form: str) -> None:
    found = of(ARRAYS[form])
    assert found.shape == (1, 3, SIDE, SIDE)
    torch.testing.assert_close(found, of(PIL.Image.fromarray(bytes_of(COLOUR))), rtol=0, atol=2.1 / 127.5)


@pytest.mark.parametrize("form", ["uint8", "channels first", "float64"])
def test_a_query_by_array_is_the_picture(form: str) -> None:
    """`search(image=…)` and `explain` take arrays as the processor does."""
    assert np.array_equal(np.asarray(open_image(ARRAYS[form])), bytes_of(COLOUR))


@pytest.mark.parametrize("height", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_rows_are_not_taken_for_channels(height: int, channels: int) -> None:
    """A NumPy picture of 1, 3 or 4 rows has its channels last, as Pillow makes it; a tensor has them first."""
    values = np.random.default_rng(0).integers(0, 256, (height, 7, channels), np.uint8)
    flat = PIL.Image.fromarray(values[..., 0] if channels == 1 else values)
    assert torch.equal(of(values), of(flat))
    assert torch.equal(of(torch.from_numpy(values.transpose(2, 0, 1).copy())), of(flat))
    assert np.array_equal(np.asarray(open_image(values)), np.asarray(decode_image(flat)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.full((9, 9, 3), np.nan), r"images\[0\].*NaN"),
        (np.full((9, 9), np.inf, np.float32), r"images\[0\].*infinity"),
        (np.full((9, 9, 3), -0.5), r"images\[0\].*-0\.5.*pixel_values"),
        (np.full((9, 9, 3), 70_000.0), r"images\[0\].*70000"),
        (torch.full((3, 9, 9), torch.nan, dtype=torch.bfloat16), r"images\[0\].*NaN"),
        (PIL.Image.fromarray(np.full((9, 9), np.nan, np.float32)), r"images\[0\].*NaN"),
        (PIL.Image.fromarray(np.full((9, 9), -7, np.int32)), r"images\[0\].*-7"),
        (np.full((9, 9, 3), 1j), r"images\[0\].*complex"),
        (np.full((9, 9, 3), "a"), r"images\[0\]"),
        ([bytes_of(COLOUR), np.full((9, 9, 3), np.nan)], r"images\[1\]"),
        ([3], r"images\[0\] is int 3"),
        ({"a": 1}, r"images.*dict"),
        (7, r"images.*int"),
    ],
)  # fmt: skip
def test_what_would_be_black_or_nan_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        of(given)


def test_a_tiff_of_nan_is_skipped_and_named(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(ImageError, match=r"a\.tiff.*NaN"):
        decode_image(tmp_path / "a.tiff")


# -- files and addresses ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """A server of one picture, and of other things."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/elsewhere":
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname")
                self.end_headers()
                return
            found = {"/a.png": encoded(0), "/page": b"<html>", "/endless": b"\0" * 2**20}.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            for _ in range(100 if self.path == "/endless" else 1):
                try:
                    self.wfile.write(found or b"")
                except OSError:
                    return

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_address_is_read_for_the_processor(site: str) -> None:
    assert torch.equal(of(f"{site}/a.png"), of(encoded(0)))
    assert torch.equal(of([f"{site}/a.png", PIL.Image.open(io.BytesIO(encoded(1)))])[:1], of(encoded(0)))


@pytest.mark.parametrize("path", ["/page", "/none", "/elsewhere", "/endless"])
def test_an_address_of_something_else_is_a_sentence(site: str, path: str) -> None:
    with pytest.raises(ValueError, match=rf"images\[0\].*{path}"):
        of(f"{site}{path}")


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/a.png", "data:image/png;base64,AAAA"])
def test_other_schemes_are_no_addresses(address: str) -> None:
    with pytest.raises(ValueError, match=r"images\[0\]"):
        of(address)


def test_data_are_never_read_from_an_address(site: str, tmp_path: Path) -> None:
    """A table, an index or a query of the page could name any address, or any file of the disk."""
    (tmp_path / "a.png").write_bytes(encoded(0))
    for name in (f"{site}/a.png", str(tmp_path / "a.png"), tmp_path / "a.png", encoded(0), {"path": "a.png"}):
        with pytest.raises(ValueError, match=r"record.*'image'.*load_pairs"):
            image_inputs([{"image": name, "captions": ["a dog"], "image_id": 0}])
    for read in (decode_image, open_image, read_upload):
        with pytest.raises((ValueError, OSError), match="127.0.0.1"):
            read(f"{site}/a.png")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.png", None, "no file.*text="),
        ("page.png", b"<html>", "no picture"),
        ("cut.jpg", noise("JPEG")[:900], "cannot be read"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "no picture"),
    ],
)
def test_a_path_of_something_else_is_a_sentence(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s)images\[0\].*{name}.*{said}"):
        of(str(tmp_path / name))
    with pytest.raises(ValueError, match=name):
        by_onnx(tmp_path / name)


def test_a_folder_or_a_device_is_no_picture(tmp_path: Path) -> None:
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match=r"images\[0\].*no plain file"):
            of(str(path))


def test_a_search_by_array_finds_what_the_same_file_finds(tmp_path: Path) -> None:
    model, processor = pixel_model()
    picture = PIL.Image.fromarray(bytes_of(COLOUR))
    picture.save(tmp_path / "a.png")
    embeds = [model.encode_images(**processor(images=each)).embeds for each in (bytes_of(COLOUR), tmp_path / "a.png")]
    assert torch.equal(*embeds)
