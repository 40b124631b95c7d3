"""Encoded images and texts: what one side of the pair score needs, computed once per item. Shipped."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Encoded = TypeVar("Encoded", bound="EncodedItems")

# How much of the pair score is wanted, and what it reads of either side; each level holds the one before it.
LEVELS = ("embeddings", "late_interaction", "full")
LEVEL_FIELDS = {
    "embeddings": ("embeds",),
    "late_interaction": (
        *("embeds", "region_mask", "region_boxes", "regions", "words", "word_mask", "word_positions", "word_weights"),
    ),
}

FINGERPRINT_VALUES = 4096  # of each weight that a fingerprint reads, evenly spread: any training moves some of them


@dataclass
class EncodedItems:
    """Tensors whose first dimension is the item; a field may be `None` where the model's variant does not use it.

    Every tensor travels and is sliced with its item, so an item's score cannot depend on its neighbours.

    Attributes:
        model_fingerprint: Of the model that encoded them, as `model_fingerprint` gives it; None where it is not known
            (encoded with gradients, or built by hand).
    """

    model_fingerprint: str | None = field(default=None, kw_only=True)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are set, by name."""
        named = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def at_level(self: Encoded, level: str) -> Encoded:
        """The part that `match(…, level=…)` reads: "embeddings", "late_interaction" or "full"."""
        if level == "full":
            return self
        kept = {name: value for name, value in self.tensors().items() if name in LEVEL_FIELDS[level]}
        return self._like(kept)

    def _like(self: Encoded, tensors: dict[str, Tensor]) -> Encoded:
        return type(self)(**tensors, model_fingerprint=self.model_fingerprint)

    def __len__(self) -> int:
        return next(iter(self.tensors().values())).shape[0]

    def _map(self: Encoded, function: Callable[[Tensor], Tensor]) -> Encoded:
        return self._like({name: function(value) for name, value in self.tensors().items()})

    def select(self: Encoded, indices: slice | Sequence[int] | Tensor) -> Encoded:
        """The items at `indices` (a slice, a list or a 1-d tensor of row numbers), in that order."""
        if isinstance(indices, slice):
            return self._map(lambda value: value[indices])
        # A list may be flags as well; index_select wants integers, on the tensors' device.
        rows = torch.as_tensor(indices, device=next(iter(self.tensors().values())).device)
        if rows.dtype == torch.bool:
            rows = rows.nonzero().flatten()
        return self._map(lambda value: value.index_select(0, rows.long()))

    @classmethod
    def cat(cls: type[Encoded], parts: list[Encoded]) -> Encoded:
        """Join galleries along the item dimension, padding regions or words to the longest."""
        if not parts:
            raise ValueError("cat got no parts; expected at least one encoded gallery.")
        names = [list(part.tensors()) for part in parts]
        if any(other != names[0] for other in names):
            raise ValueError(f"cat got galleries of different model variants, with the tensors {names}.")
        tensors: dict[str, Tensor] = {}
        for name in names[0]:
            values = [getattr(part, name) for part in parts]
            # Every axis but the item's grows to the longest: regions, words, and both axes of a Gram matrix.
            sizes = [max(value.shape[axis] for value in values) for axis in range(1, values[0].ndim)]
            tensors[name] = torch.cat([_padded(value, sizes) for value in values])
        return cls(**tensors, model_fingerprint=common_fingerprint(*parts))

    def to(self: Encoded, *args: Any, **kwargs: Any) -> Encoded:
        """As `Tensor.to`; a dtype applies to the large tensors of fragments alone.

        Embeddings, weights and boxes keep their precision: they are small, and a cosine in bfloat16 moves ranks.
        """
        exact = (
            "embeds",
            "refined_region_saliency",
            "refined_region_gram",
            "context_gram",
            "word_weights",
            "region_boxes",
        )
        # The same call without its dtype; with nothing left of it `to` would raise.
        places = [arg for arg in args if not isinstance(arg, torch.dtype)]
        options = {key: arg for key, arg in kwargs.items() if key != "dtype"}
        moved: dict[str, Tensor] = {}
        for name, value in self.tensors().items():
            if name not in exact and value.is_floating_point():
                moved[name] = value.to(*args, **kwargs)
            else:
                moved[name] = value.to(*places, **options) if places or options else value
        return self._like(moved)

    def save(self, path: str | os.PathLike) -> None:
        """Write the tensors to a safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, value in self.tensors().items():
            # A slice has to be made contiguous: the format writes the storage as it lies.
            value = value.detach().cpu().contiguous()
            # With as many tokens as regions the two masks are one tensor, which the format refuses to write twice.
            shared = value.data_ptr() in {other.data_ptr() for other in tensors.values()}
            tensors[name] = value.clone() if shared else value
        about = {"class": type(self).__name__, "model_fingerprint": self.model_fingerprint}
        save_file(tensors, path, metadata={"tvrn": json.dumps(about)})
        share(path)

    @classmethod
    def load(cls: type[Encoded], path: str | os.PathLike) -> Encoded:
        """Read what `save` wrote.

        Raises:
            ValueError: If the file holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {}).get("tvrn", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no safetensors file: {error}; expected what {cls.__name__}.save writes."
            ) from error
        if about.get("class") != cls.__name__:
            raise ValueError(f"{path} holds {about.get('class') or 'no encoded gallery'}; expected {cls.__name__}.")
        return cls(**tensors, model_fingerprint=about.get("model_fingerprint"))


@dataclass
class EncodedImages(EncodedItems):
    """Images without any text: I items of N refined regions (R, or 2R with `refinement="gru"`).

    Level "embeddings" sets `embeds` alone, "late_interaction" the regions too, "full" everything the model has.

    Attributes:
        embeds: (I, P) unit-norm image embeddings.
        region_mask: (I, R) bool, valid regions first.
        region_boxes: (I, R, 4) xyxy in [0, 1], in the order of the regions.
        regions: (I, R, D) regions v, which late interaction compares with the words.
        refined_regions: (I, N, D) unified regions U.
        refined_region_mask: (I, N) bool.
        global_vector: (I, D) global image vector g^v.
        refined_region_saliency: (I, N) log of the regions' saliency a^v.
        refined_region_gram: (I, N, N) U Uᵀ, which gives a context's norm without the context.
        context_keys: (I, R, D) W_k c^v, the sources of the expansion.
        context_values: (I, R, 2D | 3D) what the expansion carries to the words: [B c^v; C c^v], or the GRU's input
            gates.
        context_gram: (I, R, R) c^v c^vᵀ, likewise for an expansion.
    """

    embeds: Tensor
    region_mask: Tensor | None = None
    region_boxes: Tensor | None = None
    regions: Tensor | None = None
    refined_regions: Tensor | None = None
    refined_region_mask: Tensor | None = None
    global_vector: Tensor | None = None
    refined_region_saliency: Tensor | None = None
    refined_region_gram: Tensor | None = None
    context_keys: Tensor | None = None
    context_values: Tensor | None = None
    context_gram: Tensor | None = None


@dataclass
class EncodedTexts(EncodedItems):
    """Texts without any image: T items of W words. Levels as in `EncodedImages`.

    Attributes:
        embeds: (T, P) unit-norm text embeddings.
        words: (T, W, D) words t.
        word_mask: (T, W) bool, valid words first.
        word_positions: (T, W) where each word stood in `input_ids`.
        word_weights: (T, W) weights of the global text vector.
        context_queries: (T, W, D) W_q c^t, the queries of the expansion.
        gates: (T, W, D) A t, the image-independent half of the gate (`refinement="gate"`).
        recurrent_words: (T, W, D) n(GRU(t) + t) (`refinement="gru"`).
        recurrent_state: (T, D) the GRU's state at the last valid word (`refinement="gru"`).
    """

    embeds: Tensor
    words: Tensor | None = None
    word_mask: Tensor | None = None
    word_positions: Tensor | None = None
    word_weights: Tensor | None = None
    context_queries: Tensor | None = None
    gates: Tensor | None = None
    recurrent_words: Tensor | None = None
    recurrent_state: Tensor | None = None

    def trim(self) -> "EncodedTexts":
        """Drop the columns that are padding in every text."""
        if self.word_mask is None:
            return self
        width = max(int(self.word_mask.sum(dim=1).max()), 1)
        if width == self.word_mask.shape[1]:
            return self
        # (T, W, …) to (T, width, …), where words are a prefix; what has no words stays as it is.
        flat = ("embeds", "recurrent_state")
        return self._like({k: v if k in flat else v[:, :width] for k, v in self.tensors().items()})

    def grouped(self, groups: int) -> "EncodedTexts":
        """(T, …) as (groups, T / groups, …): for each image its own texts. Only the pair stage reads such."""
        return self._map(lambda value: value.unflatten(0, (groups, -1)))


def common_fingerprint(*sides: EncodedItems) -> str | None:
    """The fingerprint that all sides carry; None where one of them carries none.

    Raises:
        ValueError: If two models encoded them.
    """
    known = sorted({side.model_fingerprint for side in sides if side.model_fingerprint is not None})
    if len(known) > 1:
        raise ValueError(
            f"These encoded galleries come from {len(known)} different models (fingerprints "
            f"{', '.join(name[:12] for name in known)}); expected one: encode all of them with the same checkpoint."
        )
    return known[0] if known and all(side.model_fingerprint is not None for side in sides) else None


def model_fingerprint(model: nn.Module) -> str | None:
    """Hash of a spread of a model's weights and statistics, the same in bfloat16 and in full precision.

    It is read again only where a weight has changed. None where the weights are not at hand: on the meta device,
    sharded over processes, or while the model is compiled or exported.
    """
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        return None
    # Calibration changes no logit: what was encoded before stays valid.
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("calibration_")}
    if not all(isinstance(value, Tensor) for value in own.values()):  # of a quantised tower: packed
        return None
    # By name, since the order of a state is that in which modules were assigned.
    weights = {name: value for name, value in sorted(own.items()) if value.is_floating_point()}
    if any(value.is_meta or type(value) not in (Tensor, nn.Parameter) for value in weights.values()):
        return None
    state = weights_state(weights.values())
    known = model.__dict__.get("_known_fingerprint")
    if known is None or known[0] != state or any(version < 0 for _, version in state):
        known = model.__dict__["_known_fingerprint"] = (state, _hash_of_samples(weights))
    return known[1]


def weights_state(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """What changes wherever a weight is replaced or written to.

    A tensor's version counts its changes in place; one made in inference mode has none, and −1 here.
    """
    return [(value.data_ptr(), -1 if value.is_inference() else value._version) for value in weights]


def _hash_of_samples(weights: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    samples: dict[torch.device, list[Tensor]] = {}
    for name, value in weights.items():
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        # In bfloat16, where a model and its half-precision copy agree.
        spread = value.detach().flatten()[:: max(value.numel() // FINGERPRINT_VALUES, 1)]
        samples.setdefault(value.device, []).append(spread.to(torch.bfloat16).float())
    for parts in samples.values():  # one transfer a device
        total.update(torch.cat(parts).cpu().numpy().tobytes())
    return total.hexdigest()


def share_weights(folder: str | os.PathLike) -> None:
    """`share` for all safetensors files of a folder."""
    for name in os.listdir(folder):
        if name.endswith(".safetensors"):
            share(os.path.join(folder, name))


def share(path: str | os.PathLike) -> None:
    """Give a file that safetensors wrote, for its owner alone, the mode that any other new file beside it has."""
    beside = f"{os.fspath(path)}.mode"
    with open(beside, "wb"):
        os.chmod(path, os.stat(beside).st_mode)
    os.unlink(beside)


def _padded(value: Tensor, sizes: list[int]) -> Tensor:
    """Zeros (False of a mask) after what is there, up to these sizes of the axes behind the first."""
    pads: list[int] = []
    # `pad` counts from the last axis, with two numbers an axis: before and after.
    for size, current in zip(reversed(sizes), reversed(value.shape[1:]), strict=True):
        pads += [0, size - current]
    return torch.nn.functional.pad(value, pads) if any(pads) else value
