"""What a training run is told: one flat set of keys, the same in YAML, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .settings import build, read_overrides, read_yaml, validate

__all__ = ["TrainingConfig", "check_cusa", "like"]


def _key(default: Any, section: str, help: str, **limits: Any) -> Any:
    """A field with its help text and its limits (minimum, above, maximum, below, choices) in the metadata."""
    metadata = {"help": help, "section": section, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def like(name: str) -> Any:
    """A field with the default, help and limits of TrainingConfig's field of that name, for other settings."""
    of = TrainingConfig.__dataclass_fields__[name]
    return field(default=of.default, default_factory=of.default_factory, metadata=of.metadata)


@dataclass
class TrainingConfig:
    """Every key of a training run; `examples/train.py --help` prints them all.

    Keys of the model's own configuration go under `model` (`model: {hidden_size: 256}` in YAML,
    `model.hidden_size=256` on the command line): among them freezing of towers (`freeze_vision`, `freeze_text`),
    sizes, losses and the ablation switches.

    Raises:
        ValueError: for a value of the wrong type or out of range, and for an unknown key under `model`.
    """

    data: str = _key("scenes", "data", "what load_pairs reads: flickr8k, flickr30k, coco, scenes, a path or a Hub id")
    data_options: dict[str, Any] = _key({}, "data", "further keywords of load_pairs, the same for both splits")
    train_split: str = _key("train", "data", "name of the split that is trained on")
    validation_split: str = _key("validation", "data", "name of the split that chooses the best checkpoint")
    max_train_images: int | None = _key(None, "data", "train on the first N images only (null: all)", minimum=1)
    streaming: bool = _key(
        False,
        "data",
        "read the training split as it comes, shard by shard, in an order that resumes exactly; needs max_steps, "
        "which then is one epoch, and a pretrained text tower",
    )
    stream_shards_at_once: int = _key(4, "data", "streaming: shards (files, row groups) read side by side", minimum=1)
    stream_rows_at_once: int = _key(
        1024, "data", "streaming: images whose captions are shuffled together, encoded in memory", minimum=1
    )
    regions: str | None = _key(
        None, "data", "folder of a region cache read instead of the pictures; {split} in it becomes the split's name"
    )
    num_workers: int = _key(0, "data", "processes that load data; 0 loads in the main process", minimum=0)

    vision: str | None = _key(None, "towers", "Hub id or path of the vision backbone (null: region features)")
    text: str | None = _key(None, "towers", "Hub id or path of the text encoder (null: words and BiGRU from scratch)")
    image_size: int | None = _key(
        None, "towers", "pixels a side that the image processor delivers (null: its own)", minimum=1
    )
    max_text_length: int = _key(64, "towers", "tokens at which a caption is cut (counted and reported)", minimum=3)
    min_word_frequency: int = _key(
        1, "towers", "BiGRU text: words seen less often in the training captions become <unk>", minimum=1
    )
    cache_text_features: bool = _key(
        False, "towers", "run a frozen text tower once a caption and keep its token outputs in memory, half precision"
    )
    gradient_checkpointing: bool = _key(False, "towers", "recompute the towers' activations backwards to save memory")
    vision_lora_rank: int | None = _key(
        None,
        "towers",
        "low-rank adapters in the vision tower, by peft, in place of fine-tuning it (null: none)",
        minimum=1,
    )
    text_lora_rank: int | None = _key(
        None,
        "towers",
        "low-rank adapters in the text tower, by peft, in place of fine-tuning it (null: none)",
        minimum=1,
    )
    lora_alpha: int | None = _key(
        None, "towers", "scale of the adapters, over the rank (null: twice the rank)", minimum=1
    )
    lora_targets: list[str] = _key([], "towers", "last names of the layers that get adapters (none: all linear ones)")
    tower_batch_size: int | None = _key(
        None,
        "towers",
        "items that the towers run over at a time, twice (once without gradients), so that a batch of thousands fits "
        "into memory; gradients stay the same (null: the whole batch, once)",
        minimum=1,
    )
    model: dict[str, Any] = _key({}, "towers", "fields of TVRNConfig, as model.NAME=VALUE")

    epochs: int = _key(10, "schedule", "times that every caption is seen", minimum=1)
    max_steps: int | None = _key(None, "schedule", "optimizer steps; overrides epochs (null: epochs)", minimum=1)
    batch_size: int = _key(64, "schedule", "captions a batch, each with its image", minimum=2)
    batch_captions_per_image: int = _key(
        1, "schedule", "captions of the same image put into the same batch", minimum=1
    )
    gradient_accumulation_steps: int = _key(
        1, "schedule", "batches whose gradients make one optimizer step; negatives stay within a batch", minimum=1
    )
    head_start_epochs: int = _key(
        0, "schedule", "epochs before the others that train the embeddings alone, without the pair score", minimum=0
    )
    head_start_batch_size: int | None = _key(
        None, "schedule", "captions a batch of the head start, whose steps are cheap (null: batch_size)", minimum=2
    )
    head_start_learning_rate: float | None = _key(
        None,
        "schedule",
        "highest rate of the head start, which has its own warm-up and decay (null: learning_rate)",
        above=0.0,
    )
    token_epochs: int = _key(
        0,
        "schedule",
        "epochs after the head start that train the token similarity, without the evidence, whose pairs are dear",
        minimum=0,
    )
    token_batch_size: int | None = _key(
        None, "schedule", "captions a batch of the tokens' epochs (null: batch_size)", minimum=2
    )
    token_learning_rate: float | None = _key(
        None,
        "schedule",
        "highest rate of the tokens' epochs, which have their own warm-up and decay (null: learning_rate)",
        above=0.0,
    )
    keep_head_start: bool = _key(
        False, "schedule", "after its own epochs leave the embeddings as they are, and the tokens after theirs"
    )

    learning_rate: float = _key(5e-4, "optimizer", "highest rate of everything that is not a tower", above=0.0)
    tower_learning_rate: float = _key(5e-5, "optimizer", "highest rate of the towers that are not frozen", above=0.0)
    warmup_ratio: float = _key(
        0.05, "optimizer", "share of the steps over which the rate rises linearly", minimum=0.0, maximum=1.0
    )
    scheduler: str = _key(
        "cosine", "optimizer", "what the rate does after the warm-up", choices=("cosine", "step", "constant")
    )
    decay_epochs: list[int] = _key(
        [], "optimizer", "scheduler=step: epochs after which the rate is multiplied", minimum=1
    )
    decay_factor: float = _key(0.1, "optimizer", "scheduler=step: what it is multiplied by", above=0.0, maximum=1.0)
    weight_decay: float = _key(
        0.01, "optimizer", "AdamW's, on matrices only: none on biases, norms and temperatures", minimum=0.0
    )
    adam_beta1: float = _key(0.9, "optimizer", "AdamW's decay of the gradient's mean", minimum=0.0, below=1.0)
    adam_beta2: float = _key(
        0.999, "optimizer", "AdamW's decay of the squared gradient's mean", minimum=0.0, below=1.0
    )
    adam_epsilon: float = _key(1e-8, "optimizer", "AdamW's floor under the root", above=0.0)
    max_grad_norm: float | None = _key(
        2.0, "optimizer", "gradients are scaled down to this norm (null: never)", above=0.0
    )
    ema_decay: float | None = _key(
        None,
        "optimizer",
        "evaluate and save a running mean of the weights with this decay a step (null: off)",
        above=0.0,
        below=1.0,
    )

    word_dropout: float = _key(
        0.0,
        "regularisation",
        "probability that a word is left out of matching (one at least stays)",
        minimum=0.0,
        below=1.0,
    )
    region_dropout: float = _key(
        0.0,
        "regularisation",
        "probability that a region is left out of matching (one at least stays)",
        minimum=0.0,
        below=1.0,
    )

    cusa: bool = _key(False, "cusa", "add soft labels of frozen teachers (CUSA) to the losses; needs both caches")
    cusa_image_teacher: str | None = _key(
        None, "cusa", "folder of the image teacher's cache (examples/cache_teachers.py); {split} becomes train_split"
    )
    cusa_text_teacher: str | None = _key(None, "cusa", "folder of the text teacher's cache, by caption")
    cusa_alpha: float = _key(1.0, "cusa", "weight of the cross-modal soft labels (0: off)", minimum=0.0)
    cusa_beta: float = _key(
        0.75, "cusa", "weight of the uni-modal soft labels (0: off); gives the model uni-modal heads", minimum=0.0
    )
    cusa_teacher_temperature: float = _key(
        1.0, "cusa", "of the teachers' cosines; smaller makes their rows more peaked", above=0.0
    )
    cusa_student_temperature: float = _key(0.45, "cusa", "where the learned temperatures start", above=0.0, below=1.0)
    cusa_lowest_temperature: float = _key(
        0.10, "cusa", "bound below which the learned temperatures do not fall", above=0.0, below=0.99
    )
    cusa_teachers: str = _key(
        "own",
        "cusa",
        "whose cosines label the cross-modal part: each side's own teacher, or both by their mean",
        choices=("own", "mean", "geometric_mean"),
    )

    evaluation_steps: int | None = _key(
        None, "evaluation", "optimizer steps between two evaluations (null: at the end of each epoch)", minimum=1
    )
    evaluation_images: int | None = _key(
        None,
        "evaluation",
        "evaluate on the first N validation images while training (null: all), at the end on all",
        minimum=2,
    )
    evaluation_batch_size: int = _key(64, "evaluation", "images, and captions, encoded at a time", minimum=1)
    evaluation_chunk_size: int | None = _key(
        None, "evaluation", "pairs scored at a time (null: the model's pair_chunk_size)", minimum=1
    )
    evaluate_embeddings: bool = _key(True, "evaluation", "also give the recalls of image_embeds and text_embeds alone")

    output_dir: str = _key("runs/tvrn", "run", "folder of the model: weights, processor, card, results, curve")
    resume: str | None = _key(
        None,
        "run",
        "go on from a checkpoint: auto (the newest whole one of output_dir, else from the start), or its folder",
    )
    resume_changed: bool = _key(False, "run", "go on although the checkpoint was made with other settings")
    save_steps: int | None = _key(
        None, "run", "optimizer steps between two checkpoints (null: at the end of each epoch)", minimum=1
    )
    keep_checkpoints: int = _key(
        2, "run", "newest checkpoints that stay in output_dir/checkpoints, beside the best model (0: none)", minimum=0
    )
    seed: int = _key(0, "run", "what initial weights, order of the data and dropout follow from", minimum=0)
    mixed_precision: str = _key("no", "run", "precision of the forward pass", choices=("no", "bf16", "fp16"))
    cpu: bool = _key(False, "run", "stay on the CPU even where there is an accelerator")
    logging_steps: int = _key(50, "run", "optimizer steps between two logged lines and tracked values", minimum=1)
    trackers: list[str] = _key([], "run", "where values are tracked", choices=("tensorboard", "trackio"))
    query: str | None = _key(None, "run", "a text searched among the validation pictures in the end: query.png")

    def __post_init__(self) -> None:
        validate(self)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse keys that contradict one another."""
        if self.batch_captions_per_image > self.batch_size // 2:
            raise ValueError(
                f"batch_captions_per_image = {self.batch_captions_per_image} leaves a batch of batch_size = "
                f"{self.batch_size} with one image and no negatives; use at most {self.batch_size // 2}"
            )
        if self.streaming:
            self._check_streaming()
        for side in ("vision", "text"):
            rank = getattr(self, f"{side}_lora_rank")
            if rank is not None and self.model.get(f"freeze_{side}", False):
                raise ValueError(
                    f"{side}_lora_rank = {rank} and model.freeze_{side} = True: adapters learn; set "
                    f"model.freeze_{side}=false (the tower's own weights stay as they are)"
                )
        if self.scheduler == "step" and not self.decay_epochs:
            raise ValueError("scheduler = 'step' needs decay_epochs, got []; give for example decay_epochs=[15]")
        if self.token_epochs and not self.use_token_similarity:
            raise ValueError(
                f"token_epochs = {self.token_epochs} but model.use_token_similarity = False: nothing would be trained "
                "in them; set token_epochs=0"
            )
        if self.keep_head_start and not self.head_start_epochs:
            raise ValueError(
                "keep_head_start = True needs head_start_epochs of at least 1, got 0: the embeddings would stay as "
                "they were drawn"
            )
        check_cusa(self)
        if self.cache_text_features and not self.model.get("freeze_text", False):
            raise ValueError(
                "cache_text_features = True needs model.freeze_text = True, got False; "
                "a tower that learns changes its outputs: freeze it, or drop cache_text_features"
            )
        if self.vision is not None and self.model.get("vision_config") is not None:
            raise ValueError(
                f"vision = {self.vision!r} and model.vision_config both name a vision tower; give one of them "
                "(a pretrained one, or a configuration to start from scratch)"
            )
        has_tower = self.vision is not None or self.model.get("vision_config") is not None
        if self.regions is not None and has_tower and not self.model.get("freeze_vision", False):
            raise ValueError(
                f"regions = {self.regions!r} holds the outputs of a frozen tower, but model.freeze_vision = False; "
                "set model.freeze_vision=true, or drop regions so that the tower learns from the pictures"
            )
        if self.cache_text_features and self.text is None:
            raise ValueError(
                "cache_text_features = True needs a text tower, got text = None (a BiGRU learns from scratch); "
                "name one with text=…, or drop cache_text_features"
            )

    def _check_streaming(self) -> None:
        """Refuse what needs to know the whole training split beforehand."""
        if self.max_steps is None:
            raise ValueError("streaming = True needs max_steps, got None: the length of a stream is not known")
        wholes = {
            "head_start_epochs": 0, "token_epochs": 0, "max_train_images": None, "regions": None,
            "cache_text_features": False, "batch_captions_per_image": 1, "cusa": False,
        }  # fmt: skip
        for name, needed in wholes.items():
            if getattr(self, name) != needed:
                raise ValueError(
                    f"streaming = True and {name} = {getattr(self, name)!r}, which needs the whole training split; "
                    f"set {name}={_shown(needed)}, or streaming=false"
                )
        if self.text is None and self.model.get("text_config") is None:
            raise ValueError(
                "streaming = True needs a text tower, got text = None: a vocabulary from scratch needs all captions; "
                "name one with text=…"
            )
        if self.scheduler == "step":
            raise ValueError("streaming = True has no epochs for scheduler = 'step'; use cosine or constant")

    @property
    def use_token_similarity(self) -> bool:
        """Whether the model that this trains has one."""
        return bool(self.model.get("use_token_similarity", True))

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> TrainingConfig:
        """A configuration from keys and values; an unknown key is refused with the nearest known ones."""
        return build(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainingConfig:
        """A configuration from a YAML file and `key=value` overrides, which win.

        Args:
            path: the file; None starts from the defaults.
            overrides: such as `"batch_size=128"` or `"model.hidden_size=256"`; values are read as YAML.

        Raises:
            ValueError: for an unknown key (near matches are listed), a value of the wrong type or out of range, a file
                that is not a mapping, or an override without `=`.
        """
        return build(cls, read_overrides(overrides, read_yaml(path) if path is not None else {}))

    def as_dict(self) -> dict[str, Any]:
        """All keys and values, ready for YAML or JSON."""
        return asdict(self)


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
