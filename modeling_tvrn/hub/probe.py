"""Run by the doctor in a clean process: load a checkpoint and write down what it is and what it computes.

    python -I probe.py JOB

JOB is a folder with job.json and inputs.npz; result.json and, if all went well, logits.npy are written there. Imports
nothing of this package by itself: with `"package": null` the process is that of a user who never installed it, whose
import fails wherever it may be, and the checkpoint's own code runs. Otherwise the package is imported from that folder
and no code of the checkpoint runs.
"""

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = "modeling_tvrn"


class NotInstalled:
    """An import hook that hides the package, and leaves alone the modules of that name inside checkpoints."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Refuse the package by its absolute name."""
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the doctor)", name=name)


def main(job_folder: Path) -> None:
    """Load processor and model, each with its own error, and score the fixed inputs."""
    job = json.loads((job_folder / "job.json").read_text("utf-8"))
    sys.path += [path for path in job["sys_path"] if path not in sys.path]
    if job["package"] is None:
        sys.meta_path.insert(0, NotInstalled())
    else:
        sys.path.insert(0, job["package"])
        importlib.import_module(PACKAGE)  # registers the classes
    facts: dict[str, Any] = {}
    processor = attempt("processor", load_processor, facts, job)
    model = attempt("model", load_model, facts, job)
    if model is not None:
        attempt("state", inspect_state, facts, model)
    if processor is not None and model is not None:
        attempt("logits", score, facts, model, processor, job_folder)
    facts["imported"] = PACKAGE in sys.modules
    (job_folder / "result.json").write_text(json.dumps(facts), encoding="utf-8")


def attempt(name: str, step: Callable[..., Any], facts: dict[str, Any], *arguments: Any) -> Any:
    """The step's result; its error goes into the facts."""
    facts[name] = {}
    try:
        return step(facts[name], *arguments)
    except Exception as error:
        traceback.print_exc()
        facts[name]["error"] = f"{type(error).__name__}: {error}".strip()
        return None


def load_processor(facts: dict[str, Any], job: dict[str, Any]) -> Any:
    """The processor, as a user loads it."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(job["checkpoint"], trust_remote_code=job["package"] is None)
    facts["module"] = type(processor).__module__
    return processor


def load_model(facts: dict[str, Any], job: dict[str, Any]) -> Any:
    """The model, as a user loads it, but never from a pickle."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(
        job["checkpoint"], trust_remote_code=job["package"] is None, use_safetensors=True
    ).eval()
    facts |= {"module": type(model).__module__, "dtype": str(model.dtype).removeprefix("torch.")}
    return model


def inspect_state(facts: dict[str, Any], model: Any) -> None:
    """Tensors that loading left without a value, buffers unlike a new model's, and tied weights that came apart."""
    import torch

    named = [*model.named_parameters(), *model.named_buffers()]
    for prefix, module in model.named_modules():
        named += [(f"{prefix}.{key}", value) for key, value in vars(module).items() if torch.is_tensor(value)]
    facts["meta"] = [name for name, tensor in named if tensor.is_meta]
    # Buffers that are not saved are computed when a model is built; loading builds without memory and may lose them.
    fresh = dict(type(model)(model.config).named_buffers())
    unsaved = {name: buffer for name, buffer in model.named_buffers() if name not in model.state_dict()}
    facts["buffers"] = len(dict(model.named_buffers()))
    facts["wrong_buffers"] = [
        name for name, buffer in unsaved.items() if not buffer.is_meta and not alike(buffer, fresh[name])
    ]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = model.state_dict(keep_vars=True)
    facts["tied"] = len(tied)
    facts["untied"] = [
        f"{one} and {other}" for one, other in tied.items() if tensors[one].data_ptr() != tensors[other].data_ptr()
    ]


def alike(buffer: Any, fresh: Any) -> bool:
    """Equal up to the rounding of the buffer's own precision."""
    import torch

    if buffer.shape != fresh.shape:
        return False
    tolerance = 1e-2 if buffer.is_floating_point() and buffer.element_size() < 4 else 1e-5
    return torch.allclose(buffer.double(), fresh.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def score(facts: dict[str, Any], model: Any, processor: Any, job_folder: Path) -> None:
    """Pair logits of the fixed inputs (images, captions), as float32."""
    import numpy as np
    import torch

    with torch.no_grad():
        output = model(**model_inputs(processor, job_folder))
    np.save(job_folder / "logits.npy", output.logits_per_image.float().numpy())


def model_inputs(processor: Any, job_folder: Path) -> Any:
    """The fixed inputs through a processor: pictures where it takes them, else region features."""
    import numpy as np
    from PIL import Image

    arrays = np.load(job_folder / "inputs.npz", allow_pickle=False)
    kinds = {
        kind: [arrays[name] for name in sorted(arrays.files) if name.startswith(kind)]
        for kind in ("picture", "features", "boxes")
    }
    captions = json.loads((job_folder / "captions.json").read_text("utf-8"))
    if processor.image_processor is not None:
        return processor(images=[Image.fromarray(picture) for picture in kinds["picture"]], text=captions)
    return processor(region_features=kinds["features"], region_boxes=kinds["boxes"], text=captions)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
