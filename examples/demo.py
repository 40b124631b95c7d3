"""The demo page as a script.

    python examples/demo.py runs/flickr8k ~/photos
    tvrn demo runs/flickr8k ~/photos              # the same

`tvrn space` writes a Hugging Face Space of it.
"""

import argparse
import logging

from modeling_tvrn import load_model
from modeling_tvrn.cli.common import prepare_terminal
from modeling_tvrn.demo import launch


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    about, _, commands = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=commands, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="TVRN or dual encoder (CLIP, …): Hub id or folder")
    parser.add_argument("folder", help="of photographs")
    parser.add_argument("--index", help="where the index is kept (default: nowhere)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that its tokenizer or image processor brings"
    )
    return parser.parse_args()


if __name__ == "__main__":
    prepare_terminal()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    arguments = parse_arguments()
    model, processor = load_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    launch(model, processor, arguments.folder, arguments.index)
