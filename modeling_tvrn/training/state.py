"""Everything of a run that the next step depends on, into a checkpoint and back, bit for bit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..evaluation.provenance import versions
from ..redaction import without_secrets
from ..storage.fingerprints import digest
from .distributed import broadcast_json, gather_bytes
from .random_state import get_random_state, set_random_state
from .settings import FREE
from .sharding import part_like, whole_tensors
from .snapshots import Snapshot, read_snapshot
from .streams import StreamBatches, gather_positions

if TYPE_CHECKING:
    from .config import TrainingConfig
    from .run import Run

logger = logging.getLogger(__name__)

__all__ = ["capture", "differences", "resume"]

COUNTERS = ("step", "phase_number", "phase_step", "epoch", "epoch_step")


def capture(run: Run) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What a checkpoint holds: JSON values, and tensors by file. Every process calls it, the main one writes."""
    states = gather_bytes(get_random_state(run.accelerator.device), run.accelerator.device)
    keep = run.accelerator.is_main_process or not run.is_sharded
    tensors = {
        "model": whole_tensors(whole_state(run.model), keep),
        "optimizer": whole_tensors(flat_optimizer_state(run.optimizer.state_dict()), keep),
        "random": {f"process-{number:05d}": state for number, state in enumerate(states)},
    }
    if run.cusa is not None:
        tensors["cusa"] = whole_tensors(whole_state(run.cusa), keep)
    if run.average is not None:
        tensors["average"] = whole_tensors(run.average.means(), keep)
    settings = compared(run.config)
    state = {
        "counters": {name: getattr(run, name) for name in COUNTERS},
        "batches": [len(phase.batches) for phase in run.phases],
        "config": settings,
        "config_hash": digest(settings),
        "data": run.data_hash,
        "processes": len(states),
        "versions": versions(),
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler is not None else None,
        "average_steps": run.average.steps if run.average is not None else None,
        "best": {"step": run.best.step, "rsum": run.best.rsum},
        "watch": run.guard.state(),
        "progress": run.progress.state(),
        "waited": run.waited,
    }
    batches = run.phases[run.phase_number].batches
    if isinstance(batches, StreamBatches):
        number = run.phase_step * run.phases[run.phase_number].accumulation
        state["stream"] = gather_positions(batches, number, run.accelerator.device)
    return state, tensors


def resume(run: Run) -> bool:
    """Go on where the configured checkpoint was made; False where `resume` is auto and there is none.

    Raises:
        ValueError: the checkpoint is broken, of another model, or of other settings or data and `resume_changed` is
            not set.
    """
    wanted = run.config.resume
    if wanted is None:
        return False
    snapshot = _find(run, wanted)
    if snapshot is None:
        run.progress.say("resume=auto: no checkpoint in %s; starting anew", run.snapshots.folder)
        return False
    _check_settings(run, snapshot)
    _restore(run, snapshot)
    run.progress.say("going on from %s, after step %d of %d", snapshot.path, run.step, run.total_steps)
    return True


def _find(run: Run, wanted: str) -> Snapshot | None:
    """The checkpoint that the main process chose, read by every process."""
    if wanted != "auto":
        snapshot = read_snapshot(wanted)
        if snapshot.path.resolve().parent == run.snapshots.folder.resolve():
            step = snapshot.state["counters"]["step"]
            run.snapshots.own = [other for other in run.snapshots.steps() if other <= step]
        return snapshot
    main = run.accelerator.is_main_process
    found, problem = None, None
    try:
        found = run.snapshots.newest() if main else None
    except ValueError as error:
        problem = str(error)
    said = broadcast_json({"path": str(found.path) if found else None, "problem": problem}, run.accelerator.device)
    if said["problem"]:
        raise ValueError(said["problem"])
    if said["path"] is None or main:
        return found
    return read_snapshot(said["path"])


def _check_settings(run: Run, snapshot: Snapshot) -> None:
    state = snapshot.state
    found = differences(without_secrets(state["config"]), compared(run.config))
    if state["data"] != run.data_hash:
        found.append("the training data's images or captions are others")
    if state["processes"] != run.accelerator.num_processes:
        found.append(f"processes: {state['processes']} → {run.accelerator.num_processes}")
    if found and not run.config.resume_changed:
        raise ValueError(
            f"{snapshot.path} was made with other settings: {'; '.join(found)}. Go on with the former ones, or set "
            "resume_changed=true if these are meant (the result is then no longer that of one run)"
        )
    if found:
        logger.warning("going on from %s with other settings: %s", snapshot.path, "; ".join(found))
    now = versions()
    others = [f"{name} {old} → {now.get(name)}" for name, old in state["versions"].items() if now.get(name) != old]
    if others:
        logger.warning(
            "the checkpoint was made with other versions (%s): results may differ in bits", ", ".join(others)
        )


def _restore(run: Run, snapshot: Snapshot) -> None:
    state, tensors = snapshot.state, snapshot.tensors
    for name in COUNTERS:
        setattr(run, name, state["counters"][name])
    if run.phase_number >= len(run.phases):
        raise ValueError(
            f"{snapshot.path} is in phase {run.phase_number + 1}, but this run has {len(run.phases)}: it was made "
            "with phases that this configuration lacks"
        )
    if state["batches"] != [len(phase.batches) for phase in run.phases]:
        logger.warning("the batches are others than the checkpoint's: epoch %d starts again", run.epoch + 1)
        run.epoch_step = 0
    _restore_stream(run, state.get("stream"))
    load_whole_state(run.model, tensors["model"], str(snapshot.path))
    if run.cusa is not None and "cusa" in tensors:
        load_whole_state(run.cusa, tensors["cusa"], str(snapshot.path))
    # The groups are this run's: rates and decays come from the configuration, and were compared with it.
    groups = run.optimizer.state_dict()["param_groups"]
    weights = [weight for group in run.optimizer.param_groups for weight in group["params"]]
    run.optimizer.load_state_dict(nested_optimizer_state(tensors["optimizer"], groups, weights))
    if run.accelerator.scaler is not None and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    if run.average is not None and "average" in tensors:
        run.average.restore(tensors["average"], state["average_steps"])
    if snapshot.path.resolve().is_relative_to(Path(run.config.output_dir).resolve()):
        run.best.step, run.best.rsum = state["best"]["step"], state["best"]["rsum"]
    elif state["best"]["step"]:
        logger.warning(
            "the best model so far, of step %d, stays in the folder of %s: this run keeps the best of what comes now",
            *(state["best"]["step"], snapshot.path),
        )
    run.guard.restore(state["watch"])
    run.progress.restore(state["progress"], run.step)
    run.waited = state["waited"]
    own = tensors["random"].get(f"process-{run.accelerator.process_index:05d}")
    if own is not None:
        set_random_state(own, run.accelerator.device)


def _restore_stream(run: Run, positions: list[list[int]] | None) -> None:
    """Where each process's stream goes on; among another number of processes the epoch begins again."""
    phase = run.phases[run.phase_number]
    if not isinstance(phase.batches, StreamBatches):
        return
    if positions is None:
        raise ValueError("the checkpoint was made with streaming = False; set streaming=false, or start anew")
    # A phase is an epoch; the last one goes on where it was made longer.
    ended = phase is not run.phases[-1] and run.phase_step == phase.steps_per_epoch
    run.epoch, run.epoch_step = run.phase_number + int(ended), 0 if ended else run.phase_step
    if len(positions) == run.accelerator.num_processes:
        position = positions[run.accelerator.process_index]
    else:
        position = [max(epoch for epoch, *_ in positions), 0, 0]
    phase.batches.restore(run.phase_step * phase.accumulation, position)


# -- settings and data ----------------------------------------------------------------------------------------


def compared(config: TrainingConfig) -> dict[str, Any]:
    """The keys on which the weights depend, as JSON gives them back; secrets, which change nothing, are left out."""
    keys = type(config).model_fields
    kept = {name: value for name, value in config.as_dict().items() if FREE not in keys[name].metadata}
    return dict(json.loads(json.dumps(without_secrets(kept))))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key whose value changed, as `name: old → new`."""
    found = []
    for name in sorted({*old, *new}):
        before, after = _by_place(old.get(name)), _by_place(new.get(name))
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}: {before!r} → {after!r}")
    return found


def _by_place(value: Any) -> Any:
    """A list of mappings, such as `phases`, as a mapping by place."""
    mappings = isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    return {str(place): each for place, each in enumerate(value)} if mappings else value


# -- weights and moments --------------------------------------------------------------------------------------


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; one that has two names comes once."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach() for name, value in named.items()}


@torch.no_grad()
def load_whole_state(model: nn.Module, stored: dict[str, Tensor], source: str) -> None:
    """Put back what `whole_state` gave.

    Raises:
        ValueError: the names or shapes are those of another model.
    """
    own = whole_state(model)
    wrong = sorted(own.keys() ^ stored.keys()) or [name for name in own if own[name].shape != stored[name].shape]
    if wrong:
        raise ValueError(
            f"{source} holds another model: {len(wrong)} tensors differ in name or shape, among them {wrong[:4]}; "
            "continue with the configuration it was made with, or set resume=null to start anew"
        )
    for name, value in own.items():
        value.copy_(part_like(stored[name], value))


def flat_optimizer_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """An optimizer's moments and step counts by `number.name`, numbered as its parameters are."""
    return {
        f"{number}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for number, values in state["state"].items()
        for name, value in values.items()
    }


def nested_optimizer_state(
    tensors: dict[str, Tensor], groups: list[dict[str, Any]], weights: list[Tensor]
) -> dict[str, Any]:
    """What `load_state_dict` of the optimizer over these weights takes: moments divided as the weights are."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        weight = weights[int(number)]
        is_moment = value.shape == weight.shape
        state.setdefault(int(number), {})[name] = part_like(value, weight) if is_moment else value
    return {"state": state, "param_groups": groups}
