"""A push is examined first, is one commit, and gives others a model that loads; against a Hub on this machine."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from dual_encoder_makers import save_dual_encoder
from hub_makers import CAPTIONS, FEATURES, region_model, results, save
from hub_server import HubServer, online
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from markdown_it import MarkdownIt

from modeling_tvrn import TVRNModel, TVRNProcessor, load_model
from modeling_tvrn.hub import doctor, push_to_hub, write_run_card
from modeling_tvrn.hub.apart import Outcome
from modeling_tvrn.hub.portable import portable, portable_command

# A stranger's process: no package, nothing cached, only the address of the Hub.
STRANGER = """
import json, sys
sys.modules["modeling_tvrn"] = None  # as if it were not installed
import numpy as np, torch
from transformers import AutoModel, AutoProcessor

try:
    AutoModel.from_pretrained("org/secret", trust_remote_code=True)
except OSError as error:
    print(json.dumps(str(error)))
model = AutoModel.from_pretrained("org/tvrn-test", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("org/tvrn-test", trust_remote_code=True)
inputs = np.load(sys.argv[1])
batch = processor(text=json.loads(sys.argv[2]), region_features=inputs["features"], region_boxes=inputs["boxes"])
with torch.no_grad():
    np.save(sys.argv[3], model(**batch).logits_per_image.numpy())
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    online(monkeypatch)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with HubServer() as server:
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The doctor looks at the files alone: what it does in other processes has its own tests."""
    monkeypatch.setattr("modeling_tvrn.hub.running.load_apart", lambda *_: {"with": Outcome({"model": {}})})
    monkeypatch.setattr("modeling_tvrn.hub.running._check_loading", lambda name, *_: _fine(f"loads {name}"))
    monkeypatch.setattr("modeling_tvrn.hub.running._check_logits", lambda *_: _fine("logits"))


def _fine(name: str) -> Any:
    from modeling_tvrn.hub import Check

    return Check(name, "ok", "not looked at in this test")


def commits(hub: HubServer, repo_id: str = "org/tvrn-test") -> int:
    return len(hub.commits(repo_id))


@pytest.mark.slow
def test_a_stranger_loads_what_was_pushed(hub: HubServer, tmp_path: Path) -> None:
    """Push, then `AutoModel.from_pretrained("org/tvrn-test")` from an empty cache in a process without the package."""
    model, processor = region_model()
    pushed = push_to_hub(model, processor, "org/tvrn-test", token=hub.token, endpoint=hub.url)
    assert pushed.report.ok and pushed.report.complete and pushed.commit == hub.head("org/tvrn-test")
    hub.add_repo("org/secret", hub.files("org/tvrn-test"), private=True)
    random = np.random.default_rng(1)
    features = random.normal(size=(2, 5, FEATURES)).astype(np.float32)
    boxes = np.sort(random.uniform(size=(2, 5, 2, 2)), axis=2).reshape(2, 5, 4).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", features=features, boxes=boxes)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "empty")}
    arguments = [str(tmp_path / "inputs.npz"), json.dumps(CAPTIONS), str(tmp_path / "logits.npy")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", STRANGER, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "org/secret" in json.loads(done.stdout) and "private" in json.loads(done.stdout)
    with torch.no_grad():
        inputs = processor(text=CAPTIONS, region_features=features, region_boxes=boxes)
        expected = model(**inputs).logits_per_image.numpy()
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("quick")
class TestPush:
    @pytest.mark.slow
    def test_the_card_carries_the_run(self, hub: HubServer, tmp_path: Path) -> None:
        folder = save(tmp_path / "run", *region_model())
        (folder / "results.json").write_text(json.dumps(results()))
        (folder / "curve.png").write_bytes(b"a curve")
        (folder / "query.png").write_bytes(b"other people's photographs")
        names = {"text": "sentence-transformers/all-MiniLM-L6-v2"}
        pushed = push_to_hub(folder, None, "org/tvrn-test", token=hub.token, endpoint=hub.url, names=names)
        files = hub.files("org/tvrn-test")
        assert set(pushed.files) | {".gitattributes"} == set(files) and "query.png" not in files
        card = ModelCard(files["README.md"].decode())
        header = yaml.safe_load(card.content.split("---")[1])
        assert header["base_model"] == ["sentence-transformers/all-MiniLM-L6-v2"] and header["license"] == "other"
        assert header["datasets"] == ["jxie/flickr8k"] and header["library_name"] == "transformers"
        values = {item.metric_type: item.metric_value for item in card.data.eval_results}
        assert values == {name: value for name, value in results()["metrics"].items() if "median" not in name}
        for text in ("f00d", "beef", "abc123", "non-commercial", "examples/train.py", 'name = "org/tvrn-test"', "99"):
            assert text in card.text, text
        result = card.data.eval_results[0]
        assert result.dataset_split == "validation"
        assert result.metric_args == {"protocol": "validation", "images": 6, "captions": 30}
        assert "curve.png" in card.text and "query.png" not in card.text
        assert pushed.report["card"].status == "ok", str(pushed.report)

    @pytest.mark.slow
    def test_a_dry_run_shows_what_would_be_pushed_and_asks_no_hub(self, hub: HubServer, tmp_path: Path) -> None:
        folder = save(tmp_path / "run", *region_model())
        (folder / "results.json").write_text(json.dumps(results()))
        dry = push_to_hub(folder, None, "org/tvrn-test", endpoint=hub.url, dry_run=True)
        assert dry.commit is None and not hub.requests and not hub.repos
        pushed = push_to_hub(folder, None, "org/tvrn-test", token=hub.token, endpoint=hub.url)
        files = hub.files("org/tvrn-test")
        assert dry.files == pushed.files == {name: len(files[name]) for name in pushed.files}
        assert dry.card == pushed.card == files["README.md"].decode()

    @pytest.mark.slow
    def test_figures_of_a_split_that_was_trained_on_are_refused(self, hub: HubServer, tmp_path: Path) -> None:
        """Of a stream nobody counts the images that both splits hold; the splits' names are enough."""
        folder = save(tmp_path / "run", *region_model())
        found = results(config=results()["config"] | {"validation_split": "train"})
        (folder / "results.json").write_text(json.dumps(found))
        dry = push_to_hub(folder, None, "org/tvrn-test", dry_run=True)
        assert "model-index" not in dry.card.split("---")[1] and "split train was trained on" in dry.card
        honest = write_run_card(tmp_path, results=results()).read_text("utf-8")
        with pytest.raises(ValueError, match="model-index has figures, but the split train was trained on"):
            push_to_hub(folder, None, "org/tvrn-test", card=honest, token=hub.token, endpoint=hub.url)
        assert not hub.repos

    @pytest.mark.slow
    def test_a_dual_encoder_is_pushed_with_what_was_trained_over_it(self, hub: HubServer, tmp_path: Path) -> None:
        plain = save_dual_encoder(tmp_path / "clip")
        processor = TVRNProcessor.from_dual_encoder(plain)
        alone, _ = load_model(plain, device="cpu")
        model = TVRNModel.from_dual_encoder(plain, hidden_size=24, similarity_size=12, vision_grid_size=2)
        model.config.dual_encoder_config.name_or_path = "openai/clip-vit-base-patch32"
        hub_keys = {"token": hub.token, "endpoint": hub.url}
        for somebodys in (alone, model, save(tmp_path / "saved", model, processor)):
            given = (somebodys, None if isinstance(somebodys, Path) else processor)
            with pytest.raises(ValueError, match="score is that of the dual encoder .* unmodified"):
                push_to_hub(*given, "org/tvrn-test", **hub_keys)
        with torch.no_grad():
            model.pair.late_interaction_weight.fill_(0.3)
        pushed = push_to_hub(model, processor, "org/tvrn-test", **hub_keys)
        card = ModelCard(hub.files("org/tvrn-test")["README.md"].decode())
        assert card.data.base_model == ["openai/clip-vit-base-patch32"]
        assert "openai/clip-vit-base-patch32, frozen" in card.text and "Image.open" in card.text
        assert pushed.report.ok

    def test_the_card_of_a_run_names_its_dual_encoder(self, tmp_path: Path) -> None:
        model = TVRNModel.from_dual_encoder(save_dual_encoder(tmp_path / "clip"), hidden_size=24, similarity_size=12)
        found = results(model_config=json.loads(json.dumps(model.config.to_diff_dict(), default=str)))
        found["config"] |= {"text": None, "dual_encoder": "/home/somebody/clip"}
        (tmp_path / "results.json").write_text(json.dumps(found))
        text = write_run_card(tmp_path, names={"dual_encoder": "openai/clip-vit-base-patch32"}).read_text()
        assert "openai/clip-vit-base-patch32, frozen" in text and "/home/somebody" not in text
        assert ModelCard(text).data.base_model == ["openai/clip-vit-base-patch32"]

    def test_no_path_of_this_machine_is_published(self, hub: HubServer, tmp_path: Path) -> None:
        folder = save(tmp_path / "run", *region_model())
        (folder / "results.json").write_text(json.dumps(results()))
        push_to_hub(folder, None, "org/tvrn-test", token=hub.token, endpoint=hub.url)
        for name, content in hub.files("org/tvrn-test").items():
            if not name.endswith((".safetensors", ".png")):
                assert b"/home/somebody" not in content and str(tmp_path).encode() not in content, name
        assert json.loads(hub.files("org/tvrn-test")["results.json"])["metrics"]["rsum"] == 320.0

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["curve.png", "query.png", "README.md", "results.json", "chat_template.jinja"])
    @pytest.mark.parametrize("in_memory", [True, False])
    def test_no_link_is_followed_out_of_the_folder(
        self, hub: HubServer, tmp_path: Path, name: str, in_memory: bool
    ) -> None:
        folder = save(tmp_path / "run", *region_model())
        (folder / "results.json").write_text(json.dumps(results(config=results()["config"] | {"data": "scenes"})))
        (tmp_path / "secret").write_text((folder / "results.json").read_text())
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../secret")
        given = (region_model(), {"results": folder}) if in_memory else ((folder, None), {})
        with pytest.raises(ValueError, match=f"{name} is a link to .*secret, which lies outside"):
            push_to_hub(*given[0], "org/tvrn-test", token=hub.token, endpoint=hub.url, **given[1])
        assert not hub.repos

    @pytest.mark.slow
    def test_links_within_the_folder_and_of_weights_are(self, hub: HubServer, tmp_path: Path) -> None:
        folder = save(tmp_path / "run", *region_model())
        (folder / "results.json").write_text(json.dumps(results()))
        (folder / "plot.png").write_bytes(b"a curve")
        (folder / "curve.png").symlink_to("plot.png")
        os.rename(folder / "model.safetensors", tmp_path / "big.safetensors")
        (folder / "model.safetensors").symlink_to(tmp_path / "big.safetensors")
        push_to_hub(folder, None, "org/tvrn-test", token=hub.token, endpoint=hub.url)
        assert hub.files("org/tvrn-test")["curve.png"] == b"a curve"

    @pytest.mark.slow
    def test_a_model_that_fails_stays_here_unless_told(self, hub: HubServer) -> None:
        model, processor = region_model()
        with torch.no_grad():
            model.region_projection.bias[0] = float("nan")
        with pytest.raises(ValueError, match=r"(?s)not pushed.*values +FAILED.*region_projection\.bias"):
            push_to_hub(model, processor, "org/tvrn-test", token=hub.token, endpoint=hub.url)
        assert not hub.repos
        assert not push_to_hub(
            model, processor, "org/tvrn-test", token=hub.token, endpoint=hub.url, force=True
        ).report.ok

    @pytest.mark.slow
    def test_one_commit_which_takes_the_former_model_away(self, hub: HubServer) -> None:
        """A left-over shard or pickle would be loaded in place of the new weights, or beside them."""
        old = {
            "model-00001-of-00002.safetensors": b"x",
            "pytorch_model.bin": b"x",
            "old_tvrn.py": b"x",
            "NOTES.md": b"x",
        }
        hub.add_repo("org/tvrn-test", old)
        pushed = push_to_hub(*region_model(), "org/tvrn-test", token=hub.token, endpoint=hub.url)
        assert commits(hub) == 2 and sorted(pushed.removed) == sorted(set(old) - {"NOTES.md"})
        assert set(hub.files("org/tvrn-test")) == {*pushed.files, "NOTES.md"}

    @pytest.mark.slow
    def test_a_connection_that_breaks_leaves_the_old_revision_whole(self, hub: HubServer) -> None:
        first, processor = region_model()
        push_to_hub(first, processor, "org/tvrn-test", token=hub.token, endpoint=hub.url)
        before, head = hub.files("org/tvrn-test"), hub.head("org/tvrn-test")
        second, _ = region_model(similarity_head="sgr")
        hub.drop(after=30_000, method="POST", match="/commit/")
        with pytest.raises(ConnectionError, match=r"org/tvrn-test failed.*either as it was or wholly new"):
            push_to_hub(second, processor, "org/tvrn-test", token=hub.token, endpoint=hub.url)
        assert any(request.dropped for request in hub.requests)
        assert hub.files("org/tvrn-test") == before and hub.head("org/tvrn-test") == head
        push_to_hub(second, processor, "org/tvrn-test", token=hub.token, endpoint=hub.url)
        assert json.loads(hub.files("org/tvrn-test")["config.json"])["similarity_head"] == "sgr" and commits(hub) == 3

    @pytest.mark.slow
    def test_somebody_else_s_commit_is_not_overwritten(self, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.add_repo("org/tvrn-test")
        commit = HfApi.create_commit

        def overtaken(api: HfApi, *arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(HfApi, "create_commit", commit)
            commit(api, "org/tvrn-test", [CommitOperationAdd("theirs", b"1")], commit_message="theirs")
            return commit(api, *arguments, **options)

        monkeypatch.setattr(HfApi, "create_commit", overtaken)
        with pytest.raises(RuntimeError, match="somebody else changed the repository"):
            push_to_hub(*region_model(), "org/tvrn-test", token=hub.token, endpoint=hub.url)
        assert set(hub.files("org/tvrn-test")) == {".gitattributes", "theirs"}

    @pytest.mark.slow
    def test_private(self, hub: HubServer, tmp_path: Path) -> None:
        push_to_hub(*region_model(), "org/tvrn-test", token=hub.token, endpoint=hub.url, private=True)
        assert hub.repos["models", "org/tvrn-test"].private
        with pytest.raises(FileNotFoundError, match=r"or it is private and .*no token.*hf auth login"):
            doctor("org/tvrn-test", endpoint=hub.url)
        report = doctor("org/tvrn-test", endpoint=hub.url, token=hub.token)
        assert report.ok and report.revision == hub.head("org/tvrn-test"), str(report)
        hub.add_repo("org/open")
        with pytest.raises(ValueError, match="exists and is public"):
            push_to_hub(*region_model(), "org/open", token=hub.token, endpoint=hub.url, private=True)
        assert set(hub.files("org/open")) == {".gitattributes"}

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("token", "repo_id", "message"),
        [
            (None, "org/x", "needs a token .*hf auth login"),
            ("hf_made_up", "org/x", "does not accept this token"),
            ("hf_test_reader", "org/x", "may not write there.*write permission for 'org'"),
            ("hf_test_writer", "others/x", "may not write there"),
        ],
    )
    def test_tokens(self, hub: HubServer, token: str | None, repo_id: str, message: str) -> None:
        with pytest.raises(PermissionError, match=message) as caught:
            push_to_hub(*region_model(), repo_id, token=token, endpoint=hub.url)
        assert token is None or token not in str(caught.value)

    def test_no_hub_there(self, hub: HubServer) -> None:
        with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9 broke"):
            push_to_hub(*region_model(), "org/x", token="hf_x", endpoint="http://127.0.0.1:9")

    @pytest.mark.slow
    def test_no_code_of_a_folder_is_run(self, hub: HubServer, tmp_path: Path) -> None:
        """What is pushed is the installed package's code, whatever lies in the folder."""
        folder = save(tmp_path / "run", *region_model())
        with (folder / "modeling_tvrn.py").open("a", encoding="utf-8") as file:
            file.write(f"\nopen({str(tmp_path / 'marker')!r}, 'w').close()\n")
        push_to_hub(folder, None, "org/tvrn-test", token=hub.token, endpoint=hub.url)
        assert not (tmp_path / "marker").exists()
        assert b"marker" not in hub.files("org/tvrn-test")["modeling_tvrn.py"]

    def test_a_pickle_on_the_hub_fails_and_is_not_fetched(self, hub: HubServer, tmp_path: Path) -> None:
        folder = save(tmp_path / "run", *region_model())
        (folder / "pytorch_model.bin").write_bytes(b"anything")
        hub.add_repo("org/tvrn-test", {path.name: path for path in folder.iterdir()})
        report = doctor("org/tvrn-test", endpoint=hub.url)
        assert report["safetensors only"].status == "failed" and report["card"].status == "failed"
        assert not any(request.path.endswith(".bin") for request in hub.requests)


@pytest.mark.parametrize("repo_id", ["", "tvrn", "a/b/c", "org/no spaces"])
def test_a_wrong_repository_name(repo_id: str) -> None:
    with pytest.raises(ValueError):
        push_to_hub(*region_model(), repo_id)


HOSTILE = "*a* <b onclick=x>|[c](javascript:d) `e` ``` ~~f~~ # g\n\n```\n# h\n<script>i</script> ![j](k) _l_ 100 % m_n"


def test_what_a_run_was_told_is_shown_in_its_card_and_does_nothing_there(tmp_path: Path) -> None:
    """Every text of results.json that reaches the card is what an attacker would write."""

    def spoilt(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: spoilt(each) for name, each in value.items()}
        if isinstance(value, list):
            return [spoilt(each) for each in value]
        return HOSTILE if isinstance(value, str) else value

    found = results(teachers={"image": dict.fromkeys(("model", "revision", "class", "pooling"), HOSTILE)})
    found["config"] |= {"query": HOSTILE, "vision": HOSTILE, "word_embeddings": HOSTILE}
    recipe = [name for name in found["config"] if name != "output_dir"]
    found = {**spoilt(found), "recipe": recipe}
    found["data"]["overlap"] = {"images": 3, "example": {"validation": HOSTILE}}
    found["data"]["set_aside"] = {"of": 6, "seed": 0}
    (tmp_path / "results.json").write_text(json.dumps(found))
    (tmp_path / "query.png").write_bytes(b"")
    card = ModelCard(write_run_card(tmp_path, name=HOSTILE).read_text()).text
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card)
    inline = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in [*tokens, *inline]}
    assert not kinds & {"html_block", "html_inline", "link_open", "s_open"}, kinds
    assert [child.attrs["src"] for child in inline if child.type == "image"] == ["query.png"]
    assert {token.info for token in tokens if token.type == "fence"} == {"python", "yaml"}
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    assert list(headings[1:]) == ["Results", "How to use it", "Training", "Limits"]
    shown = [child.content for child in inline if child.type == "text"]
    assert any("_l_ 100 % m_n" in content for content in shown)
    table = [token for token in tokens if token.type == "tr_open"]
    cells = [token for token in tokens if token.type in ("td_open", "th_open")]
    assert len(cells) == 2 * (len(table) - 4) + 8 * 4


def test_paths_are_cut_and_names_kept() -> None:
    command = (
        "/home/me/tvrn/examples/train.py --config a/b.yaml 'regions=/data/x y/{split}' "
        "vision=google/mobilenet data=../shared/f8k"
    )
    assert portable_command(command) == (
        "examples/train.py --config a/b.yaml 'regions=./{split}' vision=google/mobilenet data=./f8k"
    )
    value = {"command": None, "a": ["/x/y", "org/name", 3, None], "b": {"c": "C:\\Users\\me\\run", "d": "~/runs/x"}}
    assert portable(value) == {
        "command": None, "a": ["./y", "org/name", 3, None], "b": {"c": "./run", "d": "./x"},
    }  # fmt: skip
    assert portable("a sentence /with a slash") == "a sentence /with a slash"
