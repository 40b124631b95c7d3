"""What does an image cost until it is regions: decoding, detector, pooling, beside a grid?

    python examples/benchmarks/detector.py --vision VISION --threads 2
    python examples/benchmarks/detector.py --vision VISION --images 2 --repeats 1 --detectors dfine-nano

Median milliseconds an image, one at a time. The vision backbone has its weights; detectors have the sizes of the Hub's
checkpoints and random weights, whose products take as long. Images are JPEGs of coarse noise. Where a detector's
boxes are filled from the backbone's map, its row and that of the boxes add up (without a second decoding).
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import say_origin
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.configuration_tvrn import detector_sizes
from modeling_tvrn.layers_tvrn import pool_boxes
from modeling_tvrn.towers_tvrn import look, region_map

HGNET = {  # of D-FINE nano and small
    "model_type": "hgnet_v2", "hidden_sizes": [128, 256, 512, 1024], "embedding_size": 32,
    "stem_channels": [3, 16, 16],
    "stage_in_channels": [16, 64, 256, 512], "stage_mid_channels": [16, 32, 64, 128],
    "stage_out_channels": [64, 256, 512, 1024], "stage_num_blocks": [1, 1, 2, 1],
    "stage_downsample": [False, True, True, True], "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5], "stage_numb_of_layers": [3, 3, 3, 3], "use_learnable_affine_block": True,
}  # fmt: skip
RESNET_18 = {
    "model_type": "rt_detr_resnet", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
DETECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "dfine-nano": ("d_fine", {
        "backbone_config": HGNET | {"out_features": ["stage3", "stage4"]}, "num_feature_levels": 2, "d_model": 128,
        "encoder_hidden_dim": 128, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "encode_proj_layers": [1],
        "encoder_in_channels": [512, 1024], "decoder_in_channels": [128, 128], "decoder_n_points": [6, 6],
        "feat_strides": [16, 32], "depth_mult": 0.5, "decoder_layers": 3, "hidden_expansion": 0.34,
    }),
    "dfine-small": ("d_fine", {
        "backbone_config": HGNET | {"out_features": ["stage2", "stage3", "stage4"]}, "decoder_n_points": [3, 6, 3],
        "encoder_in_channels": [256, 512, 1024], "depth_mult": 0.34, "decoder_layers": 3, "hidden_expansion": 0.5,
    }),
    "rtdetr-v2-r18": ("rt_detr_v2", {
        "backbone_config": RESNET_18, "encoder_in_channels": [128, 256, 512], "decoder_layers": 3,
        "hidden_expansion": 0.5,
    }),
    "yolos-tiny": ("yolos", {
        "hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": [800, 1333],
        "use_mid_position_embeddings": False,
    }),
}  # fmt: skip
SQUARE, SHORTEST = {"height": 640, "width": 640}, {"shortest_edge": 512, "longest_edge": 1333}
SMALL = {"hidden_size": 16, "projection_size": 16, "similarity_size": 16, "vocab_size": 10}  # what is not measured


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision", required=True, help="Hub id or folder of the backbone with a grid")
    parser.add_argument("--detectors", nargs="*", default=list(DETECTORS), choices=list(DETECTORS))
    parser.add_argument("--grid-size", type=int, default=6)
    parser.add_argument("--map-size", type=int, default=448, help="pixels a side of the map that boxes are pooled in")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--image-size", type=int, nargs=2, default=[640, 480], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="JSON")
    return parser.parse_args()


def photographs(arguments: argparse.Namespace) -> list[bytes]:
    random = np.random.default_rng(arguments.seed)
    files = []
    for _ in range(arguments.images):
        noise = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.resize(arguments.image_size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def backbone(arguments: argparse.Namespace, side: int | None) -> tuple[TVRNModel, TVRNProcessor]:
    model = TVRNModel.from_backbones(vision=arguments.vision, freeze_vision=True, **SMALL)
    return model.eval(), TVRNProcessor.from_backbones(vision=arguments.vision, image_size=side)


def detector(name: str, seed: int) -> tuple[TVRNModel, TVRNProcessor]:
    kind, fields = DETECTORS[name]
    config = CONFIG_MAPPING[kind].from_dict(fields)
    torch.manual_seed(seed)
    model = TVRNModel(TVRNConfig(detector_config=config, region_feature_size=detector_sizes(config)[1], **SMALL))
    if kind == "yolos":
        return model.eval(), TVRNProcessor(YolosImageProcessorPil(size=SHORTEST))
    return model.eval(), TVRNProcessor(RTDetrImageProcessorPil(size=SQUARE, do_normalize=False))


def grid_of(model: TVRNModel, inputs: Any) -> Tensor:
    """The backbone's map."""
    config, pixels = model.config.vision_config, inputs["pixel_values"]
    return region_map(look(model.vision_model, config, pixels), pixels, config)


def measure(
    files: list[bytes],
    processor: TVRNProcessor,
    network: Callable[[Any], Any],
    pooling: Callable[[Any], Any] | None,
    repeats: int,
) -> dict[str, float]:
    """Median milliseconds of each part, after one image that is not counted."""
    parts = ["decode", "prepare", "network", *(["pooling"] if pooling is not None else [])]
    times: list[list[float]] = []
    for file in files[:1] + files * repeats:
        marks = [time.perf_counter()]
        found: Any = file
        for step in (lambda each: Image.open(io.BytesIO(each)).convert("RGB"),
                     lambda each: processor(images=[each]), network, pooling):  # fmt: skip
            if step is not None:
                found = step(found)
                marks.append(time.perf_counter())
        times.append(np.diff(marks).tolist())
    median = 1e3 * np.median(times[1:], axis=0)
    return {**dict(zip(parts, median.tolist(), strict=True)), "all": float(median.sum())}


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    files, side = photographs(arguments), arguments.grid_size
    rows: dict[str, dict[str, float]] = {}
    model, processor = backbone(arguments, None)
    pool = lambda grid: F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2).contiguous()  # noqa: E731
    rows[f"grid {side} x {side}"] = measure(files, processor, lambda x: grid_of(model, x), pool, arguments.repeats)
    _, processor = backbone(arguments, arguments.map_size)
    low = torch.rand(1, 36, 2, generator=torch.Generator().manual_seed(arguments.seed)) * 0.6
    boxes = torch.cat([low, low + 0.3], dim=-1)
    rows[f"boxes in a map of {arguments.map_size} px"] = measure(
        files, processor, lambda x: grid_of(model, x), lambda grid: pool_boxes(grid, boxes), arguments.repeats
    )
    for name in arguments.detectors:
        found, own = detector(name, arguments.seed)
        weights = sum(weight.numel() for weight in found.detector.parameters()) / 1e6
        title = f"{name} ({weights:.1f} M weights)"
        rows[title] = measure(files, own, lambda x, found=found: found.extract_regions(**x), None, arguments.repeats)
    print(f"{'milliseconds an image':34}{'decode':>9}{'prepare':>9}{'network':>9}{'pooling':>9}{'all':>9}")
    for title, row in rows.items():
        cells = [f"{row[part]:9.1f}" if part in row else f"{'-':>9}" for part in ("decode", "prepare", "network")]
        pooled = f"{row['pooling']:9.2f}" if "pooling" in row else f"{'-':>9}"
        print(f"{title:34}{''.join(cells)}{pooled}{row['all']:9.1f}")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
