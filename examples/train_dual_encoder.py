"""Train a dual encoder from the Hub (CLIP, SigLIP, ...) by its own loss, with CUSA's soft labels beside it.

Teachers' vectors once, then the training; without the last line the same model is trained without CUSA:

    tvrn teachers flickr30k facebook/dinov2-base --modality image --split train \\
        --output teachers/dinov2
    tvrn teachers flickr30k sentence-transformers/all-mpnet-base-v2 --modality text \\
        --split train --output teachers/mpnet
    accelerate launch examples/train_dual_encoder.py checkpoint=openai/clip-vit-base-patch32 data=flickr30k \\
        cusa=true cusa_image_teacher=teachers/dinov2 cusa_text_teacher=teachers/mpnet

The folder then holds the checkpoint as it came (`AutoModel.from_pretrained`), and the uni-modal heads in a file beside
it (`UnimodalHeads.load(folder)`).
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from modeling_tvrn.redaction import guard_logs, redacted_text
from modeling_tvrn.training import describe


def main(arguments: list[str] | None = None) -> int:
    """Read the configuration, train, and print the result."""
    from modeling_tvrn.training.dual_encoder import DualEncoderConfig, train_dual_encoder

    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Keys, with their defaults:\n\n" + describe(DualEncoderConfig).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of keys (default: none)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace those of the file")
    options = parser.parse_args(arguments)
    is_main = os.environ.get("RANK", "0") == "0"  # of several processes one speaks, but for warnings
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S"
    )
    guard_logs()
    try:
        config = DualEncoderConfig.from_yaml(options.config, options.overrides)
        result = train_dual_encoder(config)
    except (ValueError, OSError, ImportError) as error:
        print(f"train_dual_encoder.py: {redacted_text(str(error))}", file=sys.stderr)
        return 2
    if not is_main:
        return 0
    best = {name: round(value, 2) for name, value in result["metrics"].items() if "R@" in name or name == "rsum"}
    print(f"\nvalidation, percent: {best}\nmodel, heads and results: {config.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
