"""`tvrn doctor`, `tvrn export`, `tvrn push`, `tvrn card`, `tvrn space`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import AsJson, Model, TrustRemoteCode, fail, load, say, table, writable

FAULTS = 1

Endpoint = Annotated[str | None, typer.Option(help="address of the Hub (default: HF_ENDPOINT, or huggingface.co)")]
FROM_FOLDER = "public name of the {} that the run read from a folder"
Vision = Annotated[str | None, typer.Option(metavar="ID", help=FROM_FOLDER.format("vision tower"))]
Text = Annotated[str | None, typer.Option(metavar="ID", help=FROM_FOLDER.format("text tower"))]
Words = Annotated[
    str | None, typer.Option(metavar="ID", help=FROM_FOLDER.format("text model behind the word embeddings"))
]
Dual = Annotated[str | None, typer.Option(metavar="ID", help=FROM_FOLDER.format("dual encoder"))]
Detector = Annotated[str | None, typer.Option(metavar="ID", help=FROM_FOLDER.format("detector"))]
Data = Annotated[str | None, typer.Option(metavar="ID", help=FROM_FOLDER.format("data"))]


def doctor(
    model: Model,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="also load it as a stranger would, which runs its Python files")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a Hub repository")] = None,
    endpoint: Endpoint = None,
    timeout: Annotated[float, typer.Option(help="seconds for each clean process")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Examine a checkpoint: would it load and score the same for somebody else?

    Files, code, weights, precision, processor and card are looked at, and the model is loaded in clean processes. Its
    own code runs only with --trust-remote-code; without it that check says "not run". Of a plain dual encoder (CLIP,
    …): can it be searched with? Exit code 1 if anything fails.

    \b
    Examples:
      tvrn doctor runs/flickr8k --trust-remote-code
      tvrn doctor me/my-tvrn --revision v1 --json | jq .ok
    """
    from ..hub import doctor as examine

    report = examine(model, trust_remote_code=trust_remote_code, revision=revision, endpoint=endpoint, timeout=timeout)
    say(report.as_dict(), str(report), as_json)
    raise typer.Exit(0 if report.ok else FAULTS)


def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="new, or an earlier export")],
    image_input: Annotated[
        str | None, typer.Option(help="pixels or regions (default: pixels where the model reads such)")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="also graphs with weights in 8 bits")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="also tvrn_search.py: search photographs with it, without torch")
    ] = False,
    tolerance: Annotated[float, typer.Option(help="largest difference from the model that is accepted")] = 1e-4,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as ONNX files that run without torch: image side, text side, pair stage (extra: export).

    Their differences from the model are measured at several sizes. tvrn_onnx.py in the folder starts with ten lines
    that search photographs with onnxruntime and NumPy. examples/export.py also measures what 8 bits cost in recall.

    \b
    Examples:
      tvrn export runs/flickr8k --output onnx/flickr8k
      tvrn export openai/clip-vit-base-patch32 --output onnx/clip --int8 --json
      tvrn export runs/flickr8k --output onnx/flickr8k --search
    """
    from ..export import export_onnx, quantize_onnx

    loaded, processor = load(model, "cpu", trust_remote_code=trust_remote_code)
    report = export_onnx(loaded, processor, output, image_input=image_input, tolerance=tolerance, search=search)
    found, text = report.as_dict(), str(report)
    if int8:
        found["int8_megabytes"] = quantize_onnx(output)
        text += "\nint8: " + ", ".join(f"{name} {size:.1f} MB" for name, size in found["int8_megabytes"].items())
    say(found, text, as_json)


def push(
    model: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a saved model, such as a run's")],
    repo_id: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="repository on the Hub; made if it is not there")
    ],
    private: Annotated[bool, typer.Option("--private", help="a private repository")] = False,
    vision: Vision = None,
    text: Text = None,
    word_embeddings: Words = None,
    dual_encoder: Dual = None,
    detector: Detector = None,
    data: Data = None,
    license: Annotated[str | None, typer.Option(help="of the weights, as the Hub names it")] = None,
    message: Annotated[str, typer.Option("--message", "-m", help="of the commit")] = "Upload TVRN model",
    endpoint: Endpoint = None,
    force: Annotated[bool, typer.Option("--force", help="push although the doctor finds faults")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show what would be pushed and the card, push nothing; needs no token")
    ] = False,
    card_file: Annotated[
        Path | None, typer.Option("--card", metavar="FILE.md", help="with --dry-run: write the card there")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Publish a model with its code and card, in one commit, if the doctor finds nothing wrong.

    The token is the one of `hf auth login` or HF_TOKEN. No code of the folder is run.

    \b
    Examples:
      tvrn push runs/scenes me/tvrn-scenes --dry-run --card card.md
      tvrn push runs/scenes me/tvrn-scenes --private
      tvrn push runs/flickr8k me/tvrn-flickr8k --vision google/mobilenet_v2_1.0_224 --data flickr8k
    """
    if card_file is not None and not dry_run:
        raise fail(f"--card is {str(card_file)!r}, which goes with --dry-run; add that, or leave --card out")
    if card_file is not None:
        writable(card_file)
    from ..hub import push_to_hub

    pushed = push_to_hub(
        model,
        None,
        repo_id,
        names=_names(
            vision=vision,
            text=text,
            word_embeddings=word_embeddings,
            dual_encoder=dual_encoder,
            detector=detector,
            data=data,
        ),
        license=license,
        private=True if private else None,
        endpoint=endpoint,
        message=message,
        force=force,
        dry_run=dry_run,
    )
    if dry_run:
        shown = pushed.card
        if card_file is not None:
            card_file.write_text(pushed.card, encoding="utf-8")
            shown = f"card: {card_file}"
        listed = [*pushed.files.items(), (f"{len(pushed.files)} files", sum(pushed.files.values()))]
        files = table(("file", "bytes"), [(name, f"{size:,}") for name, size in listed])
        say(pushed.as_dict(), f"{shown}\n\n{pushed.report}\n\n{files}\n\nNothing was pushed to {pushed.url}.", as_json)
        raise typer.Exit(0 if pushed.report.ok or force else FAULTS)
    removed = f", {len(pushed.removed)} of a former model removed" if pushed.removed else ""
    say(pushed.as_dict(), f"{pushed.url}\ncommit {pushed.commit}, {len(pushed.files)} files{removed}", as_json)


def card(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="output folder of a training run, with results.json")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="file to write (default: README.md of the run)")
    ] = None,
    name: Annotated[str | None, typer.Option(help="what the model is called (default: the folder's name)")] = None,
    vision: Vision = None,
    text: Text = None,
    word_embeddings: Words = None,
    dual_encoder: Dual = None,
    detector: Detector = None,
    data: Data = None,
    license: Annotated[str | None, typer.Option(help="of the weights, as the Hub names it")] = None,
    as_json: AsJson = False,
) -> None:
    """Render a run's model card again, from its results.json.

    \b
    Examples:
      tvrn card runs/scenes
      tvrn card runs/flickr8k -o model_cards/flickr8k.md --name tvrn-flickr8k --data flickr8k
    """
    from ..hub import write_run_card

    target = writable(output) if output is not None else None
    path = write_run_card(
        run,
        target,
        name=name,
        names=_names(
            vision=vision,
            text=text,
            word_embeddings=word_embeddings,
            dual_encoder=dual_encoder,
            detector=detector,
            data=data,
        ),
        license=license,
    )
    say({"card": str(path)}, str(path), as_json)


def space(
    model: Model,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="of the Space: new, or empty")],
    images: Annotated[Path, typer.Option(metavar="FOLDER", help="photographs to search, which are copied")],
    index_folder: Annotated[
        Path | None, typer.Option("--index", metavar="INDEX", help="of them (tvrn index): need not be encoded again")
    ] = None,
    title: Annotated[str, typer.Option(help="of the Space")] = "Photograph search",
    as_json: AsJson = False,
) -> None:
    """Write a Hugging Face Space: the page of `tvrn demo`, ready to upload; nothing is uploaded.

    A Hub id is fetched by the Space, a model's folder is copied into it, at most 1 GB with photographs and index. The
    package comes along as it is installed here.

    \b
    Examples:
      tvrn space openai/clip-vit-base-patch32 my-space --images ~/photos
      tvrn index runs/flickr8k ~/photos photos.index && \\
        tvrn space runs/flickr8k my-space --images ~/photos --index photos.index
    """
    from ..space import write_space

    written = write_space(model, folder, images, index=index_folder, title=title)
    say(written.as_dict(), str(written), as_json)


def _names(**named: str | None) -> dict[str, str]:
    return {key: value for key, value in named.items() if value is not None}
