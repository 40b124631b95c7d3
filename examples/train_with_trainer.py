"""Train TVRN with the plain `transformers.Trainer`: the model returns its loss first, so nothing else is needed. After
every epoch R@K of the embeddings over the whole validation split, by `compute_metrics`.

On generated scenes, from scratch, a minute or two on two cores:

    python examples/train_with_trainer.py --output runs/trainer

On your pictures with pretrained towers:

    python examples/train_with_trainer.py --data FOLDER --vision google/mobilenet_v2_1.0_224 \
        --text sentence-transformers/all-MiniLM-L6-v2 --epochs 10

Phases, several processes that share one batch's negatives, exact resume and the published
recipes need `examples/train.py`: Trainer's processes each see the negatives of their own batch alone.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from transformers import ConvNextConfig, EvalPrediction, Trainer, TrainingArguments, ViTImageProcessorPil

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.cli.common import prepare_terminal, progress
from modeling_tvrn.data import CaptionDataset, PairCollator, load_pairs
from modeling_tvrn.evaluation import evaluate
from modeling_tvrn.metrics import retrieval_metrics
from modeling_tvrn.processing_tvrn import special_ids

SIDE = 64  # pixels of the pictures that a tower from scratch sees


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """What to train on and how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="scenes", help="what load_pairs reads (default: scenes)")
    parser.add_argument("--images", type=int, help="train on the first N images only")
    parser.add_argument("--vision", help="Hub id or folder of a vision backbone, frozen (default: a small ConvNeXt)")
    parser.add_argument("--text", help="Hub id or folder of a text encoder, frozen (default: words and a BiGRU)")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--batch-size", type=int, default=32, help="captions a batch, each with its image")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", default="runs/trainer", help="folder of the model")
    return parser.parse_args(arguments)


def build(options: argparse.Namespace, captions: list[str]) -> tuple[TVRNModel, TVRNProcessor]:
    """A model on the chosen towers, or from scratch, with its processor."""
    fields: dict[str, Any] = {"hidden_size": options.hidden_size, "projection_size": options.hidden_size}
    fields |= {"similarity_size": max(options.hidden_size // 2, 1), "freeze_vision": True, "freeze_text": True}
    processor = TVRNProcessor.from_backbones(options.vision, options.text)
    image_processor, tokenizer = processor.image_processor, processor.tokenizer
    if options.vision is None:
        sizes = {"hidden_sizes": [24, 48, 96], "depths": [1, 1, 2], "num_stages": 3}
        fields["vision_config"] = ConvNextConfig(image_size=SIDE, patch_size=4, **sizes)
        fields |= {"region_feature_size": 96, "freeze_vision": False}
        image_processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    if options.text is None:
        tokenizer = TVRNProcessor.from_captions(captions).tokenizer
        fields |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "freeze_text": False}
    fields["special_token_ids"] = special_ids(tokenizer)
    model = TVRNModel.from_backbones(options.vision, options.text, **fields)
    return model, TVRNProcessor(image_processor, tokenizer)


def recalls(prediction: EvalPrediction) -> dict[str, float]:
    """R@K of the embeddings, from what all batches of an evaluation gave together."""
    (image_embeds, text_embeds), (image_ids, text_image_ids) = prediction.predictions, prediction.label_ids
    ids, first = np.unique(image_ids, return_index=True)  # an image comes again with captions of a further batch
    return retrieval_metrics(image_embeds[first] @ text_embeds.T, np.searchsorted(ids, text_image_ids)).as_dict()


def main(arguments: list[str] | None = None) -> int:
    """Train, save model and processor, and print the validation recalls."""
    prepare_terminal()
    options = parse_arguments(arguments)
    records = load_pairs(options.data, split="train")
    if options.images is not None:
        records = records.select(range(min(options.images, len(records))))
    validation = load_pairs(options.data, split="validation")
    model, processor = build(options, [caption for captions in records.captions for caption in captions])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=20,
            bf16=options.bf16,
            logging_steps=20,
            save_strategy="no",
            report_to="none",
            disable_tqdm=not progress(),
            remove_unused_columns=False,  # or Trainer drops what the collator reads
            eval_strategy="epoch",
            label_names=["image_ids", "text_image_ids"],  # what `recalls` finds as label_ids
        ),
        train_dataset=CaptionDataset(records),
        eval_dataset=CaptionDataset(validation),
        compute_metrics=recalls,
        data_collator=PairCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model(options.output)
    report = evaluate(model.eval(), processor, validation, protocol="validation")  # every pair scored
    print(f"\nvalidation rSum {report.metrics.rsum:.1f}; model and processor: {Path(options.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
