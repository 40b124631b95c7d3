"""A stream in an order of its own: every caption once an epoch on one process, taken up anywhere."""

import itertools
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from data_makers import captions, encoded, noise, shows, write_row_groups, write_tar

from modeling_tvrn.data import ImageError, PairCollator, PairStream, RawItem, ShuffledStream, StreamItems, load_pairs
from modeling_tvrn.data import shuffled as module
from modeling_tvrn.data.sources import Shard

FILES = {"train-0": range(9), "train-1": range(9, 11), "train-2": range(11, 24)}
IMAGES = 24
EVERYTHING = sorted((number, caption) for number in range(IMAGES) for caption in captions(number, 1 + number % 3))


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of three, one and four row groups."""
    folder = tmp_path_factory.mktemp("parquet")
    for name, numbers in FILES.items():
        write_row_groups(folder / f"{name}.parquet", list(numbers), group=4)
    return folder


def stream(folder: Path) -> PairStream:
    return load_pairs(folder, split="train", streaming=True)


def named(item: RawItem) -> tuple[Any, str]:
    return item.pair.image_id, item.pair.captions[item.caption_number]


def epoch_of(records: ShuffledStream, epoch: int = 0) -> list[RawItem]:
    """The items of one epoch."""
    items = records.items((epoch, 0, 0))
    return [item for item, _ in itertools.takewhile(lambda pair: pair[1][0] == epoch, items)]


@pytest.mark.parametrize("processes", [1, 2, 3, 8, 9])
def test_every_caption_comes_once_an_epoch_on_one_of_the_processes(parquet: Path, processes: int) -> None:
    assert len(stream(parquet).shards()) == 3 + 1 + 4
    for epoch in (0, 3):
        own = [
            [
                named(item)
                for item in epoch_of(
                    ShuffledStream(stream(parquet), 5, rank, processes, shards_at_once=2, rows_at_once=3), epoch
                )
            ]
            for rank in range(processes)
        ]
        assert sorted(pair for part in own for pair in part) == EVERYTHING
        assert min(map(len, own)) >= 1


def test_the_order_follows_from_seed_and_epoch(parquet: Path) -> None:
    def order(seed: int, epoch: int, **sizes: int) -> list[Any]:
        return [named(item) for item in epoch_of(ShuffledStream(stream(parquet), seed, **sizes), epoch)]

    assert order(1, 0) == order(1, 0)
    different = [order(1, 0), order(1, 1), order(2, 0), order(1, 0, rows_at_once=5), order(1, 0, shards_at_once=1)]
    assert all(first != other for first, other in itertools.combinations(different, 2))
    images = [image for image, _ in order(1, 0, shards_at_once=4, rows_at_once=24)]
    assert len({number // 4 for number in images[:8]}) > 2, "the first items come from few shards"


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "processes"), [(0, 1), (1, 3), (2, 9)])
def test_it_is_taken_up_at_any_position(parquet: Path, rank: int, processes: int) -> None:
    def make() -> ShuffledStream:
        return ShuffledStream(stream(parquet), 7, rank, processes, shards_at_once=2, rows_at_once=3)

    whole = list(itertools.islice(make().items(), 60 if processes == 1 else 25))
    for place, (_, position) in enumerate(whole[:-1]):
        rest = list(itertools.islice(make().items(list(position)), len(whole) - place - 1))
        assert [(named(item), where) for item, where in rest] == [
            (named(item), where) for item, where in whole[place + 1 :]
        ]


def test_going_on_reads_no_shard_before_its_group(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = ShuffledStream(stream(parquet), 7, shards_at_once=2)
    opened: list[str] = []
    records.shards = [Shard(shard.name, counted(shard, opened)) for shard in records.shards]
    list(itertools.islice(records.items((0, 3, 1)), 2))
    assert set(opened) == {shard.name for shard in records.groups(0)[3]}


def counted(shard: Shard, opened: list[str]) -> Callable[[], Iterator[Any]]:
    def rows() -> Iterator[Any]:
        opened.append(shard.name)
        return shard.open()

    return rows


def test_tar_shards_are_read_one_by_one(tmp_path: Path) -> None:
    for shard in range(3):
        members = {}
        for number in range(4 * shard, 4 * shard + 4):
            members |= {
                f"{number:04d}.jpg": encoded(number, "JPEG"),
                f"{number:04d}.txt": "\n".join(captions(number, 2)),
            }
        write_tar(tmp_path / f"train-{shard}.tar", members)
    records = stream(tmp_path)
    assert len(records.shards()) == 3
    texts = [named(item)[1] for rank in range(2) for item in epoch_of(ShuffledStream(records, 0, rank, 2))]
    assert sorted(texts) == sorted(text for number in range(12) for text in captions(number, 2))


# -- items -----------------------------------------------------------------------------------------------


def test_items_are_decoded_as_the_records_and_travel_to_workers(parquet: Path) -> None:
    records = stream(parquet)
    raw = pickle.loads(pickle.dumps(epoch_of(ShuffledStream(records))[:7]))  # noqa: S301 (as multiprocessing does)
    items = StreamItems(records).__getitems__(raw)
    for item, source in zip(items, raw, strict=True):
        assert shows(item["record"]["image"], source.pair.image_id)
        assert item["caption"] == item["record"]["captions"][item["caption_number"]]
    collator = PairCollator(lambda **inputs: {"count": len(inputs["images"])})
    batch = collator(items)
    assert batch["count"] == len(batch["image_ids"]) == len({item.pair.image_id for item in raw})


def test_an_image_that_cannot_be_decoded_is_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members = {}
    for number in range(4):
        content = noise("JPEG")[:700] if number == 2 else encoded(number, "JPEG")
        members |= {f"{number}.jpg": content, f"{number}.txt": captions(number)[0]}
    write_tar(tmp_path / "train.tar", members)
    records = stream(tmp_path)
    raw = epoch_of(ShuffledStream(records))
    with caplog.at_level(logging.WARNING, "modeling_tvrn"):
        items = StreamItems(records).__getitems__(raw)
    assert sorted(item["caption"] for item in items) == sorted(captions(number)[0] for number in (0, 1, 3))
    assert "left out the image 'train/train/2'" in caplog.text and "train.tar" in caplog.text
    with pytest.raises(ImageError, match="none of a batch's 1 images.*train.tar"):
        StreamItems(records).__getitems__([item for item in raw if "/2" in item.pair.image_id])


# -- faults ----------------------------------------------------------------------------------------------


def breaking(shard: Shard, after: int, times: int) -> Shard:
    """A shard whose connection breaks after so many rows, the first few times."""
    left = [times]

    def rows() -> Iterator[Any]:
        for number, row in enumerate(shard.open()):
            if number >= after and left[0]:
                left[0] -= 1
                raise OSError("connection reset by peer")
            yield row

    return Shard(shard.name, rows)


def test_a_broken_connection_loses_and_repeats_no_row(
    parquet: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.0)
    expected = [named(item) for item in epoch_of(ShuffledStream(stream(parquet), 3))]
    records = ShuffledStream(stream(parquet), 3)
    records.shards = [breaking(shard, number % 4, times=4) for number, shard in enumerate(records.shards)]
    with caplog.at_level(logging.WARNING, "modeling_tvrn"):
        assert [named(item) for item in epoch_of(records)] == expected
    assert "broke off after 1 rows (connection reset by peer); opening it again there" in caplog.text
    records.shards = [breaking(shard, 1, times=99) for shard in stream(parquet).shards()]
    with pytest.raises(ConnectionError, match=r"train-.*row group . broke off after 1 rows, 5 times in a row"):
        epoch_of(records)


def test_a_process_without_anything_usable_says_so(parquet: Path, tmp_path: Path) -> None:
    write_row_groups(tmp_path / "train.parquet", [1, 2], group=4)
    with pytest.raises(ValueError, match="process 2 of 3 finds nothing usable in 1 shards"):
        next(ShuffledStream(stream(tmp_path), process=2, processes=3).items())
    with pytest.raises(ValueError, match="process=3 of processes=3"):
        ShuffledStream(stream(parquet), process=3, processes=3)
