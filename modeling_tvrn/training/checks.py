"""Keys of a run that contradict one another: refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .phases import ALL, LEVELS, NAMES, PhaseConfig, kept_in, readers
from .settings import model_fields

if TYPE_CHECKING:
    from .keys import TrainingKeys

__all__ = ["check_together", "check_with_model"]

BRINGS_TOWERS = ("dual_encoder", "start_from")
TOWER_KEYS = (
    *("dual_encoder", "start_from", "vision", "text", "word_embeddings"),
    *("image_size", "max_text_length", "min_word_frequency"),
)


def check_together(config: TrainingKeys) -> None:
    """Refuse keys that contradict one another.

    Raises:
        ValueError: names the keys, their values, and what to set instead.
    """
    _check_schedule(config)
    if config.streaming:
        _check_streaming(config)
    _check_towers(config)
    for key in BRINGS_TOWERS:
        if getattr(config, key) is not None:
            _check_alone(config, key)
    if config.start_from is None:  # whose fields nobody knows before it is read
        check_with_model(config, _resolved_model(config))
    if config.shard:
        _check_sharding(config)
    _check_cusa(config)


def _check_schedule(config: TrainingKeys) -> None:
    """Batches and phases."""
    phases = config.schedule()
    for name, phase in zip(_names(config), phases, strict=True):
        if config.batch_captions_per_image > phase.batch_size // 2:
            raise ValueError(
                f"batch_captions_per_image = {config.batch_captions_per_image} leaves a batch of {name}batch_size = "
                f"{phase.batch_size} with one image and no negatives; use at most {phase.batch_size // 2}"
            )
    if config.scheduler == "step" and not config.decay_epochs:
        raise ValueError("scheduler = 'step' needs decay_epochs, got []; give for example decay_epochs=[15]")
    _check_lengths(config)


def check_with_model(config: TrainingKeys, model: Any) -> None:
    """Refuse keys that contradict the model that is trained.

    Args:
        config: the run.
        model: the model's configuration, as far as the run's keys tell.

    Raises:
        ValueError: names the keys, their values, and what to set instead.
    """
    _check_frozen(config, model)
    if model.dual_encoder_config is not None:
        _check_first_stage(config, model)
    if config.phases is not None:
        _check_phases(config.schedule(), model, finished=config.start_from is not None)


def _resolved_model(config: TrainingKeys) -> Any:
    """The model's configuration as it will be, where a field depends on whether there is a dual encoder."""
    from ..configuration_tvrn import BY_FIRST_STAGE, TVRNConfig

    whole = config.dual_encoder is not None or config.model.get("dual_encoder_config") is not None
    defaults = {name: both[whole] for name, both in BY_FIRST_STAGE.items()}
    given = {name: value for name, value in config.model.items() if value is not None or name not in defaults}
    fields = {**model_fields(), **defaults, **given}
    if whole:
        fields["use_refined_features"] = False
        fields["dual_encoder_config"] = config.dual_encoder or fields["dual_encoder_config"]
    towers = {
        f"{side}_tower_config": getattr(config, side) or fields[f"{side}_config"] or fields["dual_encoder_config"]
        for side in ("vision", "text")
    }
    resolved: Any = SimpleNamespace(**fields, **towers)
    resolved.keeps = partial(TVRNConfig.keeps, resolved)
    return resolved


def _names(config: TrainingKeys) -> list[str]:
    """What stands before a key of each phase."""
    return [f"phases.{number}." for number in range(len(config.phases))] if config.phases is not None else [""]


def _check_lengths(config: TrainingKeys) -> None:
    """Phases say how long they are; the run as a whole, and a stream, do not."""
    phases = config.schedule() if config.phases is not None else []
    for key in ("epochs", "max_steps"):
        if phases and (value := getattr(config, key)) is not None:
            own = ", ".join(f"phases.{number}.{phase.length}" for number, phase in enumerate(phases))
            raise ValueError(
                f"{key} = {value} beside {own}: phases have lengths of their own; leave out {key}, or phases for one "
                "phase of all"
            )
    for key in ("batch_size", "region_dropout", "word_dropout", "warmup_ratio"):
        values = [phase.get(key) for phase in config.phases or []]
        if values and None not in values and getattr(config, key) != type(config).__dataclass_fields__[key].default:
            raise ValueError(
                f"{key} = {getattr(config, key)} reaches no phase, each of which has its own "
                f"({', '.join(map(str, values))}); give phases.N.{key}, or leave it out"
            )
    for number, phase in enumerate(phases):
        if config.streaming and phase.epochs is not None:
            raise ValueError(
                f"phases.{number}.epochs = {phase.epochs} and streaming = True: the length of a stream is not known; "
                f"give phases.{number}.epochs=null and phases.{number}.steps, or streaming=false"
            )


def _check_phases(phases: Sequence[PhaseConfig], model: Any, finished: bool) -> None:
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
        _check_source(f"phases.{number}", phase, trained)
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


def _check_source(phase: str, config: PhaseConfig, trained: frozenset[str]) -> None:
    """Embeddings learn from what has learned."""
    if config.learning.distils and "late_interaction" not in trained:
        raise ValueError(
            f"{phase}.train = 'distilled_embeddings', but no phase before it trains late_interaction, which they "
            "learn from; put one before it"
        )


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


def _check_towers(config: TrainingKeys) -> None:
    """Towers that are named twice, and words."""
    has_text_tower = config.text is not None or config.model.get("text_config") is not None
    if config.word_embeddings is not None and has_text_tower:
        raise ValueError(
            f"word_embeddings = {config.word_embeddings!r} are where a BiGRU starts from, but there is a text tower "
            f"(text = {config.text!r}); set text=null, or drop word_embeddings"
        )
    starts = config.word_embeddings is not None or config.start_from is not None
    if not starts and config.model.get("freeze_word_embeddings", False):
        raise ValueError(
            "model.freeze_word_embeddings = True but word_embeddings = None: the words would stay as they were drawn; "
            "name a text model with word_embeddings=…"
        )
    if config.vision is not None and config.model.get("vision_config") is not None:
        raise ValueError(
            f"vision = {config.vision!r} and model.vision_config both name a vision tower; give one of them "
            "(a pretrained one, or a configuration to start from scratch)"
        )


def _check_frozen(config: TrainingKeys, model: Any) -> None:
    """What is frozen of the towers, where their outputs are cached or adapters learn in them."""
    for side in ("vision", "text"):
        rank = getattr(config, f"{side}_lora_rank")
        if rank is not None and getattr(model, f"freeze_{side}"):
            raise ValueError(
                f"{side}_lora_rank = {rank} and model.freeze_{side} = True: adapters learn; set "
                f"model.freeze_{side}=false (the tower's own weights stay as they are)"
            )
    if config.regions is not None and model.vision_tower_config is not None and not model.keeps("vision"):
        raise ValueError(
            f"regions = {config.regions!r} holds the outputs of a frozen tower, but {_free(model, 'vision')}; "
            f"set model.freeze_vision=true{_whole(model)}, or drop regions so that the tower learns from the pictures"
        )
    if config.text_features is None:
        return
    if model.text_tower_config is None:
        raise ValueError(
            f"text_features = {config.text_features!r} needs a text tower, got text = None (a BiGRU learns from "
            "scratch); name one with text=…, or drop text_features"
        )
    if not model.keeps("text"):
        raise ValueError(
            f"text_features = {config.text_features!r} needs a frozen text tower, but {_free(model, 'text')}: its "
            f"outputs change while it learns; set model.freeze_text=true{_whole(model)}, or drop text_features"
        )


def _free(model: Any, side: str) -> str:
    """Which field lets a side's outputs change."""
    name = "freeze_first_stage" if getattr(model, f"freeze_{side}") else f"freeze_{side}"
    return f"model.{name} = False"


def _whole(model: Any) -> str:
    return "" if model.dual_encoder_config is None else " and model.freeze_first_stage=true"


def _check_sharding(config: TrainingKeys) -> None:
    """What cannot be done with weights that are in parts."""
    if config.tower_batch_size is not None:
        raise ValueError(
            f"shard = True and tower_batch_size = {config.tower_batch_size}: towers that go backwards several times a "
            "step need whole weights; set tower_batch_size=null, or shard=false"
        )
    if config.mixed_precision == "fp16":
        raise ValueError(
            "shard = True and mixed_precision = 'fp16': the scaler of losses looks for infinite gradients in its own "
            "part alone; use mixed_precision=bf16, or shard=false"
        )


def _check_streaming(config: TrainingKeys) -> None:
    """Refuse what needs to know the whole training split beforehand."""
    if config.max_steps is None and config.phases is None:
        raise ValueError(
            "streaming = True needs max_steps, or phases with steps, got None: the length of a stream is not known"
        )
    wholes = {
        "max_train_images": None, "regions": None, "text_features": None, "batch_captions_per_image": 1,
    }  # fmt: skip
    for name, needed in wholes.items():
        if getattr(config, name) != needed:
            raise ValueError(
                f"streaming = True and {name} = {getattr(config, name)!r}, which needs the whole training split; "
                f"set {name}={_shown(needed)}, or streaming=false"
            )
    words = (
        config.text, config.word_embeddings, config.dual_encoder, config.start_from, config.model.get("text_config"),
    )  # fmt: skip
    if not any(words):
        raise ValueError(
            "streaming = True needs a text tower, got text = None: a vocabulary from scratch needs all captions; "
            "name one with text=…, or word_embeddings=… for a BiGRU"
        )
    if config.scheduler == "step":
        raise ValueError("streaming = True has no epochs for scheduler = 'step'; use cosine or constant")


def _check_alone(config: TrainingKeys, key: str) -> None:
    """A model that brings both towers, with its own pixels and tokens, leaves nothing to say of them.

    Args:
        config: the run.
        key: where the model is named, of `BRINGS_TOWERS`.
    """
    said = f"{key} = {getattr(config, key)!r}"
    defaults = {name: type(config).__dataclass_fields__[name].default for name in TOWER_KEYS}
    for name, default in defaults.items():
        if (value := getattr(config, name)) != default and name != key:
            raise ValueError(
                f"{name} = {value!r} beside {said}, which brings its towers with their pixels and tokens; "
                f"set {name}={_shown(default)}, or drop {key}"
            )
    named = ("vision_config", "text_config", "dual_encoder_config") if key == "dual_encoder" else ()
    for name in named:
        if config.model.get(name) is not None:
            raise ValueError(f"model.{name} is given beside {said}; leave it out")


def _check_first_stage(config: TrainingKeys, model: Any) -> None:
    """Nothing of a dual encoder learns where all of it is frozen."""
    if not all(model.keeps(side) for side in ("vision", "text")):
        return
    frozen = "model.freeze_vision, freeze_text and freeze_first_stage are all true"
    key = "start_from" if config.dual_encoder is None else "dual_encoder"
    named = {name for phase in config.schedule() for name in phase.train}
    if found := sorted(named & {"embeddings", "distilled_embeddings"}):
        raise ValueError(
            f"phases train {' and '.join(found)} of {key} = {getattr(config, key)!r}, but {frozen}: nothing of them "
            "can learn; set model.freeze_first_stage=false for its projections, or leave that phase out"
        )
    if config.cusa:
        raise ValueError(
            f"cusa = True with {key} = {getattr(config, key)!r}, but {frozen}: there is nothing to teach; set "
            "model.freeze_first_stage=false and name embeddings in a phase, or drop cusa"
        )


def _check_cusa(config: TrainingKeys) -> None:
    """Refuse keys of CUSA that contradict one another;"""
    given = {name: getattr(config, name) for name in ("cusa_image_teacher", "cusa_text_teacher")}
    if not config.cusa:
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{' and '.join(named)} given, but cusa = False; set cusa=true, or drop the caches")
        return
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(
            f"cusa = True needs {' and '.join(missing)}; build them with `tvrn teachers` and give their folders"
        )
    if not config.cusa_alpha + config.cusa_beta > 0:
        raise ValueError("cusa_alpha = 0.0 and cusa_beta = 0.0 leave CUSA nothing to do; set one above 0")
    if not config.cusa_lowest_temperature <= config.cusa_student_temperature <= 0.99:
        raise ValueError(
            f"cusa_student_temperature = {config.cusa_student_temperature} is outside its bounds, "
            f"{config.cusa_lowest_temperature} (cusa_lowest_temperature) to 0.99"
        )


def _shown(value: Any) -> str:
    """As YAML writes it."""
    return "null" if value is None else str(value).lower()
