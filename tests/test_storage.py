"""A flipped byte, a cut or lost file is found; a kill leaves old or new; equal scores have one fingerprint."""

import errno
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from model_makers import regions, tiny_model, words
from safetensors.torch import load_file
from test_index import CAPTIONS, records
from training_makers import killed_at_call

from modeling_tvrn import TVRNConfig, TVRNProcessor, load_model
from modeling_tvrn.index import ImageTextIndex, OtherModelError
from modeling_tvrn.scoring import score_matrix
from modeling_tvrn.storage.arrays import ArrayStore, StoreWriter
from modeling_tvrn.storage.files import StorageError, check_listed, publish_folder, read_json, replacing, write_json
from modeling_tvrn.storage.fingerprints import module_fingerprint
from modeling_tvrn.storage.tables import Table, write_table
from modeling_tvrn.storage.tensors import TensorFile, write_tensors
from modeling_tvrn.storage.verify import verify
from modeling_tvrn.training.best_model import BestModel, save_model
from modeling_tvrn.training.snapshots import Snapshots, read_snapshot

EXACT = {"precision": "float32", "engine": "exact"}


@pytest.fixture(scope="module")
def processor() -> TVRNProcessor:
    return TVRNProcessor.from_captions(CAPTIONS)


# -- one folder of each kind, whole, and how it is opened -------------------------------------------------------------


def make_store(folder: Path) -> None:
    random = np.random.default_rng(0)
    writer = StoreWriter(folder, {"backbone": {"weights_sha256": "ab"}}, shard_size=3)
    tokens = [random.normal(size=(length, 3)).astype(np.float16) for length in (2, 0, 4, 1, 3)]
    writer.append(range(5), {"tokens": tokens, "boxes": random.uniform(size=(5, 4)).astype(np.float32)})
    writer.finish({"command": "tvrn regions flickr8k --features x --output regions"})


def make_index(folder: Path, **options: Any) -> None:
    processor = TVRNProcessor.from_captions(CAPTIONS)
    ImageTextIndex.build(
        tiny_model(), processor, records(9), folder, progress=False, segment_size=4, **{**EXACT, **options}
    )


def make_coded_index(folder: Path) -> None:
    make_index(folder, precision="binary")


def make_graph_index(folder: Path) -> None:
    pytest.importorskip("faiss", reason='a graph comes with pip install ".[index]"')
    make_index(folder, engine="hnsw", precision="int8")


def make_checkpoint(folder: Path) -> None:
    tensors = {
        "model": {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(2.5), "none": torch.empty(0, 3)},
        "optimizer": {"0.step": torch.tensor(7), "0.half": torch.randn(5, 2).to(torch.bfloat16)},
        "random": {"process-00000": torch.arange(16, dtype=torch.uint8), "flags": torch.tensor([True, False])},
    }
    assert Snapshots(folder).save(3, {"counters": {"step": 3}, "best": [None, float("inf")]}, tensors)


def make_model(folder: Path) -> None:
    save_model(folder, tiny_model(), TVRNProcessor.from_captions(CAPTIONS))


def make_blocks(folder: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        score_matrix(
            model, model.encode_images(**regions(5)), model.encode_texts(**words(6)), folder=folder,
            memory_budget=2e-5, progress=False,
        )  # fmt: skip


KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any] | None]] = {
    "store": (make_store, ArrayStore.load),
    "index": (make_index, ImageTextIndex.load),
    "coded": (make_coded_index, ImageTextIndex.load),
    "graph": (make_graph_index, ImageTextIndex.load),
    "checkpoint": (make_checkpoint, lambda folder: read_snapshot(folder / "step-00000003")),
    "model": (make_model, load_model),
    "blocks": (make_blocks, None),  # which scores a broken block again: tests of scoring
}
_made: dict[str, Path] = {}


@pytest.fixture(params=list(KINDS))
def whole(
    request: pytest.FixtureRequest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[[Path], Any] | None]:
    """A fresh copy of a whole folder, and how it is opened."""
    make, opened = KINDS[request.param]
    if request.param not in _made:
        _made[request.param] = tmp_path_factory.mktemp("whole") / request.param
        make(_made[request.param])
    return Path(shutil.copytree(_made[request.param], tmp_path / request.param)), opened


def stored(folder: Path) -> list[Path]:
    """Its files, but for locks, which hold nothing."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def starts_of_data(path: Path) -> int:
    """Where in a memory-mapped file the arrays begin, whose content is compared by `verify` alone."""
    return (
        min(offset for *_, offset in TensorFile.open(path).layout.values())
        if path.suffix == ".safetensors"
        else sys.maxsize
    )


def test_a_whole_folder_opens_and_verifies(whole: Any) -> None:
    folder, opened = whole
    if opened is not None:
        opened(folder)
    read, broken = verify(folder)
    assert {path.resolve() for path in read} == {path.resolve() for path in stored(folder)} and broken == []


@pytest.mark.slow
def test_a_flipped_byte_anywhere_is_found(whole: Any) -> None:
    """On opening where a file is read whole, by `verify` where it is mapped into memory; the file is named."""
    folder, opened = whole
    random = np.random.default_rng(1)
    for path in stored(folder):
        content = path.read_bytes()
        is_mapped = path.suffix == ".safetensors" and folder.name in ("store", "index", "coded", "graph")
        is_mapped &= (folder.name, path.name) != ("coded", "vectors.safetensors")  # whose codes are made on opening
        start = starts_of_data(path) if is_mapped else sys.maxsize
        places = {0, 8, len(content) // 2, len(content) - 1, *random.integers(0, len(content), 12).tolist()}
        for place in sorted(places):
            changed = bytearray(content)
            changed[place] ^= 1 << int(random.integers(0, 8))
            if (
                path.suffix == ".json"
                and changed[place : place + 1].isspace()
                and content[place : place + 1].isspace()
            ):
                continue  # between values, which stay
            path.write_bytes(changed)
            _, broken = verify(folder)
            assert path.resolve() in {error.path.resolve() for error in broken}, (path, place)
            if opened is not None and place < start:
                with pytest.raises(StorageError) as error:
                    opened(folder)
                assert path.name in str(error.value) and "; " in str(error.value), (path, place)
        path.write_bytes(content)


def test_a_cut_or_lost_file_is_found_on_opening(whole: Any) -> None:
    folder, opened = whole
    for path in stored(folder):
        content = path.read_bytes()
        for size in (len(content) - 2, len(content) // 2, 0, None):  # a last line break is no loss
            path.unlink() if size is None else path.write_bytes(content[:size])
            lost_list = size is None and path.name in ("manifest.json", "current.json", "files.json")
            is_block = path.name.startswith("block-")  # absent, it is scored
            if not lost_list and not (is_block and size is None):
                assert [error.path.name for error in verify(folder)[1]] == [path.name]
            if opened is not None and not (size is None and path.name == "files.json"):
                with pytest.raises((ValueError, FileNotFoundError)):
                    opened(folder)
        path.write_bytes(content)


def test_a_file_of_another_folder_is_no_file_of_this_one(tmp_path: Path) -> None:
    """Whole in itself, it fits no longer what its manifest says."""
    make_checkpoint(tmp_path / "one")
    make_checkpoint(tmp_path / "two")
    name = "step-00000003/optimizer.safetensors"
    shutil.copyfile(tmp_path / "two" / name, tmp_path / "one" / name)
    with pytest.raises(StorageError, match="optimizer.safetensors is damaged: it is of another build"):
        read_snapshot(tmp_path / "one/step-00000003")


def test_an_error_says_file_problem_and_fix_and_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(StorageError("a/b.json", "damaged: it is cut", "copy it again")))  # noqa: S301
    assert isinstance(error, ValueError) and str(error) == "a/b.json is damaged: it is cut; copy it again"
    assert error.path == Path("a/b.json")


@pytest.mark.parametrize(
    ("kind", "file", "old", "said"),
    [
        (
            "store", "manifest.json",
            {"format": "tvrn-array-store", "format_version": 1, "info": {"command": "tvrn regions x -o y"}},
            r"of format tvrn-array-store 1: this release reads .* 2; build it again: tvrn regions x -o y --overwrite",
        ),
        (
            "store", "manifest.json", {"format": "tvrn-array-store", "format_version": 1, "info": {}},
            r"of format tvrn-array-store 1: .* delete .* and run the same build again",
        ),
        (
            "index", "current.json", {"format": "tvrn-index", "format_version": 1, "version": "000001"},
            r"of format tvrn-index 1: .*; delete it and run `tvrn index MODEL SOURCE INDEX` again",
        ),
        ("checkpoint", "step-00000003/manifest.json", {"format": 1, "files": {}}, "of format 1: .*resume=null"),
    ],
)  # fmt: skip
def test_an_older_format_is_refused_with_what_rebuilds_it(
    tmp_path: Path, kind: str, file: str, old: dict[str, Any], said: str
) -> None:
    make, opened = KINDS[kind]
    make(tmp_path)
    (tmp_path / file).write_text(json.dumps(old))
    assert opened is not None
    with pytest.raises(StorageError, match=rf"{file} is {said}"):
        opened(tmp_path)


# -- what a refusal says to do, does it -------------------------------------------------------------------------------


def test_each_broken_file_of_an_index_is_made_anew_by_what_its_message_says(
    processor: TVRNProcessor, tmp_path: Path
) -> None:
    make_index(tmp_path / "index")
    model = tiny_model()
    expected = ImageTextIndex.load(tmp_path / "index", model, processor).search(text=CAPTIONS[0])
    for number in range(len(stored(tmp_path / "index"))):
        folder = shutil.copytree(tmp_path / "index", tmp_path / f"copy-{number}")
        path = stored(folder)[number]
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
        [error] = verify(folder)[1]
        assert "delete it and run `tvrn index" in str(error)
        with pytest.raises(StorageError, match=path.name):
            ImageTextIndex.load(folder, model, processor, verify=True)
        error.path.unlink()
        index = ImageTextIndex.build(model, processor, records(9), folder, progress=False, **EXACT)
        assert index.report is not None
        assert index.report.encoded in ((4, 1) if "segments" in str(path) else (0,)), "the last segment has one item"
        assert verify(folder)[1] == []
        found = {hit.id: hit.logit for hit in index.search(text=CAPTIONS[0])}
        assert found == pytest.approx({hit.id: hit.logit for hit in expected}, abs=1e-3)  # in half precision


def test_a_build_makes_no_vectors_of_damaged_embeddings(processor: TVRNProcessor, tmp_path: Path) -> None:
    """They would carry a checksum of their own, and be wrong for good."""
    make_index(tmp_path, features=False)
    segment = sorted((tmp_path / "segments").iterdir())[0]
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    with pytest.raises(StorageError, match=f"{segment.name} is damaged: its data, of 'embeds'.*; delete it and run"):
        ImageTextIndex.build(tiny_model(), processor, records(9), tmp_path, features=False, progress=False)
    segment.unlink()
    ImageTextIndex.build(tiny_model(), processor, records(9), tmp_path, features=False, progress=False)
    assert verify(tmp_path)[1] == []


def test_a_broken_shard_is_made_anew_by_what_its_message_says(tmp_path: Path) -> None:
    make_store(tmp_path)
    expected = ArrayStore.load(tmp_path)[[4, 0]]["boxes"]
    shard = tmp_path / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    ArrayStore.load(tmp_path)  # mapped: its numbers are not read
    with pytest.raises(
        StorageError, match="shard-00001.safetensors is damaged: its data.*; delete it and run the bui"
    ):
        ArrayStore.load(tmp_path, verify=True)
    shard.unlink()
    with pytest.raises(StorageError, match="shard-00001"):
        ArrayStore.load(tmp_path)
    writer = StoreWriter(tmp_path, {"backbone": {"weights_sha256": "ab"}}, shard_size=3)
    assert writer.ids == [0, 1, 2]
    random = np.random.default_rng(0)
    tokens = [random.normal(size=(length, 3)).astype(np.float16) for length in (2, 0, 4, 1, 3)]
    boxes = random.uniform(size=(5, 4)).astype(np.float32)
    writer.append([3, 4], {"tokens": tokens[3:], "boxes": boxes[3:]})
    np.testing.assert_array_equal(writer.finish()[[4, 0]]["boxes"], expected)


@pytest.mark.slow
def test_the_commands_name_each_broken_file_and_end_with_1(tmp_path: Path, caplog: Any) -> None:
    from typer.testing import CliRunner

    from modeling_tvrn.cli.app import app

    make_model(tmp_path / "model")
    make_index(tmp_path / "index")
    segment = sorted((tmp_path / "index/segments").iterdir())[0]
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    index = ["index", str(tmp_path / "model"), str(photographs), str(tmp_path / "index")]
    for command in (["verify", str(tmp_path)], [*index, "--verify"]):
        assert CliRunner().invoke(app, command).exit_code == 0
    content = bytearray(segment.read_bytes())
    content[-1] ^= 1
    segment.write_bytes(content)
    for command in (["verify", str(tmp_path)], [*index, "--verify"]):
        said = CliRunner().invoke(app, command)
        assert said.exit_code == 1 and f"{segment.name} is damaged" in said.stdout and ", 1 broken" in said.stdout
    said = CliRunner().invoke(app, ["verify", str(tmp_path / "index"), "--json"])
    [broken] = json.loads(said.stdout)["broken"]
    assert Path(broken["file"]).name == segment.name and "tvrn index" in broken["fix"]
    CliRunner().invoke(app, [*index, "--repair"])  # there are no photographs to encode
    assert "it is made anew" in caplog.text and not segment.exists()
    empty = CliRunner().invoke(app, ["verify", str(photographs)])
    assert empty.exit_code == 2 and "nothing in" in empty.stderr


# -- kills ------------------------------------------------------------------------------------------------------------


def killed_at(work: Callable[[], None], events: tuple[str, ...], number: int) -> bool:
    """Do the work in a process that is killed before the number-th of some calls of `os`; whether it was."""
    child = os.fork()
    if child == 0:
        watched = killed_at_call(number)

        for event in events:
            setattr(os, event, watched(getattr(os, event)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("what", ["json", "tensors", "table", "model", "folder"])
@pytest.mark.slow
def test_kill_9_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, processor: TVRNProcessor, what: str) -> None:
    torch.set_num_threads(1)
    models = {value: tiny_model(attention_scale=value) for value in (8.0, 9.0)}
    for value, model in models.items():
        with torch.no_grad():
            model.region_projection.weight.fill_(value)
    place = tmp_path / "place"

    def folder_of(value: float) -> None:
        aside = tmp_path / ".aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name in "ab":
            (aside / name).write_text(str(value))
        publish_folder(aside, place)

    def read_folder() -> float:
        # Between two renames the old one lies beside: a folder with content can't be renamed over.
        path = place if place.exists() else tmp_path / ".removing-place"
        [value] = {(path / name).read_text() for name in "ab"}
        return float(value)

    def read_model() -> float:
        best = BestModel(place)
        check_listed(place)
        assert best.load().config.attention_scale == float(load_file(place / "model.safetensors")[
            "region_projection.weight"
        ][0, 0])  # fmt: skip
        return float(best.load().config.attention_scale)

    write: Callable[[float], Any]
    write, read = {
        "json": (
            lambda value: write_json(place, "tvrn-index", {"value": value}),
            lambda: read_json(place, "tvrn-index")["value"],
        ),
        "tensors": (
            lambda value: write_tensors(place, {"x": torch.full((3,), value)}),
            lambda: float(TensorFile.open(place).read()["x"][2]),
        ),
        "table": (lambda value: write_table(place, {"x": [value]}), lambda: Table(place).row(0)["x"]),
        "model": (lambda value: save_model(place, models[value], processor), read_model),
        "folder": (folder_of, read_folder),
    }[what]
    write(8.0)
    kills = 0
    while killed_at(lambda: write(9.0), ("replace", "rename", "fsync", "rmdir"), kills + 1):
        kills += 1
        assert read() in (8.0, 9.0), kills
        write(8.0)
    assert kills >= 3 and read() == 9.0


def test_a_full_disk_leaves_no_half_file_and_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


# -- one fingerprint --------------------------------------------------------------------------------------------------

LOSSES = {
    "distillation_temperature": 5.0, "distillation_loss_weight": 1.0, "matching_loss_weight": 0.5, "margin": 0.3,
    "contrastive_loss_weight": 2.0, "late_interaction_loss_weight": 0.1, "label_smoothing": 0.1, "dropout": 0.1,
    "pooled_dropout": 0.2, "image_dropout": 0.3, "text_dropout": 0.1, "matching_temperature": 0.2,
    "hardest_negative_loss_weight": 1.0, "pair_contrastive_loss_weight": 1.0, "initializer_range": 0.5,
    "pair_chunk_size": 3, "checkpoint_pair_chunks": False, "freeze_word_embeddings": True,
    "logit_scale_init_value": 1.0, "component_weight_init_value": 0.5, "late_interaction_scale_init_value": 1.0,
    "freeze_first_stage": False,
}  # fmt: skip
SCORES = {
    "attention_scale": 5.0, "leaky_slope": 0.3, "iou_threshold": 0.6, "vision_grid_size": 3,
}  # fmt: skip


def like(model: Any, **changes: Any) -> Any:
    """The same weights under another configuration."""
    other = type(model)(TVRNConfig(**{**model.config.to_diff_dict(), **changes})).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_every_setting_is_of_training_or_of_the_score() -> None:
    """A new loss setting that nobody names here would make every stored index another model's."""
    named = module_fingerprint(tiny_model(), defaults=True)["config"]
    assert not {*named} & {*LOSSES} and {*named} >= {*SCORES} - {"vision_grid_size"}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LOSSES))
def test_equal_weights_with_other_settings_of_training_are_the_same_model(
    name: str, processor: TVRNProcessor, tmp_path: Path
) -> None:
    model = tiny_model()
    other = like(model, **{name: LOSSES[name]})
    assert module_fingerprint(model) == module_fingerprint(other)
    ImageTextIndex.build(model, processor, records(3), tmp_path / "index", progress=False)
    ImageTextIndex.load(tmp_path / "index", other, processor)
    with torch.no_grad():
        sides = model.encode_images(**regions(3)), model.encode_texts(**words(4))
        first = score_matrix(model, *sides, folder=tmp_path / "blocks", progress=False)
        assert torch.equal(score_matrix(other, *sides, folder=tmp_path / "blocks", progress=False), first)


@pytest.mark.parametrize("name", list(SCORES))
def test_equal_weights_that_score_otherwise_are_another_model(
    name: str, processor: TVRNProcessor, tmp_path: Path
) -> None:
    model = tiny_model()
    other = like(model, **{name: SCORES[name]})
    assert module_fingerprint(model) != module_fingerprint(other)
    ImageTextIndex.build(model, processor, records(3), tmp_path, progress=False)
    if getattr(model.config, name) is not None:  # what only one of two names may be another release's
        with pytest.raises(OtherModelError, match=rf"config.{name}: stored .*, expected {SCORES[name]}"):
            ImageTextIndex.load(tmp_path, other, processor)


def test_a_towers_settings_count_and_its_dropout_does_not() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 9}
    tower = BertModel(BertConfig(vocab_size=11, **sizes))

    def fingerprint(**changes: Any) -> dict[str, Any]:
        other = BertModel(BertConfig(vocab_size=11, **sizes, **changes))
        other.load_state_dict(tower.state_dict())
        model = tiny_model(text_config=other.config)
        found = module_fingerprint(model)["config"]
        return {"tower": module_fingerprint(other), "inside": found}

    same = fingerprint()
    assert fingerprint(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.3, initializer_range=0.1) == same
    changed = fingerprint(hidden_act="relu")
    assert changed["tower"] != same["tower"] and changed["inside"] != same["inside"]


def test_calibration_changes_no_ranking_and_so_no_fingerprint() -> None:
    model = tiny_model()
    before = module_fingerprint(model)
    model.calibration_scale.fill_(3.0)
    assert module_fingerprint(model) == before


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_gives_back_every_kind_of_value_and_filters_by_it(tmp_path: Path) -> None:
    values = [
        "text",
        "",
        3,
        -(2**63) + 1,
        2**70,
        1.5,
        float("inf"),
        True,
        False,
        None,
        ["a", 1],
        {"k": None},
        "ß\udcff",
    ]
    write_table(tmp_path / "t", {"x": values, 'a "quoted" näme': range(len(values))})
    table = Table(tmp_path / "t")
    found = table.column("x")
    assert found[:-1] == values[:-1] and [type(value) for value in found] == [type(value) for value in values]
    assert found[-1] == "ß\\udcff", "what is no Unicode is kept as text that is"
    assert table.row(3) == {"x": values[3], 'a "quoted" näme': 3} and len(list(table)) == len(values)
    for row, value in enumerate(values):
        assert table.rows_where({"x": value if value != ["a", 1] else [value]}).tolist() == [row]
    assert table.rows_where({"x": [3, "text", None], 'a "quoted" näme': [0, 9]}).tolist() == [0, 9]
    assert table.rows_where({"x": list(range(2000))}).tolist() == [2]
    with pytest.raises(ValueError, match="'Year', 'year'.* knows no case; rename one"):
        write_table(tmp_path / "t", {"Year": [1], "year": [2]})
    (tmp_path / "no").write_text("no table at all")
    with pytest.raises(StorageError, match="no is damaged: it is no table of ours"):
        Table(tmp_path / "no")


@pytest.mark.slow
def test_an_index_is_read_without_pyarrow(tmp_path: Path) -> None:
    make_index(tmp_path)
    code = f"""
import sys
sys.modules["pyarrow"] = None
from pathlib import Path
from modeling_tvrn.storage.tables import Table
[table] = Path({str(tmp_path)!r}).rglob("items.sqlite")
print(Table(table).row(4)["id"], Table(table).rows_where({{"split": "test"}}).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "image-4 [0, 2, 4, 6, 8]", done.stderr


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_tensors_come_back_bit_for_bit_here_and_by_the_library(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    snapshot = read_snapshot(tmp_path / "step-00000003")
    assert snapshot.state["best"] == [None, float("inf")]
    for name, tensors in snapshot.tensors.items():
        plain = load_file(tmp_path / f"step-00000003/{name}.safetensors")
        assert plain.keys() == tensors.keys()
        for key, value in tensors.items():
            assert value.dtype == plain[key].dtype and value.shape == plain[key].shape
            assert torch.equal(value, plain[key])
    with pytest.raises(ValueError, match=r"'x' is complex64, expected one of"):
        write_tensors(tmp_path / "x", {"x": torch.zeros(2, dtype=torch.complex64)})


def test_a_disk_that_flushes_no_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_json(tmp_path / "manifest.json", "tvrn-array-store", {"kept": True})
    assert read_json(tmp_path / "manifest.json", "tvrn-array-store")["kept"]


def test_two_writers_of_one_file_in_one_process_leave_a_whole_one(tmp_path: Path) -> None:
    """Threads have one process number, and so have containers on a common disk."""
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and [each.name for each in tmp_path.iterdir()] == ["file"]


def test_the_model_before_the_mean_goes_with_the_mean_and_not_before(tmp_path: Path, processor: TVRNProcessor) -> None:
    for folder in (tmp_path, tmp_path / "trained"):
        save_model(folder, tiny_model(), processor)
    better = SimpleNamespace(metrics=SimpleNamespace(rsum=50.0))

    class Full:
        def save_pretrained(self, folder: Path, **_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def state_dict(self) -> dict[str, Any]:
            return {}

        def named_modules(self) -> list[Any]:
            return []

    best = BestModel(tmp_path)
    assert not best.offer(3, better, Full(), processor) and (tmp_path / "trained" / "config.json").is_file()
    assert best.offer(4, better, tiny_model(), processor) and not (tmp_path / "trained").exists()
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
