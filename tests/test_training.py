"""Whole runs on tiny data: what they leave behind, that they repeat, and how they stop."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from training_makers import TINY_BERT, TINY_VIT
from transformers import AutoModel, AutoProcessor

from modeling_tvrn.data import load_pairs
from modeling_tvrn.hub import write_run_card
from modeling_tvrn.metrics import retrieval_metrics
from modeling_tvrn.training import TrainingConfig, TrainingStopped, train
from modeling_tvrn.training.batches import Phase
from modeling_tvrn.training.launch import make_accelerator
from modeling_tvrn.training.loop import Training
from modeling_tvrn.training.objective import drop_valid

ROOT = Path(__file__).resolve().parents[1]
COLOURS, SHAPES = ("red", "green", "blue", "white", "black"), ("circle", "square", "star", "cross")
SIZES = {"hidden_size": 18, "projection_size": 11, "similarity_size": 9}

Configure = Callable[..., TrainingConfig]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SCAN's files: a region's features are its colour's and shape's own vectors, a caption names them."""
    folder = tmp_path_factory.mktemp("scan")
    rng = np.random.default_rng(0)
    colours, shapes = rng.normal(size=(len(COLOURS), 7)), rng.normal(size=(len(SHAPES), 7))
    for split, images in (("train", 30), ("dev", 20)):
        features, captions = [], []
        for _ in range(images):
            chosen = np.c_[rng.integers(5, size=3), rng.integers(4, size=3)]
            features.append(colours[chosen[:, 0]] + shapes[chosen[:, 1]])
            names = [f"{COLOURS[colour]} {SHAPES[shape]}" for colour, shape in chosen]
            captions += [f"a {names[0]} , a {names[1]} and a {names[2]}", f"a {names[1]} beside a {names[0]}"]
            captions += [f"there is a {name}" for name in names]
        low = rng.uniform(0, 0.5, size=(images, 3, 2))
        np.save(folder / f"{split}_ims.npy", np.array(features, dtype=np.float32))
        np.save(folder / f"{split}_boxes.npy", np.concatenate([low, low + 0.4], axis=2).astype(np.float32))
        (folder / f"{split}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def configure(data: Path, tmp_path: Path) -> Configure:
    """A configuration for the tiny data; keywords replace keys, those of the model too."""

    def make(**keys: Any) -> TrainingConfig:
        model = {**SIZES, **keys.pop("model", {})}
        base = {
            "data": str(data),
            "epochs": None if "phases" in keys else 2,
            "batch_size": 25,
            "learning_rate": 3e-3,
            "output_dir": str(tmp_path / "run"),
        }
        return TrainingConfig.from_mapping({**base, "cpu": True, "logging_steps": 3, **keys, "model": model})

    return make


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run to the end, and what it returned."""
    folder = tmp_path_factory.mktemp("finished") / "tiny"
    phases = [{"train": ["embeddings", "late_interaction"], "epochs": 1}, {"train": "all", "epochs": 12}]
    keys = {"phases": phases, "batch_size": 25, "learning_rate": 5e-3, "logging_steps": 10}
    drops = {"word_dropout": 0.1, "region_dropout": 0.1}
    config = {"data": str(data), "output_dir": str(folder), "cpu": True, "model": SIZES, **keys, **drops}
    return folder, train(TrainingConfig.from_mapping(config))


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


# -- what a run leaves -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_learns_and_says_so(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    assert result["metrics"]["rsum"] > 1.5 * result["chance"]["rsum"]
    for part in ("matching_loss", "contrastive_loss"):
        losses = [event[part] for event in result["history"] if part in event]
        assert losses[-1] < 0.95 * losses[0]
    assert re.search(r"pair score +\|.*\n\| embeddings alone +\|.*\n\| chance", result["table"])


@pytest.mark.slow
def test_results_hold_what_is_needed_to_repeat_and_to_compare(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, result = finished
    stored = json.loads((folder / "results.json").read_text())
    assert stored == json.loads(json.dumps({name: value for name, value in result.items() if name != "table"}))
    assert stored["config"]["batch_size"] == 25 and stored["config"]["model"] == SIZES
    assert stored["seed"] == 0 and stored["steps"] == 13 * 6
    assert {"image_to_text_R@1", "text_to_image_R@10", "rsum", "ties"} <= set(stored["metrics"])
    assert {"rsum"} <= set(stored["embedding_metrics"]) and stored["chance"]["rsum"] > 0
    assert stored["data"]["train"]["images"] == 30 and stored["data"]["validation"]["captions"] == 100
    assert {"python", "torch", "transformers"} <= set(stored["versions"])
    assert set(stored["seconds"]) == {"training", "waiting_for_data", "evaluation", "total"}
    assert 0 < stored["seconds"]["waiting_for_data"] < stored["seconds"]["training"] < stored["seconds"]["total"]
    evaluations = [event for event in stored["history"] if "rsum" in event]
    assert [event["step"] for event in evaluations] == list(range(12, 79, 6))
    best = max(evaluations, key=lambda event: event["rsum"])
    assert (stored["best_step"], stored["metrics"]["rsum"]) == (best["step"], pytest.approx(best["rsum"]))
    logged = [event for event in stored["history"] if "loss" in event]
    assert {"step", "epoch", "loss", "contrastive_loss", "learning_rate", "pairs_per_second"} <= set(logged[0])
    assert "matching_loss" not in logged[0] and "matching_loss" in logged[-1]


@pytest.mark.slow
def test_the_folder_loads_and_scores_as_reported(finished: tuple[Path, dict[str, Any]], data: Path) -> None:
    folder, result = finished
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    records = load_pairs(data, "validation")
    captions = [caption for captions in records.captions for caption in captions]
    with torch.inference_mode():
        images = model.encode_images(
            **processor(
                region_features=[record["region_features"] for record in records],
                region_boxes=[record["region_boxes"] for record in records],
            )
        )
        texts = model.encode_texts(**processor(text=captions))
        scores = model.match(images, texts)
    for found, reported in ((scores, "metrics"), (images.embeds @ texts.embeds.T, "embedding_metrics")):
        # Captions repeat in these data, so negatives tie with positives up to the last bits, and those differ with the
        # batches of encoding: the report lies between all such ties lost and all won.
        positives = 1e-4 * (torch.arange(20)[:, None] == torch.arange(100)[None, :] // 5)
        rows = np.repeat(np.arange(20), 5)
        worst, best = (retrieval_metrics(found + sign * positives, rows).rsum for sign in (-1, 1))
        assert worst <= result[reported]["rsum"] <= best
        assert best - worst < 100, "too many ties to tell anything"
    shipped = {path.name for path in folder.glob("*.py")}
    assert {"modeling_tvrn.py", "configuration_tvrn.py", "processing_tvrn.py", "losses.py"} <= shipped
    assert (folder / "curve.png").stat().st_size > 5000 and not (folder / ".saving").exists()
    assert result["fits"]["gallery_size"] == 5, "half of those that it was not calibrated on"
    assert (folder / "calibration.png").is_file() and "Does anything fit?" in (folder / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_card_has_the_hub_s_metadata_and_its_code_runs(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = finished
    card = (folder / "README.md").read_text(encoding="utf-8")
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    metadata = yaml.safe_load(header)
    assert metadata["library_name"] == "transformers"
    assert "pipeline_tag" not in metadata, "no pipeline makes region features"
    assert {"custom_code", "tvrn"} <= set(metadata["tags"])
    assert "base_model" not in metadata and "datasets" not in metadata, "nothing here came from the Hub"
    [entry] = metadata["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for metric in entry["metrics"]}
    assert values["rsum"] == pytest.approx(result["metrics"]["rsum"], abs=0.01) and len(values) == 7
    assert "{{" not in body and "{%" not in body and result["table"].split("\n\n")[0] in body and "![Loss" in body
    assert str(folder.parent) not in card, "a path of this machine"
    assert "steps, in batches of 25 captions" in card
    phased = {**result, "config": {**result["config"], "phases": [{"batch_size": 40}, {}]}}
    other = write_run_card(folder, folder.parent / "phased.md", results=phased).read_text(encoding="utf-8")
    assert "steps, in batches of 40, then 25 captions" in other
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    exec(code[1], names)  # what a reader would paste
    assert names["scores"].shape == (2, 2)


# -- what is kept ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_model_by_validation_is_kept_not_the_last(configure: Configure) -> None:
    run = Training(configure(epochs=4, evaluation_steps=6))
    seen: list[dict[str, torch.Tensor]] = []
    honest = run.validation.run

    def told(model: Any) -> Any:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        report = honest(model)
        hits = (10.0, 30.0, 30.0, 20.0)[len(seen) - 1]
        metrics = replace(report.metrics, image_to_text={1: hits}, text_to_image={1: 0.0})
        return replace(report, metrics=metrics)

    run.validation.run = told  # type: ignore[method-assign]
    run.fit()
    assert len(seen) == 4 and run.best.step == 12
    stored = weights(run.config.output_dir)
    learned = [name for name in stored if not name.startswith("calibration_")]  # which is set as it is saved
    assert all(torch.equal(stored[name], seen[1][name]) for name in learned)
    assert not all(torch.equal(stored[name], seen[3][name]) for name in learned)


@pytest.fixture
def forget_precision() -> Iterator[Callable[[], None]]:
    """A process has one precision, accelerate says; this takes it back."""

    def forget() -> None:
        AcceleratorState._reset_state(True)

    forget()
    yield forget
    forget()


@pytest.mark.slow
def test_bfloat16_computes_what_float32_does_but_for_its_digits(
    configure: Configure, forget_precision: Callable[[], None]
) -> None:
    losses, runs = {}, {}
    for precision in ("no", "bf16"):
        forget_precision()
        keys = {"mixed_precision": precision, "logging_steps": 1, "model": {"dropout": 0.0}, "epochs": 3}
        runs[precision] = run = Training(configure(**keys, output_dir=str(configure().output_dir) + precision))
        run.fit()
        losses[precision] = [event["loss"] for event in run.progress.history if "loss" in event]
    # The matching loss of a reasoning that scores every pair alike, as at the start, is the steepest part.
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05) and losses["bf16"] != losses["no"]
    assert losses["bf16"][-1] < 0.95 * losses["bf16"][0]
    assert {value.dtype for value in runs["bf16"].model.parameters()} == {torch.float32}
    assert runs["bf16"].best.rsum == pytest.approx(runs["no"].best.rsum, abs=60)  # of 20 images: a hit is 5 points


@pytest.mark.usefixtures("forget_precision")
def test_a_precision_that_the_device_lacks_is_refused(configure: Configure) -> None:
    with pytest.raises(ValueError, match="mixed_precision = 'fp16' is not to be had on cpu: use mixed_precision=bf16"):
        Training(configure(mixed_precision="fp16"))


@pytest.mark.parametrize("fast", [True, False])
def test_a_precision_that_is_slower_is_said(
    configure: Configure, forget_precision: Callable[[], None], fast: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("modeling_tvrn.training.launch._has_fast_bfloat16", lambda: fast)
    make_accelerator(configure(mixed_precision="bf16"))
    assert ("use mixed_precision=no" in caplog.text) is not fast


@pytest.mark.slow
def test_evaluating_on_a_subset_ends_with_all_images(configure: Configure) -> None:
    result = train(configure(evaluation_images=7))
    assert result["metrics"]["image_count"] == 20 and result["embedding_metrics"]["image_count"] == 20
    assert "embeddings alone" in result["table"]


@pytest.mark.slow
def test_the_mean_of_the_weights_is_what_is_saved(configure: Configure) -> None:
    run = Training(configure(ema_decay=0.95))
    run.fit()
    assert run.average is not None
    own = {name: value.clone() for name, value in run.model.state_dict().items()}
    with run.average.applied():
        means = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert run.best.step in (6, 12)
    if run.best.step == 12:
        stored = weights(run.config.output_dir)
        # what is saved is calibrated as well, which training knows nothing of
        trained = {name: value for name, value in means.items() if not name.startswith("calibration_")}
        assert all(torch.equal(stored[name], value) for name, value in trained.items())
    assert not torch.equal(own["region_projection.weight"], means["region_projection.weight"])


# -- what follows from the configuration -----------------------------------------------------------------


@pytest.mark.slow
def test_equal_runs_give_equal_weights_and_another_seed_gives_others(configure: Configure, tmp_path: Path) -> None:
    keys = {"word_dropout": 0.2, "region_dropout": 0.2, "epochs": 1}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        Training(configure(**keys, seed=seed, output_dir=str(tmp_path / name))).fit()
    first, again, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["region_projection.weight"], other["region_projection.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_tower_stays_as_it_was_and_another_learns(configure: Configure, frozen: bool) -> None:
    run = Training(configure(model={"text_config": TINY_BERT, "freeze_text": frozen}, epochs=1))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.fit()
    after = run.model.state_dict()
    tower = [name for name in before if name.startswith("text_model.") and name.endswith("weight")]
    changed = [name for name in tower if not torch.equal(before[name], after[name])]
    assert changed == [] if frozen else len(changed) > len(tower) / 2
    assert not torch.equal(before["word_projection.weight"], after["word_projection.weight"])


def test_the_rates_of_towers_and_new_parts_are_those_that_move_the_weights(configure: Configure) -> None:
    keys = {"warmup_ratio": 0.0, "scheduler": "constant", "weight_decay": 0.0, "max_steps": 1, "max_grad_norm": None}
    rates = {"learning_rate": 1e-2, "tower_learning_rate": 1e-4, "adam_epsilon": 1e-12}
    run = Training(configure(model={"text_config": TINY_BERT, "dropout": 0.0}, **keys, **rates))
    before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
    run.fit()
    # AdamW's first step moves every weight that has a gradient by its rate
    for name, after in run.model.named_parameters():
        moved = (after.detach() - before[name]).abs().max().item()
        expected = 1e-4 if name.startswith("text_model.") else 1e-2
        if not name.endswith("key.bias"):  # attention does not depend on it: its gradient is rounding alone
            assert moved == pytest.approx(expected, rel=0.02) or moved == 0.0, name
    assert (run.model.word_projection.weight - before["word_projection.weight"]).abs().max() > 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("side", ["region", "word"])
@pytest.mark.parametrize(("own", "expected"), [(0.5, {0.5, 0.25}), (0.0, {0.25}), (None, {0.25})])
def test_a_phase_may_leave_out_other_shares_of_regions_and_words(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, side: str, own: float | None, expected: set[float]
) -> None:
    seen: list[float] = []

    def remember(mask: torch.Tensor, probability: float) -> torch.Tensor:
        seen.append(probability)
        return drop_valid(mask, probability)

    monkeypatch.setattr("modeling_tvrn.training.objective.drop_valid", remember)
    phases = [{"train": "embeddings", "epochs": 1, f"{side}_dropout": own}, {"train": "all", "epochs": 1}]
    run = Training(configure(phases=phases, **{f"{side}_dropout": 0.25}))
    run.fit()
    assert set(seen) == expected
    steps = run.phases[0].steps_per_epoch
    assert len(seen) == run.total_steps - (steps if own == 0.0 else 0)
    assert own is None or own == 0.0 or seen[:steps] == [own] * steps


def moved_in_each_phase(run: Training) -> list[set[str]]:
    """Run to the end; the names of the weights that each phase changed."""
    run_phase, found = run._run_phase, []

    def remember(*arguments: Any) -> None:
        before = {name: value.detach().clone() for name, value in run.model.named_parameters()}
        run_phase(*arguments)
        found.append({name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])})

    run._run_phase = remember  # type: ignore[method-assign]
    run.fit()
    return found


@pytest.mark.slow
def test_each_phase_has_its_own_batches_and_rate(configure: Configure) -> None:
    phases = [
        {"train": "embeddings", "epochs": 1, "batch_size": 50, "learning_rate": 9e-3},
        {"train": "late_interaction", "steps": 4, "learning_rate": 5e-3, "warmup_ratio": 1.0},
        {"train": "reasoning", "epochs": 1},
    ]
    rates = {"learning_rate": 1e-3, "warmup_ratio": 0.0, "scheduler": "constant", "logging_steps": 1}
    run = Training(configure(phases=phases, **rates, model={"use_refined_features": False}))
    run.fit()
    found = [event["learning_rate"] for event in run.progress.history if "learning_rate" in event]
    assert found == pytest.approx([9e-3] * 3 + [1.25e-3, 2.5e-3, 3.75e-3, 5e-3] + [1e-3] * 6)
    assert [event["step"] for event in run.progress.history if "rsum" in event] == [13]


EMBEDDINGS = ("pooled_image_embedding", "pooled_text_embedding", "logit_scale")


@pytest.mark.slow
def test_each_phase_moves_what_it_names_and_nothing_else(configure: Configure) -> None:
    names = ["embeddings", "late_interaction", "distilled_embeddings", "reasoning", "all"]
    model = {"use_refined_features": False, "distillation_loss_weight": 1.0}
    run = Training(configure(phases=[{"train": name, "epochs": 1} for name in names], model=model))
    embeddings, late, distilled, reasoning, everything = moved_in_each_phase(run)
    assert {name for name in embeddings if not name.startswith(EMBEDDINGS)} == {"word_encoder.embeddings.weight"}
    assert {"region_projection.weight", "pair.late_interaction_scale", "word_encoder.gru.weight_ih_l0"} <= late
    assert not {name for name in late if name.startswith((*EMBEDDINGS, "word_encoder.embeddings", "pair.head"))}
    assert {"pooled_image_embedding.linear.weight", "pooled_text_embedding.linear.weight"} <= distilled
    assert all(name.startswith(EMBEDDINGS) for name in distilled), "the late interaction reads the words, and stays"
    assert {"pair.local_similarity.weight", "pair.head.logit.weight", "attention.key.weight"} <= reasoning
    assert reasoning & (embeddings | late) == {"pair.late_interaction_weight"}, "what it counts for beside another one"
    assert embeddings | late | reasoning <= everything


@pytest.mark.slow
def test_a_tower_that_is_not_frozen_learns_until_what_reads_it_is_to_stay(configure: Configure) -> None:
    model = {"text_config": TINY_BERT, "use_refined_features": False}
    for first in ("embeddings", "late_interaction"):
        phases = [{"train": first, "epochs": 1}, {"train": "reasoning", "epochs": 1}]
        before, after = moved_in_each_phase(Training(configure(phases=phases, model=model)))
        assert {name for name in before if name.startswith("text_model.")}, first
        assert after and not {name for name in after if name.startswith("text_model.")}, first


@pytest.mark.slow
def test_the_losses_of_a_phase_are_those_of_what_it_trains(configure: Configure) -> None:
    names = ["embeddings", "late_interaction", "distilled_embeddings", "reasoning"]
    model = {"use_refined_features": False, "distillation_loss_weight": 1.0}
    phases = [{"train": name, "epochs": 1} for name in names]
    run = Training(configure(phases=phases, logging_steps=1, model=model))
    run.fit()
    logged = [event for event in run.progress.history if "loss" in event]
    seen = [{key.removesuffix("_loss") for key in event if key.endswith("_loss")} for event in logged[5::6]]
    weights = "component_weights"
    assert seen == [
        {"contrastive"}, {"late_interaction", weights}, {"contrastive", "distillation"}, {"matching", weights},
    ]  # fmt: skip


@pytest.mark.slow
def test_a_run_of_embeddings_alone_is_evaluated_as_it_goes(configure: Configure) -> None:
    result = train(configure(phases=[{"train": "embeddings", "epochs": 3}]))
    assert [event["step"] for event in result["history"] if "rsum" in event] == [6, 12, 18]
    assert result["parameters"]["trained"] < result["parameters"]["total"]


@pytest.mark.slow
def test_accumulated_batches_make_one_step(configure: Configure) -> None:
    run = Training(configure(gradient_accumulation_steps=4, epochs=3))
    [phase] = run.phases
    assert len(phase.batches) == 6 and phase.steps_per_epoch == 2
    updates = []
    run.optimizer.optimizer.register_step_post_hook(lambda *_: updates.append(run.step))
    run.fit()
    assert run.step == run.total_steps == len(updates) == 6


@pytest.mark.slow
def test_max_steps_ends_a_run_anywhere_and_is_evaluated(configure: Configure) -> None:
    result = train(configure(max_steps=8, epochs=1))
    assert result["steps"] == 8
    assert [event["step"] for event in result["history"] if "rsum" in event] == [6, 8]


@pytest.mark.slow
def test_cached_text_features_train_as_the_tower_does(configure: Configure, tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    keys = {"epochs": 1, "max_steps": 4, "model": {"freeze_text": True, "dropout": 0.0}}
    save_text_tower(tower)
    losses, captions = [], str(tmp_path / "captions")
    for cached in (None, captions, captions):  # made, then shared
        folder = str(tmp_path / f"run-{len(losses)}")
        result = train(configure(text=str(tower), text_features=cached, output_dir=folder, logging_steps=1, **keys))
        losses.append([event["loss"] for event in result["history"] if "loss" in event])
    # features in half precision; where a gradient is next to nothing, Adam's step may have the other sign
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[1] == losses[2]
    assert losses[0][0] != losses[0][-1]


def save_text_tower(folder: Path) -> None:
    """A tiny pretrained text encoder with its tokenizer."""
    from transformers import BertConfig, BertModel

    from modeling_tvrn import TVRNProcessor

    words = [f"{colour} {shape} a and beside there is ," for colour in COLOURS for shape in SHAPES]
    tokenizer = TVRNProcessor.from_captions(words).tokenizer
    tokenizer.save_pretrained(folder)
    fields = {name: value for name, value in TINY_BERT.items() if name != "model_type"}
    BertModel(BertConfig(**fields, vocab_size=len(tokenizer))).save_pretrained(folder)


@pytest.mark.slow
def test_pictures_train_a_tower_from_scratch_and_a_query_is_drawn(configure: Configure, tmp_path: Path) -> None:
    options = {"count": 12, "image_size": 32}
    query = load_pairs("scenes", "validation", **options).captions[3][0]
    config = configure(
        data="scenes",
        data_options=options,
        model={"vision_config": {**TINY_VIT, "image_size": 32}},
        query=query,
        epochs=1,
        region_dropout=0.3,
    )
    result = train(config)
    folder = Path(config.output_dir)
    assert result["model_config"]["region_feature_size"] == 12
    assert (folder / "query.png").stat().st_size > 5000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert query in card and "vit from scratch" in card and "generated scenes" in card


@pytest.mark.slow
def test_a_region_cache_replaces_the_pictures_and_a_stale_one_is_refused(configure: Configure, tmp_path: Path) -> None:
    from modeling_tvrn.teachers import RegionCache, StaleStoreError

    keys = {
        "data": "scenes", "data_options": {"count": 12, "image_size": 32}, "epochs": 1,
        "model": {"vision_config": {**TINY_VIT, "image_size": 32}, "freeze_vision": True, "dropout": 0.0},
    }  # fmt: skip
    regions = str(tmp_path / "{split}")
    with pytest.raises(ValueError, match="no region cache in .*train.*tvrn regions scenes --features MODEL"):
        Training(configure(**keys, regions=regions))
    plain = Training(configure(**keys, output_dir=str(tmp_path / "plain")))
    for split, records in (("train", plain.train_records), ("validation", plain.validation_records)):
        RegionCache.build(plain.model, plain.processor, records, tmp_path / split, dtype="float32", progress=False)
    plain.fit()
    cached = Training(configure(**keys, regions=regions, output_dir=str(tmp_path / "cached")))
    assert "image" not in cached.train_records[0]
    cached.fit()
    losses = [[event["loss"] for event in run.progress.history if "loss" in event] for run in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(StaleStoreError, match="backbone"):
        Training(configure(**keys, regions=regions, seed=5))
    # Regions of whatever made them, for a model that has no tower of its own.
    alone = {**keys, "model": {"dropout": 0.0}, "output_dir": str(tmp_path / "alone")}
    result = train(configure(**alone, regions=regions))
    assert result["model_config"]["region_feature_size"] == TINY_VIT["hidden_size"]
    with pytest.raises(ValueError, match="no region cache in .*tvrn regions scenes --features MODEL"):
        Training(configure(**alone, regions=str(tmp_path / "nothing" / "{split}")))


# -- how it stops ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_diverged_run_stops_naming_the_step_and_keeps_the_best_model(configure: Configure) -> None:
    run = Training(configure(epochs=3, max_grad_norm=None))
    good = run._finish_step

    def then_diverge(phase: Phase) -> None:
        good(phase)
        if run.step == 8:
            with torch.no_grad():
                run.model.logit_scale.fill_(torch.nan)

    run._finish_step = then_diverge  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped, match="at step 9.*images of the batch: 'train/0000"):
        run.fit()
    assert run.best.step == 6
    assert all(value.isfinite().all() for value in weights(run.config.output_dir).values())


def test_missing_trackers_are_refused(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_tvrn.training.launch.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'trackio', which is not installed; pip install trackio"):
        Training(configure(trackers=["trackio"]))


def test_data_and_towers_that_do_not_fit_are_refused(configure: Configure) -> None:
    with pytest.raises(ValueError, match="pictures but there is no vision tower"):
        Training(configure(data="scenes", data_options={"count": 4}))


# -- what it says ----------------------------------------------------------------------------------------


def test_without_a_terminal_log_lines_tell_the_progress(
    configure: Configure, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "modeling_tvrn"):
        Training(configure(epochs=1)).fit()
    line = next(message for message in caplog.messages if message.startswith("step 6/6"))
    assert re.search(r"epoch 1\.00  loss [\d.]+  .*matching [\d.]+.*rate [\d.e-]+  pairs/s [\d,]+  ETA 00:00", line)
    assert any("validation rSum" in message and "best so far" in message for message in caplog.messages)


@pytest.mark.slow
def test_values_are_tracked_in_tensorboard(configure: Configure) -> None:
    pytest.importorskip("tensorboard", reason="an optional tracker")
    config = configure(trackers=["tensorboard"], epochs=1)
    train(config)
    events = [path for path in Path(config.output_dir).rglob("events.out.tfevents.*") if path.stat().st_size > 500]
    assert events


@pytest.mark.slow
def test_the_script_trains_from_a_file_and_overrides(data: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({"data": str(data), "epochs": 50, "batch_size": 30, "cpu": True, "model": SIZES}))
    command = [sys.executable, str(ROOT / "examples" / "train.py"), "--config", str(config)]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True)

    done = run("epochs=1", "output_dir=out", "model.dropout=0.1")
    assert done.returncode == 0, done.stderr
    assert "| pair score" in done.stdout and "| chance" in done.stdout
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["config"]["epochs"] == 1 and stored["model_config"]["dropout"] == 0.1
    wrong = run("epoch=1")
    assert wrong.returncode == 2 and "unknown key 'epoch'; did you mean epochs" in wrong.stderr
    helped = run("--help")
    assert "batch_size=64" in helped.stdout and "model.hidden_size=1024" in helped.stdout
