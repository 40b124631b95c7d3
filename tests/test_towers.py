"""Vision and text towers: which outputs become regions and words, what is trained, and what is refused."""

from pathlib import Path

import pytest
import torch
from model_makers import SIZES, regions, shake, tiny_model, words
from torch import nn
from transformers import (
    AutoModel,
    BartConfig,
    BartModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DistilBertConfig,
    MobileNetV2Config,
    PreTrainedConfig,
    ResNetConfig,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    T5Config,
    T5Model,
    ViTConfig,
)

from modeling_tvrn import TVRNConfig, TVRNModel

LAYERS = {"hidden_size": 14, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 19}
TEXT = {**LAYERS, "vocab_size": 31, "max_position_embeddings": 16}
VISION = {**LAYERS, "image_size": 24, "patch_size": 8}
T5 = {
    "vocab_size": 31,
    "d_model": 14,
    "d_kv": 7,
    "d_ff": 19,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
# Special tokens before the patches: none, a class token, a class token and registers.
PATCH_TOWERS: dict[str, tuple[PreTrainedConfig, int]] = {
    "vit": (ViTConfig(**VISION | {"image_size": [16, 24]}), 1),
    "dinov2": (Dinov2Config(**VISION), 1),
    "dinov2_registers": (Dinov2WithRegistersConfig(**VISION, num_register_tokens=3), 4),
    "clip": (CLIPConfig(vision_config=VISION, text_config=TEXT).vision_config, 1),
    "siglip": (SiglipConfig(vision_config=VISION, text_config=TEXT).vision_config, 0),
}
MAP_TOWERS: dict[str, tuple[PreTrainedConfig, int, int]] = {  # with channels and stride
    "resnet": (ResNetConfig(embedding_size=6, hidden_sizes=[8, 10], depths=[1, 1], layer_type="basic"), 10, 8),
    "mobilenet": (MobileNetV2Config(depth_multiplier=0.05, finegrained_output=True), 1280, 32),
    "convnext": (ConvNextConfig(num_stages=2, hidden_sizes=[6, 11], depths=[1, 1], patch_size=4), 11, 8),
}
TEXT_TOWERS = {
    "bert": BertConfig(**TEXT),
    "distilbert": DistilBertConfig(vocab_size=31, dim=14, n_heads=2, n_layers=2, hidden_dim=19),
    "clip": CLIPConfig(vision_config=VISION, text_config={**TEXT, "eos_token_id": 30}).text_config,
    "siglip": SiglipConfig(vision_config=VISION, text_config=TEXT).text_config,
    "t5": T5Config(**T5),
}
ALL_LOSSES = {"pair_contrastive_loss_weight": 1.0, "hardest_negative_loss_weight": 1.0}


def with_vision(tower: PreTrainedConfig, channels: int, **settings) -> TVRNModel:
    return tiny_model(vision_config=tower, region_feature_size=channels, **settings)


class TestVision:
    @pytest.mark.parametrize("tower", PATCH_TOWERS)
    def test_patches_without_special_tokens(self, tower):
        """A class or register token taken for a patch shifts every box by one."""
        config, special = PATCH_TOWERS[tower]
        rows = 2 if tower == "vit" else 3
        model = with_vision(config, 14)
        pixels = torch.randn(2, 3, 8 * rows, 24)
        with torch.no_grad():
            features, boxes, mask = model.extract_regions(pixels)
            hidden = model.vision_model(pixel_values=pixels).last_hidden_state
        assert features.shape == (2, 3 * rows, 14) and mask.all() and mask.shape == (2, 3 * rows)
        assert hidden.shape[1] == 3 * rows + special
        assert torch.equal(features, hidden[:, special:])
        cell = torch.tensor([1 / 3, (rows - 2) / rows, 1.0, 1.0])  # around the last cell, clipped
        torch.testing.assert_close(boxes[1, -1], cell)

    @pytest.mark.parametrize("tower", MAP_TOWERS)
    def test_maps_row_by_row(self, tower):
        """A transposed map keeps every shape of a square picture and gives each region another's box."""
        config, channels, stride = MAP_TOWERS[tower]
        model = with_vision(config, channels)
        rows, columns = 3, 4
        pixels = torch.randn(2, 3, rows * stride, columns * stride)
        with torch.no_grad():
            features, boxes, mask = model.extract_regions(pixels)
            maps = model.vision_model(pixel_values=pixels).last_hidden_state
        assert features.shape == (2, rows * columns, channels) and mask.all()
        for row, column in ((0, 0), (0, 3), (2, 1), (1, 2)):
            region = row * columns + column
            assert torch.equal(features[:, region], maps[:, :, row, column])
        torch.testing.assert_close(boxes[1, 2 * columns + 1], torch.tensor([0, 1 / 3, 3 / 4, 1]))

    @pytest.mark.parametrize(
        ("height", "width", "grid"), [(32, 32, (4, 4)), (32, 48, (4, 6)), (36, 44, (5, 6)), (20, 60, (3, 8))]
    )
    def test_a_hierarchical_tower(self, height, width, grid):
        """Swin pads what its patches and merges do not divide: the grid is rounded up."""
        tower = SwinConfig(embed_dim=6, depths=[1, 1], num_heads=[1, 2], window_size=2, patch_size=4, image_size=32)
        model = with_vision(tower, 12)
        with torch.no_grad():
            pixels = torch.randn(1, 3, height, width)
            features, boxes, _ = model.extract_regions(pixels)
            hidden = model.vision_model(pixel_values=pixels).last_hidden_state
        assert torch.equal(features, hidden)
        assert features.shape[1] == grid[0] * grid[1]
        corner = [max(grid[1] - 2, 0) / grid[1], max(grid[0] - 2, 0) / grid[0], 1, 1]
        assert boxes[0, -1].tolist() == pytest.approx(corner)

    @pytest.mark.parametrize("grid", [1, 2])
    def test_grid_size(self, grid):
        """A pooled map is as any map: row by row, boxes of its own cells."""
        model, whole = (with_vision(MAP_TOWERS["resnet"][0], 10, vision_grid_size=size) for size in (grid, None))
        pixels = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            features, boxes, mask = model.extract_regions(pixels)
            cells = whole.extract_regions(pixels)[0].view(2, grid, 4 // grid, grid, 4 // grid, 10).mean(dim=(2, 4))
        torch.testing.assert_close(features, cells.flatten(1, 2))
        assert boxes.shape == (2, grid * grid, 4) and mask.shape == (2, grid * grid)

    def test_a_tower_without_patches(self):
        """A sequence that is no grid is refused, not cut to the nearest one."""
        model = with_vision(PATCH_TOWERS["vit"][0], 14)
        model.vision_model.config.patch_size = 6
        with pytest.raises(
            ValueError, match=r"(?s)'vit'.*\(1, 7, 14\).*16×24 pixels and patches of 6.*spatial output"
        ):
            model.extract_regions(torch.randn(1, 3, 16, 24))


class TestText:
    @pytest.mark.parametrize("tower", TEXT_TOWERS)
    def test_words_are_the_towers_tokens(self, tower):
        model, inputs = tiny_model(text_config=TEXT_TOWERS[tower]), words()
        hidden = model.extract_words(inputs["input_ids"], inputs["attention_mask"])
        assert hidden.shape == (4, 6, 14)
        texts, again = (
            model.encode_texts(**inputs),
            model.encode_texts(
                text_features=hidden, attention_mask=inputs["attention_mask"], word_mask=inputs["word_mask"]
            ),
        )
        assert torch.equal(texts.words, again.words) and torch.equal(texts.embeds, again.embeds)

    @pytest.mark.parametrize("tower", TEXT_TOWERS)
    def test_padding_never_reaches_a_word(self, tower):
        model, inputs = tiny_model(text_config=TEXT_TOWERS[tower]), words()
        if tower == "clip":
            inputs["input_ids"][:, -1] = 30  # CLIP's pooled vector, unused here, looks for the end token
        other = inputs["input_ids"].clone()
        other[inputs["attention_mask"] == 0] = 5
        assert (other != inputs["input_ids"]).any()
        changed = model.encode_texts(**inputs | {"input_ids": other})
        torch.testing.assert_close(changed.words, model.encode_texts(**inputs).words)


def pretrained(config: PreTrainedConfig, folder: Path) -> Path:
    shake(AutoModel.from_config(config)).save_pretrained(folder)
    return folder


class TestFromBackbones:
    def test_weights_and_sizes_come_from_the_towers(self, tmp_path):
        vision = pretrained(MAP_TOWERS["resnet"][0], tmp_path / "vision")
        text = pretrained(TEXT_TOWERS["bert"], tmp_path / "text")
        model = TVRNModel.from_backbones(vision=vision, text=text, **SIZES)
        assert model.config.region_feature_size == 10 and model.word_projection.in_features == 14
        for tower, folder in ((model.vision_model, vision), (model.text_model, text)):
            original = AutoModel.from_pretrained(folder).state_dict()
            assert tower.state_dict().keys() <= original.keys()
            assert all(torch.equal(value, original[key]) for key, value in tower.state_dict().items())
            assert all(parameter.requires_grad for parameter in tower.parameters())
        model(pixel_values=torch.randn(2, 3, 16, 16), **words(2), return_loss=True).loss.backward()

    @pytest.mark.slow
    @pytest.mark.parametrize(("kind", "config"), [(CLIPModel, CLIPConfig), (SiglipModel, SiglipConfig)])
    def test_halves_of_a_two_tower_model(self, tmp_path, kind, config):
        """CLIP and SigLIP checkpoints hold both towers; each side takes its own."""
        whole = shake(kind(config(vision_config=VISION, text_config={**TEXT, "eos_token_id": 30})))
        whole.save_pretrained(tmp_path)
        model = TVRNModel.from_backbones(vision=tmp_path, text=tmp_path, **SIZES).eval()
        assert model.config.region_feature_size == 14
        pixels, inputs = torch.randn(2, 3, 24, 24), words(3)
        inputs["input_ids"][:, -1] = 30
        with torch.no_grad():
            ours = model.extract_regions(pixels)[0], model.extract_words(inputs["input_ids"], inputs["attention_mask"])
            vision = whole.vision_model(pixel_values=pixels).last_hidden_state[:, -9:]
            text = whole.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        torch.testing.assert_close(ours, (vision, text))
        model(pixel_values=pixels, **inputs, image_ids=torch.arange(2), text_image_ids=torch.tensor([0, 1, 1]))

    def test_the_encoder_of_an_encoder_decoder(self, tmp_path):
        """T5's encoder is a text tower; its decoder is left behind."""
        whole = shake(T5Model(T5Config(**T5)))
        whole.save_pretrained(tmp_path)
        model, inputs = TVRNModel.from_backbones(text=tmp_path, **SIZES).eval(), words(3)
        assert not any("decoder" in name for name, _ in model.text_model.named_parameters())
        with torch.no_grad():
            ours = model.extract_words(inputs["input_ids"], inputs["attention_mask"])
            expected = whole.encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        torch.testing.assert_close(ours, expected)

    def test_an_encoder_that_cannot_be_had_alone(self, tmp_path):
        """BART would run, and give the decoder's states, which see the words before them only."""
        sizes = {"vocab_size": 31, "d_model": 14, "encoder_layers": 1, "decoder_layers": 1}
        heads = {
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 9,
            "decoder_ffn_dim": 9,
        }
        BartModel(BartConfig(**sizes, **heads)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"(?s)text tower.*'bart' is an encoder–decoder.*BERT"):
            TVRNModel.from_backbones(text=tmp_path, **SIZES)

    @pytest.mark.parametrize("tower", ["siglip", "t5", "clip"])
    def test_round_trip(self, tmp_path, tower):
        """Tied or left-out weights of a tower must not be missing or left over when the model loads again."""
        model, inputs = tiny_model(text_config=TEXT_TOWERS[tower]), words(3)
        if tower == "clip":
            inputs["input_ids"][:, -1] = 30
        model.save_pretrained(tmp_path)
        with torch.no_grad():
            loaded = TVRNModel.from_pretrained(tmp_path).encode_texts(**inputs)
            assert torch.equal(loaded.embeds, model.encode_texts(**inputs).embeds)


def trained(model: TVRNModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State before; the model is after one step with every loss and weight decay."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    model.train()
    model(**inputs, return_loss=True).loss.backward()
    optimizer.step()
    return before


def inputs_for(model: TVRNModel) -> dict[str, torch.Tensor]:
    images = {"pixel_values": torch.randn(3, 3, 24, 24)} if model.vision_model is not None else regions(3)
    inputs = words(3)
    inputs["input_ids"][:, -1] = 30
    return images | inputs


class TestTraining:
    @pytest.mark.parametrize("tower", ["resnet", "mobilenet", "dinov2", "dinov2_registers", "clip", "siglip"])
    def test_gradients_reach_a_vision_tower(self, tower):
        """A trainable parameter without a gradient stops a distributed run."""
        config, channels = MAP_TOWERS[tower][:2] if tower in MAP_TOWERS else (PATCH_TOWERS[tower][0], 14)
        self.assert_gradients(
            TVRNModel(TVRNConfig(**SIZES | ALL_LOSSES, vision_config=config, region_feature_size=channels))
        )

    @pytest.mark.parametrize("tower", TEXT_TOWERS)
    def test_gradients_reach_a_text_tower(self, tower):
        sizes = SIZES | ALL_LOSSES | {"region_feature_size": 29}
        self.assert_gradients(TVRNModel(TVRNConfig(**sizes, text_config=TEXT_TOWERS[tower])))

    def assert_gradients(self, model: TVRNModel) -> None:
        model.train()
        model(**inputs_for(model), return_loss=True).loss.backward()
        without = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
        assert without == []
        tower = model.vision_model or model.text_model
        with_gradient = [value.grad.abs().max() > 0 for value in tower.parameters() if value.grad is not None]
        assert sum(with_gradient) > 0.8 * len(with_gradient)  # attention's key biases cancel in its softmax

    @pytest.mark.slow
    @pytest.mark.parametrize("frozen", [True, False])
    def test_frozen_towers_stay_bit_identical(self, frozen):
        """Also their running statistics, which no optimizer touches."""
        model = tiny_model(
            vision_config=MAP_TOWERS["mobilenet"][0],
            region_feature_size=1280,
            text_config=TEXT_TOWERS["bert"],
            freeze_vision=frozen,
            freeze_text=frozen,
        )
        before = trained(model, inputs_for(model))
        towers = [key for key in before if key.startswith(("vision_model.", "text_model."))]
        same = {key: torch.equal(before[key], model.state_dict()[key]) for key in before}
        statistics = [key for key in towers if "running_" in key or "num_batches" in key]
        assert statistics and all(same[key] for key in statistics)
        assert model.training and model.vision_model.training is not frozen
        assert not any(m.training for m in model.vision_model.modules() if isinstance(m, nn.BatchNorm2d))
        if frozen:
            assert all(same[key] for key in towers)
            assert all(p.grad is None for t in (model.vision_model, model.text_model) for p in t.parameters())
        else:
            changed = [key for key, _ in model.named_parameters() if key in towers and not same[key]]
            assert len(changed) > 0.8 * (len(towers) - len(statistics)) - 5
        assert not same["region_projection.weight"] and not same["word_projection.weight"]

    def test_a_frozen_tower_keeps_no_activations(self):
        model = with_vision(MAP_TOWERS["resnet"][0], 10, freeze_vision=True).train()
        features, _, _ = model.extract_regions(torch.randn(2, 3, 16, 16))
        assert not features.requires_grad
        assert with_vision(MAP_TOWERS["resnet"][0], 10).extract_regions(torch.randn(2, 3, 16, 16))[0].requires_grad

    @pytest.mark.parametrize("frozen", [True, False])
    def test_a_new_model_keeps_to_its_modes_without_a_call_of_train(self, frozen):
        model = TVRNModel(
            TVRNConfig(
                **SIZES, vision_config=MAP_TOWERS["mobilenet"][0], region_feature_size=1280, freeze_vision=frozen
            )
        )
        assert model.training
        assert not any(m.training for m in model.vision_model.modules() if isinstance(m, nn.BatchNorm2d))
        assert model.vision_model.training is not frozen


class TestWordEmbeddings:
    """Words of a pretrained text model under a BiGRU."""

    @pytest.fixture
    def bert(self, tmp_path: Path) -> Path:
        AutoModel.from_config(BertConfig(**TEXT, pad_token_id=2)).save_pretrained(tmp_path / "bert")
        return tmp_path / "bert"

    def test_they_are_the_models_own_at_variance_one(self, bert):
        model = TVRNModel.from_backbones(word_embeddings=bert, region_feature_size=29, hidden_size=37)
        table = AutoModel.from_pretrained(bert).get_input_embeddings().weight.detach()
        table[2] = 0  # padding: it stays 0 here, as in BERT
        weight = model.word_encoder.embeddings.weight.detach()
        torch.testing.assert_close(weight, table / table.std(), rtol=1e-5, atol=1e-6)
        assert weight.std() == pytest.approx(1, rel=1e-5)
        assert (model.config.vocab_size, model.config.word_embedding_size, model.config.pad_token_id) == (31, 14, 2)

    @pytest.mark.parametrize("frozen", [True, False])
    def test_frozen_they_stay_bit_identical_and_the_gru_learns(self, bert, frozen, tmp_path):
        sizes = {key: value for key, value in SIZES.items() if key not in ("vocab_size", "word_embedding_size")}
        model = TVRNModel.from_backbones(
            word_embeddings=bert, freeze_word_embeddings=frozen, region_feature_size=29, **sizes | ALL_LOSSES
        )
        before = trained(model, inputs_for(model))
        same = {key: torch.equal(value, model.state_dict()[key]) for key, value in before.items()}
        assert same["word_encoder.embeddings.weight"] is frozen
        assert not same["word_encoder.gru.weight_ih_l0"]
        model.save_pretrained(tmp_path / "saved")
        loaded = TVRNModel.from_pretrained(tmp_path / "saved")
        assert loaded.word_encoder.embeddings.weight.requires_grad is not frozen

    def test_beside_a_text_tower_or_another_size_they_are_refused(self, bert):
        with pytest.raises(ValueError, match="word_embeddings is .*bert.* there is a text tower"):
            TVRNModel.from_backbones(text=bert, word_embeddings=bert, **SIZES)
        with pytest.raises(ValueError, match="word_embedding_size is 300, but that of .*bert.* is 14; leave it out"):
            TVRNModel.from_backbones(word_embeddings=bert, word_embedding_size=300)
