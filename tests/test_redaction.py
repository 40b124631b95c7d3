"""A planted secret is found in nothing that is written, printed or pushed; what is no secret stays."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from data_makers import write_row_groups
from hub_makers import region_model, results, save
from hub_server import HubServer, online
from training_makers import SIZES, TINY_VIT

from modeling_tvrn import TVRNConfig
from modeling_tvrn.evaluation import provenance
from modeling_tvrn.hub import Check, push_to_hub, write_run_card
from modeling_tvrn.hub.apart import Outcome
from modeling_tvrn.redaction import (
    REDACTED,
    guard_logs,
    is_secret,
    redacted,
    redacted_command,
    redacted_text,
    without_secrets,
)
from modeling_tvrn.training import TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
SHAPED = "hf_PlantedByShape0123456789abcdefghij"
NAMED = "planted by name 7!"
SHAPES = [
    SHAPED, "Bearer planted-0123456789", "ghp_planted0123456789planted0123", "github_pat_11PLANTED0_0123456789abcdef",
    "sk-planted0123456789abcdef", "AKIAPLANTED012345678", "xoxb-planted-0123456789",
    "eyJhbGciOiJI.eyJwbGFudGVk.c2lnbmVk", "https://me:planted@host/data", "https://host/data?X-Amz-Signature=planted01",
    "-----BEGIN PRIVATE KEY-----\nplanted\n-----END PRIVATE KEY-----",
]  # fmt: skip


@pytest.mark.parametrize("text", SHAPES)
def test_a_secret_is_known_by_its_shape(text: str) -> None:
    given = {"a": [f"before {text} after"], text: 1}
    for found in (redacted(given), without_secrets(given), redacted_command(["tvrn", f"query={text}"])):
        told = json.dumps(found)
        assert "lanted" not in told and "PLANTED" not in told and REDACTED in told
    assert redacted_text(f"before {text} after").startswith("before ")


@pytest.mark.parametrize(
    "text",
    [
        "token=planted", "{'token': 'planted it'}", '{"api_key": "planted it"}', "data_options={a: 1, token: planted}",
        "Authorization: Basic planted", "a\n  password: planted", "X-Api-Key=planted&x=1", "secret = 'planted'",
    ],
)  # fmt: skip
def test_a_secret_is_known_by_its_name_in_a_text(text: str) -> None:
    found = redacted_text(text)
    assert "planted" not in found and REDACTED in found and redacted_text(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "log in with `hf auth login`, set HF_TOKEN, or pass token=…", "the token: say what it is", "token=None",
        "pad_token='<pad>' token_epochs=3", "a bearer carrying a flag", "hf_datasets and hf_hub_download",
        "https://host/data?page=2", "a secret garden", "step 3/7  epoch 1.0  loss 0.2", "org/name at 0f1e2d3c4b5a6978",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted_text(text) == text


def test_a_value_under_a_secret_s_name_goes_whatever_it_is() -> None:
    names = ["token", "hub_token", "HF_TOKEN", "apiKey", "X-Api-Key", "password", "aws_secret_access_key"]
    for name in [*names, "Authorization"]:
        for value in (NAMED, 1234, ["x"], {"y": 1}):
            assert redacted({"a": ({name: value},)}) == {"a": ({name: REDACTED},)}
        assert redacted({name: None}) == {name: None} and redacted({name: True}) == {name: True}
        assert without_secrets({"b": 1, name: NAMED}) == {"b": 1}


def test_no_setting_of_ours_is_taken_for_a_secret() -> None:
    names = [*TrainingConfig.model_fields, *(field.name for field in fields(TVRNConfig))]
    assert not [name for name in names if is_secret(name)]
    given = results()
    assert redacted(given) == given


def test_commands() -> None:
    words = ["tvrn", "train", "-c", "x y.yaml", f"data_options.token={NAMED}", "--api-key", NAMED, "query=a b: c"]
    words += [f"data_options={{revision: main, token: '{NAMED}'}}", "trackers=[tensorboard]", "token_epochs=2"]
    found = redacted_command(words)
    assert "planted" not in found
    assert found.startswith("tvrn train -c 'x y.yaml' data_options.token=REDACTED --api-key REDACTED ")
    for kept in ("'query=a b: c'", "revision: main", "'trackers=[tensorboard]'", "token_epochs=2"):
        assert kept in found
    assert redacted_command(found) == found


def test_the_recorded_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", f"data_options.token={NAMED}", "seed=1"])
    assert provenance.command() == "train.py data_options.token=REDACTED seed=1"


def test_logs_and_their_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    root.handlers[:] = [logging.StreamHandler(sys.stdout)]
    try:
        guard_logs()
        logging.getLogger("modeling_tvrn.x").warning("with %s and token=%s", SHAPED, "planted")
        try:
            raise OSError(f"no access with {SHAPED}")
        except OSError:
            logging.getLogger("modeling_tvrn.x").exception("failed: %d", 3)
    finally:
        root.handlers[:] = before
    said = capsys.readouterr().out
    assert "lanted" not in said and "failed: 3" in said and "OSError: no access with REDACTED" in said


def test_a_configuration_shows_no_secret_and_refuses_its_placeholder(tmp_path: Path) -> None:
    config = TrainingConfig.from_mapping({"data_options": {"token": NAMED, "revision": "main"}})
    assert "planted" not in repr(config) and "main" in repr(config) and config.data_options["token"] == NAMED
    with pytest.raises(ValueError, match=r"data_options.token = 'REDACTED' stands where .* hides a secret"):
        TrainingConfig.from_mapping({"data_options": {"token": REDACTED}})
    broken = tmp_path / "broken.yaml"
    broken.write_text(f"data_options: {{token: {SHAPED}\nseed: 1\n")
    mistakes: list[tuple[Any, list[str]]] = [
        (broken, []), (None, [f"data_options.token={{{NAMED}"]), (None, [SHAPED]), (None, [f"data_options={SHAPED}"]),
        (None, [f"scheduler={SHAPED}"]),
    ]  # fmt: skip
    for path, overrides in mistakes:
        with pytest.raises(ValueError) as caught:
            TrainingConfig.from_yaml(path, overrides)
        assert "lanted" not in str(caught.value), caught.value


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor looks at the files alone."""
    monkeypatch.setattr("modeling_tvrn.hub.running.load_apart", lambda *_: {"with": Outcome({"model": {}})})
    for check in ("_check_loading", "_check_logits"):
        monkeypatch.setattr(f"modeling_tvrn.hub.running.{check}", lambda *_: Check("loads", "ok", "not looked at"))


# -- whole runs ------------------------------------------------------------------------------------------


def spilled(folder: Path) -> list[str]:
    """Files that hold a planted secret, byte by byte."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert found
    return [str(path) for path in found if is_planted(path.read_bytes())]


def is_planted(content: bytes) -> bool:
    return any(secret in content for secret in (b"lanted", b"PLANTED"))


COMMANDS = """
import json, sys
from modeling_tvrn.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["tvrn", *words]
    try:
        main()
    except SystemExit as leaving:
        print("code", leaving.code, flush=True)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_token_is_in_nothing_that_a_run_writes_says_or_pushes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data that only this token may read; the run is resumed with the same token given otherwise."""
    pytest.importorskip("tensorboard", reason="an optional tracker")
    write_row_groups(tmp_path / "train.parquet", range(12), group=6)
    write_row_groups(tmp_path / "validation.parquet", range(12, 17), group=5)
    files = {f"data/{name}-00000.parquet": tmp_path / f"{name}.parquet" for name in ("train", "validation")}
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    with HubServer() as hub:
        hub.token = "planted-token-of-the-hub"
        hub.add_repo("org/pairs", files, repo_type="dataset", private=True)
        keys = {
            "data": "org/pairs", "data_options": {"token": hub.token}, "output_dir": str(out), "cpu": True,
            "batch_size": 8, "model": {**SIZES, "vision_config": TINY_VIT, "vision_grid_size": None}, "save_steps": 2,
            "trackers": ["tensorboard"], "query": f"a dog, {SHAPED}", "logging_steps": 1,
        }  # fmt: skip
        recipe.write_text(json.dumps(keys))
        train = ["-v", "train", "--config", str(recipe)]
        commands = [
            [*train, "max_steps=2"],
            [*train, f"data_options={{token: {hub.token}}}", "max_steps=2", "resume=auto", "--json"],
            [*train, "data=org/others", "data_options.token=planted-but-wrong"],
        ]
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps(commands)],
            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        online(monkeypatch)
        assert not is_planted(str(push_to_hub(out, repo_id="org/run", token=hub.token, endpoint=hub.url)).encode())
        pushed = hub.files("org/run")
    said = f"{done.stdout}\n{done.stderr}"
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 0", "code 0", "code 2"], said
    assert "going on from" in said and "Traceback" not in said and not is_planted(said.encode()), said
    assert spilled(out) == [] and list(out.rglob("events.out.tfevents.*")) and (out / "curve.png").is_file()
    assert len(list(out.glob("checkpoints/*/manifest.json"))) == 1
    assert {"README.md", "results.json", "model.safetensors"} <= set(pushed)
    assert not [name for name, content in pushed.items() if is_planted(content)]
    for place in ((out / "results.json").read_text(), (out / "README.md").read_text("utf-8")):
        assert REDACTED in place and "org/pairs" in place


def test_another_token_is_no_other_setting_and_an_old_checkpoint_is_compared_likewise(tmp_path: Path) -> None:
    from modeling_tvrn.training.state import compared, differences

    given = {"data_options": {"token": NAMED}, "seed": 1}
    with_token, other, without = (
        compared(TrainingConfig.from_mapping({**given, "data_options": options}))
        for options in ({"token": NAMED}, {"token": "another"}, {})
    )
    assert with_token == other == without
    old = TrainingConfig.from_mapping(given).as_dict()  # of a release that wrote it in clear
    kept = {name: value for name, value in old.items() if name in with_token}
    assert differences(without_secrets(kept), with_token) == []
    changed = compared(TrainingConfig.from_mapping({"data_options": {"revision": SHAPED}, "seed": 2}))
    told = "; ".join(differences(with_token, changed))
    assert "seed: 1 → 2" in told and "lanted" not in told


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_results_of_an_older_release_are_rendered_and_pushed_without_their_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = results()
    old["config"]["data_options"] = {"token": NAMED}
    old["recipe"] = ["data", "data_options"]
    old["command"] = f"train.py 'data_options.token={NAMED}'"
    folder = save(tmp_path / "run", *region_model())
    (folder / "results.json").write_text(json.dumps(old))
    card = write_run_card(folder).read_text("utf-8")
    assert "planted" not in card and card.count(REDACTED) == 2
    (tmp_path / "bare").mkdir()
    bare = save(tmp_path / "bare", *region_model())
    (bare / "README.md").write_text(card.replace("# run", f"# Mine, with {SHAPED}"))
    online(monkeypatch)
    with HubServer() as hub:
        for name, path in (("org/run", folder), ("org/bare", bare)):
            push_to_hub(path, repo_id=name, token=hub.token, endpoint=hub.url)
            assert not [file for file, content in hub.files(name).items() if is_planted(content)], name
        assert b"with REDACTED" in hub.files("org/bare")["README.md"]


def test_a_cache_s_and_an_index_s_manifest_hold_no_secret(tmp_path: Path) -> None:
    import numpy as np

    from modeling_tvrn.teachers import StoreWriter

    writer = StoreWriter(tmp_path / "cache", {"teacher": {"class": "Made"}})
    writer.append(["a"], {"x": np.zeros((1, 2), dtype=np.float32)})
    writer.finish({"command": f"cache.py --token '{NAMED}'", "data": f"https://{SHAPED}@host/x"})
    assert spilled(tmp_path) == []
