"""`load_model`: a TVRN checkpoint or any dual encoder, by one call; `load_region_model`: also a vision backbone."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import AutoConfig

from .modeling_tvrn import TVRNModel
from .processing_tvrn import TVRNProcessor
from .storage.files import FILES, check_listed
from .towers_tvrn import region_map

logger = logging.getLogger(__name__)

__all__ = [
    *("box_feature_map", "check_exists", "is_dual_encoder", "kind_of"),
    *("load_model", "load_region_model", "read_config"),
]

EXPECTED = "expected a TVRN checkpoint or a dual encoder (CLIP, SigLIP, …)"
FOLDERS_LOOKED_AT = 2000


def load_model(
    id_or_path: str | os.PathLike[str],
    revision: str | None = None,
    subfolder: str = "",
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[TVRNModel, TVRNProcessor]:
    """Model, ready to score, and processor, of a TVRN checkpoint or any dual encoder of the Hub.

    Both are loaded by this package's and transformers' own classes. A dual encoder comes as a TVRN whose score is the
    dual encoder's logit, without late interaction and reasoning (`TVRNModel.from_dual_encoder` builds these to train).

    Args:
        id_or_path: Hub id, or a local folder.
        revision, subfolder: Of the Hub repository, or within the folder.
        dtype: What the weights are loaded in; None: what the checkpoint holds.
        device: Where the model goes; None: a GPU where there is one.
        trust_remote_code: Allow code of the repository, which only a TVRN with such a tower needs.

    Raises:
        ValueError: If nothing is there (with near matches among local folders), or it is a model of another kind.
        StorageError: If a file of a folder that training wrote is damaged or missing.
    """
    name = os.fspath(id_or_path)
    check_exists(name, subfolder)
    if (folder := Path(name) / subfolder / FILES).is_file():  # what training left
        check_listed(folder.parent)
    hub: dict[str, Any] = {"subfolder": subfolder, "trust_remote_code": trust_remote_code}
    if revision is not None:
        hub["revision"] = revision
    config = read_config(name, hub, EXPECTED)
    if config.model_type == "tvrn":
        processor = TVRNProcessor.from_pretrained(name, **hub)
        try:
            model: TVRNModel = TVRNModel.from_pretrained(name, dtype=dtype or "auto", use_safetensors=True, **hub)
        except OSError as error:
            raise ValueError(
                f"the weights of {name!r} don't load ({str(error).strip().splitlines()[0]}); expected whole "
                "safetensors files. Save the model again, or fetch it again"
            ) from error
    elif is_dual_encoder(config):
        processor = TVRNProcessor.from_dual_encoder(name, **hub)  # first: it may lack, and costs nothing to look for
        model = TVRNModel.from_dual_encoder(
            name, dtype=dtype or "auto", use_late_interaction=False, use_reasoning=False, hub=hub
        )
        _check_processor(name, model, processor)
    else:
        raise ValueError(f"{name!r} holds a {kind_of(config)}; {EXPECTED}")
    return _placed(model, device), processor


def load_region_model(
    id_or_path: str | os.PathLike[str] | None,
    grid_size: int | None = None,
    image_size: int | None = None,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    detector: str | os.PathLike[str] | None = None,
    max_regions: int = 36,
) -> tuple[TVRNModel, TVRNProcessor]:
    """Model and processor for `RegionCache.build`: a vision backbone, or a dual encoder or TVRN with its embeddings.

    What the model is, is found out: a model with two towers that passes the probe is a dual encoder, of another one
    with two towers its vision tower alone is taken, with a warning.

    Args:
        id_or_path: Hub id, or a local folder; None: the detector alone, with its own features.
        grid_size: The map is pooled to that many regions a side; None: the map as it is.
        image_size: Pixels a side that images are brought to; None: the processor's own. Only of a vision backbone.
        device: Where the model goes; None: a GPU where there is one.
        trust_remote_code: Run code of a backbone's repository; a dual encoder's is never run.
        detector: Hub id, or a local folder, of a detector in whose boxes the map is pooled.
        max_regions: Of a detector's boxes, the ones that it is surest of.

    Raises:
        ValueError: If nothing is there, it gives no regions, or a size contradicts it.
    """
    boxes: dict[str, Any] = {} if detector is None else {"detector": detector, "max_regions": max_regions}
    sizes: dict[str, Any] = {"hidden_size": 8, "projection_size": 8, "similarity_size": 8}  # of parts that nobody uses
    if id_or_path is None:
        model = TVRNModel.from_backbones(**boxes, **sizes)
        return _placed(model, device), TVRNProcessor.from_backbones(detector=detector)
    name, expected = os.fspath(id_or_path), "expected a vision backbone or a dual encoder (CLIP, SigLIP, …)"
    check_exists(name, expected=expected)
    config = read_config(name, {"trust_remote_code": trust_remote_code}, expected)
    if config.model_type == "tvrn":
        if detector is not None:
            raise ValueError(f"{name!r} is a TVRN with regions of its own beside the detector; give one of them")
        model, processor = load_model(name, device=device, trust_remote_code=trust_remote_code)
        _check_looks(name, model, grid_size, image_size)
        return model, processor
    if is_dual_encoder(config):
        try:
            model = TVRNModel.from_dual_encoder(
                name, use_late_interaction=False, use_reasoning=False, vision_grid_size=grid_size, **boxes
            )
        except ValueError as error:
            logger.warning("%s Only the regions of its vision tower are kept, no embeddings.", error)
        else:
            _check_looks(name, model, grid_size, image_size)
            return _placed(model, device), TVRNProcessor.from_dual_encoder(name, detector=detector)
    sizes |= boxes
    model = TVRNModel.from_backbones(
        vision=name, trust_remote_code=trust_remote_code, freeze_vision=True, vision_grid_size=grid_size, **sizes
    )
    processor = TVRNProcessor.from_backbones(
        name, image_size=image_size, trust_remote_code=trust_remote_code, detector=detector
    )
    return _placed(model, device), processor


def box_feature_map(model: TVRNModel) -> Callable[[Tensor], Tensor | tuple[Tensor, Tensor]]:
    """What `RegionCache.build` pools in boxes: pixels -> the tower's map (B, C, h, w), of a dual encoder with its
    embeddings (B, P)."""
    tower: Any = model.vision_model
    whole: Any = model.dual_encoder
    if whole is None:
        return lambda pixels: region_map(tower(pixel_values=pixels), pixels, tower.config)

    def features(pixels: Tensor) -> tuple[Tensor, Tensor]:
        output = whole.get_image_features(pixel_values=pixels)
        embeds = torch.nn.functional.normalize(output.pooler_output.float(), dim=-1)
        return region_map(output, pixels, whole.config.vision_config), embeds

    return features


def _check_looks(name: str, model: TVRNModel, grid_size: int | None, image_size: int | None) -> None:
    """Refuse a model that sees no pixels, and sizes that it has of its own."""
    if not model.config.looks:
        raise ValueError(f"{name!r} has no vision tower: it was trained on region features; name what these came from")
    if grid_size not in (None, model.config.vision_grid_size):
        own = model.config.vision_grid_size
        raise ValueError(f"grid_size is {grid_size}, but {name!r} was trained with {own}; leave it out")
    if image_size is not None:
        raise ValueError(f"image_size is {image_size}, but {name!r} has its own; leave it out")


def _placed(model: TVRNModel, device: str | torch.device | None) -> TVRNModel:
    """The model in evaluation mode on a device; a GPU where there is one and none is named."""
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(where).type == "meta":
            raise ValueError("device 'meta' holds no numbers to compute with; expected cpu, cuda, ...")
        return model.eval().to(where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {str(where)!r} can't be used: {str(error).splitlines()[0]}") from error


def is_dual_encoder(config: Any) -> bool:
    """Whether a config is of a vision and a text tower; whether these make a dual encoder tells a probe alone."""
    return getattr(config, "vision_config", None) is not None and getattr(config, "text_config", None) is not None


def kind_of(config: Any) -> str:
    """The class of the model that a config is of, as far as the config says."""
    return str((config.architectures or [config.model_type])[0])


@torch.no_grad()
def _check_processor(name: str, model: TVRNModel, processor: TVRNProcessor) -> None:
    """One grey picture and one caption through both: a processor of another model is refused before hours of work."""
    picture = PIL.Image.new("RGB", (64, 48), (128, 128, 128))
    try:
        model.eval().encode_images(**processor(images=[picture]))
        model.encode_texts(**processor(text=["a photograph"]))
    except (ValueError, RuntimeError, IndexError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"the processor in {name!r} does not fit its model: {reason}. Expected the image processor and the "
            "tokenizer that the dual encoder was trained with"
        ) from error


def check_exists(name: str, subfolder: str = "", expected: str = EXPECTED) -> None:
    """Refuse a local folder that isn't there before anything asks the Hub.

    Raises:
        ValueError: With what was looked for, and near matches among local folders.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / subfolder / "config.json").is_file():
            raise ValueError(f"{str(path / subfolder)!r} is a folder without config.json; {expected}{_near(path)}")
    elif path.exists():
        raise ValueError(f"{name!r} is a file; {expected}, a folder with config.json and model.safetensors")
    elif _is_local(name):
        raise ValueError(f"there is no folder {str(path)!r}; {expected}{_near(path)}")


def _is_local(name: str) -> bool:
    """Whether a name can't be a Hub id, or its first part is a folder here."""
    parts = Path(name).parts
    return (
        name.startswith((".", "~", "/"))
        or (os.sep in name.rstrip(os.sep) and (len(parts) > 2 or Path(parts[0]).is_dir()))
        or "\\" in name
    )


def _near(path: Path) -> str:
    """Local folders with a model whose name is like the one asked for, as the end of a sentence."""
    around = [path, path.parent, path.parent.parent]
    found: dict[str, str] = {}
    for folder in around:
        if not folder.is_dir():
            continue
        for count, each in enumerate(sorted(folder.iterdir())):
            if count >= FOLDERS_LOOKED_AT:
                break
            if (each / "config.json").is_file():
                found.setdefault(each.name, str(each))
    near = difflib.get_close_matches(path.name, found, n=3, cutoff=0.4) or sorted(found)[:3]
    return f". Near by: {', '.join(found[name] for name in near)}" if near else ""


def read_config(name: str, hub: dict[str, Any], expected: str) -> Any:
    """The configuration of a model of any kind.

    Raises:
        ValueError: If there is none, with what was expected and near matches among local folders.
    """
    try:
        return AutoConfig.from_pretrained(name, **hub)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        near = _near(Path(name))
        raise ValueError(
            f"no model {name!r}: {reason} Looked for a local folder and on the Hub; {expected}{near}"
        ) from error
