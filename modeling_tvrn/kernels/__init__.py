"""Fused GPU programs (Triton) for scoring pairs: reasoning and late interaction without a (pairs, words, …) tensor.

    from modeling_tvrn import kernels

    kernels.enable(model)  # the model's own `match` then uses them; `scoring` does this for models on a CUDA device

The plain pair stage writes the refined words T̃ of every pair, their differences and similarity vectors to memory and
reads them again. `reasoning` holds them on chip: a program takes one image and M = 128 rows, the words of a few
captions, and walks twice over the D columns, 32 at a time, because the weights of the regions need whole rows of T̃.

    α           from the raw affinities (an ordinary product, pairs × W × R), their norms and softmax on chip
    first pass  T̃ = t + σ(A t + α·gate) ∘ (α·carried); T̃·U, T̃·g^v, ‖T̃‖
    β, ω        on chip, ‖β U‖ from the Gram matrix
    second pass T̃ again; (‖T̃‖ ctx − T̃)², its product with W_l; Σ_j w_j T_j, written
    head        SAF leaves two numbers a pair; for SGR the normalised nodes are written

T̃ is computed a second time: kept in the L2 cache from one pass to the next it took as long or longer (H100; the log
of the benchmarks). The global node needs ‖g^t‖ first and is one row a pair: its product with W_g is left to the
library, over all pairs.

What bounds it on an H100, at D = 1024, S = 256, R = 36 in bfloat16, four captions of up to 16 words a program:

    operations  2·M·D·(6·64 + S) = 84 MFLOP a program, 21 a pair (13 of them not padding): 26 ns at 800 TFLOP/s
    L2 reads    t and A t twice 512 KB, gate and carried twice 288 KB, U twice 144 KB, W_l 512 KB: 1.5 MB a program,
                0.36 MB a pair: 66 ns at 5.5 TB/s. Captions are the fastest axis of the grid, so neighbours share the
                image; the 32 captions of a chunk are 2 MB, and W_l half of one: all of them stay in the 50 MB L2.
    memory      affinities 1 KB, Σ_j w_j T_j 2 KB, each written and read, and the global node's squares: about 12 KB,
                4 ns at 3 TB/s; the plain path's tensors of 28 KB are written and read about ten times, 190 ns
    on chip     255 registers of 128 threads, the S similarity vectors half of them. With 128 rows and eight warps W_l
                is read half as often; measured, 64 rows are faster, 137 ns a pair for 154.

So L2 traffic bounds it. `late_interaction` is a matrix product of 128 × 128 tiles with its
log-sum-exp on chip: 1 MFLOP a pair, 2.1 with padding (3 ns), 4 bytes written. These are bounds, not measurements:
`examples/benchmarks/fused_kernels.py` measures.

Not fused, and computed as ever: gradients, compiled or exported models, float64, `refinement="gru"` with textual
refinement, S above 512, more than 128 regions or 64 words. A failure to compile is said once, and the plain path goes
on.
"""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor

from ..encoded_tvrn import EncodedImages, EncodedTexts
from ..layers_tvrn import FragmentAttention, Gate, Recurrence, normalize
from ..pair_tvrn import PairMatching, PairStage

__all__ = ["FusedPairs", "available", "enable", "fused_late_interaction", "fused_reasoning"]

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
# How the reasoning is cut in half precision; benchmarks try others.
FAST = {"rows": 64, "columns": 32, "num_warps": 4, "num_stages": 3}
# Fewer pairs than this aren't worth the seconds that a program's first use takes to compile.
LEAST_PAIRS = 1024
MAX_WORDS, MAX_REGIONS, MAX_SIMILARITY = 64, 128, 512


def available(device: torch.device | str) -> bool:
    """Whether the programs can run there: Triton is installed, and it is a CUDA device (or Triton interprets)."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (interpreted or torch.device(device).type == "cuda") and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def enable(model: Any, least_pairs: int = LEAST_PAIRS, dtypes: tuple[torch.dtype, ...] = HALVES) -> bool:
    """Let a model's pair stage use the programs wherever they apply, and say whether it does.

    Args:
        model: A `TVRNModel`; anything else is left as it is.
        least_pairs: Blocks of fewer pairs are left to the plain path: a program takes seconds to compile on its first
            use (Triton keeps it on disk).
        dtypes: Of the items. In float32, without tensor cores, the programs take three times as long as the plain path
            (H100): it is left out unless named.
    """
    pair = getattr(model, "pair", None)
    # By what it has, not by its class: a model loaded by a checkpoint's own code has another one.
    if pair is None or not hasattr(pair, "fused") or not available(model.logit_scale.device):
        return False
    if pair.fused is None:
        pair.fused = FusedPairs(least_pairs, dtypes)
    return True


def fused_reasoning(model: PairMatching, images: EncodedImages, texts: EncodedTexts) -> Tensor:
    """The reasoning (i, t) of every image with every caption, as `PairStage.forward` gives it.

    Raises:
        ValueError: If the programs do not apply to the model, the items or the device.
    """
    refused = unsupported_reasoning(model.pair, images, texts, model.textual_refinement)
    if refused:
        raise ValueError(f"The reasoning can't be fused: {refused}; use model.match.")
    return reasoning(model.pair, images, texts, model.attention, model.textual_refinement)


def fused_late_interaction(model: PairMatching, images: EncodedImages, texts: EncodedTexts) -> Tensor:
    """Late interaction (i, t), as `PairStage.late_interaction` gives it.

    Raises:
        ValueError: If the programs do not apply to the model, the items or the device.
    """
    refused = unsupported_late_interaction(model.pair, images, texts)
    if refused:
        raise ValueError(f"Late interaction can't be fused: {refused}; use model.match.")
    return late_interaction(model.pair, images, texts)


class FusedPairs:
    """What a `PairStage` asks first: scores of a block, or None where the plain path is to compute them."""

    def __init__(self, least_pairs: int = LEAST_PAIRS, dtypes: tuple[torch.dtype, ...] = HALVES) -> None:
        self.least_pairs, self.dtypes = least_pairs, dtypes
        self.failed: set[str] = set()

    def _worth_it(self, name: str, images: EncodedImages, texts: EncodedTexts) -> bool:
        if texts.words is None or texts.words.dtype not in self.dtypes or name in self.failed:
            return False
        return len(images) * texts.words.shape[-3] >= self.least_pairs

    def reasoning(
        self,
        pair: PairStage,
        images: EncodedImages,
        texts: EncodedTexts,
        attention: FragmentAttention,
        refinement: Gate | Recurrence | None,
    ) -> Tensor | None:
        """(i, t) or None, as `PairStage.forward`."""
        if (
            _is_traced()
            or not self._worth_it("reasoning", images, texts)
            or unsupported_reasoning(pair, images, texts, refinement)
        ):
            return None
        try:
            return reasoning(pair, images, texts, attention, refinement)
        except Exception as error:
            self._give_up("reasoning", error)
            return None

    def late_interaction(self, pair: PairStage, images: EncodedImages, texts: EncodedTexts) -> Tensor | None:
        """(i, t) or None, as `PairStage.late_interaction`."""
        if _is_traced() or not self._worth_it("late interaction", images, texts):
            return None
        if unsupported_late_interaction(pair, images, texts):
            return None
        try:
            return late_interaction(pair, images, texts)
        except Exception as error:
            self._give_up("late interaction", error)
            return None

    def _give_up(self, name: str, error: Exception) -> None:
        """Anything may go wrong in a compiler on a card it does not know; memory that ran out is no such thing."""
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        self.failed.add(name)
        first = (str(error).strip() or "no message").splitlines()[0]
        warnings.warn(
            f"The fused {name} failed ({type(error).__name__}: {first}); the plain one computes it from here on.",
            stacklevel=2,
        )


def unsupported_reasoning(
    pair: PairStage, images: EncodedImages, texts: EncodedTexts, refinement: Gate | Recurrence | None
) -> str | None:
    """Why the reasoning of such items can't be fused, or None."""
    if images.refined_regions is None or texts.words is None or not hasattr(pair, "head"):
        return "the model or the items have no reasoning"
    if refinement is not None and pair.config.refinement != "gate":
        return 'refinement="gru" is a recurrence over the words of a pair'
    if pair.config.similarity_size > MAX_SIMILARITY:
        return f"similarity_size is {pair.config.similarity_size}, above {MAX_SIMILARITY}"
    return _unsupported(pair, images, texts)


def unsupported_late_interaction(pair: PairStage, images: EncodedImages, texts: EncodedTexts) -> str | None:
    """Why late interaction of such items can't be fused, or None."""
    if images.regions is None or texts.words is None or not pair.config.use_late_interaction:
        return "the model or the items have no late interaction"
    return _unsupported(pair, images, texts)


def _is_traced() -> bool:
    """Whether a graph is being made of the model, which must not keep this batch's sizes either."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def _unsupported(pair: PairStage, images: EncodedImages, texts: EncodedTexts) -> str | None:
    if _is_traced():
        return "the model is being compiled or exported"
    tensors = [*images.tensors().values(), *texts.tensors().values(), *pair.parameters()]
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        return "gradients are needed"
    assert texts.words is not None
    device = texts.words.device
    if not available(device):
        return f"Triton has no programs for {device}, or is not installed (pip install triton)"
    if any(value.device != device for value in tensors):
        return "not everything is on one device"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU has no tensor cores for bfloat16"
    fragments = (images.regions, images.refined_regions, images.context_values, texts.words, texts.gates)
    dtypes = {value.dtype for value in fragments if value is not None}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return f"the items' dtypes are {sorted(map(str, dtypes))}"
    if torch.bfloat16 in dtypes and device.type != "cuda":
        return "Triton's interpreter multiplies the bits of bfloat16 as if they were integers"
    masks = [mask for mask in (images.region_mask, images.refined_region_mask) if mask is not None]
    if max(mask.shape[1] for mask in masks) > MAX_REGIONS:
        return f"there are more than {MAX_REGIONS} regions"
    if texts.words.shape[-2] > MAX_WORDS:
        return f"there are more than {MAX_WORDS} words"
    pairs = len(images) * texts.words.shape[-3]
    largest = max(pairs * texts.words.shape[-2] * max(mask.shape[1] for mask in masks), pairs * texts.words.shape[-1])
    nodes = pairs * (1 + texts.words.shape[-2]) * pair.config.similarity_size
    if max(largest, nodes, *(value.numel() for value in tensors)) >= 2**31:
        return "a tensor has more elements than the programs can number"
    return None


def reasoning(
    pair: PairStage,
    images: EncodedImages,
    texts: EncodedTexts,
    attention: FragmentAttention,
    refinement: Gate | Recurrence | None,
) -> Tensor:
    """(i, t), nothing checked."""
    from . import programs

    config, words, mask = pair.config, texts.words, texts.word_mask
    assert words is not None and mask is not None and texts.word_weights is not None
    assert images.refined_regions is not None and images.refined_region_mask is not None
    assert images.refined_region_gram is not None and images.refined_region_saliency is not None
    assert images.global_vector is not None
    own = words.ndim == 4
    (captions, word_count, size), image_count = words.shape[-3:], images.refined_regions.shape[0]
    tokens = images.refined_regions.shape[1]
    regions, reader, saf = tokens, cast(Any, pair.head), config.similarity_head == "saf"
    # Tensors that a variant lacks are never read: others stand in for them.
    scores = values = gram = gates = words
    region_mask = images.refined_region_mask
    if refinement is not None:
        assert images.context_keys is not None and texts.context_queries is not None and images.region_mask is not None
        assert images.context_values is not None and images.context_gram is not None and texts.gates is not None
        regions, region_mask = images.context_keys.shape[1], images.region_mask
        values, gram, gates = images.context_values, images.context_gram.float(), texts.gates
        scores = affinities(images.context_keys, texts.context_queries)
    strides = (scores.stride(0), scores.stride(1)) if not own else (scores.stride(1), scores.stride(0))
    tile = Tile.of_reasoning(words.dtype, captions, word_count, max(regions, tokens), config.similarity_size)
    overall = words.new_empty(image_count, captions, size)
    numbers = 2 if saf else 1 + word_count
    nodes = words.new_empty(0 if saf else (image_count * captions), numbers, config.similarity_size)
    weights = torch.empty(image_count, captions, numbers, dtype=torch.float32, device=words.device)
    head, bias = weights, weights
    if saf:
        head, bias = torch.cat([reader.gate.weight, reader.logit.weight]).float(), reader.gate.bias.float()
    floor = 1e-8 if words.dtype == torch.float16 else 1e-16
    programs_count = -(-captions // tile.captions) * image_count
    given = [words, gates, mask, texts.word_weights.float(), scores, values, gram, region_mask, images.refined_regions]
    given += [images.refined_region_gram.float(), images.refined_region_saliency.float(), images.refined_region_mask]
    given += [images.global_vector, pair.local_similarity.weight.to(words.dtype), head, bias]
    with _on(words):
        programs.reasoning[(programs_count,)](
            *(value.detach().contiguous() for value in given),
            *(overall, nodes, weights, int(own), image_count, captions, word_count, *strides),
            *(float(config.attention_scale), float(config.leaky_slope), floor),
            D=size,
            S=config.similarity_size,
            REGIONS=regions,
            TOKENS=tokens,
            REFINED=refinement is not None,
            SALIENT=config.use_semantic_alignment,
            SAF=saf,
            **tile.settings,
        )
    squares = (images.global_vector.unsqueeze(1) - normalize(overall)).square_()
    first = normalize(pair.global_similarity(squares))
    ones = torch.ones_like(weights[..., :1])
    if saf:
        mixing, votes = reader.parts(first, ones.squeeze(-1))
        return (weights[..., 0] + mixing * votes) / (weights[..., 1] + mixing) + reader.logit.bias
    nodes[:, 0], weights[..., :1] = first.flatten(0, 1), ones
    return reader(nodes, weights.flatten(0, 1)).view(image_count, captions)


def late_interaction(pair: PairStage, images: EncodedImages, texts: EncodedTexts) -> Tensor:
    """(i, t), nothing checked."""
    from . import programs

    regions, region_mask, words, shares = images.regions, images.region_mask, texts.words, texts.word_weights
    assert regions is not None and region_mask is not None and words is not None and shares is not None
    own = words.ndim == 4
    (captions, word_count, size), (image_count, region_count) = words.shape[-3:], region_mask.shape
    tile = Tile.of_late_interaction(words.dtype, word_count, region_count, own)
    out = torch.empty(image_count, captions, dtype=torch.float32, device=words.device)
    grid = (-(-captions // tile.captions), -(-image_count // tile.images))
    given = (words, shares.float(), regions, region_mask)
    with _on(words):
        programs.late_interaction[grid](
            *(value.detach().contiguous() for value in given),
            *(out, int(own), image_count, captions, word_count, float(pair.config.attention_scale)),
            D=size,
            REGIONS=region_count,
            **tile.settings,
        )
    return pair.late_interaction_scale.to(out.dtype).exp() * out


def affinities(keys: Tensor, queries: Tensor) -> Tensor:
    """Of every word with every region, the regions last: (i, R, D), (t, W, D) -> (t·W, i, R).

    Where each image has its own captions: (i, R, D), (i, t, W, D) -> (i, t·W, R).
    """
    if queries.ndim == 4:
        return queries.flatten(1, 2) @ keys.transpose(1, 2)
    return (queries.flatten(0, 1) @ keys.flatten(0, 1).T).unflatten(1, keys.shape[:2])


@dataclass(frozen=True)
class Tile:
    """How a program is cut.

    Attributes:
        captions, images: Of one program.
        settings: The program's constants and launch options.
    """

    captions: int
    images: int
    settings: dict[str, Any]

    @classmethod
    def of_reasoning(cls, dtype: torch.dtype, captions: int, words: int, regions: int, similarity: int) -> "Tile":
        """64 rows fill the registers of four warps with their similarity vectors at S = 256."""
        width, similar = _power_of_two(regions, 16), _power_of_two(similarity, 16)
        cut: dict[str, Any] = dict(FAST)
        if dtype == torch.float32:
            cut = {"rows": 16, "columns": 32, "num_warps": 8, "num_stages": 2}
        elif width > 64 or similar > 256:
            cut |= {"num_warps": 4 if similar <= 256 else 8, "num_stages": 2}
        count, settings = _rows(dtype, words, cut.pop("rows"))
        settings |= {"N": width, "SIMILARITY": similar, "COLUMNS": cut.pop("columns")}
        return cls(count, 1, settings | cut)

    @classmethod
    def of_late_interaction(cls, dtype: torch.dtype, words: int, regions: int, own: bool) -> "Tile":
        """128 × 128, or one image's regions where every image has its own captions."""
        exact, width = dtype == torch.float32, _power_of_two(regions, 16)
        captions, settings = _rows(dtype, words, 64 if exact else 128)
        images = 1 if own else max((64 if exact else 128) // width, 1)
        settings |= {"IMAGES": images, "N": width, "COLUMNS": 32 if exact else 64}
        return cls(captions, images, settings | {"num_warps": 8, "num_stages": 2 if exact else 3})


def _rows(dtype: torch.dtype, words: int, rows: int) -> tuple[int, dict[str, Any]]:
    """Captions of a program of about so many rows, and the constants that follow."""
    padded = _power_of_two(words, 4)
    captions = max(rows // padded, 1)
    return captions, {
        "WORDS": padded,
        "CAPTIONS": captions,
        # A Gram matrix in float32 beside half-precision items: TF32 is as exact as these.
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


def _power_of_two(value: int, least: int) -> int:
    return max(1 << (value - 1).bit_length(), least)


def _on(value: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device(value.device) if value.is_cuda else nullcontext()
