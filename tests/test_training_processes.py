"""Several processes compute what one does: loss, every gradient, and the weights after some steps."""

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from teacher_makers import write_caches
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from training_makers import TINY_BERT, Processes, tiny_config, write_scan

from modeling_tvrn.data import load_pairs
from modeling_tvrn.training import TrainingConfig, sharding, train
from modeling_tvrn.training.batches import CaptionBatches, DistributedBatchSampler
from modeling_tvrn.training.distributed import (
    average_gradients,
    broadcast_json,
    gather_bytes,
    gather_counts,
    gather_rows,
    processes,
)
from modeling_tvrn.training.loop import Training
from modeling_tvrn.training.snapshots import read_snapshot

# No dropout, whose draws differ between processes. A large epsilon: some weights' true gradient is 0, and Adam would
# make steps of full size of its last bits.
KEYS = {
    "max_steps": 5, "logging_steps": 1, "adam_epsilon": 1e-3, "learning_rate": 2e-2, "keep_checkpoints": 0,
    "evaluation_steps": 100, "max_grad_norm": 0.5,
}  # fmt: skip


def phases(*named: Any) -> dict[str, Any]:
    """Of names and steps in turn."""
    found = [{"train": name, "steps": steps} for name, steps in zip(named[::2], named[1::2], strict=True)]
    return {"phases": found, "max_steps": None}


BERT = {**TINY_BERT, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "saf": {"batch_size": 8, "model": {"similarity_head": "saf"}},
    "sgr": {"batch_size": 9, "model": {"similarity_head": "sgr", "refinement": "gru"}},
    "two phases, images repeated": {
        "batch_size": 7, **phases(["embeddings", "late_interaction"], 4, "all", 1), "batch_captions_per_image": 2,
    },
    "phases that keep the ones before": {
        **phases("embeddings", 2, "late_interaction", 1, "distilled_embeddings", 2, "reasoning", 1), "batch_size": 14,
        "model": {"use_refined_features": False, "distillation_loss_weight": 1.0},
    },
    "a last batch of two captions": {"batch_size": 13, "model": {"similarity_head": "sgr"}},
    "accumulated, distilled": {
        "batch_size": 6, "gradient_accumulation_steps": 2, "model": {"distillation_loss_weight": 0.7},
    },
    "cusa": {"batch_size": 8, "batch_captions_per_image": 2, "cusa": True, "cusa_teacher_temperature": 0.2},
    "towers a few items at a time": {"batch_size": 13, "tower_batch_size": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan"))


def observed(config: TrainingConfig, name: str, dtype: str = "float64") -> dict[str, Any]:
    """A run's losses; its first gradients and last weights go to a file."""
    torch.set_default_dtype(getattr(torch, dtype))
    run = Training(config)
    update, first = run._update, {}

    def then_look() -> Tensor | None:
        if not first:
            named = run.model.named_parameters()
            first.update({f"gradient/{key}": value.grad.clone() for key, value in named if value.grad is not None})
        return update()

    run._update = then_look  # type: ignore[method-assign]
    run.fit()
    weights = {f"weight/{key}": value.detach().clone() for key, value in run.model.named_parameters()}
    if run.accelerator.is_main_process:
        save_file(first | weights, f"{name}.safetensors")
    losses = [event["loss"] for event in run.progress.history if "loss" in event]
    return {"losses": losses, "world": processes(), "used": run.accelerator.num_processes}


def compared(found: tuple[dict[str, Any], dict[str, Tensor]], expected: Any, gradient: float, rest: float) -> None:
    assert found[0]["losses"] == pytest.approx(expected[0]["losses"], rel=rest, abs=rest)
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        bound = gradient if name.startswith("gradient/") else rest
        torch.testing.assert_close(
            found[1][name], value, atol=bound, rtol=bound, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "dtype"), [*((name, "float64") for name in VARIANTS), ("saf", "float32"), ("sgr", "float32")]
)
def test_several_processes_learn_what_one_does(data: Path, tmp_path: Path, variant: str, dtype: str) -> None:
    keys = {**KEYS, **VARIANTS[variant]}
    keys["model"] = {"dropout": 0.0, "image_dropout": 0.0, "text_dropout": 0.0, **keys.get("model", {})}
    if keys.get("cusa"):
        keys |= write_caches(tmp_path, load_pairs(data, "train", captions_per_image=2))
    runner, found = Processes(tmp_path), {}
    for count in (1, 2, 3):
        name = str(tmp_path / str(count))
        results = runner.run(observed, tiny_config(data, tmp_path / "run", **keys), name, dtype, count=count)
        assert [result["world"] for result in results] == [result["used"] for result in results] == [count] * count
        found[count] = results[0], load_file(f"{name}.safetensors")
    gradients = [value.abs().max() for name, value in found[1][1].items() if name.startswith("gradient/")]
    assert max(gradients) > 1e-2
    for count in (2, 3):
        # In float32 products of other shapes round otherwise, which the normalisations amplify: the gradients, of
        # about 1 here, agree to four digits. In float64 nothing but rounding is left.
        # (CUSA computes its cosines in float32 always.) Adam's first steps have the sign of a gradient, whatever its
        # size, so that after them losses and weights in float32 agree to a few hundredths alone.
        bounds = (1e-8, 1e-8) if dtype == "float64" and variant != "cusa" else (2e-4, 1e-5)
        if dtype == "float32":
            bounds = (5e-3, 5e-2)
        compared(found[count], found[1], *bounds)


@pytest.mark.slow
def test_towers_run_a_few_items_at_a_time_with_the_gradients_of_the_plain_way(data: Path, tmp_path: Path) -> None:
    learned = phases(["embeddings", "late_interaction"], 3, "all", 2)
    keys = {**KEYS, "batch_size": 13, **learned, "model": {"dropout": 0.0}}
    keys["model"] |= {"image_dropout": 0.0, "text_dropout": 0.0, "refinement": "gru"}
    runner, found = Processes(tmp_path), []
    for size in (None, 3, 50):
        config, name = tiny_config(data, tmp_path / "run", **keys, tower_batch_size=size), str(tmp_path / str(size))
        [result] = runner.run(observed, config, name)
        found.append((result, load_file(f"{name}.safetensors")))
    for each in found[1:]:
        compared(each, found[0], 1e-9, 1e-9)


@pytest.mark.slow
def test_dropout_leaves_out_the_same_in_both_passes_of_the_towers(data: Path, tmp_path: Path) -> None:
    keys = {**KEYS, "batch_size": 13, "model": {"dropout": 0.3}, "word_dropout": 0.3, "region_dropout": 0.3}
    runner, found = Processes(tmp_path), []
    for size in (None, 50):  # in one piece, so that the draws are those of the plain way
        config, name = tiny_config(data, tmp_path / "run", **keys, tower_batch_size=size), str(tmp_path / str(size))
        [result] = runner.run(observed, config, name)
        found.append((result, load_file(f"{name}.safetensors")))
    compared(found[1], found[0], 1e-9, 1e-9)


SHARDED: dict[str, dict[str, Any]] = {
    "sgr, accumulated": {"batch_size": 6, "gradient_accumulation_steps": 2, "model": {"similarity_head": "sgr"}},
    "a last batch of two captions": {"batch_size": 13},
    "phases, embeddings kept, means of weights": {
        **phases("embeddings", 1, "late_interaction", 2, "reasoning", 2), "batch_size": 14, "ema_decay": 0.9,
        "model": {"use_refined_features": False},
    },
    "soft labels": {"batch_size": 8, "batch_captions_per_image": 2, "cusa": True, "cusa_teacher_temperature": 0.2},
}  # fmt: skip


def sharded_keys(data: Path, folder: Path, **keys: Any) -> dict[str, Any]:
    """A run with a text tower whose layers are gathered one by one."""
    model = {"dropout": 0.0, "image_dropout": 0.0, "text_dropout": 0.0, "text_config": BERT, **keys.pop("model", {})}
    if keys.get("cusa"):
        keys |= write_caches(folder, load_pairs(data, "train", captions_per_image=2))
    return {**KEYS, "shard": True, "tower_learning_rate": 2e-2, **keys, "model": model}


def observed_parts(config: TrainingConfig, name: str) -> dict[str, Any]:
    """`observed` of a sharded run; what its parameters are while training, and what it ends with."""
    torch.set_default_dtype(torch.float64)
    sharding.OWN_GROUP = 1
    run = Training(config)
    update, tensors = run._update, {}

    def then_look() -> Tensor | None:
        if not tensors:
            named = run.model.named_parameters()
            found = {f"gradient/{key}": value.grad for key, value in named if value.grad is not None}
            tensors.update({key: sharding.whole(value).clone() for key, value in found.items()})
        return update()

    run._update = then_look  # type: ignore[method-assign]
    run.fit()
    ends = {f"weight/{key}": sharding.whole(value.detach()) for key, value in run.model.named_parameters()}
    if run.average is not None:
        ends |= {f"mean/{key}": sharding.whole(value) for key, value in run.average.means().items()}
    if run.accelerator.is_main_process:
        save_file(tensors | ends, f"{name}.safetensors")
    losses = [event["loss"] for event in run.progress.history if "loss" in event]
    parts = [type(value).__name__ for value in run.objective.parameters()]
    layers = [type(layer).__name__ for layer in run.model.text_model.encoder.layer]
    return {"losses": losses, "world": processes(), "parts": parts, "layers": layers, "rsum": run.best.rsum}


@pytest.mark.parametrize("variant", SHARDED)
@pytest.mark.slow
def test_weights_in_parts_learn_what_whole_ones_do(data: Path, tmp_path: Path, variant: str) -> None:
    keys = sharded_keys(data, tmp_path, **SHARDED[variant])
    runner, found = Processes(tmp_path), {}
    counts = (1, 3) if variant == "a last batch of two captions" else (1, 2)
    for count in counts:
        name = str(tmp_path / str(count))
        results = runner.run(observed_parts, tiny_config(data, tmp_path / name, **keys), name, count=count)
        assert [result["world"] for result in results] == [count] * count
        assert set(results[0]["parts"]) == ({"Parameter"} if count == 1 else {"DTensor"})
        assert set(results[0]["layers"]) == ({"BertLayer"} if count == 1 else {"FSDPBertLayer"})
        found[count] = results[0], load_file(f"{name}.safetensors")
    bounds = (1e-9, 1e-9) if variant != "soft labels" else (2e-4, 1e-5)
    compared(found[counts[1]], found[1], *bounds)
    assert found[counts[1]][0]["rsum"] == pytest.approx(found[1][0]["rsum"], abs=1e-6)


def fit_parts(config: TrainingConfig, stop_after: int | None = None) -> dict[str, Any]:
    """A sharded run, killed in the middle of a step if wanted."""
    sharding.OWN_GROUP = 1
    run = Training(config)
    update = run._update

    def then_die() -> Tensor | None:
        if run.step == stop_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return update()

    run._update = then_die  # type: ignore[method-assign]
    run.fit()
    return {"best": [run.best.step, run.best.rsum]}


@pytest.mark.slow
def test_a_run_of_parts_goes_on_with_the_same_bits_and_among_whole_ones(data: Path, tmp_path: Path) -> None:
    keys = sharded_keys(data, tmp_path, **SHARDED["phases, embeddings kept, means of weights"])
    keys |= phases("embeddings", 1, "late_interaction", 2, "reasoning", 5)
    keys |= {"word_dropout": 0.2, "save_steps": 2, "keep_checkpoints": 9, "evaluation_steps": 3}
    runner = Processes(tmp_path)
    whole = tiny_config(data, tmp_path / "whole", **keys)
    expected = runner.run(fit_parts, whole, count=2)
    killed = tiny_config(data, tmp_path / "killed", resume="auto", **keys)
    for step in (1, 4, 5):  # before the first checkpoint, in the steps of each phase
        assert -signal.SIGKILL in runner.finish(runner.start(fit_parts, killed, step, count=2))
    assert runner.run(fit_parts, killed, count=2) == expected
    first, other = (
        {
            f"{file}/{name}": value
            for file, named in read_snapshot(folder / "checkpoints" / "step-00000008").tensors.items()
            for name, value in named.items()
        }
        for folder in (tmp_path / "whole", tmp_path / "killed")
    )
    assert first.keys() == other.keys() and any(name.startswith("average/") for name in first)
    assert [name for name, value in first.items() if not torch.equal(value, other[name])] == []
    best = [load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", tmp_path / "killed")]
    assert all(torch.equal(value, best[1][name]) for name, value in best[0].items())
    assert {value.shape for value in best[0].values()} >= {(12, 12)}  # whole, not a part
    # a checkpoint of parts is one like any other: whole weights go on with it
    path = tmp_path / "whole" / "checkpoints" / "step-00000006"
    changed = tiny_config(data, tmp_path / "other", resume=str(path), **{**keys, "shard": False, "word_dropout": 0.2})
    runner.run(fit_parts, changed, count=2)
    end = read_snapshot(tmp_path / "other" / "checkpoints" / "step-00000008").tensors["model"]
    for name, value in end.items():
        torch.testing.assert_close(value, first[f"model/{name}"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tower_batch_size": 4}, "shard = True and tower_batch_size = 4.*set tower_batch_size=null"),
        ({"mixed_precision": "fp16"}, "shard = True and mixed_precision = 'fp16'.*use mixed_precision=bf16"),
    ],
)
def test_what_weights_in_parts_cannot_do_is_refused(
    data: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(data, tmp_path, shard=True, **keys)


def test_a_launcher_s_own_sharding_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="accelerate's configuration asks for FSDP.*shard=true"):
        Training(tiny_config(data, tmp_path / "run"))


def trained(config: TrainingConfig) -> dict[str, Any]:
    end_group, left = torch.distributed.destroy_process_group, []

    def look_and_end(*arguments: Any) -> None:
        # By type: isinstance asks objects for their __class__, and torch has one that warns when it is asked.
        left.extend("wrapper" for each in gc.get_objects() if DistributedDataParallel in type(each).__mro__)
        end_group(*arguments)

    torch.distributed.destroy_process_group = look_and_end
    result = train(config)
    return {"rsum": result["metrics"]["rsum"], "table": result["table"], "steps": result["steps"], "left": left}


@pytest.mark.slow
def test_a_whole_run_of_two_processes_leaves_one_folder_and_tells_both(data: Path, tmp_path: Path) -> None:
    keys = {"epochs": 1, "evaluation_images": 4, "model": {"dropout": 0.0, "image_dropout": 0.0, "text_dropout": 0.0}}
    runner = Processes(tmp_path)
    [alone] = runner.run(trained, tiny_config(data, tmp_path / "alone", **keys))
    first, second = runner.run(trained, tiny_config(data, tmp_path / "two", **keys), count=2)
    assert first == second and first["steps"] == alone["steps"] == 4
    assert not first["left"]  # a wrapper freed after the group hangs now and then
    assert first["rsum"] == pytest.approx(alone["rsum"], abs=40)  # of six images: a rank more or less is 17 points
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        path.name for path in (tmp_path / "alone").iterdir()
    }
    stored = json.loads((tmp_path / "two" / "results.json").read_text())
    assert stored["metrics"]["rsum"] == first["rsum"]
    assert len([event for event in stored["history"] if "loss" in event]) >= 2


# -- the parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_batch_is_dealt_out_by_image_without_gap_or_repetition(count: int) -> None:
    rows = [0, 0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 6, 7, 8]
    batches = CaptionBatches(rows, 5, seed=4)
    shares = [list(DistributedBatchSampler(batches, rank, count)) for rank in range(count)]
    for number, batch in enumerate(batches):
        dealt = [share[number] for share in shares]
        own = [[caption for caption in share if caption >= 0] for share in dealt]
        assert sorted(caption for share in own for caption in share) == sorted(batch)
        images = [image for share in own for image in {rows[caption] for caption in share}]
        assert len(images) == len(set(images))
        for share, real in zip(dealt, own, strict=True):
            assert share == real or (not real and len(share) == 1 and ~share[0] in batch)
        filled = [len({rows[caption] for caption in share}) for share in own]
        assert max(filled) - min(filled) <= 1


def exchanged() -> dict[str, Any]:
    rank, count = torch.distributed.get_rank(), processes()
    own = torch.arange(2.0 * rank).view(rank, 2).requires_grad_()  # 0, 1, 2 rows
    [counts] = gather_counts(rank, device=own.device)
    whole = gather_rows(own, counts)
    ((rank + 1) * whole.square()).sum().backward()
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 1, bias=False) for _ in range(2)])
    layers[0].weight.grad = torch.full((1, 2), float(rank))
    if rank == 1:
        layers[1].weight.grad = torch.ones(1, 2)
    unused = torch.nn.Parameter(torch.ones(1))
    average_gradients([*layers.parameters(), unused])
    said = gather_bytes(torch.full((rank + 1,), rank, dtype=torch.uint8), torch.device("cpu"))
    return {
        "whole": whole.tolist(),
        "gradient": own.grad.tolist() if own.grad is not None else None,
        "averages": [layer.weight.grad.tolist() for layer in layers],
        "unused": unused.grad is None,
        "bytes": [part.tolist() for part in said],
        "told": broadcast_json({"a": [rank, count]}, torch.device("cpu")),
    }


def joined(function: Callable[[], Any]) -> Any:
    torch.distributed.init_process_group("gloo")
    return function()


def test_rows_of_different_numbers_are_gathered_and_their_gradients_summed(tmp_path: Path) -> None:
    results = Processes(tmp_path).run(joined, exchanged, count=3)
    rows = [[0.0, 1.0], [0.0, 1.0], [2.0, 3.0]]
    for rank, result in enumerate(results):
        assert result["whole"] == rows
        # each process weighs the sum of squares by its rank plus one: together 6
        own = (rows[:0], rows[:1], rows[1:])[rank]
        assert result["gradient"] == [[12 * value for value in row] for row in own]
        assert result["averages"] == [[[1.0, 1.0]], [[pytest.approx(1 / 3)] * 2]] and result["unused"]
        assert result["bytes"] == [[0], [1, 1], [2, 2, 2]]
        assert result["told"] == {"a": [0, 3]}
