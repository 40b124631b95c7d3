"""Every command and Python block of README and guides, and every notebook, is really run, at tiny scale, to its end.

`house_makers` builds a folder where ids, data and photographs lie under the names that the pages use, so commands run
as printed; what is laid over them are small sizes and few steps alone.
"""

import contextlib
import gc
import importlib.util
import io
import json
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import house_makers
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hub_server import HubServer, online

from modeling_tvrn import load_model
from modeling_tvrn.cli import main as tvrn
from modeling_tvrn.data import load_pairs
from modeling_tvrn.data.loading import PRESETS
from modeling_tvrn.evaluation import PROTOCOLS
from modeling_tvrn.hub import Check
from modeling_tvrn.hub.apart import Outcome
from modeling_tvrn.training import TrainingConfig
from modeling_tvrn.training.command import settings_of

pytestmark = pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PAGES = {path.stem: path for path in (ROOT / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md")))}

# What cannot run here: how the command begins, and why.
NOT_RUN = {
    "python -m pip install .": "changes the environment that the tests run in",
    'python -m pip install -e ".[test]" && python -m pytest': "is these tests (test_readme.py holds .ci/run to it)",
    "accelerate launch --config_file examples/configs/accelerate/eight_gpus.yaml": "needs eight GPUs",
    "accelerate launch --config_file examples/configs/accelerate/two_nodes.yaml": "needs two machines",
    "docker compose -f examples/configs/qdrant/three_nodes.yaml": "needs Docker, and an image from its registry",
    "curl http://localhost:6333/cluster": "needs the cluster",
}
SIZES = {
    "hidden_size": 16, "projection_size": 12, "similarity_size": 8, "word_hidden_size": 16, "pooled_hidden_size": 16,
}  # fmt: skip
# Laid over a script's options; of an option given twice the last counts.
SMALL = {
    "dual_encoder.py": "--epochs 1 --batch-size 8 --hidden-size 16 --projection-size 12",
    "ablation.py": "--images 12 --shortlist-size 4",
    "shortlist.py": "--sizes 4 8",
    "terms.py": "",
    "pair_stage.py": "--images 6 --captions 8 --loop-captions 2 --hidden-size 32 --similarity-size 16 --repeats 1"
    " --products 1",
}
LAUNCHERS = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}
EXTRAS = {  # that a page needs
    "search": {"gradio": "demo", "onnxscript": "export", "onnxruntime": "export"},
    "scale": {"qdrant_client": "qdrant"},
    "ecosystem": {"mteb": "mteb", "sentence_transformers": "sentence-transformers"},
}
NOTEBOOK_SMALL = {"train": "EPOCHS, BATCH_SIZE, HIDDEN_SIZE = 1, 8, 16"}  # laid over a notebook's first cell
WRITTEN = ("--output", "-o", "--picture", "--html", "--plot")  # options whose values are files or folders


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """Every command of a page's shell blocks, continued lines joined."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def recipe_commands(recipe: str) -> list[str]:
    """What a recipe's comment says to run."""
    text = (ROOT / "examples" / "configs" / f"{recipe}.yaml").read_text("utf-8")
    return "\n".join(re.findall(r"^#   (.*)$", text, re.MULTILINE)).replace("\\\n", " ").splitlines()


def why_not(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


def test_what_is_not_run_is_on_a_list_without_leftovers() -> None:
    every = [command for page in PAGES for command in commands(page)]
    assert len(every) > 50
    assert all(any(command.startswith(start) for command in every) for start in NOT_RUN)


def test_a_block_is_shell_python_or_yaml_and_the_yaml_is_the_recipes() -> None:
    """What has no language, or another one, would slip past these tests."""
    for page, path in PAGES.items():
        fences = re.findall(r"^```(.*)$", path.read_text("utf-8"), re.MULTILINE)
        assert set(fences[::2]) <= {"bash", "python", "yaml"} and set(fences[1::2]) <= {""}, page
    [phases] = [block for page in PAGES for block in blocks(page, "yaml")]
    assert phases in (ROOT / "examples" / "configs" / "flickr8k.yaml").read_text("utf-8")


class House:
    """The folder, and what has been run in it."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder, self.hub = house_makers.build(folder), hub
        self.done: set[str] = set()
        self.server: Any = None  # in place of the cluster

    def run_page(self, page: str) -> None:
        """A page's commands, once; first those of the regions' page, whose caches and model the others read."""
        if page in self.done:
            return
        for module, extra in EXTRAS.get(page, {}).items():
            pytest.importorskip(module, reason=f'this page needs pip install ".[{extra}]"')
        if page not in ("regions", "ecosystem"):
            self.run_page("regions")
        self.run_all(commands(page))
        self.done.add(page)

    def run_all(self, commands: list[str]) -> None:
        """Those that can run here and have not yet: some stand on two pages."""
        for command in (part for line in commands if why_not(line) is None for part in line.split(" && ")):
            words = shlex.join(shlex.split(command, comments=True))
            if words not in self.done:
                self.run(command)
                self.done.add(words)

    def run_python(self, page: str) -> None:
        """A page's Python, after its commands, in one namespace with what the text takes for granted."""
        self.run_page(page)
        if page == "scale":  # other pages may have trained its model again
            self.run(next(command for command in commands(page) if command.startswith("tvrn index")))
        names: dict[str, Any] = {}
        if page in ("regions", "search"):
            names["model"], names["processor"] = load_model("runs/flickr8k")
            names["records"] = load_pairs("flickr8k", "validation")
        if page == "own-pairs":
            names["dataset"] = datasets.Dataset.from_parquet(f"{house_makers.PRESETS[0]}/data/train-00000.parquet")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", list(sys.path))
            if page == "sharing":
                _reach(self.hub, patch)
            if page == "ecosystem":
                _shrink_mteb(patch)
            if page == "scale":
                self.be_cluster(patch)
            for block in blocks(page, "python"):
                fresh_process()
                exec(compile(block, str(PAGES[page]), "exec"), names)

    def be_cluster(self, patch: pytest.MonkeyPatch) -> None:
        """The client's local mode answers at every address: a user's own server may listen at the usual port."""
        from qdrant_client import QdrantClient

        self.server = self.server or QdrantClient(":memory:")
        patch.setattr("modeling_tvrn.index.qdrant.connect", lambda *_, **__: self.server)

    def run(self, command: str) -> None:
        """A command to exit code 0 and the last file that it promises."""
        words = [os.path.expanduser(word) for word in shlex.split(command, comments=True)]
        words, redirected = (words[:-2], Path(words[-1])) if ">" in words else (words, None)
        more, promised = small(words)
        with pytest.MonkeyPatch.context() as patch:
            if words[:2] == ["tvrn", "push"]:
                _reach(self.hub, patch)
            if "--url" in words:
                self.be_cluster(patch)
            code, said, log = started(words + more)
        whole = f"{shlex.join(words + more)}\n{said}\n{log}"
        assert code == 0 and "Traceback" not in log, whole
        if redirected is not None:
            assert said, whole
            redirected.write_text(said)
        assert [str(path) for path in promised if not path.exists()] == [], whole


def small(words: list[str]) -> tuple[list[str], list[Path]]:
    """What makes a command tiny, and the files and folders that it is to leave."""
    name = Path(next((word for word in words if word.endswith(".py")), "")).name
    recipe = next((words[place + 1] for place, word in enumerate(words) if word in ("-c", "--config")), None)
    keys = [word for word in words if re.match(r"[a-z_.0-9]+=", word)]
    if name == "train.py" or (words[:2] == ["tvrn", "train"] and "--keys" not in words):
        config = settings_of(recipe, keys)
        if words[0] in LAUNCHERS and config.data in PRESETS:  # a process of its own would count the images
            keys = [f"data={PRESETS[config.data].repositories['train']}"]
        else:
            keys = []
        files = ("model.safetensors", "results.json", "README.md", "curve.png", "tokenizer.json")
        return keys + tiny_keys(config), [Path(config.output_dir) / file for file in files]
    more = SMALL.get(name, "").split()
    if name == "ablation.py":
        more += tiny_keys(settings_of(recipe, keys))
    return more, [Path(words[place + 1]) for place, word in enumerate(words) if word in WRITTEN]


def tiny_keys(config: TrainingConfig) -> list[str]:
    """Keys that end a recipe after a few small batches, with small sizes."""
    keys = [f"model.{name}={size}" for name, size in SIZES.items() if name in config.model]
    for number in range(len(config.phases or [])):
        keys += [f"phases.{number}.epochs=null", f"phases.{number}.steps=2", f"phases.{number}.batch_size=8"]
    if not config.phases:
        keys += ["epochs=1", "batch_size=8"]
    if config.data == "scenes":
        keys += ["max_train_images=16", "data_options.count=24"]
    return keys


def started(words: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; in this process, but for launchers of processes."""
    variables = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if words[0] in LAUNCHERS:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
        done = subprocess.run(
            [sys.executable, "-m", LAUNCHERS[words[0]], *words[1:]], env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr
    program: Callable[[], Any] = tvrn
    if words[0] == "python":
        words = words[1:]
        program = lambda: runpy.run_path(words[0], run_name="__main__")  # noqa: E731
    out, log = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(log):
        patch.setattr(sys, "argv", words)
        patch.syspath_prepend(str(Path(words[0]).parent.resolve()))
        fresh_process()
        try:
            program()
        except SystemExit as leaving:
            return int(leaving.code or 0), out.getvalue(), log.getvalue()
        except Exception:
            return 1, out.getvalue(), log.getvalue() + traceback.format_exc()
    return 0, out.getvalue(), log.getvalue()


def _reach(hub: HubServer, patch: pytest.MonkeyPatch) -> None:
    """Let this process push to that Hub; what the doctor does in other processes is what `tvrn doctor` shows here."""
    online(patch)
    patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    patch.setattr("modeling_tvrn.hub.running.load_apart", lambda *_: {"with": Outcome({"model": {}})})
    for check in ("_check_loading", "_check_logits"):
        patch.setattr(f"modeling_tvrn.hub.running.{check}", lambda *_: Check("loads", "ok", "not looked at"))


def _shrink_mteb(patch: pytest.MonkeyPatch) -> None:
    """A few images and captions under the names of real tasks, and nothing that leaves the machine."""
    import mteb
    from mteb_makers import tiny_task

    real, pictures = mteb.get_tasks, [house_makers.picture(number) for number in range(3)]
    captions = [[house_makers.sentence(number)] for number in range(3)]

    def tiny(tasks: list[str]) -> list[Any]:
        found = [task.metadata for task in real(tasks=tasks)]
        assert sorted(each.name for each in found) == sorted(tasks)
        return [tiny_task(each.category, pictures, captions, each.name) for each in found]

    patch.setattr(mteb, "get_tasks", tiny)
    patch.setattr(mteb.ResultCache, "submit_results", lambda *_, **__: None)


def fresh_process() -> None:
    """What one command leaves behind in a process, and the next must not find."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    logging.getLogger().handlers.clear()
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch, HubServer() as hub:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("HF_TOKEN", hub.token)
        for name, preset in PRESETS.items():
            patch.setitem(PRESETS, name, replace(preset, images=house_makers.SPLITS))
        for name in ("flickr8k-1k", "flickr30k-1k", "coco-1k"):
            patch.setitem(PROTOCOLS, name, replace(PROTOCOLS[name], image_count=house_makers.SPLITS["test"]))
        if importlib.util.find_spec("gradio") is not None:
            patch.setattr("gradio.Blocks.block_thread", lambda page: page.close())
        patch.setattr("modeling_tvrn.plots.DPI", 30)
        made = House(folder, hub)
        gc.collect()
        gc.freeze()  # a run collects garbage at its end, and what the tests have loaded is none
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_to_their_end(house: House, page: str) -> None:
    house.run_page(page)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["coco", "coco-detector", "flickr30k", "flickr30k-detector"])
def test_the_commands_of_a_recipe_run_to_their_end(house: House, recipe: str) -> None:
    house.run_all(recipe_commands(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(house: House, page: str) -> None:
    house.run_python(page)


def cells(notebook: Path, kind: str) -> list[str]:
    return [
        "".join(cell["source"])
        for cell in json.loads(notebook.read_text("utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_explains_itself_and_holds_no_outputs(notebook: Path) -> None:
    read = json.loads(notebook.read_text("utf-8"))
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in read["cells"])
    assert cells(notebook, "markdown")[0].startswith("# ") and len(cells(notebook, "markdown")) > 5
    assert all(len(cell.splitlines()) <= 12 for cell in cells(notebook, "code"))
    for page in (ROOT / "README.md", ROOT / "examples" / "README.md"):
        assert f"notebooks/{notebook.name})" in page.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(house: House, notebook: Path) -> None:
    """In a clean process, with the ids and paths that it names; what stands after the first cell makes it tiny."""
    first, *rest = cells(notebook, "code")
    code = "\n\n".join([first, NOTEBOOK_SMALL.get(notebook.stem, ""), *rest])
    script = Path(f"{notebook.stem}.py")
    script.write_text(f"import warnings; warnings.simplefilter('error', FutureWarning)\n{code}", "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout, "it shows something"
