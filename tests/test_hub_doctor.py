"""The doctor finds what would fail on somebody else's machine, says why, and runs foreign code only when told to."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_makers import CAPTIONS, pixel_model, region_model, save
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import create_dynamic_module

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.hub import DoctorReport, doctor
from modeling_tvrn.hub.apart import Outcome
from modeling_tvrn.hub.card_check import check_card
from modeling_tvrn.hub.files import check_code, check_files, check_no_pickle, foreign_code
from modeling_tvrn.hub.running import _check_logits, check_keys, check_processor
from modeling_tvrn.hub.weights import check_weights

ROOT = Path(__file__).resolve().parents[1]
# Does all a thief would have to, and can be found afterwards.
STRANGE_CODE = "\nimport pathlib\npathlib.Path({marker!r}).write_text('was here')\n"
OTHER_SCORES = """
_forward = TVRNModel.forward

def _other_forward(self, *arguments, **inputs):
    output = _forward(self, *arguments, **inputs)
    output.logits_per_image = output.logits_per_image * 1.01
    return output

TVRNModel.forward = _other_forward
"""
RECIPES = [path for path in sorted((ROOT / "model_cards").glob("*.md")) if path.stem != "template"]
HEADER = """---
library_name: transformers
tags: [tvrn, custom_code]
license: apache-2.0
datasets: [me/data]
model-index:
- name: x
  results:
  - metrics:
    - {type: rsum, value: 286.42}
---
# A model
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A healthy checkpoint with regions and BiGRU."""
    return save(tmp_path_factory.mktemp("saved"), *region_model())


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "broken"))


@pytest.fixture(scope="module")
def marker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What strange code leaves behind where it ran."""
    return tmp_path_factory.mktemp("marker") / "marker"


@pytest.fixture(scope="module")
def reports(saved: Path, marker: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, DoctorReport]:
    """All examinations that load a model; most of their time is the import of transformers."""
    work = tmp_path_factory.mktemp("doctor")
    strange = Path(shutil.copytree(saved, work / "strange"))
    with (strange / "modeling_tvrn.py").open("a", encoding="utf-8") as file:
        file.write(STRANGE_CODE.format(marker=str(marker)))
    other = Path(shutil.copytree(saved, work / "other"))
    with (other / "modeling_tvrn.py").open("a", encoding="utf-8") as file:
        file.write(OTHER_SCORES)
    # This process has run some checkpoint's code before, as that of whoever loads one and pushes another.
    create_dynamic_module("transformers_modules/loaded_before")
    needy = Path(shutil.copytree(saved, work / "needy"))
    with (needy / "losses.py").open("a", encoding="utf-8") as file:
        file.write("\nraise RuntimeError('this file needs a library that nobody has')\n")
    return {
        "memory": doctor(*pixel_model()),
        "untrusted": doctor(strange),
        "other": doctor(other, trust_remote_code=True),
        "needy": doctor(needy, trust_remote_code=True),
    }


def statuses(report: DoctorReport) -> dict[str, str]:
    return {check.name: check.status for check in report.checks}


@pytest.mark.slow
class TestExaminations:
    def test_a_model_in_memory_with_towers_holds(self, reports: dict[str, DoctorReport]) -> None:
        """Pictures and a text tower; what is compared is what the model computes before it is saved."""
        report = reports["memory"]
        assert report.ok and report.complete, str(report)
        assert statuses(report) == dict.fromkeys(statuses(report), "ok") | {"card": "warning"}
        assert "in memory" in report["logits"].detail and "without the package" in report["logits"].detail
        assert "bit for bit" in report["saved weights"].detail and report["keys"].status == "ok"

    def test_code_runs_only_when_trusted(self, reports: dict[str, DoctorReport], marker: Path) -> None:
        """Someone who looks at a stranger's model before trusting it must not run it by looking."""
        report = reports["untrusted"]
        assert not marker.exists()
        check = report["loads without the package"]
        assert check.status == "not run" and "trust_remote_code=True" in check.advice
        assert "modeling_tvrn.py" in check.detail, "says which files are not the package's own"
        assert report["loads with the package"].status == "ok"
        assert report.ok and not report.complete and "were not run" in report.verdict()

    def test_shipped_code_that_computes_something_else_is_found(self, reports: dict[str, DoctorReport]) -> None:
        report = reports["other"]
        assert not report.ok and report["logits"].status == "failed", str(report)
        assert re.search(r"without the package differ .* by \d", report["logits"].detail)
        assert report.verdict() == "Does not hold: logits."
        assert "region features" in report["processor"].detail and report["card"].status == "warning"

    def test_code_that_does_not_load_is_named_with_its_reason(self, reports: dict[str, DoctorReport]) -> None:
        report = reports["needy"]
        assert report["loads without the package"].status == "failed"
        assert "a library that nobody has" in report["loads without the package"].detail
        assert report["loads with the package"].status == "ok", "the installed code needs none of those files"

    def test_the_report_is_a_table_and_json(self, reports: dict[str, DoctorReport]) -> None:
        report = reports["other"]
        lines = str(report).splitlines()
        assert any(line.startswith("logits") and "FAILED" in line for line in lines) and "What to do:" in lines
        read = json.loads(report.to_json())
        assert read["ok"] is False and {"name", "status", "detail", "advice"} == set(read["checks"][0])


def test_one_process_that_does_not_finish_is_reported_not_raised() -> None:
    """On a busy machine one of the two may run out of time."""
    logits = np.ones((3, 5), dtype=np.float32)
    late = Outcome(error="not finished within 600 seconds")
    for outcomes in ({"with": late, "without": Outcome({}, logits)}, {"with": Outcome({}, logits), "without": late}):
        assert _check_logits(outcomes, logits).status == "not run"


class TestFiles:
    def test_missing_files(self, folder: Path) -> None:
        (folder / "processor_config.json").unlink()
        check = check_files(folder)
        assert check.status == "failed" and "processor_config.json" in check.detail
        assert "processor.save_pretrained" in check.advice

    def test_a_missing_shard(self, tmp_path: Path) -> None:
        model, processor = region_model()
        model.save_pretrained(tmp_path, max_shard_size="8KB")
        processor.save_pretrained(tmp_path)
        assert check_files(tmp_path).status == "ok" and check_weights(tmp_path)[0].status == "ok"
        shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
        shard.unlink()
        assert shard.name in check_files(tmp_path).detail

    @pytest.mark.parametrize("name", ["optimizer.pt", "training_args.bin", "notes.dat"])
    def test_pickles(self, folder: Path, name: str) -> None:
        """By its name or by what it begins with."""
        torch.save({"a": 1}, folder / name, _use_new_zipfile_serialization=name != "notes.dat")
        names = [path.name for path in folder.iterdir()]
        check = check_no_pickle(folder, names)
        assert check.status == "failed" and check.detail == f"pickles: {name}"

    def test_a_pickle_on_the_hub_is_found_without_fetching_it(self, folder: Path) -> None:
        assert check_no_pickle(folder, ["model.safetensors", "pytorch_model.bin"]).status == "failed"

    @pytest.mark.slow
    def test_code_incomplete_or_in_need(self, folder: Path) -> None:
        assert check_code(folder).status == "ok" and foreign_code(folder) == []
        (folder / "pair_tvrn.py").unlink()
        with (folder / "layers_tvrn.py").open("a", encoding="utf-8") as file:
            file.write("\nimport timm\n")
        check = check_code(folder)
        assert check.status == "failed" and "pair_tvrn.py is missing" in check.detail
        assert "layers_tvrn.py imports timm" in check.detail

    def test_a_checkpoint_without_code(self, folder: Path) -> None:
        """As saved by a class that was never registered for the Auto classes."""
        settings = json.loads((folder / "config.json").read_text())
        del settings["auto_map"]
        (folder / "config.json").write_text(json.dumps(settings))
        check = check_code(folder)
        assert check.status == "failed" and "AutoModel" in check.detail


class TestWeights:
    @staticmethod
    def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, str]:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return {check.name: f"{check.status}: {check.detail}" for check in check_weights(folder)}

    def test_keys_and_shapes(self, folder: Path) -> None:
        """In a process of its own, as every loading: here what it would report."""

        def change(weights: dict[str, torch.Tensor]) -> None:
            weights["stray"] = weights.pop("logit_scale")

        self.changed(folder, change)
        with pytest.raises(ValueError) as caught:
            TVRNModel.from_pretrained(folder)
        check = check_keys(Outcome({"model": {"error": f"ValueError: {caught.value}"}}))
        assert check.status == "failed" and "logit_scale" in check.detail and "stray" in check.detail
        assert check_keys(Outcome(error="the process ended with code -9")).status == "not run"

    def test_mixed_precision(self, folder: Path) -> None:
        found = self.changed(folder, lambda weights: weights.update(logit_scale=weights["logit_scale"].bfloat16()))
        assert found["dtype"] == "failed: weights mix bfloat16 and float32; it loads as float32"

    def test_a_precision_other_than_the_config_s(self, folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(settings))
        assert (
            self.changed(folder, lambda _: None)["dtype"] == "failed: weights are float32, config.json says bfloat16"
        )

    def test_values(self, folder: Path) -> None:
        found = self.changed(folder, lambda weights: weights["region_projection.bias"].fill_(float("nan")))
        assert found["values"] == "failed: NaN or infinite values in region_projection.bias"

    def test_a_cut_file(self, folder: Path) -> None:
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        checks = check_weights(folder)
        assert checks[0].status == "failed" and "cannot be read" in checks[0].detail


class TestCard:
    def test_a_whole_header(self, folder: Path) -> None:
        (folder / "README.md").write_text(HEADER)
        (folder / "results.json").write_text(json.dumps({"metrics": {"rsum": 286.4213}}))
        assert check_card(folder, published=True).status == "ok"

    def test_no_card(self, folder: Path) -> None:
        assert (check_card(folder, False).status, check_card(folder, True).status) == ("warning", "failed")

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (("library_name: transformers", "library_name: tvrn"), "library_name is 'tvrn'; expected 'transformers'"),
            (("tags:", "pipeline_tag: other\ntags:"), "pipeline_tag is 'other'; expected None"),
            (("custom_code", "other"), "the tag 'custom_code' is missing"),
            (("value: 286.42", "value: 299.9"), "rsum is 299.9 in the card and 286.42 in results.json"),
            (("tags: [", "tags: [["), "not YAML"),
            (("---\nlibrary", "# Title\n---\nlibrary"), "does not begin with a YAML header"),
            (("{type: rsum, value: 286.42}", "rsum"), "model-index has not the Hub's form"),
        ],
    )
    def test_wrong_metadata(self, folder: Path, change: tuple[str, str], complaint: str) -> None:
        (folder / "README.md").write_text(HEADER.replace(*change))
        (folder / "results.json").write_text(json.dumps({"metrics": {"rsum": 286.42}}))
        check = check_card(folder, published=True)
        assert check.status == "failed" and complaint in check.detail

    def test_a_header_that_says_little(self, folder: Path) -> None:
        (folder / "README.md").write_text(HEADER.replace("license: apache-2.0\n", ""))
        check = check_card(folder, published=True)
        assert check.status == "warning" and "license" in check.detail

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
    def test_the_cards_of_recipes(self, recipe: Path, tmp_path: Path) -> None:
        """They are rendered from runs on the author's machine, whose folders are nobody's business."""
        shutil.copyfile(recipe, tmp_path / "README.md")
        assert check_card(tmp_path, published=True).status in ("ok", "warning")
        for figure in ModelCard.load(recipe).data.eval_results:
            assert figure.dataset_split and set(figure.metric_args) == {"protocol", "images", "captions"}
        text = recipe.read_text("utf-8")
        assert not re.search(r"(^|[\s'\"=(])(/[a-z]+/|~/|\.\./)", text) and "{{" not in text and "{%" not in text


class TestArguments:
    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no folder; expected"):
            doctor(tmp_path / "nowhere")

    def test_a_model_needs_its_processor(self) -> None:
        with pytest.raises(ValueError, match=r"doctor\(model, processor\)"):
            doctor(region_model()[0])

    def test_another_kind_of_model(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        report = doctor(tmp_path)
        assert not report.ok and "'bert'; expected 'tvrn'" in report["config"].detail

    def test_a_processor_of_another_model(self, folder: Path) -> None:
        """Ids beyond the embedding table end in an index error, or on an accelerator in nonsense."""
        TVRNProcessor.from_captions([*CAPTIONS, "many other words"]).save_pretrained(folder)
        check = check_processor(folder)[1]
        assert check.status == "failed" and re.search(r"\d+ tokens for a model of \d+", check.detail)
