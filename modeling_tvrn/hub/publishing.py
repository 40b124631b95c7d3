"""From a model in memory or a run's folder to a repository of the Hub: examined first, then one commit."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants

from ..modeling_tvrn import TVRNModel
from ..processing_tvrn import TVRNProcessor
from ..redaction import redacted, redacted_text
from .card import CardMetadata, pipeline_tag, write_model_card
from .errors import explained
from .examination import examine_folder
from .files import INDEX, PICKLES, WEIGHTS
from .foreign import check_own_folder, check_trained
from .portable import is_hub_id, portable
from .report import DoctorReport
from .run_card import OWN_DATA, config_facts, read_results, usage_of, write_run_card

logger = logging.getLogger(__name__)

REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

__all__ = ["Pushed", "push_to_hub"]


@dataclass(frozen=True)
class Pushed:
    """What a push made, or would make.

    Attributes:
        repo_id: where it went.
        url: of the repository.
        commit: hash of the one commit; that of the head where nothing had changed; None of a dry run.
        files: what the commit holds, with their sizes in bytes.
        removed: files of an earlier model that the same commit takes away; a dry run does not look for them.
        report: of the doctor.
        card: the text of README.md.
    """

    repo_id: str
    url: str
    commit: str | None
    files: Mapping[str, int]
    removed: Sequence[str]
    report: DoctorReport
    card: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**vars(self), "report": self.report.as_dict()}


def push_to_hub(
    model: Any,
    processor: Any = None,
    repo_id: str = "",
    *,
    results: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    card: str | None = None,
    names: Mapping[str, str] | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    message: str = "Upload TVRN model",
    force: bool = False,
    timeout: float = 600.0,
    dry_run: bool = False,
) -> Pushed:
    """Publish a model with its processor, code and card in a single commit, if the doctor finds nothing wrong.

    The weights are read by the installed package and saved again with its code: no code of a folder is ever run. Of a
    former model in the repository the same commit removes weights and code that the new one does not have.

    Args:
        model: a model in memory, or a folder of a saved one (a run's folder brings results.json and curve).
        processor: of a model in memory; a folder has its own.
        repo_id: "owner/name".
        results: folder of the training run, or results.json's content, for the card of a model in memory.
        card: the card's whole text, in place of the rendered one; what looks like a secret is taken out.
        names, license: see `write_run_card`.
        private: whether a new repository is private; for one that exists, what it has to be.
        token: default: the one that `hf auth login` or HF_TOKEN left.
        endpoint: of the Hub; default: HF_ENDPOINT or huggingface.co.
        message: of the commit.
        force: push although the doctor found faults.
        timeout: seconds for each of the doctor's processes.
        dry_run: render and examine everything, ask no Hub, need no token and push nothing; what the doctor finds is in
            the report alone.

    Raises:
        ValueError: the doctor found faults (the message is its table), an unmodified dual encoder of somebody else,
            or wrong arguments; nothing was pushed.
        PermissionError: no token, one that is not accepted, or one without the right to write there.
        ConnectionError: the Hub cannot be reached, or the connection broke; the repository is as it was.
        RuntimeError: somebody else pushed meanwhile.
    """
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id is {repo_id!r}; expected 'owner/name'")
    if isinstance(model, (str, os.PathLike)):
        check_own_folder(model, "pushed")
    where = endpoint or constants.ENDPOINT
    api = HfApi(endpoint=endpoint, token=token)
    if not dry_run:
        with explained("pushing to", repo_id, where):
            api.whoami()  # before minutes of work: is there a token, and does this Hub know it?
    model, processor, results = _opened(model, processor, results)
    check_trained(
        model, isinstance(results, Mapping) or (results is not None and (results / "results.json").is_file())
    )
    with tempfile.TemporaryDirectory(prefix="tvrn-push-") as temporary:
        folder = Path(temporary)
        _stage(folder, model, processor, results, repo_id, card, names, license)
        files = sorted(path.name for path in folder.iterdir())
        report = examine_folder(
            folder, files, repo_id, trust_remote_code=True, timeout=timeout, published=True, memory=(model, processor)
        )
        sizes = {name: (folder / name).stat().st_size for name in files}
        content = (folder / "README.md").read_text("utf-8")
        if dry_run:
            return Pushed(repo_id, f"{where}/{repo_id}", None, sizes, [], report, content)
        if not report.ok and not force:
            raise ValueError(f"not pushed, the doctor found faults (force=True pushes all the same):\n\n{report}")
        with explained("pushing to", repo_id, where):
            url, commit, removed = _commit(api, folder, files, repo_id, private, message)
        return Pushed(repo_id, url, commit, sizes, removed, report, content)


def _opened(model: Any, processor: Any, results: Any) -> tuple[Any, Any, Path | Mapping[str, Any] | None]:
    """Model and processor in memory, and where the run's results are."""
    if not isinstance(model, (str, os.PathLike)):
        if processor is None:
            raise ValueError("a model in memory needs its processor: push_to_hub(model, processor, repo_id)")
        if results is None or isinstance(results, Mapping):
            return model, processor, results
        _refuse_links(Path(results))
        return model, processor, Path(results)
    folder = Path(model)
    if processor is not None:
        raise ValueError("processor goes with a model in memory; a folder brings its own")
    if not folder.is_dir():
        raise ValueError(f"{os.fspath(model)!r} is no folder; expected that of a saved model, or a model in memory")
    own = results if results is not None else folder
    for each in {folder, folder if isinstance(own, Mapping) else Path(own)}:
        _refuse_links(each)
    return (
        TVRNModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True),
        TVRNProcessor.from_pretrained(folder, trust_remote_code=False),
        own if isinstance(own, Mapping) else Path(own),
    )


def _refuse_links(folder: Path) -> None:
    """Refuse files that lie elsewhere: `curve.png` may be a link to what nobody means to publish.

    Weights, which are read as tensors, may lie anywhere; and so may the files of the Hub's own cache.

    Raises:
        ValueError: names the link and where it leads.
    """
    home = folder.resolve()
    inside = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for path in folder.glob("*"):
        target = path.resolve()
        if path.suffix != ".safetensors" and not any(target.is_relative_to(each) for each in inside):
            raise ValueError(
                f"not pushed: {path} is a link to {target}, which lies outside the folder; put the file itself there, "
                "or remove the link"
            )


def _stage(
    folder: Path,
    model: Any,
    processor: Any,
    results: Path | Mapping[str, Any] | None,
    repo_id: str,
    card: str | None,
    names: Mapping[str, str] | None,
    license: str | None,
) -> None:
    """Write everything that will be pushed into an empty folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    run = results if isinstance(results, Path) else None
    found: Mapping[str, Any] | None = results if isinstance(results, Mapping) else None
    if run is not None and (run / "results.json").is_file():
        found = read_results(run)
    if found is not None:
        found = redacted(dict(found))
        (folder / "results.json").write_text(json.dumps(portable(dict(found)), indent=2) + "\n", encoding="utf-8")
        for picture in _pictures(run, found):
            shutil.copyfile(picture, folder / picture.name)
    if card is None and found is not None:
        write_run_card(folder, name=repo_id, names=names, results=found, license=license)
    elif card is None and run is not None and (run / "README.md").is_file():
        _write_card(folder, (run / "README.md").read_text("utf-8"))
    elif card is None:
        _write_plain_card(folder, model, processor, repo_id, license)
    else:
        _write_card(folder, card)


def _write_card(folder: Path, card: str) -> None:
    """A card as somebody wrote it, but for secrets: what was pushed once cannot be taken back."""
    (folder / "README.md").write_text(redacted_text(card), encoding="utf-8")


def _pictures(run: Path | None, results: Mapping[str, Any]) -> list[Path]:
    """What may be shown: search results only of generated scenes, since photographs belong to others."""
    if run is None:
        return []
    names = ["curve.png", "calibration.png"] + ["query.png"] * (results["config"]["data"] == "scenes")
    return [run / name for name in names if (run / name).is_file()]


def _write_plain_card(folder: Path, model: Any, processor: Any, repo_id: str, license: str | None) -> None:
    """The card of a model whose training left no results.json."""
    config = model.config.to_diff_dict()
    own = model.config.dual_encoder_config
    dual_encoder = None if own is None else own.name_or_path or own.model_type
    bases = [dual_encoder] if dual_encoder is not None and "/" in dual_encoder and is_hub_id(dual_encoder) else []
    write_model_card(
        folder,
        CardMetadata(name=repo_id, base_models=bases, license=license, pipeline_tag=pipeline_tag(config)),
        title=repo_id,
        summary="An image–text matching model. It ranks images for a sentence and sentences for an image.",
        facts=config_facts(config, dual_encoder=dual_encoder),
        usage=usage_of(repo_id, config),
        limits="Nothing is known here of what it was trained on or how well it does: ask who published it.",
        terms=OWN_DATA,
        max_text_length=processor.max_text_length,
        teachers={},
    )


def _commit(
    api: HfApi, folder: Path, files: Sequence[str], repo_id: str, private: bool | None, message: str
) -> tuple[str, str, list[str]]:
    """One commit on top of the head as it is now: address of the repository, the commit's hash, what it removes."""
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    info = api.model_info(repo_id)
    if private and not info.private:
        raise ValueError(
            f"{repo_id} exists and is public, which private=True does not change: make it private in its settings "
            "first, or choose another name. Nothing was pushed"
        )
    stale = [file.rfilename for file in info.siblings or [] if _is_stale(file.rfilename, files)]
    added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in files]
    removed = [CommitOperationDelete(path_in_repo=name) for name in stale]
    commit = api.create_commit(repo_id, [*added, *removed], commit_message=message, parent_commit=info.sha)
    logger.info("pushed %d files to %s as %s", len(files), url, commit.oid)
    return str(url), commit.oid, stale


def _is_stale(name: str, files: Sequence[str]) -> bool:
    """A weight, pickle or shipped file of an earlier model, which the new one would be mixed up with."""
    if "/" in name or name in files:
        return False
    shard = name.startswith("model-") and name.endswith(".safetensors")
    return shard or name in (WEIGHTS, INDEX) or name.endswith((*PICKLES, "_tvrn.py"))
