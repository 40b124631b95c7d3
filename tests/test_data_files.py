"""Webdataset tars, folders with a table of captions, and SCAN's arrays."""

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from data_makers import captions, encoded, shows, write_images, write_tar

from modeling_tvrn.data import load_pairs


def samples(numbers, image_format="JPEG", extension="jpg"):
    """Members of `clip-benchmark/wds_flickr30k`: an image and five captions joined by newlines."""
    members = {}
    for place, number in enumerate(numbers):
        members[f"s{place:07d}.{extension}"] = encoded(number, image_format, quality=95)
        members[f"s{place:07d}.txt"] = "\n".join(captions(number))
    return members


class TestWebdataset:
    @pytest.fixture
    def folder(self, tmp_path):
        write_tar(tmp_path / "test" / "0.tar", samples([3, 1]))
        write_tar(tmp_path / "test" / "1.tar", samples([4]))  # keys begin anew, as in the public shards
        write_tar(tmp_path / "train" / "0.tar", samples([5, 6]))
        return tmp_path

    @pytest.mark.parametrize("streaming", [False, True])
    def test_shards_of_a_split_in_order(self, folder, streaming):
        records = list(load_pairs(folder, split="test", streaming=streaming))
        assert [record["image_id"] for record in records] == ["test/0/s0000000", "test/0/s0000001", "test/1/s0000000"]
        for number, record in zip((3, 1, 4), records, strict=True):
            assert shows(record["image"], number)
            assert record["captions"] == captions(number)
            assert record["caption_ids"] == [f"{record['image_id']}#{k}" for k in range(5)]
            assert (record["split"], record["filename"]) == ("test", record["image_id"])

    def test_any_row_in_any_order(self, folder):
        records = load_pairs(folder / "test")
        assert [shows(records[row]["image"], (3, 1, 4)[row]) for row in (2, 0, -2)] == [True] * 3

    @pytest.mark.parametrize("streaming", [False, True])
    def test_ids_and_captions_in_json_members(self, tmp_path, streaming):
        write_tar(
            tmp_path / "a.tar",
            {
                "./dir/7.json": {"caption": captions(7, 2), "img_id": 7, "sentids": [70, 71], "split": "val"},
                "./dir/7.webp": encoded(7, "WEBP", lossless=True),
                "./dir/8.json": {"caption": captions(8, 1), "img_id": 8, "sentids": [80], "split": "val"},
                "./dir/8.PNG": encoded(8),
            },
        )
        records = list(load_pairs(tmp_path / "a.tar", streaming=streaming))
        assert [(r["image_id"], r["caption_ids"], r["split"]) for r in records] == [
            (7, [70, 71], "validation"),
            (8, [80], "validation"),
        ]
        assert shows(records[0]["image"], 7) and shows(records[1]["image"], 8)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_incomplete_samples_are_counted(self, tmp_path, streaming):
        members = samples([1, 2, 3])
        del members["s0000000.jpg"], members["s0000001.txt"]
        write_tar(tmp_path / "a.tar", members)
        records = load_pairs(tmp_path, streaming=streaming)
        assert [shows(record["image"], 3) for record in records] == [True]
        assert dict(records.skipped) == {"missing image": 1, "no caption left": 1}

    def test_a_shard_that_is_cut_short_is_named(self, tmp_path):
        write_tar(tmp_path / "a.tar", samples([1, 2, 3, 4]))
        whole = (tmp_path / "a.tar").read_bytes()
        (tmp_path / "a.tar").write_bytes(whole[: len(samples([1])["s0000000.jpg"]) + 4 * 1024])
        for streaming in (False, True):
            with pytest.raises(ValueError, match=r"a\.tar is not a whole tar file"):
                list(load_pairs(tmp_path, streaming=streaming))

    def test_compressed_shards_stream_and_say_why_they_do_no_more(self, tmp_path):
        write_tar(tmp_path / "a.tar.gz", samples([3, 1]), mode="w:gz")
        assert len(list(load_pairs(tmp_path, streaming=True))) == 2
        with pytest.raises(ValueError, match=r"a\.tar\.gz is compressed.*streaming=True"):
            load_pairs(tmp_path)

    def test_unknown_members_are_refused(self, tmp_path):
        write_tar(tmp_path / "a.tar", {"1.bin": b"x", "1.cls": "3"})
        with pytest.raises(ValueError, match=r"columns seen: \['bin', 'cls'\]"):
            load_pairs(tmp_path)


def in_csv(rows, delimiter=",", header=("filename", "caption")):
    return "\n".join(delimiter.join(row) for row in [header, *rows]) + "\n"


NAMES = ["a.png", "b.png", "c.png"]
ROW_A_CAPTION = [(name, text) for number, name in enumerate(NAMES) for text in captions(number, 2)]
KARPATHY = {
    "dataset": "flickr8k",
    "images": [
        {
            "sentids": [2 * n, 2 * n + 1],
            "imgid": n,
            "filename": name,
            "split": "test",
            "sentences": [
                {"raw": text, "tokens": text.split(), "imgid": n, "sentid": 2 * n + k}
                for k, text in enumerate(captions(n, 2))
            ],
        }
        for n, name in enumerate(NAMES)
    ],
}
COCO = {
    "images": [{"id": n, "file_name": name} for n, name in enumerate(NAMES)],
    "annotations": [
        {"image_id": n, "id": 2 * n + k, "caption": captions(n, 2)[k]} for k in range(2) for n in range(len(NAMES))
    ],
}
RECORDS = [{"file_name": name, "text": captions(n, 2)} for n, name in enumerate(NAMES)]
TABLES = {
    "captions.csv": in_csv(ROW_A_CAPTION),
    "captions.tsv": in_csv(ROW_A_CAPTION, "\t", ("image", "caption")),
    "results.csv": in_csv(
        [(n, f" {k % 2}", f" {t}") for k, (n, t) in enumerate(ROW_A_CAPTION)],
        "|",
        ("image_name", " comment_number", " comment"),
    ),  # Kaggle's Flickr30k
    "captions.txt": in_csv(ROW_A_CAPTION, ",", ("image", "caption")),  # Kaggle's Flickr8k
    "Flickr8k.token.txt": "".join(f"{n}#{k % 2}\t{t}\n" for k, (n, t) in enumerate(ROW_A_CAPTION)),
    "wide.csv": in_csv(
        [(n, *captions(k, 2)) for k, n in enumerate(NAMES)], ",", ("filename", "caption_0", "caption_1")
    ),
    "dataset.json": json.dumps(KARPATHY),
    "captions_val.json": json.dumps(COCO),
    "records.json": json.dumps(RECORDS),
    "map.json": json.dumps({name: captions(n, 2) for n, name in enumerate(NAMES)}),
    "metadata.jsonl": "\n".join(map(json.dumps, RECORDS)) + "\n",  # the image folder of `datasets`
    "annotations.csv": "raw,sentids,filename,img_id\n"
    + "".join(
        '"[""{}"", ""{}""]","[{}, {}]",{},{}\n'.format(*captions(n, 2), 2 * n, 2 * n + 1, name, n)
        for n, name in enumerate(NAMES)
    ),  # nlphuji's table of Flickr30k
}


class TestFolder:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("place", ["", "images", "Images"])
    @pytest.mark.parametrize("table", ["captions.csv"])
    def test_images_beside_the_table_or_in_a_folder(self, tmp_path, table, place, streaming):
        write_images(tmp_path / place, NAMES)
        (tmp_path / table).write_text(TABLES[table])
        records = list(load_pairs(tmp_path, streaming=streaming))
        assert [shows(record["image"], n) for n, record in enumerate(records)] == [True] * 3

    @pytest.mark.parametrize("table", TABLES)
    def test_forms_of_tables(self, tmp_path, table):
        write_images(tmp_path, NAMES)
        (tmp_path / table).write_text(TABLES[table])
        records = load_pairs(tmp_path)
        assert records.captions == [captions(n, 2) for n in range(3)]
        assert records.filenames == NAMES
        has_ids = table in ("dataset.json", "captions_val.json", "annotations.csv")
        expected = [str(n) if table == "annotations.csv" else n for n in range(3)] if has_ids else NAMES
        assert records.image_ids == expected
        ids = [[2 * n, 2 * n + 1] if has_ids else [f"{name}#0", f"{name}#1"] for n, name in enumerate(NAMES)]
        # the pipe-separated table numbers captions in a column that is no id
        assert records.caption_ids == ids
        assert [shows(record["image"], n) for n, record in enumerate(records)] == [True] * 3

    def test_the_table_lies_elsewhere(self, tmp_path):
        write_images(tmp_path / "photos", NAMES)
        (tmp_path / "dataset.json").write_text(TABLES["dataset.json"])
        records = load_pairs(tmp_path / "photos", captions_file=tmp_path / "dataset.json")
        assert [shows(record["image"], n) for n, record in enumerate(records)] == [True] * 3
        same = load_pairs(tmp_path / "dataset.json", split="test", image_root=tmp_path / "photos")
        assert same.image_ids == records.image_ids
        with pytest.raises(ValueError, match=r"captions_file=.*gone\.csv.* is no file"):
            load_pairs(tmp_path / "photos", captions_file=tmp_path / "gone.csv")

    def test_captions_with_commas_quotes_and_newlines_survive(self, tmp_path):
        write_images(tmp_path, NAMES)
        (tmp_path / "a.csv").write_text('filename,caption\r\na.png,"A dog, a ""cat""."\r\nb.png,"one\ntwo"\r\n')
        assert load_pairs(tmp_path).captions == [['A dog, a "cat".'], ["one\ntwo"]]

    def test_tsv_captions_may_hold_lone_quotes(self, tmp_path):
        """Read as CSV, the quote would swallow the following lines."""
        write_images(tmp_path, NAMES)
        (tmp_path / "a.tsv").write_text('filename\tcaption\na.png\t"Stop says a sign\nb.png\t"whole"\nc.png\tthird\n')
        assert load_pairs(tmp_path).captions == [['"Stop says a sign'], ["whole"], ["third"]]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.csv", "filename,caption\na.png,A dog, a cat\n", r"line 2 has 3 cells where the header has 2"),
            ("a.csv", 'filename,caption\na.png,"A dog" runs\n', r"a\.csv, line 2: .*quotes"),
            ("a.csv", "filename,caption\n", "holds no rows"),
            ("a.json", '{"images": [', "not valid JSON"),
            ("a.jsonl", '{"filename": "a.png", "caption": "x"}\nnonsense\n', "line 2 is not valid JSON"),
            ("a.json", '{"a.png": ["A dog"], "a.png": ["A cat"]}', r"the key 'a\.png' occurs twice in \{\"a.png\": "),
            ("a.jsonl", '{"filename": "a.png", "caption": "x", "caption": "y"}', "line 1 .*'caption' occurs twice"),
            ("a.csv", "where,what\na.png,A dog\n", r"columns seen: \['where', 'what'\]"),
            ("a.csv", "caption,size\nA dog,3\n", r"no column with the images' file names.*\['caption', 'size'\]"),
            ("a.token", "a.png#0\tA dog\nb.png A cat\n", "line 2: expected 'file.jpg#number<tab>caption'"),
        ],
    )
    def test_broken_tables_are_refused(self, tmp_path, name, text, message):
        write_images(tmp_path, NAMES)
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            load_pairs(tmp_path)

    def test_a_line_without_its_caption_is_counted(self, tmp_path):
        """Kaggle's Flickr30k table has such a line."""
        write_images(tmp_path, NAMES)
        (tmp_path / "a.csv").write_text("image_name| comment_number| comment\na.png| 0| A dog .\na.png| 1   A cat .\n")
        records = load_pairs(tmp_path)
        assert records.captions == [["A dog ."]] and dict(records.skipped) == {"empty caption": 1}

    def test_files_that_are_missing_are_counted(self, tmp_path):
        write_images(tmp_path, NAMES[:2])
        (tmp_path / "captions.csv").write_text(TABLES["captions.csv"])
        records = load_pairs(tmp_path)
        assert records.image_ids == NAMES[:2]
        assert (
            dict(records.skipped) == {"missing image": 1} and "c.png" in records.skipped.examples["missing image"][0]
        )

    def test_a_table_for_each_split(self, tmp_path):
        write_images(tmp_path, NAMES)
        for split, part in (("train", ROW_A_CAPTION[:4]), ("val", ROW_A_CAPTION[4:])):
            (tmp_path / f"captions_{split}.csv").write_text(in_csv(part))
        assert load_pairs(tmp_path, split="train").image_ids == NAMES[:2]
        assert load_pairs(tmp_path, split="dev").image_ids == NAMES[2:]
        (tmp_path / "more_val.csv").write_text(in_csv(ROW_A_CAPTION))
        with pytest.raises(ValueError, match="several caption tables.*captions_file="):
            load_pairs(tmp_path, split="dev")

    def test_a_folder_of_nothing_is_refused(self, tmp_path):
        write_images(tmp_path, NAMES)
        with pytest.raises(ValueError, match=r"nothing that is understood.*\.parquet"):
            load_pairs(tmp_path)
        with pytest.raises(ValueError, match="pattern matches no file"):
            load_pairs(tmp_path / "*.parquet")


class TestScan:
    RNG = np.random.default_rng(0)
    FEATURES = RNG.normal(size=(3, 4, 6)).astype(np.float32)
    BOXES = np.sort(RNG.uniform(0, 100, size=(3, 4, 2, 2)), axis=2).reshape(3, 4, 4).astype(np.float32)
    SIZES = np.array([[100, 120], [110, 100], [130, 140]])  # height, width
    LINES = tuple(text for n in range(3) for text in captions(n))

    def write(self, folder, stem="dev", repeat=1, lines=None, **arrays):
        np.save(folder / f"{stem}_ims.npy", self.FEATURES.repeat(repeat, axis=0))
        (folder / f"{stem}_caps.txt").write_text("\n".join(self.LINES if lines is None else lines) + "\n")
        for name, array in arrays.items():
            np.save(folder / f"{stem}_{name}.npy", array)

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("repeat", [1, 5])
    def test_rows_once_an_image_or_repeated_once_a_caption(self, tmp_path, repeat, streaming):
        self.write(tmp_path, repeat=repeat)
        records = list(load_pairs(tmp_path, split="validation", streaming=streaming))
        assert [record["captions"] for record in records] == [captions(n) for n in range(3)]
        for features, record in zip(self.FEATURES, records, strict=True):
            np.testing.assert_array_equal(record["region_features"], features)
        assert [record["image_id"] for record in records] == [f"validation/{n:06d}" for n in range(3)]
        assert "region_boxes" not in records[0] and "image" not in records[0]

    def test_one_caption_an_image(self, tmp_path):
        self.write(tmp_path, lines=["one", "two", "three"])
        assert load_pairs(tmp_path).captions == [["one"], ["two"], ["three"]]

    @pytest.mark.parametrize("repeat", [1, 5])
    def test_pixel_boxes_become_fractions(self, tmp_path, repeat):
        self.write(tmp_path, repeat=repeat, boxes=self.BOXES.repeat(repeat, axis=0), img_sizes=self.SIZES)
        records = load_pairs(tmp_path)
        for row, (height, width) in enumerate(self.SIZES):
            expected = self.BOXES[row] / [width, height, width, height]
            np.testing.assert_allclose(records[row]["region_boxes"], expected, rtol=1e-6)

    def test_the_names_of_gsmn_s_files_and_their_pickled_sizes(self, tmp_path):
        """Sizes are published as an array of dicts: never loaded, but the message's command makes numbers of them."""
        self.write(tmp_path, ims_bbx=self.BOXES, ims_size=self.SIZES)
        height, width = self.SIZES[1]
        expected = self.BOXES[1] / [width, height, width, height]
        np.testing.assert_allclose(load_pairs(tmp_path)[1]["region_boxes"], expected, rtol=1e-6)
        sizes = np.array(
            [{"image_h": height, "image_w": width} for height, width in self.SIZES.tolist()], dtype=object
        )
        np.save(tmp_path / "dev_ims_size.npy", sizes, allow_pickle=True)
        with pytest.raises(ValueError, match=r"dev_ims_size\.npy cannot be mapped .*is not loaded") as refused:
            load_pairs(tmp_path)
        command = re.search(r'python -c "(.*)"', str(refused.value))[1]
        subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
        np.testing.assert_allclose(load_pairs(tmp_path)[1]["region_boxes"], expected, rtol=1e-6)

    def test_boxes_that_are_fractions_already_stay(self, tmp_path):
        self.write(tmp_path, boxes=self.BOXES / 100, img_sizes=self.SIZES)
        np.testing.assert_allclose(load_pairs(tmp_path)[1]["region_boxes"], self.BOXES[1] / 100, rtol=1e-6)

    def test_boxes_that_cannot_be_used_are_refused(self, tmp_path):
        self.write(tmp_path, boxes=self.BOXES)
        with pytest.raises(ValueError, match=r"holds pixels .*no dev_img_sizes\.npy"):
            load_pairs(tmp_path)
        wide = self.BOXES * [1.3, 0.5, 1.3, 0.5]
        self.write(tmp_path, boxes=wide, img_sizes=np.array([[140, 60]] * 3))
        with pytest.raises(ValueError, match=r"they fit once height and width are swapped.*\(height, width\)"):
            load_pairs(tmp_path)
        self.write(tmp_path, boxes=self.BOXES[..., ::-1], img_sizes=self.SIZES)
        with pytest.raises(
            ValueError, match=r"dev_boxes\.npy, row 0, region 0: .*: x2 < x1 .*\(wrong boxes in 3 of 3 images\)"
        ):
            load_pairs(tmp_path)
        self.write(tmp_path, boxes=self.BOXES[:2])
        with pytest.raises(ValueError, match=r"shape \(2, 4, 4\) of float32, expected \(3, 4, 4\)"):
            load_pairs(tmp_path)

    @pytest.mark.parametrize("in_pixels", [True, False])
    @pytest.mark.parametrize(
        ("box", "why"),
        [
            ([0, 0, np.nan, 1], "expected finite numbers"),
            ([0.4, 0, 0.2, 1], "x2 < x1"),
            ([-9, 0, 1, 1], "which begins at 0"),
            ([0, 0, 9, 1], "outside the image"),
        ],
    )
    def test_an_image_with_a_wrong_box_is_left_out_and_counted(self, tmp_path, box, why, in_pixels):
        unit = 100 if in_pixels else 1
        boxes = self.BOXES * unit / 100
        boxes[1, 2] = np.array(box) * unit
        self.write(tmp_path, boxes=boxes, img_sizes=self.SIZES)
        for streaming in (False, True):
            records = load_pairs(tmp_path, split="validation", streaming=streaming)
            assert [record["captions"] for record in records] == [captions(0), captions(2)]
            assert dict(records.skipped) == {"bad region features": 1}
            example = records.skipped.examples["bad region features"][0]
            assert "dev_boxes.npy, row 1, region 2: [" in example and why in example

    def test_an_empty_line_does_not_shift_the_captions_of_others(self, tmp_path):
        lines = list(self.LINES)
        lines[2], lines[7] = "", "a\u2028b\x0bc"  # characters at which str.splitlines would cut
        self.write(tmp_path, lines=lines)
        records = load_pairs(tmp_path)
        assert [len(texts) for texts in records.captions] == [4, 5, 5]
        assert records.caption_ids[0] == [f"validation/000000#{k}" for k in (0, 1, 3, 4)]
        assert records.captions[1][2] == lines[7] and records.captions[2] == captions(2)
        assert dict(records.skipped) == {"empty caption": 1}

    def test_lengths_that_do_not_fit_are_refused(self, tmp_path):
        self.write(tmp_path, lines=self.LINES[:-1])
        with pytest.raises(ValueError, match="3 images and dev_caps.txt 14 lines: expected 5 lines an image"):
            load_pairs(tmp_path)
        self.write(tmp_path, lines=self.LINES[:6])
        assert [len(texts) for texts in load_pairs(tmp_path, captions_per_image=2).captions] == [2, 2, 2]

    @pytest.mark.parametrize("repeat", [1, 5])
    def test_image_ids(self, tmp_path, repeat):
        self.write(tmp_path)
        (tmp_path / "dev_ids.txt").write_text("".join(f"{n}\n" * repeat for n in (30, 10, 20)))
        assert load_pairs(tmp_path).image_ids == [30, 10, 20]

    def test_broken_features_are_found_by_the_full_check(self, tmp_path):
        features = self.FEATURES.copy()
        features[1, 2, 3] = np.nan
        self.write(tmp_path)
        np.save(tmp_path / "dev_ims.npy", features)
        records = load_pairs(tmp_path, verify="full")
        assert records.captions == [captions(0), captions(2)]
        assert dict(records.skipped) == {"bad region features": 1}
        with pytest.raises(ValueError, match=r"record 1 .*NaN.*verify='full'"):
            load_pairs(tmp_path)[1]

    def test_features_are_mapped_and_do_not_travel_to_workers(self, tmp_path):
        np.save(tmp_path / "train_ims.npy", np.zeros((20, 36, 512), np.float32))
        (tmp_path / "train_caps.txt").write_text("".join(f"caption {n}\n" for n in range(100)))
        records = load_pairs(tmp_path)
        assert records[3]["region_features"].shape == (36, 512)
        sent = pickle.dumps(records)
        assert len(sent) < 20_000
        assert pickle.loads(sent)[19]["captions"] == [f"caption {n}" for n in range(95, 100)]  # noqa: S301 - our own bytes

    def test_an_array_of_python_objects_is_refused(self, tmp_path):
        self.write(tmp_path, boxes=self.BOXES, img_sizes=np.array([{"image_w": 1, "image_h": 2}] * 3))
        with pytest.raises(ValueError, match=r"img_sizes\.npy cannot be mapped.*plain \.npy array"):
            load_pairs(tmp_path)

    def test_two_splits_in_a_folder(self, tmp_path):
        self.write(tmp_path, "dev")
        self.write(tmp_path, "test", lines=[line.upper() for line in self.LINES])
        with pytest.raises(ValueError, match="'dev', 'test' and none was chosen"):
            load_pairs(tmp_path)
        assert load_pairs(tmp_path, split="test").captions[0][0] == "CAPTION 0 OF IMAGE 0 ."
