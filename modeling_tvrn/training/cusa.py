"""CUSA in a training run: the teachers' vectors beside each batch, and the loss added to the model's own.

What gets the cross-modal soft labels: the cosines of the embeddings wherever these learn, and, where pairs are scored,
late interaction and the reasoning's matching scores, before their weights in the logit. Each of the three has a
temperature of its own. The uni-modal part goes to the model's uni-modal heads, or to the embeddings of a model without
heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..losses import CUSA
from ..teachers import TeacherCache

if TYPE_CHECKING:
    from .config import TrainingConfig

__all__ = ["CUSATerms", "TeacherCollator", "check_order", "open_teachers", "take_teachers"]

PREFIX = "teacher_"


def open_teachers(config: TrainingConfig, records: Any) -> tuple[TeacherCache, TeacherCache]:
    """The configured caches of image and caption vectors, compared with the records to train on.

    Those of a stream are compared by `TeacherCollator`, as they come.

    Raises:
        ValueError: there is no cache, or it is of other data or of the other modality.
    """
    found, known = [], records if hasattr(records, "image_ids") else None
    for modality in ("image", "text"):
        key = f"cusa_{modality}_teacher"
        folder = str(getattr(config, key)).replace("{split}", config.train_split)
        try:
            found.append(TeacherCache.load(folder, dataset=known, modality=modality))
        except FileNotFoundError as error:
            raise ValueError(
                f"{key} = {folder!r}: no teacher cache there; build it with `tvrn teachers {config.data} TEACHER "
                f"--modality {modality} --split {config.train_split} --output {folder}`"
            ) from error
        except KeyError as error:
            raise ValueError(f"{key} = {folder!r} is of other data: {error.args[0]}") from error
    return found[0], found[1]


class TeacherCollator:
    """A collator that puts the teachers' vectors beside a batch: one row a caption, an image's repeated.

    It runs in the loader's workers, and reads only the batch's rows of the caches.

    Args:
        collator: makes the model's inputs of items of `CaptionDataset`.
        image_teacher, text_teacher: caches by image id and by caption id.
        check: compare every record with what was cached; for streams, whose records are not known before.
    """

    def __init__(
        self, collator: Any, image_teacher: TeacherCache, text_teacher: TeacherCache, check: bool = False
    ) -> None:
        self.check = check
        self.collator = collator
        self.image_teacher = image_teacher
        self.text_teacher = text_teacher

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The batch with `teacher_image_embeds (T, D)`, `teacher_text_embeds (T, D')`, `teacher_ids (T,)`.

        Raises:
            KeyError: an item is in no cache; the message names it.
            StaleStoreError: with `check`, a cache is of other data.
        """
        batch = dict(self.collator(items))
        ids = [item["record"]["image_id"] for item in items]
        different = list(dict.fromkeys(ids))
        row_of = {image_id: row for row, image_id in enumerate(different)}
        rows = torch.tensor([row_of[image_id] for image_id in ids])
        if self.check:
            records = {item["record"]["image_id"]: item["record"] for item in items}.values()
            self.image_teacher.check_records(records)
            self.text_teacher.check_records(records)
        # A stream's images have no row numbers; the collator numbers them, in the order of the items.
        numbers = [
            item.get("row", number) for item, number in zip(items, batch["text_image_ids"].tolist(), strict=True)
        ]
        caption_ids = [item["record"]["caption_ids"][item["caption_number"]] for item in items]
        return batch | {
            "teacher_image_embeds": self.image_teacher[different][rows],
            "teacher_text_embeds": self.text_teacher[caption_ids],
            "teacher_ids": torch.tensor(numbers, dtype=torch.int64),
        }


def take_teachers(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Take what `TeacherCollator` added out of a batch (it is changed) and return it; empty without CUSA."""
    return {name: batch.pop(name) for name in list(batch) if name.startswith(PREFIX)}


def check_order(teachers: dict[str, Tensor], text_image_ids: Tensor) -> None:
    """Compare the order of the teachers' rows with that of the captions, by their images.

    Captions of one image that changed places would not be seen: batches carry no caption ids.

    Raises:
        ValueError: they differ; names the first place, with both image numbers.
    """
    ids = teachers["teacher_ids"].to(text_image_ids.device)
    if ids.shape == text_image_ids.shape and torch.equal(ids, text_image_ids):
        return
    if ids.shape != text_image_ids.shape:
        raise ValueError(
            f"there are {len(ids)} teacher rows for {len(text_image_ids)} captions; expected one for each"
        )
    place = int((ids != text_image_ids).nonzero()[0])
    raise ValueError(
        f"the teachers' rows are in another order than the batch: row {place} is of image {ids[place].item()}, the "
        f"caption there of image {text_image_ids[place].item()}; make both from the same items"
    )


class CUSATerms(nn.Module):
    """The term that CUSA adds to a model's loss, with the learned temperatures of every similarity it labels.

    Args:
        config: the run, for weights, temperatures and teachers' combination.
        similarities: further similarities, beside the embeddings' cosines, that get cross-modal soft labels; of TVRN
            "late_interaction" and "reasoning".
    """

    def __init__(self, config: TrainingConfig, similarities: Sequence[str] = ()) -> None:
        super().__init__()
        low = config.cusa_lowest_temperature
        settings: dict[str, Any] = {
            "student_temperature": config.cusa_student_temperature,
            "temperature_bounds": (low, 0.99),
            "uni_modal_temperature_bounds": (low, 1.0),
            "teacher_temperature": config.cusa_teacher_temperature,
            "teachers": config.cusa_teachers,
            "exclude_self": config.cusa_exclude_self,
            "center_teachers": config.cusa_center_teachers,
            "on_logits": config.cusa_on_logits,
        }
        self.embeddings = CUSA(config.cusa_alpha, config.cusa_beta, **settings)
        names = list(similarities) if config.cusa_alpha else []
        self.others = nn.ModuleDict({name: CUSA(config.cusa_alpha, 0.0, **settings) for name in names})
        for other in self.others.values():
            cast(CUSA, other).looks_at_entropy = False  # the embeddings' labels are the same ones
            for name in ("image_temperature", "text_temperature"):
                other.get_parameter(name).requires_grad_(False)

    def clamp_temperatures(self) -> None:
        """Bring the learned temperatures back into their bounds; after every optimizer step."""
        for cusa in (self.embeddings, *self.others.values()):
            cast(CUSA, cusa).clamp_temperatures()

    def forward(
        self,
        teachers: dict[str, Tensor],
        image_embeds: Tensor,
        text_embeds: Tensor,
        image_ids: Tensor,
        text_image_ids: Tensor,
        unimodal: tuple[Tensor, Tensor] | None = None,
        others: dict[str, Tensor] | None = None,
        logit_scale: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The term, and its parts unweighted and detached.

        Args:
            teachers: of the whole batch, as `TeacherCollator` gives them, in the order of the captions.
            image_embeds, text_embeds: (I, P) and (T, P) unit norm; those that do not learn get no labels.
            image_ids, text_image_ids: (I,) and (T,).
            unimodal: (I, P) and (T, P) of the uni-modal heads; None: the embeddings themselves.
            others: name -> (I, T) of the further similarities that learn.
            logit_scale: logarithm of the cosines' factor in the model's own loss; needed with `cusa_on_logits`.

        Raises:
            ValueError: teachers and captions are in different orders, or the batch has fewer than two pairs.
        """
        check_order(teachers, text_image_ids)
        # An image has a row for each of its captions in the batch: N pairs.
        rows = (image_ids[None, :] == text_image_ids[:, None]).int().argmax(dim=1)
        vectors = teachers["teacher_image_embeds"].float(), teachers["teacher_text_embeds"].float()
        losses, parts = [], {}
        if image_embeds.requires_grad or text_embeds.requires_grad:
            images, texts = unimodal if unimodal is not None else (image_embeds, text_embeds)
            with torch.autocast(image_embeds.device.type, enabled=False):
                similarity = image_embeds.float()[rows] @ text_embeds.float().T
                if self.embeddings.on_logits:
                    similarity = similarity * cast(Tensor, logit_scale).float().exp()
            result = self.embeddings(*vectors, similarity=similarity, image_embeds=images[rows], text_embeds=texts)
            losses.append(result.loss)
            parts = {"cusa_cross_modal": result.cross_modal, "cusa_uni_modal": result.uni_modal}
        for name, cusa in self.others.items():
            if others is not None and name in others and others[name].requires_grad:
                result = cusa(*vectors, similarity=others[name][rows])
                losses.append(result.loss)
                parts[f"cusa_{name}"] = result.cross_modal
        total = torch.stack(losses).sum() if losses else image_embeds.new_zeros(())
        return total, {name: part for name, part in parts.items() if part is not None}


def tvrn_similarities(model: Any) -> list[str]:
    """The components of a TVRN model's logit that get soft labels beside the embeddings' cosines."""
    return [name for name in model.config.components if name != "first_stage"]


def labelled_similarities(model: Any, components: dict[str, Tensor], on_logits: bool = False) -> dict[str, Tensor]:
    """Those similarities (I, T) from unweighted components: late interaction without its scale, reasoning as scores.

    With `on_logits` both stay logits.
    """
    found = {}
    if "late_interaction" in components:
        late, scale = components["late_interaction"], model.pair.late_interaction_scale
        found["late_interaction"] = late if on_logits else late / scale.to(late.dtype).exp()
    if "reasoning" in components:
        found["reasoning"] = components["reasoning"] if on_logits else components["reasoning"].sigmoid()
    return found


def unimodal_embeds(model: Any, image_embeds: Tensor, text_embeds: Tensor) -> tuple[Tensor, Tensor] | None:
    """What a TVRN model's uni-modal heads make of its embeddings; None without heads."""
    if not model.config.use_unimodal_heads:
        return None
    return model.unimodal_image_embeds(image_embeds), model.unimodal_text_embeds(text_embeds)
