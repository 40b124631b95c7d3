"""Tiny models with odd sizes and inputs as ragged as real ones, for the tests of the model."""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from modeling_tvrn import TVRNConfig, TVRNModel

SIZES = {
    "hidden_size": 37,
    "projection_size": 23,
    "similarity_size": 19,
    "word_embedding_size": 13,
    "vocab_size": 31,
    "pooled_hidden_size": 17,
    "word_hidden_size": 11,
    "component_weight_init_value": 0.7,
}
FEATURES = 29
HEADS = [{"refinement": r, "similarity_head": h} for r, h in product(("gate", "gru"), ("saf", "sgr"))]
SWITCHES = ("use_geometric_context", "use_text_refinement", "use_semantic_alignment", "use_first_stage")
# Late interaction and what reads boxes come with every second of them, so that they meet every other part on and off.
VARIANTS = [
    head
    | dict(zip(SWITCHES, on, strict=True))
    | {"use_late_interaction": sum(on) % 2 == 0}
    | {"use_box_positions": on[1] != on[3], "use_relative_geometry": on[0] and on[1]}
    for head in HEADS
    for on in product((True, False), repeat=4)
]


def name(variant: dict[str, Any]) -> str:
    """A test's id: "gru-sgr-no_text_refinement"."""
    switched_off = [key.replace("use_", "no_") for key, value in variant.items() if value is False]
    return "-".join([*(str(value) for value in variant.values() if not isinstance(value, bool)), *switched_off])


def shake(model: nn.Module, seed: int = 11) -> nn.Module:
    """Random values in every weight and statistic: at its initial value a bias or a scale is invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        # The newest buffer last: the others keep the values that tests were written with.
        for key, tensor in sorted(model.state_dict().items(), key=lambda item: item[0] == "calibration_query"):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
                tensor.add_(0.2 * (noise.abs() if key.endswith("running_var") else noise))
    return model.eval()


def tiny_model(**settings: Any) -> TVRNModel:
    """A model of that variant in evaluation mode, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return shake(TVRNModel(TVRNConfig(**{"region_feature_size": FEATURES} | SIZES | settings)))


def overlapping_boxes(*shape: int) -> Tensor:
    """(…, 4) boxes xyxy in [0, 1], large enough that many overlap and some do not."""
    corners = torch.rand(*shape, 2, dtype=torch.float64) * 0.6
    return torch.cat([corners, corners + 0.15 + 0.25 * torch.rand(*shape, 2, dtype=torch.float64)], dim=-1)


def regions(images: int = 3, count: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Region features, boxes and a mask with holes; image 0 has every region, each has at least one."""
    mask = torch.rand(images, count) < 0.6
    mask[0], mask[:, count // 2] = True, True
    return {
        "region_features": torch.randn(images, count, FEATURES, dtype=dtype),
        "region_boxes": overlapping_boxes(images, count).to(dtype),
        "region_mask": mask,
    }


def words(texts: int = 4, count: int = 6) -> dict[str, Tensor]:
    """Token ids, attention mask and word mask: text k attends to all but k tokens, its first and last are special, and
    a later one is masked out as well."""
    attended = torch.arange(count)[None] < (count - torch.arange(texts) % (count - 3))[:, None]
    word = attended & (torch.arange(count)[None] > 0)
    word[torch.arange(texts), attended.sum(dim=1) - 1] = False
    word[::2, 2] = False
    ids = torch.randint(1, SIZES["vocab_size"], (texts, count))
    return {"input_ids": ids, "attention_mask": attended.long(), "word_mask": word.long()}


def one(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """A single item as a batch of its own, padding and masks dropped."""
    mask = inputs["word_mask" if "word_mask" in inputs else "region_mask"][row].bool()
    kept = {key: value[row : row + 1, mask] for key, value in inputs.items()}
    return {key: value for key, value in kept.items() if not key.endswith("mask")}
