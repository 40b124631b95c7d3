"""What every benchmark says first, on stderr: machine, versions, commit, command and seeds, as the log wants them."""

import argparse
import os
import platform
import sys

import torch


def say_origin(arguments: argparse.Namespace) -> None:
    """Where and how the figures that follow came about; what the command leaves out has its default."""
    from modeling_tvrn.evaluation.provenance import command, commit, versions  # gpu.py does without their packages

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


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
