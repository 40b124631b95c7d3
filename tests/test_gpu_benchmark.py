"""The GPU script runs to its last section, at small sizes on the CPU, and says what does not hold."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"


def run(path: Path, *arguments: str, script: str | None = None) -> tuple[int, dict, str]:
    """Exit code, the file it writes, and what it says."""
    command = [sys.executable, *(["-c", script] if script else [str(BENCHMARKS / "gpu.py")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(path), "--device", "cpu", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, json.loads(path.read_text()), done.stdout + done.stderr


@pytest.mark.slow
def test_every_section(tmp_path: Path) -> None:
    code, found, said = run(tmp_path / "gpu.json")
    assert code == 0 and found["failed"] == {"sections": [], "checks": []}, said
    sections = found["sections"]
    assert sections["coco5k"]["reasoning"]["ranking_seconds"] > 0
    assert sections["correctness"]["gate, saf"]["logits float32"] < 1e-5
    assert (
        sections["correctness"]["training"]["float16"]["last"]
        < sections["correctness"]["training"]["float16"]["first"]
    )
    assert sections["fused"].keys() == {"skipped"} or sections["fused"]["gate, saf, float32"]
    assert sections["search"]["rerank_ms_p99"] >= sections["search"]["rerank_ms_p50"] > 0


@pytest.mark.slow
def test_a_section_that_fails_and_a_check_that_does_not_hold_are_named(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu

def wrong(bench):
    return {{"error of one": bench.check("one", 0.5, 0.1), "of another": bench.check("another", float("nan"), 0.1)}}

def broken(bench):
    raise RuntimeError("no such card")

gpu.SECTIONS.update(machine=wrong, fused=broken)
sys.exit(gpu.main())
"""
    code, found, said = run(tmp_path / "gpu.json", "--sections", "machine", "fused", "search", script=script)
    assert code == 1 and found["failed"]["sections"] == ["fused"]
    assert found["failed"]["checks"] == ["one: 0.5, allowed 0.1", "another: nan, allowed 0.1"]
    assert "no such card" in found["sections"]["fused"]["error"] and "no such card" in said
    assert found["sections"]["search"]["items"] == 300


@pytest.mark.slow
def test_no_section_begins_without_time(tmp_path: Path) -> None:
    code, found, _ = run(tmp_path / "gpu.json", "--seconds", "-1", "--sections", "machine")
    assert code == 0 and found["sections"] == {"machine": "not run: no time was left"}
