"""Train TVRN and write a model folder that AutoModel.from_pretrained loads.

The quickstart, on generated scenes, some eight minutes on two cores:

    python examples/train.py

Your own pairs, or another recipe, with any key changed on the command line:

    python examples/train.py data=pairs.csv
    accelerate launch examples/train.py --config examples/configs/flickr30k.yaml batch_size=128 model.hidden_size=256

Several GPUs or machines: see examples/configs/accelerate/. A run that was interrupted goes on with `resume=auto`.
"""

import argparse
import logging
import os
import sys
from typing import Any

from modeling_tvrn import training
from modeling_tvrn.cli.common import prepare_terminal
from modeling_tvrn.redaction import guard_logs, redacted_text
from modeling_tvrn.training import TrainingConfig, describe
from modeling_tvrn.training.command import settings_of
from modeling_tvrn.training.interrupt import watching_signals


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The recipe and the words after it; `--help` lists every key."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Keys, with their defaults:\n\n" + describe(TrainingConfig).replace("%", "%%"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="NAME|FILE", help="recipe or YAML file of keys (default: scenes; for your own data: own)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that replace those of the recipe")
    given = sys.argv[1:] if arguments is None else arguments
    options, others = parser.parse_known_intermixed_args(given)
    if others:  # such as `--data x`, which is answered where the keys are known
        options.overrides = [word for word in given if word in {*others, *options.overrides}]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Read the configuration, train, and print the table of results."""
    prepare_terminal()
    options = parse_arguments(arguments)
    is_main = os.environ.get("RANK", "0") == "0"  # of several processes one speaks, but for warnings
    level = logging.INFO if is_main else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    guard_logs()
    try:
        config = settings_of(options.config, options.overrides)
        result = run(config)
    except (ValueError, OSError, ImportError) as error:
        print(f"train.py: {redacted_text(str(error))}", file=sys.stderr)
        return 2
    except training.TrainingStopped as error:
        print(f"train.py: {redacted_text(str(error))}", file=sys.stderr)
        return 1
    if is_main:
        print(f"\n{result['table']}\n\nmodel, card, results and pictures: {config.output_dir}")
    return 0


def run(config: TrainingConfig) -> dict[str, Any]:
    """Train; what that needs is loaded only for a configuration that is right."""
    with watching_signals(set_up=True):  # from here on: importing takes seconds
        from transformers.utils.logging import disable_progress_bar

        train = training.train

    disable_progress_bar()  # one for each saved model is noise in a log
    return train(config)


if __name__ == "__main__":
    sys.exit(main())
