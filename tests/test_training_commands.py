"""Every way to train, through the command line: to the exit code, and to the last file of the run's folder."""

import contextlib
import gc
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from dual_encoder_makers import save_dual_encoder
from hub_server import HubServer, online
from teacher_makers import write_caches
from training_makers import SIZES, TINY_BERT, TINY_VIT, WORDS, Processes, save_text_tower, write_images, write_scan
from transformers import AutoModel, AutoProcessor, ViTConfig, ViTImageProcessorPil, ViTModel

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.cli import main as tvrn
from modeling_tvrn.data import load_pairs
from modeling_tvrn.hub import Check, push_to_hub
from modeling_tvrn.hub.apart import Outcome
from modeling_tvrn.plots import plot_training_curve
from modeling_tvrn.teachers import CaptionCache
from modeling_tvrn.training.snapshots import Snapshots

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in parquet, regions in SCAN's files, two pretrained towers, and caches of both teachers."""
    folder = tmp_path_factory.mktemp("place")
    write_images(folder / "pictures")
    (folder / "regions").mkdir()
    write_scan(folder / "regions")
    write_caches(folder / "teachers", load_pairs(folder / "pictures", "train"))
    save_text_tower(folder / "bert")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    ViTModel(ViTConfig(**_fields(TINY_VIT))).save_pretrained(folder / "vit")
    save_dual_encoder(folder / "clip")
    for label in ("red", "white"):
        (folder / "labels" / label).mkdir(parents=True)
        PIL.Image.new("RGB", (40, 30), label).save(folder / "labels" / label / "1.png")
    words = TVRNProcessor.from_captions([" ".join(WORDS)])
    finished = TVRNModel(TVRNConfig(region_feature_size=5, vocab_size=len(words.tokenizer), **SIZES))
    for part in (finished, words):
        part.save_pretrained(folder / "finished")
    _warm(folder)
    return folder


def _warm(folder: Path) -> None:
    """What every process would otherwise load and compile for itself."""
    import modeling_tvrn.training.loop  # noqa: F401

    plot_training_curve([{"step": 1, "loss": 1.0}], folder / "curve.png")
    AutoModel.from_pretrained(folder / "bert")
    gc.collect()
    gc.freeze()


def _fields(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "model_type"}


PICTURES: dict[str, Any] = {
    "data": "{place}/pictures", "vision": "{place}/vit", "text": "{place}/bert", "batch_size": 8,
    "model": {**SIZES, "vision_grid_size": None},
}  # fmt: skip
REGIONS: dict[str, Any] = {
    "data": "{place}/regions", "data_options": {"captions_per_image": 2}, "batch_size": 8, "model": SIZES,
}  # fmt: skip
STREAM = {**PICTURES, "streaming": True, "max_steps": 4, "epochs": 10}
CUSA = {
    "cusa": True, "cusa_image_teacher": "{place}/teachers/image", "cusa_text_teacher": "{place}/teachers/text",
}  # fmt: skip


CAPTIONS = {
    **PICTURES, "text_features": "{output}/../captions", "model": {**PICTURES["model"], "freeze_text": True},
}  # fmt: skip


def phases(unit: str) -> list[dict[str, Any]]:
    """One of every kind."""
    names = ("embeddings", "late_interaction", "distilled_embeddings", "reasoning")
    return [{"train": each, unit: 1} for each in names]


DUAL = {
    "data": "{place}/pictures", "dual_encoder": "{place}/clip", "batch_size": 8,
    "model": {"hidden_size": 10, "similarity_size": 6, "freeze_vision": False, "freeze_text": False,
              "freeze_first_stage": False},
}  # fmt: skip
TEXT_TOWER = {**REGIONS, "model": {**SIZES, "text_config": TINY_BERT}}
MODES: dict[str, tuple[dict[str, Any], int]] = {  # keys, processes
    "regions": (REGIONS, 1),
    "towers": (PICTURES, 1),
    "words of a text model": ({
        **PICTURES, "text": None, "word_embeddings": "{place}/bert",
        "model": {**PICTURES["model"], "word_embedding_size": 12}}, 1),
    "phases": ({
        **REGIONS, "epochs": None, "phases": phases("epochs"),
        "model": {**SIZES, "distillation_loss_weight": 0.5, "use_refined_features": False}}, 1),
    "stream": (STREAM, 1),
    "stream, phases, cusa, workers": ({
        **STREAM, **CUSA, "num_workers": 1, "epochs": None, "max_steps": None, "phases": phases("steps"),
        "model": {**PICTURES["model"], "distillation_loss_weight": 0.5, "use_refined_features": False}}, 1),
    "stream of two processes": (STREAM, 2),
    "cusa": ({**PICTURES, **CUSA}, 1),
    "captions from a cache": (CAPTIONS, 1),
    "two processes, captions from a cache": ({**CAPTIONS, "mixed_precision": "bf16"}, 2),
    "adapters": ({**PICTURES, "text_lora_rank": 2, "vision_lora_rank": 2}, 1),
    "a few items at a time, mean of weights": ({**TEXT_TOWER, "tower_batch_size": 3, "ema_decay": 0.9}, 1),
    "two processes, cusa": ({**PICTURES, **CUSA}, 2),
    "sharded": ({**TEXT_TOWER, "shard": True}, 2),
    "dual encoder, stream of two processes": ({**DUAL, "streaming": True, "max_steps": 4, "epochs": 10}, 2),
    "dual encoder, sharded": ({**DUAL, "shard": True}, 2),
    "dual encoder, mean of weights, zero-shot": ({
        **DUAL, "weight_interpolation": 0.5, "zero_shot": "{place}/labels"}, 2),
    "from a finished model": ({
        "data": "{place}/regions", "data_options": {"captions_per_image": 2}, "batch_size": 8,
        "start_from": "{place}/finished"}, 1),
}  # fmt: skip


def script(name: str) -> Callable[[list[str]], int]:
    """The `main` of a script in examples/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def command(name: str, arguments: list[str], log: str) -> None:
    """What the shell runs, in a process of its own; all that it says goes to a file."""
    rank = os.environ.get("RANK", "0")
    sys.argv = [name, *arguments]
    logging.getLogger().handlers.clear()  # pytest's
    with Path(f"{log}-{rank}").open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        raise SystemExit(tvrn() if name == "tvrn" else script(name)(arguments))


def written(folder: Path, place: Path, output: Path, **keys: Any) -> Path:
    """A recipe, with the place's folders filled in."""
    base = {"output_dir": str(output), "cpu": True, "epochs": 1, "logging_steps": 1, "learning_rate": 3e-3}
    text = json.dumps({**base, **keys}).replace("{place}", str(place)).replace("{output}", str(output))
    (folder / "recipe.yaml").write_text(text)  # JSON is YAML
    return folder / "recipe.yaml"


def run(folder: Path, recipe: Path, *more: str, name: str = "tvrn", count: int = 1) -> str:
    """Train to the end; gives what the main process said."""
    arguments = [*(["train"] if name == "tvrn" else []), "--config", str(recipe), *more]
    runner = Processes(folder)
    codes = runner.finish(runner.start(command, name, arguments, str(folder / "said"), count=count))
    said = "".join(path.read_text() for path in sorted(folder.glob("said-*")))
    assert codes == [0] * count and "Traceback" not in said, (said, *(p.read_text() for p in folder.glob("*.error")))
    return (folder / "said-0").read_text()


def check_folder(folder: Path, streamed: bool = False) -> dict[str, Any]:
    """Everything that a finished run leaves is there and is whole; gives results.json."""
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["rsum"] >= 0 and results["best_step"] <= results["steps"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("**/.saving"))
    header, body = (folder / "README.md").read_text("utf-8").removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(header)["model-index"][0]["results"][0]["metrics"]
    assert "{{" not in body and "{%" not in body and "None images" not in body
    sizes = "split train, read as a stream." if streamed else f"split train, {results['data']['train'].get('images')} "
    assert sizes in body
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    with torch.inference_mode():
        assert model.encode_texts(**processor(text=["caption 1 of image 2"])).embeds.isfinite().all()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_leaves_everything_and_ends_with_0(place: Path, tmp_path: Path, mode: str) -> None:
    if mode == "adapters":
        pytest.importorskip("peft", reason='low-rank adapters come with pip install ".[lora]"')
    keys, count = MODES[mode]
    streamed = "streaming" in keys
    said = run(tmp_path, written(tmp_path, place, tmp_path / "out", **keys), count=count)
    results = check_folder(tmp_path / "out", streamed)
    train, validation = (17, 5) if "pictures" in keys["data"] else (14, 6)
    assert "| pair score" in said and results["data"]["validation"]["images"] == validation
    assert streamed or results["data"]["train"]["images"] == train
    assert set(results["teachers"]) == ({"image", "text"} if "cusa" in keys else set())
    if "zero_shot" in keys:
        assert results["zero_shot"]["images"] == 2 and results["weight_interpolation"]["share"] == 0.5
    if "dual_encoder" in keys:
        assert type(AutoModel.from_pretrained(tmp_path / "out" / "dual_encoder")).__name__ == "CLIPModel"
    if "text_features" in keys:
        cache = CaptionCache.load(tmp_path / "captions")
        # A CPU without bfloat16 instructions would take many times as long, whatever the run computes in.
        assert len(cache) > 30 and cache.info["computed_in"] == "float32 on cpu"


@pytest.mark.slow
def test_the_card_of_a_stream_is_rendered_again_and_pushed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    recipe = written(tmp_path, place, out, **STREAM)
    assert "| pair score" in run(tmp_path, recipe, "query=caption 1 of image 18 .", name="train")
    check_folder(out, streamed=True)
    first = (out / "README.md").read_text("utf-8")
    assert "trained on photographs with captions." in first and (out / "query.png").is_file()
    runner = Processes(tmp_path)
    assert runner.finish(runner.start(command, "tvrn", ["card", str(out)], str(tmp_path / "card"))) == [0]
    assert (out / "README.md").read_text("utf-8") == first
    monkeypatch.setattr("modeling_tvrn.hub.running.load_apart", lambda *_: {"with": Outcome({"model": {}})})
    for check in ("_check_loading", "_check_logits"):
        monkeypatch.setattr(f"modeling_tvrn.hub.running.{check}", lambda *_: Check("loads", "ok", "not looked at"))
    online(monkeypatch)
    with HubServer() as hub:
        push_to_hub(out, repo_id="org/streamed", token=hub.token, endpoint=hub.url)
        card = hub.files("org/streamed")["README.md"].decode()
    assert "read as a stream" in card and "# org/streamed" in card and str(place) not in card


@pytest.mark.slow
@pytest.mark.parametrize(("name", "keys", "count"), [
    ("tvrn", REGIONS, 1), ("train", STREAM, 1), ("train", REGIONS, 2),
])  # fmt: skip
def test_an_interrupted_run_ends_with_0_and_goes_on_to_its_card(
    place: Path, tmp_path: Path, name: str, keys: dict[str, Any], count: int
) -> None:
    out = tmp_path / "out"
    length = {"max_steps": 400, "evaluation_steps": 200, "save_steps": 400}  # seconds: SIGTERM comes before
    recipe = written(tmp_path, place, out, **{**keys, **length})
    arguments = [*(["train"] if name == "tvrn" else []), "--config", str(recipe)]
    runner = Processes(tmp_path)
    started = runner.start(command, name, arguments, str(tmp_path / "said"), count=count)
    end = time.monotonic() + 120
    while "step 2/400" not in _read(tmp_path / "said-0") and time.monotonic() < end and started[0].is_alive():
        time.sleep(0.02)
    os.kill(started[-1].pid, signal.SIGTERM)
    assert runner.finish(started) == [0] * count
    said = _read(tmp_path / "said-0")
    assert "SIGTERM" in said or "another process's signal" in said
    assert "Traceback" not in said and not (out / "results.json").exists()
    [step] = Snapshots(out / "checkpoints").steps()
    assert step < 400
    # A few steps more and it is done.
    more = [f"max_steps={step + 3}", "resume=auto", "resume_changed=true"]
    run(tmp_path, recipe, *more, name=name, count=count)
    results = check_folder(out, streamed="streaming" in keys)
    assert results["steps"] == step + 3 and results["history"][0]["step"] == 1


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_torchrun_starts_two_processes(place: Path, tmp_path: Path) -> None:
    recipe = written(tmp_path, place, tmp_path / "out", **REGIONS)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*start, "-m", "modeling_tvrn.cli", "train", "--config", str(recipe)],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("| pair score") == 1, "one process speaks"
    check_folder(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_stale_caption_cache_ends_a_run_with_2_and_says_what_differs(
    place: Path, tmp_path: Path, count: int
) -> None:
    run(tmp_path, written(tmp_path, place, tmp_path / "out", **CAPTIONS))
    recipe = written(tmp_path, place, tmp_path / "out", **CAPTIONS, max_text_length=7)
    runner = Processes(tmp_path)
    started = runner.start(command, "tvrn", ["train", "-c", str(recipe)], str(tmp_path / "stale"), count=count)
    # Once one has ended the others may be killed, who would have said the same.
    assert 2 in runner.finish(started)
    said = "".join(_read(path) for path in sorted(tmp_path.glob("stale-*")))
    assert f"text_features = '{tmp_path}/out/../captions'" in said and "Traceback" not in said
    assert "tokens.max_length: stored 64, expected 7" in said and "by deleting that folder" in said


def test_a_mistake_is_one_line_and_code_2(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that shows only when the data are read, or the run is set up."""
    recipe = written(tmp_path, place, tmp_path / "out", **REGIONS)
    for wrong in ("data=nowhere", "train_split=trian", "vision=/nowhere/vit", "resume=/nowhere"):
        assert script("train")(["--config", str(recipe), wrong]) == 2, wrong
        said = capsys.readouterr().err
        assert "train.py: " in said and "Traceback" not in said
