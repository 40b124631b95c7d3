"""Print the lowest version of every requirement that setup.py allows, its tests' included, as constraints for pip."""

import re
import runpy
from pathlib import Path

import setuptools

setuptools.setup = lambda **_: None  # only the lists are wanted
lists = runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))

TESTED = {"torch": "2.13.0"}  # its lowest has no build for CPUs alone at hand, and the others are gigabytes

for requirement in [*lists["REQUIREMENTS"], *lists["TEST"]]:
    lowest = re.match(r"([\w.-]+)[>=]=([\w.]+)", requirement)
    if lowest is None:
        raise SystemExit(f".ci/lowest.py: {requirement!r} in setup.py has no lower bound; add the lowest tested")
    print(f"{lowest[1]}=={TESTED.get(lowest[1], lowest[2])}")
