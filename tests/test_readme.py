"""What README and guides show works: Python, flags, keys and files; and .ci/run takes its command from README."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
import typer
from transformers import ConvNextConfig, ConvNextImageProcessorPil

from modeling_tvrn import EncodedImages, TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.cli import app
from modeling_tvrn.training import TrainingConfig
from modeling_tvrn.training.command import settings_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
GUIDES = {path: path.read_text("utf-8") for path in sorted((ROOT / "examples" / "guides").glob("*.md"))}
PAGES = {ROOT / "README.md": README, **GUIDES}
CAPTIONS = ["a red circle above a blue square", "three small green triangles"]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the quickstart leaves it, with an untrained model and two pictures."""
    tower = ConvNextConfig(num_stages=2, hidden_sizes=[6, 10], depths=[1, 1], patch_size=4, image_size=24)
    processor = TVRNProcessor.from_captions(CAPTIONS, ConvNextImageProcessorPil(size={"shortest_edge": 24}))
    sizes = {
        "region_feature_size": 10,
        "hidden_size": 12,
        "projection_size": 10,
        "similarity_size": 7,
        "word_embedding_size": 9,
    }
    model = TVRNModel(TVRNConfig(vision_config=tower, vocab_size=len(processor.tokenizer), **sizes))
    for part in (model, processor):
        part.save_pretrained(tmp_path / "runs" / "scenes")
    for name, colour in (("first", "red"), ("second", "green")):
        PIL.Image.new("RGB", (31, 29), colour).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_of_the_readme_runs_as_printed(quickstart: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "tensor" in capsys.readouterr().out
    assert names["output"].logits_per_image.shape == (2, 2)
    assert isinstance(names["gallery"], EncodedImages)
    first_caption = names["model"].scores(names["output"].logits_per_image)[:, :1]
    order = (names["gallery"].embeds @ names["queries"].embeds[0]).argsort(descending=True)
    torch.testing.assert_close(names["scores"].detach(), first_caption[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_pages_name_only_files_that_exist(page: Path) -> None:
    for path in set(re.findall(r"examples/[\w./-]+\.(?:py|yaml)", PAGES[page])):
        assert (ROOT / path).is_file(), f"{page.name} names {path}"
    for path in re.findall(r"\]\(([^)#:]+)\)", PAGES[page]):
        assert (page.parent / path).exists(), f"{page.name} links to {path}"


def test_every_guide_is_linked_from_the_readme_and_no_longer_than_two_screens() -> None:
    for path in GUIDES:
        assert f"(examples/guides/{path.name})" in README
    assert len(README.splitlines()) < 150


def test_the_index_of_the_examples_names_each_with_a_command_that_its_file_has_on_top() -> None:
    folder = ROOT / "examples"
    index = (folder / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| \[[\w.]+\]\(([\w./]+)\): .+ \| `(.+)` \|$", index, re.MULTILINE))
    shared = folder / "benchmarks" / "origin.py", folder / "benchmarks" / "named_boxes.py"
    programs = {path for path in [*folder.glob("*.py"), *folder.glob("*/*.py")] if path not in shared}
    assert set(rows) == {str(path.relative_to(folder)) for path in programs}
    for path in [
        path for path in programs if path.parent.name == "benchmarks" and path.name != "gpu.py"
    ]:  # in its JSON
        assert "say_origin(" in path.read_text("utf-8"), f"{path} does not say machine, commit, command and seeds"
    for name, command in rows.items():
        top = ast.get_docstring(ast.parse((folder / name).read_text("utf-8"))) or ""
        assert command in re.sub(r"\s+", " ", top.replace("\\\n", " ")), name
    for path in re.findall(r"\]\(([^)#:]+)\)", index):
        assert (folder / path).exists(), path
    assert "(examples/README.md)" in README


def commands(page: str) -> list[list[str]]:
    """The words of every command of a page's shell blocks, continued lines joined, comments left out."""
    lines = "\n".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.split(" && ")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def _is_script(word: str) -> bool:
    return word.startswith("examples/") and word.endswith(".py")


def test_the_scripts_that_pages_run_have_these_flags_and_keys() -> None:
    scripts = [
        (words, place)
        for page in PAGES.values()
        for words in commands(page)
        for place, word in enumerate(words)
        if _is_script(word)
    ]
    assert len(scripts) > 10
    for words, place in scripts:
        path, given = words[place], words[place + 1 :]
        source = (ROOT / path).read_text("utf-8")
        assert [flag for flag in given if flag.startswith("--") and f'"{flag}"' not in source] == [], path
        if path == "examples/train.py":
            config = ROOT / given[given.index("--config") + 1] if "--config" in given else None
            TrainingConfig.from_yaml(config, [word for word in given if "=" in word])


def test_the_verbs_that_pages_run_have_these_options_and_keys() -> None:
    verbs = typer.main.get_command(app).commands
    seen = set()
    for page in PAGES.values():
        for words in commands(page):
            if words[0] != "tvrn":
                continue
            options = {name for each in verbs[words[1]].params for name in each.opts}
            given = [word.partition("=")[0] for word in words[2:] if word.startswith("-") and word != "-"]
            assert [option for option in given if option not in options] == [], words
            seen.add(words[1])
            if words[1] == "train" and "--keys" not in words:
                recipe = words[words.index("-c") + 1] if "-c" in words else None
                settings_of(recipe, [word for word in words[2:] if "=" in word])
    assert {"train", "search", "evaluate", "regions", "teachers", "duplicates", "push"} <= seen


def test_what_pages_read_from_runs_is_written_by_one_of_their_commands_or_recipes() -> None:
    recipes = "".join(path.read_text("utf-8") for path in (ROOT / "examples" / "configs").glob("*.yaml"))
    everything = "".join(PAGES.values())
    written = set(re.findall(r"""(?:output_dir[:=] ?|save_pretrained\(")(runs/[\w-]+)""", everything + recipes))
    assert set(re.findall(r"runs/[\w-]+", everything)) - written == set()


def test_continuous_integration_runs_the_readmes_test_command() -> None:
    """The two must not drift apart: the script's own extraction is run on the README."""
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    extraction = re.search(r"^tests=\$\((.*)\)$", script, re.MULTILINE)[1]
    taken = subprocess.run(["bash", "-c", extraction], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert taken.strip() == 'python -m pip install -e ".[test]" && python -m pytest'
    assert taken in blocks("bash")


def test_the_lowest_versions_that_are_tested_are_those_of_setup_py() -> None:
    pytest.importorskip("setuptools")
    script = [sys.executable, str(ROOT / ".ci" / "lowest.py")]
    lowest = subprocess.run(script, capture_output=True, text=True, check=True).stdout.split()
    source = (ROOT / "setup.py").read_text("utf-8")
    required = re.search(r"^REQUIREMENTS = \[\n(.*?)^\]", source, re.MULTILINE | re.DOTALL)[1].count(">=")
    assert required >= 16 and len(lowest) > required
    # torch's lowest was run on a GPU; here the one build for CPUs alone stands for it.
    assert [pin for pin in lowest if pin.replace("==", ">=") not in source and pin not in source] == ["torch==2.13.0"]
