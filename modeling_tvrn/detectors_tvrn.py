"""Detectors of the Hub, inside the model: pixels to boxes and their features. Shipped with every checkpoint.

Every detector runs on one picture's own pixels: what a batch pads is cut off before it looks, so that a picture's
regions depend on that picture alone.
"""

import os
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection, PreTrainedConfig

from .configuration_tvrn import DETECTORS, check_detector
from .layers_tvrn import take
from .towers_tvrn import float_dtype, load_whole
from .trust_tvrn import MODEL_CODE, explained, without_code

NMS_IOU = 0.7  # of detectors that may find an object several times
# Parts of OWLv2 that only a text needs; its 0-d scale would also break fully_shard.
_OF_TEXTS = ("text_model", "text_projection", "visual_projection", "logit_scale")
# What finds and chooses boxes, which no feature depends on.
_HEADS = re.compile(
    r"(^|\.)(class_embed|bbox_embed|class_labels_classifier|bbox_predictor|denoising_class_embed|enc_score_head|enc_output"
    r"|enc_bbox_head|pre_bbox_head|lqe_layers|reg_scale|up|box_head|objectness_head|logit_shift|logit_scale)(\.|$)"
)


def build_detector(config: PreTrainedConfig) -> nn.Module:
    """A randomly initialised detector without what only texts need."""
    return _without_texts(_auto_class(config).from_config(config, trust_remote_code=False))


def load_detector(path: str | os.PathLike) -> nn.Module:
    """A pretrained detector in float32 and evaluation mode.

    Raises:
        ValueError: If nothing that transformers can load is found there, or it is no detector that fits.
    """
    name = os.fspath(path)
    # Inside a TVRN checkpoint a detector has transformers' own class: code of its repository is never run.
    try:
        config = without_code(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except (OSError, KeyError, ValueError) as error:
        reason = explained(error, path, MODEL_CODE, trust_remote_code=False)
        raise ValueError(f"No detector at {name!r}: {reason}") from error
    try:
        check_detector(config)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    detector = load_whole(name, config, _auto_class(config), "detector", dtype=torch.float32, trust_remote_code=False)
    if os.path.isdir(path):  # a Hub id says where a model is from, a path only whose disk it was on
        detector.config.name_or_path = os.path.basename(os.path.abspath(path))
    return _without_texts(detector.eval())


def _auto_class(config: PreTrainedConfig) -> Any:
    return AutoModelForZeroShotObjectDetection if config.model_type == "owlv2" else AutoModelForObjectDetection


def _without_texts(detector: Any) -> nn.Module:
    for name in _OF_TEXTS if detector.config.model_type == "owlv2" else ():
        delattr(detector.owlv2, name)
    return detector


def freeze_heads(detector: nn.Module) -> None:
    """Take what finds boxes out of the training of a detector: only features get a gradient, and parameters without
    one would stop a distributed run."""
    for name, parameter in detector.named_parameters():
        if _HEADS.search(name):
            parameter.requires_grad_(False)


def detect(
    detector: Any, pixel_values: Tensor, extents: Tensor | None, max_regions: int, nms_iou: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The regions of B pictures: the boxes that a detector is surest of.

    Args:
        detector: Of `build_detector` or `load_detector`.
        pixel_values: (B, 3, H, W), as its image processor makes them.
        extents: (B, 2) height and width of the picture as fractions of the pixels, whose rest is padding at the
            bottom and the right; None: no padding.
        max_regions: R, at most the number of its queries.
        nms_iou: Of boxes that overlap more than this the surer one stays; None: as its class is trained.

    Returns:
        Features (B, R, F); boxes (B, R, 4) float32, xyxy as fractions of the picture, surest first; mask (B, R). A
        picture where no box has an area has one region, which is all of it.
    """
    pixels = pixel_values.to(float_dtype(detector))
    features, boxes, scores = _queries(detector, pixels, extents)
    boxes = boxes.clamp(0, 1)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(dim=-1)
    scores = scores.masked_fill(area <= 0, -torch.inf)
    if nms_iou is None and DETECTORS[detector.config.model_type] == "objectness":
        nms_iou = NMS_IOU
    if nms_iou is None:
        best, chosen = scores.topk(max_regions, dim=1)
    else:
        best, chosen = non_maximum_suppression(boxes, scores, nms_iou, max_regions)
    mask = best != -torch.inf  # a NaN stays, for the model's checks to name it
    boxes = take(boxes, chosen) * mask.unsqueeze(-1)
    # (B, R): the first region, where there is none.
    alone = ~mask.any(dim=1, keepdim=True) & (torch.arange(max_regions, device=mask.device) == 0)
    boxes = torch.where(alone.unsqueeze(-1), boxes.new_tensor([0.0, 0.0, 1.0, 1.0]), boxes)
    return take(features, chosen), boxes, mask | alone


def _queries(detector: Any, pixels: Tensor, extents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every query its feature (B, Q, F), box xyxy (B, Q, 4) and score (B, Q), boxes as fractions of the picture."""
    if extents is None:
        return _run(detector, pixels)
    if detector.config.model_type == "owlv2":  # which wants a square, padding and all
        features, boxes, scores = _run(detector, pixels)
        # (B, 2) height, width -> (B, 1, 4) width, height, width, height.
        return features, boxes / extents.flip(-1).repeat(1, 2).unsqueeze(1), scores
    size = extents.new_tensor(pixels.shape[-2:])
    sizes, group = (extents * size).round().long().unique(dim=0, return_inverse=True)
    rows = [(group == number).nonzero().flatten() for number in range(len(sizes))]
    found = [_run(detector, pixels[row, :, :h, :w]) for row, (h, w) in zip(rows, sizes.tolist(), strict=True)]
    order = torch.cat(rows).argsort()
    features, boxes, scores = (torch.cat(parts)[order] for parts in zip(*found, strict=True))
    return features, boxes, scores


def _run(detector: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_queries` of pictures without padding."""
    kind = detector.config.model_type
    if kind == "owlv2":
        grid, _ = detector.image_embedder(pixel_values=pixels)
        patches = grid.flatten(1, 2)
        _, features = detector.class_predictor(patches)
        boxes, scores = detector.box_predictor(patches, grid), detector.objectness_predictor(patches).float()
    else:
        output = detector(pixel_values=pixels)
        # YOLOS: the detection tokens come last, after its patches.
        features, boxes = output.last_hidden_state[:, -output.logits.shape[1] :], output.pred_boxes
        # The largest logit for the largest sigmoid: the order is the same.
        logits = output.logits.float()
        scores = (logits.softmax(dim=-1)[..., :-1] if DETECTORS[kind] == "softmax" else logits).amax(dim=-1)
    centre, size = boxes.float().split(2, dim=-1)
    return features, torch.cat([centre - size / 2, centre + size / 2], dim=-1), scores


def non_maximum_suppression(boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> tuple[Tensor, Tensor]:
    """Greedy: the surest box, and of the others those that don't overlap one taken before by more than a threshold.

    Rounds of a fixed number, without a loop over data, so that it can be exported.

    Args:
        boxes: (B, Q, 4) xyxy.
        scores: (B, Q), -inf for a box that is none.
        iou_threshold: Intersection over union.
        count: Boxes to take of an image.

    Returns:
        Their scores (B, count), -inf where nothing was left, and places among the boxes (B, count).
    """
    low, high = boxes[..., :2], boxes[..., 2:]
    area = (high - low).clamp_min(0).prod(dim=-1)
    places = torch.arange(boxes.shape[1], device=boxes.device)
    taken = []
    for _ in range(count):
        best, place = scores.max(dim=1, keepdim=True)  # (B, 1)
        taken.append((best, place))
        box = take(boxes, place)
        overlap = (torch.minimum(high, box[..., 2:]) - torch.maximum(low, box[..., :2])).clamp_min(0).prod(dim=-1)
        union = area + area.gather(1, place) - overlap
        gone = (overlap > iou_threshold * union) | (places == place)
        scores = scores.masked_fill(gone, -torch.inf)
    found, where = (torch.cat(parts, dim=1) for parts in zip(*taken, strict=True))
    return found, where
