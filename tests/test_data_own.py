"""One's own data: datasets in memory, paths that are not there, and images that two splits share."""

from pathlib import Path
from typing import Any

import datasets
import pytest
from data_makers import captions, encoded, shows, write_images, write_parquet, write_tar

from modeling_tvrn.data import load_pairs
from modeling_tvrn.data.same_images import equal_content, shared_images


def table(numbers: Any = range(4)) -> datasets.Dataset:
    columns = {"image": [{"bytes": encoded(n), "path": None} for n in numbers]}
    columns |= {"caption": [captions(n, 2) for n in numbers], "image_id": list(numbers)}
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


class TestDatasetsInMemory:
    def test_a_dataset_is_read_as_a_file_of_it_would_be(self) -> None:
        records = load_pairs(table())
        assert records.image_ids == [0, 1, 2, 3] and records.splits == ["all"] * 4
        assert records.captions[2] == captions(2, 2) and shows(records[2]["image"], 2)

    def test_a_shuffled_part_with_a_format_keeps_rows_and_pictures_together(self) -> None:
        part = table(range(9)).select([7, 3, 5]).with_format("torch")
        records = load_pairs(part, columns={"captions": "caption", "image_id": "image_id"})
        assert records.image_ids == [7, 3, 5] and shows(records[1]["image"], 3)
        assert [records.image_size(row) for row in range(3)] == [len(encoded(n)) for n in (7, 3, 5)]

    def test_datasets_by_split(self) -> None:
        both = datasets.DatasetDict(train=table(range(3)), val=table([8]))
        assert load_pairs(both, split="train").image_ids == [0, 1, 2]
        assert load_pairs(both, split="validation").image_ids == [8]
        with pytest.raises(ValueError, match="has the splits 'train', 'val' and none was chosen"):
            load_pairs(both)

    def test_a_stream_is_streamed_or_refused(self) -> None:
        stream = table().to_iterable_dataset(num_shards=2)
        assert [record["image_id"] for record in load_pairs(stream, streaming=True)] == [0, 1, 2, 3]
        assert len(load_pairs(stream, streaming=True).shards()) == 2
        with pytest.raises(ValueError, match="IterableDataset is a stream.*streaming=True"):
            load_pairs(stream)

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ([{"image": "a.png", "caption": "a"}], "source is or holds list; .*Dataset.from_list"),
            ({"image": ["a.png"], "caption": ["a"]}, "source is or holds list"),
            ({}, "source is or holds nothing"),
        ],
    )
    def test_something_else_is_refused(self, source: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_pairs(source)

    def test_columns_and_options_are_checked_as_for_files(self) -> None:
        with pytest.raises(ValueError, match=r"no column of captions .*columns seen: \['image'\]"):
            load_pairs(table().select_columns(["image"]))
        with pytest.raises(ValueError, match="takes no option captions_file"):
            load_pairs(table(), captions_file="x.csv")


class TestMissingPaths:
    @pytest.fixture
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A working folder with a table, from which the Hub must not be asked."""

        def asked(*arguments: Any, **options: Any) -> None:
            raise AssertionError("the Hub was asked for what can only be a path")

        write_images(tmp_path / "mine", ["a.png"])
        (tmp_path / "mine" / "pairs.csv").write_text("image,caption\na.png,a dog\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.load_dataset_builder", asked)
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "near"),
        [
            ("mine/pairz.csv", "did you mean mine/pairs.csv"),
            ("mine/pairs.tsv", "did you mean mine/pairs.csv"),
            ("./mien/pairs.csv", "there is no folder .*/mien.*did you mean mine"),
            ("mine/more/of/it", "there is no folder .*/more"),
            ("/no-such/pairs", "looked for /no-such/pairs, but there is no folder /no-such"),
            ("~/no-such-pairs", "looked for /.*/no-such-pairs"),
            ("flickr8", "expected a path, one of flickr8k, .*scenes, or a Hub id"),
        ],
    )
    def test_they_say_what_was_looked_for_and_what_is_there(self, here: Path, name: str, near: str) -> None:
        with pytest.raises(ValueError, match=near):
            load_pairs(name)

    def test_a_path_below_home_is_found(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(here))
        assert load_pairs("~/mine/pairs.csv").image_ids == ["a.png"]

    def test_a_hub_id_is_still_asked_for(self, here: Path) -> None:
        with pytest.raises(AssertionError):
            load_pairs("owner/pairs")

    def test_what_may_be_both_names_the_file_after_the_hub_failed(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def absent(*arguments: Any, **options: Any) -> None:
            raise FileNotFoundError("no such dataset")

        monkeypatch.setattr("datasets.load_dataset_builder", absent)
        with pytest.raises(ValueError, match="could not be loaded from the Hub.*Did you mean mine/pairs.csv"):
            load_pairs("mine/pairs")


class TestSameImages:
    def test_rows_of_one_file_in_two_splits_stay_in_both(self, tmp_path: Path) -> None:
        """They used to be joined in the first one's split, without a word."""
        write_images(tmp_path, ["a.png", "b.png"])
        rows = ["a.png,one,train", "b.png,two,train", "a.png,three,val", "a.png,four,train"]
        (tmp_path / "pairs.csv").write_text("\n".join(["image,caption,split", *rows]))
        train, validation = (load_pairs(tmp_path / "pairs.csv", split=split) for split in ("train", "val"))
        assert train.captions == [["one", "four"], ["two"]] and validation.captions == [["three"]]
        assert shared_images(train, validation) == [(0, 0)]
        assert load_pairs(tmp_path / "pairs.csv", split="all").captions[0] == ["one", "four", "three"]

    def test_a_copy_under_another_name_is_found_in_every_kind_of_source(self, tmp_path: Path) -> None:
        write_images(tmp_path / "files", ["0.png", "1.png", "2.png"])
        rows = "\n".join(f"{n}.png,{captions(n, 1)[0]}" for n in range(3))
        (tmp_path / "files" / "pairs.csv").write_text(f"image,caption\n{rows}")
        columns = {"image": [encoded(7), encoded(1)], "caption": ["a", "b"], "image_id": ["x", "y"]}
        write_parquet(tmp_path / "parquet" / "data.parquet", columns)
        write_tar(tmp_path / "tar" / "x.tar", {"p.png": encoded(8), "p.txt": "a", "q.png": encoded(1), "q.txt": "b"})
        files = load_pairs(tmp_path / "files")
        for other in ("parquet", "tar"):
            assert shared_images(files, load_pairs(tmp_path / other)) == [(1, 1)], other
        assert shared_images(load_pairs(tmp_path / "parquet"), load_pairs(tmp_path / "tar")) == [(1, 1)]

    def test_one_id_of_two_different_files_is_two_images(self, tmp_path: Path) -> None:
        """`0001.jpg` of two folders; without files to compare the id decides."""
        for folder, number in (("train", 1), ("val", 2)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "0001.png").write_bytes(encoded(number))
            (tmp_path / folder / "pairs.csv").write_text("image,caption\n0001.png,a\n")
        train, validation = load_pairs(tmp_path / "train"), load_pairs(tmp_path / "val")
        assert train.image_ids == validation.image_ids and shared_images(train, validation) == []
        scenes = load_pairs("scenes", split="train", count=3)
        assert shared_images(scenes, scenes.select([2, 0])) == [(2, 0), (0, 1)]

    def test_files_that_end_alike_are_read_whole(self, tmp_path: Path) -> None:
        """Equal size and equal last bytes are not yet an equal image."""
        for name, first in (("a", 0), ("b", 1), ("c", 0)):
            (tmp_path / f"{name}.bin").write_bytes(bytes([first]) + bytes(9000))
        (tmp_path / "pairs.csv").write_text("image,caption\na.bin,a\nb.bin,b\nc.bin,c\n")
        records = load_pairs(tmp_path, verify=False)
        assert [[row for _, row in group] for group in equal_content((records, row) for row in range(3))] == [[0, 2]]
