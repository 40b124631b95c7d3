"""What benchmarks share: what each says first, as the log wants it, and the ceilings that figures stand beside."""

import argparse
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def say_origin(arguments: argparse.Namespace) -> None:
    """On stderr, where and how the figures that follow came about; what the command leaves out has its default."""
    from modeling_tvrn.evaluation.provenance import command, commit, versions

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = [f"{_processor()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}"]
    if torch.cuda.is_available():
        machine.append(torch.cuda.get_device_name())
    seeds = [str(value) for name, value in vars(arguments).items() if name in ("seed", "seeds")]
    lines = {
        "machine": "; ".join(machine),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "commit": commit() or "not a checkout",
        "command": command(),
        "seeds": ", ".join(seeds) or "fixed in the program",
    }
    for name, value in lines.items():
        print(f"# {name}: {value}", file=sys.stderr, flush=True)


def matrix_rate(
    seconds: Callable[[Callable[[], Any]], float],
    dtype: torch.dtype,
    device: str = "cpu",
    shape: tuple[int, int, int] = (1024, 1024, 1024),
    products: int = 4,
) -> float:
    """Operations a second of large matrix products, of which the shares of measured programs are given.

    Args:
        seconds: how long a function takes, by the same clock as what stands beside it.
        dtype: of both sides; float32 without the tensor cores' shorter mantissa.
        shape: (rows, inner, columns).
        products: that are timed together.
    """
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(inner, columns, device=device).to(dtype)
    return products * 2 * rows * inner * columns / seconds(lambda: [left @ right for _ in range(products)])


def resident_bytes(field: str) -> int:
    """Of this process (Linux): VmRSS now, VmHWM at most since it was reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
