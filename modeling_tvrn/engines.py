"""What runs a frozen vision tower on a CPU: torch as it is, torch with BatchNorm folded, or a graph by onnxruntime.

    from modeling_tvrn import engines

    engines.enable(model)  # "auto"; the command line does this with --tower-engine

Only the tower's own forward is taken over, float32 pixels to its output, in evaluation mode and without gradients;
what follows it (pooling, heads, late interaction) stays with torch. The module, its weights and so every fingerprint
stay what they are: outputs differ from torch's by rounding, about as they do between two machines, and caches and
indexes go from one engine to another as they go from one machine to another. How much they differ is measured on the
first photographs, said, and refused beyond `TOLERANCE`. Detectors and text towers stay with torch.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import importlib.util
import itertools
import logging
import math
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils import _pytree as pytree

from .encoded_tvrn import weights_state
from .storage.files import StorageError, cache_folder, check_file, file_entry, locked, publish_folder, read_json
from .storage.files import write_json as write_manifest
from .storage.fingerprints import digest, module_fingerprint

__all__ = ["ENGINES", "disable", "enable", "need_onnx", "used", "write_onnx"]

logger = logging.getLogger(__name__)

ENGINES = ("auto", "torch", "folded", "onnxruntime")
NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # absolute up to values of 1, relative to the largest value beyond
# Photographs of one size that "auto" leaves to torch: making a graph takes as long as some hundreds, reading one and
# comparing it as long as some ten.
MAKE_AFTER, READ_AFTER = 256, 32
TIMED, LEAST_GAIN = 16, 1.1  # photographs that "auto" times both ways, and how many times as fast is worth it
LARGEST_FILE = 1.8e9  # bytes; protobuf ends at 2 GiB, beyond that weights lie in a file of their own
CHECKS_OFF = "TRANSFORMERS_DISABLE_TORCH_CHECK"
GRAPH, MANIFEST, KIND = "tower.onnx", "graph.json", "tvrn-tower-graph"

Run = Callable[[Tensor], Any]


def enable(model: nn.Module, engine: str = "auto") -> None:
    """Let an engine run a model's vision tower from now on, wherever it applies; elsewhere torch does as before.

    Args:
        model: A `TVRNModel`, a dual encoder, or a vision tower itself.
        engine: "onnxruntime" (a graph, kept in the user's cache), "folded" (torch, channels last, each BatchNorm part
            of its convolution), "torch" (as it is), or "auto": onnxruntime where it is installed, else folded, from
            the photograph on from which it pays, if it is faster here; else torch.

    Raises:
        ValueError: If the engine is unknown, or named though there is no vision tower in float32 on a CPU. Later, from
            the tower: if a named engine can't run it, or differs from torch by more than `TOLERANCE`.
        ImportError: If it is "onnxruntime" and the extra is missing.

    Changed weights are noticed, but for values written through `weight.data`: call this again after those.
    """
    if engine not in ENGINES:
        raise ValueError(f"the tower engine is {engine!r}; expected one of {', '.join(ENGINES)}")
    if engine == "onnxruntime":
        need_onnx("the tower engine 'onnxruntime'")
    disable(model)
    tower = _vision_tower(model)
    refused = _why_not(tower)
    if refused and engine in ("folded", "onnxruntime"):
        raise ValueError(f"the tower engine is {engine!r}, but {refused}; leave it at 'auto' or 'torch'")
    if tower is not None and not refused and engine != "torch":
        tower.forward = _Engine(tower, engine)


def disable(model: nn.Module) -> None:
    """Leave a model's vision tower to torch again."""
    tower = _vision_tower(model)
    engine = tower.__dict__.get("forward") if tower is not None else None
    if tower is not None and isinstance(engine, _Engine):
        del tower.forward
        if engine.before is not None:  # a hook's
            tower.forward = engine.before


def used(model: Any) -> str:
    """What ran a model's vision tower last."""
    forward = getattr(_vision_tower(model), "forward", None)
    return forward.last if isinstance(forward, _Engine) else "torch"


def _vision_tower(model: Any) -> nn.Module | None:
    named = getattr(model, "tower", None)
    if callable(named) and not isinstance(named, nn.Module):  # a model's method, no layer of that name
        found: nn.Module | None = named("vision")
        return found
    return getattr(model, "vision_model", None) or model


def _why_not(tower: nn.Module | None) -> str | None:
    if tower is None:
        return "this model has no vision tower (detectors stay with torch)"
    kinds = {(weight.device.type, str(weight.dtype).removeprefix("torch.")) for weight in tower.parameters()}
    if others := sorted(kinds - {("cpu", "float32")}):
        return f"the vision tower has weights in {others[0][1]} on {others[0][0]}, where engines take float32 on cpu"
    return None


class _Engine:
    """In place of a tower's `forward`: runs what it can, and passes on what it can't."""

    def __init__(self, tower: nn.Module, engine: str) -> None:
        self.tower, self.engine, self.last = tower, engine, "torch"
        self.name = engine if engine != "auto" else "folded" if _missing() else "onnxruntime"
        self.before = tower.__dict__.get("forward")
        self.plain = self.__wrapped__ = tower.forward  # where `inspect` finds the arguments
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.runs: dict[tuple[int, ...], Run | None] = {}
        self.weights: list[tuple[int, int]] = []
        self.folders: dict[tuple[int, ...], Path] = {}

    def __reduce__(self) -> Any:
        # A copy of the tower is left to torch.
        return getattr, (self.tower, "forward") if self.before is None else (self.before, "__call__")

    def __call__(self, *args: Any, **given: Any) -> Any:
        pixels: Any = given.get("pixel_values", args[0] if args else None)
        run = self._run(pixels) if len(args) < 2 and self._applies(pixels, given) else None
        self.last = "torch" if run is None else self.name
        return self.plain(*args, **given) if run is None else run(pixels)

    def _applies(self, pixels: Any, given: dict[str, Any]) -> bool:
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        asked = {k: v for k, v in given.items() if k != "pixel_values" and v is not None and v is not False}
        if given.get("return_dict") is False or asked.keys() - {"return_dict"} or self.tower.training:
            return False
        config = getattr(self.tower, "config", None)
        if any(getattr(config, name, False) for name in ("output_hidden_states", "output_attentions")):
            return False
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or _why_not(self.tower) is not None:
            return False
        return pixels.dtype == torch.float32 and pixels.device.type == "cpu" and len(pixels) > 0

    def _run(self, pixels: Tensor) -> Run | None:
        """What runs pixels of that size; None: torch does."""
        weights = weights_state(self.tower.state_dict().values())
        if any(version < 0 for _, version in weights):  # made in inference mode: nobody knows when they change
            return None
        if weights != self.weights:
            self.weights = weights
            self.runs.clear()
            self.folders.clear()
        shape = tuple(pixels.shape[1:])
        if shape not in self.runs:
            self.seen[shape] += len(pixels)
            if not self._pays(shape):
                return None
            # In inference mode nothing can be exported.
            with torch.inference_mode(False), torch.no_grad():
                self.runs[shape] = self._checked(pixels[:TIMED].clone())
        return self.runs[shape]

    def _pays(self, shape: tuple[int, ...]) -> bool:
        if self.engine != "auto":
            return True
        if self.seen[shape] < READ_AFTER:
            return False
        try:
            is_made = self.name == "folded" or self._folder(shape).is_dir()
        except (OSError, RuntimeError) as error:  # no home, or one that can't be read
            logger.info("the vision tower stays with torch, since there is no cache for graphs: %s", error)
            self.runs[shape] = None
            return False
        return is_made or self.seen[shape] >= MAKE_AFTER

    def _checked(self, pixels: Tensor) -> Run | None:
        """The engine for pixels of that size, compared with torch on one or two photographs."""
        kind = getattr(getattr(self.tower, "config", None), "model_type", type(self.tower).__name__)
        try:
            pair = torch.cat([pixels[:2], pixels[:2]])[:2]
            output = self.plain(pixel_values=pair)
            run = self._folded() if self.name == "folded" else self._graph(pair, output)
            # A graph may have taken the number of photographs for a constant.
            found = [*_differences(output, run(pair)), *_differences(self.plain(pixel_values=pair[:1]), run(pair[:1]))]
            worst = max(found, key=lambda each: (math.isnan(each), each))
            if not worst <= TOLERANCE:  # NaN is not
                raise ValueError(f"it differs from torch by {worst:.1e}, more than {TOLERANCE:g}")
            gain = self._gain(run, pixels) if self.engine == "auto" else LEAST_GAIN
            if gain < LEAST_GAIN:
                raise ValueError(f"{self.name} takes {1 / gain:.1f} times as long here")
        except Exception as error:  # whatever exporters raise, a user can do one thing about it
            reason = " ".join(str(error).split())[:300]
            if self.engine != "auto":
                raise ValueError(
                    f"the vision tower {kind!r} can't be run by {self.engine!r}: {reason}; leave the tower engine at "
                    "'auto' or 'torch'"
                ) from error
            logger.info("the vision tower %r stays with torch: %s", kind, reason)
            return None
        size = "×".join(str(length) for length in pixels.shape[2:])
        logger.info("vision tower %r at %s by %s: differs from torch by %.1e", kind, size, self.name, worst)
        return run

    def _gain(self, run: Run, pixels: Tensor) -> float:
        """How many times as fast as torch it is here: products of matrices differ by processor and number of rows."""
        best = {way: float("inf") for way in (lambda pixels: self.plain(pixel_values=pixels), run)}
        for way in [*best, *best]:
            started = time.perf_counter()
            way(pixels)
            best[way] = min(best[way], time.perf_counter() - started)
        plain, engine = best.values()
        return plain / engine

    def _folded(self) -> Run:
        folded = _fold(self.tower)
        return lambda pixels: folded(pixel_values=pixels.contiguous(memory_format=torch.channels_last))

    def _folder(self, shape: tuple[int, ...]) -> Path:
        """Of the graph for pixels of that shape, named by all that it computes."""
        if shape not in self.folders:
            tower = module_fingerprint(self.tower, defaults=True)
            kind = tower.get("config", {}).get("model_type", "tower")
            name = f"{kind}-{'x'.join(map(str, shape))}-{digest(tower)[:16]}"
            self.folders[shape] = cache_folder("graphs") / name
        return self.folders[shape]

    def _graph(self, pixels: Tensor, output: Any) -> Run:
        folder = self._folder(tuple(pixels.shape[1:]))
        leaves, structure = pytree.tree_flatten(output)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise ValueError(f"its output, a {type(output).__name__}, holds something else than tensors")
        with locked(folder.with_name(f"{folder.name}.lock"), wait=True):
            if not _is_valid(folder):
                logger.info("making the graph of a vision tower for onnxruntime, once: %s", folder)
                _make_graph(_Leaves(self.tower, self.plain), pixels, folder)
            session = _session(folder / GRAPH)

        def run(pixels: Tensor) -> Any:
            found = session.run(None, {"pixels": pixels.detach().contiguous().numpy()})
            return pytree.tree_unflatten([torch.from_numpy(array) for array in found], structure)

        return run


def _differences(wanted: Any, found: Any) -> list[float]:
    """The largest of each output, absolute up to values of 1 and relative to its largest value beyond."""
    pairs = list(zip(pytree.tree_leaves(wanted), pytree.tree_leaves(found), strict=True))
    for left, right in pairs:
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            raise ValueError(f"it gives {tuple(right.shape)} in {right.dtype} for {tuple(left.shape)} in {left.dtype}")
    return [float((left - right).abs().max() / left.abs().max().clamp(min=1.0)) for left, right in pairs]


def _fold(tower: nn.Module) -> Any:
    """A copy, channels last, in which a convolution does what the BatchNorm registered after it did."""
    copied: Any = copy.deepcopy(tower)
    count = 0
    for parent in list(copied.modules()):
        for (name, first), (after, second) in itertools.pairwise(list(parent.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(first, second))
                setattr(parent, after, nn.Identity())
                count += 1
    if not count:
        raise ValueError(
            'it has no BatchNorm to fold into convolutions; onnxruntime takes it: pip install "modeling-tvrn[export]"'
        )
    return copied.to(memory_format=torch.channels_last)


# -- graphs ----------------------------------------------------------------------------------------------------------


def _missing() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def need_onnx(what: str) -> None:
    """Refuse what ONNX is needed for where the extra is missing.

    Raises:
        ImportError: With the command that installs it.
    """
    if missing := _missing():
        raise ImportError(f'{what} needs {", ".join(missing)}: pip install "modeling-tvrn[export]"')


class _Leaves(nn.Module):
    """A tower whose input and output are dictionaries of tensors."""

    def __init__(self, tower: nn.Module, plain: Callable[..., Any]) -> None:
        super().__init__()
        self.tower, self.plain = tower, plain

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = pytree.tree_leaves(self.plain(pixel_values=inputs["pixels"]))
        return {f"output_{number}": leaf for number, leaf in enumerate(leaves)}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "onnxscript", "onnxruntime")}


def _is_valid(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        manifest = read_json(folder / MANIFEST, KIND)
        if (before := manifest["made_with"]) != _versions():
            changed = [f"{k} {before.get(k)}, now {v}" for k, v in _versions().items() if before.get(k) != v]
            raise StorageError(folder, f"made with other versions: {'; '.join(changed)}")
        for name, entry in manifest["files"].items():
            check_file(folder / name, entry)
    except StorageError as error:
        logger.info("a graph of a vision tower is made again, since %s is %s", error.path, error.problem)
        return False
    return True


def _make_graph(module: nn.Module, pixels: Tensor, folder: Path) -> None:
    for left in folder.parent.glob(f".{folder.name}-*"):  # of a kill
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
        whole = Path(aside) / folder.name
        whole.mkdir()
        write_onnx(module, {"pixels": pixels}, {"pixels": {0: "images"}}, whole / GRAPH)
        files = {path.name: file_entry(path) for path in whole.iterdir()}
        write_manifest(whole / MANIFEST, KIND, {"made_with": _versions(), "files": files})
        publish_folder(whole, folder)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would wait busily between two batches, on the cores that decode the next one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def write_onnx(
    module: nn.Module, inputs: dict[str, Tensor], axes: dict[str, dict[int, str]], path: Path
) -> dict[str, Tensor]:
    """Write a module that takes one dictionary of tensors and gives one as an ONNX file.

    Args:
        module: In evaluation mode.
        inputs: What it is traced with; open sizes above 1, all different.
        axes: For each input, the places of its open dimensions and their names.
        path: Of the file; beyond 1.8 GB weights lie in another beside it.

    Returns:
        What the module gives for the inputs.
    """
    # Whether a size of 1 works as well, which no exporter promises, is seen when the graphs are compared.
    shapes = {name: dict.fromkeys(places, torch.export.Dim.DYNAMIC) for name, places in axes.items()}
    weights = sum(weight.nbytes for weight in module.state_dict().values())
    with _quiet(), _unchecked():
        outputs = module(inputs)
        # Not left to torch.onnx.export, which would try another way and fix a size if this one fails.
        program = torch.export.export(module, (), {"inputs": inputs}, dynamic_shapes={"inputs": shapes}, strict=False)
        torch.onnx.export(
            program,
            f=path,
            dynamo=True,
            dynamic_shapes={"inputs": axes},
            input_names=list(inputs),
            output_names=list(outputs),
            external_data=weights > LARGEST_FILE,
            verbose=False,
        )
    return outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of what is none of a user's business (torchvision's operators, their own deprecations)."""
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [each.level for each in noisy]
    for each in noisy:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(noisy, levels, strict=True):
            each.setLevel(level)


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Without the checks of shapes in transformers' detectors: ONNX has no operator for them."""
    before = os.environ.get(CHECKS_OFF)
    os.environ[CHECKS_OFF] = "1"
    try:
        yield
    finally:
        del os.environ[CHECKS_OFF]
        if before is not None:
            os.environ[CHECKS_OFF] = before
