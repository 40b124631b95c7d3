"""Training with CUSA: the right teachers' vectors beside each caption, the right similarities under soft labels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_makers import write_cache, write_caches
from training_makers import Processes, tiny_config, write_scan

from modeling_tvrn import TVRNModel
from modeling_tvrn.data import CaptionStream, load_pairs
from modeling_tvrn.losses import CUSA
from modeling_tvrn.teachers import StaleStoreError, TeacherCache
from modeling_tvrn.training import TrainingConfig, train
from modeling_tvrn.training.cusa import TeacherCollator
from modeling_tvrn.training.distributed import processes
from modeling_tvrn.training.loop import Training
from modeling_tvrn.training.phases import PhaseConfig

STILL = {"dropout": 0.0, "image_dropout": 0.0, "text_dropout": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan"))


@pytest.fixture(scope="module")
def caches(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_caches(tmp_path_factory.mktemp("caches"), load_pairs(data, "train", captions_per_image=2))


def config(data: Path, caches: dict[str, str], output: Path, **keys: Any) -> TrainingConfig:
    return tiny_config(data, output, **{"cusa": True, **caches, "cusa_teacher_temperature": 0.2, **keys})


def test_each_caption_comes_with_its_own_teachers_vectors(data: Path, caches: dict, tmp_path: Path) -> None:
    run = Training(config(data, caches, tmp_path, batch_captions_per_image=2))
    images, texts = run.collator.image_teacher, run.collator.text_teacher
    seen = 0
    for batch in run.loaders[0]:
        for row, number in enumerate(batch["teacher_ids"].tolist()):
            record = run.train_records[number]
            expected = images[[record["image_id"]]][0]
            torch.testing.assert_close(batch["teacher_image_embeds"][row], expected, atol=0, rtol=0)
            own = texts[record["caption_ids"]]
            assert (own == batch["teacher_text_embeds"][row]).all(dim=1).sum() == 1
        assert torch.equal(batch["teacher_ids"], batch["text_image_ids"])
        assert len(batch["image_ids"]) < len(batch["teacher_ids"])  # an image that is there twice has two rows
        assert len(torch.unique(batch["teacher_text_embeds"], dim=0)) == len(batch["teacher_ids"])
        seen += len(batch["teacher_ids"])
    assert seen == 28


NAMED = [["embeddings"], ["embeddings", "late_interaction"], ["distilled_embeddings"], ["all"]]


@pytest.mark.parametrize("train", NAMED, ids=" ".join)
def test_what_gets_soft_labels_in_each_phase(data: Path, caches: dict, tmp_path: Path, train: list[str]) -> None:
    """The embeddings' cosines always, late interaction without its scale, and the reasoning's own score: whatever the
    weights of these components in the logit."""
    model = {**STILL, "component_weight_init_value": 2.0, "late_interaction_scale_init_value": 1.5}
    run = Training(config(data, caches, tmp_path, batch_captions_per_image=2, cusa_alpha=0.6, model=model))
    batch = next(iter(run.loaders[0]))
    with torch.no_grad():  # dissimilar on purpose: at their start the three are alike
        for number, cusa in enumerate((run.cusa.embeddings, *run.cusa.others.values())):
            cusa.student_temperature.fill_(0.2 + 0.15 * number)
    run.objective.enter(PhaseConfig(train=train, epochs=1))
    output = run.objective(batch)
    own = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
    plain = run.objective
    plain.cusa, kept = None, plain.cusa
    without = plain(own)
    plain.cusa = kept
    text = ("input_ids", "attention_mask", "word_mask")
    images = run.model.encode_images(**{k: v for k, v in own.items() if "region" in k})
    texts = run.model.encode_texts(**{k: v for k, v in own.items() if k in text})
    rows = [own["image_ids"].tolist().index(number) for number in own["text_image_ids"].tolist()]
    teachers = batch["teacher_image_embeds"].float(), batch["teacher_text_embeds"].float()
    heads = run.model.unimodal_image_embeds(images.embeds)[rows], run.model.unimodal_text_embeds(texts.embeds)
    oracle = CUSA(0.6, 0.75, 0.45, teacher_temperature=0.2)
    oracle.student_temperature.data.fill_(0.2)
    expected = oracle(*teachers, images.embeds[rows] @ texts.embeds.T, *heads)
    total = expected.loss
    components = run.model.score_components(images, texts)
    if {"late_interaction", "all"} & set(train):
        cosines = components["late_interaction"][rows] / 2.0 / np.exp(1.5)
        late = CUSA(0.6, 0.0, 0.35, teacher_temperature=0.2)(*teachers, cosines)
        total = total + late.loss
        assert output["parts"]["cusa_late_interaction"].item() == pytest.approx(late.cross_modal.item(), rel=1e-4)
    if train == ["all"]:
        scores = (components["reasoning"] / 2.0).sigmoid()[rows]
        total = total + CUSA(0.6, 0.0, 0.5, teacher_temperature=0.2)(*teachers, scores).loss
    assert (output["loss"] - without["loss"]).item() == pytest.approx(total.item(), rel=1e-4)
    assert output["parts"]["cusa_uni_modal"].item() == pytest.approx(expected.uni_modal.item(), rel=1e-4)


def test_labels_of_the_others_about_the_mean_on_logits(data: Path, caches: dict, tmp_path: Path) -> None:
    """Each similarity in the scale of its own loss, without its diagonal, beside centred teachers."""
    keys = {"cusa_exclude_self": True, "cusa_center_teachers": True, "cusa_on_logits": True, "cusa_beta": 0.0}
    model = {**STILL, "component_weight_init_value": 2.0, "late_interaction_scale_init_value": 1.5}
    run = Training(config(data, caches, tmp_path, **keys, model=model))
    batch = next(iter(run.loaders[0]))
    output = run.objective(batch)
    own = {name: value for name, value in batch.items() if "teacher" not in name}
    images = run.model.encode_images(**{k: v for k, v in own.items() if "region" in k})
    texts = run.model.encode_texts(
        **{k: v for k, v in own.items() if k in ("input_ids", "attention_mask", "word_mask")}
    )
    components = run.model.score_components(images, texts)
    logits = {
        "cross_modal": images.embeds @ texts.embeds.T * run.model.logit_scale.exp(),
        "late_interaction": components["late_interaction"] / 2.0,
        "reasoning": components["reasoning"] / 2.0,
    }
    vectors = [batch[f"teacher_{side}_embeds"].float() for side in ("image", "text")]
    rows = [own["image_ids"].tolist().index(number) for number in own["text_image_ids"].tolist()]
    for name, similarity in logits.items():
        similarity = similarity[rows]
        off, divergence = ~torch.eye(len(similarity), dtype=torch.bool), 0.0
        for side, scores in zip(vectors, (similarity, similarity.T), strict=True):
            unit = torch.nn.functional.normalize(side, dim=1)
            label = torch.cosine_similarity(*((unit - unit.mean(0))[:, None], (unit - unit.mean(0))[None]), dim=-1)
            target, student = (
                torch.stack([row[kept].softmax(0) for row, kept in zip(values, off, strict=True)])
                for values in (label / 0.2, scores)
            )
            divergence += (target * (target.log() - student.log())).sum(1).mean().item() / 2
        assert output["parts"][f"cusa_{name}"].item() == pytest.approx(divergence, rel=1e-4)


def test_a_run_says_once_that_its_labels_teach_nothing(data: Path, caches: dict, tmp_path: Path, caplog) -> None:
    run = Training(config(data, caches, tmp_path, cusa_teacher_temperature=1000.0))
    for batch in run.loaders[0]:
        assert "cusa_reasoning" in run.objective(batch)["parts"]
    assert sum("is uniform" in record.getMessage() for record in caplog.records) == 2  # images, texts


@pytest.mark.slow
def test_a_run_learns_its_soft_labels_and_saves_the_heads(data: Path, caches: dict, tmp_path: Path) -> None:
    first = {"train": ["embeddings", "late_interaction"], "epochs": 12, "learning_rate": 1e-2}
    keys = {"phases": [first, {"train": "all", "epochs": 1}], "logging_steps": 4}
    result = train(config(data, caches, tmp_path / "run", **keys, cusa_alpha=0.5, cusa_beta=2.0))
    events = [event for event in result["history"] if "loss" in event]
    assert events[-1]["cusa_uni_modal_loss"] < 0.85 * events[0]["cusa_uni_modal_loss"]
    assert "cusa_reasoning_loss" in events[-1] and "cusa_reasoning_loss" not in events[0]
    model = TVRNModel.from_pretrained(tmp_path / "run")
    assert model.config.use_unimodal_heads
    assert result["config"]["cusa_beta"] == 2.0


@pytest.mark.slow
def test_results_and_card_name_the_teachers(data: Path, caches: dict, tmp_path: Path) -> None:
    result = train(config(data, caches, tmp_path / "run", epochs=1))
    card = (tmp_path / "run/README.md").read_text("utf-8")
    for modality in ("image", "text"):
        cache = TeacherCache.load(caches[f"cusa_{modality}_teacher"])
        assert result["teachers"][modality] == cache.source
        assert f"CUSA's {modality} teacher, frozen" in card
        assert str(cache.fingerprint["pooling"]) in card


@pytest.mark.slow
def test_temperatures_are_learned_within_their_bounds(data: Path, caches: dict, tmp_path: Path) -> None:
    run = Training(config(data, caches, tmp_path, epochs=4, learning_rate=0.2, cusa_lowest_temperature=0.4))
    before = {name: value.item() for name, value in run.cusa.named_parameters() if value.requires_grad}
    run.fit()
    after = dict(run.cusa.named_parameters())
    assert all(after[name].item() != value for name, value in before.items())
    assert all(0.4 - 1e-6 <= value.item() <= 1.0 for value in after.values())
    assert any(value.item() in (pytest.approx(0.4), pytest.approx(0.99)) for value in after.values())


def test_kept_embeddings_get_no_labels_in_the_pair_phase(data: Path, caches: dict, tmp_path: Path) -> None:
    model = {"use_refined_features": False, "use_late_interaction": False}
    phases = [{"train": "embeddings", "epochs": 1}, {"train": "reasoning", "epochs": 1}]
    keys = {"phases": phases, "logging_steps": 1, "model": model}
    run = Training(config(data, caches, tmp_path, **keys))
    run.fit()
    events = [event for event in run.progress.history if "loss" in event]
    assert "cusa_cross_modal_loss" in events[0] and "cusa_cross_modal_loss" not in events[-1]
    assert "cusa_reasoning_loss" in events[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0)])
def test_one_part_alone(data: Path, caches: dict, tmp_path: Path, alpha: float, beta: float) -> None:
    run = Training(config(data, caches, tmp_path, epochs=1, cusa_alpha=alpha, cusa_beta=beta, logging_steps=1))
    run.fit()
    parts = {name for event in run.progress.history for name in event if name.startswith("cusa")}
    crossed = {"cusa_cross_modal_loss", "cusa_late_interaction_loss", "cusa_reasoning_loss"}
    assert parts == (crossed if alpha else {"cusa_uni_modal_loss"})
    assert run.model.config.use_unimodal_heads == bool(beta)


def gradients(settings: TrainingConfig, trained: list[str], name: str) -> dict[str, Any]:
    """The loss of the first batch in some phases, and the gradients of weights and temperatures together."""
    run = Training(settings)
    run.objective.train()
    batch, losses = next(iter(run.loaders[0])), []
    for each in trained:
        run.accelerator.unwrap_model(run.objective).enter(PhaseConfig(train=[each], epochs=1))
        output = run._forward_backward(dict(batch), 1, True)
        losses.append(output["loss"].item())
    named = {**dict(run.model.named_parameters()), **dict(run.cusa.named_parameters())}
    found = {key: value.grad.clone() for key, value in named.items() if value.grad is not None}
    if run.accelerator.is_main_process:
        save_file(found, f"{name}.safetensors")
    return {"losses": losses, "world": processes()}


@pytest.mark.slow
@pytest.mark.parametrize("train", ["embeddings", "all"])
@pytest.mark.parametrize(
    "keys", [{"batch_size": 9}, {"batch_size": 14, "tower_batch_size": 3}], ids=["plain", "cached"]
)
def test_two_processes_have_the_gradients_of_one(
    data: Path, caches: dict, tmp_path: Path, keys: dict, train: str
) -> None:
    """Soft labels span the batch of all processes, and every process's rows get their gradients."""
    keys = {**keys, "batch_captions_per_image": 2, "model": STILL}
    runner = Processes(tmp_path)
    [alone] = runner.run(gradients, config(data, caches, tmp_path / "1", **keys), [train], str(tmp_path / "1"))
    both = runner.run(gradients, config(data, caches, tmp_path / "2", **keys), [train], str(tmp_path / "2"), count=2)
    assert [result["world"] for result in both] == [2, 2]
    assert [result["losses"] for result in both] == [pytest.approx(alone["losses"], abs=1e-5)] * 2
    expected, found = (load_file(tmp_path / f"{count}.safetensors") for count in (1, 2))
    assert found.keys() == expected.keys() >= {"embeddings.student_temperature", "unimodal_text_head.linear.weight"}
    for name, value in expected.items():
        # in float32: products of other shapes round otherwise, which logits of a first stage's scale amplify
        torch.testing.assert_close(found[name], value, atol=5e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_its_temperatures(data: Path, caches: dict, tmp_path: Path) -> None:
    keys = {"max_steps": 6, "save_steps": 3, "evaluation_steps": 100, "learning_rate": 2e-2, "keep_checkpoints": 5}
    whole = Training(config(data, caches, tmp_path / "a", **keys))
    whole.fit()
    checkpoint = next(path for path in (tmp_path / "a/checkpoints").iterdir() if path.name.endswith("3"))
    resumed = Training(config(data, caches, tmp_path / "b", **keys, resume=str(checkpoint)))
    assert resumed.step == 3
    resumed.fit()
    for (name, value), other in zip(whole.cusa.named_parameters(), resumed.cusa.parameters(), strict=True):
        assert torch.equal(value, other), name


# -- what is refused ------------------------------------------------------------------------------------


def test_teachers_in_another_order_are_refused(data: Path, caches: dict, tmp_path: Path) -> None:
    run = Training(config(data, caches, tmp_path))
    batch = next(iter(run.loaders[0]))
    batch["teacher_ids"] = batch["teacher_ids"].flip(0)
    with pytest.raises(ValueError, match=r"another order than the batch: row 0 is of image \d+, the caption there"):
        run.objective(batch)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"cusa_text_teacher": None}, "cusa = True needs cusa_text_teacher"),
        ({"cusa": False}, "cusa_image_teacher and cusa_text_teacher given, but cusa = False"),
        ({"cusa_alpha": 0.0, "cusa_beta": 0.0}, "leave CUSA nothing to do"),
        ({"cusa_student_temperature": 0.05}, r"0.05 is outside its bounds, 0.1 .* to 0.99"),
        ({"cusa_teacher_temperature": 0.0}, "cusa_teacher_temperature = 0.0; expected above 0"),
        ({"cusa_teachers": "best"}, "one of own, mean, geometric_mean"),
        ({"cusa_alpha": -1.0}, "cusa_alpha = -1.0; expected at least 0"),
    ],
)
def test_settings_that_contradict_one_another(data: Path, caches: dict, tmp_path: Path, keys: dict, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(data, caches, tmp_path, **keys)


def test_a_streams_items_are_looked_up_and_compared_as_they_come(data: Path, caches: dict, tmp_path: Path) -> None:
    records = load_pairs(data, "train", captions_per_image=2)
    images, texts = (TeacherCache.load(caches[f"cusa_{side}_teacher"]) for side in ("image", "text"))

    def numbered(items: list[dict]) -> dict[str, torch.Tensor]:
        return {"text_image_ids": torch.tensor([900 + len(item["caption"]) for item in items])}

    collate = TeacherCollator(numbered, images, texts, check=True)
    stream = load_pairs(data, "train", streaming=True, captions_per_image=2)
    items = [item for _, item in zip(range(5), CaptionStream(stream), strict=False)]
    assert "row" not in items[0]
    batch = collate(items)
    assert torch.equal(batch["teacher_ids"], batch["text_image_ids"])
    expected = texts[[record["caption_ids"][0] for record in records.select(range(3))]]
    torch.testing.assert_close(batch["teacher_text_embeds"][::2], expected, atol=0, rtol=0)
    items[3]["record"] = items[3]["record"] | {"captions": ["another caption", "yet another"]}
    with pytest.raises(StaleStoreError, match="'another caption'"):
        collate(items)


def test_caches_of_other_data_are_refused(data: Path, caches: dict, tmp_path: Path) -> None:
    def refused(message: str, **keys: Any) -> None:
        with pytest.raises(ValueError, match=message):
            Training(config(data, caches, tmp_path / "run", **keys))

    refused("no teacher cache there; build it with .* --modality text", cusa_text_teacher=str(tmp_path / "nowhere"))
    refused("modality 'image', expected 'text'", cusa_text_teacher=caches["cusa_image_teacher"])
    records = load_pairs(data, "train", captions_per_image=2)
    write_cache(tmp_path / "few", "image", records.select(range(9)), np.random.default_rng(0).normal(size=(9, 6)))
    refused("is of other data: 5 of 14 ids are not in the store", cusa_image_teacher=str(tmp_path / "few"))
    records.captions[2][0] = "another caption"
    write_cache(tmp_path / "other", "text", records, np.random.default_rng(0).normal(size=(28, 6)))
    refused("is of other data: for 1 of 28 ids", cusa_text_teacher=str(tmp_path / "other"))
