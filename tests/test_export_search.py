"""Search of photographs without torch: hits of `tvrn search`, an index that keeps up, nothing lost to damage."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hub_makers import pixel_model, region_model
from test_export import needs_extra

from modeling_tvrn.index import ImageTextIndex

pytestmark = [needs_extra, pytest.mark.slow]
QUERY = "two dogs in the snow"


def photograph(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    from modeling_tvrn.export import export_onnx

    model, processor = pixel_model()
    folder = tmp_path_factory.mktemp("export") / "onnx"
    export_onnx(model, processor, folder, search=True)
    return model, processor, folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "photographs"
    for seed in range(7):
        photograph(folder / ("sub" if seed % 2 else ".") / f"{seed}.png", seed)
    (folder / "broken.jpg").write_bytes(b"no picture")
    photograph(folder / ".hidden.png", 50)
    (folder / "link.png").symlink_to(photograph(tmp_path / "outside.png", 60))
    return folder


def index(exported: tuple[Any, Any, Path], photographs: Path) -> Any:
    from modeling_tvrn.export.tvrn_onnx import OnnxModel
    from modeling_tvrn.export.tvrn_search import PhotoIndex

    return PhotoIndex(OnnxModel(exported[2], threads=1), photographs, photographs.parent / "index")


@pytest.mark.parametrize("rerank", [True, False])
def test_the_hits_are_those_of_the_model(exported: Any, photographs: Path, tmp_path: Path, rerank: bool) -> None:
    found = index(exported, photographs)
    assert found.update() == 7 and list(found.skipped) == ["broken.jpg"]
    hits = found.search(QUERY, 5, shortlist_size=6, rerank=rerank)
    wanted = ImageTextIndex.build(*exported[:2], photographs, tmp_path / "torch").search(
        QUERY, limit=5, shortlist_size=6, rerank=rerank
    )
    assert [hit.path for hit in hits] == [hit.id for hit in wanted]
    assert [hit.score_kind for hit in hits] == [hit.score_kind for hit in wanted]
    np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in wanted], atol=1e-4)


def test_the_command_runs_without_torch_transformers_pyarrow_and_this_package(
    exported: Any, photographs: Path, tmp_path: Path
) -> None:
    blocked = tmp_path / "blocked"
    for name in ("torch", "transformers", "pyarrow", "modeling_tvrn"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text("raise ImportError('blocked')")
    folder = exported[2]
    command = [
        sys.executable,
        str(folder / "tvrn_search.py"),
        str(folder),
        str(photographs),
        QUERY,
        "--json",
        "-n",
        "3",
    ]
    environment = {"PYTHONPATH": str(blocked), "XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": ""}
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    found = index(exported, photographs)
    found.update()
    assert [hit["path"] for hit in json.loads(finished.stdout)] == [hit.path for hit in found.search(QUERY, 3)]
    assert "7 photographs, 7 of them new; 1 skipped" in finished.stderr


def test_only_what_is_new_is_encoded_and_what_is_gone_is_not_found(exported: Any, photographs: Path) -> None:
    index(exported, photographs).update()
    photograph(photographs / "new.png", 20)
    (photographs / "sub" / "3.png").unlink()
    found = index(exported, photographs)
    assert found.update() == 1 and found.update() == 0
    paths = {hit.path for hit in found.search(QUERY, 20)}
    assert "new.png" in paths and "sub/3.png" not in paths and len(paths) == 7


def test_an_interrupted_update_goes_on(exported: Any, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_tvrn.export import tvrn_search

    monkeypatch.setattr(tvrn_search, "CHUNK", 3)
    found = index(exported, photographs)
    encode, calls = found.model.encode_images, []

    def stopping(pictures: Any) -> Any:
        calls.append(len(pictures))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(pictures)

    monkeypatch.setattr(found.model, "encode_images", stopping)
    with pytest.raises(KeyboardInterrupt):
        found.update()
    again = index(exported, photographs)
    assert again.update() == 7 - calls[0] and len(again) == 7


def test_chunks_of_which_little_is_left_are_joined(
    exported: Any, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modeling_tvrn.export import tvrn_search

    monkeypatch.setattr(tvrn_search, "CHUNK", 4)
    found = index(exported, photographs)
    found.update()
    before = {hit.path: hit.logit for hit in found.search(QUERY)}
    for seed in (0, 2, 4, 1, 3):  # two files a chunk stay, or fewer
        (photographs / ("sub" if seed % 2 else ".") / f"{seed}.png").unlink()
    found = index(exported, photographs)
    assert found.update() == 0
    assert {hit.path: hit.logit for hit in found.search(QUERY)} == {
        path: pytest.approx(before[path], abs=1e-5) for path in ("6.png", "sub/5.png")
    }
    assert len(list(found.directory.glob("*.images.embeds.npy"))) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "elsewhere", "table", "pointer"])
def test_what_is_damaged_is_made_anew(
    exported: Any, photographs: Path, capsys: pytest.CaptureFixture, damage: str
) -> None:
    found = index(exported, photographs)
    found.update()
    wanted = [(hit.path, hit.logit) for hit in found.search(QUERY)]
    arrays = {path.name.split(".", 1)[1]: path for path in found.directory.glob("*.npy")}
    path = arrays["images.embeds.npy"]
    if damage == "elsewhere":
        path = next(path for name, path in arrays.items() if name != "images.embeds.npy")
    if damage in ("table", "pointer"):
        table = json.loads((found.directory / "index.json").read_text())
        table["chunks"] = {"../../x": next(iter(table["chunks"].values()))}
        (found.directory / "index.json").write_text("{" if damage == "table" else json.dumps(table))
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-5] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    again = index(exported, photographs)
    assert again.update(verify=damage == "elsewhere") == 7
    assert "damaged" in capsys.readouterr().err
    assert [(hit.path, hit.logit) for hit in again.search(QUERY)] == wanted


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{export}", "nowhere", QUERY), "'nowhere' is no folder"),
        (("nowhere", "{photographs}", QUERY), "nowhere has no tvrn_onnx.json"),
        (("{export}", "{photographs}", " "), "text is ' '"),
        (("{export}", "{photographs}", QUERY, "-n", "0"), "limit is 0"),
        (("{export}", "{photographs}", QUERY, "--precision", "int4"), "'int4'"),
        (("{export}", "{photographs}", QUERY, "--index", "{photographs}"), "holds something else than an index"),
    ],
)
def test_mistakes_are_a_sentence(
    exported: Any, photographs: Path, capsys: pytest.CaptureFixture, arguments: tuple[str, ...], said: str
) -> None:
    from modeling_tvrn.export.tvrn_search import main

    given = [each.format(export=exported[2], photographs=photographs) for each in arguments]
    if "--index" not in given:
        given += ["--index", str(photographs.parent / "index")]
    assert main(given) == 2
    assert said in capsys.readouterr().err


def test_an_export_of_regions_cannot_search_photographs(tmp_path: Path) -> None:
    from modeling_tvrn.export import export_onnx

    with pytest.raises(ValueError, match="reads no pictures by itself"):
        export_onnx(*region_model(), tmp_path / "onnx", search=True)
    assert not list(tmp_path.iterdir())
