"""The files that data name: exactly the one that is meant, and none outside of what the user pointed at."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_makers import encoded, shows, write_images, write_parquet, write_tar

from modeling_tvrn.cli.pairs import score_pairs
from modeling_tvrn.data import ShuffledStream, StreamItems, load_pairs
from modeling_tvrn.data.loading import PRESETS, Preset

OUTSIDE = "file outside the data's folder"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with two pictures, and a picture beside it that is nobody's business."""
    write_images(tmp_path / "data", ["a.png", "below/b.png"])
    (tmp_path / "secret.png").write_bytes(encoded(7))
    return tmp_path / "data"


def as_csv(folder: Path, names: list[str]) -> None:
    rows = [f'"{name}",caption {number}' for number, name in enumerate(names)]
    (folder / "pairs.csv").write_text("\n".join(["image,caption", *rows]))


def as_jsonl(folder: Path, names: list[str]) -> None:
    rows = [{"image": name, "caption": f"caption {number}"} for number, name in enumerate(names)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))


def as_parquet(folder: Path, names: list[str]) -> None:
    columns = {"image": names, "caption": [f"caption {number}" for number in range(len(names))]}
    write_parquet(folder / "pairs.parquet", columns, image=None)


def as_typed_parquet(folder: Path, names: list[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = {
        "image": [{"bytes": None, "path": name} for name in names],
        "caption": [f"caption {number}" for number in range(len(names))],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "pairs.parquet")


def as_saved_dataset(folder: Path, names: list[str]) -> None:
    columns = {"image": names, "caption": [f"caption {number}" for number in range(len(names))]}
    datasets.Dataset.from_dict(columns).save_to_disk(folder)


FORMS = [as_csv, as_jsonl, as_parquet, as_typed_parquet, as_saved_dataset]


class TestNothingOutside:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("write", FORMS)
    def test_relative_names_stay_below_the_folder_and_absolute_ones_need_a_root(
        self, data: Path, write: Callable[..., None], streaming: bool
    ) -> None:
        (data / "out.png").symlink_to(data.parent / "secret.png")
        (data / "linked").symlink_to(data.parent)
        names = ["../secret.png", "below/../../secret.png", "out.png", "linked/secret.png", "../gone.png"]
        names += [str(data.parent / "secret.png"), str(data / "a.png")]
        write(data, [*names, "below/b.png"])
        records = load_pairs(data, streaming=streaming)
        assert [record["captions"] for record in records] == [["caption 7"]]
        assert dict(records.skipped) == {OUTSIDE: len(names)}
        assert all("image_root=" in example for example in records.skipped.examples[OUTSIDE])

    @pytest.mark.parametrize("write", FORMS[:-1])
    def test_absolute_names_are_followed_below_the_given_root_alone(
        self, data: Path, write: Callable[..., None]
    ) -> None:
        write(data, [str(data / "a.png"), str(data.parent / "secret.png"), "below/b.png"])
        records = load_pairs(data, image_root=data)
        assert records.captions == [["caption 0"], ["caption 2"]] and shows(records[0]["image"], 0)
        assert dict(records.skipped) == {OUTSIDE: 1}
        assert len(load_pairs(data, image_root=data.parent)) == 2  # below/b.png begins at the root, as it says

    def test_relative_names_begin_at_the_data_and_not_at_the_working_folder(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        as_parquet(data, ["a.png", "below/b.png"])
        write_images(data.parent / "elsewhere", ["other.png", "a.png"])
        monkeypatch.chdir(data.parent / "elsewhere")
        records = load_pairs(data)
        assert shows(records[0]["image"], 0) and records.image_size(0) == len(encoded(0))

    def test_a_snapshot_of_the_hubs_cache_is_all_links_and_is_read(self, tmp_path: Path) -> None:
        repository = tmp_path / "datasets--me--mine"
        write_images(repository, ["blobs/0a", "blobs/1b"])
        snapshot = repository / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        for name, blob in (("a.png", "0a"), ("b.png", "1b")):
            (snapshot / name).symlink_to(f"../../blobs/{blob}")
        as_csv(snapshot, ["a.png", "b.png"])
        assert len(load_pairs(snapshot)) == 2

    @pytest.mark.parametrize("write", [as_csv, as_parquet])
    def test_what_is_no_file_does_not_hang(self, data: Path, write: Callable[..., None]) -> None:
        os.mkfifo(data / "pipe.png")
        write(data, ["pipe.png", "below", "a" * 5000 + ".png", "a\0.png", "a.png"])
        for streaming in (False, True):
            records = load_pairs(data, streaming=streaming)
            assert len(list(records)) == 1
            assert records.skipped.total == 4 and "a named pipe" in str(records.skipped.examples)

    def test_a_training_stream_goes_on_without_them(self, data: Path) -> None:
        as_parquet(data, ["../secret.png", "a.png", "below/b.png"])
        stream = load_pairs(data, streaming=True)
        items = ShuffledStream(stream).items()
        decoded = StreamItems(stream).__getitems__([next(items)[0] for _ in range(3)])
        assert {item["caption"] for item in decoded} == {"caption 1", "caption 2"}


class TestDataFromTheHub:
    @pytest.fixture(params=[as_parquet, as_typed_parquet, as_jsonl])
    def hub(self, request: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A dataset as the Hub would give it that names this machine's files, and has one image of its own."""
        (data / "hub").mkdir()
        request.param(data / "hub", ["a.png", str(data / "a.png"), "../a.png"])
        monkeypatch.chdir(data)
        one = Preset(dict.fromkeys(("train", "validation", "test"), str(data / "hub")), {"train": 0})
        monkeypatch.setitem(PRESETS, "flickr8k", one)
        return data

    @pytest.mark.parametrize("streaming", [False, True])
    def test_they_name_no_files_of_this_machine(self, hub: Path, streaming: bool) -> None:
        with pytest.raises(ValueError, match=rf"3 x {OUTSIDE}.*from the Hub.*image_root="):
            list(load_pairs("flickr8k", split="train", streaming=streaming))

    def test_a_dataset_in_memory_that_was_read_from_data_neither(self, hub: Path) -> None:
        (hub / "hub" / "more.csv").write_text(f"image,caption\n{hub / 'a.png'},one\na.png,two\n")
        loaded = datasets.load_dataset("csv", data_files=str(hub / "hub" / "more.csv"), split="train")
        with pytest.raises(ValueError, match=rf"2 x {OUTSIDE}.*image_root="):
            load_pairs(loaded)
        assert load_pairs(loaded, image_root=hub).captions == [["one"], ["two"]]

    def test_one_that_was_made_here_does(self, data: Path) -> None:
        rows = [{"image": str(data / "a.png"), "caption": "one"}]
        made = datasets.Dataset.from_list(rows)
        assert shows(load_pairs(made)[0]["image"], 0)
        assert shows(load_pairs(made.cast_column("image", datasets.Image()))[0]["image"], 0)

    def test_an_image_folder_of_datasets_does(self, data: Path) -> None:
        (data / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n')
        (data / "below" / "b.png").unlink()
        loaded = datasets.load_dataset("imagefolder", data_dir=str(data), split="train")
        assert shows(load_pairs(loaded)[0]["image"], 0)


class TestTheRightFile:
    def test_a_bare_name_is_no_fallback(self, tmp_path: Path) -> None:
        """The absent y/1.png became 1.png of the root, and images/x/1.png was passed over for it."""
        write_images(tmp_path, ["1.png", "images/x/1.png"])
        as_csv(tmp_path, ["1.png", "x/1.png", "y/1.png"])
        records = load_pairs(tmp_path)
        assert [(r["filename"], shows(r["image"], n)) for n, r in enumerate(records)] == [
            ("1.png", True),
            ("x/1.png", True),
        ]
        assert dict(records.skipped) == {"missing image": 1} and "y/1.png" in str(records.skipped)

    def test_nor_is_that_of_a_table_with_a_folder_column(self, tmp_path: Path) -> None:
        write_images(tmp_path, ["1.png", "x/1.png"])
        (tmp_path / "a.csv").write_text("filepath,filename,caption\nx,1.png,one\ny,1.png,two\n")
        records = load_pairs(tmp_path)
        assert records.captions == [["one"]] and shows(records[0]["image"], 1)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_several_candidates_are_an_error_that_names_both(self, tmp_path: Path, streaming: bool) -> None:
        write_images(tmp_path, ["a.png", "images/a.png", "images/b.png"])
        as_csv(tmp_path, ["a.png", "b.png"])
        records = load_pairs(tmp_path, streaming=streaming)
        assert [record["filename"] for record in records] == ["b.png"]
        reason = "image name of several files"
        assert dict(records.skipped) == {reason: 1}
        assert f"{tmp_path}/a.png" in str(records.skipped) and f"{tmp_path}/images/a.png" in str(records.skipped)

    def test_one_file_by_two_ways_is_no_conflict(self, tmp_path: Path) -> None:
        write_images(tmp_path, ["a.png"])
        (tmp_path / "images").symlink_to(".")
        as_csv(tmp_path, ["a.png"])
        assert len(load_pairs(tmp_path)) == 1


class TestOneIdOfTwoFiles:
    @pytest.fixture(params=["csv", "parquet with names", "parquet", "names alone", "tar"])
    def source(self, request: Any, tmp_path: Path) -> Path:
        contents, texts = [encoded(0), encoded(1) + b"\0"], ["one", "two"]
        columns: dict[str, Any] = {"image": contents, "caption": texts, "image_id": [5, 5]}
        if request.param == "csv":
            write_images(tmp_path, ["a.png", "b.png"])
            (tmp_path / "a.csv").write_text("image,caption,image_id\na.png,one,5\nb.png,two,5\n")
        elif request.param == "names alone":  # 0001.png of two folders
            columns = {"image": contents, "caption": texts, "filename": ["5.png", "5.png"]}
            write_parquet(tmp_path / "a.parquet", columns)
        elif request.param == "tar":
            members: dict[str, Any] = {}
            for key, content, text in zip(("a", "b"), contents, texts, strict=True):
                members |= {f"{key}.png": content, f"{key}.json": {"caption": text, "image_id": 5}}
            write_tar(tmp_path / "a.tar", members)
        else:
            named = {"filename": ["a.png", "b.png"]} if "names" in request.param else {}
            write_parquet(tmp_path / "a.parquet", columns | named)
        return tmp_path

    @pytest.mark.parametrize("way", ["map-style", "stream", "shuffled"])
    def test_it_is_refused_and_both_are_named(self, source: Path, way: str) -> None:
        with pytest.raises(ValueError, match=r"5.* is of two files, .* and .*"):
            self.read(source, way)

    def read(self, source: Path, way: str) -> None:
        records: Any = load_pairs(source, streaming=way != "map-style")
        if way == "shuffled":
            items = ShuffledStream(records).items()
            records = [next(items) for _ in range(3)]
        list(records)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows_that_repeat_one_image_are_none(self, tmp_path: Path, streaming: bool) -> None:
        columns = {"image": [encoded(0)] * 2, "caption": ["one", "two"], "image_id": [5, 5]}
        write_parquet(tmp_path / "a.parquet", columns)
        records = load_pairs(tmp_path, streaming=streaming)
        assert [text for record in records for text in record["captions"]] == ["one", "two"]


def test_score_follows_the_same_rules(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hub_makers import pixel_model

    (data / "out.png").symlink_to(data.parent / "secret.png")
    names = ["a.png", "../secret.png", str(data / "a.png"), str(data.parent / "secret.png"), "out.png", "x/a.png"]
    rows = [{"image": name, "caption": "a dog"} for name in names]
    model, processor = pixel_model()
    scored = list(score_pairs(model, processor, rows, data))
    assert [pair.score is not None for pair in scored] == [True] + [False] * 5
    assert all("--images" in pair.problem for pair in scored[1:5]) and "no such file" in scored[5].problem
    scored = list(score_pairs(model, processor, rows, data, images=data))
    assert [pair.score is not None for pair in scored] == [True, False, True, False, False, False]
