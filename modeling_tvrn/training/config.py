"""What a training run is told: one flat set of keys, the same in YAML, on the command line and in Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..redaction import REDACTED, redacted
from .phases import ALL, EXAMPLE, PhaseConfig, check_entry, check_phases
from .recipes import recipe_values
from .settings import (
    COMMAS,
    FREE,
    Count,
    Section,
    Share,
    flat_items,
    model_fields,
    near_matches,
    read_overrides,
    told,
    undotted,
)

__all__ = ["TrainingConfig"]

EPOCHS = 10
LARGEST = 2**32  # of any number
# What a phase leaves out comes from the run's own keys of these names.
FROM_RUN = ("batch_size", "learning_rate", "region_dropout", "word_dropout", "warmup_ratio")
BRINGS_TOWERS = ("dual_encoder", "start_from")
TOWER_KEYS = (
    *("dual_encoder", "start_from", "vision", "text", "detector", "word_embeddings"),
    *("image_size", "max_text_length", "min_word_frequency"),
)
# Of a stream nobody knows the length or the captions before it was read.
WHOLE_SPLIT: dict[str, Any] = {
    "max_train_images": None,
    "regions": None,
    "text_features": None,
    "batch_captions_per_image": 1,
    "flip_negatives": [],
}


class TrainingConfig(BaseModel):
    """Every key of a training run, checked; `tvrn train --keys` prints them all.

    Keys of the model's own configuration go under `model` (`model: {hidden_size: 256}` in YAML,
    `model.hidden_size=256` on the command line): among them freezing of towers (`freeze_vision`, `freeze_text`),
    sizes, losses and the ablation switches.

    Raises:
        ValueError: for unknown keys (near matches are listed), values of the wrong type or out of range, a line each,
            and for keys that contradict one another.
    """

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)

    data: Annotated[str, Section("data")] = Field(
        "scenes", description="what load_pairs reads: flickr8k, flickr30k, coco, scenes, a path or a Hub id"
    )
    data_options: dict[str, Any] = Field({}, description="further keywords of load_pairs, the same for both splits")
    train_split: str = Field("train", description="name of the split that is trained on")
    validation_split: str = Field(
        "validation",
        description="name of the split that chooses the best checkpoint; where the data have none, 10 % of the "
        "training images are set aside, drawn by seed",
    )
    max_train_images: Count | None = Field(None, description="train on the first N images only (null: all)")
    streaming: bool = Field(
        False,
        description="read the training split as it comes, shard by shard, in an order that resumes exactly; needs "
        "max_steps, or phases with steps, each of which then is one epoch, and a pretrained text tower",
    )
    stream_shards_at_once: Count = Field(4, description="streaming: shards (files, row groups) read side by side")
    stream_rows_at_once: Count = Field(
        1024, description="streaming: images whose captions are shuffled together, encoded in memory"
    )
    regions: str | None = Field(
        None, description="folder of a region cache to read for the pictures; {split} in it becomes the split's name"
    )
    num_workers: Annotated[int, FREE] = Field(0, ge=0, description="processes that load data (0: the main one)")
    allow_overlap: bool = Field(
        False, description="go on although validation images are trained on too, which results.json and the card say"
    )

    dual_encoder: Annotated[str | None, Section("towers")] = Field(
        None,
        description="Hub id or path of a dual encoder (CLIP, SigLIP, ...) that is both towers and the first stage of "
        "the score; in place of vision and text",
    )
    start_from: str | None = Field(
        None, description="Hub id or path of a finished TVRN to train on, with its processor, towers and sizes"
    )
    vision: str | None = Field(None, description="Hub id or path of the vision backbone (null: region features)")
    detector: str | None = Field(
        None,
        description="Hub id or path of an object detector whose boxes are the regions (D-FINE, RT-DETR, DETR, YOLOS, "
        "OWLv2, ...), with its own features, or those of vision's or dual_encoder's map",
    )
    text: str | None = Field(
        None, description="Hub id or path of the text encoder (null: words and BiGRU from scratch)"
    )
    word_embeddings: str | None = Field(
        None,
        description="BiGRU text: Hub id or path of the text model whose tokens and input embeddings it starts from "
        "(null: words of the training captions, from scratch); model.freeze_word_embeddings=true keeps them",
    )
    trust_remote_code: bool = Field(
        False,
        description="run Python code that the folder or repository of a tokenizer, image processor or "
        "word_embeddings brings; a tower's own class must be one of transformers'",
    )
    image_size: Count | None = Field(
        None, description="pixels a side that the image processor delivers (null: its own)"
    )
    max_text_length: int = Field(64, ge=3, description="tokens at which a caption is cut (counted and reported)")
    min_word_frequency: Count = Field(
        1, description="BiGRU text from scratch: words seen less often in the training captions become <unk>"
    )
    text_features: Annotated[str | None, FREE] = Field(
        None,
        description="folder of the caption cache: what a frozen text tower gives for each caption, made there at "
        "first use and shared by runs (null: the tower runs live)",
    )
    vision_lora_rank: Count | None = Field(
        None, description="low-rank adapters in the vision tower, by peft, in place of fine-tuning it (null: none)"
    )
    text_lora_rank: Count | None = Field(
        None, description="low-rank adapters in the text tower, by peft, in place of fine-tuning it (null: none)"
    )
    tower_batch_size: Count | None = Field(
        None,
        description="items that the towers run over at a time, twice (once without gradients), so that a batch of "
        "thousands fits into memory; gradients stay the same (null: the whole batch, once)",
    )
    model: dict[str, Any] = Field({}, description="fields of TVRNConfig, as model.NAME=VALUE")

    phases: Annotated[list[PhaseConfig] | None, Section("schedule")] = Field(
        None,
        examples=[EXAMPLE],
        description="what is trained one after another, each with its own warm-up and decay (null: everything at "
        "once); what an entry leaves out comes from the run's own keys, and phases.N.KEY=VALUE changes entry N, "
        "counted from 0",
    )
    epochs: Count | None = Field(
        None, description=f"without phases: times that every caption is seen (null: {EPOCHS})"
    )
    max_steps: Count | None = Field(
        None, description="without phases: optimizer steps; overrides epochs (null: epochs)"
    )
    batch_size: int = Field(64, ge=2, description="captions a batch, each with its image")
    batch_captions_per_image: Count = Field(1, description="captions of the same image put into the same batch")
    gradient_accumulation_steps: Count = Field(
        1, description="batches whose gradients make one optimizer step; negatives stay within a batch"
    )

    learning_rate: Annotated[float, Section("optimizer")] = Field(
        5e-4, gt=0, description="highest rate of everything that is not pretrained"
    )
    tower_learning_rate: float = Field(
        5e-5, gt=0, description="highest rate of towers, and of a dual encoder's projections, if not frozen"
    )
    warmup_ratio: float = Field(
        0.05, ge=0, le=1, description="share of a phase's steps over which the rate rises linearly"
    )
    scheduler: Literal["cosine", "step", "constant"] = Field(
        "cosine", description="what the rate does after the warm-up"
    )
    decay_epochs: list[Count] = Field([], description="scheduler=step: epochs after which the rate is multiplied")
    decay_factor: float = Field(0.1, gt=0, le=1, description="scheduler=step: what it is multiplied by")
    weight_decay: float = Field(
        0.01, ge=0, description="AdamW's, on matrices only: none on biases, norms and temperatures"
    )
    adam_beta2: Share = Field(0.999, description="AdamW's decay of the squared gradient's mean")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's floor under the root")
    max_grad_norm: float | None = Field(2.0, gt=0, description="gradients are scaled down to this norm (null: never)")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="evaluate and save the weights' running mean with this decay a step (null: off)"
    )

    weight_interpolation: Annotated[float | None, Section("regularisation")] = Field(
        None,
        gt=0,
        lt=1,
        description="the model that is kept is a mean of the pretrained weights and what became of them, with this "
        "share of the latter (WiSE-FT), which forgets less; its folder `trained` holds the latter (null: off)",
    )
    flip_negatives: Annotated[list[Literal["left/right", "above/below"]], COMMAS] = Field(
        [],
        description="a caption that says left or right (above, below, over, under, top, bottom) brings its image "
        "mirrored (upside down) with these words exchanged into the batch as well: then positions have to count",
    )
    word_dropout: Share = Field(
        0.0, description="probability that a word is left out of matching (one at least stays)"
    )
    region_dropout: Share = Field(
        0.0, description="probability that a region is left out of matching (one at least stays)"
    )

    cusa: Annotated[bool, Section("cusa")] = Field(
        False, description="add soft labels of frozen teachers (CUSA) to the losses; needs both caches"
    )
    cusa_image_teacher: str | None = Field(
        None, description="folder of the image teacher's cache (tvrn teachers); {split} becomes train_split"
    )
    cusa_text_teacher: str | None = Field(None, description="folder of the text teacher's cache, by caption")
    cusa_alpha: float = Field(1.0, ge=0, description="weight of the cross-modal soft labels (0: off)")
    cusa_beta: float = Field(
        0.75, ge=0, description="weight of the uni-modal soft labels (0: off); gives the model uni-modal heads"
    )
    cusa_teacher_temperature: float = Field(
        1.0, gt=0, description="of the teachers' cosines; smaller makes their rows more peaked"
    )
    cusa_student_temperature: float = Field(0.45, gt=0, lt=1, description="where the learned temperatures start")
    cusa_lowest_temperature: float = Field(
        0.10, gt=0, lt=0.99, description="bound below which the learned temperatures do not fall"
    )
    cusa_teachers: Literal["own", "mean", "geometric_mean"] = Field(
        "own", description="whose cosines label the cross-modal part: each side's own teacher, or both by their mean"
    )
    cusa_exclude_self: bool = Field(
        False, description="label the other items of a batch alone, without the diagonal that the paper keeps"
    )
    cusa_on_logits: bool = Field(
        False, description="label the model's logits in their own scale, without learned temperatures"
    )
    cusa_center_teachers: bool = Field(
        False, description="the teachers' cosines about the batch's mean vector: tells never-negative features apart"
    )

    evaluation_steps: Annotated[Count | None, Section("evaluation")] = Field(
        None, description="optimizer steps between two evaluations (null: at the end of each epoch)"
    )
    evaluation_images: int | None = Field(
        None,
        ge=2,
        description="evaluate on the first N validation images while training (null: all), at the end on all",
    )
    evaluation_batch_size: Annotated[Count, FREE] = Field(64, description="images, and captions, encoded at a time")
    zero_shot: Annotated[str | None, FREE] = Field(
        None, description="folder with a folder of images a label: zero-shot accuracy before and after the training"
    )
    zero_shot_prompt: Annotated[str, FREE] = Field(
        "a photo of a {}.", description="what is said of a label, {} where it goes"
    )

    output_dir: Annotated[str, Section("run"), FREE] = Field(
        "runs/tvrn", description="folder of the model: weights, processor, card, results, curve"
    )
    resume: Annotated[str | None, FREE] = Field(
        None,
        description="go on from a checkpoint: its folder, or auto (the newest of output_dir, else from the start)",
    )
    resume_changed: Annotated[bool, FREE] = Field(
        False, description="go on although the checkpoint was made with other settings"
    )
    save_steps: Annotated[Count | None, FREE] = Field(
        None, description="optimizer steps between two checkpoints (null: at the end of each epoch)"
    )
    keep_checkpoints: Annotated[int, FREE] = Field(
        2, ge=0, description="newest checkpoints that stay in output_dir/checkpoints, beside the best model"
    )
    seed: int = Field(
        0, ge=0, le=2**32 - 1, description="what initial weights, order of the data and dropout follow from"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="precision of the forward pass")
    shard: Annotated[bool, FREE] = Field(
        False, description="divide weights, gradients and moments among several processes (FSDP2)"
    )
    cpu: Annotated[bool, FREE] = Field(False, description="stay on the CPU even where there is an accelerator")
    logging_steps: Annotated[Count, FREE] = Field(
        50, description="optimizer steps between two logged lines and tracked values"
    )
    trackers: Annotated[list[Literal["tensorboard", "trackio", "wandb"]], COMMAS, FREE] = Field(
        [], description="where values are tracked"
    )
    query: Annotated[str | None, FREE] = Field(
        None, description="a text searched among the validation pictures in the end: query.png"
    )

    # -- reading and writing ----------------------------------------------------------------------------------

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(told(error, type(self))) from None

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> TrainingConfig:
        """A configuration from keys and values; a dotted key, such as `model.hidden_size`, reaches into a mapping."""
        return cls(**{str(key): value for key, value in values.items()})

    @classmethod
    def from_yaml(cls, path: str | Path | None = None, overrides: Sequence[str] = ()) -> TrainingConfig:
        """A configuration from a YAML file and `key=value` overrides, which win.

        Args:
            path: the file, or the name of a recipe that comes with the package; None starts from the defaults.
            overrides: such as `"batch_size=128"` or `"model.hidden_size=256"`; values are read as YAML.

        Raises:
            ValueError: as of the class; also for a file that is not a mapping, or an override without `=`.
        """
        values = recipe_values(path, overrides) if path is not None else {}
        return cls.from_mapping(read_overrides(overrides, values))

    def as_dict(self) -> dict[str, Any]:
        """All keys and values, ready for YAML or JSON; secrets in `data_options` too: `redacted` takes them out."""
        return self.model_dump()

    def __repr_args__(self) -> Any:
        return redacted(self.as_dict()).items()

    def schedule(self) -> list[PhaseConfig]:
        """The phases, with everything that they leave out filled in; without any, one of all."""
        own = {name: getattr(self, name) for name in FROM_RUN}
        if self.phases is None:
            epochs = None if self.max_steps is not None else self.epochs or EPOCHS
            return [PhaseConfig(train=[ALL], epochs=epochs, steps=self.max_steps, **own)]
        return [
            phase.model_copy(update={key: own[key] for key in own if key not in phase.model_fields_set})
            for phase in self.phases
        ]

    # -- checks of the keys by themselves ---------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _nest_dotted(cls, values: dict[str, Any]) -> dict[str, Any]:
        # What Python has for a path and a list; files and command lines have neither.
        plain = {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in values.items()}
        return undotted({key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()})

    @field_validator("phases", mode="before")
    @classmethod
    def _check_list_of_phases(cls, given: Any) -> Any:
        """Messages that say more than those of any list of mappings."""
        if isinstance(given, dict) and given and all(str(key).isdecimal() for key in given):
            first = next(iter(given))
            raise ValueError(f"there is no phases.{first}: this run has no phases; give some, as in {EXAMPLE}")
        if given is not None and not isinstance(given, list):
            raise ValueError(
                f"phases = {redacted(given)!r} is a {type(given).__name__}; expected a list, as in {EXAMPLE}"
            )
        if given == []:
            raise ValueError("phases = [] trains nothing; leave phases out for one phase of all, or name some")
        return given

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        """No placeholder of a secret, and fields that the model has."""
        for name, value in flat_items(self.as_dict()):
            if value == REDACTED:
                raise ValueError(
                    f"{name} = {REDACTED!r} stands where results.json or a card hides a secret; give the secret "
                    "itself, or leave the key out"
                )
            if isinstance(value, int | float) and not abs(value) < LARGEST:  # infinite, or no number, among them
                raise ValueError(f"{name} = {value:g}; expected a number below {LARGEST:,}")
        known = model_fields(has_dual_encoder=False) if self.model else {}
        for key in self.model:
            if key not in known:
                raise ValueError(f"unknown key model.{key}; {near_matches(key, known)} (fields of TVRNConfig)")
            value, usual = self.model[key], known[key]
            if isinstance(usual, bool) and value is not None and not isinstance(value, bool):
                raise ValueError(f"model.{key} = {value!r}; expected true or false")
            whole = isinstance(usual, int) and not isinstance(usual, bool)
            if whole and value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"model.{key} = {value!r}; expected a whole number such as {usual}")
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        """Each phase by itself and beside the run's own keys: phases say how long they are, the run does not."""
        phases = self.phases or []
        for number, phase in enumerate(phases):
            check_entry(f"phases.{number}", phase)
        for number, phase in enumerate(self.schedule()):
            if self.batch_captions_per_image > phase.batch_size // 2:
                raise ValueError(
                    f"batch_captions_per_image = {self.batch_captions_per_image} leaves a batch of "
                    f"{f'phases.{number}.' if phases else ''}batch_size = {phase.batch_size} with one image and no "
                    f"negatives; use at most {phase.batch_size // 2}"
                )
        if self.scheduler == "step" and not self.decay_epochs:
            raise ValueError("scheduler = 'step' needs decay_epochs, got []; give for example decay_epochs=[15]")
        for key in ("epochs", "max_steps"):
            if phases and (value := getattr(self, key)) is not None:
                own = ", ".join(f"phases.{number}.{phase.length}" for number, phase in enumerate(phases))
                raise ValueError(
                    f"{key} = {value} beside {own}: phases have lengths of their own; leave out {key}, or phases for "
                    "one phase of all"
                )
        # The rate stays: the other phases' are relative to it.
        for key in [key for key in FROM_RUN if key != "learning_rate"]:
            is_everywhere = phases and all(key in phase.model_fields_set for phase in phases)
            if is_everywhere and getattr(self, key) != type(self).model_fields[key].default:
                values = ", ".join(str(getattr(phase, key)) for phase in phases)
                raise ValueError(
                    f"{key} = {getattr(self, key)} reaches no phase, each of which has its own ({values}); give "
                    f"phases.N.{key}, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        """Refuse what needs to know the whole training split beforehand."""
        if not self.streaming:
            return self
        for number, phase in enumerate(self.phases or []):
            if phase.epochs is not None:
                raise ValueError(
                    f"phases.{number}.epochs = {phase.epochs} and streaming = True: the length of a stream is not "
                    f"known; give phases.{number}.epochs=null and phases.{number}.steps, or streaming=false"
                )
        if self.max_steps is None and self.phases is None:
            raise ValueError(
                "streaming = True needs max_steps, or phases with steps, got None: the length of a stream is not known"
            )
        for name, needed in WHOLE_SPLIT.items():
            if getattr(self, name) != needed:
                raise ValueError(
                    f"streaming = True and {name} = {getattr(self, name)!r}, which needs the whole training split; "
                    f"set {name}={'null' if needed is None else needed}, or streaming=false"
                )
        words = (self.text, self.word_embeddings, self.dual_encoder, self.start_from, self.model.get("text_config"))
        if not any(words):
            raise ValueError(
                "streaming = True needs a text tower, got text = None: a vocabulary from scratch needs all captions; "
                "name one with text=…, or word_embeddings=… for a BiGRU"
            )
        if self.scheduler == "step":
            raise ValueError("streaming = True has no epochs for scheduler = 'step'; use cosine or constant")
        return self

    @model_validator(mode="after")
    def _check_flips(self) -> Self:
        """Of turned images and captions no cache has anything."""
        for name, unset in (("text_features", "null"), ("cusa", "false")):
            if self.flip_negatives and getattr(self, name):
                raise ValueError(
                    f"flip_negatives = {self.flip_negatives} beside {name} = {getattr(self, name)!r}: the caches know "
                    f"nothing of flipped images and their captions; set {name}={unset}, or flip_negatives=[]"
                )
        return self

    @model_validator(mode="after")
    def _check_towers(self) -> Self:
        """Towers that are named twice, and words."""
        has_text_tower = self.text is not None or self.model.get("text_config") is not None
        if self.word_embeddings is not None and has_text_tower:
            raise ValueError(
                f"word_embeddings = {self.word_embeddings!r} are where a BiGRU starts from, but there is a text tower "
                f"(text = {self.text!r}); set text=null, or drop word_embeddings"
            )
        has_words = self.word_embeddings is not None or self.start_from is not None
        if not has_words and self.model.get("freeze_word_embeddings", False):
            raise ValueError(
                "model.freeze_word_embeddings = True but word_embeddings = None: the words would stay as they were "
                "drawn; name a text model with word_embeddings=…"
            )
        for name in ("vision", "text", "detector"):
            if (tower := getattr(self, name)) is not None and self.model.get(f"{name}_config") is not None:
                raise ValueError(
                    f"{name} = {tower!r} and model.{name}_config both name a {name} model; give one of them (a "
                    "pretrained one, or a configuration to start from scratch)"
                )
        # A model that brings both towers, with its own pixels and tokens, leaves nothing to say of them.
        for whole in BRINGS_TOWERS:
            if getattr(self, whole) is None:
                continue
            said = f"{whole} = {getattr(self, whole)!r}"
            for name in TOWER_KEYS:
                value, default = getattr(self, name), type(self).model_fields[name].default
                if name == "detector" and whole == "dual_encoder":  # which stands beside it
                    continue
                if value != default and name != whole:
                    raise ValueError(
                        f"{name} = {value!r} beside {said}, which brings its towers with their pixels and tokens; "
                        f"set {name}={'null' if default is None else default}, or drop {whole}"
                    )
            for name in ("vision_config", "text_config", "dual_encoder_config"):
                if whole == "dual_encoder" and self.model.get(name) is not None:
                    raise ValueError(f"model.{name} is given beside {said}; leave it out")
        return self

    @model_validator(mode="after")
    def _check_resolved_model(self) -> Self:
        """Against the model's configuration as it will be, where fields depend on whether there is a dual encoder."""
        if self.start_from is not None:  # whose fields nobody knows before it is read
            return self
        whole = self.dual_encoder is not None or self.model.get("dual_encoder_config") is not None
        fields = {**model_fields(whole), **{name: value for name, value in self.model.items() if value is not None}}
        if whole:
            fields["use_refined_features"] = False
            fields["dual_encoder_config"] = self.dual_encoder or fields["dual_encoder_config"]
        fields["detector_config"] = self.detector or fields["detector_config"]
        towers = {
            f"{side}_tower_config": getattr(self, side) or fields[f"{side}_config"] or fields["dual_encoder_config"]
            for side in ("vision", "text")
        }
        self.check_with_model(SimpleNamespace(**fields, **towers))
        return self

    @model_validator(mode="after")
    def _check_sharding(self) -> Self:
        """What cannot be done with weights that are in parts."""
        if self.shard and self.tower_batch_size is not None:
            raise ValueError(
                f"shard = True and tower_batch_size = {self.tower_batch_size}: towers that go backwards several times "
                "a step need whole weights; set tower_batch_size=null, or shard=false"
            )
        if self.shard and self.mixed_precision == "fp16":
            raise ValueError(
                "shard = True and mixed_precision = 'fp16': the scaler of losses looks for infinite gradients in its "
                "own part alone; use mixed_precision=bf16, or shard=false"
            )
        return self

    @model_validator(mode="after")
    def _check_cusa(self) -> Self:
        """Keys of CUSA that contradict one another."""
        given = {name: getattr(self, name) for name in ("cusa_image_teacher", "cusa_text_teacher")}
        named = [name for name, value in given.items() if value is not None]
        missing = [name for name, value in given.items() if value is None]
        if named and not self.cusa:
            raise ValueError(f"{' and '.join(named)} given, but cusa = False; set cusa=true, or drop the caches")
        if not self.cusa:
            return self
        if missing:
            raise ValueError(
                f"cusa = True needs {' and '.join(missing)}; build them with `tvrn teachers` and give their folders"
            )
        if not self.cusa_alpha + self.cusa_beta > 0:
            raise ValueError("cusa_alpha = 0.0 and cusa_beta = 0.0 leave CUSA nothing to do; set one above 0")
        if not self.cusa_lowest_temperature <= self.cusa_student_temperature <= 0.99:
            raise ValueError(
                f"cusa_student_temperature = {self.cusa_student_temperature} is outside its bounds, "
                f"{self.cusa_lowest_temperature} (cusa_lowest_temperature) to 0.99"
            )
        return self

    # -- checks beside the model ------------------------------------------------------------------------------

    def check_with_model(self, model: Any) -> None:
        """Refuse keys that contradict the model that is trained.

        Args:
            model: its configuration, as far as the run's keys tell.

        Raises:
            ValueError: names the keys, their values, and what to set instead.
        """
        # As `TVRNConfig.keeps`, which what is known before the model is built does not have.
        whole_moves = model.dual_encoder_config is not None and not model.freeze_first_stage
        kept = {side: getattr(model, f"freeze_{side}") and not whole_moves for side in ("vision", "text")}
        self._check_frozen(model, kept)
        if model.dual_encoder_config is not None and all(kept.values()):
            self._check_frozen_first_stage()
        if self.phases is not None:
            check_phases(self.phases, model, finished=self.start_from is not None)

    def _check_frozen(self, model: Any, kept: dict[str, bool]) -> None:
        """What is frozen of the towers, where their outputs are cached or adapters learn in them."""
        for side in ("vision", "text"):
            rank = getattr(self, f"{side}_lora_rank")
            if rank is not None and getattr(model, f"freeze_{side}"):
                raise ValueError(
                    f"{side}_lora_rank = {rank} and model.freeze_{side} = True: adapters learn; set "
                    f"model.freeze_{side}=false (the tower's own weights stay as they are)"
                )
        # Which field lets a side's outputs change, and what freezes all of a dual encoder.
        free = {
            side: f"model.{'freeze_first_stage' if getattr(model, f'freeze_{side}') else f'freeze_{side}'} = False"
            for side in ("vision", "text")
        }
        whole = "" if model.dual_encoder_config is None else " and model.freeze_first_stage=true"
        if self.regions is not None and model.detector_config is not None and not model.freeze_detector:
            raise ValueError(
                f"regions = {self.regions!r} holds the outputs of a frozen detector, but model.freeze_detector = "
                "False; set it to true, or drop regions so that the detector learns from the pictures"
            )
        if self.regions is not None and model.vision_tower_config is not None and not kept["vision"]:
            raise ValueError(
                f"regions = {self.regions!r} holds the outputs of a frozen tower, but {free['vision']}; set "
                f"model.freeze_vision=true{whole}, or drop regions so that the tower learns from the pictures"
            )
        if self.text_features is not None and model.text_tower_config is None:
            raise ValueError(
                f"text_features = {self.text_features!r} needs a text tower, got text = None (a BiGRU learns from "
                "scratch); name one with text=…, or drop text_features"
            )
        if self.text_features is not None and not kept["text"]:
            raise ValueError(
                f"text_features = {self.text_features!r} needs a frozen text tower, but {free['text']}: its outputs "
                f"change while it learns; set model.freeze_text=true{whole}, or drop text_features"
            )

    def _check_frozen_first_stage(self) -> None:
        """Nothing of a dual encoder learns where all of it is frozen."""
        frozen = "model.freeze_vision, freeze_text and freeze_first_stage are all true"
        key = "start_from" if self.dual_encoder is None else "dual_encoder"
        named = {name for phase in self.schedule() for name in phase.train}
        if found := sorted(named & {"embeddings", "distilled_embeddings"}):
            raise ValueError(
                f"phases train {' and '.join(found)} of {key} = {getattr(self, key)!r}, but {frozen}: nothing of them "
                "can learn; set model.freeze_first_stage=false for its projections, or leave that phase out"
            )
        if self.cusa:
            raise ValueError(
                f"cusa = True with {key} = {getattr(self, key)!r}, but {frozen}: there is nothing to teach; set "
                "model.freeze_first_stage=false and name embeddings in a phase, or drop cusa"
            )
