"""Code that a folder brings: never asked about and never run without the user's flag, whatever part of it asks."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hub_makers import CAPTIONS, pixel_model, save
from hub_server import HubServer, online
from training_makers import tiny_config, write_scan
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPProcessor, ViTConfig, ViTModel
from transformers import CLIPImageProcessorPil as CLIPPictures
from transformers import ViTImageProcessorPil as ViTPictures
from typer.testing import CliRunner

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.cli import app
from modeling_tvrn.evaluation import evaluate
from modeling_tvrn.hub import doctor, push_to_hub
from modeling_tvrn.processing_tvrn import build_word_tokenizer
from modeling_tvrn.teachers import Teacher
from modeling_tvrn.towers_tvrn import load_dual_encoder
from modeling_tvrn.training import train

ROOT = Path(__file__).resolve().parents[1]
CODE = """from pathlib import Path
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTImageProcessorPil, ViTModel
Path({marker!r}).touch()
class Tokenizer(PreTrainedTokenizerFast): pass
class Pictures(ViTImageProcessorPil): pass
class Config(BertConfig):
    model_type = "brought"
class Model(BertModel):
    config_class = Config
class Vision(ViTModel): pass
"""
TOKENIZER = {"AutoTokenizer": [None, "brought.Tokenizer"]}
PICTURES = {"AutoImageProcessor": "brought.Pictures"}
MODEL = {"AutoConfig": "brought.Config", "AutoModel": "brought.Model", "AutoModelForTextEncoding": "brought.Model"}
SIZES = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 19}


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is asked says yes; that somebody is, fails the test."""

    def asked(question: str = "") -> str:
        pytest.fail(f"asked: {question}")

    monkeypatch.setattr("builtins.input", asked)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model"), *pixel_model())


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that the code writes when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def planted(model: Path, tmp_path: Path, marker: Path) -> Callable[..., Path]:
    """A copy of the model's folder with that code in it, and entries of a file replaced."""

    def plant(file: str, **entries: Any) -> Path:
        return bring(shutil.copytree(model, tmp_path / "planted"), marker, file, **entries)

    return plant


def bring(folder: Path, marker: Path, file: str, **entries: Any) -> Path:
    """Put the code into a folder and entries into a file of it; a dict's entries go into the dict that is there."""
    (folder / "brought.py").write_text(CODE.format(marker=str(marker)))
    path = folder / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    for name, value in entries.items():
        settings[name] = settings.get(name, {}) | value if isinstance(value, dict) else value
    path.write_text(json.dumps(settings))
    return folder


def load(folder: Path, **options: Any) -> tuple[TVRNModel, TVRNProcessor]:
    return TVRNModel.from_pretrained(folder, **options), TVRNProcessor.from_pretrained(folder, **options)


# What asks without need: a class of transformers or of this package is there, and is taken.
NEEDLESS = {
    "tokenizer": ("tokenizer_config.json", {"auto_map": TOKENIZER}),
    "tokenizer-as-once-written": ("tokenizer_config.json", {"auto_map": ["brought.Tokenizer", None]}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "brought.Tokenizer"}}),
    "image-processor": ("processor_config.json", {"image_processor": {"auto_map": PICTURES}}),
    "image-processor-in-its-own-file": ("preprocessor_config.json", {"auto_map": PICTURES}),
    "audio-tokenizer": (
        "processor_config.json",
        {"audio_tokenizer": {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "FOLDER/audio"}},
    ),
    "model": ("config.json", {"auto_map": MODEL}),
    "vision-tower": ("config.json", {"vision_config": {"auto_map": {"AutoModel": "brought.Vision"}}}),
    "text-tower": ("config.json", {"text_config": {"auto_map": MODEL}}),
    "adapter": ("adapter_config_of_others.json", {"auto_map": MODEL, "base_model_name_or_path": "FOLDER"}),
}
# What only that code can load.
NEEDED = {
    "tokenizer": ("tokenizer_config.json", {"auto_map": TOKENIZER, "tokenizer_class": "Unheard"}, "tokenizer_config"),
    "image-processor": (
        "processor_config.json",
        {"image_processor": {"auto_map": PICTURES, "image_processor_type": "Unheard"}},
        "processor_config",
    ),
    "text-tower": ("config.json", {"text_config": {"auto_map": MODEL, "model_type": "brought"}}, "text_config"),
}


def entries(value: Any, folder: Path) -> Any:
    """With the folder's name where FOLDER stands."""
    return json.loads(json.dumps(value).replace("FOLDER", str(folder)))


class TestAModelsFolder:
    @pytest.mark.slow
    @pytest.mark.parametrize("case", NEEDLESS)
    def test_what_is_not_needed_is_not_run(self, case: str, planted: Callable[..., Path], marker: Path) -> None:
        file, asking = NEEDLESS[case]
        folder = planted(file, **entries(asking, marker.parent / "planted"))
        audio = folder / "audio"
        audio.mkdir()
        bring(audio, marker, "config.json", model_type="brought", auto_map=MODEL)
        loaded, processor = load(folder)
        load(folder, trust_remote_code=None)  # as the Auto classes pass it on
        logits = loaded(**processor(images=PIL.Image.new("RGB", (40, 40)), text=CAPTIONS[:1])).logits_per_image
        assert logits.isfinite().all() and not marker.exists()

    @pytest.mark.parametrize("case", NEEDED)
    def test_what_is_needed_is_refused(self, case: str, planted: Callable[..., Path], marker: Path) -> None:
        file, asking, named = NEEDED[case]
        with pytest.raises(ValueError, match=rf"{named}.*(auto_map|its own)") as caught:
            load(planted(file, **asking))
        assert case == "text-tower" or "trust_remote_code=True (--trust-remote-code" in str(caught.value)
        assert not marker.exists()

    @pytest.mark.parametrize("case", ["tokenizer", "image-processor"])
    def test_with_the_flag_it_runs(self, case: str, planted: Callable[..., Path], marker: Path) -> None:
        file, asking, _ = NEEDED[case]
        _, processor = load(planted(file, **asking), trust_remote_code=True)
        found = type(processor.tokenizer), type(processor.image_processor)
        assert marker.exists() and any(each.__module__.startswith("transformers_modules") for each in found)

    def test_a_copy_asks_for_nothing(self, planted: Callable[..., Path], marker: Path, tmp_path: Path) -> None:
        """Code that was not run is not handed on to whoever loads the copy with the flag."""
        folder = planted("tokenizer_config.json", auto_map={"AutoTokenizer": [None, f"{marker.parent}--x.Tokenizer"]})
        bring(folder, marker, "processor_config.json", image_processor={"auto_map": PICTURES})
        bring(folder, marker, "config.json", vision_config={"auto_map": {"AutoModel": "brought.Vision"}})
        copy = save(tmp_path / "copy", *load(folder))
        load(copy, trust_remote_code=True)
        for name in ("tokenizer_config.json", "processor_config.json", "config.json"):
            assert "brought" not in (copy / name).read_text() and "--x" not in (copy / name).read_text()
        assert not marker.exists()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photographs, a table of pairs, and the same as a data set."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for number in range(2):
        PIL.Image.fromarray(np.full((40, 50, 3), 90 * number, dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "image_id": number, "captions": CAPTIONS[:2], "split": "test"})
    (folder / "captions.json").write_text(json.dumps(rows))
    (tmp_path / "pairs.csv").write_text(f'image,caption\nphotos/0.png,"{CAPTIONS[0]}"\n')
    return folder


COMMANDS = {
    "score": ["score", "MODEL", "PHOTOS/../pairs.csv"],
    "search": ["search", "MODEL", "PHOTOS", "a dog", "--index", "PHOTOS/../index"],
    "evaluate": ["evaluate", "MODEL", "--data", "PHOTOS", "--split", "test"],
    "index": ["index", "MODEL", "PHOTOS", "PHOTOS/../index"],
    "explain": ["explain", "MODEL", "PHOTOS/0.png", "a dog"],
}


class TestCommands:
    def command(self, verb: str, folder: Path, photos: Path, *options: str) -> list[str]:
        words = [word.replace("MODEL", str(folder)).replace("PHOTOS", str(photos)) for word in COMMANDS[verb]]
        return [*words, *options]

    @pytest.mark.slow
    @pytest.mark.parametrize("verb", COMMANDS)
    def test_refused_in_one_line_and_run_with_the_flag(
        self, verb: str, planted: Callable[..., Path], photos: Path, marker: Path
    ) -> None:
        file, asking, named = NEEDED["tokenizer"]
        folder = planted(file, **asking)
        refused = CliRunner().invoke(app, self.command(verb, folder, photos), input="y\n")
        assert refused.exit_code == 2 and named in refused.stderr and "--trust-remote-code" in refused.stderr
        assert "[y/N]" not in refused.output and not marker.exists()
        trusted = CliRunner().invoke(app, self.command(verb, folder, photos, "--trust-remote-code"))
        assert trusted.exit_code == 0, trusted.output
        assert marker.exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("case", ["vision-tower", "tokenizer"])
    def test_on_a_terminal_that_says_yes(
        self, case: str, planted: Callable[..., Path], photos: Path, marker: Path
    ) -> None:
        file, asking, *_ = NEEDED.get(case) or NEEDLESS[case]
        folder = planted(file, **entries(asking, marker.parent / "planted"))
        finished = subprocess.run(
            [sys.executable, "-m", "modeling_tvrn.cli", *self.command("score", folder, photos)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, input="y\ny\ny\n", capture_output=True, text=True,
        )  # fmt: skip
        assert finished.returncode == (2 if case in NEEDED else 0), finished.stderr
        assert "[y/N]" not in finished.stdout + finished.stderr and "Traceback" not in finished.stderr
        assert not marker.exists()

    def test_evaluate(self, planted: Callable[..., Path], photos: Path, marker: Path) -> None:
        from modeling_tvrn.data import load_pairs

        file, asking = NEEDLESS["tokenizer"]
        report = evaluate(*load(planted(file, **asking)), load_pairs(str(photos), "test"), progress=False)
        assert report.metrics.rsum >= 0 and not marker.exists()


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A text model with its tokenizer."""
    tokenizer = build_word_tokenizer(["red green blue circle square star left right n0 n1 n2 n3 n4"])
    folder = tmp_path / "bert"
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A vision model with its image processor."""
    folder = tmp_path / "vit"
    ViTModel(ViTConfig(image_size=16, patch_size=8, **SIZES)).save_pretrained(folder)
    ViTPictures(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


ASKED = r"config\.json.*auto_map.*asks to run.*trust_remote_code=True"


class TestBackbones:
    """Towers, word embeddings and teachers: folders of others that a new model is made of."""

    @pytest.mark.parametrize("role", ["text", "word_embeddings"])
    def test_a_text_tower(self, role: str, bert: Path, marker: Path) -> None:
        settings = {"region_feature_size": 5, "hidden_size": 10}
        bring(bert, marker, "config.json", auto_map=MODEL)
        TVRNModel.from_backbones(**{role: bert}, **settings)
        bring(bert, marker, "config.json", model_type="brought")
        with pytest.raises(ValueError, match=ASKED):
            TVRNModel.from_backbones(**{role: bert}, **settings)
        assert not marker.exists()
        TVRNModel.from_backbones(**{role: bert}, **settings, trust_remote_code=True)
        assert marker.exists()

    def test_a_vision_tower_and_its_pictures(self, vit: Path, marker: Path) -> None:
        bring(vit, marker, "config.json", auto_map={"AutoModel": "brought.Vision"})
        TVRNModel.from_backbones(vision=vit, hidden_size=10)
        bring(vit, marker, "preprocessor_config.json", auto_map=PICTURES)
        TVRNProcessor.from_backbones(vision=vit)
        bring(vit, marker, "preprocessor_config.json", image_processor_type="Unheard")
        bring(vit, marker, "config.json", model_type="brought")
        with pytest.raises(ValueError, match=r"preprocessor_config\.json.*asks to run"):
            TVRNProcessor.from_backbones(vision=vit)
        assert not marker.exists()
        assert TVRNProcessor.from_backbones(vision=vit, trust_remote_code=True).image_processor is not None
        assert marker.exists()

    def test_a_half_that_is_in_no_auto_mapping(self, marker: Path) -> None:
        """Transformers asks about such a config even where it is built from memory."""
        text = {"model_type": "siglip_text_model", "auto_map": MODEL, "vocab_size": 31, **SIZES}
        TVRNModel(TVRNConfig(text_config=text, region_feature_size=5, hidden_size=10))
        assert not marker.exists()

    def test_a_config_inside_a_towers_config(self, bert: Path, tmp_path: Path, marker: Path) -> None:
        """The models of transformers build their parts without a word about code."""
        folder = tmp_path / "two"
        folder.mkdir()
        part = {"model_type": "siglip_text_model", "auto_map": MODEL, "vocab_size": 31, **SIZES}
        vision = {"model_type": "vit", "image_size": 16, "patch_size": 8, **SIZES}
        settings = {"model_type": "vision-text-dual-encoder", "text_config": part, "vision_config": vision}
        bring(folder, marker, "config.json", **settings)
        for load_it in (lambda: Teacher.from_pretrained(folder, "text"), lambda: load_dual_encoder(str(folder))):
            with pytest.raises(ValueError, match="[Nn]o (teacher|dual encoder) at"):
                load_it()
        assert not marker.exists()

    def test_teachers(self, bert: Path, vit: Path, marker: Path) -> None:
        bring(bert, marker, "tokenizer_config.json", auto_map=TOKENIZER)
        bring(vit, marker, "preprocessor_config.json", auto_map=PICTURES)
        for folder, modality in ((bert, "text"), (vit, "image")):
            bring(folder, marker, "config.json", auto_map=MODEL)
            Teacher.from_pretrained(folder, modality, pooling="mean")
        bring(vit, marker, "preprocessor_config.json", image_processor_type="Unheard")
        with pytest.raises(ValueError, match=r"preprocessor_config\.json.*asks to run"):
            Teacher.from_pretrained(vit, "image", pooling="mean")
        bring(bert, marker, "config.json", model_type="brought")
        with pytest.raises(ValueError, match=ASKED):
            Teacher.from_pretrained(bert, "text", pooling="mean")
        assert not marker.exists()
        Teacher.from_pretrained(bert, "text", pooling="mean", trust_remote_code=True)
        assert marker.exists()

    def test_a_dual_encoder(self, bert: Path, tmp_path: Path, marker: Path) -> None:
        folder = tmp_path / "clip"
        text = {"vocab_size": 31, "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0, **SIZES}
        CLIPModel(
            CLIPConfig(text_config=text, vision_config={"image_size": 16, "patch_size": 8, **SIZES})
        ).save_pretrained(folder)
        tokenizer = build_word_tokenizer(CAPTIONS)
        CLIPProcessor(CLIPPictures(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
        bring(folder, marker, "config.json", auto_map=MODEL)
        bring(folder, marker, "tokenizer_config.json", auto_map=TOKENIZER)
        bring(folder, marker, "processor_config.json", auto_map={"AutoProcessor": "brought.Tokenizer"})
        load_dual_encoder(folder)
        TVRNProcessor.from_dual_encoder(folder)
        bring(folder, marker, "config.json", model_type="brought")
        with pytest.raises(ValueError, match=ASKED):
            load_dual_encoder(folder)
        assert not marker.exists()


class TestTraining:
    @pytest.mark.slow
    def test_from_such_a_backbone(self, bert: Path, tmp_path: Path, marker: Path) -> None:
        """The known class trains; the other is refused, with the flag as well: it could not be read back."""
        data = write_scan(tmp_path)
        keys = {"text": str(bert), "epochs": 1}
        bring(bert, marker, "config.json", auto_map=MODEL)
        bring(bert, marker, "tokenizer_config.json", auto_map=TOKENIZER)
        assert train(tiny_config(data, tmp_path / "known", **keys))["metrics"]
        bring(bert, marker, "config.json", model_type="brought")
        with pytest.raises(ValueError, match=ASKED):
            train(tiny_config(data, tmp_path / "refused", **keys))
        assert not marker.exists()
        with pytest.raises(ValueError, match="text is a Model of its repository's own code.*take another tower"):
            train(tiny_config(data, tmp_path / "trusted", **keys, trust_remote_code=True))
        assert marker.exists()

    @pytest.mark.slow
    def test_word_embeddings_with_the_key(self, bert: Path, tmp_path: Path, marker: Path) -> None:
        """They are a table, which any code may have brought."""
        bring(bert, marker, "config.json", auto_map=MODEL, model_type="brought")
        keys = {"word_embeddings": str(bert), "epochs": 1, "trust_remote_code": True}
        keys["model"] = {"word_embedding_size": SIZES["hidden_size"]}
        assert train(tiny_config(write_scan(tmp_path), tmp_path / "run", **keys))["metrics"] and marker.exists()


class TestSharing:
    @pytest.mark.slow
    def test_the_doctor_asks_nobody(self, planted: Callable[..., Path], marker: Path) -> None:
        folder = planted("tokenizer_config.json", auto_map=TOKENIZER)
        bring(folder, marker, "processor_config.json", image_processor={"auto_map": PICTURES})
        doctor(folder)
        assert not marker.exists()

    @pytest.mark.slow
    def test_a_push_runs_nothing_of_the_folder(
        self, planted: Callable[..., Path], marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The doctor of a push loads the staged copy as a stranger would, with the flag: it must ask for nothing."""
        folder = planted("config.json", vision_config={"auto_map": {"AutoModel": "brought.Vision"}})
        elsewhere = {"AutoTokenizer": [None, f"{folder}--brought.Tokenizer"]}
        bring(folder, marker, "tokenizer_config.json", auto_map=elsewhere)
        bring(folder, marker, "processor_config.json", image_processor={"auto_map": PICTURES})
        online(monkeypatch)
        with HubServer() as hub:
            push_to_hub(folder, None, "org/tvrn-test", token=hub.token, endpoint=hub.url)
        assert not marker.exists()
