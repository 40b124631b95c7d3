"""`tvrn space`: what it writes is a Space that starts by itself, and holds nothing that stays here."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_makers import pixel_model, region_model, save
from qdrant_server import free_ports
from test_index import photographs

from modeling_tvrn import load_model, space
from modeling_tvrn.cli import main as tvrn
from modeling_tvrn.index import ImageTextIndex, OtherModelError
from modeling_tvrn.space import write_space
from modeling_tvrn.storage.arrays import shard_ids
from modeling_tvrn.storage.tensors import TensorFile

pytestmark = pytest.mark.slow  # some hundred files are written, one after the other, for each Space


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, photographs of which one is hidden, and their index."""
    home = tmp_path_factory.mktemp("home")
    model, processor = pixel_model()
    save(home / "my-model", model, processor)
    photographs(home / "photos")
    (home / "photos" / ".private.png").write_bytes(b"hidden")
    ImageTextIndex.build(model, processor, home / "photos", home / "photos.index", progress=False)
    return home


def header(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text("utf-8").split("---")[1])


def test_a_folders_model_photographs_and_index_are_copied_and_nothing_names_this_machine(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [
        "tvrn", "space", str(home / "my-model"), str(tmp_path / "space"), "--images", str(home / "photos"),
        "--index", str(home / "photos.index"), "--json",
    ])  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz012345")
    with pytest.raises(SystemExit) as leaving:
        tvrn()
    said = json.loads(capsys.readouterr().out)
    made = tmp_path / "space"
    assert leaving.value.code == 0 and said["photographs"] == 9 and said["model"] == "models/my-model"
    assert said["commands"][-1] == f"hf upload OWNER/NAME {made} . --repo-type space"
    assert {path.name for path in made.iterdir()} == {
        "README.md", "app.py", "requirements.txt", "modeling_tvrn", "photos", "models", "index",
    }  # fmt: skip
    read = header(made)
    assert (read["sdk"], read["app_file"]) == ("gradio", "app.py") and "license" not in read  # not ours to give
    assert tuple(map(int, read["python_version"].split("."))) >= (3, 11) and "models" not in read
    assert tuple(map(int, read["sdk_version"].split("."))) >= (6, 20)
    wanted = [line for line in importlib.metadata.requires("modeling-tvrn") or [] if "extra" not in line]
    assert {*wanted} <= {*(made / "requirements.txt").read_text("utf-8").splitlines()} and "torch" in str(wanted)
    written = [path for path in made.rglob("*") if path.is_file()]
    assert not [path for path in written if path.name.startswith(".") or path.suffix in (".pyc", ".sqlite")]
    contents = b"".join(path.read_bytes() for path in written if "modeling_tvrn" not in path.parts)
    assert str(home).encode() not in contents and b"hf_abcdef" not in contents
    model, processor = load_model(made / "models" / "my-model")
    report = ImageTextIndex.build(model, processor, made / "photos", made / "index", progress=False).report
    assert report is not None and (report.items, report.encoded) == (9, 0), "the index came along"


def test_of_an_index_only_what_is_encoded_of_the_published_photographs_is_copied(home: Path, tmp_path: Path) -> None:
    some = sorted(path for path in (home / "photos").rglob("*") if path.is_file() and path.name[0] != ".")[:2]
    for path in some:
        copy = tmp_path / "few" / path.relative_to(home / "photos")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    made = write_space(home / "my-model", tmp_path / "space", tmp_path / "few", index=home / "photos.index").folder
    kept = [TensorFile.open(path, "") for path in (made / "index").rglob("*.safetensors")]
    assert sum(len(shard_ids(file)) for file in kept) == 2


def test_what_cannot_become_a_space_is_refused_and_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    model, photos = home / "my-model", home / "photos"
    other = save(tmp_path / "other", *pixel_model(attention_scale=5.0))
    ImageTextIndex.build(*load_model(model), ["a dog"], tmp_path / "captions", progress=False)
    photographs(tmp_path / "elsewhere" / "others")
    save(tmp_path / "regions", *region_model())
    monkeypatch.chdir(tmp_path / "empty")
    for arguments, index, error, words in (
        ((model, tmp_path / "mine", photos), None, OSError, "is no empty folder"),
        ((tmp_path / "no-model", tmp_path / "space", photos), None, ValueError, "there is no folder"),
        ((model, tmp_path / "space", tmp_path / "empty"), None, ValueError, "holds no photographs"),
        ((model, tmp_path / "space", tmp_path / "none"), None, ValueError, "expected a folder of photographs"),
        ((other, tmp_path / "space", photos), home / "photos.index", OtherModelError, "attention_scale"),
        ((model, tmp_path / "space", photos), tmp_path / "captions", ValueError, "is of captions; expected"),
        ((model, tmp_path / "space", tmp_path / "elsewhere"), home / "photos.index", ValueError, "none of the photo"),
        ((tmp_path / "regions", tmp_path / "space", photos), None, ValueError, "reads region features, not photo"),
        ((model, ".", photos), None, OSError, "the folder that you are in"),
    ):
        with pytest.raises(error, match=words):
            write_space(*arguments, index=index)
    monkeypatch.setattr(space, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"photographs 0 MB, model 0 MB\), and at most 0 MB fit; take fewer"):
        write_space(model, tmp_path / "space", photos)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    assert not (tmp_path / "space").exists() and not list(tmp_path.glob(".tvrn*"))


def test_a_model_of_the_hub_is_named_and_left_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = space.read_config
    monkeypatch.setattr(space, "read_config", lambda name, *rest: kept(str(home / "my-model"), *rest))
    shutil.copytree(home / "photos", tmp_path / "photos")
    written = write_space("me/my-tvrn", tmp_path / "space", tmp_path / "photos", title="Snow: dogs")
    assert header(written.folder)["models"] == ["me/my-tvrn"] and header(written.folder)["title"] == "Snow: dogs"
    assert "load_model('me/my-tvrn')" in (written.folder / "app.py").read_text("utf-8")
    assert not (written.folder / "models").exists() and "Nothing was uploaded" in str(written)


def test_a_space_starts_in_a_clean_process_with_its_own_copy_of_the_package(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason='the page comes with pip install ".[demo]"')
    made = write_space(home / "my-model", tmp_path / "space", home / "photos", index=home / "photos.index").folder
    with (made / "modeling_tvrn" / "__init__.py").open("a") as file:
        file.write("\nprint('from', __file__, flush=True)\n")
    [port] = free_ports(1)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    log = tmp_path / "log.txt"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, str(made / "app.py")], env=environment, cwd=tmp_path, stdout=said, stderr=said
        )
    try:
        page, end = "", time.monotonic() + 240
        while not page and process.poll() is None and time.monotonic() < end:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
                page = answer.read().decode()
            time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    assert "Search 9 photographs" in page and "my-model" in page, log.read_text()
    assert f"from {made / 'modeling_tvrn' / '__init__.py'}" in log.read_text()
