"""How fast is one image–caption pair? The pair stage against the field's loop over captions, at the paper's sizes.

    python examples/benchmarks/pair_stage.py --threads 2

Three ways to score the same random images and captions with the same weights:

- `pairs`: `TVRNModel.match`, whole blocks of images × captions at once, in float32 and bfloat16;
- `pairs, a core a share`: the same as `score_matrix` and `rank` call it, each core with captions of its own;
- with `--compile`, both again after `model.pair.compile(dynamic=True)`, which takes a minute or two (C++ compiler);
- `loop`: for each caption in Python, a block of 100 images at once, float32, one-sided projections hoisted out, so
  that only the batching differs;
- `loop+projections`: the same loop with the key and query projections of the attention inside, as the authors'
  released code has them (107 MFLOP a pair that depend on one side only).

It prints ms a pair, GFLOP/s (counted by `pair_costs.operations`, without padding), the share of this machine's matrix
product rate measured in the same run, the largest difference of the scores, and how much memory scoring takes beyond
the gallery, for 1 and 4 times as many captions (Linux).

On a machine that others use at the same time, `--cpu-time` counts the CPU seconds of this process, shared among its
threads, in place of wall time: for the products, the loops and the pairs alike.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gpu
import torch
from origin import matrix_rate, resident_bytes, say_origin
from pair_costs import operations
from torch import Tensor
from torch.nn import functional as F

from modeling_tvrn import TVRNModel
from modeling_tvrn.layers_tvrn import masked_softmax, normalize
from modeling_tvrn.scoring.threads import keep_freed_memory, match_on_cores

IMAGE_BLOCK = 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--captions", type=int, default=512, help="a block of `rank` has as many")
    parser.add_argument("--loop-captions", type=int, default=24, help="captions of the slow loops")
    parser.add_argument(
        "--words", type=int, default=14, help="mean length; captions have between half and 1.5 times as many"
    )
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--similarity-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--products", type=int, default=20, help="matrix products that the machine's rate is taken of")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds by threads, instead of wall time")
    parser.add_argument(
        "--compile", action="store_true", help="score with a compiled pair stage too (minutes to compile)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(arguments: argparse.Namespace) -> TVRNModel:
    config = {"use_first_stage": False, "use_late_interaction": False}
    return gpu.build(arguments.hidden_size, arguments.similarity_size, 256, arguments.seed, **config)


def encode(model: TVRNModel, arguments: argparse.Namespace, captions: int):
    images = model.encode_images(**gpu.random_images(arguments.images, 6, 256, "cpu", arguments.seed))
    return images, model.encode_texts(**gpu.random_texts(captions, arguments.words, "cpu", arguments.seed))


def loop_over_captions(
    model: TVRNModel, images, contexts: Tensor, texts, text_contexts: Tensor, inside: bool
) -> Tensor:
    """The field's way: one caption after the other, a block of images at once, float32."""
    columns = []
    for k in range(len(texts)):
        caption = texts.select([k]).trim()
        words = caption.words.shape[1]
        blocks = []
        for start in range(0, len(images), IMAGE_BLOCK):
            rows = slice(start, start + IMAGE_BLOCK)
            block = images.select(rows)
            keys, queries = block.context_keys, caption.context_queries.expand(len(block), -1, -1)
            if inside:
                keys = model.attention.key(contexts[rows])
                queries = model.attention.query(
                    text_contexts[k : k + 1, :words].expand(len(block), -1, -1).contiguous()
                )
            blocks.append(score_caption(model, block, caption, keys, queries))
        columns.append(torch.cat(blocks))
    return torch.stack(columns, dim=1)


def score_caption(model: TVRNModel, images, caption, keys: Tensor, queries: Tensor) -> Tensor:
    """One caption against a block of images, written plainly."""
    config, pair = model.config, model.pair
    mask = torch.ones_like(caption.word_mask)
    alpha = model.attention.weights(keys @ queries.transpose(1, 2), mask, images.region_mask).transpose(1, 2)
    norm = (alpha * (alpha @ images.context_gram)).sum(dim=-1, keepdim=True).rsqrt()
    gate, carried = ((alpha @ images.context_values) * norm).chunk(2, dim=-1)
    words = normalize(caption.words + torch.sigmoid(caption.gates + gate) * carried)
    global_text = normalize((caption.word_weights.unsqueeze(-1) * words).sum(dim=1))
    affinity = normalize(F.leaky_relu(words @ images.refined_regions.transpose(1, 2), config.leaky_slope), dim=1)
    beta = masked_softmax(
        config.attention_scale * affinity + images.refined_region_saliency[:, None],
        images.refined_region_mask[:, None],
        dim=-1,
    )
    contexts = normalize(beta @ images.refined_regions)
    saliency = (config.attention_scale * (words @ images.global_vector.unsqueeze(-1)).squeeze(-1)).softmax(dim=-1)
    local = normalize(pair.local_similarity((contexts - words) ** 2))
    overall = normalize(pair.global_similarity((images.global_vector - global_text) ** 2))
    nodes = torch.cat([overall.unsqueeze(1), local], dim=1)
    weights = torch.cat([torch.ones(len(images), 1), saliency * words.shape[1]], dim=1)
    weights = weights * torch.sigmoid(pair.head.gate(nodes)).squeeze(-1)
    return pair.head.logit((weights.unsqueeze(-1) * nodes).sum(dim=1) / weights.sum(dim=1, keepdim=True)).squeeze(-1)


def median_seconds(function, repeats: int, clock: Callable[[], float]) -> tuple[float, Tensor]:
    result = function()
    times = []
    for _ in range(repeats):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times), result


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> None:
    say_origin(arguments)
    model = build(arguments)
    keep_freed_memory()
    images, texts = encode(model, arguments, arguments.captions)
    contexts, text_contexts = _contexts(model, images, texts)
    few = texts.select(slice(0, arguments.loop_captions))
    clock = (lambda: time.process_time() / arguments.threads) if arguments.cpu_time else time.perf_counter

    def seconds_of(function: Callable[[], object]) -> float:
        return median_seconds(function, arguments.repeats, clock)[0]

    shape, precisions = (2048, 1024, 1024), (torch.float32, torch.bfloat16)
    rates = {dtype: matrix_rate(seconds_of, dtype, "cpu", shape, arguments.products) / 1e9 for dtype in precisions}
    words = texts.word_mask.sum(dim=1).double().mean().item()
    sizes = {"words": words, "regions": 36, "hidden": arguments.hidden_size, "projection": 0}
    sizes["similarity"] = arguments.similarity_size
    flops = sum(operations({"refinement": "gate", "similarity_head": "saf"}, sizes).values())
    print(f"{arguments.threads} threads, {'CPU seconds by threads' if arguments.cpu_time else 'wall time'}")
    print(
        f"{flops / 1e6:.1f} MFLOP a pair at {words:.1f} words; matrix products: "
        + ", ".join(f"{str(dtype).removeprefix('torch.')} {rate:.0f} GFLOP/s" for dtype, rate in rates.items())
    )
    runs = {}
    for name, inside in (("loop+projections float32", True), ("loop float32", False)):
        seconds, scores = median_seconds(
            lambda inside=inside: loop_over_captions(model, images, contexts, few, text_contexts, inside),
            max(arguments.repeats // 2, 1),
            clock,
        )
        runs[name] = (seconds / scores.numel(), scores, torch.float32)
    runs |= _time_pairs(model, images, texts, arguments.repeats, clock)
    if arguments.compile:
        model.pair.compile(dynamic=True)
        compiled = _time_pairs(model, images, texts, arguments.repeats, clock)
        runs |= {f"compiled {name}": run for name, run in compiled.items()}
    _report(runs, rates, flops)
    _report_memory(arguments)


def _time_pairs(model: TVRNModel, images, texts, repeats: int, clock: Callable[[], float]) -> dict:
    """Seconds a pair, scores and dtype of both ways to call `match`, in both precisions, by name."""
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        sides = images.to(dtype), texts.to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            for name, function in (("pairs", model.match), ("pairs, a core a share", partial(match_on_cores, model))):
                seconds, scores = median_seconds(partial(function, *sides), repeats, clock)
                runs[f"{name} {str(dtype).removeprefix('torch.')}"] = (seconds / scores.numel(), scores, dtype)
    return runs


def _contexts(model: TVRNModel, images, texts) -> tuple[Tensor, Tensor]:
    """c^v and c^t again, which the encoded items hold only projected."""
    keys = images.context_keys.double().transpose(1, 2)
    contexts = torch.linalg.solve(model.attention.key.weight.double(), keys).transpose(1, 2)
    return contexts.float().contiguous(), model.attention(texts.words, texts.word_mask)


def _report(runs: dict, rates: dict, flops: float) -> None:
    slowest, reference = runs["loop+projections float32"][0], runs["loop float32"][1]
    print(f"{'':40}{'ms/pair':>9}{'GFLOP/s':>9}{'of GEMM':>9}{'× loop+proj.':>14}{'max |Δ|':>10}")
    for name, (seconds, scores, dtype) in runs.items():
        difference = (scores[:, : reference.shape[1]] - reference).abs().max().item()
        rate = flops / seconds / 1e9
        speed = f"{seconds * 1e3:9.4f}{rate:9.0f}{rate / rates[dtype]:9.0%}"
        print(f"{name:40}{speed}{slowest / seconds:14.1f}{difference:10.1e}")


def _report_memory(arguments: argparse.Namespace) -> None:
    """Peak resident memory of fresh processes: 4 times as many pairs may cost their scores, no more."""
    for factor in (1, 4):
        command = [sys.executable, __file__, "--memory-of", str(factor * arguments.captions)]
        for name in ("hidden_size", "similarity_size", "images", "threads"):
            command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peak = json.loads(output)
        print(f"{peak['pairs']:7d} pairs: {peak['scoring_mib']:.0f} MiB above the encoded gallery")


@torch.no_grad()
def measure_memory(arguments: argparse.Namespace) -> None:
    model = build(arguments)
    images, texts = encode(model, arguments, arguments.memory_of)
    keep_freed_memory()
    match_on_cores(model, images, texts.select(slice(0, 64)))  # the matrix library's own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far was the encoding's
    before = resident_bytes("VmRSS")
    scores = match_on_cores(model, images, texts)
    print(json.dumps({"pairs": scores.numel(), "scoring_mib": (resident_bytes("VmHWM") - before) / 2**20}))


if __name__ == "__main__":
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    measure_memory(arguments) if arguments.memory_of else measure(arguments)
