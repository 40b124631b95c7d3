"""Training over a dual encoder by the one loop, through the command line to its last file."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dual_encoder_makers import WORDS, dual_encoder, save_dual_encoder
from PIL import Image
from transformers import AutoModel

from modeling_tvrn import TVRNModel, TVRNProcessor, load_model
from modeling_tvrn.data import load_pairs
from modeling_tvrn.losses import sigmoid_contrastive_loss
from modeling_tvrn.teachers import RegionCache, Teacher, TeacherCache
from modeling_tvrn.training import TrainingConfig, UnimodalHeads

SMALL = [
    "model.hidden_size=24", "model.similarity_size=12", "model.vision_grid_size=2", "batch_size=6", "cpu=true",
    "learning_rate=1e-2",
]  # fmt: skip
PAIR = "phases=[{train: late_interaction, epochs: 2}, {train: reasoning, epochs: 2}]"
FIRST = "phases=[{train: embeddings, epochs: 2}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of noise with captions."""
    root = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("validation", 5)):
        (root / split).mkdir()
        rows = ["image,caption"]
        for number in range(count):
            name = f"{split}{number}.png"
            Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(root / split / name)
            rows += [f"{split}/{name},{' '.join(random.choice(WORDS, 4))}" for _ in range(2)]
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module", params=["clip", "siglip"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dual_encoder(tmp_path_factory.mktemp("hub") / request.param, request.param)


def train(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "modeling_tvrn.cli", "train", *SMALL, *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def trained(folder: Path, checkpoint: Path, data: Path, *words: str) -> tuple[Any, Any]:
    done = train(f"dual_encoder={checkpoint}", f"data={data / 'train.csv'}", f"output_dir={folder}", *words)
    assert done.returncode == 0, done.stderr
    assert {"README.md", "results.json", "curve.png", "model.safetensors"} <= {path.name for path in folder.iterdir()}
    return load_model(folder, device="cpu")


@pytest.mark.slow
def test_the_pair_stage_learns_over_a_first_stage_that_stays(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    model, processor = trained(tmp_path / "run", checkpoint, data, PAIR)
    images = [Image.open(path) for path in sorted((data / "validation").iterdir())]
    given = processor(images=images, text=["a dog", "two cat runs on snow"])
    own = AutoModel.from_pretrained(checkpoint)
    with torch.no_grad():
        first = model(**given, level="embeddings").logits_per_image
        kept = own(**{name: value for name, value in given.items() if name != "word_mask"}).logits_per_image
    torch.testing.assert_close(first, kept, rtol=1e-5, atol=1e-5)
    assert model.pair.late_interaction_weight.item() != 0 and model.pair.reasoning_weight.item() != 0
    assert not (tmp_path / "run" / "dual_encoder").exists()  # which would be the one that came in


@pytest.mark.slow
def test_caches_train_as_live_towers_do(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Region and caption caches hold the embeddings too: half precision is all that they lose (where a gradient is
    next to nothing, Adam's step may then have the other sign, so it is what the models say that is compared)."""
    live, _ = trained(tmp_path / "live", checkpoint, data, "phases=[{train: late_interaction, steps: 2}]")
    model = TVRNModel.from_dual_encoder(checkpoint, vision_grid_size=2, hidden_size=24, similarity_size=12).eval()
    processor = TVRNProcessor.from_dual_encoder(checkpoint)
    RegionCache.build(model, processor, load_pairs(str(data / "train.csv")), tmp_path / "regions", dtype="float32")
    cached, _ = trained(
        tmp_path / "cached", checkpoint, data, "phases=[{train: late_interaction, steps: 2}]",
        f"regions={tmp_path / 'regions'}", f"text_features={tmp_path / 'captions'}",
    )  # fmt: skip
    images = [Image.open(path) for path in sorted((data / "validation").iterdir())]
    given = processor(images=images, text=[" ".join(WORDS[k : k + 4]) for k in range(12)])
    pixels = given.pop("pixel_values")
    with torch.no_grad():
        wanted, found = (
            each.score_components(each.encode_images(pixels), each.encode_texts(**given)) for each in (live, cached)
        )
    for name, values in wanted.items():
        assert (found[name] - values).abs().max() <= 0.05 * values.std() + 1e-4, name


@pytest.mark.slow
def test_a_dual_encoder_with_cusa_comes_out_as_it_went_in(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    caches = {}
    for modality, key in (("image", "vision"), ("text", "text")):
        teacher = Teacher.from_pretrained(save_tower(tmp_path / modality, key), modality=modality)
        records = load_pairs(str(data / "train.csv"))
        caches[modality] = TeacherCache.build(teacher, records, tmp_path / f"{modality}-cache")
    learns = ["model.freeze_first_stage=false", "model.freeze_vision=false", "model.freeze_text=false"]
    cusa = ["cusa=true", *(f"cusa_{name}_teacher={tmp_path / name}-cache" for name in caches)]
    trained(
        tmp_path / "run", checkpoint, data, FIRST, *learns, *cusa,
        "model.use_late_interaction=false", "model.use_reasoning=false",
    )  # fmt: skip
    found, before = AutoModel.from_pretrained(tmp_path / "run" / "dual_encoder"), AutoModel.from_pretrained(checkpoint)
    assert type(found) is type(before) and found.config.to_dict().keys() == before.config.to_dict().keys()
    weights = dict(before.named_parameters())
    assert {name: weight.shape for name, weight in found.named_parameters()} == {
        name: weight.shape for name, weight in weights.items()
    }
    moved = [name for name, weight in found.named_parameters() if not torch.equal(weight, weights[name])]
    assert any("vision" in name for name in moved) and any("text" in name for name in moved)
    heads, model = UnimodalHeads.load(tmp_path / "run" / "dual_encoder"), TVRNModel.from_pretrained(tmp_path / "run")
    assert torch.equal(heads.text.linear.weight, model.unimodal_text_head.linear.weight)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["teachers"]) == {"image", "text"}


def save_tower(folder: Path, side: str) -> Path:
    """A tower of the same little CLIP with what prepares its input, as a frozen teacher."""
    model = dual_encoder("clip", seed=9)
    getattr(model, f"{side}_model").save_pretrained(folder)
    save_dual_encoder(folder / "whole")
    for path in (folder / "whole").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.rename(folder / path.name)
    return folder


def test_the_sigmoid_loss_is_siglips() -> None:
    model = dual_encoder("siglip")
    generator = torch.Generator().manual_seed(0)
    pixels, ids = torch.randn(4, 3, 32, 32, generator=generator), torch.randint(3, 20, (4, 16), generator=generator)
    with torch.no_grad():
        own = model(pixel_values=pixels, input_ids=ids, return_loss=True)
        rows = torch.arange(4)
        scale, bias = model.logit_scale, model.logit_bias
        found = sigmoid_contrastive_loss(own.image_embeds, own.text_embeds, scale, bias, rows, rows)
    torch.testing.assert_close(found, own.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vision=google/vit"], "vision = 'google/vit' beside dual_encoder = 'x', which brings its towers"),
        (["model.text_config={model_type: bert}"], "model.text_config is given beside dual_encoder = 'x'"),
        ([FIRST], "phases train embeddings of dual_encoder = 'x', but .* all true"),
        (
            ["cusa=true", "cusa_image_teacher=a", "cusa_text_teacher=b"],
            "cusa = True with dual_encoder = 'x', but .* nothing to teach",
        ),
        (["regions=r", "model.freeze_vision=false"], "regions = 'r' holds the outputs of a frozen tower"),
    ],
)
def test_keys_that_contradict_a_dual_encoder(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_yaml(None, ["dual_encoder=x", *words])


@pytest.mark.slow
def test_the_recipe_that_fine_tunes_a_dual_encoder(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    done = train(
        "-c",
        "dual-encoder",
        f"dual_encoder={checkpoint}",
        f"data={data / 'train.csv'}",
        "epochs=1",
        f"output_dir={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    found, before = AutoModel.from_pretrained(tmp_path / "run" / "dual_encoder"), AutoModel.from_pretrained(checkpoint)
    assert type(found) is type(before)
    assert any(not torch.equal(value, before.state_dict()[name]) for name, value in found.state_dict().items())
    assert (tmp_path / "run" / "trained" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["clip", "siglip2"])
def test_shipped_recipes_start_on_a_stand_in(recipe: str, data: Path, tmp_path: Path) -> None:
    """With a tiny checkpoint of the class that the recipe names in its place, and nothing cached."""
    folder = save_dual_encoder(tmp_path / recipe, "siglip" if recipe == "siglip2" else "clip")
    done = train(
        "-c", recipe, f"dual_encoder={folder}", f"data={data / 'train.csv'}", f"output_dir={tmp_path / 'run'}",
        "regions=null", "phases.0={train: late_interaction, steps: 2}", "mixed_precision=no",
        "phases.1={train: reasoning, steps: 2}", "model.word_hidden_size=8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model, _ = load_model(tmp_path / "run", device="cpu")
    assert model.config.components == ["first_stage", "late_interaction", "reasoning"]
