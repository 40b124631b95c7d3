"""How photographs become region arrays: a frozen backbone, its preprocessing, boxes and number formats."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..configuration_tvrn import PIXEL_INPUTS
from ..engines import used
from ..layers_tvrn import pool_boxes
from ..pixels_tvrn import rgb_images
from ..storage.fingerprints import ItemId, module_fingerprint, preprocessor_fingerprint
from .pooling import fractional_boxes

Regions = tuple[Tensor, Tensor, Tensor]  # features (B, R, F), boxes (B, R, 4), mask (B, R)
STORED_DTYPES = ("float16", "float32")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ImagePreparation:
    """Turns records into the backbone's input, boxes included."""

    processor: Any
    boxes_column: str | None = None
    max_regions: int = 36

    def __post_init__(self) -> None:
        if self.boxes_column is None:
            return
        if self.max_regions < 1:
            raise ValueError(f"max_regions is {self.max_regions}, expected at least 1")
        image_processor = getattr(self.processor, "image_processor", None) or self.processor
        for step in ("do_center_crop", "do_pad"):
            if getattr(image_processor, step, False):
                raise ValueError(
                    f"{type(image_processor).__name__} has {step}=True, so boxes of the photograph would not fit its "
                    f"pixels: set {step}=False and size to a height and a width (resize_only does)"
                )

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The backbone's input of some records: image_ids, pixel_values and, with a boxes column, boxes and mask.

        Raises:
            ValueError: If a record has no image or no (good) boxes.
        """
        for record in records:
            if "image" not in record:
                raise ValueError(
                    f"the record of image {record['image_id']!r} has no image but {sorted(record)}: region features "
                    "that exist already need no cache"
                )
        ids = [record["image_id"] for record in records]
        pictures = rgb_images([record["image"] for record in records])
        made = self.processor(images=pictures, return_tensors="pt")
        batch = {"image_ids": ids} | {name: made[name] for name in PIXEL_INPUTS if name in made}
        if self.boxes_column is not None:
            boxes, mask, cut = self._boxes(records, pictures, self.boxes_column)
            batch |= {"region_boxes": boxes, "region_mask": mask, "cut": cut}
        return batch

    def _boxes(
        self, records: Sequence[Mapping[str, Any]], pictures: Sequence[Any], column: str
    ) -> tuple[Tensor, Tensor, int]:
        boxes = np.zeros((len(records), self.max_regions, 4), dtype=np.float32)
        mask = np.zeros((len(records), self.max_regions), dtype=bool)
        cut = 0
        for row, (record, picture) in enumerate(zip(records, pictures, strict=True)):
            if column not in record:
                raise ValueError(f"the record of image {record['image_id']!r} has no {column!r} but {sorted(record)}")
            found = fractional_boxes(record[column], picture.size, record["image_id"])
            cut += len(found) > self.max_regions
            kept = found[: self.max_regions]
            boxes[row, : len(kept)] = kept
            mask[row, : len(kept)] = True
        return torch.from_numpy(boxes), torch.from_numpy(mask), cut


@dataclass(frozen=True)
class RegionExtraction:
    """Turns batches of records into the arrays that a [`RegionCache`] stores.

    Args:
        model: A model with `extract_regions(pixel_values)`, such as TVRNModel, or any callable of that form, giving
            features (B, R, F), boxes (B, R, 4) and mask (B, R).
        processor: A processor or image processor of transformers, called with `images=` and `return_tensors="pt"`.
        dtype: How features are stored, `"float16"` or `"float32"`. Boxes are float32 always.
        compute_dtype: What the backbone computes in, by autocast unless `"float32"`.
        boxes_column: Column of the records with each image's boxes (R, 4), pixels or fractions. `None`: the regions
            are `model`'s own grid.
        max_regions: Boxes kept of an image, the first ones; only with `boxes_column`.
        feature_map: Only with `boxes_column`: pixel_values -> the backbone's map (B, C, h, w) to pool in the boxes, or
            that and a dual encoder's embeddings (B, P).

    Raises:
        ValueError: On an unknown dtype, or boxes without a map, or boxes with a processor that crops or pads.
    """

    model: Any
    processor: Any
    dtype: str = "float16"
    compute_dtype: str = "float32"
    boxes_column: str | None = None
    max_regions: int = 36
    feature_map: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in STORED_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected one of {STORED_DTYPES}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype is {self.compute_dtype!r}, expected one of {COMPUTE_DTYPES}")
        if (self.boxes_column is None) != (self.feature_map is None):
            raise ValueError(
                f"boxes_column is {self.boxes_column!r} and feature_map {self.feature_map!r}, expected both or "
                "neither: the map is what is pooled in the boxes"
            )
        self.preparation()  # refuses what it can't serve before anything is read

    @property
    def backbone(self) -> nn.Module | None:
        """The network whose weights decide the features: a dual encoder or a vision tower, or the model itself."""
        found = getattr(self.model, "dual_encoder", None) or getattr(self.model, "vision_model", None)
        detector = getattr(self.model, "detector", None)
        if detector is not None:
            return detector if found is None else nn.ModuleList([found, detector])
        if isinstance(found, nn.Module):
            return found
        return self.model if isinstance(self.model, nn.Module) else None

    def preparation(self) -> "ImagePreparation":
        """The part that decodes and preprocesses; holds no network, so worker processes can have it."""
        return ImagePreparation(self.processor, self.boxes_column, self.max_regions)

    def fingerprint(self) -> dict[str, Any]:
        """What the stored arrays depend on, apart from the images.

        Raises:
            ValueError: If the model is a bare function, which has no weights to tell it from another.
        """
        if self.backbone is None:
            raise ValueError(
                f"the weights of a bare {type(self.model).__name__} cannot be read: pass a model or nn.Module, or "
                "fingerprint= with what identifies it"
            )
        config = getattr(self.model, "config", None)
        grid_size = getattr(config, "vision_grid_size", None)
        regions: dict[str, Any] = {"boxes": "grid", "grid_size": "as the backbone's map"}
        if grid_size is not None:
            regions["grid_size"] = int(grid_size)
        if getattr(config, "detector_config", None) is not None:
            named = ("max_regions", "region_source", "nms_iou")
            regions = {"boxes": "detector"} | {name: getattr(config, name) for name in named}
        if self.boxes_column is not None:
            regions = {"boxes": f"column {self.boxes_column!r}", "max_regions": self.max_regions}
        preprocessing = preprocessor_fingerprint(self.processor)
        detector = getattr(self.processor, "detector_image_processor", None)
        if detector is not None:
            preprocessing["detector"] = preprocessor_fingerprint(detector)
        return {
            "backbone": module_fingerprint(self.backbone),
            "preprocessing": preprocessing,
            "regions": regions,
            "numbers": {"dtype": self.dtype, "compute_dtype": self.compute_dtype},
        }

    @torch.inference_mode()
    def extract(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the backbone on what its preparation made.

        Returns:
            `region_features` (B, R, F) of `dtype`, `region_boxes` (B, R, 4) float32, `region_mask` (B, R) bool.
            Masked regions are zero. Over a dual encoder also `image_embeds` (B, P) float32.

        Raises:
            ValueError: If an image's features are NaN or infinite, or too large for `dtype`; names the image.
        """
        dtype = getattr(torch, self.compute_dtype)
        with torch.autocast(self.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext():
            features, boxes, mask, embeds = self._regions(batch)
        mask = mask.bool()
        features = features.float().masked_fill(~mask.unsqueeze(-1), 0.0)
        stored = features.to(getattr(torch, self.dtype))
        self._check_finite(batch["image_ids"], features, stored)
        arrays = {} if embeds is None else {"image_embeds": embeds.float().cpu().numpy()}
        return arrays | {
            "region_features": stored.cpu().numpy(),
            "region_boxes": boxes.float().masked_fill(~mask.unsqueeze(-1), 0.0).cpu().numpy(),
            "region_mask": mask.cpu().numpy(),
        }

    def _regions(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        pixels = batch["pixel_values"].to(self.device)
        if used(self.model) == "torch":  # whose convolutions are faster so; what is computed stays the same
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        if self.boxes_column is None:
            detection = {name: batch[name].to(self.device) for name in PIXEL_INPUTS[1:] if name in batch}
            if getattr(self.model, "dual_encoder", None) is not None:
                found = self.model.extract_image_features(pixels, **detection)
                names = ("region_features", "region_boxes", "region_mask", "image_embeds")
                return tuple(found[name] for name in names)
            regions: Regions = getattr(self.model, "extract_regions", self.model)(pixels, **detection)
            return *regions, None
        assert self.feature_map is not None  # checked when made
        boxes, mask = batch["region_boxes"].to(self.device), batch["region_mask"].to(self.device)
        found = self.feature_map(pixels)
        features, embeds = found if isinstance(found, tuple) else (found, None)
        return pool_boxes(features.float(), boxes), boxes, mask, embeds

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""
        weights = iter(self.backbone.parameters()) if self.backbone is not None else iter(())
        first = next(weights, None)
        return torch.device("cpu") if first is None else first.device

    def _check_finite(self, ids: Sequence[ItemId], features: Tensor, stored: Tensor) -> None:
        for values, problem in (
            (features, "NaN or infinite: look at that image, and at compute_dtype"),
            (stored, f"too large for {self.dtype} (up to {features.abs().max():.3g}): use dtype='float32'"),
        ):
            bad = ~torch.isfinite(values).flatten(1).all(dim=1)
            if bad.any():
                first = ids[int(bad.nonzero()[0])]
                raise ValueError(f"the region features of image {first!r} are {problem}")

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        """`evaluating` of what the features come from."""
        return evaluating(self.model if isinstance(self.model, nn.Module) else self.backbone)


@contextlib.contextmanager
def evaluating(module: nn.Module | None) -> Iterator[None]:
    """Evaluation mode for a while: dropout and batch statistics have no place in what is stored."""
    if module is None or not module.training:
        yield
        return
    module.eval()
    try:
        yield
    finally:
        module.train()
