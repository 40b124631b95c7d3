"""Phases: stretches of training that name what they train; the table of what each name means, and the phases' keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .settings import near_matches, refuse_unknown, setting, validate

__all__ = [
    *("ALL", "EXAMPLE", "LEVELS", "NAMES", "Learning", "PhaseConfig", "kept_in", "learning_in", "learns"),
    *("read_phases", "readers", "written"),
]

EXAMPLE = "phases=[{train: [embeddings, late_interaction], epochs: 5, batch_size: 128}, {train: reasoning, epochs: 1}]"
LEVELS = ("embeddings", "late_interaction", "full")  # how much of the pair score: each holds the ones before it


@dataclass(frozen=True)
class Row:
    """What a name in `train` stands for.

    Attributes:
        component: what learns; the weights that it reads are in `READERS`.
        computes: how much of the pair score a step computes (`LEVELS`).
        losses: those that may enter, each by its `model.*_loss_weight`.
        labelled: the similarity that gets CUSA's soft labels.
    """

    component: str
    computes: str
    losses: tuple[str, ...]
    labelled: str


# The distillation enters wherever more than the embeddings is computed. `distilled_embeddings` learn from a late
# interaction that stays as it is, computed without dropout and without gradients. `all` is every component.
NAMES = {
    "embeddings": Row("embeddings", "embeddings", ("contrastive", "distillation"), "embeddings"),
    "late_interaction": Row("late_interaction", "late_interaction", ("late_interaction",), "late_interaction"),
    "reasoning": Row("reasoning", "full", ("matching", "pair_contrastive", "hardest_negative"), "reasoning"),
    "distilled_embeddings": Row("embeddings", "late_interaction", ("contrastive", "distillation"), "embeddings"),
}
ALL = "all"
COMPONENT_WEIGHTS = ("pair.late_interaction_weight", "pair.reasoning_weight")

# Weights by the beginnings of their names, the first that fits, and the components that read them. A phase trains what
# its components read, but nothing that a component reads which an earlier phase trained and this one does not name:
# what was learned stays as it is. So towers and word embeddings that are not frozen learn with whatever reads them,
# until something that reads them is to stay. "refined" and "recurrent" are embeddings that see the refined regions and
# words (`use_refined_features`), and words that a recurrent refinement has read.
READERS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("vision_model.", "text_model.", "word_encoder.embeddings."), ("embeddings", "late_interaction", "reasoning")),
    (
        ("region_projection.", "word_projection.", "word_perceptron.", "word_encoder."),
        ("refined", "late_interaction", "reasoning"),
    ),
    (
        ("dual_encoder.vision_model.", "dual_encoder.text_model."),
        ("embeddings", "late_interaction", "reasoning"),
    ),
    (("dual_encoder.",), ("embeddings",)),
    (("text_pooling.",), ("late_interaction", "reasoning")),
    (("pair.late_interaction_weight",), ("late_interaction", "reasoning")),
    (("pair.late_interaction_scale",), ("late_interaction",)),
    (("attention.", "geometry.", "visual_refinement.", "image_pooling."), ("refined", "reasoning")),
    (("textual_refinement.",), ("recurrent", "reasoning")),
    (("pair.",), ("reasoning",)),
    (
        ("pooled_image_", "pooled_text_", "image_embedding.", "text_embedding.", "unimodal_", "logit_"),
        ("embeddings",),
    ),
)


@dataclass(frozen=True)
class Learning:
    """What the steps of a phase compute and learn: the table's rows of all that it names, together.

    Attributes:
        components: what learns.
        computes: how much of the pair score.
        losses: those that may enter.
        labelled: the similarities that get CUSA's soft labels.
        distils: whether the embeddings learn from a late interaction that stays as it is.
    """

    components: frozenset[str]
    computes: str
    losses: frozenset[str]
    labelled: frozenset[str]
    distils: bool


def learning_in(train: Sequence[str]) -> Learning:
    """What a phase that names these computes and learns."""
    rows = [NAMES[name] for name in (NAMES if ALL in train else train)]
    return Learning(
        components=frozenset(row.component for row in rows),
        computes=max((row.computes for row in rows), key=LEVELS.index),
        losses=frozenset(loss for row in rows for loss in row.losses),
        labelled=frozenset(row.labelled for row in rows),
        distils="distilled_embeddings" in train,
    )


@dataclass
class PhaseConfig:
    """One entry of `phases`, with what it leaves out filled in from the run's own keys."""

    train: list[str] = setting(
        [], "phases", f"what learns, one name or several: {', '.join(NAMES)}, or {ALL}; the rest stays as it is"
    )
    epochs: int | None = setting(None, "phases", "times that every caption is seen", minimum=1)
    steps: int | None = setting(None, "phases", "optimizer steps, in place of epochs; of a stream always", minimum=1)
    batch_size: int = setting(64, "phases", "captions a batch (unset: the run's batch_size)", minimum=2)
    learning_rate: float = setting(
        5e-4,
        "phases",
        "highest rate (unset: the run's learning_rate); tower_learning_rate changes in proportion",
        above=0.0,
    )
    region_dropout: float = setting(
        0.0, "phases", "share of regions left out (unset: the run's region_dropout)", minimum=0.0, below=1.0
    )
    word_dropout: float = setting(
        0.0, "phases", "share of words left out (unset: the run's word_dropout)", minimum=0.0, below=1.0
    )
    warmup_ratio: float = setting(
        0.05, "phases", "share of the phase's steps (unset: the run's warmup_ratio)", minimum=0.0, maximum=1.0
    )

    @property
    def learning(self) -> Learning:
        """What its steps compute and learn."""
        return learning_in(self.train)

    @property
    def length(self) -> str:
        """As it was given: `epochs = 5` or `steps = 400`."""
        return f"epochs = {self.epochs}" if self.epochs is not None else f"steps = {self.steps}"


def read_phase(number: int, given: Any, unset: dict[str, Any]) -> PhaseConfig:
    """An entry of `phases`, checked by itself.

    Args:
        number: its place, from 0.
        given: what stands there.
        unset: the run's own values of what it may leave out.

    Raises:
        ValueError: names the key and its value.
    """
    name = f"phases.{number}"
    if not isinstance(given, dict):
        raise ValueError(f"{name} = {given!r} is a {type(given).__name__}; expected a mapping, as in {EXAMPLE}")
    refuse_unknown(given, PhaseConfig, f"{name}.")
    phase = PhaseConfig(**{**unset, **{key: value for key, value in given.items() if value is not None}})
    validate(phase, f"{name}.")
    _check_names(name, phase.train)
    if phase.epochs is not None and phase.steps is not None:
        raise ValueError(f"{name}.epochs = {phase.epochs} and {name}.steps = {phase.steps}; give one of them")
    if phase.epochs is None and phase.steps is None:
        raise ValueError(f"{name} ({', '.join(phase.train)}) has neither epochs nor steps; give {name}.epochs")
    return phase


def _check_names(name: str, train: list[str]) -> None:
    """Names that are known, each once, and alone where they have to be."""
    if not train:
        raise ValueError(f"{name}.train = [] names nothing to train; expected of {', '.join(NAMES)}, or {ALL}")
    for each in train:
        if each not in (*NAMES, ALL):
            raise ValueError(f"{name}.train = {each!r}; {near_matches(each, (*NAMES, ALL))}")
    if len(set(train)) < len(train):
        raise ValueError(f"{name}.train = {train} names something twice")
    for alone, why in ((ALL, "is every component"), ("distilled_embeddings", "learn from what stays as it is")):
        if alone in train and len(train) > 1:
            others = [each for each in train if each != alone]
            raise ValueError(f"{name}.train = {train}: {alone} {why}; leave out {', '.join(others)}, or {alone}")


def read_phases(phases: Any, unset: dict[str, Any]) -> list[PhaseConfig]:
    """The entries of `phases`, each checked by itself.

    Raises:
        ValueError: names the key and its value.
    """
    if isinstance(phases, dict) and phases and all(str(key).isdecimal() for key in phases):
        first = next(iter(phases))
        raise ValueError(f"there is no phases.{first}: this run has no phases; give some, as in {EXAMPLE}")
    if not isinstance(phases, list):
        raise ValueError(f"phases = {phases!r} is a {type(phases).__name__}; expected a list, as in {EXAMPLE}")
    if not phases:
        raise ValueError("phases = [] trains nothing; leave phases out for one phase of all, or name some")
    return [read_phase(number, given, unset) for number, given in enumerate(phases)]


def written(phases: list[PhaseConfig], given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries as they were given, in the types that were read: what a recipe shows."""
    found = []
    for phase, entry in zip(phases, given, strict=True):
        others = [each.name for each in fields(phase) if each.name != "train" and entry.get(each.name) is not None]
        train = phase.train[0] if len(phase.train) == 1 else phase.train
        found.append({"train": train, **{name: getattr(phase, name) for name in others}})
    return found


# -- weights --------------------------------------------------------------------------------------------------


def kept_in(phases: Sequence[PhaseConfig]) -> list[frozenset[str]]:
    """For each phase the components that stay as they are: those that an earlier one trained and it does not name."""
    kept, trained = [], frozenset[str]()
    for phase in phases:
        source = frozenset({"late_interaction"}) if phase.learning.distils else frozenset[str]()
        kept.append((trained | source) - phase.learning.components)
        trained |= phase.learning.components
    return kept


def readers(weight: str, model: Any) -> frozenset[str]:
    """The components that read a weight.

    Args:
        weight: its name.
        model: the model's configuration.
    """
    for beginnings, components in READERS:
        if weight.startswith(beginnings):
            return frozenset("embeddings" if each in _refining(model) else each for each in components)
    raise ValueError(f"no component reads the weight {weight!r}; the table of phases lacks it")


def _refining(model: Any) -> set[str]:
    """What of the table's readers is the embeddings in this model."""
    if not model.use_refined_features:
        return set()
    return {"refined", "recurrent"} if model.use_text_refinement and model.refinement == "gru" else {"refined"}


def learns(weights: Iterable[str], model: Any, components: frozenset[str], kept: frozenset[str]) -> set[str]:
    """Those of the weights that learn while these components do and those stay as they are."""
    kept = kept if model.use_late_interaction else kept - {"late_interaction"}
    read = {weight: readers(weight, model) for weight in weights}
    return {
        weight
        for weight, by in read.items()
        # What components count for in their sum changes when another one joins it.
        if by & components and (weight.endswith(COMPONENT_WEIGHTS) or not by & kept)
    }
