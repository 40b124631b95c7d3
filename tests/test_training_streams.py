"""Training from a stream of pictures: killed anywhere, it ends with the bits of a run that was not."""

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_makers import write_caches
from training_makers import TINY_BERT, TINY_VIT, Processes, save_text_tower, tiny_config, write_images
from transformers import AutoTokenizer

from modeling_tvrn.data import ShuffledStream, load_pairs
from modeling_tvrn.teachers import StaleStoreError
from modeling_tvrn.training import TrainingConfig, TrainingStopped
from modeling_tvrn.training.loop import Training
from modeling_tvrn.training.snapshots import read_snapshot

STEPS = 7  # of 6 captions: 48 captions are an epoch, so that it ends on the way
PHASES = {  # ends of phases where it is saved, and where it is not
    "phases": [
        {"train": "embeddings", "steps": 2, "batch_size": 9},
        {"train": "late_interaction", "steps": 3, "batch_size": 7},
        {"train": "distilled_embeddings", "steps": 1, "batch_size": 9},
        {"train": "all", "steps": 1},
    ],
    "gradient_accumulation_steps": 2, "max_steps": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("parquet"))


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def teachers(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_caches(tmp_path_factory.mktemp("teachers"), load_pairs(data, "train"))


def configure(data: Path, output: Path, tower: Path, **keys: Any) -> TrainingConfig:
    base: dict[str, Any] = {
        "streaming": True, "stream_shards_at_once": 2, "stream_rows_at_once": 4, "max_steps": STEPS, "batch_size": 6,
        "data_options": {}, "text": str(tower),
        "model": {
            "vision_config": TINY_VIT, "vision_grid_size": None, "distillation_loss_weight": 0.5,
            "use_refined_features": False,
        },
        "save_steps": 2, "evaluation_steps": 4, "image_size": 16, "word_dropout": 0.2,
    }  # fmt: skip
    return tiny_config(data, output, **{**base, **keys})


def fit(config: TrainingConfig, kill_at: int | None = None) -> dict[str, Any]:
    """Train; kill -9 this process in the middle of a step."""
    run = Training(config)
    update = run._update

    def then_die() -> Any:
        if run.step + 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return update()

    run._update = then_die  # type: ignore[method-assign]
    run.fit()
    return {"losses": [event["loss"] for event in run.progress.history if "loss" in event], "best": run.best.rsum}


def state(folder: Path) -> dict[str, torch.Tensor]:
    tensors = read_snapshot(folder / "checkpoints" / f"step-{STEPS:08d}").tensors
    return {f"{file}/{name}": value for file, named in tensors.items() for name, value in named.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "workers", "keys"),
    [(1, 0, PHASES), (1, 2, {}), (1, 2, PHASES), (2, 0, PHASES), (3, 0, {}), (2, 1, {**PHASES, "cusa": True})],
)
def test_a_killed_stream_goes_on_with_the_same_bits(
    data: Path, text_tower: Path, teachers: dict, tmp_path: Path, count: int, workers: int, keys: dict[str, Any]
) -> None:
    runner = Processes(tmp_path)
    keys = {**keys, **teachers} if "cusa" in keys else keys
    whole = runner.run(fit, configure(data, tmp_path / "whole", text_tower, **keys), count=count)
    killed = configure(data, tmp_path / "killed", text_tower, resume="auto", num_workers=workers, **keys)
    kills = 0
    for step in (2, 4, 5, STEPS):
        codes = runner.finish(runner.start(fit, killed, step, count=count))
        kills += -signal.SIGKILL in codes
    assert kills == 4
    left = runner.run(fit, killed, count=count)
    assert left[0] == whole[0] and len(whole[0]["losses"]) >= 3
    first, other = state(tmp_path / "whole"), state(tmp_path / "killed")
    assert first.keys() == other.keys()
    assert [name for name, value in first.items() if not torch.equal(value, other[name])] == []


@pytest.mark.slow
def test_a_stream_trains_a_bigru_on_the_words_of_a_text_model(data: Path, text_tower: Path, tmp_path: Path) -> None:
    keys = {"text": None, "word_embeddings": str(text_tower)}
    config = configure(data, tmp_path / "run", text_tower, **keys)
    config.model |= {"freeze_word_embeddings": True, "word_embedding_size": TINY_BERT["hidden_size"]}
    run = Training(config)
    started = {name: value.clone() for name, value in run.model.word_encoder.state_dict().items()}
    run.fit()
    found = run.model.word_encoder.state_dict()
    same = {name: torch.equal(started[name], found[name]) for name in started}
    assert same["embeddings.weight"] and not same["gru.weight_ih_l0"]
    assert run.processor.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(text_tower).get_vocab()


@pytest.mark.slow
def test_the_phases_of_a_stream_read_on_where_the_one_before_ended(
    data: Path, text_tower: Path, tmp_path: Path
) -> None:
    run = Training(configure(data, tmp_path / "run", text_tower, **PHASES))
    phases, group = run.phases, PHASES["gradient_accumulation_steps"]
    assert [len(phase.batches) for phase in phases] == [2 * group, 3 * group, group, group]
    read = [list(phases[0].batches)]
    for former, phase in itertools.pairwise(phases):
        phase.batches.follow(former.batches)
        read.append(list(phase.batches))
    assert [{len(batch) for batch in batches} for batches in read] == [{9}, {7}, {9}, {6}]
    found = [item for batches in read for batch in batches for item in batch]
    stream = ShuffledStream(run.train_records, 0, shards_at_once=2, rows_at_once=4)
    assert [(item.pair.image_id, item.caption_number) for item in found] == [
        (item.pair.image_id, item.caption_number) for item, _ in itertools.islice(stream.items(), len(found))
    ]
    run, seen = Training(configure(data, tmp_path / "fitted", text_tower, **PHASES)), []
    forward = run._forward_backward
    run._forward_backward = lambda *rest: seen.append(run.objective.learning) or forward(*rest)
    run.fit()
    assert seen == [phase.learning for phase in phases for _ in range(len(phase.batches))]
    assert run.step == STEPS and run.best.rsum is not None


@pytest.mark.slow
def test_a_stream_learns_the_soft_labels_of_its_own_captions(
    data: Path, text_tower: Path, teachers: dict, tmp_path: Path
) -> None:
    keys = {**teachers, "cusa": True, "cusa_teacher_temperature": 0.2, "logging_steps": 1}
    run = Training(configure(data, tmp_path / "run", text_tower, **PHASES, **keys))
    records, text_teacher = load_pairs(data, "train"), run.teachers[1]
    texts, ids = (itertools.chain(*column) for column in (records.captions, records.caption_ids))
    vectors = {text: text_teacher[[caption_id]][0] for text, caption_id in zip(texts, ids, strict=True)}
    seen, forward = [], run._forward_backward

    def look(batch: dict[str, Any], *rest: Any) -> Any:
        seen.append({name: batch[name] for name in ("input_ids", "teacher_text_embeds")})
        return forward(batch, *rest)

    run._forward_backward = look  # type: ignore[method-assign]
    run.fit()
    for batch in seen:
        texts = run.processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        expected = torch.stack([vectors[text] for text in texts])
        torch.testing.assert_close(batch["teacher_text_embeds"], expected, atol=0, rtol=0)
    logged = [event for event in run.progress.history if "loss" in event]
    own = {"cusa_cross_modal_loss", "cusa_late_interaction_loss"}  # of the embeddings, and of late interaction alone
    assert all(own & set(event) for event in logged) and "cusa_reasoning_loss" in logged[-1]


def test_a_stream_of_other_data_than_the_teachers_is_refused(data: Path, text_tower: Path, tmp_path: Path) -> None:
    records = load_pairs(data, "train")
    records.captions[3][0] = "another caption"
    run = Training(configure(data, tmp_path / "run", text_tower, cusa=True, **write_caches(tmp_path, records)))
    with pytest.raises(StaleStoreError, match="something else .* than the caption 'caption 0 of image 3"):
        run.fit()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_steps": None}, "streaming = True needs max_steps"),
        (
            {"phases": [{"train": "all", "steps": 2}, {"train": "all", "epochs": 1}], "max_steps": None},
            r"phases.1.epochs = 1 and streaming = True: .*give phases.1.epochs=null and phases.1.steps",
        ),
        ({"phases": [{"train": "all", "steps": 2}]}, "max_steps = 7 beside phases.0.steps = 2"),
        ({"regions": "cache"}, "regions = 'cache', which needs the whole training split; set regions=null"),
        ({"text": None}, "needs a text tower, got text = None.*word_embeddings="),
        ({"scheduler": "step", "decay_epochs": [1]}, "no epochs for scheduler = 'step'"),
    ],
)
def test_what_needs_the_whole_split_is_refused(data: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(data, tmp_path, tmp_path, **keys)


def test_a_loader_s_process_that_dies_is_told_with_its_shards(data: Path, text_tower: Path, tmp_path: Path) -> None:
    run = Training(configure(data, tmp_path / "run", text_tower, num_workers=1))
    decode = run.train_records.decode

    def die(*arguments: Any) -> Any:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*arguments)

    run.train_records.decode = die
    with pytest.raises(TrainingStopped, match=r"exited unexpectedly.* after step 0, of .*train-.*row group"):
        run.fit()
