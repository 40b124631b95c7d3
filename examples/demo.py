r"""The demo page as a script: on one's own machine, or as the `app.py` of a Hugging Face Space.

    python examples/demo.py runs/flickr8k ~/photos
    tvrn demo runs/flickr8k ~/photos              # the same

In a Space (SDK "gradio") copy this file as `app.py`, put the photographs into a folder `photos` beside it, write
`modeling-tvrn[demo]` into `requirements.txt`, and set the variables TVRN_MODEL (a Hub id) and, if the folder is called
otherwise, TVRN_FOLDER. The index is built when the Space starts; with persistent storage set TVRN_INDEX to a folder
there, and later starts encode only new photographs.
"""

import argparse
import logging
import os

from modeling_tvrn import load_model
from modeling_tvrn.cli.common import prepare_terminal
from modeling_tvrn.demo import launch


def parse_arguments() -> argparse.Namespace:
    """The command line; in a Space there is none, and the environment names everything."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model",
        nargs="?",
        default=os.environ.get("TVRN_MODEL"),
        help="TVRN or dual encoder (CLIP, …): Hub id or folder",
    )
    parser.add_argument("folder", nargs="?", default=os.environ.get("TVRN_FOLDER", "photos"), help="of photographs")
    parser.add_argument(
        "--index", default=os.environ.get("TVRN_INDEX"), help="where the index is kept (default: nowhere)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run code that its tokenizer or image processor brings",
    )
    options = parser.parse_args()
    if options.model is None:
        parser.error("no model: give one, or set TVRN_MODEL")
    return options


if __name__ == "__main__":
    prepare_terminal()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    arguments = parse_arguments()
    in_space = "SPACE_ID" in os.environ
    launch(
        *load_model(arguments.model, trust_remote_code=arguments.trust_remote_code),
        arguments.folder,
        arguments.index,
        host="0.0.0.0" if in_space else "127.0.0.1",
        port=7860 if in_space else None,
    )
