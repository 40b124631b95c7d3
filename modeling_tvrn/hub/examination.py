"""The doctor: does a checkpoint hold what somebody else needs, and does it compute elsewhere what it computes here?"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download

from .card_check import check_card
from .errors import explained
from .files import PICKLES, check_code, check_files, check_no_pickle, read_json
from .plain import check_plain
from .report import Check, DoctorReport
from .running import RESAVE, check_running
from .weights import check_same_weights, check_weights

__all__ = ["doctor", "examine_folder"]


def doctor(
    model_id_or_path: Any,
    processor: Any = None,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    timeout: float = 600.0,
) -> DoctorReport:
    """Examine a checkpoint: files, code, weights, processor, card, and the same logits in clean processes.

    One process has this package, and runs no code of the checkpoint. The other lacks it, as that of a stranger who
    has only transformers: there `AutoModel.from_pretrained(…, trust_remote_code=True)` runs the checkpoint's Python
    files. That check is the only one that runs them, and is made for a folder or a Hub id only with
    `trust_remote_code=True`; a model in memory is saved first and brings its own, already running code.

    Args:
        model_id_or_path: a folder, a Hub id, or a model in memory (then with its processor).
        processor: of a model in memory.
        trust_remote_code: run the checkpoint's code in the process without the package.
        revision, token, endpoint: of the Hub repository.
        timeout: seconds for each process.

    A plain dual encoder (CLIP, SigLIP, …) is examined as such: its files and weights, the probe that accepts a first
    stage, and its scores, in this process, without any code of its own.

    Returns:
        The report: `str()` is a table, `.ok` whether nothing failed, `.to_json()` for scripts.

    Raises:
        ValueError: neither a folder nor a Hub id; a model without its processor.
        FileNotFoundError, PermissionError, ConnectionError: the repository cannot be read; the message says why.
    """
    if isinstance(model_id_or_path, torch.nn.Module):
        if processor is None:
            raise ValueError("a model in memory needs its processor beside it: doctor(model, processor)")
        memory: tuple[Any, Any] = model_id_or_path, processor
        with tempfile.TemporaryDirectory(prefix="tvrn-doctor-") as temporary:
            folder = Path(temporary)
            for part in memory:
                part.save_pretrained(folder)
            names = [path.name for path in folder.iterdir()]
            return examine_folder(
                folder, names, "model in memory", trust_remote_code=True, timeout=timeout, memory=memory
            )
    if processor is not None:
        raise ValueError("processor goes with a model in memory; a folder or Hub id brings its own")
    name = os.fspath(model_id_or_path)
    if Path(name).is_dir():
        folder = Path(name)
        names = [path.name for path in folder.iterdir() if path.is_file()]
        return examine_folder(folder, names, name, trust_remote_code=trust_remote_code, timeout=timeout)
    if Path(name).exists() or Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(
            f"{name!r} is no folder; expected the folder of a saved model, or a Hub id such as 'me/my-tvrn'"
        )
    return _examine_repository(name, revision, token, endpoint, trust_remote_code, timeout)


def _examine_repository(
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    endpoint: str | None,
    trust_remote_code: bool,
    timeout: float,
) -> DoctorReport:
    where = endpoint or constants.ENDPOINT
    with explained("reading", repo_id, where):
        info = HfApi(endpoint=endpoint, token=token).model_info(repo_id, revision=revision)
        folder = snapshot_download(
            repo_id,
            revision=info.sha,
            token=token,
            endpoint=endpoint,
            # Known by their names, or of other frameworks: nobody needs to fetch them.
            ignore_patterns=[f"*{ending}" for ending in (*PICKLES, ".h5", ".msgpack", ".onnx", ".ot")],
        )
    names = [file.rfilename for file in info.siblings or []]
    report = examine_folder(
        Path(folder), names, repo_id, trust_remote_code=trust_remote_code, timeout=timeout, published=True
    )
    report.revision = info.sha
    return report


def examine_folder(
    folder: Path,
    names: list[str],
    title: str,
    *,
    trust_remote_code: bool,
    timeout: float,
    published: bool = False,
    memory: tuple[Any, Any] | None = None,
) -> DoctorReport:
    """Every check on a folder.

    Args:
        folder: the checkpoint.
        names: its files, those not downloaded too.
        title: what the report is called.
        trust_remote_code: whether the folder's code may run.
        timeout: seconds for each process.
        published: it lies on the Hub, where a missing card is a fault.
        memory: the model and processor that were saved there.
    """
    report = DoctorReport(title)
    try:
        config = read_json(folder / "config.json")
        kind = config.get("model_type")
        if kind not in (None, "tvrn") and {"vision_config", "text_config"} <= set(config):
            report.checks += check_plain(folder, names)
            return report
        report.checks += [check_files(folder), check_no_pickle(folder, names), check_code(folder)]
    except ValueError as error:
        report.checks.append(Check("files", "failed", str(error), RESAVE))
        return report
    if kind != "tvrn":
        advice = "give the folder of a saved TVRN model" if kind is None else "use that model's own tools"
        report.checks.append(
            Check("config", "failed", f"model_type is {kind!r}; expected 'tvrn', or a dual encoder", advice)
        )
        return report
    report.checks += check_weights(folder)
    if memory is not None and report["weights"].status == "ok":
        report.checks.append(check_same_weights(folder, memory[0]))
    report.checks += check_running(folder, trust_remote_code, timeout, memory)
    report.checks.append(check_card(folder, published))
    return report
