"""The pieces of the training loop, each against a plain rendering of what it promises."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from training_makers import TINY_BERT

from modeling_tvrn import TVRNConfig, TVRNModel
from modeling_tvrn.training import TrainingConfig
from modeling_tvrn.training.batches import CaptionBatches, phases
from modeling_tvrn.training.divergence import PATIENCE, DivergenceGuard, TrainingStopped
from modeling_tvrn.training.objective import Objective, Sides, drop_valid
from modeling_tvrn.training.optim import WeightAverage, make_optimizer, parameter_groups, rate_factor
from modeling_tvrn.training.phases import PhaseConfig

BERT = {**TINY_BERT, "vocab_size": 40}
CAPTIONS = ["a red dog runs", "two cats", "one large green bird on a tree", "the dog sleeps near two cats"]


def tiny_model(**fields) -> TVRNModel:
    sizes = {"hidden_size": 10, "projection_size": 7, "similarity_size": 6, "region_feature_size": 5, "vocab_size": 40}
    return TVRNModel(TVRNConfig(**{**sizes, **fields}))


def tiny_batch() -> dict[str, torch.Tensor]:
    low = torch.rand(3, 4, 2) / 2
    return {
        "region_features": torch.randn(3, 4, 5),
        "region_boxes": torch.cat([low, low + 0.3], dim=-1),
        "region_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool(),
        "input_ids": torch.randint(2, 40, (4, 6)),
        "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5, [1] * 5 + [0]]),
        "word_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5, [1] * 5 + [0]]),
        "image_ids": torch.tensor([5, 2, 9]),
        "text_image_ids": torch.tensor([5, 2, 9, 5]),
    }


# -- batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "together"), [(4, 1), (7, 1), (6, 2), (10, 5), (60, 1)])
def test_every_caption_comes_once_an_epoch_whatever_the_batch_size(batch_size: int, together: int) -> None:
    rows = np.repeat(np.arange(11), [5, 3, 1, 4, 2, 5, 5, 2, 1, 3, 4])
    batches = CaptionBatches(rows, batch_size, together, seed=3)
    seen = list(batches)
    assert sorted(row for batch in seen for row in batch) == list(range(len(rows)))
    assert len(seen) == len(batches)
    assert all(2 <= len(batch) <= batch_size + 1 for batch in seen)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    rows = np.repeat(np.arange(20), 5)
    batches, again = CaptionBatches(rows, 8, seed=1), CaptionBatches(rows, 8, seed=1)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    again.set_epoch(1)
    assert first != second and list(again) == second
    assert list(CaptionBatches(rows, 8, seed=2)) != first


def test_captions_of_an_image_stay_together_and_groups_are_shuffled() -> None:
    rows = np.repeat(np.arange(30), 5)
    order = CaptionBatches(rows, 8, captions_per_image=2, seed=0).order()
    images = rows[order]
    runs = np.split(images, np.flatnonzero(np.diff(images)) + 1)
    # two groups of one image may meet by chance; most runs are the pairs and the odd fifth caption
    assert np.mean([len(run) <= 2 for run in runs]) > 0.8
    assert sum(len(run) == 2 for run in runs) > 40
    assert images.tolist() != sorted(images.tolist())


def test_a_single_left_over_caption_joins_the_batch_before_it() -> None:
    assert [len(batch) for batch in CaptionBatches(range(9), 4)] == [4, 5]
    assert [len(batch) for batch in CaptionBatches(range(10), 4)] == [4, 4, 2]
    with pytest.raises(ValueError, match="1 captions to train on"):
        CaptionBatches([0], 4)


# -- dropping words and regions --------------------------------------------------------------------------


def test_dropping_keeps_one_valid_position_and_never_adds_one() -> None:
    mask = torch.arange(9) < torch.arange(1, 9).repeat_interleave(400)[:, None]
    for probability in (0.3, 0.999):
        kept = drop_valid(mask.long(), probability)
        assert kept.dtype == torch.int64
        assert not (kept.bool() & ~mask).any()
        assert (kept.sum(dim=1) >= 1).all()
    share = drop_valid(mask, 0.3)[mask.sum(dim=1) == 8].sum(dim=1).float().mean() / 8
    assert abs(share - 0.7) < 0.03


def test_the_objective_drops_while_training_only() -> None:
    model = tiny_model(dropout=0.0)
    objective, batch = Objective(model, word_dropout=0.8, region_dropout=0.8), tiny_batch()
    plain = model.eval()(**batch, return_loss=True)
    objective.eval()
    assert torch.equal(objective(batch)["logits"], plain.logits_per_image)
    objective.train()
    assert not torch.allclose(objective(batch)["logits"], plain.logits_per_image)


def objective_of(model: Any, *train: str, **dropouts: float) -> Objective:
    objective = Objective(model)
    objective.enter(PhaseConfig(train=list(train), epochs=1, **dropouts))
    return objective


def test_the_embeddings_are_trained_without_the_pair_stage() -> None:
    model = tiny_model(dropout=0.0)
    output = objective_of(model, "embeddings")(tiny_batch())
    output["loss"].backward()
    assert output["logits"] is None and list(output["parts"]) == ["contrastive"]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is None for name, gradient in gradients.items() if name.startswith("pair."))
    assert gradients["image_embedding.weight"].abs().sum() > 0 and gradients["logit_scale"].abs().sum() > 0
    everything = Objective(model)(tiny_batch())
    assert {"matching", "contrastive"} <= set(everything["parts"])


def test_the_late_interaction_is_trained_without_the_reasoning() -> None:
    model = tiny_model(dropout=0.0)
    output = objective_of(model, "embeddings", "late_interaction")(tiny_batch())
    output["loss"].backward()
    assert set(output["parts"]) == {"contrastive", "late_interaction", "component_weights"}
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    late = {"pair.late_interaction_scale", "pair.late_interaction_weight"}
    assert {"region_projection.weight", "logit_scale", *late} <= reached
    assert not {name for name in reached if name.startswith(("pair.head", "pair.local_similarity", "pair.reasoning"))}
    alone = set(objective_of(model, "late_interaction")(tiny_batch())["parts"])
    assert alone == {"late_interaction", "component_weights"}


def test_the_embeddings_learn_from_a_late_interaction_that_stays() -> None:
    """What they learn from sees every region and word, without dropout; they see what the step leaves them."""
    weights = {"distillation_loss_weight": 2.0, "contrastive_loss_weight": 0.0, "distillation_temperature": 3.0}
    model, batch = tiny_model(use_refined_features=False, dropout=0.4, **weights), tiny_batch()
    distilled = objective_of(model, "distilled_embeddings", word_dropout=0.5, region_dropout=0.5).train()
    sides = Sides.of(batch)
    images, texts = distilled.encode_images(sides.images), distilled.encode_texts(sides.texts)
    assert distilled.training and model.training and model.text_pooling.training
    assert images.embeds.requires_grad and not images.regions.requires_grad and not texts.words.requires_grad
    level = "late_interaction"
    found = model.score_components(images, texts, level=level)
    model.eval()
    whole = model.encode_images(**sides.images, level=level), model.encode_texts(**sides.texts, level=level)
    expected = model.score_components(*whole, level=level)
    torch.testing.assert_close(found["late_interaction"], expected["late_interaction"])
    assert not torch.allclose(found["first_stage"], expected["first_stage"])
    distilled.train()(batch)["loss"].backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {"pooled_image_embedding.linear.weight", "logit_scale"} <= reached
    own = {name for name in reached if name.startswith("pair.") or "pooling" in name}
    assert own == {"pair.late_interaction_weight"}  # of a logit whose first stage changes


def test_what_a_phase_leaves_out_comes_from_the_run() -> None:
    given = [
        {"train": "embeddings", "epochs": 2, "batch_size": 8},
        {"train": "late_interaction", "steps": 3, "learning_rate": 2e-3, "warmup_ratio": 0.5},
        {"train": "all", "epochs": 1, "region_dropout": 0.2},
    ]
    config = TrainingConfig(learning_rate=1e-3, batch_size=4, region_dropout=0.1, word_dropout=0.3, phases=given,
                            model={"use_refined_features": False})  # fmt: skip
    found = phases(config, [0, 0, 1, 1, 2, 2, 3, 3, 4])
    assert [phase.steps for phase in found] == [2 * 1, 3, 2]  # nine captions: one left over joins the others
    assert [phase.batches.batch_size for phase in found] == [8, 4, 4]
    assert [phase.rate for phase in found] == [1.0, 2.0, 1.0]
    assert [phase.config.warmup_ratio for phase in found] == [0.05, 0.5, 0.05]
    assert [phase.config.region_dropout for phase in found] == [0.1, 0.1, 0.2]
    assert {phase.config.word_dropout for phase in found} == {0.3}
    assert [set(phase.kept) for phase in found] == [set(), {"embeddings"}, set()]
    [alone] = phases(TrainingConfig(max_steps=7), [0, 0, 1, 1])
    assert alone.config.train == ["all"] and alone.steps == 7
    assert [phase.config.epochs for phase in phases(TrainingConfig(), [0, 0, 1, 1])] == [10]


def test_the_reported_matching_loss_stands_above_its_floor() -> None:
    model, batch = tiny_model(dropout=0.0).eval(), tiny_batch()
    raw = model(**batch, return_loss=True).loss_parts["matching"]
    # image 5 has two of the four captions, the others one; a caption has two negatives of three images
    floor = (math.log1p(2) + 2 * math.log1p(3)) / 3 + math.log1p(2)
    assert Objective(model).eval()(batch)["parts"]["matching"].item() == pytest.approx(raw.item() - floor, abs=1e-5)


# -- optimizer -------------------------------------------------------------------------------------------


def test_towers_and_new_parts_have_their_own_rates_and_only_matrices_decay() -> None:
    model = tiny_model(text_config=BERT)
    config = TrainingConfig(learning_rate=0.1, tower_learning_rate=0.01, weight_decay=0.5)
    found = {id(weight): group for group in parameter_groups(model, config) for weight in group["params"]}
    assert len(found) == sum(1 for _ in model.parameters())
    for name, weight in model.named_parameters():
        group = found[id(weight)]
        assert group["lr"] == (0.01 if name.startswith("text_model.") else 0.1), name
        decays = not (name.endswith("bias") or "norm" in name.lower() or weight.ndim < 2)
        assert group["weight_decay"] == (0.5 if decays else 0.0), name
    assert found[id(model.logit_scale)]["weight_decay"] == 0.0


def test_a_frozen_tower_is_not_given_to_the_optimizer() -> None:
    model = tiny_model(text_config=BERT, freeze_text=True)
    trained = {
        id(weight) for group in make_optimizer(model, TrainingConfig()).param_groups for weight in group["params"]
    }
    for name, weight in model.named_parameters():
        assert (id(weight) in trained) is not name.startswith("text_model."), name


def test_the_rate_rises_linearly_and_falls_as_configured() -> None:
    cosine = TrainingConfig(warmup_ratio=0.1)
    factors = [rate_factor(step, 100, 25, cosine) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 90) for step in range(90)])
    steps = TrainingConfig(warmup_ratio=0.0, scheduler="step", decay_epochs=[1, 3], decay_factor=0.5)
    assert [rate_factor(step, 100, 25, steps) for step in (0, 24, 25, 74, 75, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    constant = TrainingConfig(warmup_ratio=0.0, scheduler="constant")
    assert {rate_factor(step, 100, 25, constant) for step in range(100)} == {1.0}


def test_the_mean_of_weights_follows_and_is_exchanged_for_a_while() -> None:
    layer, frozen = nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False)
    model = nn.Sequential(layer, frozen)
    average = WeightAverage(model, decay=0.9)
    expected = layer.weight.detach().double().clone()
    for step in range(1, 40):
        with torch.no_grad():
            layer.weight += torch.randn(2, 3)
        average.update()
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    own, other = layer.weight.detach().clone(), frozen.weight.clone()
    with average.applied():
        torch.testing.assert_close(layer.weight.detach().double(), expected, atol=1e-5, rtol=0)
        assert torch.equal(frozen.weight, other)
    assert torch.equal(layer.weight, own)


# -- watching --------------------------------------------------------------------------------------------


def see(
    guard: DivergenceGuard, step: int, loss: float = 1.0, norm: float = 1.0, logits: torch.Tensor | None = None
) -> None:
    rows = torch.tensor([2, 0])
    guard.see(step, rows, torch.tensor(loss), {"matching": torch.tensor(loss)}, torch.tensor(norm), logits)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": math.nan}, "the loss is nan at step 7; parts: matching nan; images of the batch: 'c', 'a'"),
        ({"loss": math.inf}, "the loss is inf at step 7"),
        ({"norm": math.nan}, r"the gradient's norm is nan \(loss 1\) at step 7"),
    ],
)
def test_a_loss_or_gradient_that_is_no_number_stops_with_step_and_images(values: dict, message: str) -> None:
    guard = DivergenceGuard(["a", "b", "c"])
    see(guard, 6)
    see(guard, 7, **values)
    with pytest.raises(TrainingStopped, match=message):
        guard.check()


def test_scores_that_stay_all_the_same_stop_the_run_and_one_such_batch_does_not() -> None:
    guard, same, spread = DivergenceGuard(["a", "b", "c"]), torch.full((3, 4), 0.7), torch.randn(3, 4)
    for step in range(PATIENCE - 1):
        see(guard, step, logits=same)
    see(guard, PATIENCE, logits=spread)
    for step in range(PATIENCE):
        see(guard, 100 + step, logits=same)
    with pytest.raises(TrainingStopped, match=f"collapsed.*Seen at step {99 + PATIENCE} .*'c', 'a'"):
        guard.check()


def test_logits_far_from_zero_are_no_collapse() -> None:
    """A pretrained dual encoder's are about 25, where every sigmoid is 1."""
    guard = DivergenceGuard(["a", "b", "c"])
    for step in range(2 * PATIENCE):
        see(guard, step, logits=25.0 + 2.0 * torch.randn(3, 4))
    guard.check()
