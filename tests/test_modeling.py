"""A pair's score depends on that image and that caption alone, every part has its say, and bad input is refused."""

import pytest
import torch
from model_makers import FEATURES, HEADS, SIZES, VARIANTS, name, one, overlapping_boxes, regions, tiny_model, words
from transformers import BertConfig, MobileNetV2Config

from modeling_tvrn import TVRNConfig, TVRNModel
from modeling_tvrn.losses import (
    contrastive_loss,
    distillation_loss,
    hardest_negative_loss,
    matching_loss,
    positives_cross_entropy,
)
from modeling_tvrn.pair_tvrn import PairStage
from modeling_tvrn.training.phases import NAMES, learns

BERT = {"hidden_size": 22, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 41, "vocab_size": 31}


@torch.no_grad()
def logits(model: TVRNModel, *inputs: dict[str, torch.Tensor], chunk_size: int | None = None) -> torch.Tensor:
    images, texts = inputs
    return model.match(model.encode_images(**images), model.encode_texts(**texts), chunk_size)


@torch.no_grad()
def logits_alone(model: TVRNModel, images: dict[str, torch.Tensor], texts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every pair as a batch of one, nothing padded."""
    counts = len(next(iter(images.values()))), len(next(iter(texts.values())))
    pairs = [
        [model(**one(images, i), **one(texts, k)).logits_per_image for k in range(counts[1])] for i in range(counts[0])
    ]
    return torch.tensor(pairs)


def assert_same(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def spread(inputs: dict[str, torch.Tensor], places: list[int], width: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """The same fragments at other places of longer rows, among large random values that the mask hides."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for key, value in inputs.items():
        shape = (len(value), width, *value.shape[2:])
        if key.endswith("mask"):
            filler = torch.zeros(shape, dtype=value.dtype)
        elif value.is_floating_point():
            filler = torch.rand(shape, generator=generator).to(value.dtype) * (1 if key.endswith("boxes") else 50)
            filler = filler.sort(dim=-1).values if key.endswith("boxes") else filler
        else:
            filler = torch.randint(1, 31, shape, generator=generator)
        filler[:, places] = value
        result[key] = filler
    return result


def reordered(inputs: dict[str, torch.Tensor], order: list[int]) -> dict[str, torch.Tensor]:
    return {key: value[order] for key, value in inputs.items()}


def components_after_a_step(model, images, texts):
    """The logit's components once every weight that has a gradient has moved by as much."""
    model(**images, **texts, return_loss=True).loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight.sub_(weight.grad.sign() * 0.05)
    return components(model, images, texts)


def let_learn(model, trained, kept):
    """Freeze what does not learn in a phase that trains some components beside others that stay."""
    learning = learns(dict(model.named_parameters()), model.config, frozenset(trained), frozenset(kept))
    for key, weight in model.named_parameters():
        weight.requires_grad_(key in learning)


def components(model, images, texts):
    """The summands of a batch's logits."""
    with torch.no_grad():
        return model.score_components(model.encode_images(**images), model.encode_texts(**texts))


def unweighted(model, images, texts):
    """The same without the learned weights."""
    with torch.no_grad():
        return model.unweighted_components(model.encode_images(**images), model.encode_texts(**texts))


class TestAPairIsItself:
    @pytest.mark.parametrize("variant", VARIANTS, ids=name)
    def test_alone_and_in_any_batch(self, variant):
        """Any order, any padding, any chunk size: the logit is that of the pair alone."""
        model, images, texts = tiny_model(**variant), regions(2), words(3)
        alone = logits_alone(model, images, texts)
        assert alone.std(dim=0).min() > 1e-4 and alone.std(dim=1).min() > 1e-4  # equal scores would agree as well
        images = reordered(spread(images, [1, 2, 3, 5, 7, 8, 9], 11), [1, 0])
        texts = reordered(spread(texts, [1, 2, 4, 5, 7, 8], 10), [2, 0, 1])
        for chunk_size in (None, 1, 5):
            assert_same(logits(model, images, texts, chunk_size=chunk_size), alone[[1, 0]][:, [2, 0, 1]])

    @pytest.mark.parametrize("variant", HEADS, ids=name)
    @pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 8, 11, 12, 1000])
    def test_any_chunk_size(self, variant, chunk_size):
        model, images, texts = tiny_model(**variant), regions(3), words(4)
        assert_same(logits(model, images, texts, chunk_size=chunk_size), logits(model, images, texts))

    @pytest.mark.parametrize("variant", HEADS, ids=name)
    def test_any_company(self, variant):
        """In the released code every caption saw image 0 of the batch."""
        model, images, texts = tiny_model(**variant), regions(6), words(7)
        together = logits(model, images, texts)
        for rows, columns in (([5], [6]), ([3, 1], [2]), ([4, 0, 2], [6, 5, 1, 0])):
            part = logits(model, reordered(images, rows), reordered(texts, columns))
            assert_same(part, together[rows][:, columns])

    @pytest.mark.parametrize("variant", HEADS, ids=name)
    def test_more_captions_than_one_chunk_takes(self, variant):
        """Captions are sorted by length into blocks; each keeps its column."""
        model, images, texts = tiny_model(**variant), regions(2, 5), words(41, 7)
        together = logits(model, images, texts)
        for k in (0, 1, 17, 40):
            assert_same(logits(model, images, one(texts, k)), together[:, [k]])

    def test_fragments_in_any_order(self):
        """Regions are a set: with the gate, which reads no sequence, their order is no matter."""
        model, images, texts = tiny_model(), regions(), words()
        order = torch.randperm(7)
        shuffled = {key: value[:, order] for key, value in images.items()}
        assert_same(logits(model, shuffled, texts), logits(model, images, texts))

    def test_a_hub_text_tower(self):
        """Words of a padded batch, some masked out of matching, against the caption alone."""
        model, images = tiny_model(text_config=BertConfig(**BERT)), regions()
        texts = words(4, 7)
        batch = logits(model, images, texts)
        for k, length in enumerate(texts["attention_mask"].sum(dim=1).tolist()):
            short = {key: value[k : k + 1, :length] for key, value in texts.items()}
            assert_same(logits(model, images, short), batch[:, [k]])
        special = texts["word_mask"] < texts["attention_mask"]
        assert special.any(dim=1).all()
        matched = logits(model, images, texts | {"word_mask": texts["attention_mask"]})
        assert (matched - batch).abs().min() > 1e-4

    def test_training_a_tower_with_batch_statistics(self):
        """A BatchNorm in training mode would let each image's regions depend on the batch."""
        tower = MobileNetV2Config(depth_multiplier=0.05, image_size=32, finegrained_output=True)
        sizes = {
            "hidden_size": 12,
            "projection_size": 9,
            "similarity_size": 7,
            "region_feature_size": 1280,
            "vocab_size": 31,
        }
        model = TVRNModel(TVRNConfig(vision_config=tower, dropout=0.0, **sizes))
        pixels, texts = torch.randn(3, 3, 64, 64), words(2, 5)
        for mode in (model.training, True):
            model.train(mode)
            assert model.training
            together = logits(model, {"pixel_values": pixels}, texts)
            alone = torch.cat([logits(model, {"pixel_values": pixel[None]}, texts) for pixel in pixels])
            assert_same(together, alone)


class TestParts:
    """What the released code lost: parts that cancel, and tensors that do not follow their item."""

    @pytest.mark.parametrize("variant", HEADS, ids=name)
    @pytest.mark.parametrize("part", ["use_semantic_alignment", "use_geometric_context", "use_first_stage"])
    def test_a_part_changes_the_score(self, variant, part):
        on, off = tiny_model(**variant), tiny_model(**variant, **{part: False})
        off.load_state_dict(on.state_dict(), strict=False)
        images, texts = regions(), words(4, 9)
        assert (logits(on, images, texts) - logits(off, images, texts)).abs().min() > 1e-5

    @pytest.mark.parametrize("variant", HEADS, ids=name)
    def test_word_saliency_changes_the_score(self, variant, monkeypatch):
        """Even with its axis repaired, the released word saliency is normalised away again."""
        model, images, texts = tiny_model(**variant), regions(), words(4, 9)
        expected = logits(model, images, texts)
        monkeypatch.setattr(
            PairStage, "word_saliency", lambda self, cosine, mask: mask.expand(cosine.shape).to(cosine.dtype)
        )
        assert (logits(model, images, texts) - expected).abs().min() > 1e-5

    @pytest.mark.parametrize("variant", HEADS, ids=name)
    def test_region_saliency_changes_the_score(self, variant):
        model, texts = tiny_model(**variant), words(4, 9)
        with torch.no_grad():
            images, texts = model.encode_images(**regions()), model.encode_texts(**texts)
            expected = model.match(images, texts)
            images.refined_region_saliency = torch.zeros_like(images.refined_region_saliency)
            assert (model.match(images, texts) - expected).abs().min() > 1e-5

    @pytest.mark.parametrize("variant", HEADS, ids=name)
    def test_saliencies_are_not_uniform(self, variant):
        """The released saliencies are all ones: a softmax over an axis of size 1."""
        model = tiny_model(**variant)
        with torch.no_grad():
            images = model.encode_images(**regions())
        saliency = images.refined_region_saliency.exp().masked_fill(~images.refined_region_mask, 0)
        assert_same(saliency.sum(dim=1), torch.ones(3))
        assert all(row[mask].std() > 1e-3 for row, mask in zip(saliency, images.refined_region_mask, strict=True))

    def test_boxes_travel_with_their_image(self):
        """In the released evaluation every block of images has the geometry of the last batch."""
        model, images, texts = tiny_model(), regions(), words(4, 9)
        images["region_mask"][:] = True
        expected = logits(model, images, texts)
        moved = images["region_boxes"].clone()
        moved[1] = overlapping_boxes(7).float()
        changed = (logits(model, images | {"region_boxes": moved}, texts) - expected).abs()
        assert changed[1].min() > 1e-5 and changed[[0, 2]].max() == 0
        together = model.encode_images(**images).select([2, 1])
        assert_same(together.region_boxes, images["region_boxes"][[2, 1]], 0)
        with torch.no_grad():
            assert_same(model.match(together, model.encode_texts(**texts)), expected[[2, 1]])

    @pytest.mark.parametrize("axis", [0, 1])
    def test_positions_tell_an_image_from_its_mirror_image(self, axis):
        """Geometry by overlap alone cannot: mirroring changes no IoU."""
        images, texts = regions(), words(4, 9)
        mirrored = images["region_boxes"].clone()
        mirrored[..., [axis, axis + 2]] = 1 - mirrored[..., [axis + 2, axis]]
        for switch, changes in ((None, False), ("use_box_positions", True), ("use_relative_geometry", True)):
            model = tiny_model(**({} if switch is None else {switch: True}))
            moved = logits(model, images | {"region_boxes": mirrored}, texts) - logits(model, images, texts)
            assert (moved.abs().max() > 1e-3) == changes, switch
            assert changes or moved.abs().max() < 1e-5

    def test_positions_start_as_the_model_without_them(self):
        """So that a finished model can be trained on with positions."""
        images, texts = regions(), words(4, 9)
        torch.manual_seed(0)
        without = TVRNModel(TVRNConfig(**SIZES, region_feature_size=FEATURES)).eval()
        switches = {"use_box_positions": True, "use_relative_geometry": True}
        added = TVRNModel(TVRNConfig(**SIZES, **switches, region_feature_size=FEATURES)).eval()
        missing = added.load_state_dict(without.state_dict(), strict=False).missing_keys
        assert {name.rsplit(".", 2)[0] for name in missing} == {"box_embedding", "geometry.relation"}
        assert_same(logits(added, images, texts), logits(without, images, texts), 0)

    def test_positions_need_boxes(self):
        model = tiny_model(use_geometric_context=False, use_box_positions=True)
        with pytest.raises(ValueError, match="without region_boxes, which this model reads"):
            model.encode_images(region_features=regions()["region_features"])
        with pytest.raises(ValueError, match="use_relative_geometry is True, but use_geometric_context"):
            TVRNConfig(use_relative_geometry=True, use_geometric_context=False)

    def test_a_caption_is_refined_by_the_image_it_is_scored_with(self):
        """Changing one image moves its own row alone, and moves every score of it."""
        model, images, texts = tiny_model(use_first_stage=False), regions(), words(4, 9)
        expected = logits(model, images, texts)
        images["region_features"][0] += 1
        changed = (logits(model, images, texts) - expected).abs()
        assert changed[0].min() > 1e-5 and changed[1:].max() == 0


class TestOutput:
    def test_shapes_and_relations(self):
        model, images, texts = tiny_model(), regions(3), words(5)
        output = model(**images, **texts)
        assert output.loss is None and output.loss_parts is None
        assert output.logits_per_image.shape == (3, 5) and output.logits_per_image.dtype == torch.float32
        assert torch.equal(output.logits_per_text, output.logits_per_image.T)
        for embeds, count in ((output.image_embeds, 3), (output.text_embeds, 5)):
            assert embeds.shape == (count, 23)
            assert_same(embeds.norm(dim=1), torch.ones(count))

    def test_features_as_in_clip(self):
        model, images, texts = tiny_model(), regions(3), words(5)
        output = model(**images, **texts)
        assert_same(model.get_image_features(**images).pooler_output, output.image_embeds, 0)
        assert_same(model.get_text_features(**texts).pooler_output, output.text_embeds, 0)
        assert model.get_image_features(**images, level="full").last_hidden_state.shape == (3, 7, 37)

    def test_the_loss_is_the_weighted_sum_of_its_parts(self):
        weights = {"matching": 0.5, "pair_contrastive": 0.25, "contrastive": 2.0, "hardest_negative": 1.5}
        weights |= {"late_interaction": 0.75, "distillation": 0.6}
        keys = {f"{key}_loss_weight": value for key, value in weights.items()}
        model = tiny_model(**keys, distillation_temperature=3.0)
        images, texts = regions(3), words(4)
        ids = (torch.tensor([4, 9, 4]), torch.tensor([9, 4, 4, 9]))
        output = model(**images, **texts, image_ids=ids[0], text_image_ids=ids[1], return_loss=True)
        raw, logits = unweighted(model, images, texts), output.logits_per_image
        scores = raw["reasoning"].sigmoid()
        parts = {
            "matching": matching_loss(scores, *ids, margin=0.2, temperature=0.05),
            "pair_contrastive": positives_cross_entropy(raw["reasoning"], *ids),
            "contrastive": contrastive_loss(output.image_embeds, output.text_embeds, model.logit_scale, *ids),
            "hardest_negative": hardest_negative_loss(scores, *ids, margin=0.2),
            "late_interaction": positives_cross_entropy(raw["late_interaction"], *ids),
            "distillation": distillation_loss(output.image_embeds, output.text_embeds, model.logit_scale, logits, 3.0),
            "component_weights": positives_cross_entropy(logits, *ids),
        }
        assert set(output.loss_parts) == set(parts)
        for key, part in parts.items():
            assert_same(output.loss_parts[key], part, 1e-6)
        assert_same(output.loss, sum(weights.get(key, 1.0) * part for key, part in parts.items()), 1e-5)

    def test_the_logits_are_the_sum_of_their_components(self):
        """What explains a score is the score; each component comes with the weight that the model has learned."""
        model, images, texts = tiny_model(), regions(3), words(4)
        summands, raw = components(model, images, texts), unweighted(model, images, texts)
        assert list(summands) == ["first_stage", "late_interaction", "reasoning"]
        assert min(summand.std() for summand in summands.values()) > 1e-4
        output = model(**images, **texts)
        cosine = output.image_embeds @ output.text_embeds.T
        assert_same(summands["first_stage"], model.logit_scale.exp() * cosine)
        for key in ("late_interaction", "reasoning"):
            assert_same(summands[key], getattr(model.pair, f"{key}_weight") * raw[key])
        assert_same(sum(summands.values()), output.logits_per_image)
        without = model(**images, **texts, level="late_interaction").logits_per_image
        assert_same(without, output.logits_per_image - summands["reasoning"])

    def test_each_component_learns_by_its_own_losses_and_the_weights_by_the_sum(self):
        """Trained on the sum, the reasoning would learn what the other components leave of the training set."""
        losses = {"matching_loss_weight": 0.0, "contrastive_loss_weight": 0.0, "late_interaction_loss_weight": 0.0}
        model = tiny_model(pair_contrastive_loss_weight=1.0, use_refined_features=False, **losses)
        images, texts, rows = regions(4), words(4), torch.arange(4)
        output = model(**images, **texts, return_loss=True)
        own = positives_cross_entropy(unweighted(model, images, texts)["reasoning"], rows, rows)
        assert_same(output.loss_parts["pair_contrastive"], own)
        assert_same(output.loss, own + positives_cross_entropy(output.logits_per_image, rows, rows))
        output.loss.backward()
        moved = {key for key, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
        assert {"pair.late_interaction_weight", "pair.reasoning_weight", "pair.head.logit.weight"} <= moved
        assert not {"logit_scale", "pair.late_interaction_scale", "pooled_image_embedding.linear.weight"} & moved

    def test_a_component_alone_has_no_weight(self):
        names = ("use_first_stage", "use_late_interaction", "use_reasoning")
        for kept in names:
            model = tiny_model(**{key: key == kept for key in names})
            assert not [key for key in model.state_dict() if key.endswith(("interaction_weight", "reasoning_weight"))]
            images, texts = regions(3), words(4)
            [alone] = components(model, images, texts).values()
            assert_same(alone, model(**images, **texts).logits_per_image, 0)

    @pytest.mark.parametrize("level", ["embeddings", "late_interaction"])
    def test_a_level_that_holds_no_component_of_the_score_is_refused(self, level):
        model = tiny_model(use_first_stage=False, use_late_interaction=False)
        with pytest.raises(ValueError, match=r"\['reasoning'\] alone; use level='full'"):
            model(**regions(3), **words(3), level=level)

    @pytest.mark.parametrize("variant", [*HEADS, {"use_refined_features": False}], ids=name)
    def test_embeddings_and_late_interaction_stay_while_the_reasoning_learns(self, variant):
        """What an earlier phase trained must not drift with the reasoning; what it counts for in the sum may."""
        model, images, texts = tiny_model(**variant), regions(4), words(4)
        before = unweighted(model, images, texts)
        let_learn(model, {"reasoning"}, {"embeddings", "late_interaction"})
        components_after_a_step(model, images, texts)
        after = unweighted(model, images, texts)
        assert_same(after["late_interaction"], before["late_interaction"], 0)
        assert_same(after["first_stage"], before["first_stage"], 0)
        assert (after["reasoning"] - before["reasoning"]).abs().max() > 1e-3
        learning = {key.split(".")[0] for key, weight in model.named_parameters() if weight.requires_grad}
        own = {"pair"} if variant.get("refinement") == "gru" else {"textual_refinement", "pair"}
        refined = {"attention", "geometry", "visual_refinement", "image_pooling", "textual_refinement"}
        assert learning == (own if model.config.use_refined_features else {"pair"} | refined)

    @pytest.mark.parametrize("variant", [{}, {"use_refined_features": False}], ids=name)
    def test_tokens_that_are_learned_from_stay_while_the_embeddings_learn(self, variant):
        model, images, texts = tiny_model(**variant), regions(4), words(4)
        before = components(model, images, texts)
        let_learn(model, {"embeddings"}, {"late_interaction"})
        after = components_after_a_step(model, images, texts)
        assert_same(after["late_interaction"], before["late_interaction"], 0)
        assert (after["first_stage"] - before["first_stage"]).abs().max() > 1e-3

    @pytest.mark.parametrize("refined", [True, False])
    @pytest.mark.parametrize("heads", [True, False])
    def test_every_weight_has_readers(self, refined, heads):
        """A weight that the table lacks would stay as it was drawn."""
        switches = {"use_refined_features": refined, "use_unimodal_heads": heads}
        parts = {row.component for row in NAMES.values()}
        for model in (tiny_model(**switches), tiny_model(refinement="gru")):
            named = [key for key, _ in model.named_parameters()]
            alone = [learns(named, model.config, frozenset({part}), frozenset()) for part in sorted(parts)]
            assert set().union(*alone) == set(named) == learns(named, model.config, frozenset(parts), frozenset())

    def test_text_k_belongs_to_image_k_unless_ids_say_otherwise(self):
        model, images, texts = tiny_model(), regions(4), words(4)
        default = model(**images, **texts, return_loss=True).loss
        rows = torch.arange(4)
        assert_same(model(**images, **texts, image_ids=rows, text_image_ids=rows, return_loss=True).loss, default, 0)
        other = model(**images, **texts, image_ids=rows, text_image_ids=rows.flip(0), return_loss=True).loss
        assert (other - default).abs() > 1e-3
