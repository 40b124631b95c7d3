"""Going on from a model that has learned before: a finished TVRN, or a dual encoder; and what that forgets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dual_encoder_makers import WORDS, save_dual_encoder
from PIL import Image
from training_makers import TINY_BERT, tiny_config, write_scan
from transformers import AutoModel

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.evaluation import LabelledImages, zero_shot_accuracy
from modeling_tvrn.training import TrainingConfig, UnimodalHeads, train
from modeling_tvrn.training.loop import Training
from modeling_tvrn.training.optim import parameter_groups


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TVRN trained for a moment."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny_config(data, folder, epochs=1))
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other data, with words that the finished model has never seen."""
    folder = write_scan(tmp_path_factory.mktemp("other"))
    for path in folder.glob("*_caps.txt"):
        path.write_text(path.read_text().replace("star", "zebra"))
    return folder


def onward(start: Path | str, data: Path, output: Path, **keys: Any) -> TrainingConfig:
    base = {
        "start_from": str(start), "data": str(data), "data_options": {"captions_per_image": 2}, "epochs": 1,
        "output_dir": str(output), "cpu": True, "batch_size": 8, "learning_rate": 3e-3,
    }  # fmt: skip
    return TrainingConfig.from_mapping({**base, **keys})


class TestStartFrom:
    @pytest.mark.slow
    def test_a_run_begins_where_the_model_ended_with_its_own_words(
        self, finished: Path, other: Path, tmp_path: Path
    ) -> None:
        run = Training(onward(finished, other, tmp_path / "run", model={"dropout": 0.1, "label_smoothing": 0.2}))
        before = TVRNModel.from_pretrained(finished).state_dict()
        assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
        assert (run.model.config.dropout, run.model.config.label_smoothing) == (0.1, 0.2)
        ids = [TVRNProcessor.from_pretrained(finished)(text=["red star"])["input_ids"].tolist()]
        assert [run.processor(text=["red star"])["input_ids"].tolist()] == ids
        result = train(onward(finished, other, tmp_path / "run"))
        assert result["config"]["start_from"] == str(finished)
        card = (tmp_path / "run" / "README.md").read_text("utf-8")
        assert f"| Trained on from | {finished.name} |" in card and str(finished) not in card
        after = TVRNModel.from_pretrained(tmp_path / "run").state_dict()
        assert any(not torch.equal(value, before[name]) for name, value in after.items())

    @pytest.mark.slow
    def test_a_recipe_that_says_what_the_model_is_contradicts_nothing(
        self, finished: Path, other: Path, tmp_path: Path
    ) -> None:
        Training(onward(finished, other, tmp_path, model={"hidden_size": 10, "similarity_size": 6}))

    @pytest.mark.slow
    def test_heads_for_cusa_are_added(self, finished: Path, other: Path, tmp_path: Path) -> None:
        model = Training(onward(finished, other, tmp_path, model={"use_unimodal_heads": True})).model
        assert model.unimodal_text_head.linear.weight.std() > 0
        assert torch.equal(model.logit_scale, TVRNModel.from_pretrained(finished).logit_scale)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"hidden_size": 64},
                r"model.hidden_size = 64, but start_from = .* was trained with 10: its parts, sizes",
            ),
            ({"vocab_size": 99}, "model.vocab_size = 99, but"),
            ({"similarity_head": "sgr"}, "model.similarity_head = 'sgr', but .* trained with 'saf'"),
            ({"use_late_interaction": False}, "model.use_late_interaction = False, but .* trained with True"),
            ({"text_config": TINY_BERT}, "model.text_config = .* trained with None"),
        ],
    )
    def test_what_is_settled_is_refused(
        self, finished: Path, other: Path, tmp_path: Path, fields: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            Training(onward(finished, other, tmp_path, model=fields))

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"vision": "google/vit"}, "vision = 'google/vit' beside start_from = 'x', which brings its towers"),
            ({"dual_encoder": "y"}, "beside"),
            ({"max_text_length": 12}, "max_text_length = 12 beside start_from = 'x'.*set max_text_length=64"),
        ],
    )
    def test_keys_of_towers_are_refused(self, keys: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TrainingConfig.from_mapping({"start_from": "x", **keys})

    @pytest.mark.slow
    def test_phases_are_checked_against_the_model(self, finished: Path, other: Path, tmp_path: Path) -> None:
        phases = [{"train": "embeddings", "epochs": 1}]
        silent = {"contrastive_loss_weight": 0.0}
        with pytest.raises(ValueError, match="model.contrastive_loss_weight = 0.0: nothing would be learned"):
            Training(onward(finished, other, tmp_path, epochs=None, phases=phases, model=silent))
        taught = [{"train": "distilled_embeddings", "epochs": 1}]  # by what the finished model has learned
        train(onward(finished, other, tmp_path, epochs=None, phases=taught, model={"distillation_loss_weight": 1.0}))

    @pytest.mark.slow
    def test_what_is_no_finished_model_is_refused(self, finished: Path, other: Path, tmp_path: Path) -> None:
        clip = save_dual_encoder(tmp_path / "clip")
        with pytest.raises(
            ValueError, match="holds a CLIPModel; expected a finished TVRN; for a dual encoder write dual_encoder="
        ):
            Training(onward(clip, other, tmp_path / "run"))
        (tmp_path / "sub").mkdir()
        with pytest.raises(ValueError, match="there is no folder"):
            Training(onward(tmp_path / "sub" / "nothing", other, tmp_path / "run"))


# -- a dual encoder -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with captions, in two tables."""
    root, random = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 4)):
        rows = ["image,caption"]
        for number in range(count):
            name = f"{split}{number}.png"
            Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / name)
            rows.append(f"{name},{' '.join(random.choice(WORDS, 4))}")
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dual_encoder(tmp_path_factory.mktemp("hub") / "clip")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two labels; one file is none."""
    root, random = tmp_path_factory.mktemp("labels"), np.random.default_rng(1)
    for label in ("a_dog", "snow"):
        (root / label).mkdir()
        for number in range(3):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    (root / "snow" / "3.png").write_bytes(b"nothing of the kind")
    return root


def tuned(clip: Path, pairs: Path, output: Path, **keys: Any) -> TrainingConfig:
    learns = {"freeze_vision": False, "freeze_text": False, "freeze_first_stage": False}
    alone = {"use_late_interaction": False, "use_reasoning": False}
    base = {
        "dual_encoder": str(clip), "data": str(pairs / "train.csv"), "epochs": 1, "output_dir": str(output),
        "cpu": True, "batch_size": 6, "learning_rate": 3e-3, "tower_learning_rate": 1e-2,
    }  # fmt: skip
    return TrainingConfig.from_mapping({**base, **keys, "model": {**learns, **alone, **keys.pop("model", {})}})


def test_all_of_a_dual_encoder_learns_at_the_towers_rate(clip: Path, pairs: Path, tmp_path: Path) -> None:
    run = Training(tuned(clip, pairs, tmp_path))
    groups = parameter_groups(run.model, run.config)
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    for name, weight in run.model.named_parameters():
        assert rates[id(weight)] == (1e-2 if name.startswith("dual_encoder.") else 3e-3), name


@pytest.mark.slow
def test_the_mean_of_start_and_end_is_kept_and_taken_once(clip: Path, pairs: Path, tmp_path: Path) -> None:
    result = train(tuned(clip, pairs, tmp_path, weight_interpolation=0.25))
    start = AutoModel.from_pretrained(clip).state_dict()
    end = TVRNModel.from_pretrained(tmp_path / "trained").state_dict()
    kept = TVRNModel.from_pretrained(tmp_path).state_dict()
    plain = AutoModel.from_pretrained(tmp_path / "dual_encoder").state_dict()
    moved = 0
    for name, value in start.items():
        ours = f"dual_encoder.{name}" if name != "logit_scale" else name
        mean = 0.75 * value + 0.25 * end[ours].reshape(value.shape)
        torch.testing.assert_close(kept[ours].reshape(value.shape), mean, rtol=1e-5, atol=1e-6)
        assert torch.equal(plain[name], kept[ours].reshape(value.shape))
        moved += not torch.equal(value, end[ours].reshape(value.shape))
    assert moved > 10
    assert result["weight_interpolation"]["share"] == 0.25
    assert result["weight_interpolation"]["trained_metrics"].keys() == result["metrics"].keys()
    train(tuned(clip, pairs, tmp_path, weight_interpolation=0.25, resume="auto"))
    again = TVRNModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())


def test_a_mean_with_what_stays_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight_interpolation = 0.5, but nothing that was pretrained learns"):
        Training(tiny_config(data, tmp_path, weight_interpolation=0.5))
    with pytest.raises(ValueError, match="weight_interpolation = 1.0"):
        tiny_config(data, tmp_path, weight_interpolation=1.0)


@pytest.mark.slow
def test_zero_shot_accuracy_before_and_after(
    clip: Path, pairs: Path, labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(tuned(clip, pairs, tmp_path, zero_shot=str(labelled)))
    found = json.loads((tmp_path / "results.json").read_text())["zero_shot"]
    assert f"| Zero-shot accuracy | {found['before']:.1f} % before" in (tmp_path / "README.md").read_text("utf-8")
    assert found == result["zero_shot"] and (found["labels"], found["images"]) == (2, 6)
    assert "not an image" in caplog.text
    model = AutoModel.from_pretrained(clip)
    processor = TVRNProcessor.from_dual_encoder(clip)
    right = 0
    for row, label in enumerate(("a_dog", "snow")):
        for path in sorted((labelled / label).glob("[012].png")):
            given = processor(images=[Image.open(path)], text=["a photo of a a dog.", "a photo of a snow."])
            given.pop("word_mask")
            with torch.no_grad():
                right += int(model(**given).logits_per_image.argmax() == row)
    assert found["before"] == pytest.approx(100 * right / 6)


def test_bad_label_folders(clip: Path, tmp_path: Path, labelled: Path) -> None:
    with pytest.raises(ValueError, match="is no folder; expected one with a folder of images a label"):
        LabelledImages.of_folder(tmp_path / "nowhere")
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match=r"has images of 0 labels \(none\)"):
        LabelledImages.of_folder(tmp_path)
    model, processor = TVRNModel.from_dual_encoder(clip), TVRNProcessor.from_dual_encoder(clip)
    with pytest.raises(ValueError, match="prompt = 'a dog' has no place for the label"):
        zero_shot_accuracy(model, processor, LabelledImages.of_folder(labelled), "a dog")


def test_the_heads_of_a_dual_encoder_lie_beside_it(clip: Path, tmp_path: Path) -> None:
    model = TVRNModel.from_dual_encoder(clip, use_unimodal_heads=True).eval()
    UnimodalHeads.of(model).save(tmp_path)
    embeds = torch.nn.functional.normalize(torch.randn(3, model.config.projection_size), dim=1)
    torch.testing.assert_close(UnimodalHeads.load(tmp_path).text(embeds), model.unimodal_text_embeds(embeds))
    with pytest.raises(FileNotFoundError, match="trained without heads"):
        UnimodalHeads.load(clip)


@pytest.mark.slow
def test_adapters_in_a_dual_encoder(clip: Path, pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason='low-rank adapters come with pip install ".[lora]"')
    with pytest.raises(ValueError, match="vision_lora_rank = 2 and model.freeze_vision = True"):
        tuned(clip, pairs, tmp_path, vision_lora_rank=2, model={"freeze_vision": None})
    run = Training(tuned(clip, pairs, tmp_path, vision_lora_rank=2, text_lora_rank=2))
    named = {name: weight.requires_grad for name, weight in run.model.named_parameters()}
    assert all(learns is ("lora_" in name) for name, learns in named.items() if "_model." in name)
    train(tuned(clip, pairs, tmp_path, vision_lora_rank=2, text_lora_rank=2))
    found, before = AutoModel.from_pretrained(tmp_path / "dual_encoder"), AutoModel.from_pretrained(clip)
    assert {name: value.shape for name, value in found.state_dict().items()} == {
        name: value.shape for name, value in before.state_dict().items()
    }
    assert any(not torch.equal(value, before.state_dict()[name]) for name, value in found.state_dict().items())
