"""The folder that `evaluate.load` takes: `evaluate.load(modeling_tvrn.metrics.EVALUATE_FOLDER)`."""
