"""The keys of a training run: what each is called, its default, its limits, and what it means."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .phases import ALL, EXAMPLE, PhaseConfig, read_phases
from .settings import setting

__all__ = ["TrainingKeys"]

EPOCHS = 10
PROMPT = "a photo of a {}."
FROM_RUN = ("batch_size", "learning_rate", "region_dropout", "word_dropout", "warmup_ratio")


@dataclass
class TrainingKeys:
    """Every key of a training run, unchecked; `TrainingConfig` checks them."""

    data: str = setting(
        "scenes", "data", "what load_pairs reads: flickr8k, flickr30k, coco, scenes, a path or a Hub id"
    )
    data_options: dict[str, Any] = setting({}, "data", "further keywords of load_pairs, the same for both splits")
    train_split: str = setting("train", "data", "name of the split that is trained on")
    validation_split: str = setting(
        "validation",
        "data",
        "name of the split that chooses the best checkpoint; where the data have none, 10 % of the training images "
        "are set aside, drawn by seed",
    )
    max_train_images: int | None = setting(None, "data", "train on the first N images only (null: all)", minimum=1)
    streaming: bool = setting(
        False,
        "data",
        "read the training split as it comes, shard by shard, in an order that resumes exactly; needs max_steps, or "
        "phases with steps, each of which then is one epoch, and a pretrained text tower",
    )
    stream_shards_at_once: int = setting(
        4, "data", "streaming: shards (files, row groups) read side by side", minimum=1
    )
    stream_rows_at_once: int = setting(
        1024, "data", "streaming: images whose captions are shuffled together, encoded in memory", minimum=1
    )
    regions: str | None = setting(
        None, "data", "folder of a region cache read instead of the pictures; {split} in it becomes the split's name"
    )
    num_workers: int = setting(0, "data", "processes that load data; 0 loads in the main process", minimum=0)
    allow_overlap: bool = setting(
        False, "data", "go on although validation images are trained on too; results.json and the card then say so"
    )

    dual_encoder: str | None = setting(
        None,
        "towers",
        "Hub id or path of a dual encoder (CLIP, SigLIP, ...) that is both towers and the first stage of the score; "
        "in place of vision and text",
    )
    start_from: str | None = setting(
        None,
        "towers",
        "Hub id or path of a finished TVRN to train on, with its processor; in place of towers and sizes",
    )
    vision: str | None = setting(None, "towers", "Hub id or path of the vision backbone (null: region features)")
    text: str | None = setting(
        None, "towers", "Hub id or path of the text encoder (null: words and BiGRU from scratch)"
    )
    word_embeddings: str | None = setting(
        None,
        "towers",
        "BiGRU text: Hub id or path of the text model whose tokens and input embeddings it starts from (null: words "
        "of the training captions, from scratch); model.freeze_word_embeddings=true keeps them as they are",
    )
    trust_remote_code: bool = setting(
        False,
        "towers",
        "run Python code that the folder or repository of a tokenizer, image processor or word_embeddings brings; "
        "a tower's own class must be one of transformers'",
    )
    image_size: int | None = setting(
        None, "towers", "pixels a side that the image processor delivers (null: its own)", minimum=1
    )
    max_text_length: int = setting(64, "towers", "tokens at which a caption is cut (counted and reported)", minimum=3)
    min_word_frequency: int = setting(
        1,
        "towers",
        "BiGRU text from scratch: words seen less often in the training captions become <unk>",
        minimum=1,
    )
    text_features: str | None = setting(
        None,
        "towers",
        "folder of the caption cache: what a frozen text tower gives for each caption, made there at first use and "
        "shared by runs (null: the tower runs live)",
    )
    gradient_checkpointing: bool = setting(
        False, "towers", "recompute the towers' activations backwards to save memory"
    )
    vision_lora_rank: int | None = setting(
        None,
        "towers",
        "low-rank adapters in the vision tower, by peft, in place of fine-tuning it (null: none)",
        minimum=1,
    )
    text_lora_rank: int | None = setting(
        None,
        "towers",
        "low-rank adapters in the text tower, by peft, in place of fine-tuning it (null: none)",
        minimum=1,
    )
    lora_alpha: int | None = setting(
        None, "towers", "scale of the adapters, over the rank (null: twice the rank)", minimum=1
    )
    lora_targets: list[str] = setting(
        [], "towers", "last names of the layers that get adapters (none: all linear ones)"
    )
    tower_batch_size: int | None = setting(
        None,
        "towers",
        "items that the towers run over at a time, twice (once without gradients), so that a batch of thousands fits "
        "into memory; gradients stay the same (null: the whole batch, once)",
        minimum=1,
    )
    model: dict[str, Any] = setting({}, "towers", "fields of TVRNConfig, as model.NAME=VALUE")

    phases: list[dict[str, Any]] | None = setting(
        None,
        "schedule",
        "what is trained one after another, each with its own warm-up and decay (null: everything at once); what an "
        "entry leaves out comes from the run's own keys, and phases.N.KEY=VALUE changes entry N, counted from 0",
        items=PhaseConfig,
        example=EXAMPLE,
    )
    epochs: int | None = setting(
        None, "schedule", f"without phases: times that every caption is seen (null: {EPOCHS})", minimum=1
    )
    max_steps: int | None = setting(
        None, "schedule", "without phases: optimizer steps; overrides epochs (null: epochs)", minimum=1
    )
    batch_size: int = setting(64, "schedule", "captions a batch, each with its image", minimum=2)
    batch_captions_per_image: int = setting(
        1, "schedule", "captions of the same image put into the same batch", minimum=1
    )
    gradient_accumulation_steps: int = setting(
        1, "schedule", "batches whose gradients make one optimizer step; negatives stay within a batch", minimum=1
    )

    learning_rate: float = setting(5e-4, "optimizer", "highest rate of everything that is not pretrained", above=0.0)
    tower_learning_rate: float = setting(
        5e-5,
        "optimizer",
        "highest rate of towers, and of a dual encoder's projections, that are not frozen",
        above=0.0,
    )
    warmup_ratio: float = setting(
        0.05, "optimizer", "share of a phase's steps over which the rate rises linearly", minimum=0.0, maximum=1.0
    )
    scheduler: str = setting(
        "cosine", "optimizer", "what the rate does after the warm-up", choices=("cosine", "step", "constant")
    )
    decay_epochs: list[int] = setting(
        [], "optimizer", "scheduler=step: epochs after which the rate is multiplied", minimum=1
    )
    decay_factor: float = setting(0.1, "optimizer", "scheduler=step: what it is multiplied by", above=0.0, maximum=1.0)
    weight_decay: float = setting(
        0.01, "optimizer", "AdamW's, on matrices only: none on biases, norms and temperatures", minimum=0.0
    )
    adam_beta1: float = setting(0.9, "optimizer", "AdamW's decay of the gradient's mean", minimum=0.0, below=1.0)
    adam_beta2: float = setting(
        0.999, "optimizer", "AdamW's decay of the squared gradient's mean", minimum=0.0, below=1.0
    )
    adam_epsilon: float = setting(1e-8, "optimizer", "AdamW's floor under the root", above=0.0)
    max_grad_norm: float | None = setting(
        2.0, "optimizer", "gradients are scaled down to this norm (null: never)", above=0.0
    )
    ema_decay: float | None = setting(
        None,
        "optimizer",
        "evaluate and save a running mean of the weights with this decay a step (null: off)",
        above=0.0,
        below=1.0,
    )

    weight_interpolation: float | None = setting(
        None,
        "regularisation",
        "the model that is kept is a mean of the pretrained weights and what became of them, with this share of the "
        "latter (WiSE-FT), which forgets less; its folder `trained` holds the latter (null: off)",
        above=0.0,
        below=1.0,
    )
    word_dropout: float = setting(
        0.0,
        "regularisation",
        "probability that a word is left out of matching (one at least stays)",
        minimum=0.0,
        below=1.0,
    )
    region_dropout: float = setting(
        0.0,
        "regularisation",
        "probability that a region is left out of matching (one at least stays)",
        minimum=0.0,
        below=1.0,
    )

    cusa: bool = setting(False, "cusa", "add soft labels of frozen teachers (CUSA) to the losses; needs both caches")
    cusa_image_teacher: str | None = setting(
        None, "cusa", "folder of the image teacher's cache (tvrn teachers); {split} becomes train_split"
    )
    cusa_text_teacher: str | None = setting(None, "cusa", "folder of the text teacher's cache, by caption")
    cusa_alpha: float = setting(1.0, "cusa", "weight of the cross-modal soft labels (0: off)", minimum=0.0)
    cusa_beta: float = setting(
        0.75, "cusa", "weight of the uni-modal soft labels (0: off); gives the model uni-modal heads", minimum=0.0
    )
    cusa_teacher_temperature: float = setting(
        1.0, "cusa", "of the teachers' cosines; smaller makes their rows more peaked", above=0.0
    )
    cusa_student_temperature: float = setting(
        0.45, "cusa", "where the learned temperatures start", above=0.0, below=1.0
    )
    cusa_lowest_temperature: float = setting(
        0.10, "cusa", "bound below which the learned temperatures do not fall", above=0.0, below=0.99
    )
    cusa_teachers: str = setting(
        "own",
        "cusa",
        "whose cosines label the cross-modal part: each side's own teacher, or both by their mean",
        choices=("own", "mean", "geometric_mean"),
    )
    cusa_exclude_self: bool = setting(
        False, "cusa", "label the other items of a batch alone, without the diagonal that the paper keeps"
    )
    cusa_on_logits: bool = setting(
        False, "cusa", "label the model's logits in their own scale, not cosines and scores with learned temperatures"
    )
    cusa_center_teachers: bool = setting(
        False, "cusa", "the teachers' cosines about the batch's mean vector: tells never-negative features apart"
    )

    evaluation_steps: int | None = setting(
        None, "evaluation", "optimizer steps between two evaluations (null: at the end of each epoch)", minimum=1
    )
    evaluation_images: int | None = setting(
        None,
        "evaluation",
        "evaluate on the first N validation images while training (null: all), at the end on all",
        minimum=2,
    )
    evaluation_batch_size: int = setting(64, "evaluation", "images, and captions, encoded at a time", minimum=1)
    evaluation_chunk_size: int | None = setting(
        None, "evaluation", "pairs scored at a time (null: the model's pair_chunk_size)", minimum=1
    )
    evaluate_embeddings: bool = setting(
        True, "evaluation", "also give the recalls of image_embeds and text_embeds alone"
    )

    zero_shot: str | None = setting(
        None,
        "evaluation",
        "folder with a folder of images a label, named by it: zero-shot accuracy before and after the training",
    )
    zero_shot_prompt: str = setting(PROMPT, "evaluation", "what is said of a label, {} where it goes")

    output_dir: str = setting("runs/tvrn", "run", "folder of the model: weights, processor, card, results, curve")
    resume: str | None = setting(
        None,
        "run",
        "go on from a checkpoint: auto (the newest whole one of output_dir, else from the start), or its folder",
    )
    resume_changed: bool = setting(False, "run", "go on although the checkpoint was made with other settings")
    save_steps: int | None = setting(
        None, "run", "optimizer steps between two checkpoints (null: at the end of each epoch)", minimum=1
    )
    keep_checkpoints: int = setting(
        2, "run", "newest checkpoints that stay in output_dir/checkpoints, beside the best model (0: none)", minimum=0
    )
    seed: int = setting(0, "run", "what initial weights, order of the data and dropout follow from", minimum=0)
    mixed_precision: str = setting("no", "run", "precision of the forward pass", choices=("no", "bf16", "fp16"))
    shard: bool = setting(
        False,
        "run",
        "divide weights, gradients and moments among the processes (FSDP2) instead of holding them in each; a "
        "single process has nothing to divide",
    )
    cpu: bool = setting(False, "run", "stay on the CPU even where there is an accelerator")
    logging_steps: int = setting(50, "run", "optimizer steps between two logged lines and tracked values", minimum=1)
    trackers: list[str] = setting([], "run", "where values are tracked", choices=("tensorboard", "trackio", "wandb"))
    query: str | None = setting(None, "run", "a text searched among the validation pictures in the end: query.png")

    def schedule(self) -> list[PhaseConfig]:
        """The phases, with everything that they leave out filled in; without any, one of all.

        Raises:
            ValueError: an entry is wrong; names its key and value.
        """
        unset = {name: getattr(self, name) for name in FROM_RUN}
        if self.phases is not None:
            return read_phases(self.phases, unset)
        epochs = None if self.max_steps is not None else self.epochs or EPOCHS
        return [PhaseConfig([ALL], epochs, self.max_steps, **unset)]

    def as_dict(self) -> dict[str, Any]:
        """All keys and values, ready for YAML or JSON; secrets in `data_options` too: `redacted` takes them out."""
        return asdict(self)
