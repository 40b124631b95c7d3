"""Any dual encoder: its own loss plus CUSA, its architecture untouched, the heads beside its checkpoint."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from teacher_makers import write_caches
from test_teachers import TEXT, VISION
from tokenizers import Tokenizer, models, pre_tokenizers
from training_makers import Processes
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    ViTImageProcessorPil,
)

from modeling_tvrn.data import load_pairs
from modeling_tvrn.losses import CUSA
from modeling_tvrn.training.dual_encoder import (
    DualEncoderConfig,
    DualEncoderTraining,
    UnimodalHeads,
    train_dual_encoder,
)
from modeling_tvrn.training.dual_encoder.data import DifferentImages
from modeling_tvrn.training.exchange import processes

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (30, 30, 230), "white": (240, 240, 240)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two colours with captions that name them, tiny CLIP and SigLIP checkpoints, and teacher caches."""
    folder, random = tmp_path_factory.mktemp("dual"), np.random.default_rng(0)
    rows = []
    for number in range(24):
        top, bottom = random.choice(list(COLOURS), size=2)
        pixels = np.zeros((14, 14, 3), dtype=np.uint8)
        pixels[:7], pixels[7:] = COLOURS[top], COLOURS[bottom]
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
        captions = [f"{top} over {bottom} n{number % 5}", f"{bottom} under {top} n{number % 3}"]
        split = "validation" if number >= 16 else "train"
        rows.append({"image": f"{number}.png", "image_id": number, "captions": captions, "split": split})
    (folder / "captions.json").write_text(json.dumps(rows))
    vocabulary = ["<pad>", "<unk>", *COLOURS, "over", "under", *(f"n{number}" for number in range(5)), "<s>", "</s>"]
    backend = Tokenizer(models.WordLevel({word: row for row, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    text = TEXT | {"eos_token_id": 14, "bos_token_id": 13, "pad_token_id": 0}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=11))
    siglip = SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 12}, vision_config=VISION))
    for name, model, kind in (("clip", clip, CLIPProcessor), ("siglip", siglip, SiglipProcessor)):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=9,
            model_input_names=["input_ids", "attention_mask"] if name == "clip" else ["input_ids"],
        )  # fmt: skip
        kind(ViTImageProcessorPil(size={"height": 21, "width": 21}), tokenizer).save_pretrained(folder / name)
        model.save_pretrained(folder / name)
    write_caches(folder / "caches", load_pairs(folder, "train"))
    return folder


def config(folder: Path, output: Path, name: str = "clip", **keys: Any) -> DualEncoderConfig:
    base: dict[str, Any] = {
        "checkpoint": str(folder / name), "data": str(folder), "output_dir": str(output), "cpu": True, "batch_size": 8,
        "epochs": 1, "learning_rate": 3e-3, "logging_steps": 1, "cusa": True, "cusa_teacher_temperature": 0.3,
        "cusa_image_teacher": str(folder / "caches/image"), "cusa_text_teacher": str(folder / "caches/text"),
    }  # fmt: skip
    return DualEncoderConfig.from_mapping({**base, **keys})


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_loss_is_the_models_own_plus_cusa(folder: Path, tmp_path: Path, name: str) -> None:
    run = DualEncoderTraining(config(folder, tmp_path, name, cusa_alpha=0.3, cusa_beta=0.6))
    run.objective.eval()
    batch = next(iter(run.loader))
    loss, parts = run.objective(batch)
    names = ("input_ids", "attention_mask", "pixel_values")
    output = run.model(**{key: batch[key] for key in names if key in batch}, return_loss=True)
    assert parts["own"].item() == pytest.approx(output.loss.item(), rel=1e-5)
    images, texts = output.image_embeds, output.text_embeds
    teachers = batch["teacher_image_embeds"].float(), batch["teacher_text_embeds"].float()
    cusa = CUSA(0.3, 0.6, teacher_temperature=0.3)
    extra = cusa(*teachers, images @ texts.T, run.heads.image(images), run.heads.text(texts)).loss
    assert loss.item() == pytest.approx((output.loss + extra).item(), rel=1e-5)
    if name == "siglip":
        assert batch["input_ids"].shape[1] == 9  # padded as it was trained


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_run_learns_and_leaves_a_checkpoint_as_it_came(folder: Path, tmp_path: Path, name: str) -> None:
    result = train_dual_encoder(config(folder, tmp_path / name, name, epochs=30, logging_steps=20, cusa_beta=2.0))
    events = [event for event in result["history"] if "loss" in event]
    assert events[-1]["own_loss"] < 0.9 * events[0]["own_loss"]
    assert events[-1]["cusa_uni_modal_loss"] < 0.9 * events[0]["cusa_uni_modal_loss"]
    assert {"rsum", "text_R@1", "text_heads_R@1"} <= set(result["metrics"])
    before, after = AutoModel.from_pretrained(folder / name), AutoModel.from_pretrained(tmp_path / name)
    assert type(after) is type(before)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (before, after)]
    assert shapes[0] == shapes[1]
    AutoProcessor.from_pretrained(tmp_path / name)
    heads = UnimodalHeads.load(tmp_path / name)
    embeds = torch.nn.functional.normalize(torch.randn(3, 11 if name == "clip" else 12), dim=1)
    torch.testing.assert_close(heads.text(embeds).norm(dim=1), torch.ones(3))
    assert json.loads((tmp_path / name / "results.json").read_text())["metrics"] == result["metrics"]


def test_without_cusa_the_same_run_has_its_own_loss_alone(folder: Path, tmp_path: Path) -> None:
    keys = {"cusa": False, "cusa_image_teacher": None, "cusa_text_teacher": None}
    result = train_dual_encoder(config(folder, tmp_path / "plain", **keys))
    assert {name for event in result["history"] for name in event if name.endswith("_loss")} == {"own_loss"}
    with pytest.raises(FileNotFoundError, match="trained without heads"):
        UnimodalHeads.load(tmp_path / "plain")


def test_batches_hold_different_images_and_an_epoch_every_caption() -> None:
    """Two captions of one image in a batch would be each other's negatives for CLIP's loss."""
    rows = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 6])
    batches = DifferentImages(rows, 3, seed=1)
    seen = list(batches)
    assert len(seen) == len(batches)
    assert all(len(set(rows[batch])) == len(batch) >= 2 for batch in seen)
    assert sorted(caption for batch in seen for caption in batch) == list(range(13))
    batches.epoch = 1
    assert list(batches) != seen
    shares = [list(DifferentImages(rows, 4, seed=1, process=rank, processes=2)) for rank in (0, 1)]
    assert all(len(share) >= 2 for own in shares for share in own)
    together = [first + second for first, second in zip(*shares, strict=True)]
    assert sorted(caption for batch in together for caption in batch) == sorted(set(range(13)) - {8, 2})  # too few
    with pytest.raises(ValueError, match="less than two"):
        DifferentImages(rows, 3, processes=2)


def gradients(settings: DualEncoderConfig) -> dict[str, Any]:
    """One step's gradients of the temperatures and heads, averaged over processes, and the loss of CUSA."""
    run = DualEncoderTraining(settings)
    run.objective.eval()
    batch = next(iter(run.loader))
    loss, parts = run.objective(batch)
    run.accelerator.backward(loss - 0.0)
    found = {
        name: value.grad.flatten().tolist() for name, value in run.cusa.named_parameters() if value.grad is not None
    }
    found |= {name: value.grad.flatten()[:5].tolist() for name, value in run.heads.named_parameters()}
    return {"world": processes(), "gradients": found, "cusa": parts["cusa_uni_modal"].item()}


@pytest.mark.slow
def test_soft_labels_span_the_batch_of_all_processes(folder: Path, tmp_path: Path) -> None:
    runner = Processes(tmp_path)
    [alone] = runner.run(gradients, config(folder, tmp_path / "1"))
    both = runner.run(gradients, config(folder, tmp_path / "2"), count=2)
    for result in both:
        assert result["world"] == 2
        assert result["cusa"] == pytest.approx(alone["cusa"], abs=1e-6)
        for name, values in alone["gradients"].items():
            assert result["gradients"][name] == pytest.approx(values, abs=1e-6), name


def test_what_is_no_dual_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    AutoProcessor.from_pretrained(folder / "clip").save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="BertModel without get_image_features and get_text_features"):
        train_dual_encoder(config(folder, tmp_path / "a", checkpoint=str(tmp_path / "bert")))
    with pytest.raises(ValueError, match="no dual encoder at"):
        train_dual_encoder(config(folder, tmp_path / "a", checkpoint=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="unknown key 'batchsize'; did you mean batch_size"):
        config(folder, tmp_path, batchsize=3)
    with pytest.raises(ValueError, match="cusa = True needs cusa_image_teacher"):
        config(folder, tmp_path, cusa_image_teacher=None)


def test_of_two_processes_the_main_one_measures_and_writes(folder: Path, tmp_path: Path) -> None:
    runner = Processes(tmp_path)
    settings = config(folder, tmp_path / "two", max_steps=2, batch_size=4, epochs=1)
    first, second = runner.run(train_dual_encoder, settings, count=2)
    assert first["metrics"]["rsum"] > 0 and second == {}
    assert json.loads((tmp_path / "two/results.json").read_text())["metrics"] == first["metrics"]


def test_the_script_trains(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("train_dual_encoder", ROOT / "examples/train_dual_encoder.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    keys = [f"checkpoint={folder / 'clip'}", f"data={folder}", f"output_dir={tmp_path / 'out'}", "cpu=true"]
    assert script.main([*keys, "max_steps=2", "batch_size=8"]) == 0
    assert "rsum" in capsys.readouterr().out
    assert type(AutoModel.from_pretrained(tmp_path / "out")).__name__ == "CLIPModel"
    AutoProcessor.from_pretrained(tmp_path / "out")
    assert {"metrics", "history", "config"} <= set(json.loads((tmp_path / "out/results.json").read_text()))
    assert script.main([*keys, "batch_size=1"]) == 2
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert "cusa_alpha=0.1" in capsys.readouterr().out
