"""Checks of a model's inputs and weights: each says what came, what was expected and what to do. Shipped."""

import torch
from torch import Tensor, nn

from .configuration_tvrn import TVRNConfig
from .encoded_tvrn import LEVELS, EncodedImages, EncodedTexts, common_fingerprint


def check_regions(
    features: Tensor, boxes: Tensor | None, mask: Tensor | None, size: int, needs_boxes: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Region features (I, R, size) with boxes (I, R, 4) and a boolean mask (I, R).

    Raises:
        ValueError: On wrong shapes, NaN, boxes outside [0, 1] or inside out, or an image without a valid region.
    """
    if features.ndim != 3 or features.shape[-1] != size or 0 in features.shape:
        raise ValueError(
            f"Region features have shape {tuple(features.shape)}; expected (images, regions, {size}), none of them 0. "
            "Check region_feature_size, or the tower or cache they come from."
        )
    mask = _check_mask("region_mask", mask, features, "region")
    _refuse_nonfinite(features, "Region features")
    if boxes is None and needs_boxes:
        raise ValueError(
            "region_features came without region_boxes, which this model reads: (images, regions, 4), xyxy in [0, 1]. "
            "Without boxes, build it with use_geometric_context=False and use_box_positions=False."
        )
    if boxes is not None:
        boxes = _check_boxes(boxes, mask)
    return features, boxes, mask


def _check_boxes(boxes: Tensor, mask: Tensor) -> Tensor:
    if boxes.shape != (*mask.shape, 4):
        raise ValueError(f"region_boxes has shape {tuple(boxes.shape)}; expected {(*mask.shape, 4)}, xyxy in [0, 1].")
    inside = (boxes >= 0) & (boxes <= 1)
    ordered = boxes[..., 2:] >= boxes[..., :2]
    # Asked for what is right, so that NaN, for which every comparison is false, is wrong.
    wrong = ~(inside.all(dim=-1) & ordered.all(dim=-1)) & mask
    if wrong.any():
        image, region = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"The box of region {region} of image {image} is {boxes[image, region].tolist()}; expected x1 ≤ x2, "
            "y1 ≤ y2, all in [0, 1]. Divide pixel boxes by the image's width and height (the processor "
            "does, given image_sizes)."
        )
    return boxes.float() if boxes.dtype != torch.float64 else boxes


def check_pixels(pixels: Tensor, channels: int, name: str = "pixel_values") -> None:
    """Pixels (I, channels, H, W), of that name.

    Raises:
        ValueError: On another shape, or NaN.
    """
    if pixels.ndim != 4 or pixels.shape[1] != channels or 0 in pixels.shape:
        raise ValueError(
            f"{name} has shape {tuple(pixels.shape)}; expected (images, {channels}, height, width), none of "
            "them 0. The processor makes them from pictures."
        )
    _refuse_nonfinite(pixels, name)


def check_extents(extents: Tensor | None, images: int) -> None:
    """Heights and widths (I, 2) of the pictures as fractions of their padded pixels, or None.

    Raises:
        ValueError: On another shape, or values outside (0, 1].
    """
    if extents is None:
        return
    if extents.shape != (images, 2) or not ((extents > 0) & (extents <= 1)).all():
        raise ValueError(
            f"pixel_extents has shape {tuple(extents.shape)} and the values {extents.tolist()!s:.80}; expected "
            f"({images}, 2), height and width of each picture as fractions of its padded pixels, above 0 and up to 1. "
            "The processor makes them."
        )


def check_ids(ids: Tensor, vocab_size: int | None) -> Tensor:
    """Token ids (T, W), in the vocabulary.

    Raises:
        ValueError: On another shape or dtype, or an id outside the vocabulary.
    """
    if ids.ndim != 2 or 0 in ids.shape or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"input_ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; expected integers (texts, words), at "
            "least one of each."
        )
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        raise ValueError(
            f"input_ids hold {low if low < 0 else high}; expected ids from 0 to vocab_size − 1 = "
            f"{(vocab_size or 0) - 1}. Use the tokenizer the model was made with."
        )
    return ids


def check_padded(ids: Tensor, length: int) -> None:
    """Token ids of a text side that pools its last position, which has to be where it was in training.

    Raises:
        ValueError: If they are not padded to that position.
    """
    if ids.ndim == 2 and ids.shape[1] != length:
        raise ValueError(
            f"input_ids has captions of {ids.shape[1]} tokens; this text side (SigLIP) reads exactly {length}. Use "
            "the processor of this checkpoint, or pad them likewise."
        )


def check_text_features(features: Tensor, size: int) -> Tensor:
    """Outputs (T, W, size) of a text tower.

    Raises:
        ValueError: On another shape, or NaN.
    """
    if features.ndim != 3 or features.shape[-1] != size or 0 in features.shape:
        raise ValueError(
            f"text_features has shape {tuple(features.shape)}; expected (texts, words, {size}), none of them 0. Check "
            "which tower they come from."
        )
    _refuse_nonfinite(features, "text_features")
    return features


def check_embeds(name: str, embeds: Tensor | None, count: int | None, size: int) -> Tensor:
    """Embeddings (count, size) of a dual encoder, beside the features of as many items.

    Raises:
        ValueError: If there are none, of another shape, or NaN.
    """
    if embeds is None:
        raise ValueError(
            f"Features came without {name}, the first stage of this model; give what extract_image_features and "
            "extract_text_features return, or pixels and token ids."
        )
    if embeds.ndim != 2 or embeds.shape[1] != size or not len(embeds) or len(embeds) != (count or len(embeds)):
        raise ValueError(f"{name} has shape {tuple(embeds.shape)}; expected ({count or 'items'}, {size}).")
    _refuse_nonfinite(embeds, name)
    return embeds


def check_words(given: Tensor, attention_mask: Tensor | None, word_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Boolean attention and word masks (T, W) of token ids (T, W) or token features (T, W, F).

    Raises:
        ValueError: On wrong shapes, or a text without a word to match.
    """
    attended = _check_mask("attention_mask", attention_mask, given, "word")
    words = attended if word_mask is None else _shaped_mask("word_mask", word_mask, given, "word") & attended
    _refuse_rows(~words.any(dim=1), "word_mask keeps no word that attention_mask keeps")
    return attended, words


def check_level(level: str) -> str:
    """One of `LEVELS`.

    Raises:
        ValueError: On another word.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; expected one of {', '.join(map(repr, LEVELS))}.")
    return level


def check_sides(images: EncodedImages, texts: EncodedTexts, config: TVRNConfig, level: str = "full") -> None:
    """Encoded images and texts of this model's variant and sizes, as far as the components of that level read them.

    Raises:
        ValueError: If either was encoded by another variant, or the two by different models, or for a lower level.
    """
    common_fingerprint(images, texts)
    wanted = _sizes_read(config, level)
    found = {name: getattr(images if name[0] == "i" else texts, name.split(".")[1]) for name in wanted}
    sizes = {name: None if value is None else value.shape[-1] for name, value in found.items()}
    wrong = [f"{name} of size {sizes[name]}, not {wanted[name]}" for name in wanted if sizes[name] != wanted[name]]
    if not wrong and level == "full" and images.refined_regions is not None and images.region_mask is not None:
        regions = images.region_mask.shape[1]
        if images.refined_regions.shape[1] != regions * (1 if config.refinement == "gate" else 2):
            wrong.append(f"{images.refined_regions.shape[1]} refined regions for {regions} regions")
    if wrong:
        raise ValueError(
            f"match at level {level!r} got galleries of another model or of a lower level: {', '.join(wrong)} (None: "
            "absent). Score with the model that encoded them, or encode them again with that level."
        )


def check_segments(token_type_ids: Tensor | None) -> None:
    """Raise a `ValueError` for captions of two sentences; a tokenizer numbers the segments of one 0."""
    if token_type_ids is not None and bool((token_type_ids != 0).any()):
        raise ValueError("token_type_ids hold more than zeros; expected captions of one sentence (segment) each.")


def check_weights(model: nn.Module, name: str) -> None:
    """Raise a `ValueError` for a loaded model with a NaN or infinity among its weights: every score would be NaN."""
    for weight, value in model.state_dict().items():
        # torchao's tensors say that they are floats, and are codes that can't be summed.
        if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point() or value.is_meta:
            continue
        if not torch.isfinite(value.sum(dtype=torch.float64)):  # one pass, see _refuse_nonfinite
            raise ValueError(
                f"{name}: the weight {weight!r} holds NaN or infinity; expected finite numbers. The training that "
                "wrote it diverged, or the file was changed: take another checkpoint."
            )


def check_own_layers(model: nn.Module, towers: tuple[str, ...]) -> None:
    """Raise a `ValueError` where a layer beside the towers is quantised.

    TVRN reads its own weights, joins them and moves them in front of other products: as 8-bit codes they'd be garbage.
    """
    for part, child in model.named_children():
        for name, layer in () if part in towers else child.named_modules(prefix=part):
            weight = getattr(layer, "weight", None)
            packed = isinstance(weight, Tensor) and not weight.is_floating_point()
            kinds = (type(layer).__module__, type(weight).__module__)
            if packed or any(kind.startswith(("torch.ao.", "torchao.", "bitsandbytes.")) for kind in kinds):
                raise ValueError(
                    f"The layer {name!r} of TVRN itself is quantised ({type(layer).__name__}); expected floats there. "
                    "Quantise the towers alone, most of a model: from_pretrained(…, quantization_config=…) does, or "
                    f"quantise {', '.join(f'model.{name}' for name in towers)}."
                )


def in_dtype(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Checked values as the model computes them.

    Raises:
        ValueError: If float16, which ends at 65504, does not hold them, or a tower in float16 overflowed.
    """
    cast = values.to(dtype)
    if dtype == torch.float16 and not cast.isfinite().all():
        raise ValueError(
            f"{name} go up to {values.detach().abs().max().item():.5g}; expected at most 65504, the end of float16. "
            "Load the model in bfloat16 or float32."
        )
    return cast


def _sizes_read(config: TVRNConfig, level: str) -> dict[str, int | None]:
    """The last dimension of what a level's components read; None for what this variant has not."""
    size, gate = config.hidden_size, config.refinement == "gate"
    wanted: dict[str, int | None] = {"images.embeds": config.projection_size, "texts.embeds": config.projection_size}
    if level != "embeddings" and config.use_late_interaction:
        wanted |= {"images.regions": size, "texts.words": size}
    if level == "full" and config.use_reasoning:
        refined = config.use_text_refinement
        wanted |= {
            "images.refined_regions": size,
            "images.context_values": (2 if gate else 3) * size if refined else None,
            "texts.words": size,
            "texts.gates": size if refined and gate else None,
            "texts.recurrent_words": size if refined and not gate else None,
        }
    return wanted


def _check_mask(name: str, mask: Tensor | None, of: Tensor, item: str) -> Tensor:
    if mask is None:
        return torch.ones(of.shape[:2], dtype=torch.bool, device=of.device)
    mask = _shaped_mask(name, mask, of, item)
    _refuse_rows(~mask.any(dim=1), f"{name} masks every {item}")
    return mask


def _shaped_mask(name: str, mask: Tensor, of: Tensor, item: str) -> Tensor:
    if mask.shape != of.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected {tuple(of.shape[:2])}, one flag a {item}.")
    return mask.bool()


def _refuse_rows(wrong: Tensor, what: str) -> None:
    if wrong.any():
        rows = wrong.nonzero().flatten().tolist()[:10]
        raise ValueError(f"{what} in the rows {rows} of the batch; fix or drop those items.")


def row_ids(
    images: int, texts: int, image_ids: Tensor | None, text_image_ids: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Image ids of both sides, which `check_row_ids` let pass, on one device; without any, text k belongs to image k.

    Raises:
        ValueError: If only one side is given, or none for different numbers of images and texts.
    """
    if image_ids is None and text_image_ids is None and images == texts:
        rows = torch.arange(images, device=device)
        return rows, rows
    if image_ids is None or text_image_ids is None:
        raise ValueError(
            f"A loss over {images} images and {texts} texts needs both image_ids and text_image_ids, which say whose "
            f"text is whose; got image_ids={'given' if image_ids is not None else None}, "
            f"text_image_ids={'given' if text_image_ids is not None else None}."
        )
    return image_ids.to(device), text_image_ids.to(device)


def check_row_ids(images: int, texts: int, image_ids: Tensor | None, text_image_ids: Tensor | None) -> None:
    """Raise a `ValueError` for ids that are no tensor, or not one for each item (None: not given)."""
    for name, ids, count in (("image_ids", image_ids, images), ("text_image_ids", text_image_ids, texts)):
        if ids is None:
            continue
        if not isinstance(ids, Tensor):
            raise ValueError(f"{name} is a {type(ids).__name__}; expected an int64 tensor of shape ({count},).")
        if ids.shape != (count,):
            raise ValueError(f"{name} has shape {tuple(ids.shape)}; expected ({count},), one id an item.")


def _refuse_nonfinite(values: Tensor, name: str) -> None:
    # A sum is finite only where every value is, and costs one pass without a mask of the values' size.
    sums = values.detach().flatten(1).sum(dim=1, dtype=torch.float64)
    _refuse_rows(~torch.isfinite(sums), f"{name} hold NaN or infinity")
