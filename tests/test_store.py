"""A store gives back what was put in, by id, and never something else: not stale, not half-written, not another's."""

import copy
import json
import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from modeling_tvrn.storage.arrays import ArrayStore, StoreWriter, check_space
from modeling_tvrn.storage.files import StorageError
from modeling_tvrn.storage.fingerprints import StaleStoreError
from modeling_tvrn.storage.ids import IdIndex

FINGERPRINT = {"backbone": {"weights_sha256": "ab12", "config": {"patch_size": 7}}, "numbers": {"dtype": "float16"}}
IDS = [*range(100, 107), "108", "a name.jpg", 9, 8]


def arrays_of(count: int, start: int = 0) -> dict[str, np.ndarray]:
    """Different numbers for every item of a data set, the same at every call."""
    random = np.random.default_rng(5)
    features = random.normal(size=(50, 3, 5)).astype(np.float16)
    boxes = random.uniform(size=(50, 3, 4)).astype(np.float32)
    mask = random.uniform(size=(50, 3)) > 0.5
    rows = slice(start, start + count)
    return {"features": features[rows], "boxes": boxes[rows], "mask": mask[rows]}


def build(folder: Path, ids=IDS, shard_size: int = 4, step: int = 3, **changes) -> ArrayStore:
    """A store made in steps that do not divide its shards; what is stored already is not put in again."""
    writer = StoreWriter(folder, FINGERPRINT | changes, shard_size)
    for start in range(len(writer.ids), len(ids), step):
        part = ids[start : start + step]
        writer.append(part, arrays_of(len(part), start))
    return writer.finish({"seconds": 1.5})


def test_items_come_back_exactly_by_id_in_any_order_and_repeated(tmp_path):
    build(tmp_path)
    store = ArrayStore.load(tmp_path)
    rows = [10, 0, 7, 8, 3, 3, 4]
    found = store[[IDS[row] for row in rows]]
    for name, expected in arrays_of(len(IDS)).items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected[rows])
    assert list(store.ids) == IDS and len(store) == 11
    assert 9 in store and "9" not in store
    assert store[[]]["boxes"].shape == (0, 3, 4)
    assert store.info == {"seconds": 1.5}


def test_ragged_items_come_back_with_their_lengths_after_a_resume_too(tmp_path):
    random = np.random.default_rng(2)
    items = [random.normal(size=(length, 3)).astype(np.float16) for length in (4, 0, 1, 7, 2, 2, 5, 3, 6)]
    for end in (5, 9):  # the first writer is killed: two whole shards of two are there, its fifth item is lost
        writer = StoreWriter(tmp_path, FINGERPRINT, shard_size=2)
        assert writer.ids == list(range(0 if end == 5 else 4))
        for start in range(len(writer.ids), end, 3):
            rows = range(start, min(start + 3, end))
            writer.append(rows, {"tokens": [items[row] for row in rows], "row": np.array(rows)})
    store = writer.finish()
    rows = [8, 1, 3, 3, 0]
    found = store[rows]
    assert found["row"].tolist() == rows and found["tokens"].shape == (5, 7, 3)
    assert found["tokens.lengths"].tolist() == [len(items[row]) for row in rows]
    for padded, row in zip(found["tokens"], rows, strict=True):
        np.testing.assert_array_equal(padded[: len(items[row])], items[row])
        assert not padded[len(items[row]) :].any()
    assert store.read(np.array([1]), ["tokens"])["tokens"].shape == (1, 0, 3)
    assert store[[]]["tokens"].shape == (0, 0, 3)


def test_a_disk_without_room_is_refused_with_what_is_needed_and_free(tmp_path):
    with pytest.raises(OSError, match=r"no room for a cache of 1,000,000,000.0 GB in .* has [\d,.]+ [GM]B free"):
        check_space(tmp_path, 1e18)


def test_shards_are_plain_safetensors(tmp_path):
    """Nothing but the library is needed to read them."""
    build(tmp_path)
    second = load_file(tmp_path / "shard-00001.safetensors")
    np.testing.assert_array_equal(second["features"], arrays_of(4, 4)["features"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json", "shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"
    ]  # fmt: skip


def test_numpy_ids_are_the_ids_they_hold(tmp_path):
    build(tmp_path)
    store = ArrayStore.load(tmp_path)
    found = store[np.array([103, 101])]
    np.testing.assert_array_equal(found["features"], arrays_of(11)["features"][[3, 1]])


@pytest.mark.parametrize("wrong", ["108x", 108, "103"])
def test_a_missing_id_is_named_with_its_type(tmp_path, wrong):
    store = build(tmp_path)
    with pytest.raises(KeyError, match=rf"1 of 2 ids.*{wrong!r} \({type(wrong).__name__}\)"):
        store[[104, wrong]]


@pytest.mark.parametrize("wrong", [1.5, True, None, (1, 2)])
def test_only_ints_and_strings_are_ids(tmp_path, wrong):
    with pytest.raises(ValueError, match="expected an int or a str"):
        build(tmp_path, [1, wrong])


def test_one_id_is_no_list_of_ids(tmp_path):
    """A string would otherwise be read as its characters."""
    store = build(tmp_path)
    for single in ("a name.jpg", 103, np.int64(103)):
        with pytest.raises(TypeError, match=r"write \[\["):
            store[single]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_looking_up_items_does_not_load_the_store(tmp_path):
    """64 MB in one file, two items: the pages are mapped from the file, the process's own memory hardly grows."""

    def own_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    writer = StoreWriter(tmp_path, FINGERPRINT)
    for start in range(0, 256, 64):
        writer.append(range(start, start + 64), {"features": np.full((64, 65536), start, dtype=np.float32)})
    writer.finish()
    del writer
    before = own_memory()
    store = ArrayStore.load(tmp_path)
    np.testing.assert_array_equal(store[[200, 3]]["features"][:, 7], [192, 0])
    assert own_memory() - before < 8_000  # kB


def test_a_copy_for_a_worker_holds_no_arrays(tmp_path):
    store = build(tmp_path)
    store[IDS]  # every shard is open now
    assert len(pickle.dumps(store)) < 10_000
    np.testing.assert_array_equal(copy.deepcopy(store)[[9]]["features"], store[[9]]["features"])


def test_what_is_looked_up_can_be_changed_without_changing_the_store(tmp_path):
    store = build(tmp_path)
    store[[100]]["features"][:] = 7
    np.testing.assert_array_equal(store[[100]]["features"], arrays_of(1)["features"])


# -- stale ------------------------------------------------------------------------------------------------------------


def test_every_differing_field_is_named_with_both_values(tmp_path):
    build(tmp_path)
    expected = {
        "backbone": {"weights_sha256": "cd34", "config": {"patch_size": 7, "depth": 2}},
        "numbers": {"dtype": "float16"},
    }
    with pytest.raises(StaleStoreError) as caught:
        ArrayStore.load(tmp_path, expected)
    message = str(caught.value)
    assert "backbone.weights_sha256: stored 'ab12', expected 'cd34'" in message
    assert "backbone.config.depth: stored 'nothing', expected 2" in message
    assert "patch_size" not in message and "dtype" not in message
    assert "overwrite=True" in message


def test_a_field_that_is_no_longer_there_is_a_difference(tmp_path):
    build(tmp_path)
    with pytest.raises(StaleStoreError, match=r"config.patch_size: stored 7, expected 'nothing'"):
        ArrayStore.load(tmp_path, {"backbone": {"weights_sha256": "ab12"}})


def test_sections_that_are_not_named_are_not_compared(tmp_path):
    build(tmp_path)
    assert len(ArrayStore.load(tmp_path, {"numbers": {"dtype": "float16"}})) == 11


def test_tuples_and_lists_are_the_same_setting(tmp_path):
    """JSON knows no tuples; a config does."""
    build(tmp_path, preprocessing={"size": (3, 4)})
    assert len(ArrayStore.load(tmp_path, {"preprocessing": {"size": (3, 4)}})) == 11


def test_the_data_are_part_of_the_fingerprint(tmp_path):
    first = build(tmp_path / "first").fingerprint["data"]
    assert first == build(tmp_path / "again").fingerprint["data"]
    assert first != build(tmp_path / "order", IDS[::-1]).fingerprint["data"]
    assert first != build(tmp_path / "types", [str(item_id) for item_id in IDS]).fingerprint["data"]
    with pytest.raises(StaleStoreError, match="data.ids_sha256"):
        ArrayStore.load(tmp_path / "order", {"data": first})


def test_another_build_is_not_written_over(tmp_path):
    build(tmp_path)
    with pytest.raises(StaleStoreError, match=r"numbers.dtype: stored 'float16', expected 'float32'"):
        StoreWriter(tmp_path, FINGERPRINT | {"numbers": {"dtype": "float32"}})
    assert len(ArrayStore.load(tmp_path)) == 11


def test_overwrite_drops_the_old_store_and_nothing_else(tmp_path):
    build(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    writer = StoreWriter(tmp_path, {"other": {"kind": 1}}, overwrite=True)
    assert writer.ids == []
    writer.append([1], {"vector": np.ones((1, 2), dtype=np.float32)})
    store = writer.finish()
    assert store.ids == (1,) and (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "shard-00001.safetensors").exists()


def test_a_folder_with_somebody_elses_manifest_is_left_alone(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "web app"}')
    for use in (ArrayStore.load, lambda folder: StoreWriter(folder, FINGERPRINT)):
        with pytest.raises(
            StorageError, match=r"manifest.json is of format .*: this release reads tvrn-array-store 2"
        ):
            use(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "web app"}'


def test_a_newer_format_is_refused(tmp_path):
    build(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(ValueError, match=r"is of format tvrn-array-store 99: this release reads tvrn-array-store 2; "):
        ArrayStore.load(tmp_path)


def test_no_store_is_said_to_be_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="build the store there first"):
        ArrayStore.load(tmp_path / "nowhere")


# -- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_killed_build_keeps_its_whole_shards_and_goes_on(tmp_path):
    child = os.fork()
    if child == 0:
        StoreWriter(tmp_path, FINGERPRINT, 4).append(IDS[:9], arrays_of(9))
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"is unfinished: .*; run the same build again"):
        ArrayStore.load(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert len(kept) == 2
    assert StoreWriter(tmp_path, FINGERPRINT, 4).ids == IDS[:8]
    store = build(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    np.testing.assert_array_equal(store[IDS]["features"], arrays_of(11)["features"])


def test_a_shard_half_written_is_found_and_built_again(tmp_path):
    build(tmp_path)
    whole = (tmp_path / "shard-00001.safetensors").read_bytes()
    for size in (len(whole) - 1, 200, 5, 0):
        (tmp_path / "shard-00001.safetensors").write_bytes(whole[:size])
        with pytest.raises(StorageError, match="shard-00001"):
            ArrayStore.load(tmp_path)
    first = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
    assert StoreWriter(tmp_path, FINGERPRINT, 4).ids == IDS[:4]
    store = build(tmp_path)
    assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == first
    np.testing.assert_array_equal(store[IDS]["boxes"], arrays_of(11)["boxes"])


def test_a_missing_shard_is_found(tmp_path):
    build(tmp_path)
    (tmp_path / "shard-00002.safetensors").unlink()
    with pytest.raises(StorageError, match="shard-00002"):
        ArrayStore.load(tmp_path)


def test_what_a_kill_left_behind_is_cleared_away(tmp_path):
    StoreWriter(tmp_path, FINGERPRINT, 4).append(IDS[:5], arrays_of(5))
    (tmp_path / "shard-00001.safetensors.123.tmp").write_bytes(b"half")
    build(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path, FINGERPRINT, 4)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            writer.append(IDS[:4], arrays_of(4))
    assert not list(tmp_path.glob("shard-*"))
    assert len(build(tmp_path)) == 11


@pytest.mark.parametrize("changes", [{"numbers": {"dtype": "float32"}}, {}])
def test_a_shard_of_another_build_is_refused(tmp_path, changes):
    """Same shapes, same size of file: only what made it, or whose it is, differs."""
    build(tmp_path / "mine")
    build(tmp_path / "other", IDS[4:] + IDS[:4], **changes)
    os.replace(tmp_path / "other/shard-00000.safetensors", tmp_path / "mine/shard-00000.safetensors")
    with pytest.raises(StorageError, match="another build"):
        ArrayStore.load(tmp_path / "mine")


def test_shards_of_nobody_knows_which_build_are_not_used(tmp_path):
    build(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert StoreWriter(tmp_path, FINGERPRINT, 4).ids == []


# -- bad input --------------------------------------------------------------------------------------------------------


def test_an_id_comes_once(tmp_path):
    with pytest.raises(ValueError, match=r"the id 2 comes twice"):
        build(tmp_path, [1, 2, 3, 4, 2])


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"v": np.ones((2, 4), np.float32)}, r"expected .*\(3,\)"),
        ({"v": np.ones((2, 3), np.float64)}, "float64.*expected.*float32"),
        ({"w": np.ones((2, 3), np.float32)}, r"'w'.*expected .*'v'"),
        ({"v": np.ones((3, 3), np.float32)}, r"2 ids come with arrays of lengths \{'v': 3\}"),
        ({}, "2 ids come with arrays of lengths"),
    ],
)
def test_later_items_must_be_like_the_first(tmp_path, arrays, match):
    writer = StoreWriter(tmp_path, FINGERPRINT)
    writer.append([1], {"v": np.ones((1, 3), np.float32)})
    with pytest.raises(ValueError, match=match):
        writer.append([2, 3], arrays)


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the data are empty"):
        StoreWriter(tmp_path, FINGERPRINT).finish()


def test_numbers_that_cannot_be_stored_are_refused(tmp_path):
    writer = StoreWriter(tmp_path, FINGERPRINT, 2)
    with pytest.raises(ValueError, match=r"'v' is complex128, expected one of"):
        writer.append([1, 2], {"v": np.ones((2, 3), complex)})
    with pytest.raises(ValueError, match="shard_size is 0"):
        StoreWriter(tmp_path, FINGERPRINT, 0)


@pytest.mark.parametrize("ids", [[7, -3, 2**62, 0, 41], ["a", "b", "7", 7, -1]])
def test_an_index_finds_rows_in_any_order_and_nothing_else(ids: list) -> None:
    index = IdIndex(ids)
    assert len(index) == 5
    assert index.find([ids[3], ids[0], ids[3], ids[4]]).tolist() == [3, 0, 3, 4]
    assert index.find(["c", 8, 2**70, "0", ids[1]]).tolist() == [-1, -1, -1, -1, 1]
    assert index.find([]).tolist() == []
    with pytest.raises(ValueError, match="cannot be told apart"):
        IdIndex([*ids, ids[2]])


def test_ids_take_16_bytes_each_in_memory() -> None:
    """A million captions' ids in a dictionary took 150 MB."""
    index = IdIndex([f"{number}.jpg#3" for number in range(1000)])
    arrays = [value for value in vars(index).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 16 * 1000
