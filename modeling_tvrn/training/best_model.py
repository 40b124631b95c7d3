"""The model folder: written whole or not at all, and only with a model better than the one it holds."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation import EvaluationReport
from ..modeling_tvrn import TVRNModel
from ..storage.files import check_listed, flush, list_files, publish_folder
from .calibration import calibrated
from .lora import merged_state
from .snapshots import WRITING_FAILED

if TYPE_CHECKING:
    from .validation import Validation

logger = logging.getLogger(__name__)

__all__ = ["TRAINED", "BestModel", "save_model"]

TRAINED = "trained"  # folder of the model before the mean with its start was taken
ALONE = ".alone"  # a mark in it: `trained` belongs to the model that is replaced
WRITTEN = ".saved"  # holds a model that is whole, while its files are moved


def save_model(folder: str | os.PathLike[str], model: Any, processor: Any, alone: bool = False) -> None:
    """Write model and processor so that the folder loads with `trust_remote_code`, then move the files into place.

    A kill while they are written leaves the folder's former model as it was; one while they are moved is made up for
    by the next `finish_saving`.

    Args:
        alone: The folder's `trained` model, of which its former one was a mean, goes with that.
    """
    target = Path(folder)
    finish_saving(target)
    aside = target / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside, state_dict=merged_state(model))
    processor.save_pretrained(aside)
    list_files(aside)
    if alone:
        (aside / ALONE).touch()
    publish_folder(aside, target / WRITTEN)
    finish_saving(target)


def finish_saving(target: Path) -> None:
    """Move the files of a model that was written whole into their places, unless it was done."""
    written = target / WRITTEN
    if written.is_dir():
        if (written / ALONE).exists():
            # Not before the new model is whole: else a kill would leave a mean of weights that passes for the trained.
            shutil.rmtree(target / TRAINED, ignore_errors=True)
            (written / ALONE).unlink()
        for path in sorted(written.iterdir()):
            os.replace(path, target / path.name)
        written.rmdir()
        flush(target)


class BestModel:
    """Keeps in a folder the model with the highest validation rSum.

    Args:
        folder: the model's.
        writes: whether this is the process that saves; the others only keep the books.
        model_class: what the folder's model is read back as.

    Attributes:
        step: the optimizer step of the model that is kept, 0 before there is one.
        rsum: its validation rSum; None before there is one.
        report: its evaluation; None before there is one, and where an earlier process made it.
    """

    def __init__(
        self, folder: str | os.PathLike[str], writes: bool = True, model_class: type[TVRNModel] = TVRNModel
    ) -> None:
        self.folder = Path(folder)
        self.model_class = model_class
        self.writes = writes
        if writes:
            finish_saving(self.folder)  # of a run that was killed
        self.step = 0
        self.rsum: float | None = None
        self.report: EvaluationReport | None = None

    def warn(self) -> None:
        """Say so where the folder holds another run's model."""
        if (self.folder / "config.json").exists():
            logger.warning("%s holds a model already; it is replaced at the first evaluation", self.folder)

    def offer(
        self, step: int, report: EvaluationReport, model: Any, processor: Any, validation: Validation | None = None
    ) -> bool:
        """Save the model if its rSum is higher than that of the one kept; with a calibration, given its validation."""
        if self.rsum is not None and report.metrics.rsum <= self.rsum:
            return False
        try:
            if self.writes:
                with contextlib.ExitStack() as while_saved:
                    if validation is not None:
                        while_saved.enter_context(calibrated(model, processor, validation.records))
                    save_model(self.folder, model, processor, alone=True)
        except WRITING_FAILED as error:
            shutil.rmtree(self.folder / ".saving", ignore_errors=True)
            logger.error(
                "the best model so far, of step %d, could not be written to %s (%s)", step, self.folder, error
            )
            return False
        self.step, self.rsum, self.report = step, report.metrics.rsum, report
        return True

    def load(self) -> TVRNModel:
        """The model that is kept, as it was trained, read back: what is measured is what was written.

        Raises:
            StorageError: a file of it is damaged or missing.
        """
        trained = self.folder / TRAINED
        folder = trained if (trained / "config.json").is_file() else self.folder
        check_listed(folder)
        model: TVRNModel = self.model_class.from_pretrained(folder).eval()
        return model
