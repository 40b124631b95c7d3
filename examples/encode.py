r"""Photographs encoded by many processes, on one machine or several, by accelerate; the first then makes the index.

    accelerate launch examples/encode.py openai/clip-vit-base-patch32 photos photos.index

Every process encodes its share and leaves it in the index's folder, which all of them have to see.
"""

import argparse
import json
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from modeling_tvrn import EncodedImages, load_model
from modeling_tvrn.cli.common import prepare_terminal
from modeling_tvrn.data.image_folder import image_files
from modeling_tvrn.data.images import ImageError, decode_image
from modeling_tvrn.index import ImageTextIndex


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="TVRN or dual encoder (CLIP, …): Hub id or folder")
    parser.add_argument("folder", type=Path, help="of photographs")
    parser.add_argument("index", type=Path, help="folder of the index")
    parser.add_argument("--batch-size", type=int, default=64, help="photographs encoded at a time")
    parser.add_argument("--url", help="of a Qdrant server that gets the index too")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    """Encode this process's share; in the first process, wait for the others and build the index."""
    prepare_terminal()
    options = parse_arguments()
    # Shares differ in size, and none is to be lost to the ten minutes that processes wait for each other elsewhere.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    model, processor = load_model(options.model, device=state.device)
    folder = options.folder.resolve()
    paths = sorted(image_files(folder))
    if not paths:
        raise SystemExit(f"{options.folder} holds no photographs")
    encoded, names = [], []
    with state.split_between_processes(paths) as mine:
        for start in range(0, len(mine), options.batch_size):
            images = []
            for path in mine[start : start + options.batch_size]:
                try:
                    images.append(decode_image(path))
                except ImageError as error:
                    print(f"process {state.process_index} leaves out {error}")
                else:
                    names.append(path.relative_to(folder).as_posix())
            if images:
                inputs = {name: value.to(state.device) for name, value in processor(images=images).items()}
                encoded.append(model.encode_images(**inputs).to("cpu").to(torch.float16))
    parts = options.index / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    if encoded:
        EncodedImages.cat(encoded).save(parts / f"{state.process_index}.safetensors")
    (parts / f"{state.process_index}.json").write_text(json.dumps(names))
    print(f"process {state.process_index} of {state.num_processes}: {len(names)} of {len(mine)} photographs")
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    named = [json.loads((parts / f"{number}.json").read_text()) for number in range(state.num_processes)]
    if not any(named):
        raise SystemExit(f"{options.folder} holds no photograph that can be read")
    whole = [EncodedImages.load(parts / f"{number}.safetensors") for number, own in enumerate(named) if own]
    server = {"url": options.url} if options.url else {}
    index = ImageTextIndex.build(
        model,
        processor,
        EncodedImages.cat(whole),
        options.index,
        ids=[name for own in named for name in own],
        **server,
    )
    print(index.report)


if __name__ == "__main__":
    main()
