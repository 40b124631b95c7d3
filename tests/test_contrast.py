"""Contrast rows and their protocol: which pair fits, of two that differ in one thing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_makers import encoded, noise, write_images
from hub_makers import FEATURES, pixel_model, region_model, save
from PIL import Image, ImageOps
from typer.testing import CliRunner

from modeling_tvrn.cli.app import app
from modeling_tvrn.data import ContrastRow, contrast_rows, load_pairs, read_contrast_rows
from modeling_tvrn.data.scenes import generate_scenes
from modeling_tvrn.evaluation import evaluate
from modeling_tvrn.metrics import Accuracy


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), dtype=np.uint8))


def score(model: Any, processor: Any, image: Image.Image, caption: str) -> tuple[float, float]:
    """Pair score and cosine of one pair by itself, through the public interface alone."""
    with torch.no_grad():
        output = model(**processor(images=[image], text=[caption], return_tensors="pt"))
    return output.logits_per_image.item(), (output.image_embeds @ output.text_embeds.T).item()


class TestProtocol:
    @pytest.mark.slow
    def test_against_pairs_scored_one_by_one(self) -> None:
        model, processor = pixel_model()
        captions = ["a dog in the snow", "two cats", "the cat sleeps", "two dogs one cat"]
        pictures = [picture(k) for k in range(8)]
        others = [{"other_image": pictures[-1 - k % 5]} if k % 2 == 0 else {"other_caption": captions[(k + 1) % 4]}
                  for k in range(13)]  # fmt: skip
        rows = [
            ContrastRow(pictures[k % 5], captions[k % 4], ("image", "caption")[k % 2], **others[k]) for k in range(13)
        ]
        report = evaluate(model, processor, rows, protocol="contrast", batch_size=5)
        for kind in ("image", "caption"):
            own = [row for row in rows if row.kind == kind]
            for which, name in enumerate(("pair score", "embeddings")):
                right = 0
                for row in own:
                    wrong = (row.other_image or row.image, row.other_caption or row.caption)
                    pairs = ((row.image, row.caption), wrong)
                    fits, does_not = (score(model, processor, *pair)[which] for pair in pairs)
                    right += fits > does_not
                assert report.kinds[kind][name] == Accuracy(right, len(own))
        assert f"| image | {7} |" in report.table() and "chance 50" in report.table()

    def test_an_image_of_several_rows_is_encoded_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, processor = pixel_model()
        images, own, encoded = [picture(1), picture(2)], model.encode_images, []
        rows = [
            ContrastRow(images[k % 2], caption, "k", images[1 - k % 2], "snow")
            for k, caption in enumerate(("a dog", "two cats", "the cat sleeps", "two dogs", "a cat", "a dog sleeps"))
        ]
        whole = evaluate(model, processor, rows, protocol="contrast")

        def counting(**inputs: torch.Tensor) -> Any:
            encoded.append(len(inputs["pixel_values"]))
            return own(**inputs)

        monkeypatch.setattr(model, "encode_images", counting)
        assert evaluate(model, processor, rows, protocol="contrast", batch_size=6).kinds == whole.kinds
        assert encoded == [2]

    def test_a_tie_is_wrong(self) -> None:
        model, processor = pixel_model()
        rows = [ContrastRow(picture(1), "the cat sleeps", "tie", other_image=picture(1))]
        assert evaluate(model, processor, rows, protocol="contrast").kinds["tie"]["pair score"].right == 0

    @pytest.mark.slow
    def test_groups_are_right_together_only(self) -> None:
        """Winoground's text, image and group score, from the four scores of each example."""
        model, processor = pixel_model()
        texts, rows, expected = ["the cat sleeps", "a dog in the snow"], [], []
        for example in range(12):
            images = [picture(2 * example), picture(2 * example + 1)]
            s = [[score(model, processor, image, text)[0] for text in texts] for image in images]
            text = s[0][0] > s[0][1] and s[1][1] > s[1][0]
            image = s[0][0] > s[1][0] and s[1][1] > s[0][1]
            expected.append((text, image, text and image))
            rows += [
                ContrastRow(images[k], texts[k], "all", images[1 - k], texts[1 - k], group=str(example))
                for k in (0, 1)
            ]
        report = evaluate(model, processor, rows, protocol="contrast", batch_size=7)
        found = [report.groups[side]["pair score"] for side in ("text", "image", "group")]
        assert [(each.right, each.count) for each in found] == [
            (sum(column), 12) for column in zip(*expected, strict=True)
        ]
        assert {each.count for each in report.kinds["all"].values()} == {24}

    def test_what_cannot_be_read_is_left_out_and_counted(self, tmp_path: Path) -> None:
        model, processor = pixel_model()
        (tmp_path / "good.png").write_bytes(encoded(1))
        (tmp_path / "cut.png").write_bytes(noise("PNG")[:90])
        rows = [
            ContrastRow(tmp_path / "good.png", "the cat sleeps", "k", other_caption="two dogs"),
            ContrastRow(tmp_path / "cut.png", "the cat sleeps", "k", other_caption="two dogs"),
            ContrastRow(tmp_path / "none.png", "the cat sleeps", "k", other_caption="two dogs"),
            ContrastRow(tmp_path / "good.png", "the cat sleeps", "k", other_caption="\ufe0f"),
        ]
        report = evaluate(model, processor, rows, protocol="contrast")
        assert report.kinds["k"]["pair score"].count == 1 and sum(report.skipped.values()) == 3
        with pytest.raises(ValueError, match="none of the 1 contrast rows"):
            evaluate(model, processor, rows[1:2], protocol="contrast")

    def test_region_features_are_mirrored_with_their_boxes(self) -> None:
        """With positions the mirrored boxes score otherwise, without they tie: the model knows no place."""
        boxes = np.array([[0.0, 0.1, 0.3, 0.5], [0.6, 0.2, 0.9, 0.8]], dtype=np.float32)
        records = Records([{"region_features": np.random.default_rng(0).normal(size=(2, FEATURES)).astype("f4"),
                            "region_boxes": boxes}], [["the cat on the left", "a dog"]])  # fmt: skip
        (row,) = contrast_rows(records)
        mirrored = list(row.images())[1]["region_boxes"]
        np.testing.assert_allclose(mirrored, [[0.7, 0.1, 1.0, 0.5], [0.1, 0.2, 0.4, 0.8]], atol=1e-6)
        scores = []
        for positions in (False, True):
            model, processor = region_model(use_box_positions=positions)
            with torch.no_grad():
                sides = [
                    model.encode_images(**processor(**{k: [v] for k, v in image.items()})) for image in row.images()
                ]
                texts = model.encode_texts(**processor(text=[row.caption]))
                scores.append([model.match(side, texts).item() for side in sides])
        assert scores[0][0] == pytest.approx(scores[0][1], abs=1e-6) and abs(scores[1][0] - scores[1][1]) > 1e-4

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"shortlist_size": 3}, "leave out shortlist_size"), ({"dataset": []}, "no contrast rows")],
    )
    def test_mistakes(self, options: dict[str, Any], message: str) -> None:
        model, processor = pixel_model()
        rows = options.pop("dataset", [ContrastRow(picture(1), "snow", "k", other_caption="two dogs")])
        with pytest.raises(ValueError, match=message):
            evaluate(model, processor, rows, protocol="contrast", **options)

    def test_an_interval_by_its_definition(self) -> None:
        """Wilson's: the shares p whose distance from the observed one is 1.96 of their own standard deviations."""
        observed = Accuracy(7, 9)
        for end in observed.interval:
            share = end / 100
            assert abs(share - 7 / 9) == pytest.approx(1.959964 * np.sqrt(share * (1 - share) / 9))
        assert Accuracy(5, 5).interval[1] == pytest.approx(100) and Accuracy(0, 5).interval[0] == pytest.approx(0)


class Records:
    """Map-style records."""

    def __init__(self, records: list[dict[str, Any]], captions: list[list[str]]) -> None:
        self.records, self.captions, self.image_ids = records, captions, list(range(len(records)))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.records[row]


class TestRows:
    def test_of_scenes(self) -> None:
        scenes = generate_scenes("validation", count=40)
        rows = contrast_rows(scenes)
        by_kind = {kind: [row for row in rows if row.kind == kind] for kind in dict.fromkeys(row.kind for row in rows)}
        assert set(by_kind) == {"left/right", "above/below", "colour", "shape", "size", "count"}
        flips = {"left/right": ImageOps.mirror, "above/below": ImageOps.flip}
        for kind, flip in flips.items():
            right, wrong = (image["image"] for image in by_kind[kind][0].images())
            assert np.array_equal(np.asarray(flip(right)), np.asarray(wrong))
        counted = sum(
            len(scenes.captions[row]) for row, scene in enumerate(scenes.scenes) if scene.relation == "left of"
        )
        assert len(by_kind["left/right"]) == counted
        for kind in ("colour", "shape", "size"):
            for row in by_kind[kind]:  # the same words in another order, but for synonyms
                assert row.other_caption is not None and row.caption != row.other_caption
        assert [row.caption for row in rows] == [row.caption for row in contrast_rows(scenes)]

    def test_of_loaded_scenes_those_that_were_chosen(self) -> None:
        loaded = load_pairs("scenes", "validation", count=12)
        assert len(contrast_rows(loaded.select([0, 1]))) < len(contrast_rows(loaded))

    def test_of_other_data_left_and_right(self, tmp_path: Path) -> None:
        write_images(tmp_path, ["a.png", "b.png"])
        (tmp_path / "captions.csv").write_text(
            "image,caption\na.png,a dog on the Left\na.png,a dog\nb.png,a leftover\nb.png,the right hand\n"
        )
        rows = contrast_rows(load_pairs(tmp_path))
        assert [row.caption for row in rows] == ["a dog on the Left", "the right hand"]
        (tmp_path / "captions.csv").write_text("image,caption\na.png,a dog\n")
        with pytest.raises(ValueError, match="no caption of the 1 images .* left or right"):
            contrast_rows(load_pairs(tmp_path))

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"caption": "a"}, "neither other_image nor other_caption"),
            ({"caption": "a", "other_caption": "a"}, "caption and other_caption are both 'a'"),
            ({"caption": "a", "other_image": "x.png"}, "image and other_image are both"),
            ({"caption": " ", "other_caption": "a"}, "caption is ' '"),
            ({"caption": None, "other_caption": "a"}, "caption is None"),
        ],
    )
    def test_a_row_without_two_sides_that_differ(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ContrastRow(image="x.png", kind="k", **values)


class TestFiles:
    def test_every_form_of_the_same_rows(self, tmp_path: Path) -> None:
        values = [
            {"image": "a.png", "caption": "a dog, left", "other_caption": "a dog, right", "kind": "side"},
            {"image": "b.png", "caption": "two", "other_image": "a.png", "kind": "count", "group": "g"},
        ]
        header = "image,caption,other_image,other_caption,kind,group\n"
        lines = 'a.png,"a dog, left",,"a dog, right",side,\nb.png,two,a.png,,count,g\n'
        (tmp_path / "rows.csv").write_text(header + lines)
        (tmp_path / "rows.json").write_text(json.dumps(values))
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, values)))
        read = [read_contrast_rows(tmp_path / f"rows.{suffix}") for suffix in ("csv", "json", "jsonl")]
        assert read[0] == read[1] == read[2]
        assert read[0][1] == ContrastRow(tmp_path / "b.png", "two", "count", tmp_path / "a.png", group="g")

    def test_public_sets(self, tmp_path: Path) -> None:
        """In the schema their authors publish."""
        images = tmp_path / "images"
        crepe = {"0": {"filename": "1.jpg", "caption": "a dog", "negative_caption": "a cat"}}
        relation = {"image_path": "2.jpg", "true_caption": "a on b", "false_caption": "b on a", "relation_name": "on",
                    "bbox_x": 3, "bbox_y": 4, "bbox_w": 10, "bbox_h": 5}  # fmt: skip
        example = {"id": 7, "image_0": "ex_7_img_0", "image_1": "ex_7_img_1", "caption_0": "x y", "caption_1": "y x",
                   "tag": "Noun", "collapsed_tag": "Object"}  # fmt: skip
        (tmp_path / "swap_obj.json").write_text(json.dumps(crepe))
        (tmp_path / "visual_genome_relation.json").write_text(json.dumps([relation]))
        (tmp_path / "examples.jsonl").write_text(json.dumps(example))
        assert read_contrast_rows(tmp_path / "swap_obj.json", images) == [
            ContrastRow(images / "1.jpg", "a dog", "swap_obj", other_caption="a cat")
        ]
        (aro,) = read_contrast_rows(tmp_path / "visual_genome_relation.json", images)
        assert (aro.caption, aro.other_caption, aro.box) == ("a on b", "b on a", (3, 4, 13, 9))
        two = read_contrast_rows(tmp_path / "examples.jsonl", images)
        assert [(row.group, row.kind, row.image.name, row.caption) for row in two] == [
            ("7", "Object", "ex_7_img_0.png", "x y"),
            ("7", "Object", "ex_7_img_1.png", "y x"),
        ]

    def test_an_image_is_cut_to_its_box(self, tmp_path: Path) -> None:
        picture(3).save(tmp_path / "a.png")
        row = ContrastRow(tmp_path / "a.png", "a", "k", other_caption="b", box=(3, 4, 13, 9))
        (image,) = row.images()
        assert np.array_equal(np.asarray(image["image"]), np.asarray(picture(3))[4:9, 3:13])

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("rows.csv", "picture,text\na,b\n", r"rows.csv, row 1 has the columns \['picture', 'text'\]"),
            ("rows.csv", "image,caption,other_caption\na.png,b,b\n", "row 1: .*are both 'b'"),
            ("rows.csv", 'image,caption,other_caption\na.png,"b,c\n', "rows.csv, line"),
            ("rows.json", "[1]", "entry 0 is 1"),
            ("rows.json", "{", "is not valid JSON"),
            ("rows.jsonl", '{"image": 1\n', "line 1 is not valid JSON"),
            ("rows.json", "[]", "has no rows"),
            ("rows.txt", "", "is called .txt"),
            ("rows.json", '[{"image": "../a.png", "caption": "a", "other_caption": "b"}]', r"entry 0: .*\.\./a\.png"),
        ],
    )
    def test_what_is_no_such_file(self, tmp_path: Path, name: str, content: str, message: str) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_contrast_rows(tmp_path / name)


def write_captions(folder: Path) -> Path:
    """A folder of two images, one of whose captions says left."""
    write_images(folder / "own", ["a.png", "b.png"])
    (folder / "own" / "captions.csv").write_text("image,caption\na.png,the cat sleeps left\nb.png,two dogs\n")
    return folder / "own"


def test_the_command_on_a_file_and_on_a_folder(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", *pixel_model())
    write_images(tmp_path / "images", ["a.png", "b.png"])
    rows = [{"image": "a.png", "caption": "the cat sleeps", "other_caption": "two dogs", "kind": "swap"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = ["evaluate", str(folder), "--protocol", "contrast", "--data"]
    report = tmp_path / "report.json"
    for arguments in (
        [str(tmp_path / "rows.json"), "--images", str(tmp_path / "images"), "--output", str(report)],
        [str(write_captions(tmp_path))],
    ):
        outcome = CliRunner().invoke(app, [*command, *arguments])
        assert outcome.exit_code == 0, outcome.stderr
        assert "| what differs | rows | pair score" in outcome.stdout
    assert json.loads(report.read_text())["kinds"]["swap"]["pair score"]["count"] == 1
