"""Streaming from a Hub, served on this machine: every caption once, also when connections break in mid-shard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_makers import captions, write_row_groups
from hub_server import HubServer

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import itertools, json, logging, sys
logging.basicConfig(level=logging.WARNING)
from modeling_tvrn.data import ShuffledStream, StreamItems, load_pairs, shuffled

shuffled.FIRST_WAIT = 0.01
records = load_pairs("org/pairs", split="train", streaming=True)
found, names = [], [shard.name for shard in records.shards()]
for process in range(2):
    items = ShuffledStream(records, 3, process, 2, rows_at_once=5).items()
    raw = [item for item, _ in itertools.takewhile(lambda pair: pair[1][0] == 0, items)]
    for item in StreamItems(records).__getitems__(raw):
        record = item["record"]
        found.append([record["image_id"], item["caption"], record["image"].size])
print(json.dumps({"found": found, "names": names}))
"""


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_streamed_whole_through_broken_connections(tmp_path: Path) -> None:
    shards = {f"train-{number}": range(30 * number, 30 * number + 30) for number in range(3)}
    files = {}
    for name, numbers in shards.items():
        write_row_groups(tmp_path / f"{name}.parquet", list(numbers), group=7)
        files[f"data/{name}.parquet"] = tmp_path / f"{name}.parquet"
    with HubServer() as hub:
        hub.add_repo("org/pairs", files, repo_type="dataset")
        size = min(path.stat().st_size for path in files.values())
        for part in (3, 2):
            for name in files:
                hub.drop(after=size // part, match=name)
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", CODE], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        dropped = sum(request.dropped for request in hub.requests)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    expected = [[number, caption, [13, 9]] for number in range(90) for caption in captions(number, 1 + number % 3)]
    assert sorted(result["found"]) == sorted(expected)
    assert len(result["names"]) == 3 and "shard 1 of 3" in result["names"][1]
    assert dropped >= 3, "no connection was cut in the middle"
