"""Layouts as people have them, and what is broken in one: read, or refused in a sentence that names the file."""

import codecs
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_makers import captions, encoded, shows, write_images, write_parquet, write_tar

from modeling_tvrn.cli.pairs import read_pairs
from modeling_tvrn.data import load_pairs

NAMES = ["a.png", "b.png", "c.png"]
BOTH = pytest.mark.parametrize("streaming", [False, True])


def img2dataset(folder: Path) -> None:
    """Tars with a parquet of metadata and one of statistics beside each."""
    for shard in ("00000", "00001"):
        members: dict[str, Any] = {}
        for n, name in enumerate(NAMES):
            members[f"{shard}{n:04d}.jpg"] = encoded(n, "JPEG", quality=95)
            members[f"{shard}{n:04d}.txt"] = f"caption of {name}"
            members[f"{shard}{n:04d}.json"] = {"caption": f"caption of {name}", "url": "x", "key": f"{shard}{n:04d}"}
        write_tar(folder / f"{shard}.tar", members)
        columns = {"url": ["x"] * 3, "caption": [f"caption of {name}" for name in NAMES], "status": ["success"] * 3}
        write_parquet(folder / f"{shard}.parquet", columns, image=None)
        (folder / f"{shard}_stats.json").write_text(json.dumps({"count": 3, "successes": 3}))


def write_metadata(folder: Path, ending: str) -> None:
    """The image folder of `datasets`."""
    for part in ("train", "test"):
        write_images(folder / part, NAMES)
        rows = [{"file_name": name, "text": f"{part} {name}"} for name in NAMES]
        lines = map(json.dumps, rows) if ending == "jsonl" else map(",".join, [rows[0], *(r.values() for r in rows)])
        (folder / part / f"metadata.{ending}").write_text("\n".join(lines) + "\n")


class TestFolders:
    @BOTH
    def test_img2dataset(self, tmp_path: Path, streaming: bool) -> None:
        img2dataset(tmp_path)
        records = list(load_pairs(tmp_path, streaming=streaming))
        assert [record["captions"][0] for record in records] == [f"caption of {name}" for name in NAMES] * 2
        assert shows(records[4]["image"], 1)

    @BOTH
    @pytest.mark.parametrize("ending", ["csv", "jsonl"])
    def test_imagefolder(self, tmp_path: Path, ending: str, streaming: bool) -> None:
        write_metadata(tmp_path, ending)
        records = list(load_pairs(tmp_path, split="train", streaming=streaming))
        assert [record["captions"] for record in records] == [[f"train {name}"] for name in NAMES]
        assert shows(records[2]["image"], 2) and records[0]["split"] == "train"

    @BOTH
    @pytest.mark.parametrize("ending", ["txt", "caption"])
    def test_a_text_file_for_each_image(self, tmp_path: Path, ending: str, streaming: bool) -> None:
        write_images(tmp_path, [*NAMES, "sub/d.png"])
        for n, name in enumerate(["a", "b", "sub/d"]):
            (tmp_path / f"{name}.{ending}").write_text("\n".join(captions(n, 2)) + "\n")
        (tmp_path / "README.txt").write_text("Photographs of ours, and what they show.\n")
        records = load_pairs(tmp_path, streaming=streaming)
        found = list(records)
        assert [record["filename"] for record in found] == ["a.png", "b.png", "sub/d.png"]
        assert [record["captions"] for record in found] == [captions(n, 2) for n in range(3)]
        assert shows(found[2]["image"], 3)
        assert dict(records.skipped) == {"no caption left": 1} and "c.png" in str(records.skipped)

    def test_splits_of_a_text_file_for_each_image(self, tmp_path: Path) -> None:
        write_images(tmp_path, ["train/a.png", "val/b.png"])
        (tmp_path / "train" / "a.txt").write_text("a dog")
        (tmp_path / "val" / "b.txt").write_text("a cat")
        assert load_pairs(tmp_path, split="validation").captions == [["a cat"]]

    @BOTH
    @pytest.mark.parametrize("parts", [False, True])
    def test_save_to_disk(self, tmp_path: Path, parts: bool, streaming: bool) -> None:
        columns = {"image": [encoded(n) for n in range(3)], "caption": [captions(n) for n in range(3)]}
        columns["image"] = [{"bytes": content, "path": None} for content in columns["image"]]  # type: ignore[misc]
        saved: Any = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        (datasets.DatasetDict(train=saved, test=saved) if parts else saved).save_to_disk(tmp_path)
        records = list(load_pairs(tmp_path, split="train" if parts else None, streaming=streaming))
        assert [record["captions"] for record in records] == [captions(n) for n in range(3)]
        assert shows(records[1]["image"], 1)

    def test_what_was_saved_names_no_tables_elsewhere(self, tmp_path: Path) -> None:
        for name in ("mine", "other"):
            datasets.Dataset.from_dict({"caption": [name]}).save_to_disk(tmp_path / name)
        state = json.loads((tmp_path / "mine" / "state.json").read_text())
        (tmp_path / "mine" / "state.json").write_text(
            json.dumps(state | {"_data_files": [{"filename": "../other/data-00000-of-00001.arrow"}]})
        )
        with pytest.raises(ValueError, match=r"cannot be read as save_to_disk.*\.\./other.*outside"):
            load_pairs(tmp_path / "mine")
        (tmp_path / "mine" / "state.json").write_text("{")
        with pytest.raises(ValueError, match=r"cannot be read as save_to_disk writes it.*state\.json"):
            load_pairs(tmp_path / "mine")

    @pytest.mark.parametrize("other", ["README.txt", "LICENSE.txt", "stats.json", "config.json", "urls.txt"])
    def test_other_texts_beside_the_table_are_no_tables(self, tmp_path: Path, other: str) -> None:
        write_images(tmp_path, NAMES)
        (tmp_path / "captions.csv").write_text("image,caption\na.png,a dog\n")
        (tmp_path / other).write_text('{"count": 3}' if other.endswith("json") else "Photographs, and their text.\n")
        assert load_pairs(tmp_path).captions == [["a dog"]]

    def test_hidden_files_are_passed_over(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", {"1.png": encoded(1), "1.txt": "a dog"})
        (tmp_path / "._a.tar").write_bytes(b"\x00\x05\x16\x07")
        assert load_pairs(tmp_path).captions == [["a dog"]]


class TestParquet:
    @BOTH
    @pytest.mark.parametrize(
        "name", ["train[1].parquet", "A.PARQUET", "a*b?.parquet", "[x]/y.parquet", "ü {1}.parquet"]
    )
    def test_names(self, tmp_path: Path, name: str, streaming: bool) -> None:
        write_parquet(tmp_path / name, {"image": [encoded(1)], "caption": ["a dog"]})
        for source in (tmp_path / name, (tmp_path / name).parent):
            assert [record["captions"] for record in load_pairs(source, streaming=streaming)] == [["a dog"]]

    @pytest.mark.parametrize("name", ["A.TAR", "[1].tar"])
    def test_names_of_tars(self, tmp_path: Path, name: str) -> None:
        write_tar(tmp_path / name, {"1.png": encoded(1), "1.txt": "a dog"})
        assert load_pairs(tmp_path).captions == [["a dog"]] == load_pairs(tmp_path / name).captions

    @BOTH
    @pytest.mark.parametrize("first", ["caption", "image"])
    def test_files_may_be_empty_or_differ_in_types_and_order(
        self, tmp_path: Path, first: str, streaming: bool
    ) -> None:
        def write(name: str, texts: Any, kind: pyarrow.DataType, order: list[str]) -> None:
            images = [{"bytes": encoded(n), "path": None} for n in range(len(texts))]
            table = pyarrow.table({"image": images, "caption": pyarrow.array(texts, kind)})
            pyarrow.parquet.write_table(table.select(order), tmp_path / name)

        write("0.parquet", ["zero", "one"], pyarrow.string(), ["image", "caption"])
        write("1.parquet", [], pyarrow.null(), ["image", "caption"])
        write("2.parquet", [["two", "more"]], pyarrow.list_(pyarrow.string()), ["caption", "image"])
        write("3.parquet", [3, None], pyarrow.float64(), ["image", "caption"])
        write("4.parquet", ["four"], pyarrow.large_string(), ["image", "caption"])
        records = load_pairs(tmp_path, streaming=streaming)
        found = list(records)
        assert [record["captions"] for record in found] == [["zero"], ["one"], ["two", "more"], ["3"], ["four"]]
        assert [record["image_id"] for record in found] == [f"all/{n:06d}" for n in (0, 1, 2, 3, 5)]
        assert [shows(record["image"], n) for record, n in zip(found, (0, 1, 0, 0, 0), strict=True)] == [True] * 5
        assert dict(records.skipped) == {"no caption left": 1}
        assert sum(len(list(shard.open())) for shard in load_pairs(tmp_path, streaming=True).shards()) == 6

    def test_files_without_a_row_or_broken_are_named(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet", {"image": [], "caption": []})
        with pytest.raises(ValueError, match="holds no rows"):
            load_pairs(tmp_path)
        (tmp_path / "b.parquet").write_bytes(b"")
        with pytest.raises(ValueError, match=r"b\.parquet.*no whole parquet file"):
            load_pairs(tmp_path)
        twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names=["image", "caption", "caption"])
        pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
        with pytest.raises(ValueError, match=r"b\.parquet has a column twice"):
            load_pairs(tmp_path)
        write_parquet(tmp_path / "b.parquet", {"image": [encoded(n) for n in range(9)], "caption": ["a dog"] * 9})
        content = bytearray((tmp_path / "b.parquet").read_bytes())
        content[4:200] = bytes(196)  # its footer is whole, a page is not
        (tmp_path / "b.parquet").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read (.|\n)*parquet files one by one"):
            load_pairs(tmp_path)


class TestWebdataset:
    @BOTH
    def test_members_need_not_be_adjacent(self, tmp_path: Path, streaming: bool) -> None:
        members: dict[str, Any] = {f"{n:02d}.png": encoded(n) for n in range(30)}
        members |= {f"{n:02d}.txt": captions(n, 1)[0] for n in reversed(range(30))}
        write_tar(tmp_path / "a.tar", members)
        records = list(load_pairs(tmp_path, streaming=streaming))
        assert [record["captions"] for record in records] == [captions(n, 1) for n in range(30)]
        assert shows(records[11]["image"], 11)

    def test_in_a_compressed_one_they_must_be(self, tmp_path: Path) -> None:
        members: dict[str, Any] = {"1.png": encoded(1), "1.txt": "one", "2.png": encoded(2), "2.txt": "two"}
        write_tar(tmp_path / "a.tar.gz", members | {"1.json": {"image_id": 5}}, mode="w:gz")
        with pytest.raises(ValueError, match=r"a\.tar\.gz.*members of '1' .*unpack"):
            list(load_pairs(tmp_path, streaming=True))

    @BOTH
    @pytest.mark.parametrize(
        ("broken", "reason"),
        [
            ('{"caption": ', "broken metadata"),
            ("[" * 100_000, "broken metadata"),
            ('{"image_id": ' + "9" * 5000 + "}", "broken metadata"),
            (b'{"caption": "caf\xe9"}', "caption that is not UTF-8"),
            ('{"caption": "a", "image_id": {"a": 1}}', "id that is no number or text"),
            ('{"caption": "a", "image_id": true}', "id that is no number or text"),
            ('{"caption": "a", "sentids": 1.5}', "id that is no number or text"),
            ('{"caption": true}', "caption that is no text"),
            ("7", "no caption left"),
        ],
        ids=range(9),
    )
    def test_one_bad_member_is_counted(self, tmp_path: Path, broken: Any, reason: str, streaming: bool) -> None:
        members: dict[str, Any] = {}
        for n in range(3):
            members |= {
                f"{n}.png": encoded(n),
                f"{n}.json": {"caption": f"caption {n}", "image_id": n, "sentids": [n]},
            }
        write_tar(tmp_path / "a.tar", {**members, "1.json": broken})
        records = load_pairs(tmp_path, streaming=streaming)
        assert [record["image_id"] for record in records] == [0, 2]
        assert reason in dict(records.skipped) and "1" in records.skipped.examples[reason][0]

    @BOTH
    def test_a_name_without_end_ends_nothing(self, tmp_path: Path, streaming: bool) -> None:
        long = "n" * 5000
        members: dict[str, Any] = {
            f"{long}.png": encoded(1),
            f"{long}.txt": "long",
            "2.png": encoded(2),
            "2.txt": "two",
        }
        write_tar(tmp_path / "a.tar", members)
        assert [record["captions"] for record in load_pairs(tmp_path, streaming=streaming)] == [["long"], ["two"]]


# a table's name and bytes -> the captions of a.png, b.png
TWO = [["a dog, red"], ["café"]]
READ: Mapping[str, tuple[str, bytes]] = {
    "semicolons": ("p.csv", "image;caption\na.png;a dog, red\nb.png;café\n".encode()),
    "tabs": ("p.csv", "image\tcaption\na.png\ta dog, red\nb.png\tcafé\n".encode()),
    "tsv with commas": ("p.tsv", 'image,caption\na.png,"a dog, red"\nb.png,café\n'.encode()),
    "a mark": ("p.csv", codecs.BOM_UTF8 + 'image,caption\na.png,"a dog, red"\nb.png,café\n'.encode()),
    "UTF-16 of Excel": ("p.txt", "image\tcaption\r\na.png\ta dog, red\r\nb.png\tcafé\r\n".encode("utf-16")),
    "old Macs": ("p.csv", 'image,caption\ra.png,"a dog, red"\rb.png,café\r'.encode()),
    "capitals": ("p.csv", 'Image,Caption\na.png,"a dog, red"\nb.png,café\n'.encode()),
    "a row without a name": ("p.jsonl", '{"caption": "nobody\'s"}\n{"file_name": "a.png", "caption": "a dog, red"}\n'
                             '{"file_name": "b.png", "caption": "café"}'.encode()),
    "a column file": ("p.csv", 'file,caption\na.png,"a dog, red"\nb.png,café\n'.encode()),
    "null": ("p.jsonl", '{"file_name": "a.png", "text": ["a dog, red", null, NaN]}\n'
             '{"file_name": "b.png", "text": "café"}\n{"file_name": "c.png", "text": null}'.encode()),
    "booleans": ("p.json", '[{"image": "a.png", "caption": ["a dog, red", true]},'
                 '{"image": "b.png", "caption": "café"}, {"image": "c.png", "caption": false}]'.encode()),
    "a list of Python's": ("p.csv", "image;caption\na.png;['a dog, red']\nb.png;['café', None]\n".encode()),
    "a list of NumPy's": ("p.csv", "image;caption\na.png;['a dog, red' nan]\nb.png;['café']\n".encode()),
    "COCO without ids": ("p.json", json.dumps({
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [{"image_id": 1, "caption": "a dog, red"}, {"image_id": 2, "caption": "café"}]}).encode()),
}  # fmt: skip


class TestTables:
    @pytest.mark.parametrize("form", READ)
    def test_forms_that_are_read(self, tmp_path: Path, form: str) -> None:
        write_images(tmp_path, NAMES)
        (tmp_path / READ[form][0]).write_bytes(READ[form][1])
        records = load_pairs(tmp_path)
        assert records.captions == TWO and records.filenames == NAMES[:2]

    def test_numbers_are_captions_as_they_were_written(self, tmp_path: Path) -> None:
        write_images(tmp_path, NAMES)
        (tmp_path / "a.jsonl").write_text(
            '{"image": "a.png", "caption": 7}\n{"image": "b.png", "caption": 7.0}\n'
            '{"image": "c.png", "caption": [1.5, 2]}'
        )
        assert load_pairs(tmp_path).captions == [["7"], ["7"], ["1.5", "2"]]

    def test_a_newline_in_a_quoted_caption_makes_no_second_one(self, tmp_path: Path) -> None:
        write_images(tmp_path, NAMES)
        (tmp_path / "a.csv").write_text('image,caption\na.png,"one\nand more"\nb.png,two\n')
        assert load_pairs(tmp_path).captions == [["one\nand more"], ["two"]]
        assert [row["caption"] for row in read_pairs(tmp_path / "a.csv", "image", "caption")] == [
            "one\nand more",
            "two",
        ]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("p.csv", b'image,caption\na.png,"a dog\nb.png,a cat\n', r"p\.csv, line 2.*quote"),
            ("p.csv", b'image,caption\na.png,"a dog\nb.png,a cat\nc.png,a bird"\n', r"p\.csv, line 2.*quote.*line 3"),
            ("p.csv", b'image,caption\na.png,"a dog\nb.png,"a cat"\n', r"p\.csv, line 2.*quote"),
            ("p.csv", b"image,caption\na.png,a dog, a cat\n", r"p\.csv, line 2 has 3 cells"),
            ("p.csv", b"image,caption,caption\na.png,a dog,b\n", r"p\.csv.*'caption' twice"),
            ("p.csv", b"image,caption\na.png," + b"x" * 140_000 + b"\n", r"p\.csv, line 2.*131072.*quote"),
            ("p.csv", "image,caption\na.png,café\n".encode("latin-1"), r"p\.csv.*line 2.*iconv -f WINDOWS-1252"),
            ("p.csv", "image,caption\na.png,café\n".encode("utf-16-le"), r"p\.csv.*UTF-16.*iconv -f UTF-16"),
            ("p.csv", codecs.BOM_UTF16_LE + b"a", r"p\.csv.*UTF-16"),
            ("p.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"p\.csv.*LFS.*git lfs pull"),
            ("p.csv", b"<!doctype html><html>404</html>", r"p\.csv.*an HTML page"),
            ("p.csv", b"\x1f\x8b\x08\x00\xe9", r"p\.csv.*gzip"),
        ],
        ids=range(12),
    )
    def test_score_and_load_pairs_refuse_the_same(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        write_images(tmp_path, NAMES)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_pairs(tmp_path)
        with pytest.raises(ValueError, match=message):
            list(read_pairs(tmp_path / name, "image", "caption"))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("p.json", "[" * 100_000, r"p\.json.*nested"),
            ("p.jsonl", '{"a":' * 100_000, r"p\.jsonl, line 1.*nested"),
            ("p.json", '[{"image": "a.png", "caption": "x", "n": ' + "9" * 5000 + "}]", r"p\.json.*valid JSON"),
            ("p.json", '{"images": [1], "annotations": []}', r"p\.json.*images"),
            ("p.json", '{"images": [{"id": 1}], "annotations": [{"caption": "x"}]}', r"p\.json.*image_id"),
            ("p.json", '{"images": 3}', r"p\.json is not a table"),
            ("p.json", '{"a.png": 3}', r"p\.json is not a table"),
            ("p.json", '{"images": [{"id": [1]}], "annotations": []}', r"p\.json.*images"),
        ],
        ids=range(8),
    )
    def test_broken_json_is_named(self, tmp_path: Path, name: str, content: str, message: str) -> None:
        write_images(tmp_path, NAMES)
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            load_pairs(tmp_path)

    def test_one_line_of_another_encoding_is_left_out_where_others_are_utf_8(self, tmp_path: Path) -> None:
        write_images(tmp_path, NAMES)
        (tmp_path / "p.csv").write_bytes(b"image,caption\na.png,caf\xc3\xa9\nb.png,caf\xe9\n")
        records = load_pairs(tmp_path)
        assert records.captions == [["café"]]
        assert dict(records.skipped) == {"caption that is not UTF-8": 1, "no caption left": 1}


class TestMistyped:
    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("mine/pairs.cvs", "mine/pairs.csv"),
            ("mine/pairs.CSV", "mine/pairs.csv"),
            ("mien/pairs.cvs", "mine"),
            ("mine/pairs.parqet", "mine/pairs.csv"),
            ("pairs.jsn", "expected a path"),
        ],
    )
    def test_a_table_is_not_asked_of_the_hub(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, near: str
    ) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "pairs.csv").write_text("image,caption\na.png,a dog\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.load_dataset_builder", lambda *_, **__: pytest.fail("asked the Hub"))
        began = time.monotonic()
        with pytest.raises(ValueError, match=near):
            load_pairs(name)
        assert time.monotonic() - began < 1

    def test_names_of_the_hub_may_hold_points(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Asked(Exception):
            pass

        def asked(*_: Any, **__: Any) -> None:
            raise Asked

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.load_dataset_builder", asked)
        for name in ("owner/data-v1.0", "owner/wiki.en", "owner/a.b.c"):
            with pytest.raises(Asked):
                load_pairs(name)


def test_links_that_lead_out_of_an_indexed_folder_are_counted(tmp_path: Path) -> None:
    from modeling_tvrn.data.skipped import Unusable
    from modeling_tvrn.index.sources import FolderSource

    write_images(tmp_path, ["photos/a.png", "other/b.png"])
    (tmp_path / "photos" / "link.png").symlink_to(tmp_path / "other" / "b.png")
    (tmp_path / "photos" / "folder").symlink_to(tmp_path / "other")
    (tmp_path / "photos" / "again").symlink_to(tmp_path / "photos")  # its photographs are found where they lie
    (tmp_path / "photos" / ".hidden").symlink_to(tmp_path / "other")
    refused = []
    for item in (source := FolderSource(tmp_path / "photos")):
        try:
            item.load()
        except Unusable as error:
            refused.append((os.path.basename(item.id), str(error)))
    assert sorted(name for name, _ in refused) == ["folder", "link.png"] and len(source) == 3
    assert all("link" in why for _, why in refused)
