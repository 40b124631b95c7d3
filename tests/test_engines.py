"""Engines in place of a vision tower's own forward: the same outputs, and nothing else of the model changes."""

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dual_encoder_makers import save_dual_encoder
from PIL import Image
from torch import Tensor
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from modeling_tvrn import engines
from modeling_tvrn.storage.fingerprints import module_fingerprint

VIT = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS: dict[str, Callable[[], Any]] = {
    "resnet": lambda: ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ),
    "vit": lambda: ViTModel(ViTConfig(**VIT, image_size=32, patch_size=8), add_pooling_layer=False),
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """Graphs of this test alone; what the engines say is heard."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, logger="modeling_tvrn.engines")
    return tmp_path / "cache" / "modeling_tvrn" / "graphs"


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_missing", lambda: ["onnxruntime"])


def made(kind: str) -> Any:
    """A tower whose convolutions and statistics are not those of its start, which would hide a wrong fold."""
    tower = TOWERS[kind]().eval()
    with torch.no_grad():
        for name, value in tower.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                value.add_(torch.rand_like(value))
            elif value.ndim == 4:
                torch.nn.init.kaiming_normal_(value, nonlinearity="linear")
    return tower


def look(tower: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = tower(pixel_values=pixels).last_hidden_state
    return output


def test_folded_is_the_tower_and_changes_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    tower, pixels = made("resnet"), torch.randn(3, 3, 64, 64)
    wanted, before = look(tower, pixels), module_fingerprint(tower)
    engines.enable(tower, "folded")
    found = look(tower, pixels)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert engines.used(tower) == "folded"
    assert "by folded: differs from torch by" in caplog.text
    assert module_fingerprint(tower) == before
    assert engines.used(copy.deepcopy(tower)) == "torch"  # whose weights may become others
    with torch.no_grad():  # as training does: what was folded before is old
        next(tower.parameters()).neg_()
    changed = look(tower, pixels)
    assert not torch.allclose(changed, wanted, atol=1e-3)
    engines.enable(tower, "torch")
    torch.testing.assert_close(changed, look(tower, pixels), rtol=1e-4, atol=1e-5)


def test_gradients_and_training_are_left_to_torch() -> None:
    tower, pixels = made("resnet"), torch.randn(2, 3, 64, 64)
    engines.enable(tower, "folded")
    assert tower(pixel_values=pixels).last_hidden_state.requires_grad
    assert engines.used(tower) == "torch"
    look(tower.train(), pixels)
    assert engines.used(tower) == "torch"


@pytest.mark.usefixtures("without_onnxruntime")
def test_auto_without_onnxruntime_folds_where_it_pays_and_says_why_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gains = iter([2.0, 0.5])
    monkeypatch.setattr(engines._Engine, "_gain", lambda *_: next(gains))
    tower, plain = made("resnet"), made("vit")
    engines.enable(tower)
    engines.enable(plain)
    look(tower, torch.randn(engines.READ_AFTER - 1, 3, 16, 16))
    assert engines.used(tower) == "torch"
    look(tower, torch.randn(1, 3, 16, 16))
    assert engines.used(tower) == "folded"
    look(tower, torch.randn(engines.READ_AFTER, 3, 24, 24))
    assert engines.used(tower) == "torch"
    assert "stays with torch: folded takes 2.0 times as long here" in caplog.text
    for _ in range(2):
        look(plain, torch.randn(engines.READ_AFTER, 3, 32, 32))
    assert engines.used(plain) == "torch"
    assert caplog.text.count("stays with torch: it has no BatchNorm") == 1
    assert 'pip install "modeling-tvrn[export]"' in caplog.text
    with pytest.raises(ImportError, match=r'needs onnxruntime: pip install "modeling-tvrn\[export\]"'):
        engines.enable(tower, "onnxruntime")


def test_what_differs_too_much_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = made("resnet")
    wrong = copy.deepcopy(tower)
    with torch.no_grad():
        next(wrong.parameters()).add_(0.1)
    monkeypatch.setattr(engines, "_fold", lambda _: wrong)
    engines.enable(tower, "folded")
    with pytest.raises(ValueError, match=r"can't be run by 'folded': it differs from torch by .*'torch'"):
        look(tower, torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize(("spoilt", "words"), [(lambda x: x * float("nan"), "nan"), (lambda x: x[:, :1], "it gives")])
def test_an_output_that_is_nan_or_of_another_shape_is_refused(
    monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[Tensor], Tensor], words: str
) -> None:
    tower, compare = made("resnet"), engines._differences

    def compare_spoilt(wanted: Any, found: Any) -> list[float]:
        found.pooler_output = spoilt(found.pooler_output)  # the second of two outputs
        return compare(wanted, found)

    monkeypatch.setattr(engines, "_differences", compare_spoilt)
    engines.enable(tower, "folded")
    with pytest.raises(ValueError, match=f"can't be run by 'folded': .*{words}"):
        look(tower, torch.randn(2, 3, 64, 64))


def test_what_an_engine_does_not_know_is_left_to_torch() -> None:
    tower, pixels = made("resnet"), torch.randn(2, 3, 64, 64)
    engines.enable(tower, "folded")
    with torch.no_grad():
        assert isinstance(tower(pixel_values=pixels, return_dict=False), tuple)
        tower.config.output_hidden_states = True
        assert tower(pixel_values=pixels).hidden_states is not None
        tower.config.output_hidden_states = False
        look(tower, pixels)
        assert engines.used(tower) == "folded"
        look(tower.to(torch.bfloat16), pixels.bfloat16())
    assert engines.used(tower) == "torch"


def test_auto_without_a_cache_for_graphs_stays_with_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(_: str) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(engines, "_missing", lambda: [])
    monkeypatch.setattr(engines, "cache_folder", unreadable)
    tower = made("resnet")
    engines.enable(tower)
    for _ in range(2):
        look(tower, torch.randn(engines.READ_AFTER, 3, 16, 16))
    assert engines.used(tower) == "torch" and caplog.text.count("there is no cache for graphs") == 1


def test_a_forward_that_was_put_there_before_comes_back() -> None:
    tower, pixels = made("resnet"), torch.randn(2, 3, 64, 64)
    plain, calls = tower.forward, []
    tower.forward = lambda *args, **given: calls.append(1) or plain(*args, **given)  # as hooks of accelerate do
    engines.enable(tower, "folded")
    engines.disable(tower)
    look(tower, pixels)
    assert calls == [1]


@pytest.mark.parametrize(
    ("change", "engine", "message"),
    [
        (lambda tower: tower, "tensorrt", "is 'tensorrt'; expected one of auto, torch, folded, onnxruntime"),
        (lambda tower: tower.bfloat16(), "folded", "has weights in bfloat16 on cpu"),
    ],
)
def test_an_engine_that_cannot_be_used_is_named(change: Callable[..., Any], engine: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engines.enable(change(made("resnet")), engine)


@pytest.mark.slow
def test_a_graph_is_the_tower_and_is_kept_and_made_again(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason='graphs come with pip install ".[export]"')
    pytest.importorskip("onnxscript", reason='graphs come with pip install ".[export]"')
    tower, pixels = made("resnet"), torch.randn(5, 3, 32, 32)
    wanted = look(tower, pixels)

    def said() -> str:
        caplog.clear()
        engines.enable(tower, "onnxruntime")
        torch.testing.assert_close(look(tower, pixels), wanted, rtol=1e-4, atol=1e-4)
        assert engines.used(tower) == "onnxruntime"
        return caplog.text

    assert "making the graph" in said()
    torch.testing.assert_close(look(tower, pixels[:1]), wanted[:1], rtol=1e-4, atol=1e-4)
    assert "making the graph" not in said()
    (file,) = cache.rglob("tower.onnx")
    whole = file.read_bytes()
    monkeypatch.setattr(engines, "write_onnx", lambda *given: given[-1].write_bytes(whole))  # which takes seconds
    file.write_bytes(whole[:-9])
    assert re.search("made again, since .* is damaged", said())
    assert "made again" not in said()
    monkeypatch.setattr(engines, "_versions", lambda: {"torch": "99.0"})
    assert re.search("made again, since .* made with other versions: torch .*, now 99.0", said())
    with torch.no_grad():
        next(tower.parameters()).neg_()
    with pytest.raises(ValueError, match="can't be run by 'onnxruntime': it differs from torch"):  # the old graph does
        look(tower, pixels)
    assert len(list(cache.rglob("tower.onnx"))) == 2


@pytest.mark.slow
def test_an_index_of_a_dual_encoder_finds_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Built through the command line by a graph, searched by torch: one fingerprint, the same hits and scores."""
    pytest.importorskip("onnxruntime", reason='graphs come with pip install ".[export]"')
    pytest.importorskip("onnxscript", reason='graphs come with pip install ".[export]"')
    from typer.testing import CliRunner

    from modeling_tvrn.cli import app
    from modeling_tvrn.front_door import load_model
    from modeling_tvrn.index import ImageTextIndex

    folder, random = tmp_path / "photographs", np.random.default_rng(0)
    folder.mkdir()
    for number in range(6):
        Image.fromarray(random.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    name = str(save_dual_encoder(tmp_path / "clip"))
    hits = {}
    for engine in ("torch", "onnxruntime"):
        caplog.clear()
        arguments = ["index", name, str(folder), str(tmp_path / engine), "--tower-engine", engine]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert ("by onnxruntime" in caplog.text) == (engine == "onnxruntime")
        model, processor = load_model(name)
        index = ImageTextIndex.load(tmp_path / engine, model, processor)
        hits[engine] = [(hit.id, hit.score) for hit in index.search("a dog in the snow")]
    assert [name for name, _ in hits["torch"]] == [name for name, _ in hits["onnxruntime"]]
    np.testing.assert_allclose(*([score for _, score in found] for found in hits.values()), atol=1e-5)
