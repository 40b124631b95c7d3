"""A run that is killed at any moment goes on as if it had not been: checkpoints, their faults, and signals."""

import json
import logging
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_makers import Processes, killed_at_call, tiny_config, write_scan

from modeling_tvrn import TVRNModel
from modeling_tvrn.storage.files import write_json
from modeling_tvrn.training import TrainingConfig, TrainingStopped
from modeling_tvrn.training import run as run_module
from modeling_tvrn.training.calibration import calibrate
from modeling_tvrn.training.interrupt import Interrupt, watching_signals
from modeling_tvrn.training.loop import Training, train
from modeling_tvrn.training.snapshots import Snapshots, read_snapshot

# 28 captions; dropout, so that the random state matters; means of weights; two phases
KEYS = {
    "save_steps": 2, "ema_decay": 0.9, "word_dropout": 0.2, "region_dropout": 0.2,
}  # fmt: skip
PHASES = (
    {"train": ["embeddings", "late_interaction"], "epochs": 1, "batch_size": 10}, {"train": "all", "epochs": 2},
)  # fmt: skip
STEPS = 3 + 2 * 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan"))


@pytest.fixture
def configure(data: Path, tmp_path: Path) -> Callable[..., TrainingConfig]:
    def make(**keys: Any) -> TrainingConfig:
        if "max_steps" not in keys:
            keys.setdefault("phases", list(PHASES))
        return tiny_config(data, tmp_path / keys.pop("name", "run"), **{**KEYS, **keys})

    return make


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    folder = tmp_path / "processes"
    folder.mkdir()
    return Processes(folder)


def fit(config: TrainingConfig) -> dict[str, Any]:
    """One run, or what is left of it; what is not in the weights' files."""
    run = Training(config)
    run.fit()
    kept = ("step", "epoch", "loss", "matching_loss", "contrastive_loss", "learning_rate", "gradient_norm", "rsum")
    history = [{name: event[name] for name in kept if name in event} for event in run.progress.history]
    return {"history": history, "best": [run.best.step, run.best.rsum], "step": run.step}


def final(folder: str | Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights, moments, means and random states after the last step, and the best model's weights."""
    snapshot = read_snapshot(Path(folder) / "checkpoints" / f"step-{step:08d}")
    tensors = {f"{file}/{name}": value for file, named in snapshot.tensors.items() for name, value in named.items()}
    best = {f"best/{name}": value for name, value in load_file(Path(folder) / "model.safetensors").items()}
    return tensors | best


def assert_equal_bits(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert first.keys() == other.keys()
    assert [name for name, value in first.items() if not torch.equal(value, other[name])] == []


# -- going on --------------------------------------------------------------------------------------------


def kill_at(config: TrainingConfig, event: str, count: int) -> dict[str, Any]:
    """Go on with a run, and kill -9 this process at the count-th event of a kind."""
    from modeling_tvrn.storage import files
    from modeling_tvrn.training import objective, snapshots

    watched = killed_at_call(count)

    if event == "forward":
        objective.Objective.score = watched(objective.Objective.score)  # type: ignore[method-assign]
    elif event == "update":
        torch.optim.AdamW.step = watched(torch.optim.AdamW.step)  # type: ignore[method-assign]
    elif event == "write":
        snapshots.write_tensors = watched(snapshots.write_tensors)  # type: ignore[assignment]
    elif event == "remove":
        shutil.rmtree = watched(shutil.rmtree)  # type: ignore[assignment]
    else:
        setattr(os, event, watched(getattr(os, event)))
    assert files.os is os
    return fit(config)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_run_killed_again_and_again_ends_with_the_same_bits(
    configure: Callable[..., TrainingConfig], processes: Processes, count: int
) -> None:
    keys = {"phases": [PHASES[0], {"train": "all", "epochs": 8 if count == 1 else 3}]}
    whole = processes.run(fit, configure(**keys, name="whole"), count=count)
    going_on = configure(**keys, name="killed", resume="auto")
    draw = random.Random(count)
    events = {"forward": 6, "update": 5, "fsync": 18, "rename": 5, "replace": 6, "write": 8, "remove": 6}
    kills = 0
    for _ in range(60):
        event = draw.choice(list(events))
        number = draw.randint(1, events[event])
        codes = processes.finish(processes.start(kill_at, going_on, event, number, count=count))
        if codes == [0] * count:
            break
        kills += -signal.SIGKILL in codes
    assert kills >= (10 if count == 1 else 4)
    left = processes.run(fit, going_on, count=count)
    assert left[0] == whole[0]
    steps = left[0]["step"]
    assert_equal_bits(final(configure(name="whole").output_dir, steps), final(going_on.output_dir, steps))


FIVE = [  # ends after 3, 9, 12, 14 and 18 steps: at the end of an epoch and within one
    {"train": "embeddings", "epochs": 1, "batch_size": 10}, {"train": "late_interaction", "steps": 6},
    {"train": "distilled_embeddings", "epochs": 1, "batch_size": 10}, {"train": "reasoning", "steps": 2},
    {"train": "all", "epochs": 1},
]  # fmt: skip


@pytest.mark.slow
def test_every_step_of_every_phase_goes_on_with_the_same_bits(configure: Callable[..., TrainingConfig]) -> None:
    model = {"use_refined_features": False, "distillation_loss_weight": 1.0}
    keys = {"keep_checkpoints": 100, "save_steps": 1, "model": model, "phases": FIVE}
    whole, again = configure(**keys, name="whole"), configure(**keys, name="again")
    expected = fit(whole)
    assert expected["step"] == 18
    shutil.copytree(whole.output_dir, again.output_dir)  # a best model of another folder would not be taken over
    for step in range(1, 18):
        path = Path(again.output_dir) / "checkpoints" / f"step-{step:08d}"
        assert fit(configure(**keys, name="again", resume=str(path))) == expected, step
        assert_equal_bits(final(whole.output_dir, 18), final(again.output_dir, 18))


@pytest.mark.slow
def test_processes_killed_in_each_phase_go_on_with_the_same_bits(
    configure: Callable[..., TrainingConfig], processes: Processes
) -> None:
    model = {"use_refined_features": False, "distillation_loss_weight": 1.0}
    keys = {"model": model, "phases": FIVE}
    whole = processes.run(fit, configure(**keys, name="whole"), count=2)
    killed, kills = configure(**keys, name="killed", resume="auto"), 0
    for _ in range(8):
        codes = processes.finish(processes.start(kill_at, killed, "update", 4, count=2))
        kills += -signal.SIGKILL in codes
    assert kills >= 5
    assert processes.run(fit, killed, count=2)[0] == whole[0]
    assert_equal_bits(final(configure(**keys, name="whole").output_dir, 18), final(killed.output_dir, 18))


@pytest.mark.slow
def test_the_newest_are_kept_and_a_former_run_s_go(
    configure: Callable[..., TrainingConfig], caplog: pytest.LogCaptureFixture
) -> None:
    config = configure(save_steps=3)
    fit(config)
    snapshots = Snapshots(Path(config.output_dir) / "checkpoints")
    assert snapshots.steps() == [9, STEPS]
    state = json.loads((snapshots.path(9) / "manifest.json").read_text())["state"]
    assert state["config_hash"] and state["counters"]["step"] == 9
    assert {path.suffix for path in snapshots.path(9).iterdir()} == {".json", ".safetensors"}
    with caplog.at_level(logging.WARNING, "modeling_tvrn"):
        fit(configure(save_steps=3, max_steps=4))
    assert "checkpoints of a former run, up to step 11" in caplog.text
    assert snapshots.steps() == [3, 4]


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do(configure: Callable[..., TrainingConfig]) -> None:
    first = fit(configure(max_steps=4))
    again = fit(configure(max_steps=4, resume="auto"))
    assert first == again


# -- what does not fit -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_checkpoint_of_another_folder_brings_no_best_model_with_it(
    configure: Callable[..., TrainingConfig], caplog: pytest.LogCaptureFixture
) -> None:
    """Its model lies in that folder: what counts here is what this run keeps, if need be the one it begins with."""
    former = fit(configure(name="former"))
    steps = Snapshots(Path(configure(name="former").output_dir) / "checkpoints").steps()
    run = Training(
        configure(
            name="here",
            resume=str(Snapshots(Path(configure(name="former").output_dir) / "checkpoints").path(steps[-1])),
        )
    )
    assert run.best.step == 0 and "stays in the folder of" in caplog.text
    run.fit()
    assert run.best.step == run.step == STEPS and former
    run.best.load()


@pytest.mark.slow
def test_another_phase_is_named_by_its_place_and_key(configure: Callable[..., TrainingConfig]) -> None:
    fit(configure())
    changed = [PHASES[0], {**PHASES[1], "epochs": 3}]
    with pytest.raises(ValueError, match=r"made with other settings: phases\.1\.epochs: 2 → 3\. Go on"):
        Training(configure(phases=changed, resume="auto"))
    run = Training(configure(phases=changed, resume="auto", resume_changed=True))
    assert run.step == STEPS
    run.fit()
    assert run.step == STEPS + 4


@pytest.mark.slow
def test_other_settings_are_named_and_refused_unless_meant(configure: Callable[..., TrainingConfig]) -> None:
    fit(configure(max_steps=4))
    changed = {"learning_rate": 1e-3, "batch_size": 9, "model": {"margin": 0.3}, "logging_steps": 5, "resume": "auto"}
    with pytest.raises(ValueError, match=r"batch_size: 8 → 9; learning_rate: 0.003 → 0.001; model.margin: None → 0.3"):
        Training(configure(max_steps=4, **changed))
    run = Training(configure(max_steps=6, resume_changed=True, **changed))
    assert run.step == 4
    run.fit()
    assert run.step == 6


@pytest.mark.slow
def test_another_model_or_data_is_refused(configure: Callable[..., TrainingConfig]) -> None:
    fit(configure(max_steps=2))
    with pytest.raises(ValueError, match="holds another model: .* differ in name or shape"):
        Training(configure(max_steps=2, resume="auto", resume_changed=True, model={"similarity_size": 5}))
    with pytest.raises(ValueError, match="training data's images or captions are others"):
        Training(configure(max_steps=2, resume="auto", max_train_images=13))
    with pytest.raises(ValueError, match=r"nowhere is no whole checkpoint: it has no manifest.json; give a folder"):
        Training(configure(resume="nowhere"))


def test_without_a_checkpoint_auto_starts_anew(configure: Callable[..., TrainingConfig]) -> None:
    assert Training(configure(resume="auto")).step == 0


# -- faults ----------------------------------------------------------------------------------------------


def _cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _flip(path: Path) -> None:
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _lose_file(path: Path) -> None:
    (path / "random.safetensors").unlink()


def _lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def _half_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": 1, "fi')


@pytest.mark.slow
@pytest.mark.parametrize("fault", [_cut, _flip, _lose_file, _lose_manifest, _half_manifest])
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(
    configure: Callable[..., TrainingConfig], caplog: pytest.LogCaptureFixture, fault: Callable[[Path], None]
) -> None:
    fit(configure(max_steps=6))
    snapshots = Snapshots(Path(configure().output_dir) / "checkpoints")
    expected = final(configure().output_dir, 6)
    assert snapshots.steps() == [4, 6]
    fault(snapshots.path(6))
    with caplog.at_level(logging.WARNING, "modeling_tvrn"):
        run = Training(configure(max_steps=6, resume="auto"))
    assert run.step == 4
    assert "step-00000006" in caplog.text and "trying the one before it, of step 4" in caplog.text
    run.fit()
    assert_equal_bits(final(configure().output_dir, 6), expected)
    for step in snapshots.steps():
        fault(snapshots.path(step))
    with pytest.raises(ValueError, match="none of the 2 checkpoints .* is whole"):
        Training(configure(max_steps=6, resume="auto"))


def fill_disk_after(config: TrainingConfig, steps: int, limit: int) -> dict[str, Any]:
    """Train with files limited in size from a step on, as a full disk or a quota does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run = Training(config)
    finish = run._finish_step

    def then_limit(phase: Any) -> None:
        if run.step == steps:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        finish(phase)
        if run.step == steps + 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    run._finish_step = then_limit  # type: ignore[method-assign]
    run.fit()
    return {"own": run.snapshots.own, "best": run.best.step}


@pytest.mark.slow
def test_a_full_disk_leaves_the_former_checkpoint_and_the_run_goes_on(
    configure: Callable[..., TrainingConfig], processes: Processes
) -> None:
    config = configure(keep_checkpoints=10, evaluation_steps=1)
    [result] = processes.run(fill_disk_after, config, 5, 1000)
    snapshots = Snapshots(Path(config.output_dir) / "checkpoints")
    assert result["own"] == snapshots.steps() == [2, 4, 10, 11]  # 6 and 8 did not fit
    for step in snapshots.steps():
        read_snapshot(snapshots.path(step))
    assert not (snapshots.folder / ".saving").exists()


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(
    configure: Callable[..., TrainingConfig], caplog: pytest.LogCaptureFixture
) -> None:
    run = Training(configure())
    finish = run._finish_step

    def then_break(phase: Any) -> None:
        if run.step + 1 == 6:  # a step that saves
            with torch.no_grad():
                run.model.region_projection.weight.fill_(torch.nan)
        finish(phase)

    run._finish_step = then_break  # type: ignore[method-assign]
    with pytest.raises(TrainingStopped, match="after step 6"):
        run.fit()
    assert run.snapshots.steps() == [2, 4]
    assert "last good checkpoint is" in caplog.text and "step-00000004" in caplog.text
    assert all(value.isfinite().all() for value in read_snapshot(run.snapshots.path(4)).tensors["model"].values())


# -- signals ---------------------------------------------------------------------------------------------


def signal_after(config: TrainingConfig, steps: int, number: int, rank: int) -> dict[str, Any]:
    run = Training(config)
    finish = run._finish_step

    def then_signal(phase: Any) -> None:
        if run.step + 1 == steps and run.accelerator.process_index == rank:
            os.kill(os.getpid(), number)
        finish(phase)

    run._finish_step = then_signal  # type: ignore[method-assign]
    run.fit()
    raise AssertionError("the run went on to its end")


@pytest.mark.parametrize(("number", "count"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
@pytest.mark.slow
def test_a_scheduler_s_signal_saves_and_leaves_with_code_0(
    configure: Callable[..., TrainingConfig], processes: Processes, number: int, count: int
) -> None:
    keys = {"save_steps": 100}
    processes.run(fit, configure(**keys, name="whole"), count=count)
    config = configure(**keys, name="told", resume="auto")
    codes = processes.finish(processes.start(signal_after, config, 5, number, count - 1, count=count))
    assert codes == [0] * count
    [step] = Snapshots(Path(config.output_dir) / "checkpoints").steps()
    assert step == (5 if count == 1 else 6)  # among several it is agreed on one step later
    processes.run(fit, config, count=count)
    assert_equal_bits(final(configure(name="whole").output_dir), final(config.output_dir))


def signalled_in_set_up(config: TrainingConfig, number: int, rank: int) -> Any:
    """A run of which one process gets a signal between its start and its first step."""
    build = run_module.build_model

    def build_and_signal(*arguments: Any) -> Any:
        if os.environ.get("RANK", "0") == str(rank):
            os.kill(os.getpid(), number)
        return build(*arguments)

    run_module.build_model = build_and_signal
    train(config)
    raise AssertionError("the run went on to its end")


@pytest.mark.parametrize(
    ("number", "count", "rank"), [(signal.SIGTERM, 1, 0), (signal.SIGTERM, 2, 0), (signal.SIGUSR1, 2, 1)]
)
@pytest.mark.slow
def test_a_signal_while_the_run_is_set_up_ends_all_processes_with_code_0(
    configure: Callable[..., TrainingConfig], processes: Processes, number: int, count: int, rank: int
) -> None:
    config = configure()
    assert processes.finish(processes.start(signalled_in_set_up, config, number, rank, count=count)) == [0] * count
    assert not (Path(config.output_dir) / "checkpoints").exists()


@pytest.mark.slow
def test_a_signal_is_noted_from_the_first_import_on_and_by_the_next_run_forgotten(
    configure: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # one of two: it must not leave the other waiting
    with watching_signals(set_up=True):
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.delenv("WORLD_SIZE")
    run = Training(configure(max_steps=1))
    with pytest.raises(SystemExit) as left:
        run.fit()
    assert left.value.code == 0 and run.step == 0
    assert fit(configure(max_steps=1))["step"] == 1
    with pytest.raises(SystemExit) as left, watching_signals(set_up=True):
        os.kill(os.getpid(), signal.SIGTERM)  # alone, it leaves at once
    assert left.value.code == 0
    Interrupt(torch.device("cpu")).forget()


# -- what is found before the work -----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["/dev/null", "/dev/null/run", "/proc/run", "a file"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_read(
    configure: Callable[..., TrainingConfig], tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_training_pairs", lambda *_: pytest.fail("data were read"))
    if folder == "a file":
        (tmp_path / "file").write_text("")
        folder = str(tmp_path / "file")
    config = configure().model_copy(update={"output_dir": folder})
    with pytest.raises(OSError, match=f"{folder} can't be a folder to write into: .*; give another one"):
        Training(config)


@pytest.mark.parametrize("manifest", ["{}", "[]", "", "null", '{"format": "tvrn-checkpoint"}', "[" * 100_000, None])
def test_a_checkpoint_with_another_manifest_is_passed_over(
    tmp_path: Path, manifest: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    snapshots = Snapshots(tmp_path)
    for step in (1, 2):
        snapshots.save(step, {}, {"model": {"weight": torch.full((1,), float(step))}})
    path = snapshots.path(2) / "manifest.json"
    if manifest is None:
        write_json(path, "tvrn-checkpoint", {})  # with the right checksum
    else:
        path.write_text(manifest)
    found = snapshots.newest()
    assert found is not None and found.tensors["model"]["weight"] == 1 and "trying the one before it" in caplog.text


def test_the_best_model_of_an_interrupted_run_is_calibrated_and_the_run_learns_as_before(
    configure: Callable[..., TrainingConfig],
) -> None:
    run = Training(configure(max_steps=2))
    run.fit()  # it ends before results are written
    saved = TVRNModel.from_pretrained(run.best.folder)
    assert saved.is_calibrated and not run.model.is_calibrated
    shift = saved.calibration_shift.clone()
    calibrate(saved, run.processor, run.validation_records)
    assert torch.allclose(saved.calibration_shift, shift, atol=1e-4)
