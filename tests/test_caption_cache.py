"""A caption cache gives back what the tower says, is never stale or half, and grows with what runs ask for."""

import logging
import os
import pickle
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dual_encoder_makers import WORDS, save_dual_encoder
from training_makers import TINY_BERT, Processes

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.storage.arrays import FORMAT
from modeling_tvrn.storage.files import read_json, write_json
from modeling_tvrn.teachers import CaptionCache, StaleStoreError, caption_fingerprint
from modeling_tvrn.training.text_cache import CachedTextProcessor

BERT = {**TINY_BERT, "vocab_size": 40}
CAPTIONS = ["a red dog runs", "two cats", "one large green bird on a tree", "the dog sleeps near two cats"]
SIZES = {"hidden_size": 10, "projection_size": 7, "similarity_size": 6, "region_feature_size": 5, "vocab_size": 40}


def made(seed: int = 0, **fields: Any) -> tuple[TVRNModel, TVRNProcessor]:
    """A model with a frozen text tower, and its processor."""
    torch.manual_seed(seed)
    settings = {"text_config": BERT, "freeze_text": True, "dropout": 0.0} | fields
    return TVRNModel(TVRNConfig(**SIZES | settings)).eval(), TVRNProcessor.from_captions(CAPTIONS)


def build(folder: Path, captions: list[str] = CAPTIONS, **settings: Any) -> CaptionCache:
    """The cache of the first model."""
    return CaptionCache.build(*made(), captions, folder, batch_size=3, progress=False, **settings)


def test_cached_captions_give_the_scores_of_the_tower(tmp_path: Path) -> None:
    model, processor = made()
    cached = CachedTextProcessor(processor, build(tmp_path, [*CAPTIONS, *CAPTIONS], shard_size=3))
    assert len(cached.cache) == len(CAPTIONS) and CAPTIONS[1] in cached.cache and "a new one" not in cached.cache
    chosen = [CAPTIONS[2], CAPTIONS[0], CAPTIONS[2]]
    inputs = pickle.loads(pickle.dumps(cached))(text=chosen, return_tensors="pt")  # noqa: S301 (as a loader's worker)
    assert "input_ids" not in inputs and inputs["text_features"].dtype == torch.float16
    plain = model.encode_texts(**processor(text=chosen))
    stored = model.encode_texts(**inputs)
    torch.testing.assert_close(stored.embeds, plain.embeds, atol=2e-3, rtol=0)
    assert torch.equal(stored.word_mask, plain.word_mask)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_of_a_dual_encoder_the_embeddings_are_kept_exactly(tmp_path: Path, kind: str) -> None:
    folder = save_dual_encoder(tmp_path / kind, kind)
    model = TVRNModel.from_dual_encoder(folder, hidden_size=12, similarity_size=7).eval()
    processor = TVRNProcessor.from_dual_encoder(folder)
    captions = [" ".join(WORDS[k : k + 3 + k]) for k in range(4)]
    cache = CaptionCache.build(model, processor, captions, tmp_path / "captions", batch_size=4, progress=False)
    with torch.no_grad():
        plain = model.encode_texts(**processor(text=captions))
        stored = model.encode_texts(**cache[captions])
    torch.testing.assert_close(stored.embeds, plain.embeds, atol=1e-5, rtol=0)
    lengths = cache[captions]["attention_mask"].sum(dim=1).tolist()
    assert lengths == processor(text=captions)["word_mask"].sum(dim=1).tolist()  # words alone, no padding


def test_the_cached_processor_hands_images_to_the_processor_and_refuses_unknown_captions(tmp_path: Path) -> None:
    _, processor = made()
    cached = CachedTextProcessor(processor, build(tmp_path))
    regions = [np.ones((3, 5), dtype=np.float32)]
    assert cached(region_features=regions)["region_features"].shape == (1, 3, 5)
    assert cached.tokenizer is processor.tokenizer
    with pytest.raises(ValueError, match="1 of 2 captions are not in the cache.*'a new one'"):
        cached(text=[CAPTIONS[0], "a new one"])


def test_a_text_tower_that_learns_is_not_cached(tmp_path: Path) -> None:
    for fields, what in (({"freeze_text": False}, "one that learns"), ({"text_config": None}, "none")):
        with pytest.raises(ValueError, match=f"need a frozen text tower; this model has {what}"):
            CaptionCache.build(*made(**fields), CAPTIONS, tmp_path)


def test_a_finished_cache_is_opened_without_running_the_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(tmp_path)
    monkeypatch.setattr("modeling_tvrn.teachers.caption_cache._outputs", None)
    assert build(tmp_path, CAPTIONS[:2]).fingerprint == first.fingerprint
    assert CaptionCache.load(tmp_path, caption_fingerprint(*made())).store.bytes == first.store.bytes


def test_a_cache_of_fewer_captions_is_extended_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "modeling_tvrn")
    before = build(tmp_path, CAPTIONS[:2])[CAPTIONS[:2]]
    cache = build(tmp_path, CAPTIONS)
    assert "the cache lacks 2 of this run's 4 captions, which are added" in caplog.text
    assert len(cache) == 4
    torch.testing.assert_close(cache[CAPTIONS[:2]], before, atol=0, rtol=0)
    whole = build(tmp_path.with_name("whole"))
    torch.testing.assert_close(cache[CAPTIONS], whole[CAPTIONS], atol=2e-3, rtol=0)


@pytest.mark.parametrize(("change", "message"), [
    ({"seed": 1}, r"tower.weights_sha256: stored '\w+', expected '\w+'"),
    ({"longest": 5}, "tokens.max_length: stored 64, expected 5"),
    ({"words": ["another vocabulary"]}, r"tokens.tokenizer_sha256: stored '\w+'"),
])  # fmt: skip
@pytest.mark.parametrize("finished", [True, False])
def test_a_stale_cache_is_refused_with_what_differs(
    tmp_path: Path, change: dict[str, Any], message: str, finished: bool
) -> None:
    build(tmp_path)
    if not finished:
        path = tmp_path / "manifest.json"
        write_json(path, FORMAT, {**read_json(path, FORMAT), "complete": False})
    model, processor = made(change.get("seed", 0))
    tokens = TVRNProcessor.from_captions(change["words"]) if "words" in change else processor
    other = TVRNProcessor(tokenizer=tokens.tokenizer, max_text_length=change.get("longest", 64))
    with pytest.raises(StaleStoreError, match=f"(?s){message}.*by deleting that folder"):
        CaptionCache.build(model, other, CAPTIONS, tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    from modeling_tvrn.teachers import StoreWriter

    writer = StoreWriter(tmp_path, {"backbone": "a"})
    writer.append([1], {"region_features": np.ones((1, 3), np.float32)})
    writer.finish()
    with pytest.raises(ValueError, match="is no caption cache: it holds .'region_features'.*give another folder"):
        CaptionCache.load(tmp_path)
    with pytest.raises(StaleStoreError, match="tower.class: stored 'nothing'"):
        build(tmp_path)


def test_an_output_beyond_half_precision_names_its_caption(tmp_path: Path) -> None:
    model, processor = made()
    with torch.no_grad():
        model.text_model.encoder.layer[-1].output.LayerNorm.bias.fill_(1e6)
    with pytest.raises(ValueError, match="outputs of 'two cats' leave half precision.*text_features=null"):
        CaptionCache.build(model, processor, CAPTIONS, tmp_path, progress=False)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="no room for a cache of .* free: free some"):
        build(tmp_path)
    assert not list(tmp_path.glob("shard-*"))


def build_and_die(folder: Path, after: int) -> None:
    """A build that is killed after so many batches of one caption."""
    from modeling_tvrn.teachers import caption_cache

    outputs, seen = caption_cache._outputs, []

    def dying(*given: Any) -> Any:
        seen.append(given)
        if len(seen) > after + 1:  # the first measures
            os.kill(os.getpid(), signal.SIGKILL)
        return outputs(*given)

    caption_cache._outputs = dying
    CaptionCache.build(*made(), CAPTIONS, folder, batch_size=1, shard_size=1, progress=False)


@pytest.mark.parametrize("begun", [0, 1])
def test_kill_9_leaves_no_half_cache_and_the_next_build_goes_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, begun: int
) -> None:
    if begun:
        build(tmp_path, CAPTIONS[1:2])  # an extension is killed, and the cache stays what it was
    processes = Processes(tmp_path_factory.mktemp("processes"))  # of one thread: a fork has none of its parent's
    assert processes.finish(processes.start(build_and_die, tmp_path, 2)) == [-signal.SIGKILL]
    if begun:
        assert len(CaptionCache.load(tmp_path)) == 1
    else:
        with pytest.raises(ValueError, match="is unfinished"):
            CaptionCache.load(tmp_path)
    kept = sorted(tmp_path.glob("shard-*.safetensors"))
    times = [path.stat().st_mtime_ns for path in kept]
    assert len(kept) == 2 + begun
    cache = build(tmp_path)
    assert [path.stat().st_mtime_ns for path in kept] == times and len(cache) == 4
    whole = build(tmp_path.with_name("whole"))
    torch.testing.assert_close(cache[CAPTIONS], whole[CAPTIONS], atol=2e-3, rtol=0)


def test_a_broken_file_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = build(tmp_path, shard_size=1)[CAPTIONS]
    shard = tmp_path / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ValueError, match="half-written"):
        CaptionCache.load(tmp_path)
    torch.testing.assert_close(build(tmp_path)[CAPTIONS], whole, atol=2e-3, rtol=0)
    assert "Building what is missing" in caplog.text


def build_slowly(folder: str) -> list[int]:
    """How many captions this process ran the tower over."""
    from modeling_tvrn.teachers import caption_cache

    outputs, seen = caption_cache._outputs, []

    def slow(model: Any, processor: Any, captions: Any) -> Any:
        time.sleep(0.2)
        seen.append(len(captions))
        return outputs(model, processor, captions)

    caption_cache._outputs = slow
    cache = build(Path(folder))
    assert len(cache[CAPTIONS]["word_mask"]) == 4
    return seen


def test_of_two_processes_one_builds_and_the_other_waits(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    found = Processes(tmp_path).run(build_slowly, str(tmp_path / "cache"), count=2)
    assert sorted(map(len, found)) == [0, 3]  # one measured and ran two batches
