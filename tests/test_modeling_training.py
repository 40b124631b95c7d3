"""Training and precision: gradients everywhere, memory bounded by the chunk, no loop over items, bfloat16, compile."""

import shutil
import weakref

import pytest
import torch
from model_makers import FEATURES, HEADS, SIZES, VARIANTS, name, regions, tiny_model, words
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, ViTConfig

from modeling_tvrn import TVRNConfig, TVRNModel

ALL_LOSSES = {
    "matching_loss_weight": 1.0,
    "pair_contrastive_loss_weight": 1.0,
    "contrastive_loss_weight": 1.0,
    "hardest_negative_loss_weight": 1.0,
}
MATCHED = [variant for variant in VARIANTS if variant["use_first_stage"]]
LAYERS = {"hidden_size": 14, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 19}


def new_model(**settings) -> TVRNModel:
    """As `TVRNModel` makes it, in training mode."""
    return TVRNModel(TVRNConfig(**{"region_feature_size": FEATURES} | SIZES | ALL_LOSSES | settings)).train()


def gradients(model: TVRNModel, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs, return_loss=True).loss.backward()
    return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}


class Recorder(TorchDispatchMode):
    """Counts operators, and the bytes of tensors made while it watches: alive now, at most, and the largest one."""

    def __init__(self):
        super().__init__()
        self.operators, self.alive, self.peak, self.largest = 0, 0, 0, 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operators += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not self.known(tensor.untyped_storage(), args):
                self.add(tensor.untyped_storage())
        return result

    def known(self, storage, args) -> bool:
        if storage in self.seen:
            return True
        inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
        return storage.data_ptr() in inputs

    def add(self, storage) -> None:
        size = storage.nbytes()
        self.seen.add(storage)
        self.alive += size
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
        weakref.finalize(storage, self.drop, size)

    def drop(self, size: int) -> None:
        self.alive -= size


class TestGradients:
    @pytest.mark.slow
    @pytest.mark.parametrize("variant", [*MATCHED, {"use_first_stage": False}], ids=name)
    def test_every_loss_together_reaches_every_parameter(self, variant):
        """A part that has no influence on the score, or is not owned by the model, would stay as it was drawn."""
        model = new_model(**variant)
        found = gradients(model, **regions(4), **words(4))
        assert found.keys() == dict(model.named_parameters()).keys()
        # Layers in front of one that starts at 0 learn from the second step on.
        behind = ("box_embedding.0.", "geometry.relation.0.")
        assert [k for k, value in found.items() if value.abs().max() == 0 and not k.startswith(behind)] == []

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", HEADS, ids=name)
    @pytest.mark.parametrize("chunk_size", [1, 6])
    def test_chunks_give_the_gradients_of_one(self, variant, chunk_size):
        """Each chunk is recomputed in the backward pass; its parameters' gradients add up."""
        model, inputs = tiny_model(**variant, **ALL_LOSSES).double(), regions(4, dtype=torch.float64) | words(5)
        inputs |= {"image_ids": torch.arange(4), "text_image_ids": torch.tensor([3, 1, 2, 0, 1])}
        whole = gradients(model, **inputs)
        for checkpointed in (True, False):
            model.config.pair_chunk_size, model.config.checkpoint_pair_chunks = chunk_size, checkpointed
            torch.testing.assert_close(gradients(model, **inputs), whole, rtol=0, atol=1e-10)

    # Called by the name that every supported transformers knows; later ones have another.
    @pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
    def test_gradient_checkpointing(self):
        """Towers and pair stage recompute; what they compute stays the same, also where only the tower is frozen."""
        towers = {
            "vision_config": ViTConfig(**LAYERS, image_size=24, patch_size=8),
            "text_config": BertConfig(**LAYERS, vocab_size=31),
        }
        for frozen in (False, True):
            model = tiny_model(**towers, **ALL_LOSSES, region_feature_size=14, freeze_vision=frozen, dropout=0.0)
            inputs = {"pixel_values": torch.randn(3, 3, 24, 24)} | words(3)
            model.train()
            for tower in (model.vision_model, model.text_model):
                for module in tower.modules():
                    if isinstance(module, torch.nn.Dropout):
                        module.p = 0.0
                tower.config.attention_probs_dropout_prob = 0.0
            whole = gradients(model, **inputs)
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
            torch.testing.assert_close(gradients(model, **inputs), whole, rtol=0, atol=1e-5)
            model.gradient_checkpointing_disable()
            assert not model.is_gradient_checkpointing


class TestPairStageCost:
    def encoded(self, model: TVRNModel, images: int, texts: int, length: int = 6):
        with torch.no_grad():
            sides = model.encode_images(**regions(images)), model.encode_texts(**words(texts, length))
        for side in sides:
            for value in side.tensors().values():
                value.requires_grad_(value.is_floating_point())
        return sides

    def peak(self, model: TVRNModel, images: int, texts: int, chunk_size: int, train: bool) -> Recorder:
        sides = self.encoded(model, images, texts)
        with torch.set_grad_enabled(train), Recorder() as recorder:
            total = model.match(*sides, chunk_size=chunk_size).sum()
            if train:
                total.backward()
        return recorder

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", HEADS, ids=name)
    @pytest.mark.parametrize("train", [False, True])
    def test_memory_is_bounded_by_the_chunk(self, variant, train):
        """Sixteen times the pairs at the same chunk size: no tensor grows beyond the inputs', and hardly the sum of
        all that are alive; without chunks both do."""
        model = tiny_model(**variant, **{"hidden_size": 16, "similarity_size": 64})
        small, large = (self.peak(model, 5 * k, 5 * k, chunk_size=25, train=train) for k in (1, 4))
        whole = self.peak(model, 20, 20, chunk_size=20 * 20, train=train)
        assert large.largest <= 2 * small.largest
        # Gradients of the inputs grow with the items, not with the pairs; all logits are 4 bytes a pair.
        assert large.peak < 2.5 * small.peak
        assert whole.largest > 8 * small.largest
        assert whole.peak > 8 * small.peak

    @pytest.mark.slow
    @pytest.mark.parametrize("variant", MATCHED, ids=name)
    def test_no_loop_over_captions_or_images(self, variant):
        """The same operators, whatever the number of items in the chunk."""
        model, counts = tiny_model(**variant), []
        for images, texts in ((2, 4), (5, 4), (2, 11), (7, 13)):  # the GRU walks the longest caption: the same
            sides = self.encoded(model, images, texts)
            with torch.no_grad(), Recorder() as recorder:
                model.match(*sides, chunk_size=1000)
            counts.append(recorder.operators)
        assert len(set(counts)) == 1, counts

    def test_few_chunks_for_many_captions(self):
        """Operators follow the pairs divided by the chunk size, not the items."""
        model, counts = tiny_model(), []
        for images, texts, chunk_size in ((4, 32, 128), (8, 64, 128), (16, 64, 512)):
            sides = self.encoded(model, images, texts)
            with torch.no_grad(), Recorder() as recorder:
                model.match(*sides, chunk_size=chunk_size)
            counts.append(recorder.operators)
        assert counts[1] < 4.2 * counts[0] and counts[2] < 2.2 * counts[0]


class TestPrecision:
    @pytest.mark.slow
    @pytest.mark.parametrize("variant", MATCHED, ids=name)
    @pytest.mark.parametrize("way", ["autocast", "weights"])
    def test_bfloat16_is_close_to_float32(self, variant, way):
        """Rounding of 3 significant digits, and no more: no overflow, no softmax or norm in half precision."""
        model, inputs = tiny_model(**variant), regions(5) | words(6)
        with torch.no_grad():
            expected = model(**inputs)
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
                output = (model.bfloat16() if way == "weights" else model)(**inputs)
        assert output.logits_per_image.dtype == torch.float32
        error = output.logits_per_image - expected.logits_per_image
        assert error.abs().max() < 0.15 * expected.logits_per_image.std() + 0.05
        for ours, exact in ((output.image_embeds, expected.image_embeds), (output.text_embeds, expected.text_embeds)):
            assert (ours.float() - exact).norm(dim=1).max() < 0.03

    def test_cosines_keep_their_precision_under_autocast(self):
        """A cosine in bfloat16 has steps of 1/256: it would tie what the embeddings tell apart."""
        model = tiny_model(use_first_stage=True)
        with torch.no_grad():
            images, texts = model.encode_images(**regions(5)), model.encode_texts(**words(6))
            scores = {}
            for scale in (0.0, 1000.0):
                model.logit_scale.fill_(scale).log_()
                with torch.autocast("cpu", torch.bfloat16):
                    scores[scale] = model.match(images, texts)
        cosine = (scores[1000.0] - scores[0.0]) / 1000
        torch.testing.assert_close(cosine, images.embeds @ texts.embeds.T, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("variant", HEADS, ids=name)
    def test_training_under_autocast(self, variant):
        """Gradients are finite and point where those of float32 do."""
        # The reasoning of a new model scores every pair alike: which negative is hardest, and a softmax of differences
        # twenty times as steep, would show rounding alone.
        smooth = {"hardest_negative_loss_weight": 0.0, "matching_temperature": 1.0, "dropout": 0.0}
        model, inputs = new_model(**variant, **smooth), regions(6) | words(6, 12)
        exact = gradients(model, **inputs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = gradients(model, **inputs)
        flat = [torch.cat([value.flatten().float() for value in side.values()]) for side in (exact, rough)]
        assert flat[1].isfinite().all()
        assert torch.cosine_similarity(*flat, dim=0) > 0.95


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("variant", [HEADS[1], HEADS[2]], ids=name)
def test_compiled_pair_stage(variant):
    """The pair stage compiles, with the gate as one graph, and gives the same scores, at other sizes as well."""
    model = tiny_model(**variant)
    sides = [(regions(3), words(4)), (regions(5), words(3, 8))]
    with torch.no_grad():
        sides = [(model.encode_images(**images), model.encode_texts(**texts)) for images, texts in sides]
        expected = [model.match(*side) for side in sides]
        model.pair.compile(fullgraph=variant["refinement"] == "gate")  # dynamo does not trace an nn.GRU
        for side, logits in zip(sides, expected, strict=True):
            torch.testing.assert_close(model.match(*side), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dropout", "pooled", "drops"), [(0.5, None, True), (0.5, 0.0, False), (0.0, 0.5, True)])
def test_the_embeddings_have_a_dropout_of_their_own(dropout, pooled, drops):
    model = new_model(use_refined_features=False, dropout=dropout, pooled_dropout=pooled)
    inputs = regions() | words(3)
    first, second = model(**inputs), model(**inputs)
    for side in ("image_embeds", "text_embeds"):
        assert torch.equal(first[side], second[side]) is not drops
