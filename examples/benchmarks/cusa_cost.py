"""What CUSA adds to a training step: without it, with cached teachers, and with live ones, steps taken in turn.

A TVRN recipe (any keys of examples/train.py), in each of its phases:

    python examples/benchmarks/cusa_cost.py tvrn --config examples/configs/flickr8k.yaml --steps 20 data=DATA \
        'regions=REGIONS/{split}' vision=VISION text=TEXT cusa_image_teacher=IMAGE cusa_text_teacher=TEXT

A dual encoder with live towers (any keys of the recipe `dual-encoder`); `--size base` builds CLIP ViT-B/32 with random
weights, where no checkpoint is at hand, `--live IMAGE TEXT` runs the teachers in every step beside it:

    python examples/benchmarks/cusa_cost.py dual --size small --steps 10 data=DATA cusa_image_teacher=… \
        cusa_text_teacher=… --live VISION TEXT

And the memory of a cache of a million vectors:

    python examples/benchmarks/cusa_cost.py memory --vectors 1000000 --width 768

CPU time is given, not wall time: other jobs do not count. On a GPU give --wall.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from origin import say_origin

from modeling_tvrn.teachers import StoreWriter, Teacher, TeacherCache
from modeling_tvrn.training import TrainingConfig
from modeling_tvrn.training.loop import Training

SIZES = {"small": (384, 6, 6), "base": (768, 12, 12)}  # hidden size, layers and heads of both towers


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tvrn", "dual", "memory"])
    parser.add_argument("--config", type=Path)
    parser.add_argument("--size", choices=SIZES, help="dual: random weights of this size, whatever dual_encoder is")
    parser.add_argument("--live", nargs=2, metavar=("IMAGE", "TEXT"), help="dual: teachers to run in every step")
    parser.add_argument("--steps", type=int, default=10, help="of each kind, after two that do not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def compare(steps: dict[str, Callable[[], Any]], arguments: argparse.Namespace, title: str) -> None:
    """Take a step of each kind in turn, and print the median seconds and the difference to the first kind."""
    clock = time.perf_counter if arguments.wall else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.steps + 2):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            started = clock()
            steps[name]()
            if number >= 2:
                seconds[name].append(clock() - started)
    base = statistics.median(next(iter(seconds.values())))
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{title}, {name}: {1000 * median:.1f} ms a step ({100 * (median / base - 1):+.1f} %)", flush=True)


def endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def steps_of(runs: dict[str, Training], number: int) -> dict[str, Callable[[], Any]]:
    """A step of a phase, by the name of the run that takes it."""
    steps = {}
    for name, run in runs.items():
        run._enter(run.phases[number])
        run.objective.train()
        batches = endless(run.loaders[number])
        steps[name] = lambda run=run, batches=batches: run._run_batch(next(batches))
    return steps


def tvrn(arguments: argparse.Namespace) -> None:
    teachers = [each for each in arguments.overrides if each.startswith("cusa")]
    others = [each for each in arguments.overrides if each not in teachers]
    runs = {}
    for name, keys in (("without CUSA", others), ("cached teachers", [*others, *teachers, "cusa=true"])):
        output = tempfile.mkdtemp()
        runs[name] = Training(TrainingConfig.from_yaml(arguments.config, [*keys, f"output_dir={output}"]))
    for number, phase in enumerate(runs["without CUSA"].phases):
        named, size = ", ".join(phase.config.train), phase.config.batch_size
        compare(steps_of(runs, number), arguments, f"TVRN, phase of {named}, {size} captions")


def dual(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        keys = [*arguments.overrides, f"output_dir={folder}/run"]
        if arguments.size is not None:
            keys.append(f"dual_encoder={random_clip(Path(folder), arguments.size, arguments.live)}")
        plain = [each for each in keys if not each.startswith("cusa")]
        runs = {
            "without CUSA": Training(TrainingConfig.from_yaml("dual-encoder", plain)),
            "cached teachers": Training(TrainingConfig.from_yaml("dual-encoder", [*keys, "cusa=true"])),
        }
        if arguments.live:
            runs["live teachers"] = Training(TrainingConfig.from_yaml("dual-encoder", [*keys, "cusa=true"]))
            runs["live teachers"].loaders[0].collate_fn = LiveCollator(runs["without CUSA"].collator, *arguments.live)
        compare(steps_of(runs, 0), arguments, f"dual encoder, {runs['without CUSA'].config.batch_size} pairs")


class LiveCollator:
    """What TeacherCollator does, with the teachers run on the batch."""

    def __init__(self, collator: Any, image_teacher: str, text_teacher: str) -> None:
        self.collator = collator
        self.image_teacher = Teacher.from_pretrained(image_teacher, "image")
        self.text_teacher = Teacher.from_pretrained(text_teacher, "text")

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return dict(self.collator(items)) | {
            "teacher_image_embeds": self.image_teacher([item["record"]["image"] for item in items]),
            "teacher_text_embeds": self.text_teacher([item["caption"] for item in items]),
            "teacher_ids": torch.tensor([item["row"] for item in items]),
        }


def random_clip(folder: Path, size: str, teachers: list[str] | None) -> Path:
    """CLIP of that size with random weights, saved with the text teacher's tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor, ViTImageProcessorPil

    if teachers is None:
        raise SystemExit("--size takes its tokenizer from the text teacher: give --live IMAGE TEXT")
    tokenizer = AutoTokenizer.from_pretrained(teachers[1], model_max_length=77, trust_remote_code=False)
    hidden, layers, heads = SIZES[size]
    tower = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    tower["intermediate_size"] = 4 * hidden
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 77, "pad_token_id": tokenizer.pad_token_id}
    text |= {"eos_token_id": tokenizer.sep_token_id, "bos_token_id": tokenizer.cls_token_id}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | {"image_size": 224, "patch_size": 32})
    CLIPModel(config).save_pretrained(folder / "clip")
    CLIPProcessor(ViTImageProcessorPil(), tokenizer).save_pretrained(folder / "clip")
    return folder / "clip"


def memory(arguments: argparse.Namespace) -> None:
    """Anonymous memory, which a cache holds for itself, and file pages, which the system takes back when it wants."""
    with tempfile.TemporaryDirectory() as folder:
        writer = StoreWriter(folder, {"teacher": {"modality": "text"}}, shard_size=50_000)
        for start in range(0, arguments.vectors, 50_000):
            ids = [f"{number}.jpg#0" for number in range(start, min(start + 50_000, arguments.vectors))]
            vectors = np.random.default_rng(start).normal(size=(len(ids), arguments.width)).astype(np.float16)
            writer.append(ids, {"teacher_embeds": vectors})
        writer.finish()
        del writer, vectors, ids
        report("before the cache is opened")
        cache = TeacherCache.load(folder)
        report(f"open, {len(cache):,} vectors of {cache.size}, {cache.store.bytes / 2**20:,.0f} MiB on disk")
        random = np.random.default_rng(0)
        started = time.process_time()
        for _ in range(200):
            cache[[f"{number}.jpg#0" for number in random.integers(arguments.vectors, size=256)]]
        report(f"after 200 batches of 256, {(time.process_time() - started) * 5:.2f} CPU ms each")


def report(when: str) -> None:
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    sizes = {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}
    print(f"{when}: anonymous {sizes['RssAnon']:,.0f} MiB, file pages {sizes['RssFile']:,.0f} MiB", flush=True)


def main() -> None:
    arguments = parse_arguments()
    say_origin(arguments)
    torch.set_num_threads(arguments.threads)
    {"tvrn": tvrn, "dual": dual, "memory": memory}[arguments.what](arguments)


if __name__ == "__main__":
    main()
