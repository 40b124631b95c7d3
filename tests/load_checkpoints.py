"""Run by test_hub_roundtrip in processes of their own: load every checkpoint of a folder and write what it computes.

    python -I load_checkpoints.py CHECKPOINTS INPUTS OUTPUT [PACKAGE_ROOT]

Without PACKAGE_ROOT the process is that of a user who never installed the package: importing it fails, wherever it may
be installed, and the checkpoints' own code is trusted. With it the package is imported and no remote code is.
"""

import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import AutoModel, AutoProcessor


class NotInstalled:
    """An import hook that hides modeling_tvrn, and leaves alone the modules of that name inside checkpoints."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_tvrn":
            raise ModuleNotFoundError(f"No module named {name!r} (hidden by the test)", name=name)


def raw_inputs(inputs: Path) -> tuple[list[PIL.Image.Image], dict[str, list[np.ndarray]], list[str]]:
    """Photographs of several sizes, regions of several counts, captions."""
    images = [PIL.Image.open(path).copy() for path in sorted(inputs.glob("*.png"))]  # copies hold no files
    arrays = np.load(inputs / "regions.npz")
    regions = {
        f"region_{kind}": [arrays[name] for name in sorted(arrays.files) if name.startswith(kind)]
        for kind in ("features", "boxes")
    }
    return images, regions, json.loads((inputs / "captions.json").read_text())


def process(processor, images: list[PIL.Image.Image], regions: dict[str, list[np.ndarray]], captions: list[str]):
    """Model inputs: photographs where the processor takes them, else region features."""
    if processor.image_processor is None:
        return processor(text=captions, **regions)
    return processor(text=captions, images=images)


@torch.no_grad()
def score(model, processor, raw) -> dict[str, np.ndarray]:
    """Logits and embeddings of the raw inputs."""
    output = model.eval()(**process(processor, *raw).to(model.device))
    names = ("logits_per_image", "image_embeds", "text_embeds")
    return {name: output[name].float().cpu().numpy() for name in names}


def main(checkpoints: Path, inputs: Path, output: Path, package_root: str | None = None) -> None:
    if package_root is None:
        sys.meta_path.insert(0, NotInstalled())
    else:
        sys.path.insert(0, package_root)
        import modeling_tvrn  # noqa: F401 (registers the classes)
    trust = {"trust_remote_code": True} if package_root is None else {}
    raw, results, facts = raw_inputs(inputs), {}, {}
    for folder in sorted(checkpoints.iterdir()):
        processor = AutoProcessor.from_pretrained(folder, **trust)
        model = AutoModel.from_pretrained(folder, **trust)
        results |= {f"{folder.name}/{name}": value for name, value in score(model, processor, raw).items()}
        facts[folder.name] = {"model": type(model).__module__, "processor": type(processor).__module__}
        if package_root is None:
            model.save_pretrained(output.parent / "saved_again" / folder.name)
            processor.save_pretrained(output.parent / "saved_again" / folder.name)
    facts["imported"] = "modeling_tvrn" in sys.modules
    np.savez(output.with_suffix(".npz"), **results)
    output.with_suffix(".json").write_text(json.dumps(facts))


if __name__ == "__main__":
    checkpoints, inputs, output, *package_root = sys.argv[1:]
    main(Path(checkpoints), Path(inputs), Path(output), *package_root)
