"""The fused programs: what they compute (`kernel_checks.py`), and when a model asks for them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_makers import regions, tiny_model, words

from modeling_tvrn import kernels

CHECKS = Path(__file__).with_name("kernel_checks.py")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason='the interpreter of the fused kernels comes with pip install ".[kernels]"',
)


def run_checks(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CHECKS)]
    run = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@needs_triton
def test_the_programs_in_the_interpreter():
    run_checks(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.slow
@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_the_programs_on_the_gpu():
    run_checks()


def test_no_programs_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_model()
    assert not kernels.enable(model) and model.pair.fused is None
    assert not kernels.enable(object())


def test_a_failure_is_said_once_and_the_plain_path_goes_on(monkeypatch):
    """Whatever the compiler raises on a card it doesn't know."""

    def fail(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory\nmore about it")

    model = tiny_model(use_late_interaction=True)
    with torch.no_grad():
        images, texts = model.encode_images(**regions()), model.encode_texts(**words())
        plain = model.match(images, texts)
        monkeypatch.setattr(kernels, "available", lambda device: True)
        monkeypatch.setattr(kernels, "reasoning", fail)
        monkeypatch.setattr(kernels, "late_interaction", fail)
        assert kernels.enable(model, least_pairs=1, dtypes=kernels.DTYPES)
        with pytest.warns(
            UserWarning, match=r"fused .* failed \(RuntimeError: out of resource: shared memory\)"
        ) as said:
            torch.testing.assert_close(model.match(images, texts, chunk_size=2), plain)
    assert len(said) == 2
