"""One's own pairs: from a table, a folder or a dataset to a model, without splits, and never validated on what was
trained on unless that is said."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
from training_makers import SIZES, TINY_VIT, tiny_config
from typer.testing import CliRunner

from modeling_tvrn.cli import app
from modeling_tvrn.data import load_pairs
from modeling_tvrn.training import TrainingConfig, describe, recipes, train
from modeling_tvrn.training.command import settings_of
from modeling_tvrn.training.pairs import load_training_pairs
from modeling_tvrn.training.recipes import default_recipe, find_recipe, recipe_values, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 24
# The recipe's public towers replaced by a tiny one from scratch.
TINY = [
    *("vision=null", "text=null", "model.freeze_vision=false", "model.freeze_text=false"),
    f"model.vision_config={json.dumps(TINY_VIT)}",
    *("model.vision_grid_size=null", *(f"model.{name}={size}" for name, size in SIZES.items())),
    *("epochs=1", "batch_size=8", "cpu=true"),
]


def tvrn(*arguments: object, code: int = 0) -> Any:
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert outcome.exit_code == code, f"{outcome.stdout}\n{outcome.stderr}\n{outcome.exception!r}"
    return outcome


def write_images(folder: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))).save(folder / name)


def write_table(path: Path, rows: list[tuple[str, ...]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures with two captions each, in tables of several kinds; it is the working folder."""
    names = [f"{number}.png" for number in range(IMAGES)]
    write_images(tmp_path / "photos", names)
    rows = [(name, f"picture {name[:-4]} {part}") for name in names for part in ("here", "once more")]
    write_table(tmp_path / "photos" / "captions.csv", [("image", "caption"), *rows])
    below = [(f"photos/{name}", text) for name, text in rows]
    write_table(tmp_path / "pairs.csv", [("image", "caption"), *below])
    write_table(tmp_path / "pairs.tsv", [("image", "caption"), *below], "\t")
    (tmp_path / "pairs.json").write_text(json.dumps([{"image": name, "caption": text} for name, text in below]))
    splits = ["val" if number % 4 == 0 else "train" for number in range(len(below))]
    mixed = [(*row, split) for row, split in zip(below, splits, strict=True)]
    write_table(tmp_path / "mixed.csv", [("image", "caption", "split"), *mixed])
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestSettingAside:
    def pairs(self, own: Path, data: Any = None, **keys: Any) -> Any:
        config = tiny_config(own / "pairs.csv", own / "run", **{"data_options": {}} | keys)
        return load_training_pairs(config, data)

    def test_a_tenth_of_the_images_by_seed_with_all_their_captions(self, own: Path) -> None:
        found = self.pairs(own)
        assert (len(found.train), len(found.validation)) == (IMAGES - 2, 2), "at least two"
        assert not set(found.train.image_ids) & set(found.validation.image_ids)
        assert all(len(captions) == 2 for captions in found.validation.captions)
        assert found.about == {"set_aside": {"share": 0.1, "seed": 0, "of": IMAGES}}
        assert self.pairs(own).validation.image_ids == found.validation.image_ids
        drawn = {tuple(self.pairs(own, seed=seed).validation.image_ids) for seed in range(5)}
        assert len(drawn) > 1

    def test_copies_of_a_picture_stay_on_one_side(self, own: Path) -> None:
        """Else a table that lists a photograph under two names validates on what it trains on."""
        rows = [("image", "caption")]
        for number in range(12):
            shutil.copy(own / "photos" / f"{number}.png", own / "photos" / f"copy-{number}.png")
            rows += [(f"photos/{prefix}{number}.png", f"picture {number}") for prefix in ("", "copy-")]
        write_table(own / "pairs.csv", rows)
        for seed in range(5):
            found = self.pairs(own, seed=seed)
            numbers = [{name.split("/")[-1].removeprefix("copy-") for name in part.image_ids}
                       for part in (found.train, found.validation)]  # fmt: skip
            assert not numbers[0] & numbers[1]

    def test_too_few_images_are_refused(self, own: Path) -> None:
        rows = [(f"photos/{number}.png", "a picture") for number in range(3)]
        write_table(own / "pairs.csv", [("image", "caption"), *rows])
        with pytest.raises(ValueError, match="has 3 images, 3 of them different, .* at least 4 different"):
            self.pairs(own)

    def test_splits_that_are_there_are_used_and_a_test_split_is_let_alone(self, own: Path) -> None:
        rows = [(f"photos/{n}.png", f"picture {n}", "test" if n % 3 == 0 else "train") for n in range(IMAGES)]
        write_table(own / "pairs.csv", [("image", "caption", "split"), *rows])
        found = self.pairs(own)
        assert len(found.train) + len(found.validation) == 16 and found.about["set_aside"]["of"] == 16
        tested = self.pairs(own, validation_split="test")
        assert (len(tested.train), len(tested.validation)) == (16, 8) and tested.about == {}

    def test_a_split_that_somebody_names_must_be_there(self, own: Path) -> None:
        with pytest.raises(ValueError, match="validation_split = 'held', but .*pairs.csv has no splits; name one"):
            self.pairs(own, validation_split="held")
        with pytest.raises(ValueError, match="train_split = 'some', but .* has no splits; leave it out"):
            self.pairs(own, train_split="some")

    def test_of_a_stream_nothing_can_be_set_aside(self, own: Path) -> None:
        keys = {"streaming": True, "max_steps": 2, "text": "some/encoder", "epochs": 1}
        with pytest.raises(ValueError, match="needs a validation split, .*it has no splits.* streaming=false"):
            self.pairs(own, **keys)

    def test_the_same_images_in_both_are_refused_with_count_and_example(self, own: Path) -> None:
        with pytest.raises(ValueError, match="12 of 12 validation images are training images too, such as 'photos/0"):
            self.pairs(own, data=load_pairs("mixed.csv", split="all"), train_split="all", validation_split="val")
        config = tiny_config(own / "mixed.csv", own / "run", data_options={})
        with pytest.raises(ValueError, match="12 of 12 .*allow_overlap=true"):
            load_training_pairs(config)

    def test_datasets_of_both_splits(self, own: Path) -> None:
        table = datasets.load_dataset("csv", data_files="pairs.csv", split="train", cache_dir=str(own / "cache"))
        parts = datasets.DatasetDict(train=table.select(range(40)), validation=table.select(range(40, 48)))
        options = {"columns": {"filename": "image"}, "image_root": str(own)}
        found = self.pairs(own, data=parts, data_options=options)
        assert found.about == {} and len(found.train) == 20 and len(found.validation) == 4


class TestCommands:
    @pytest.mark.slow
    @pytest.mark.parametrize("data", ["pairs.csv", "pairs.tsv", "pairs.json", "photos"])
    def test_from_one_s_own_pairs_to_a_model(self, own: Path, data: str) -> None:
        """What the README promises: no recipe, no splits, one command."""
        outcome = tvrn("train", f"data={data}", *TINY, "output_dir=run")
        assert "validation (2 of 24 images, set aside by seed 0), percent" in outcome.stdout
        results = json.loads((own / "run" / "results.json").read_text())
        assert results["data"]["set_aside"] == {"share": 0.1, "seed": 0, "of": IMAGES}
        assert results["data"]["train"]["images"] == 22 and results["data"]["validation"]["images"] == 2
        card = (own / "run" / "README.md").read_text("utf-8")
        assert "split validation (2 of 24 images, set aside by seed 0), 2 images and 4 captions" in card
        assert "were trained on" not in card and "model-index" in card
        assert (own / "run" / "model.safetensors").is_file()

    @pytest.mark.slow
    def test_images_in_both_splits_are_refused_or_said(self, own: Path) -> None:
        refused = tvrn("train", "data=mixed.csv", *TINY, "output_dir=run", code=2)
        assert "12 of 12 validation images are training images too" in refused.stderr
        assert not (own / "run" / "results.json").exists()
        tvrn("train", "data=mixed.csv", *TINY, "output_dir=run", "allow_overlap=true")
        overlap = json.loads((own / "run" / "results.json").read_text())["data"]["overlap"]
        assert overlap == {"images": 12, "example": {"train": "photos/0.png", "validation": "photos/0.png"}}
        card = (own / "run" / "README.md").read_text("utf-8")
        assert "**12 images of the split validation were trained on**" in card
        assert "model-index:" not in card, "the Hub must not rank by figures of images that were trained on"

    @pytest.mark.slow
    def test_a_dataset_in_python(self, own: Path) -> None:
        rows = load_pairs("pairs.csv")
        columns = {"image": [row["image"] for row in rows], "captions": rows.captions}
        features = datasets.Features(image=datasets.Image(), captions=datasets.List(datasets.Value("string")))
        dataset = datasets.Dataset.from_dict(columns, features=features)
        config = TrainingConfig.from_yaml("own", [*TINY, "output_dir=run"])
        results = train(config, dataset)
        assert results["data"]["set_aside"]["of"] == IMAGES
        assert results["config"]["data"] == "datasets.Dataset" and config.data == "scenes"
        assert "datasets.Dataset, split validation (2 of 24" in (own / "run" / "README.md").read_text("utf-8")

    @pytest.mark.parametrize(
        ("words", "answer"),
        [
            (["--data", "x"], "write data=x in place of --data x"),
            (["--data=x", "--learning-rate", "1e-3"], "write data=x learning_rate=1e-3 in place of"),
            (["--cpu", "--epochs=2"], "write cpu=true epochs=2"),
            (["--data", "batch_size=2"], "write data=VALUE"),
            (["--hidden-size", "64"], "write model.hidden_size=64"),
            (["--model.hidden_size", "64"], "write model.hidden_size=64"),
            (["--query", "a = b"], "write 'query=a = b'"),
            (["--learnig-rate", "1"], "no option '--learnig-rate'; did you mean learning_rate=…"),
            (["pairs.csv"], "write data=pairs.csv"),
            (["scenes"], "write -c scenes"),
            (["-c", "flickr8"], "did you mean flickr8k"),
            (["-c", "photos"], "is a folder: no configuration file 'photos'"),
            (["data=pairz.csv"], "did you mean pairs.csv"),
        ],
    )
    def test_what_is_written_otherwise_is_answered_with_the_right_way(
        self, own: Path, words: list[str], answer: str
    ) -> None:
        stderr = tvrn("train", *words, code=2).stderr
        assert answer in stderr and len(stderr.splitlines()) == 1

    @pytest.mark.slow
    def test_the_script_answers_as_the_verb_does(self, own: Path) -> None:
        command = [sys.executable, str(ROOT / "examples" / "train.py"), "epochs=1", "--config", "own", "--data", "x"]
        environment = {"PYTHONPATH": str(ROOT), "HOME": str(own), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and "write data=x in place of --data x" in done.stderr


class TestRecipes:
    def test_an_existing_file_wins_over_a_shipped_name(self, own: Path) -> None:
        assert find_recipe("scenes") == ROOT / "examples" / "configs" / "scenes.yaml"
        Path("scenes").write_text("epochs: 3\n")
        assert TrainingConfig.from_yaml("scenes").epochs == 3

    def test_which_one_a_command_without_c_means(self) -> None:
        quickstart = recipes.QUICKSTART
        assert [default_recipe(words) for words in ([], ["epochs=3"], ["data=scenes", "seed=1"])] == [quickstart] * 3
        for word in ("data=pairs.csv", "data=flickr8k", "dual_encoder=me/clip", "start_from=runs/x"):
            assert default_recipe(["seed=1", word]) == "own"
        assert settings_of(None, []) == TrainingConfig.from_yaml("scenes")
        assert settings_of(None, ["data=pairs.csv"]).output_dir == "runs/own"

    @pytest.mark.parametrize("start", ["dual_encoder=me/clip", "start_from=runs/x"])
    def test_a_model_to_start_from_takes_the_place_of_own_s_towers(self, start: str, tmp_path: Path) -> None:
        plain = recipe_values("own", ["data=pairs.csv"])
        assert {"vision", "text", "model"} <= set(plain)
        assert set(plain) - set(recipe_values("own", [start])) == {"vision", "text", "model"}
        (tmp_path / "mine.yaml").write_text("vision: some/tower\n")
        assert recipe_values(tmp_path / "mine.yaml", [start]) == {"vision": "some/tower"}, "a file says what it says"

    def test_own_begins_with_its_command(self) -> None:
        text = shipped_recipes()["own"].read_text("utf-8")
        assert "#   tvrn train data=pairs.csv\n" in text.split("\nvision:")[0]

    @pytest.mark.slow
    def test_they_travel_with_the_package(self, tmp_path: Path) -> None:
        """An installed copy has no examples/ beside it."""
        pytest.importorskip("setuptools")
        for name in ("setup.py", "README.md", "LICENSE", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path / name)
        for name in ("modeling_tvrn", "model_cards", "examples/configs"):
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
        subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
        code = "from modeling_tvrn.training.recipes import shipped_recipes; print(*shipped_recipes())"
        environment = {"PYTHONPATH": str(tmp_path / "built")}
        found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "built", env=environment,
                               capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
        assert set(found) == {path.stem for path in (ROOT / "examples" / "configs").glob("*.yaml")}
        assert (tmp_path / "built" / "modeling_tvrn" / "recipes" / "own.yaml").is_file()


def test_keys_begin_with_those_that_matter() -> None:
    text = describe(TrainingConfig)
    named = [line.split("=")[0].strip() for line in text.splitlines() if line.startswith("  ") and line[2] != " "]
    known = TrainingConfig.model_fields
    wanted = ["data", "dual_encoder", "start_from", "output_dir", "phases", "epochs", "batch_size", "learning_rate"]
    wanted = [name for name in [*wanted, "mixed_precision"] if name in known]
    assert named[: len(wanted)] == wanted and set(wanted) >= {"data", "output_dir", "epochs", "mixed_precision"}
    assert len(named) == len(set(named)), "each once"
