"""Everything worth knowing on a GPU, in one command and one JSON file: is it right there, and how fast is it?

    python examples/benchmarks/gpu.py --output gpu.json                    # under eight minutes on an H100
    python examples/benchmarks/gpu.py --output gpu.json --sections correctness pair_stage

Random features at real sizes; needs torch (2.11 or newer), numpy, pillow and transformers (5.17 or newer) alone,
nothing from the network and no data. Without a GPU it runs at small sizes on the CPU, which is how it is tested.

- `machine`: the card, versions, the rate of large matrix products in each precision, memory bandwidth;
- `correctness`: pair logits against the NumPy float64 reference (tests/reference.py) in float32, bfloat16 and
  float16, by autocast and by converted weights; the invariances; gradients against float64 on the CPU; training steps,
  also with float16's loss scaler; the scoring functions against the metrics of the whole matrix;
- `fused`: the fused kernels (Triton) against the plain path, milliseconds a pair of both, late interaction too (more
  of them: fused_kernels.py);
- `pair_stage`: milliseconds a pair at the paper's sizes, and the share of the measured rate of matrix products;
- `coco5k`: an exhaustive 5000 × 25,000 evaluation, bfloat16, in seconds;
- `training`: pairs a second of whole steps, batches of 128 and 512; `memory`: peaks against the chunk size;
- `towers`: images and captions a second; `search`: milliseconds a query in 100,000 items, with and without rerank;
- `compile`: `torch.compile` of the pair stage: equal to eager, seconds to compile, milliseconds a pair.

Each section stands in the file as soon as it is done; one that fails is named there with its traceback, and the rest
go on. The exit code is 1 if any failed or a check did not hold, else 0.
"""

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from origin import matrix_rate, say_origin
from pair_costs import operations
from torch import Tensor, nn

from modeling_tvrn import EncodedImages, EncodedTexts, TVRNConfig, TVRNModel, kernels
from modeling_tvrn.evaluation.provenance import commit
from modeling_tvrn.layers_tvrn import grid_boxes
from modeling_tvrn.metrics import retrieval_metrics
from modeling_tvrn.scoring import rank, score_matrix, search_then_rerank

VARIANTS = [
    {"refinement": refinement, "similarity_head": head} for refinement in ("gate", "gru") for head in ("saf", "sgr")
]
OTHERS = [{"use_text_refinement": False}, {"use_semantic_alignment": False}, {"use_late_interaction": False}]
# Relative errors ‖found − expected‖ / ‖expected‖ that rounding explains.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
HALVES = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is computed, on a GPU and (smaller) on a CPU."""

    gemm: int = 8192
    copied: int = 2**31
    hidden: int = 1024
    similarity: int = 256
    features: int = 2048
    regions: int = 6  # rows and columns of the grid
    words: int = 14  # mean; captions have between half and 1.5 times as many
    images: int = 64
    captions: int = 512
    gallery: tuple[int, int] = (5000, 25_000)
    batches: tuple[int, ...] = (128, 512)
    chunks: tuple[int, ...] = (512, 2048, 8192, 32_768)
    items: int = 100_000
    search_hidden: int = 256
    queries: int = 200
    shortlist: int = 128
    tower_batch: int = 256
    tower_layers: int | None = None  # all
    repeats: int = 5


SMALL = Sizes(
    gemm=128,
    copied=2**20,
    hidden=24,
    similarity=10,
    features=16,
    regions=2,
    words=4,
    images=6,
    captions=12,
    gallery=(20, 100),
    batches=(4,),
    chunks=(8, 32),
    items=300,
    search_hidden=16,
    queries=5,
    shortlist=8,
    tower_batch=1,
    tower_layers=1,
    repeats=1,
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=450, help="no further section begins after that many")
    return parser.parse_args()


# -- what sections share ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Bench:
    """The device, the sizes, and what was found out on the way.

    Attributes:
        rates: Operations a second of large matrix products, by dtype; filled by `machine`.
        failures: Checks that did not hold.
    """

    device: str
    sizes: Sizes
    rates: dict[torch.dtype, float] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device != "cpu":
            torch.get_device_module(self.device).synchronize()

    def seconds(self, function: Callable[[], Any], repeats: int | None = None) -> float:
        """Median, after a call that is not counted."""
        function()
        self.wait()
        taken = []
        for _ in range(repeats or self.sizes.repeats):
            started = time.perf_counter()
            function()
            self.wait()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def check(self, name: str, error: float, tolerance: float) -> float:
        """Note a relative error, and a failure if it is too large or no number; returns it."""
        if not error <= tolerance:
            self.failures.append(f"{name}: {error:.3g}, allowed {tolerance:.3g}")
            print(f"  FAILED {self.failures[-1]}", flush=True)
        return error

    def rate(self, dtype: torch.dtype) -> float:
        """`matrix_rate`, measured once."""
        if dtype not in self.rates:
            self.rates[dtype] = matrix_rate(self.seconds, dtype, self.device, (self.sizes.gemm,) * 3)
        return self.rates[dtype]

    @contextlib.contextmanager
    def peak(self) -> Iterator[dict[str, float]]:
        """MiB that tensors took at most, beyond what was there; nothing on a CPU."""
        found: dict[str, float] = {}
        if self.device == "cpu":
            yield found
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found["mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def build(hidden: int, similarity: int, features: int, seed: int = 0, **config: Any) -> TVRNModel:
    """A model of random weights with words of its own."""
    torch.manual_seed(seed)
    settings = {"vocab_size": 1000, "word_embedding_size": min(300, hidden), "projection_size": hidden} | config
    return TVRNModel(
        TVRNConfig(hidden_size=hidden, similarity_size=similarity, region_feature_size=features, **settings)
    ).eval()


def random_images(count: int, grid: int, features: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Region features drawn on the device; the last image of several misses two regions."""
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.ones(count, grid * grid, dtype=torch.bool, device=device)
    if count > 1:
        mask[-1, -2:] = False
    return {
        "region_features": torch.rand(count, grid * grid, features, generator=generator, device=device),
        "region_boxes": grid_boxes(grid, grid).to(device).expand(count, -1, -1),
        "region_mask": mask,
    }


def random_texts(count: int, words: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """Word ids of captions between half and 1.5 times `words` long."""
    generator = torch.Generator().manual_seed(seed)
    high = words + words // 2
    lengths = torch.randint(max(words // 2, 1), high + 1, (count,), generator=generator)
    mask = torch.arange(high) < lengths[:, None]
    ids = torch.randint(1, 1000, (count, high), generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@torch.no_grad()
def gallery(model: TVRNModel, images: int, texts: int, sizes: Sizes, device: str, dtype: torch.dtype) -> tuple:
    """So many encoded images and texts, encoded in batches, held in `dtype` on the device."""
    parts: tuple[list, list] = ([], [])
    features = model.config.region_feature_size
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        for start in range(0, images, 1000):
            given = random_images(min(1000, images - start), sizes.regions, features, device, start)
            parts[0].append(model.encode_images(**given).to(dtype))
        for start in range(0, texts, 5000):
            parts[1].append(
                model.encode_texts(**random_texts(min(5000, texts - start), sizes.words, device, start)).to(dtype)
            )
    return EncodedImages.cat(parts[0]), EncodedTexts.cat(parts[1])


def name_of(variant: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" if isinstance(value, bool) else str(value) for key, value in variant.items())


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device, dtype if dtype != torch.float32 else torch.bfloat16, enabled=dtype != torch.float32)


# -- sections ---------------------------------------------------------------------------------------------------------


def machine(bench: Bench) -> dict[str, Any]:
    """What it is, and its two ceilings."""
    size = bench.sizes.copied
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).random_()
    target = torch.empty_like(source)
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_tb_a_second": 2 * size / bench.seconds(lambda: target.copy_(source)) / 1e12,
        "tflops": {short(dtype): bench.rate(dtype) / 1e12 for dtype in (torch.float32, *HALVES)},
    }
    if bench.device != "cpu":
        card = torch.cuda.get_device_properties(bench.device)
        found |= {"card": card.name, "gib": card.total_memory / 2**30, "cuda": torch.version.cuda}
    return found


def correctness(bench: Bench) -> dict[str, Any]:
    """Against float64, in every precision."""
    found: dict[str, Any] = {}
    torch.backends.cudnn.allow_tf32 = False  # torch's default for recurrent layers, which costs three digits
    for variant in [*VARIANTS, *({**VARIANTS[0], **other} for other in OTHERS)]:
        name = name_of(variant)
        model = build(48, 20, 32, **variant)
        with torch.no_grad():  # components weigh something, so that each is seen
            for part, weight in model.pair.named_parameters():
                if part.endswith("_weight") and weight.shape == (1,):
                    weight.fill_(1.0)
        images, texts = random_images(6, 3, 32, "cpu"), random_texts(10, 6, "cpu")
        expected = reference_logits(model, images, texts)
        found[name] = logits_in_every_precision(bench, name, model, images, texts, expected)
        found[name] |= invariances(bench, name, model, images, texts)
        found[name] |= gradients(bench, name, model, images, texts)
    found["training"] = training_steps(bench)
    found["scoring"] = scoring(bench)
    return found


def reference_logits(model: TVRNModel, images: dict[str, Tensor], texts: dict[str, Tensor]) -> Tensor:
    """By the NumPy float64 reference, one pair after the other; by the model in float64 where it is not here."""
    path = Path(__file__).parents[2] / "tests/reference.py"
    if not path.is_file():
        return on(model, "cpu", torch.float64, images, texts)
    spec = importlib.util.spec_from_file_location("tvrn_reference", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    oracle = module.Reference({key: value.numpy() for key, value in model.state_dict().items()}, model.config)
    kept = images["region_mask"]
    sides = [
        oracle.image(
            images["region_features"][i][kept[i]].double().numpy(), images["region_boxes"][i][kept[i]].double().numpy()
        )
        for i in range(len(kept))
    ]
    mask = texts["attention_mask"]
    captions = [oracle.text(ids=texts["input_ids"][k][mask[k]].tolist()) for k in range(len(mask))]
    return torch.tensor([[oracle.pair(image, caption) for caption in captions] for image in sides])


@torch.no_grad()
def on(
    model: TVRNModel, device: str, dtype: torch.dtype, images: dict[str, Tensor], texts: dict[str, Tensor]
) -> Tensor:
    """Pair logits of a copy of the model there, its weights in that dtype."""
    moved = copy.deepcopy(model).to(device, dtype)
    given = {key: value.to(device) for key, value in (images | texts).items()}
    given["region_features"] = given["region_features"].to(dtype)
    given["region_boxes"] = given["region_boxes"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return moved(**given).logits_per_image


def logits_in_every_precision(
    bench: Bench, name: str, model: TVRNModel, images: dict[str, Tensor], texts: dict[str, Tensor], expected: Tensor
) -> dict[str, float]:
    found = {}
    for dtype, tolerance in TOLERANCE.items():
        error = relative(on(model, bench.device, dtype, images, texts), expected)
        found[f"logits {short(dtype)}"] = bench.check(f"{name}, logits, {short(dtype)}", error, tolerance)
    for dtype in HALVES:
        with autocast(bench.device, dtype):
            error = relative(on(model, bench.device, torch.float32, images, texts), expected)
        label = f"logits, autocast to {short(dtype)}"
        found[label] = bench.check(f"{name}, {label}", error, TOLERANCE[dtype])
    return found


@torch.no_grad()
def invariances(
    bench: Bench, name: str, model: TVRNModel, images: dict[str, Tensor], texts: dict[str, Tensor]
) -> dict[str, float]:
    """A pair's logit is its own: alone, in other company, with more padding, in chunks of any size."""
    found = {}
    model = copy.deepcopy(model).to(bench.device)
    for dtype, tolerance in TOLERANCE.items():
        with autocast(bench.device, dtype):
            sides = (
                model.encode_images(**moved(images, bench.device)),
                model.encode_texts(**moved(texts, bench.device)),
            )
            whole = model.match(*sides)
            alone = torch.stack(
                [
                    torch.cat(
                        [model.match(sides[0].select([i]), sides[1].select([k]))[0] for k in range(len(sides[1]))]
                    )
                    for i in range(len(sides[0]))
                ]
            )
            wider = {key: nn.functional.pad(value, (0, 5)) for key, value in texts.items()}
            padded = model.match(sides[0], model.encode_texts(**moved(wider, bench.device)))
            order = torch.arange(len(sides[0]) - 1, -1, -1)
            turned = model.match(sides[0].select(order), sides[1]).flip(0)
            others = {"alone": alone, "padded": padded, "turned": turned}
            others |= {f"chunks of {size}": model.match(*sides, chunk_size=size) for size in (1, 7)}
        error = max(relative(other, whole) for other in others.values())
        label = f"invariances {short(dtype)}"
        found[label] = bench.check(f"{name}, {label}", error, tolerance)
    return found


def moved(inputs: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in inputs.items()}


def gradients(
    bench: Bench, name: str, model: TVRNModel, images: dict[str, Tensor], texts: dict[str, Tensor]
) -> dict[str, float]:
    """Of a smooth loss, every weight's in one vector, against float64 on the CPU."""
    captions = {key: value[: len(images["region_mask"])] for key, value in texts.items()}

    def gradient(device: str, dtype: torch.dtype, weights: torch.dtype) -> Tensor:
        own = copy.deepcopy(model).to(device, weights).train()  # a GPU's recurrent layers go back in no other mode
        for module in own.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        own.config.matching_loss_weight, own.config.pair_contrastive_loss_weight = 0.0, 1.0
        given = moved(images | captions, device)
        given["region_features"] = given["region_features"].to(weights)
        given["region_boxes"] = given["region_boxes"].to(weights)
        with autocast(device, dtype) if dtype != torch.float64 else contextlib.nullcontext():
            loss = own(**given, return_loss=True).loss
        loss.backward()
        return torch.cat([weight.grad.double().flatten() for weight in own.parameters() if weight.grad is not None])

    expected = gradient("cpu", torch.float64, torch.float64)
    found = {}
    for dtype, tolerance in GRADIENT_TOLERANCE.items():
        label = f"gradients {short(dtype)}"
        error = relative(gradient(bench.device, dtype, torch.float32), expected)
        found[label] = bench.check(f"{name}, {label}", error, tolerance)
    return found


def training_steps(bench: Bench) -> dict[str, Any]:
    """Thirty steps on one batch in each precision: the loss falls, nothing is NaN."""
    found = {}
    for dtype in TOLERANCE:
        model = build(48, 20, 32).to(bench.device).train()
        given = moved(random_images(12, 3, 32, "cpu") | random_texts(12, 6, "cpu"), bench.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        scaler = torch.amp.GradScaler(bench.device, enabled=dtype == torch.float16)
        losses = []
        for _ in range(30):
            with autocast(bench.device, dtype):
                loss = model(**given, return_loss=True).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
        bench.check(f"training in {short(dtype)}, last loss over first", losses[-1] / losses[0], 0.8)
        found[short(dtype)] = {"first": losses[0], "last": losses[-1], "scale": scaler.get_scale()}
    return found


def scoring(bench: Bench) -> dict[str, float]:
    """`rank`, `score_matrix` and a shortlist of everything against the metrics of `match`'s own matrix."""
    model = build(48, 20, 32).to(bench.device)
    sizes = dataclasses.replace(bench.sizes, regions=3, words=6)
    images, texts = gallery(model, 40, 200, sizes, bench.device, torch.float32)
    rows = torch.arange(40).repeat_interleave(5)
    with torch.no_grad():
        whole = model.match(images, texts)
    expected = retrieval_metrics(whole, rows).as_dict()
    found = {
        "score_matrix": relative(score_matrix(model, images, texts, progress=False), whole),
        # Budgets so small that there are many blocks.
        "rank": _most_apart(rank(model, images, texts, rows, progress=False, memory_budget=1e-4), expected),
        "shortlist of all": _most_apart(
            search_then_rerank(model, images, texts, rows, shortlist_size=200, progress=False), expected
        ),
    }
    for name, error in found.items():
        bench.check(f"scoring, {name}", error, 1e-4 if name == "score_matrix" else 0.0)
    return found


def _most_apart(metrics: Any, expected: dict[str, float]) -> float:
    found = metrics.as_dict()
    return max(abs(found[name] - value) for name, value in expected.items())


def pair_stage(bench: Bench) -> dict[str, Any]:
    """Milliseconds a pair, and the share of what matrix products reach on the same device in the same run."""
    found = {}
    for variant, dtype in itertools.product(VARIANTS, (torch.float32, torch.bfloat16)):
        model, sides = _paper_pairs(bench, dtype, **variant)
        found[f"{name_of(variant)}, {short(dtype)}"] = _time_pairs(bench, model, sides, dtype, variant)
    model, sides = _paper_pairs(bench, torch.bfloat16, use_reasoning=False, use_late_interaction=True)
    found["late interaction, bfloat16"] = _time_pairs(bench, model, sides, torch.bfloat16, None)
    return found


def _paper_pairs(bench: Bench, dtype: torch.dtype, **variant: Any) -> tuple[TVRNModel, tuple]:
    sizes = bench.sizes
    config = {"use_first_stage": False, "use_late_interaction": False} | variant
    if not config["use_late_interaction"] and not config.get("use_reasoning", True):
        raise ValueError("nothing to score")
    model = build(sizes.hidden, sizes.similarity, 256 if sizes.hidden > 256 else sizes.features, **config)
    model = model.to(bench.device)
    return model, gallery(model, sizes.images, sizes.captions, sizes, bench.device, dtype)


@torch.no_grad()
def _time_pairs(
    bench: Bench, model: TVRNModel, sides: tuple, dtype: torch.dtype, variant: dict[str, Any] | None
) -> dict[str, float]:
    pairs = len(sides[0]) * len(sides[1])
    with autocast(bench.device, dtype):
        seconds = bench.seconds(lambda: model.match(*sides)) / pairs
    found = {"ms_a_pair": seconds * 1e3}
    if variant is not None:
        flops = sum(operations({"use_late_interaction": False} | variant, _pair_sizes(bench.sizes, sides)).values())
        found |= {"mflop_a_pair": flops / 1e6, "of_matrix_products": flops / seconds / bench.rate(dtype)}
    return found


def _pair_sizes(sizes: Sizes, sides: tuple) -> dict[str, Any]:
    words = sides[1].word_mask.sum(dim=1).double().mean().item()
    return {
        **{"words": words, "regions": sizes.regions**2, "hidden": sizes.hidden, "similarity": sizes.similarity},
        "projection": sizes.hidden,
    }


@torch.no_grad()
def fused(bench: Bench) -> dict[str, Any]:
    """The fused kernels: the plain path's logits, at small odd sizes and the paper's, and milliseconds a pair."""
    if not kernels.available(bench.device):
        return {"skipped": f"no Triton for {bench.device}"}
    found: dict[str, Any] = {}
    for variant in [VARIANTS[0], VARIANTS[1], *({**VARIANTS[0], **other} for other in OTHERS[:2])]:
        model = build(44, 20, 32, **variant).to(bench.device)
        images = model.encode_images(**random_images(7, 3, 32, bench.device))
        texts = model.encode_texts(**random_texts(30, 6, bench.device))
        for dtype in (torch.float32, torch.bfloat16):  # each compiles a program of its own
            label = f"{name_of(variant)}, {short(dtype)}"
            found[label] = _fused_errors(bench, label, model, (images.to(dtype), texts.to(dtype)), dtype)
    model, sides = _paper_pairs(bench, torch.bfloat16, use_late_interaction=True)
    label = "paper's sizes, bfloat16"
    found[label] = _fused_errors(bench, label, model, sides, torch.bfloat16)
    pairs = len(sides[0]) * len(sides[1])
    with autocast(bench.device, torch.bfloat16):
        for part, plain, quick in _both_ways(model, sides):
            found[label] |= {
                f"{part}, plain, ms_a_pair": bench.seconds(plain) * 1e3 / pairs,
                f"{part}, fused, ms_a_pair": bench.seconds(quick) * 1e3 / pairs,
            }
    return found


def _both_ways(model: TVRNModel, sides: tuple) -> list[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """Reasoning and late interaction of all pairs, plain and fused; captions in blocks of like lengths, as `match`."""
    images, texts = sides
    order = torch.argsort(texts.word_mask.sum(dim=1), stable=True)

    def blocks(function: Callable[[Any, Any], Tensor]) -> Tensor:
        columns = [function(images, texts.select(each).trim()) for each in order.split(32)]
        return torch.cat(columns, dim=1).index_select(1, torch.argsort(order))

    def reasoning(images: Any, texts: Any) -> Tensor:
        return model.pair(images, texts, model.attention, model.textual_refinement)

    return [
        ("reasoning", partial(blocks, reasoning), partial(blocks, partial(kernels.fused_reasoning, model))),
        (
            "late interaction",
            partial(blocks, model.pair.late_interaction),
            partial(blocks, partial(kernels.fused_late_interaction, model)),
        ),
    ]


def _fused_errors(bench: Bench, label: str, model: TVRNModel, sides: tuple, dtype: torch.dtype) -> dict[str, float]:
    found: dict[str, float] = {}
    with autocast(bench.device, dtype):
        for part, plain, quick in _both_ways(model, sides):
            error = relative(quick(), plain())
            found[f"{part}, error"] = bench.check(f"fused, {label}, {part}", error, TOLERANCE[dtype])
    return found


def coco5k(bench: Bench) -> dict[str, Any]:
    """Every pair of COCO's 5K test split in bfloat16, both directions ranked."""
    sizes, found = bench.sizes, {}
    images, texts = sizes.gallery
    rows = torch.arange(images).repeat_interleave(texts // images)
    for name, config in (
        ("reasoning", {"use_late_interaction": False}),
        ("late interaction", {"use_reasoning": False}),
    ):
        model = build(sizes.hidden, sizes.similarity, 256 if sizes.hidden > 256 else sizes.features, **config)
        model = model.to(bench.device)
        started = time.perf_counter()
        sides = gallery(model, images, texts, sizes, bench.device, torch.bfloat16)
        bench.wait()
        encoded = time.perf_counter()
        with bench.peak() as peak:
            rank(model, *sides, rows, dtype=torch.bfloat16, progress=False)
            bench.wait()
        found[name] = {"encoding_seconds": encoded - started, "ranking_seconds": time.perf_counter() - encoded} | peak
        del sides
    return found


def training(bench: Bench) -> dict[str, Any]:
    """Pairs a second of whole steps in bfloat16, random regions and words, and their peaks."""
    sizes, found = bench.sizes, {}
    for batch, level in itertools.product(sizes.batches, ("full", "late_interaction")):
        model = build(sizes.hidden, sizes.similarity, sizes.features, checkpoint_pair_chunks=True)
        model = model.to(bench.device).train()
        given = random_images(batch, sizes.regions, sizes.features, bench.device)
        given |= random_texts(batch, sizes.words, bench.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(model: TVRNModel = model, given: Any = given, optimizer: Any = optimizer, level: str = level) -> None:
            with autocast(bench.device, torch.bfloat16):
                loss = model(**given, level=level, return_loss=True).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad()

        with bench.peak() as peak:
            seconds = bench.seconds(step, 3)
        found[f"batch {batch}, {level}"] = {"seconds": seconds, "pairs_a_second": batch**2 / seconds} | peak
    return found


def memory(bench: Bench) -> dict[str, Any]:
    """What scoring takes beyond the galleries, and a training step in all, by the pairs scored at once."""
    sizes, found = bench.sizes, {}
    model, sides = _paper_pairs(bench, torch.bfloat16, checkpoint_pair_chunks=True)
    batch = sizes.batches[0]
    given = random_images(batch, sizes.regions, model.config.region_feature_size, bench.device)
    given |= random_texts(batch, sizes.words, bench.device)
    for chunk in sizes.chunks:
        with torch.no_grad(), autocast(bench.device, torch.bfloat16), bench.peak() as scored:
            model.match(*sides, chunk_size=chunk)
        model.config.pair_chunk_size = chunk
        with autocast(bench.device, torch.bfloat16), bench.peak() as trained:
            model.train()(**given, return_loss=True).loss.backward()
        model.zero_grad()
        model.eval()
        with torch.no_grad(), autocast(bench.device, torch.bfloat16):
            seconds = bench.seconds(lambda chunk=chunk: model.match(*sides, chunk_size=chunk), 3)
        found[f"{chunk} pairs"] = {
            "scoring_mib": scored.get("mib"),
            "training_mib": trained.get("mib"),
            "ms_a_pair": seconds * 1e3 / (len(sides[0]) * len(sides[1])),
        }
    return found


def towers(bench: Bench) -> dict[str, Any]:
    """Images and captions a second through dual encoders of the usual sizes, random weights."""
    layers = {} if bench.sizes.tower_layers is None else {"num_hidden_layers": bench.sizes.tower_layers}
    dual = {
        "CLIP ViT-B/32": transformers.CLIPConfig(
            vision_config={"patch_size": 32, **layers}, text_config={"bos_token_id": 0, "eos_token_id": 2, **layers}
        ),
        "SigLIP ViT-B/16": transformers.SiglipConfig(vision_config=dict(layers), text_config=dict(layers)),
    }
    found = {}
    for name, config in dual.items():
        with torch.device(bench.device):
            plain = transformers.AutoModel.from_config(config).eval()
        model = TVRNModel.from_dual_encoder(plain, use_late_interaction=False, use_reasoning=False).to(bench.device)
        side, batch = config.vision_config.image_size, bench.sizes.tower_batch
        pixels = torch.randn(batch, 3, side, side, device=bench.device)
        length = config.text_config.max_position_embeddings
        ids = torch.randint(3, 1000, (batch, length), device=bench.device)
        ids[:, -1] = 2
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad(), autocast(bench.device, dtype):
                seconds = bench.seconds(partial(model.encode_images, pixel_values=pixels), 3)
                text_seconds = bench.seconds(partial(model.encode_texts, input_ids=ids), 3)
            found[f"{name}, {short(dtype)}"] = {
                "images_a_second": batch / seconds,
                "captions_a_second": batch / text_seconds,
            }
    return found


@torch.no_grad()
def search(bench: Bench) -> dict[str, Any]:
    """One query after the other among many items: cosines and the best of them, then the pair score of these."""
    sizes = bench.sizes
    model = build(sizes.search_hidden, max(sizes.search_hidden // 4, 4), 64).to(bench.device)
    images, texts = gallery(model, sizes.items, sizes.queries, sizes, bench.device, torch.bfloat16)
    embeds = images.embeds.float()
    taken: dict[str, list[float]] = {"shortlist": [], "rerank": []}
    with autocast(bench.device, torch.bfloat16):
        for number in range(sizes.queries):
            query = texts.select([number])
            bench.wait()
            started = time.perf_counter()
            best = (embeds @ query.embeds[0].float()).topk(sizes.shortlist).indices
            bench.wait()
            listed = time.perf_counter()
            model.match(images.select(best), query).flatten().argsort(descending=True).cpu()
            taken["shortlist"].append(listed - started)
            taken["rerank"].append(time.perf_counter() - listed)
    found: dict[str, Any] = {"items": sizes.items, "shortlist_size": sizes.shortlist}
    for part, seconds in taken.items():
        low, high = np.percentile(np.array(seconds[len(seconds) // 10 :]) * 1e3, [50, 99])
        found |= {f"{part}_ms_p50": float(low), f"{part}_ms_p99": float(high)}
    return found


@torch.no_grad()
def compiled(bench: Bench) -> dict[str, Any]:
    """The pair stage through `torch.compile`, bfloat16: its first call, its speed, its logits."""
    model, sides = _paper_pairs(bench, torch.bfloat16)
    with autocast(bench.device, torch.bfloat16):
        eager = model.match(*sides)
        model.pair.compile(dynamic=True)
        started = time.perf_counter()
        error = relative(model.match(*sides), eager)
        bench.wait()
    seconds = time.perf_counter() - started
    bench.check("compiled against eager, bfloat16", error, TOLERANCE[torch.bfloat16])
    timed = _time_pairs(bench, model, sides, torch.bfloat16, VARIANTS[0])
    return {"first_call_seconds": seconds, "error": error} | timed


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "machine": machine,
    "correctness": correctness,
    "fused": fused,
    "coco5k": coco5k,
    "pair_stage": pair_stage,
    "training": training,
    "memory": memory,
    "towers": towers,
    "search": search,
    "compile": compiled,
}


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    arguments = parse_arguments()
    say_origin(arguments)
    bench = Bench(arguments.device, SMALL if arguments.device == "cpu" else Sizes())
    result: dict[str, Any] = {
        "commit": commit() or "unknown",
        "device": arguments.device,
        "sections": {},
        "seconds": {},
    }
    failed: list[str] = []
    started = time.perf_counter()
    for name in arguments.sections:
        begun = time.perf_counter()
        if begun - started > arguments.seconds:
            result["sections"][name] = "not run: no time was left"
            _write(arguments.output, result)
            continue
        print(f"{name} …", flush=True)
        try:
            result["sections"][name] = SECTIONS[name](bench)
        except Exception:
            result["sections"][name] = {"error": traceback.format_exc()}
            failed.append(name)
            print(traceback.format_exc(), flush=True)
        if bench.device != "cpu":
            torch.cuda.empty_cache()
        result["seconds"][name] = time.perf_counter() - begun
        result["failed"] = {"sections": failed, "checks": bench.failures}
        _write(arguments.output, result)
        print(f"  {result['seconds'][name]:.1f} s", flush=True)
    print(json.dumps(result["sections"], indent=1))
    return 1 if failed or bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
