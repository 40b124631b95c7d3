"""Phases: stretches of training that name what they train; the table of what each name means, and the phases' keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from .settings import COMMAS, Count, Share, near_matches

__all__ = [
    *("ALL", "EXAMPLE", "LEVELS", "NAMES", "Learning", "PhaseConfig", "check_entry", "check_phases", "kept_in"),
    *("learning_in", "learns"),
]

EXAMPLE = "phases=[{train: [embeddings, late_interaction], epochs: 5, batch_size: 128}, {train: reasoning, epochs: 1}]"
# How much of the pair score: each holds the ones before it. As `encoded_tvrn` names them, which would import torch.
LEVELS = ("embeddings", "late_interaction", "full")


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
    (
        ("vision_model.", "text_model.", "word_encoder.embeddings.", "detector."),
        ("embeddings", "late_interaction", "reasoning"),
    ),
    (
        ("region_projection.", "box_embedding.", "word_projection.", "word_perceptron.", "word_encoder."),
        ("refined", "late_interaction", "reasoning"),
    ),
    (("dual_encoder.vision_model.", "dual_encoder.text_model."), ("embeddings", "late_interaction", "reasoning")),
    (("dual_encoder.",), ("embeddings",)),
    (("text_pooling.",), ("late_interaction", "reasoning")),
    (("pair.late_interaction_weight",), ("late_interaction", "reasoning")),
    (("pair.late_interaction_scale",), ("late_interaction",)),
    (("attention.", "geometry.", "visual_refinement.", "image_pooling."), ("refined", "reasoning")),
    (("textual_refinement.",), ("recurrent", "reasoning")),
    (("pair.",), ("reasoning",)),
    (("pooled_image_", "pooled_text_", "image_embedding.", "text_embedding.", "unimodal_", "logit_"), ("embeddings",)),
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


class PhaseConfig(BaseModel):
    """One entry of `phases`; what it leaves out, `TrainingConfig.schedule` fills in from the run's own keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    train: Annotated[list[str], COMMAS] = Field(
        [], description=f"what learns, one name or several: {', '.join(NAMES)}, or {ALL}; the rest stays as it is"
    )
    epochs: Count | None = Field(None, description="times that every caption is seen")
    steps: Count | None = Field(None, description="optimizer steps, in place of epochs; of a stream always")
    batch_size: int = Field(64, ge=2, description="captions a batch (unset: the run's batch_size)")
    learning_rate: float = Field(
        5e-4,
        gt=0,
        description="highest rate (unset: the run's learning_rate); tower_learning_rate changes in proportion",
    )
    region_dropout: Share = Field(0.0, description="share of regions left out (unset: the run's region_dropout)")
    word_dropout: Share = Field(0.0, description="share of words left out (unset: the run's word_dropout)")
    warmup_ratio: float = Field(
        0.05, ge=0, le=1, description="share of the phase's steps (unset: the run's warmup_ratio)"
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: Any) -> Any:
        """`phases.0.batch_size=null` takes an entry's own value back."""
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given

    @model_serializer
    def _as_given(self) -> dict[str, Any]:
        """What a recipe shows: the keys that the entry has, and one name without brackets."""
        given = [name for name in type(self).model_fields if name != "train" and name in self.model_fields_set]
        train = self.train[0] if len(self.train) == 1 else list(self.train)
        return {"train": train, **{name: getattr(self, name) for name in given}}

    @property
    def learning(self) -> Learning:
        """What its steps compute and learn."""
        return learning_in(self.train)

    @property
    def length(self) -> str:
        """As it was given: `epochs = 5` or `steps = 400`."""
        return f"epochs = {self.epochs}" if self.epochs is not None else f"steps = {self.steps}"


# -- checks ---------------------------------------------------------------------------------------------------


def check_entry(name: str, phase: PhaseConfig) -> None:
    """Refuse an entry that is wrong by itself.

    Args:
        name: as messages call it: `phases.0`.
        phase: the entry.

    Raises:
        ValueError: names that are not known, twice there or not alone where they have to be; not one length.
    """
    train = phase.train
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
    if phase.epochs is not None and phase.steps is not None:
        raise ValueError(f"{name}.epochs = {phase.epochs} and {name}.steps = {phase.steps}; give one of them")
    if phase.epochs is None and phase.steps is None:
        raise ValueError(f"{name} ({', '.join(train)}) has neither epochs nor steps; give {name}.epochs")


def check_phases(phases: Sequence[PhaseConfig], model: Any, finished: bool) -> None:
    """Refuse phases in which something that they name has nothing to learn, or may not move.

    Args:
        phases: of the whole run.
        model: the model's configuration.
        finished: whether the model has been trained before.

    Raises:
        ValueError: names the phase, what it names, and the model's fields that stand against it.
    """
    trained = frozenset({"late_interaction"} if finished else ())
    for number, (phase, kept) in enumerate(zip(phases, kept_in(phases), strict=True)):
        for name in phase.train:
            if name != ALL:
                _check_losses(f"phases.{number}", name, model)
        if phase.learning.distils and "late_interaction" not in trained:
            raise ValueError(
                f"phases.{number}.train = 'distilled_embeddings', but no phase before it trains late_interaction, "
                "which they learn from; put one before it"
            )
        _check_kept(f"phases.{number}", phase.learning.components, kept, model)
        trained |= phase.learning.components
    weight, all_learning = model.distillation_loss_weight, [phase.learning for phase in phases]
    if weight and not any("distillation" in each.losses and each.computes != LEVELS[0] for each in all_learning):
        raise ValueError(
            f"model.distillation_loss_weight = {weight} but no phase trains embeddings beside what they would learn "
            "from; add {train: distilled_embeddings, …} after the late interaction, or set it to 0"
        )


def _check_losses(phase: str, name: str, model: Any) -> None:
    """What is named exists, and a loss reaches it."""
    row = NAMES[name]
    if row.computes == "late_interaction" and not model.use_late_interaction:
        raise ValueError(
            f"{phase}.train names {name} but model.use_late_interaction = False: there is no late interaction to "
            f"{'learn from' if row.component == 'embeddings' else 'train'}; leave the phase out"
        )
    needed = {"embeddings": ("contrastive",), "distilled_embeddings": ("distillation",)}.get(name, row.losses)
    weights = {f"model.{loss}_loss_weight": getattr(model, f"{loss}_loss_weight") for loss in needed}
    if not any(weights.values()):
        given = ", ".join(f"{key} = {value}" for key, value in weights.items())
        raise ValueError(f"{phase}.train names {name} but {given}: nothing would be learned; give a weight such as 1")


def _check_kept(phase: str, components: frozenset[str], kept: frozenset[str], model: Any) -> None:
    """What is named can learn without moving what an earlier phase trained."""
    others = {"late_interaction": "regions and words", "reasoning": "refined words"}
    fixes = {"late_interaction": "model.use_refined_features=false"}
    fixes["reasoning"] = f"{fixes['late_interaction']} or model.refinement=gate"
    moved = {"late_interaction": "region_projection.", "reasoning": "textual_refinement."}
    for component in sorted(components & moved.keys()):
        if blocking := sorted(readers(moved[component], model) & kept):
            raise ValueError(
                f"{phase} trains {component}, which moves the {others[component]} that {blocking[0]} sees, trained by "
                f"an earlier phase and not named by this one; name {blocking[0]} as well, or train all"
                + (f", or set {fixes[component]}" if blocking == ["embeddings"] else "")
            )


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
