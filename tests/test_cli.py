"""`tvrn`: quick help, exit codes, JSON that scripts can read, and verbs that do what the functions behind them do."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from dual_encoder_makers import save_dual_encoder
from hub_makers import CAPTIONS, pixel_model, region_model, results, save
from transformers import ResNetConfig, ResNetModel, ViTImageProcessor
from typer.testing import CliRunner

from modeling_tvrn.cli import app
from modeling_tvrn.cli.common import load
from modeling_tvrn.data import load_pairs
from modeling_tvrn.hub import Check, DoctorReport, Pushed
from modeling_tvrn.teachers import RegionCache

VERBS = [command.name for command in app.registered_commands]
HEAVY = {"torch", "transformers", "datasets", "huggingface_hub", "matplotlib", "numpy", "PIL", "accelerate"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
TINY_VIT = {
    "model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 19,
}  # fmt: skip


def tvrn(*arguments: object, code: int = 0) -> Any:
    """Run a verb in this process; gives its outcome with stdout and stderr apart."""
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert outcome.exit_code == code, f"{outcome.stdout}\n{outcome.stderr}\n{outcome.exception!r}"
    return outcome


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that reads pictures."""
    return save(tmp_path_factory.mktemp("model"), *pixel_model())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures and a table of pairs, with a missing picture, a broken one and an empty caption."""
    folder, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        coarse = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        PIL.Image.fromarray(np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))).save(folder / name)
    (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:60])
    rows = [("a.png", CAPTIONS[0]), ("b.png", CAPTIONS[1]), ("a.png", CAPTIONS[1]), ("gone.png", "a dog")]
    rows += [("c.png", " "), ("broken.png", "snow"), ("c.png", "snow"), ("a.png", CAPTIONS[0])]
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption", "note"), *((*row, f"n{i}") for i, row in enumerate(rows))])
    return folder / "pairs.csv"


class TestHelp:
    @pytest.mark.slow
    def test_help_loads_nothing_heavy(self, run_python: Callable[..., str]) -> None:
        """Who asks for help, or presses tab, waits for a fraction of a second and not for torch."""
        code = """
import sys
from modeling_tvrn.cli import main
for verb in sys.argv[1:]:
    sys.argv = ["tvrn", verb, "--help"] if verb != "-" else ["tvrn", "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
print(sorted(set(sys.modules) & {heavy}))
"""
        output = run_python(code.replace("{heavy}", repr(HEAVY)), "-", *VERBS)
        assert output.splitlines()[-1] == "[]"

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_has_examples(self, verb: str) -> None:
        lines = [line.strip() for line in tvrn(verb, "--help").stdout.splitlines()]
        after = lines[lines.index("Examples:") + 1 :]
        assert after[0].startswith(f"tvrn {verb} ")

    def test_the_issue_s_verbs_are_there(self) -> None:
        issue = {"train", "evaluate", "score", "search", "index", "explain", "doctor", "push", "demo"}
        issue |= {"regions", "teachers", "duplicates"}
        assert issue <= set(VERBS)

    def test_installing_puts_it_on_the_path(self) -> None:
        setup = (Path(__file__).resolve().parents[1] / "setup.py").read_text("utf-8")
        assert '"console_scripts": ["tvrn = modeling_tvrn.cli:main"]' in setup

    def test_version(self) -> None:
        from modeling_tvrn import __version__

        assert tvrn("--version").stdout.strip() == __version__


class TestMistakes:
    def test_one_line_and_exit_code_2(self, tmp_path: Path) -> None:
        outcome = tvrn("card", tmp_path, code=2)
        assert outcome.stdout == "" and outcome.stderr.startswith("tvrn: ") and "no results.json" in outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1

    def test_an_unknown_verb_or_option(self) -> None:
        assert "searhc" in tvrn("searhc", code=2).stderr
        assert "--no-such" in tvrn("doctor", "x", "--no-such", code=2).stderr

    def test_no_such_model(self, tmp_path: Path) -> None:
        assert "no folder" in tvrn("doctor", tmp_path / "none", code=2).stderr

    def test_train_refuses_a_key_that_there_is_not_before_torch_is_there(self, run_python: Callable[..., str]) -> None:
        code = """
import sys
from modeling_tvrn.cli import main
sys.argv = ["tvrn", "train", "epoch=3"]
try:
    main()
except SystemExit as end:
    print(end.code, sorted({"torch", "transformers"} & set(sys.modules)))
"""
        assert "unknown key 'epoch'" in tvrn("train", "epoch=3", code=2).stderr
        assert run_python(code).split() == ["2", "[]"]

    def test_evaluate_checks_before_it_loads(self) -> None:
        assert "flickr8k-1k" in tvrn("evaluate", "x", "--data", "scenes", "--protocol", "mine", code=2).stderr
        assert "--shortlist-size" in tvrn("evaluate", "x", "--data", "scenes", "--exhaustive", code=2).stderr


class TestScore:
    def test_scores_are_the_model_s_own(self, model: Path, pairs: Path, tmp_path: Path) -> None:
        outcome = tvrn("score", model, pairs, "-o", tmp_path / "out" / "scored.csv", "--batch-size", 3)
        assert outcome.stdout == ""
        with (tmp_path / "out" / "scored.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["note"] for row in rows] == [f"n{i}" for i in range(8)], (
            "every row, in its order, with its columns"
        )
        assert [row["score"] == "" for row in rows] == [False] * 3 + [True] * 3 + [False] * 2
        loaded, processor = pixel_model()
        with torch.no_grad():
            for row in rows:
                if row["score"]:
                    image = PIL.Image.open(pairs.parent / row["image"])
                    logits = loaded(**processor(images=image, text=row["caption"])).logits_per_image
                    assert float(row["score"]) == pytest.approx(loaded.scores(logits).item(), abs=2e-6), row
        assert "gone.png" in outcome.stderr and "broken.png" in outcome.stderr and "empty caption" in outcome.stderr
        assert outcome.stderr.splitlines()[-1] == "tvrn: 3 rows without a score"

    @pytest.mark.slow
    def test_a_threshold_parts_the_rows_that_have_scores(self, model: Path, pairs: Path) -> None:
        whole = [json.loads(line) for line in tvrn("score", model, pairs, "--json").stdout.splitlines()]
        assert len(whole) == 8 and whole[3]["score"] is None
        scores = sorted(row["score"] for row in whole if row["score"] is not None)
        middle = scores[2]
        above = csv.DictReader(tvrn("score", model, pairs, "--threshold", middle).stdout.splitlines())
        below = tvrn("score", model, pairs, "--threshold", middle, "--below", "--json").stdout.splitlines()
        assert [row["note"] for row in above] == [row["note"] for row in whole if (row["score"] or 0) >= middle]
        assert {json.loads(line)["note"] for line in below} == {
            row["note"] for row in whole if row["score"] is not None and row["score"] < middle
        }

    @pytest.mark.slow
    def test_a_table_that_was_scored_before_keeps_its_scores(self, model: Path, pairs: Path, tmp_path: Path) -> None:
        once = tvrn("score", model, pairs).stdout
        (tmp_path / "once.csv").write_text(once)
        written = tvrn("score", model, tmp_path / "once.csv", "--images", pairs.parent).stdout
        rows = list(csv.DictReader(written.splitlines()))
        assert list(rows[0]) == ["image", "caption", "note", "score_1", "score_kind_1", "score", "score_kind"]
        assert [row["score_1"] for row in rows] == [row["score"] for row in csv.DictReader(once.splitlines())]
        (tmp_path / "twice.csv").write_text(written)
        again = tvrn("score", model, tmp_path / "twice.csv", "--images", pairs.parent, "--json").stdout.splitlines()
        assert {"score_1", "score_2", "score"} <= set(json.loads(again[0]))

    def test_other_columns_and_folders(self, model: Path, pairs: Path, tmp_path: Path) -> None:
        table = tmp_path / "elsewhere.csv"
        table.write_text("file,sentence\nb.png,the cat sleeps\n")
        names = ["--image-column", "file", "--caption-column", "sentence"]
        found = json.loads(tvrn("score", model, table, "--images", pairs.parent, *names, "--json").stdout)
        assert found["file"] == "b.png" and 0 < found["score"] < 1
        assert "['file', 'sentence']" in tvrn("score", model, table, code=2).stderr

    def test_a_model_of_regions_is_refused(self, pairs: Path, tmp_path: Path) -> None:
        folder = save(tmp_path, *region_model())
        assert "region features" in tvrn("score", folder, pairs, code=2).stderr


class TestShare:
    def test_doctor_s_exit_code_and_json(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: dict[str, Any] = {}

        def examined(name: str, **options: Any) -> DoctorReport:
            asked.update(options, name=name)
            status = "failed" if name == "bad" else "ok"
            return DoctorReport(name, [Check("values", status, "NaN", "look")])  # type: ignore[arg-type]

        monkeypatch.setattr("modeling_tvrn.hub.doctor", examined)
        assert "Everything holds." in tvrn("doctor", "good").stdout
        assert asked["trust_remote_code"] is False, "nobody's code runs unless told to"
        report = json.loads(tvrn("doctor", "bad", "--trust-remote-code", "--json", code=1).stdout)
        assert report["ok"] is False and asked["trust_remote_code"] is True

    def test_push_hands_everything_on(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        asked: dict[str, Any] = {}

        def pushed(*arguments: Any, **options: Any) -> Pushed:
            asked.update(options, arguments=arguments)
            return Pushed("me/x", "https://hub/me/x", "c0ffee", {"config.json": 9}, [], DoctorReport("me/x"), "")

        monkeypatch.setattr("modeling_tvrn.hub.push_to_hub", pushed)
        outcome = tvrn(
            "push", tmp_path, "me/x", "--private", "--vision", "org/tower", "--endpoint", "http://hub", "--json"
        )
        assert json.loads(outcome.stdout)["commit"] == "c0ffee"
        assert asked["arguments"] == (tmp_path, None, "me/x") and asked["private"] is True and asked["force"] is False
        assert asked["names"] == {"vision": "org/tower"} and asked["endpoint"] == "http://hub"

    def test_card(self, tmp_path: Path) -> None:
        (tmp_path / "results.json").write_text(json.dumps(results()))
        target = tmp_path / "cards" / "recipe.md"
        tvrn("card", tmp_path, "-o", target, "--name", "tvrn-recipe", "--text", "org/minilm")
        card = target.read_text("utf-8")
        assert card.startswith("---\nbase_model: org/minilm\n") or "base_model:\n- org/minilm" in card
        assert "# tvrn-recipe" in card and "320.0" in card and "/home/somebody" not in card

    def test_card_of_a_bigru_on_the_words_of_a_text_model(self, tmp_path: Path) -> None:
        found = results()
        found["config"] |= {"text": None, "word_embeddings": "/home/somebody/towers/minilm"}
        found["model_config"] = {"hidden_size": 12, "freeze_word_embeddings": True, "use_text_refinement": False}
        (tmp_path / "results.json").write_text(json.dumps(found))
        tvrn("card", tmp_path, "--word-embeddings", "org/minilm")
        card = (tmp_path / "README.md").read_text("utf-8")
        assert "| Text side | word embeddings of org/minilm, frozen, and BiGRU |" in card
        assert "| Switched off | text refinement |" in card
        assert card.startswith("---\nbase_model: org/minilm\n") or "base_model:\n- org/minilm" in card


class TestSearch:
    @pytest.mark.slow
    def test_a_folder_of_photographs(self, model: Path, pairs: Path, tmp_path: Path, monkeypatch: Any) -> None:
        """The broken file is left out; the second search finds the index of the first."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        first = tvrn("search", model, pairs.parent, CAPTIONS[0], "--picture", tmp_path / "found.png")
        assert "3 encoded" in first.stderr and (tmp_path / "found.png").stat().st_size > 1000
        second = tvrn("search", model, pairs.parent, CAPTIONS[0], "--json", "-n", 2)
        assert "0 encoded" in second.stderr
        hits = json.loads(second.stdout)
        loaded, processor = pixel_model()
        names = ["a.png", "b.png", "c.png"]
        images = [PIL.Image.open(pairs.parent / name) for name in names]
        with torch.no_grad():
            logits = loaded(**processor(images=images, text=[CAPTIONS[0]])).logits_per_image
            texts = loaded.encode_texts(**processor(text=[CAPTIONS[0]]))
            scores = loaded.fits(logits, len(images), texts)[:, 0]
        best = scores.argsort(descending=True)[:2].tolist()
        assert [Path(hit["path"]).name for hit in hits] == [names[row] for row in best]
        assert hits[0]["score"] == pytest.approx(scores.max().item(), abs=5e-3), "features are kept in half precision"
        assert list((tmp_path / "cache").glob("modeling_tvrn/indexes/*")), "nothing is written among the photographs"
        assert {path.name for path in pairs.parent.iterdir()} == {*names, "broken.png", "pairs.csv"}

    @pytest.mark.slow
    def test_an_index_by_a_picture(self, model: Path, pairs: Path, tmp_path: Path) -> None:
        report = json.loads(tvrn("index", model, pairs.parent, tmp_path / "index", "--json").stdout)
        assert report["items"] == 3 and report["encoded"] == 3
        found = tvrn("search", model, tmp_path / "index", "--image", pairs.parent / "b.png", "--json").stdout
        assert Path(json.loads(found)[0]["path"]).name == "b.png"

    def test_mistakes(self, model: Path, tmp_path: Path) -> None:
        assert "either a TEXT or --image" in tvrn("search", model, tmp_path, code=2).stderr
        assert "folder of photographs" in tvrn("search", model, tmp_path / "none", "x", code=2).stderr
        assert "COLUMN=VALUE" in tvrn("search", model, tmp_path, "x", "--where", "year", code=2).stderr


@pytest.mark.slow
def test_explain_writes_what_it_shows(model: Path, pairs: Path, tmp_path: Path) -> None:
    image, files = pairs.parent / "a.png", [tmp_path / "why.png", tmp_path / "why.html"]
    outcome = tvrn("explain", model, image, CAPTIONS[0], "--picture", files[0], "--html", files[1], "--json")
    found = json.loads(outcome.stdout)
    words = sum(word["contribution"] for word in found["words"])
    assert words + found["together"] == pytest.approx(found["logit"], abs=1e-6)
    assert found["written"] == [str(file) for file in files] and all(file.stat().st_size > 1000 for file in files)
    assert "ends in .png" in tvrn("explain", model, image, "x", "--picture", "why.txt", code=2).stderr


def test_demo_announces_its_address(model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page itself has its own tests, with a browser."""
    asked: dict[str, Any] = {}

    class Page:
        local_url = "http://127.0.0.1:7861/"

        def block_thread(self) -> None:
            raise KeyboardInterrupt  # what ends it

    def launched(*arguments: Any, **options: Any) -> Page:
        asked.update(options, arguments=arguments)
        return Page()

    monkeypatch.setattr("modeling_tvrn.demo.launch", launched)
    outcome = tvrn("demo", model, pairs.parent, "--port", 7861, "--index", tmp_path / "index", code=130)
    assert "http://127.0.0.1:7861/" in outcome.stderr
    assert asked["arguments"][2:] == (pairs.parent, tmp_path / "index")
    assert asked["port"] == 7861 and asked["host"] == "127.0.0.1" and asked["progress"] is False


@pytest.mark.slow
def test_train_then_evaluate(tmp_path: Path) -> None:
    """`evaluate` reads what `train` wrote; in bfloat16 too it knows its own region cache."""
    config = {
        "data": "scenes", "data_options": {"count": 12, "image_size": 32}, "epochs": 1, "batch_size": 25,
        "model": {"vision_config": TINY_VIT, "hidden_size": 18, "projection_size": 11, "similarity_size": 9},
        "output_dir": str(tmp_path / "run"), "cpu": True,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(config))  # JSON is YAML
    shown = json.loads(tvrn("train", "-c", tmp_path / "recipe.yaml", "seed=3", "--json").stdout)
    assert shown["seed"] == 3 and "history" not in shown
    assert (tmp_path / "run" / "README.md").read_text("utf-8").startswith("---\n")
    output = tmp_path / "report.json"
    arguments = ["evaluate", tmp_path / "run", "--data", "scenes", "--split", "validation", "--device", "cpu"]
    outcome = tvrn(*arguments, "--shortlist-size", 5, "--output", output)
    assert "chance" in outcome.stdout
    report = json.loads(output.read_text())
    assert report["protocol"] == "validation" and report["data"] == "scenes"
    loaded, processor = load(str(tmp_path / "run"), "cpu")
    RegionCache.build(loaded, processor, load_pairs("scenes", "validation"), tmp_path / "regions", progress=False)
    tvrn(*arguments, "--regions", tmp_path / "regions", "--dtype", "bfloat16", "--output", output)
    assert json.loads(output.read_text())["models"][0]["dtype"] == "bfloat16"


# -- what people feed it ----------------------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 65584\n"


@pytest.mark.parametrize("device", ["cuda:99", "foo", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_a_sentence(model: Path, pairs: Path, device: str) -> None:
    if device.startswith("cuda") and torch.cuda.device_count() > 99:
        pytest.skip("there are that many")
    said = tvrn("score", model, pairs, "--device", device, code=2).stderr
    assert said.startswith(f"tvrn: device {device!r} ") and len(said.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "pointer", "empty"])
@pytest.mark.parametrize("kind", ["tvrn", "dual encoder", "backbone", "teacher"])
def test_weights_that_are_not_whole_are_a_sentence(
    model: Path, pairs: Path, tmp_path: Path, kind: str, how: str
) -> None:
    folder = tmp_path / "broken"
    if kind == "tvrn":
        shutil.copytree(model, folder)
    elif kind == "dual encoder":
        save_dual_encoder(folder)
    else:
        ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])).save_pretrained(folder)
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes({"cut": whole[: len(whole) // 2], "pointer": POINTER, "empty": b""}[how])
    options = ["--split", "validation", "-o", tmp_path / "cache"]
    said = {
        "backbone": lambda: tvrn("regions", "scenes", "--features", folder, *options, code=2),
        "teacher": lambda: tvrn("teachers", "scenes", folder, "--modality", "image", *options, code=2),
    }.get(kind, lambda: tvrn("score", folder, pairs, code=2))().stderr
    assert str(folder) in said and "Error while deserializing" in said and len(said.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "MODEL", "--data", "scenes", "--output"],
        ["score", "MODEL", "PAIRS", "--output"],
        ["search", "MODEL", "PHOTOS", "a dog", "--picture"],
        ["explain", "MODEL", "PHOTOS/a.png", "a dog", "--picture"],
        ["explain", "MODEL", "PHOTOS/a.png", "a dog", "--html"],
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    model: Path, pairs: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_tvrn.front_door.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    places = {"MODEL": str(model), "PAIRS": str(pairs), "PHOTOS": str(pairs.parent)}
    words = [re.sub("MODEL|PAIRS|PHOTOS", lambda found: places[found[0]], word) for word in words]
    suffix = ".html" if words[-1] == "--html" else ".png"
    assert "there is a file of that name" in tvrn(*words, f"/dev/null/x{suffix}", code=2).stderr
    (pairs.parent / f"folder{suffix}").mkdir(exist_ok=True)
    assert "is a folder; expected the name of a file" in tvrn(*words, pairs.parent / f"folder{suffix}", code=2).stderr


@pytest.fixture(scope="module")
def index(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(["a.png", "2021/winter/b.png", "winter/c.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (40 + number, 40), (50 * number, 20, 30)).save(folder / name)
    built = tmp_path_factory.mktemp("index") / "index"
    tvrn("index", model, folder, built)
    return built


class TestWhere:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("given", "found"),
        [
            (["folder=winter"], {"2021/winter/b.png", "winter/c.png"}),
            (["folder=2021"], {"2021/winter/b.png"}),
            (["folder=2021/winter"], {"2021/winter/b.png"}),
            (["folder="], {"a.png"}),
            (["folder=", "folder=winter"], {"a.png", "2021/winter/b.png", "winter/c.png"}),
            (["size=0"], set()),
            (["id=a.png"], {"a.png"}),
            (["folder=[1"], set()),
            (["folder={a: b}"], set()),
            (["folder=&a [*a]"], set()),
            (["folder=no"], set()),
            (["folder=" + "[" * 9000], set()),
        ],
    )
    def test_values_are_text_or_numbers(self, model: Path, index: Path, given: list[str], found: set[str]) -> None:
        where = [part for each in given for part in ("--where", each)]
        hits = json.loads(tvrn("search", model, index, "a dog", "--json", *where).stdout)
        assert {hit["id"] for hit in hits} == found

    def test_a_number_is_found_as_one(self, model: Path, index: Path) -> None:
        sizes = {hit["id"]: hit["path"] for hit in json.loads(tvrn("search", model, index, "a dog", "--json").stdout)}
        size = Path(sizes["a.png"]).stat().st_size
        hits = json.loads(tvrn("search", model, index, "a dog", "--json", "--where", f"size={size}").stdout)
        assert "a.png" in {hit["id"] for hit in hits}


def test_a_picture_of_hits_without_files_is_a_sentence_after_the_hits(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tvrn("index", model, pairs, tmp_path / "index")
    monkeypatch.chdir(tmp_path)  # the table's names are none here
    outcome = tvrn("search", model, tmp_path / "index", "a dog", "--picture", tmp_path / "found.png", code=2)
    assert "a.png" in outcome.stdout and "--picture needs hits with files" in outcome.stderr


def test_an_index_without_its_pointer_is_not_taken_for_photographs(model: Path, pairs: Path, tmp_path: Path) -> None:
    tvrn("index", model, pairs.parent, tmp_path / "index")
    (tmp_path / "index" / "current.json").unlink()
    said = tvrn("search", model, tmp_path / "index", "a dog", code=2).stderr
    assert "holds an index without its current.json" in said and "Run `tvrn index MODEL SOURCE`" in said
    assert json.loads(tvrn("index", model, pairs.parent, tmp_path / "index", "--json").stdout)["reused"] == 3


def test_unknown_words_are_named(model: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ("--index", tmp_path / "index", "-n", 1)
    tvrn("search", model, pairs.parent, "A dog, xyzzy blorb xyzzy", *options)
    assert "the model does not know xyzzy, blorb: each is <unk>" in caplog.text
    caplog.clear()
    tvrn("search", model, pairs.parent, "A dog", *options)
    assert "does not know" not in caplog.text


@pytest.mark.slow
def test_unknown_words_are_named_with_scores_and_explanations(model: Path, pairs: Path, tmp_path: Path) -> None:
    table = tmp_path / "unknown.csv"
    table.write_text("image,caption\na.png,a dog blorb\nb.png,a dog xyzzy blorb\n")
    scored = tvrn("score", model, table, "--images", pairs.parent)
    assert "the model does not know blorb, xyzzy: each is <unk>" in scored.stderr
    assert "does not know" not in tvrn("score", model, pairs).stderr
    explained = tvrn("explain", model, pairs.parent / "a.png", "a dog xyzzy")
    assert "the model does not know xyzzy: each is <unk>" in explained.stderr


class TestTerminals:
    def test_a_table_and_a_recipe_come_from_stdin(
        self, model: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(pairs.parent)
        given = CliRunner().invoke(app, ["score", str(model), "-", "-o", "-"], input=pairs.read_bytes())
        assert given.exit_code == 0 and given.stdout == tvrn("score", model, pairs).stdout
        assert not Path("-").exists()
        wrong = CliRunner().invoke(app, ["score", str(model), "-"], input="a,b\n1,2\n")
        assert wrong.exit_code == 2 and wrong.stderr.startswith("tvrn: standard input has the columns ['a', 'b']")
        mistaken = CliRunner().invoke(app, ["train", "-c", "-"], input="seed: -1")
        assert mistaken.exit_code == 2 and "seed = -1" in mistaken.stderr

    @pytest.mark.slow
    def test_a_reader_that_leaves_ends_it_quietly(self) -> None:
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "modeling_tvrn.cli", "train", "--keys"]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=ENVIRONMENT)
        os.close(write)
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.slow
    def test_a_terminal_without_some_letters_ends_nothing(self) -> None:
        code = """
import sys
sys.argv = ["tvrn", "say"]
from modeling_tvrn.cli.app import app, main
from modeling_tvrn.cli.common import say
@app.command("say")
def speak() -> None:
    print("é → 日")
    say("é → 日", "é → 日", as_json=True)
main()
"""
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
        assert done.stderr == b""
        text, as_json = done.stdout.decode("latin-1").splitlines()
        assert text == r"é \u2192 \u65e5" and json.loads(as_json) == "é → 日"

    def test_bars_go_to_a_terminal_alone(self, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        """Also where a script asks for them, as the library's functions do by default."""
        loaded, processor = region_model()
        records = load_pairs("scenes", "validation", count=4)
        captions = [caption for captions in records.captions for caption in captions]
        from modeling_tvrn.evaluation.encoding import encode_captions
        from modeling_tvrn.index import ImageTextIndex
        from modeling_tvrn.scoring.blocks import pair_bar

        encode_captions(loaded, processor, captions, 4, True)
        ImageTextIndex.build(loaded, processor, captions, tmp_path / "index")
        for bar in (pair_bar(3, True),):
            assert bar.disable
        assert capfd.readouterr().err == ""
