"""A stream in an order of its own for every seed and epoch, dealt to processes, that can be taken up anywhere.

No buffer whose content is lost: what is shuffled together is a function of seed and epoch, so a position in the order
is three numbers. Shards are shuffled and dealt to the processes; a few are read at a time, a row of each in turn; the
captions of so many rows in a row are shuffled. Going on in the middle passes over whole groups of shards unread, and
reads the group again in which it stopped.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.utils.data

from .images import ImageError
from .records import PairStream
from .schema import Pair
from .sources import Content, Shard

logger = logging.getLogger(__name__)

Position = tuple[int, int, int]  # epoch, group of shards, items of the group that were read

ATTEMPTS = 5  # to go on with a shard whose connection broke, without a row in between
FIRST_WAIT = 1.0  # seconds, doubled each time


class RawItem(NamedTuple):  # one for each caption, so made in a microsecond
    """A caption with its image, not yet decoded.

    Attributes:
        shard: name of the shard it came from.
    """

    content: Content
    pair: Pair
    caption_number: int
    shard: str


class ShuffledStream:
    """Every caption of a stream once an epoch, in an order by seed and epoch, without end.

    Args:
        stream: from `load_pairs(..., streaming=True)`.
        seed: of the order.
        process, processes: the shards are dealt to so many processes; the rows, where there are fewer shards. Each
            epoch of each shard is read by one process; those with fewer shards begin the next epoch earlier.
        shards_at_once: shards that are read side by side, so that a batch is not of one shard alone.
        rows_at_once: images whose captions are shuffled together; so many encoded images are in memory.

    Raises:
        ValueError: a number below 1, or a process outside of them.
    """

    def __init__(
        self,
        stream: PairStream,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
        shards_at_once: int = 4,
        rows_at_once: int = 1024,
    ) -> None:
        if min(processes, shards_at_once, rows_at_once) < 1 or not 0 <= process < processes:
            raise ValueError(
                f"process={process} of processes={processes}, shards_at_once={shards_at_once}, rows_at_once="
                f"{rows_at_once}: expected numbers of at least 1, and a process from 0 to processes - 1"
            )
        self.stream = stream
        self.shards = stream.shards()
        self.seed = seed
        self.process = process
        self.processes = processes
        self.shards_at_once = shards_at_once
        self.rows_at_once = rows_at_once

    def items(self, position: Sequence[int] = (0, 0, 0)) -> Iterator[tuple[RawItem, Position]]:
        """Items from a position on, each with the position behind it.

        Raises:
            ValueError: a whole epoch holds nothing for this process.
            ConnectionError: a shard could not be read to its end; names it and how far it was read.
        """
        epoch, first, skip = position
        found = True
        while found or first:
            found = False
            groups = self.groups(epoch)
            for number in range(first, len(groups)):
                for place, item in enumerate(self._group_items(epoch, number, groups[number])):
                    found = True
                    if place >= skip:
                        yield item, (epoch, number, place + 1)
                skip = 0
            epoch, first = epoch + 1, 0
        raise ValueError(
            f"{self.stream.name}: process {self.process} of {self.processes} finds nothing usable in "
            f"{len(self.shards)} shards; skipped: {self.stream.skipped}"
        )

    def groups(self, epoch: int) -> list[list[Shard]]:
        """This process's shards in an epoch's order, as they are read side by side."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards)).tolist()
        own = order[self.process :: self.processes] if self._deals_shards else order
        starts = range(0, len(own), self.shards_at_once)
        return [[self.shards[number] for number in own[start : start + self.shards_at_once]] for start in starts]

    @property
    def _deals_shards(self) -> bool:
        return len(self.shards) >= self.processes

    def _group_items(self, epoch: int, number: int, shards: list[Shard]) -> Iterator[RawItem]:
        rng = np.random.default_rng([self.seed, epoch, self.process, number])
        rows = self._side_by_side(shards)
        while block := list(itertools.islice(rows, self.rows_at_once)):
            places = [
                (row, caption) for row, (_, pair, _) in enumerate(block) for caption in range(len(pair.captions))
            ]
            for place in rng.permutation(len(places)).tolist():
                row, caption = places[place]
                content, pair, shard = block[row]
                yield RawItem(content, pair, caption, shard)

    def _side_by_side(self, shards: list[Shard]) -> Iterator[tuple[Content, Pair, str]]:
        """A row of each shard in turn, until all are at their end."""
        open_ones = [self._rows(shard) for shard in shards]
        while open_ones:
            for rows in list(open_ones):
                row = next(rows, None)
                if row is None:
                    open_ones.remove(rows)
                else:
                    yield row

    def _rows(self, shard: Shard) -> Iterator[tuple[Content, Pair, str]]:
        """A shard's usable rows; one that breaks off is opened again behind the last row that came."""
        done = failures = 0
        first = self.shards.index(shard)  # where rows are dealt, short shards begin with different processes
        while True:
            try:
                for row, content in itertools.islice(shard.open(), done, None):
                    mine = self._deals_shards or (first + done) % self.processes == self.process
                    loaded = self.stream.load(row, content) if mine else None
                    done, failures = done + 1, 0
                    if loaded is not None:
                        yield *loaded, shard.name
                return
            except ValueError:
                raise  # the data are wrong: they will not be better the next time
            except Exception as error:  # of whatever library reads remote files
                failures += 1
                if failures >= ATTEMPTS:
                    raise ConnectionError(
                        f"{shard.name} broke off after {done} rows, {ATTEMPTS} times in a row ({error}); check the "
                        "connection or the file; the run goes on from its last checkpoint with resume=auto"
                    ) from error
                logger.warning("%s broke off after %d rows (%s); opening it again there", shard.name, done, error)
                time.sleep(FIRST_WAIT * 2 ** (failures - 1))


class StreamItems(torch.utils.data.Dataset[dict[str, Any]]):
    """Decodes raw items, in a data loader's workers: the raw items themselves stand where indices would.

    A batch's image is decoded once however many of its captions are there. Images that cannot be decoded are left out
    with a warning.
    """

    def __init__(self, stream: PairStream) -> None:
        self.stream = stream

    def __getitem__(self, raw: RawItem) -> dict[str, Any]:
        return self.__getitems__([raw])[0]

    def __getitems__(self, raw: Sequence[RawItem]) -> list[dict[str, Any]]:
        """Items as `CaptionDataset` has them, without row numbers.

        Raises:
            ImageError: none of them can be decoded.
        """
        records: dict[Any, Any] = {}
        for item in raw:
            if item.pair.image_id not in records:
                records[item.pair.image_id] = self._record(item)
        items = [
            {
                "record": record,
                "caption": item.pair.captions[item.caption_number],
                "caption_number": item.caption_number,
            }
            for item in raw
            if (record := records[item.pair.image_id]) is not None
        ]
        if not items:
            shards = sorted({item.shard for item in raw})
            raise ImageError("corrupt image", f"none of a batch's {len(records)} images can be decoded; of {shards}")
        return items

    def _record(self, item: RawItem) -> dict[str, Any] | None:
        try:
            return self.stream.decode(item.content, item.pair)
        except ImageError as error:
            logger.warning("left out the image %r of %s: %s", item.pair.image_id, item.shard, error)
            return None
