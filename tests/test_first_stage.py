"""A pretrained dual encoder as first stage: step 0 is the dual encoder, and it comes out again as it went in."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from dual_encoder_makers import CONFIGS, VISION, WORDS, dual_encoder, inputs, save_dual_encoder
from PIL import Image
from transformers import AutoModel, AutoProcessor

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor, load_model

SIZES = {"hidden_size": 24, "similarity_size": 12, "vision_grid_size": 2}
KINDS = sorted(CONFIGS)


def over(kind: str, **config: Any) -> tuple[TVRNModel, Any]:
    """A TVRN over a dual encoder, and that dual encoder."""
    torch.manual_seed(0)
    return TVRNModel.from_dual_encoder(dual_encoder(kind), **SIZES | config).eval(), dual_encoder(kind)


def pictures(folder: Path, count: int = 3) -> list[Path]:
    """Images of noise in a folder."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return paths


def loss_of(model: TVRNModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    count = len(given["pixel_values"])
    texts = {name: value[:count] for name, value in given.items() if name != "pixel_values"}
    return model(pixel_values=given["pixel_values"], **texts, return_loss=True).loss


@pytest.mark.parametrize("kind", KINDS)
class TestStepZero:
    @torch.no_grad()
    def test_logits_and_embeddings_are_the_dual_encoders(self, kind: str) -> None:
        model, plain = over(kind)
        given = inputs(plain, kind)
        ours, own = model(**given), plain(**given)
        scale = own.logits_per_image.abs().max()
        torch.testing.assert_close(ours.logits_per_image, own.logits_per_image, rtol=0, atol=1e-5 * float(scale))
        torch.testing.assert_close(ours.image_embeds, own.image_embeds, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours.text_embeds, own.text_embeds, rtol=0, atol=1e-6)

    @pytest.mark.slow
    @torch.no_grad()
    def test_bfloat16_stays_near_float32(self, kind: str) -> None:
        model, plain = over(kind)
        given = inputs(plain, kind)
        exact = model(**given)
        rough = model.to(torch.bfloat16)(**given)
        for name in ("image_embeds", "text_embeds"):
            torch.testing.assert_close(getattr(rough, name).float(), getattr(exact, name), rtol=0, atol=3e-2)

    @torch.no_grad()
    def test_an_items_score_does_not_depend_on_its_batch(self, kind: str) -> None:
        model, plain = over(kind, component_weight_init_value=0.8)
        given = inputs(plain, kind)
        together = model.match(*encoded(model, given))
        images = model.encode_images(given["pixel_values"][1:2])
        texts = {name: value[2:3] for name, value in given.items() if name != "pixel_values"}
        if kind != "siglip":  # whose padding is part of the caption
            texts = {name: value[:, : int(texts["attention_mask"].sum())] for name, value in texts.items()}
        alone = model.match(images, model.encode_texts(**texts, word_mask=words_of(texts)))
        torch.testing.assert_close(alone[0, 0], together[1, 2], rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    def test_it_comes_back_from_a_folder(self, kind: str, tmp_path: Path) -> None:
        model, plain = over(kind, component_weight_init_value=0.3)
        given = inputs(plain, kind)
        model.save_pretrained(tmp_path / "tvrn")
        again = TVRNModel.from_pretrained(tmp_path / "tvrn").eval()
        with torch.no_grad():
            torch.testing.assert_close(
                again(**given).logits_per_image, model(**given).logits_per_image, rtol=0, atol=0
            )

    @pytest.mark.slow
    def test_what_was_trained_leaves_as_a_plain_checkpoint(self, kind: str, tmp_path: Path) -> None:
        model, plain = over(kind, freeze_vision=False, freeze_text=False, freeze_first_stage=False)
        given = inputs(plain, kind)
        optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1e-2)
        for _ in range(2):
            loss_of(model.train(), given).backward()
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.add_(0.1)
        model.eval().save_dual_encoder(tmp_path / "plain")
        back, info = AutoModel.from_pretrained(tmp_path / "plain", output_loading_info=True)
        assert type(back) is type(plain) and not any(info[name] for name in ("missing_keys", "unexpected_keys"))
        with torch.no_grad():
            wanted = model(**given, level="embeddings").logits_per_image
            found = back.eval()(**given).logits_per_image
            assert (found - plain(**given).logits_per_image).abs().max() > 1e-3, "nothing was trained"
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def words_of(texts: dict[str, torch.Tensor]) -> torch.Tensor:
    return (texts["input_ids"] > 3).long()


def encoded(model: TVRNModel, given: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    texts = {name: value for name, value in given.items() if name != "pixel_values"}
    return model.encode_images(given["pixel_values"]), model.encode_texts(**texts, word_mask=words_of(texts))


@pytest.mark.slow
def test_weights_of_the_components_are_learned_and_each_component_counts() -> None:
    model, plain = over("clip")
    given = inputs(plain, "clip", images=4, texts=4)
    assert model.pair.late_interaction_weight.item() == model.pair.reasoning_weight.item() == 0.0
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    frozen = {name: weight.clone() for name, weight in model.dual_encoder.named_parameters()}
    for _ in range(30):
        optimizer.zero_grad()
        loss_of(model.train(), given).backward()
        optimizer.step()
    assert model.pair.late_interaction_weight.item() > 0 and model.pair.reasoning_weight.item() > 0
    for name, weight in model.dual_encoder.named_parameters():
        assert torch.equal(weight, frozen[name]), name
    with torch.no_grad():
        sides = encoded(model.eval(), given)
        parts, logits = model.score_components(*sides), model.match(*sides)
    torch.testing.assert_close(sum(parts.values()), logits)
    for left_out in ("late_interaction", "reasoning"):
        rest = sum(value for name, value in parts.items() if name != left_out)
        assert not torch.equal(rest.flatten().argsort(), logits.flatten().argsort()), left_out


def test_a_weight_below_zero_counts_as_zero_and_can_come_back() -> None:
    model, plain = over("clip")
    with torch.no_grad():
        model.pair.late_interaction_weight.fill_(-0.5)
    parts = model.score_components(*encoded(model, inputs(plain, "clip")))
    assert parts["late_interaction"].abs().max() == 0
    parts["late_interaction"].sum().backward()
    assert model.pair.late_interaction_weight.grad.abs().item() > 0


@pytest.mark.parametrize(("level", "names"), [("embeddings", 1), ("late_interaction", 2), ("full", 3)])
def test_levels(level: str, names: int) -> None:
    model, plain = over("clip", component_weight_init_value=0.5)
    given = inputs(plain, "clip")
    texts = {name: value for name, value in given.items() if name != "pixel_values"}
    with torch.no_grad():
        sides = model.encode_images(given["pixel_values"], level=level), model.encode_texts(**texts, level=level)
        whole = model.encode_images(given["pixel_values"]), model.encode_texts(**texts)
        assert list(model.score_components(*sides, level=level)) == model.config.components[:names]
        torch.testing.assert_close(model.match(*sides, level=level), model.match(*whole, level=level))
        if level != "full":
            with pytest.raises(ValueError, match="lower level"):
                model.match(*sides)
    with pytest.raises(ValueError, match="level is 'coarse'"):
        model.encode_images(given["pixel_values"], level="coarse")


def test_cached_features_score_as_pixels_do() -> None:
    model, plain = over("clip", component_weight_init_value=0.5)
    given = inputs(plain, "clip")
    ids, mask = given["input_ids"], given["attention_mask"]
    with torch.no_grad():
        images = model.encode_images(**model.extract_image_features(given["pixel_values"]))
        stored = model.extract_text_features(ids, mask)
        texts = model.encode_texts(**stored, attention_mask=mask, word_mask=words_of(given))
        torch.testing.assert_close(model.match(images, texts), model.match(*encoded(model, given)))
    with pytest.raises(ValueError, match="without text_embeds"):
        model.encode_texts(text_features=stored["text_features"], attention_mask=mask)


class TestProcessor:
    @pytest.mark.parametrize("kind", ["clip", "siglip", "vision-text-dual-encoder"])
    def test_it_makes_what_the_own_processor_makes(self, kind: str, tmp_path: Path) -> None:
        folder = save_dual_encoder(tmp_path / kind, kind)
        images = [Image.open(path) for path in pictures(tmp_path / "images")]
        captions = ["a dog runs in snow", "the small red circle above a large blue square", "cat"]
        padding = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
        own = AutoProcessor.from_pretrained(folder)(images=images, text=captions, return_tensors="pt", **padding)
        processor = TVRNProcessor.from_dual_encoder(folder)
        ours = processor(images=images, text=captions)
        torch.testing.assert_close(ours["input_ids"], own["input_ids"])
        torch.testing.assert_close(ours["pixel_values"], own["pixel_values"], rtol=0, atol=1e-6)
        assert ours["word_mask"].sum(dim=1).tolist() == [5, 9, 1]
        assert ("attention_mask" in ours) == (kind != "siglip")
        processor.save_pretrained(tmp_path / "again")
        again = TVRNProcessor.from_pretrained(tmp_path / "again")(text=captions)
        assert {name: value.tolist() for name, value in again.items()} == {name: ours[name].tolist() for name in again}

    @pytest.mark.slow
    def test_model_and_processor_leave_together(self, tmp_path: Path) -> None:
        folder = save_dual_encoder(tmp_path / "clip")
        model, processor = TVRNModel.from_dual_encoder(folder, **SIZES), TVRNProcessor.from_dual_encoder(folder)
        model.save_dual_encoder(tmp_path / "plain", processor)
        code = (
            "from transformers import AutoModel, AutoProcessor; import sys\n"
            "m, p = AutoModel.from_pretrained(sys.argv[1]), AutoProcessor.from_pretrained(sys.argv[1])\n"
            "print(type(m).__name__, type(p).__name__, 'modeling_tvrn' in sys.modules)"
        )
        run = [sys.executable, "-c", code, str(tmp_path / "plain")]
        said = subprocess.run(run, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert said.stdout.strip() == "CLIPModel CLIPProcessor False"


class TestRefused:
    def test_any_resolution(self) -> None:
        vision = {name: value for name, value in VISION.items() if name != "image_size"}
        text = {"hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37}
        naflex = transformers.Siglip2Model(
            transformers.Siglip2Config(text_config=text | {"vocab_size": 99}, vision_config=vision)
        )
        with pytest.raises(ValueError, match="Siglip2Model can't be the first stage: it wants patches of any"):
            TVRNModel.from_dual_encoder(naflex, **SIZES)

    def test_fragments_that_are_no_grid(self) -> None:
        text = {"hidden_size": 28, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37}
        groups = {"depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2]}
        vision = {"hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, **groups}
        model = transformers.GroupViTModel(
            transformers.GroupViTConfig(
                text_config=text | {"vocab_size": 99},
                vision_config=vision,
                projection_dim=20,
                projection_intermediate_dim=24,
            )
        )
        with pytest.raises(ValueError, match="its patches form no grid"):
            TVRNModel.from_dual_encoder(model, **SIZES)

    def test_another_projection_size(self) -> None:
        with pytest.raises(ValueError, match="projection_size is 7, but that of the dual encoder is 20"):
            TVRNModel.from_dual_encoder(dual_encoder(), projection_size=7)

    def test_a_text_tower_beside_it(self) -> None:
        with pytest.raises(ValueError, match="came beside text_config"):
            TVRNConfig(dual_encoder_config=CONFIGS["clip"](), text_config=transformers.BertConfig())

    @pytest.mark.parametrize("name", ["matching_loss_weight", "hardest_negative_loss_weight"])
    def test_margins_on_sigmoids(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} is 1.0: margins on sigmoids"):
            TVRNModel.from_dual_encoder(dual_encoder(), **SIZES, **{name: 1.0})

    def test_a_model_of_another_kind(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 28, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37}
        transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=99)).save_pretrained(tmp_path / "bert")
        with pytest.raises(ValueError, match="holds a BertModel; expected a TVRN checkpoint or a dual encoder"):
            load_model(tmp_path / "bert")
        with pytest.raises(ValueError, match="of type 'bert', without a vision and a text tower"):
            TVRNModel.from_dual_encoder(tmp_path / "bert")

    def test_a_wrong_path_names_near_matches(self, tmp_path: Path) -> None:
        save_dual_encoder(tmp_path / "runs" / "flickr8k")
        with pytest.raises(ValueError, match=r"there is no folder '.*flick8k'.* Near by: .*runs/flickr8k"):
            load_model(tmp_path / "runs" / "flick8k")


class TestFrontDoor:
    @pytest.fixture(scope="class")
    @classmethod
    def clip(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return save_dual_encoder(tmp_path_factory.mktemp("front") / "clip")

    def test_it_scores_as_the_dual_encoder(self, clip: Path, tmp_path: Path) -> None:
        model, processor = load_model(clip, device="cpu")
        images = [Image.open(path) for path in pictures(tmp_path)]
        given = processor(images=images, text=["a dog", "two cat sits on grass"])
        with torch.no_grad():
            found = model(**given).logits_per_image
            wanted = AutoModel.from_pretrained(clip)(**{k: v for k, v in given.items() if k != "word_mask"})
        torch.testing.assert_close(found, wanted.logits_per_image, rtol=1e-5, atol=1e-5)
        assert not model.is_calibrated and model.config.components == ["first_stage"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "verb",
        [
            ["search", "MODEL", "IMAGES", "a dog", "--json"],
            ["index", "MODEL", "IMAGES", "INDEX"],
            ["score", "MODEL", "PAIRS", "--json"],
            ["evaluate", "MODEL", "--data", "IMAGES", "--json"],
        ],
        ids=lambda words: words[0],
    )
    def test_verbs_take_any_dual_encoder(self, clip: Path, verb: list[str], tmp_path: Path) -> None:
        paths = pictures(tmp_path / "images", 6)
        rows = [f"{path.name},{WORDS[k]} {WORDS[k + 1]} {WORDS[k + 2]}" for k, path in enumerate(paths)]
        (tmp_path / "images" / "captions.csv").write_text("\n".join(["image,caption", *rows]))
        places = {"MODEL": clip, "IMAGES": tmp_path / "images", "INDEX": tmp_path / "index"}
        places["PAIRS"] = tmp_path / "images" / "captions.csv"
        command = [sys.executable, "-m", "modeling_tvrn.cli", *(str(places.get(word, word)) for word in verb)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "--json" in verb and verb[0] != "score":
            assert json.loads(done.stdout)
