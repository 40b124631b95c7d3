"""wandb as a tracker: asked for by name, missing, or refusing to start."""

import json
import sys
from pathlib import Path

import pytest
from accelerate.utils import LoggerType
from training_makers import tiny_config, write_scan

from modeling_tvrn.training.launch import check_trackers
from modeling_tvrn.training.loop import Training

# What accelerate calls of wandb, written down in a file.
STUB = """
import json, os

class Run:
    def log(self, values, step=None):
        with open(os.path.join(self.folder, "log.jsonl"), "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\\n")
    def finish(self):
        pass

class config:
    @staticmethod
    def update(values, allow_val_change):
        json.dump(values, open(os.path.join(Run.folder, "wandb-config.json"), "w"))

def init(project, dir, name):
    if os.environ.get("WANDB_MODE") != "offline":
        raise RuntimeError("api_key not configured (no-tty)")
    assert os.path.isdir(dir), dir
    Run.folder = dir
    return Run()
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wandb that accelerate finds installed."""
    (tmp_path / "site" / "wandb").mkdir(parents=True)
    (tmp_path / "site" / "wandb" / "__init__.py").write_text(STUB)
    (tmp_path / "site" / "wandb-0.20.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: wandb\nVersion: 0.20\n"
    (tmp_path / "site" / "wandb-0.20.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    # accelerate looks for trackers while it is imported
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])


@pytest.mark.usefixtures("stub")
def test_a_run_is_followed_offline_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tiny_config(write_scan(tmp_path), tmp_path / "deep" / "run", epochs=1, trackers=["wandb"])
    run = Training(config)
    run.fit()
    folder = Path(config.output_dir)
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert any("loss" in event for event in events) and any("rsum" in event for event in events)
    assert [event["step"] for event in events] == sorted(event["step"] for event in events), "wandb drops steps behind"
    assert json.loads((folder / "wandb-config.json").read_text())["batch_size"] == 8


@pytest.mark.usefixtures("stub")
def test_a_tracker_that_does_not_start_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = tiny_config(write_scan(tmp_path), tmp_path / "run", trackers=["wandb"])
    with pytest.raises(ValueError, match=r"RuntimeError: api_key not configured .*WANDB_MODE=offline"):
        Training(config)


def test_a_folder_of_former_runs_is_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb leaves `./wandb` behind, which Python takes for a package without code."""
    (tmp_path / "here" / "wandb").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here")])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="'wandb', which is not installed; pip install wandb"):
        check_trackers(["wandb"])
