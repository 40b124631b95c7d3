"""Evaluate checkpoints on image-text retrieval by a named protocol, and print where every number comes from.

    python examples/evaluate_retrieval.py runs/flickr8k --data flickr8k --split validation

The same as `tvrn evaluate`, whose `--help` has an example of each protocol. In Python:

    from modeling_tvrn import load_model
    from modeling_tvrn.data import load_pairs
    from modeling_tvrn.evaluation import evaluate

    model, processor = load_model("runs/flickr8k")
    report = evaluate(model, processor, load_pairs("flickr8k", "validation"))
    print(report.table())

Several processes share the scoring, and finished blocks are kept, so that the same command goes on after a crash:

    torchrun --nproc-per-node 2 examples/evaluate_retrieval.py runs/coco --data coco --split test --protocol coco-5k \
        --blocks blocks/coco --memory-budget 2
"""

import sys

from modeling_tvrn.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()
