r"""What each module of the reasoning earns: trained again, without it, beside the same other components of the score.

    python examples/benchmarks/ablation.py runs/flickr8k --config examples/configs/flickr8k.yaml --images 400 \
        data=flickr8k 'regions=regions/{split}' vision=VISION text=TEXT seed=0 \
        'phases.3={train: reasoning, steps: 400, batch_size: 32}'

First stage and late interaction are the trained checkpoint's and stay as they are; all that only the reasoning goes
through starts anew, with one module switched off or exchanged, and is trained by the recipe's last phase.
Prints for each variant the rSum in percent of the reasoning alone and of the whole score on the first photographs of
the validation split, with a paired bootstrap against the first variant, beside the other components alone. "full" has
all of the paper's modules, whatever the recipe has; "checkpoint" is the one given, as it was trained. For a decision:
the whole last phase of every seed, judged on all photographs by a shortlist in place of every pair (and on other
images too, with --transfer-data, --transfer-split and --transfer-regions),

    python examples/benchmarks/ablation.py runs/flickr8k --variants full "no module" "no text refinement" \
        --images 1000 --shortlist-size 48 --config … data=… seed=0
"""

import argparse
import logging
import tempfile
import time
from typing import Any

import torch
from origin import say_origin
from safetensors.torch import load_file
from terms import match_blocks
from transformers.utils import cached_file

from modeling_tvrn.data import load_pairs
from modeling_tvrn.evaluation import encode_dataset
from modeling_tvrn.metrics import RetrievalMetrics, paired_bootstrap, retrieval_metrics
from modeling_tvrn.scoring import search_then_rerank
from modeling_tvrn.teachers import with_checked_regions
from modeling_tvrn.training import TrainingConfig
from modeling_tvrn.training.loop import Training

MODULES = ("use_geometric_context", "use_text_refinement", "use_semantic_alignment")
FULL: dict[str, object] = dict.fromkeys(MODULES, True)
VARIANTS: dict[str, dict[str, object]] = {
    "checkpoint": {},  # its own reasoning, as it was trained
    "full": FULL,
    "no module": dict.fromkeys(MODULES, False),
    "no geometric context": FULL | {"use_geometric_context": False},
    "no text refinement": FULL | {"use_text_refinement": False},
    "GRU refinement": FULL | {"refinement": "gru"},
    "no semantic alignment": FULL | {"use_semantic_alignment": False},
    "SGR head": FULL | {"similarity_head": "sgr"},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a trained model whose first stage and late interaction are kept")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training configuration")
    parser.add_argument("--config", required=True, help="the recipe that the checkpoint was trained by")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)[1:])
    parser.add_argument("--images", type=int, default=400, help="photographs of the validation split to evaluate on")
    parser.add_argument("--shortlist-size", type=int, help="rerank so many candidates a query instead of every pair")
    parser.add_argument("--transfer-data", help="other images on which every variant is measured too")
    parser.add_argument("--transfer-split")
    parser.add_argument("--transfer-regions", help="their region cache")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_intermixed_args()


def train(arguments: argparse.Namespace, variant: str, folder: str) -> tuple[Training, float]:
    """The recipe's last phase on a variant, beside the checkpoint's other components, and its CPU seconds."""
    recipe = TrainingConfig.from_yaml(arguments.config, arguments.overrides).as_dict()
    model = {**recipe["model"], **VARIANTS[variant], "distillation_loss_weight": 0.0}
    last = {"phases": recipe["phases"][-1:], "model": model, "evaluation_steps": 1000000}
    run = Training(TrainingConfig.from_mapping({**recipe, **last, "output_dir": folder, "keep_checkpoints": 0}))
    given = load_file(cached_file(arguments.checkpoint, "model.safetensors"))
    if variant == "checkpoint":
        run.model.load_state_dict(given)  # strictly: a recipe with other modules is not the checkpoint's
        return run, 0.0
    run.phases[0].kept = frozenset({"embeddings", "late_interaction"})
    kept = {name for name, _ in run.model.named_parameters()} - run.learning_in(run.phases[0])
    if missing := kept - set(given):
        raise ValueError(
            f"{arguments.checkpoint} has no {sorted(missing)}; expected a model trained by the same recipe"
        )
    run.model.load_state_dict({name: given[name] for name in kept}, strict=False)
    run._evaluate = lambda: None  # type: ignore[method-assign]
    started = time.process_time()
    run.fit()
    return run, time.process_time() - started


def galleries(run: Training, arguments: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """Records to measure on, each with what reads their captions."""
    records = run.validation_records.select(range(arguments.images))
    found = {"validation": (records, run.input_processor)}
    if arguments.transfer_data is not None:
        records = load_pairs(arguments.transfer_data, arguments.transfer_split)
        if arguments.transfer_regions is not None:
            records = with_checked_regions(records, arguments.transfer_regions, run.model, run.processor)
        found["transfer"] = (records, run.processor)
    return found


@torch.no_grad()
def measure(run: Training, records: Any, processor: Any, arguments: argparse.Namespace) -> dict[str, RetrievalMetrics]:
    """Of the other components, the reasoning (not with a shortlist) and the whole, in the training's precision."""
    model = run.model.eval()
    with run.accelerator.autocast():
        images, texts, rows = encode_dataset(model, processor, records, progress=False)
        level = "full" if arguments.shortlist_size is None else "late_interaction"
        components = {name: value.float() for name, value in match_blocks(model, images, texts, level).items()}
        found = {"the others": sum(value for name, value in components.items() if name != "reasoning")}
        if level == "full":
            found |= {"reasoning": components["reasoning"], "whole": sum(components.values())}
        metrics = {name: retrieval_metrics(scores, rows.tolist()) for name, scores in found.items()}
        if arguments.shortlist_size is not None:
            metrics["whole"] = search_then_rerank(model, images, texts, rows, arguments.shortlist_size)
    return metrics


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    logging.getLogger("modeling_tvrn").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    references: dict[str, tuple[str, RetrievalMetrics]] = {}
    for variant in arguments.variants:
        with tempfile.TemporaryDirectory() as folder:
            run, seconds = train(arguments, variant, folder)
        print(f"{variant}: {seconds:.0f} CPU s of training", flush=True)
        for gallery, given in galleries(run, arguments).items():
            metrics = measure(run, *given, arguments)
            shown = ", ".join(f"{key} {value.rsum:.1f}" for key, value in metrics.items())
            print(f"    {gallery}: {shown}", flush=True)
            gain = paired_bootstrap(metrics["whole"], metrics["the others"])
            print(f"        over the others: {_shown(gain)}", flush=True)
            if gallery in references:
                first, reference = references[gallery]
                print(f"        over {first}: {_shown(paired_bootstrap(metrics['whole'], reference))}", flush=True)
            else:
                references[gallery] = variant, metrics["whole"]


def _shown(gain) -> str:
    return f"{gain.difference['rsum']:+.1f} ({gain.low['rsum']:+.1f} … {gain.high['rsum']:+.1f})"


if __name__ == "__main__":
    main()
