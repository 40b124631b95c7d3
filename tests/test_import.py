"""What `import modeling_tvrn` costs and what it registers, each in a process of its own."""

import json
import sys
from collections.abc import Callable

import pytest

import modeling_tvrn

LOADED = "import json, sys; print(json.dumps(sorted(sys.modules)))"
HEAVY = {
    *("torch", "transformers", "datasets", "accelerate", "evaluate", "huggingface_hub", "safetensors", "tokenizers"),
    *("numpy", "pandas", "pyarrow", "PIL", "matplotlib", "scipy", "sklearn", "yaml", "tqdm", "tensorboard", "trackio"),
    *("gradio", "faiss", "onnx", "onnxruntime", "sentence_transformers"),
}

REGISTERED = """
from transformers import MODEL_MAPPING, AutoConfig, AutoModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

config = AutoConfig.for_model("tvrn", hidden_size=12, similarity_size=7, projection_size=5, region_feature_size=9)
model = AutoModel.from_config(config)
print(type(config).__module__, type(model).__module__, PROCESSOR_MAPPING[type(config)].__module__)
"""


def loaded_after(run_python: Callable[..., str], code: str) -> set[str]:
    return set(json.loads(run_python(f"{code}\n{LOADED}")))


def test_importing_the_package_loads_none_of_its_requirements(run_python: Callable[..., str]) -> None:
    loaded = loaded_after(run_python, "import modeling_tvrn")
    assert "modeling_tvrn" in loaded
    assert not loaded & HEAVY
    ours = {name for name in loaded if name.startswith("modeling_tvrn")}
    assert ours == {"modeling_tvrn", "modeling_tvrn.registration"}


@pytest.mark.slow
def test_the_configuration_loads_neither_models_nor_data_libraries(run_python: Callable[..., str]) -> None:
    """A script that only reads a config pays for transformers' own config class, not for the model's."""
    loaded = loaded_after(run_python, "from modeling_tvrn import TVRNConfig")
    assert "modeling_tvrn.configuration_tvrn" in loaded
    assert not loaded & {"modeling_tvrn.modeling_tvrn", "modeling_tvrn.processing_tvrn"}
    assert not loaded & {"transformers.modeling_utils", "accelerate", "datasets", "evaluate", "matplotlib", "pandas"}


@pytest.mark.slow
def test_the_model_and_the_processor_load_no_training_library(run_python: Callable[..., str]) -> None:
    """accelerate is absent from the list: transformers imports it with its own model class."""
    loaded = loaded_after(run_python, "from modeling_tvrn import TVRNModel, TVRNProcessor")
    assert {"modeling_tvrn.modeling_tvrn", "modeling_tvrn.processing_tvrn"} <= loaded
    assert not loaded & {"datasets", "evaluate", "matplotlib", "pandas", "pyarrow", "torchvision", "gradio"}
    shipped = {name for name in loaded if name.startswith("modeling_tvrn.") and not name.endswith("registration")}
    assert {name for name in shipped if not name.endswith(("_tvrn", ".losses"))} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "import modeling_tvrn",
        "from transformers import AutoModel, AutoProcessor\nimport modeling_tvrn",
        "from modeling_tvrn import TVRNModel",
        "import modeling_tvrn.detectors_tvrn",
        "import modeling_tvrn.towers_tvrn",
        "import modeling_tvrn.teachers",
        "from modeling_tvrn.processing_tvrn import TVRNProcessor",
    ],
)
def test_the_auto_classes_know_tvrn_whichever_side_is_imported_first(
    run_python: Callable[..., str], before: str
) -> None:
    assert run_python(before + REGISTERED).split() == [
        "modeling_tvrn.configuration_tvrn",
        "modeling_tvrn.modeling_tvrn",
        "modeling_tvrn.processing_tvrn",
    ]


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in modeling_tvrn.__all__:
        assert getattr(modeling_tvrn, name).__name__ == name
    assert set(modeling_tvrn.__all__) <= set(dir(modeling_tvrn))
    assert {"TVRNConfig", "TVRNModel", "TVRNProcessor"} <= set(modeling_tvrn.__all__)


def test_a_misspelt_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(AttributeError, match="no attribute 'TVRNModle'.*TVRNModel"):
        _ = modeling_tvrn.TVRNModle


def test_without_mteb_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from modeling_tvrn.mteb import MTEBModel

    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.delitem(sys.modules, "mteb.models.model_meta", raising=False)
    with pytest.raises(ImportError, match=r'MTEBModel needs mteb: pip install "modeling-tvrn\[mteb\]"'):
        MTEBModel("me/my-tvrn")
