"""Keys of a run that contradict one another: refused before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainingConfig

__all__ = ["check_cusa", "check_together"]


def check_together(config: TrainingConfig) -> None:
    """Refuse keys that contradict one another.

    Raises:
        ValueError: names the keys, their values, and what to set instead.
    """
    _check_schedule(config)
    if config.streaming:
        _check_streaming(config)
    _check_towers(config)
    if config.dual_encoder is not None:
        _check_dual_encoder(config)
    if config.shard:
        _check_sharding(config)
    check_cusa(config)


def _check_schedule(config: TrainingConfig) -> None:
    """Batches and phases."""
    if config.batch_captions_per_image > config.batch_size // 2:
        raise ValueError(
            f"batch_captions_per_image = {config.batch_captions_per_image} leaves a batch of batch_size = "
            f"{config.batch_size} with one image and no negatives; use at most {config.batch_size // 2}"
        )
    if config.scheduler == "step" and not config.decay_epochs:
        raise ValueError("scheduler = 'step' needs decay_epochs, got []; give for example decay_epochs=[15]")
    unit, other = ("steps", "epochs") if config.streaming else ("epochs", "steps")
    for phase in ("head_start", "token", "distillation"):
        if length := getattr(config, f"{phase}_{other}"):
            raise ValueError(
                f"{phase}_{other} = {length} and streaming = {config.streaming}: a stream's phases are counted in "
                f"steps, others in epochs; set {phase}_{other}=0 and give {phase}_{unit}"
            )
    for phase in ("token", "distillation"):
        if (length := getattr(config, f"{phase}_{unit}")) and not config.use_late_interaction:
            raise ValueError(
                f"{phase}_{unit} = {length} but model.use_late_interaction = False: nothing would be learned in them; "
                f"set {phase}_{unit}=0"
            )
    if (length := getattr(config, f"distillation_{unit}")) and not config.model.get("distillation_loss_weight"):
        raise ValueError(
            f"distillation_{unit} = {length} but model.distillation_loss_weight = 0: the tokens would teach nothing; "
            f"give the loss a weight such as 1, or set distillation_{unit}=0"
        )
    alone = getattr(config, f"head_start_{unit}") or getattr(config, f"distillation_{unit}")
    if config.head_start_region_dropout is not None and not alone:
        raise ValueError(
            f"head_start_region_dropout = {config.head_start_region_dropout} but head_start_{unit} = 0: there is no "
            f"head start; give head_start_{unit}, or use region_dropout"
        )
    if config.keep_head_start and not getattr(config, f"head_start_{unit}"):
        raise ValueError(
            f"keep_head_start = True needs head_start_{unit} of at least 1, got 0: the embeddings would stay as they "
            "were drawn"
        )
    weight = config.model.get("distillation_loss_weight")
    if config.keep_head_start and weight and not getattr(config, f"distillation_{unit}"):
        raise ValueError(
            f"model.distillation_loss_weight = {weight} and keep_head_start = True: the embeddings would be kept "
            f"before there is a score to learn from; give distillation_{unit}, or set one of them to 0 or false"
        )


def _check_towers(config: TrainingConfig) -> None:
    """Towers, what is frozen of them, and what is cached of their outputs."""
    for side in ("vision", "text"):
        rank = getattr(config, f"{side}_lora_rank")
        if rank is not None and config.model.get(f"freeze_{side}", False):
            raise ValueError(
                f"{side}_lora_rank = {rank} and model.freeze_{side} = True: adapters learn; set "
                f"model.freeze_{side}=false (the tower's own weights stay as they are)"
            )
    if config.cache_text_features and not _is_frozen(config, "text"):
        raise ValueError(
            "cache_text_features = True needs model.freeze_text = True, got False; "
            "a tower that learns changes its outputs: freeze it, or drop cache_text_features"
        )
    has_text_tower = config.text is not None or config.model.get("text_config") is not None
    if config.word_embeddings is not None and has_text_tower:
        raise ValueError(
            f"word_embeddings = {config.word_embeddings!r} are where a BiGRU starts from, but there is a text tower "
            f"(text = {config.text!r}); set text=null, or drop word_embeddings"
        )
    if config.word_embeddings is None and config.model.get("freeze_word_embeddings", False):
        raise ValueError(
            "model.freeze_word_embeddings = True but word_embeddings = None: the words would stay as they were drawn; "
            "name a text model with word_embeddings=…"
        )
    if config.vision is not None and config.model.get("vision_config") is not None:
        raise ValueError(
            f"vision = {config.vision!r} and model.vision_config both name a vision tower; give one of them "
            "(a pretrained one, or a configuration to start from scratch)"
        )
    has_tower = any((config.vision, config.dual_encoder, config.model.get("vision_config")))
    if config.regions is not None and has_tower and not _is_frozen(config, "vision"):
        raise ValueError(
            f"regions = {config.regions!r} holds the outputs of a frozen tower, but model.freeze_vision = False; "
            "set model.freeze_vision=true, or drop regions so that the tower learns from the pictures"
        )
    if config.cache_text_features and config.text is None and config.dual_encoder is None:
        raise ValueError(
            "cache_text_features = True needs a text tower, got text = None (a BiGRU learns from scratch); "
            "name one with text=…, or drop cache_text_features"
        )


def _is_frozen(config: TrainingConfig, side: str) -> bool:
    """Whether a side's outputs stay what they are; those of a dual encoder do unless something of it is to learn."""
    whole = config.dual_encoder is not None
    frozen = config.model.get(f"freeze_{side}", whole)
    return bool(frozen and (not whole or config.model.get("freeze_first_stage", True)))


def _check_sharding(config: TrainingConfig) -> None:
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


def _check_streaming(config: TrainingConfig) -> None:
    """Refuse what needs to know the whole training split beforehand."""
    if config.max_steps is None:
        raise ValueError("streaming = True needs max_steps, got None: the length of a stream is not known")
    before = ("head_start_steps", "token_steps", "distillation_steps")
    if sum(getattr(config, name) for name in before) >= config.max_steps:
        given = ", ".join(f"{name} = {getattr(config, name)}" for name in before)
        raise ValueError(
            f"{given} leave nothing of max_steps = {config.max_steps}, which counts all phases, to the pair score; "
            "raise max_steps"
        )
    wholes = {
        "max_train_images": None, "regions": None, "cache_text_features": False, "batch_captions_per_image": 1,
    }  # fmt: skip
    for name, needed in wholes.items():
        if getattr(config, name) != needed:
            raise ValueError(
                f"streaming = True and {name} = {getattr(config, name)!r}, which needs the whole training split; "
                f"set {name}={_shown(needed)}, or streaming=false"
            )
    words = config.text, config.word_embeddings, config.dual_encoder, config.model.get("text_config")
    if not any(words):
        raise ValueError(
            "streaming = True needs a text tower, got text = None: a vocabulary from scratch needs all captions; "
            "name one with text=…, or word_embeddings=… for a BiGRU"
        )
    if config.scheduler == "step":
        raise ValueError("streaming = True has no epochs for scheduler = 'step'; use cosine or constant")


def _check_dual_encoder(config: TrainingConfig) -> None:
    """A dual encoder is both towers, with its own pixels and tokens."""
    others = ("vision", "text", "word_embeddings", "image_size", "vision_lora_rank", "text_lora_rank")
    for name in others:
        if (value := getattr(config, name)) is not None:
            raise ValueError(
                f"{name} = {value!r} beside dual_encoder = {config.dual_encoder!r}, which brings both towers with "
                f"their pixels and tokens; set {name}=null"
            )
    for name in ("vision_config", "text_config", "dual_encoder_config"):
        if config.model.get(name) is not None:
            raise ValueError(f"model.{name} is given beside dual_encoder = {config.dual_encoder!r}; leave it out")


def check_cusa(settings: Any) -> None:
    """Refuse keys of CUSA that contradict one another; of any settings that have them."""
    given = {name: getattr(settings, name) for name in ("cusa_image_teacher", "cusa_text_teacher")}
    if not settings.cusa:
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{' and '.join(named)} given, but cusa = False; set cusa=true, or drop the caches")
        return
    if missing := [name for name, value in given.items() if value is None]:
        raise ValueError(
            f"cusa = True needs {' and '.join(missing)}; build them with examples/cache_teachers.py and give "
            "their folders"
        )
    if not settings.cusa_alpha + settings.cusa_beta > 0:
        raise ValueError("cusa_alpha = 0.0 and cusa_beta = 0.0 leave CUSA nothing to do; set one above 0")
    if not settings.cusa_lowest_temperature <= settings.cusa_student_temperature <= 0.99:
        raise ValueError(
            f"cusa_student_temperature = {settings.cusa_student_temperature} is outside its bounds, "
            f"{settings.cusa_lowest_temperature} (cusa_lowest_temperature) to 0.99"
        )


def _shown(value: Any) -> str:
    """As YAML writes it."""
    return "null" if value is None else str(value).lower()
