"""Tiny detectors of the Hub's classes with random weights, in folders with their image processors."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForObjectDetection, AutoModelForZeroShotObjectDetection
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.deformable_detr.image_processing_pil_deformable_detr import DeformableDetrImageProcessorPil
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

SIDE = 64  # pixels of what is squeezed into a square
QUERIES = 12
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
RT_RESNET = RESNET | {"model_type": "rt_detr_resnet", "layer_type": "basic"}
HGNET = {
    "model_type": "hgnet_v2",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 8, 8],
    "stage_mid_channels": [4, 4, 4, 4],
    "stage_out_channels": [8, 8, 8, 8],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
HYBRID = {
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "encoder_in_channels": [8, 8, 8],
    "decoder_in_channels": [16, 16, 16],
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": QUERIES,
    "num_denoising": 0,
}
PLAIN = {
    "d_model": 64,  # Deformable DETR normalises in 32 groups, of more than one value
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": QUERIES,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
}
VIT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": [SIDE, SIDE],
    "patch_size": 16,
}
OWL_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "d_fine": {**HYBRID, "backbone_config": HGNET, "hidden_expansion": 0.5},
    "rt_detr": {**HYBRID, "backbone_config": RT_RESNET},
    "rt_detr_v2": {**HYBRID, "backbone_config": RT_RESNET},
    "deimv2": {**HYBRID, "backbone_config": HGNET, "hidden_expansion": 0.5},
    "detr": {**PLAIN, "backbone_config": RESNET | {"out_features": ["stage4"]}},
    "deformable_detr": {**PLAIN, "backbone_config": RESNET, "num_feature_levels": 4},
    "yolos": {**VIT, "num_detection_tokens": QUERIES, "use_mid_position_embeddings": False},
    "owlv2": {
        "text_config": {**OWL_TOWER, "vocab_size": 20},
        "vision_config": {**OWL_TOWER, "image_size": SIDE, "patch_size": 8},
        "projection_dim": 8,
    },
}
SHORTEST = {"shortest_edge": 48, "longest_edge": 96}
PROCESSORS: dict[str, Any] = {
    "detr": lambda: DetrImageProcessorPil(size=SHORTEST),
    "deformable_detr": lambda: DeformableDetrImageProcessorPil(size=SHORTEST),
    "yolos": lambda: YolosImageProcessorPil(size=SHORTEST),
    "owlv2": lambda: Owlv2ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
}


def square() -> Any:
    """The image processor of D-FINE, RT-DETR and DEIMv2: squeezes a picture into a square."""
    return RTDetrImageProcessorPil(size={"height": SIDE, "width": SIDE})


def detector_config(kind: str, **changes: Any) -> Any:
    return CONFIG_MAPPING[kind].from_dict(CONFIGS[kind] | changes)


def make_detector(folder: Path, kind: str, **changes: Any) -> Path:
    """A checkpoint of that class as the Hub has them."""
    torch.manual_seed(0)
    auto = AutoModelForZeroShotObjectDetection if kind == "owlv2" else AutoModelForObjectDetection
    model = auto.from_config(detector_config(kind, **changes)).eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 4:  # of convolutions, through which a picture's differences must not die away
            torch.nn.init.kaiming_normal_(weight)
        elif weight.ndim > 1:  # random boxes and classes: many heads start at 0
            torch.nn.init.normal_(weight, std=0.3 if "embed" in name or "head" in name else 0.1)
    model.save_pretrained(folder)
    PROCESSORS.get(kind, square)().save_pretrained(folder)
    return folder
