"""R@K and rSum of image–text retrieval with several positives, for the `evaluate` library."""

# No __future__ annotations: `evaluate` copies this file, and reads its imports with a regular expression.
from typing import Any

import datasets
import evaluate
import numpy as np

from modeling_tvrn.metrics import retrieval_metrics

DESCRIPTION = """\
R@1, R@5 and R@10 of image-text retrieval both ways, in percent, and their sum (rSum). A query is a hit if any of its
positives is among the first K; ties count against the query. An example is an image: its scores with all captions, and
the numbers of the captions that describe it. Any number of captions an image, and of images a caption; a caption of no
image is a distractor: a candidate of every image, and no query.
"""
INPUTS = """
Args:
    predictions: one list an image: its scores with all T captions; -inf for a pair that was not scored.
    references: one list an image: the numbers (0 to T - 1) of its captions.
Returns:
    image_to_text_R@1, ..., text_to_image_R@10, rsum (percent), median and mean ranks, ties and counts of queries.
Examples:
    >>> metric = evaluate.load(modeling_tvrn.metrics.EVALUATE_FOLDER)
    >>> metric.compute(predictions=[[0.9, 0.1, 0.8], [0.3, 0.7, 0.2]], references=[[0, 2], [1]])["rsum"]
    600.0
"""
CITATION = """\
@article{pang2024tvrn,
  title = {A Mutually Textual and Visual Refinement Network for Image-Text Matching},
  author = {Pang, Shanmin and Zeng, Yueyang and Zhao, Jiawei and Xue, Jianru},
  journal = {IEEE Transactions on Multimedia}, volume = {26}, pages = {7555--7566}, year = {2024}
}
"""


class RetrievalMetric(evaluate.Metric):
    """`modeling_tvrn.metrics.retrieval_metrics` behind the interface of `evaluate`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({name: datasets.Sequence(value) for name, value in features.items()}),
        )

    def _compute(self, predictions: list[list[float]], references: list[list[int]]) -> dict[str, Any]:
        """All at once: a rank needs the whole gallery."""
        lengths = {len(row) for row in predictions}
        if len(lengths) != 1:
            raise ValueError(
                f"The predictions have {sorted(lengths)} scores; expected one score for each caption in every list."
            )
        positives = [(image, caption) for image, captions in enumerate(references) for caption in captions]
        scores = np.asarray(predictions, dtype=np.float64)
        return retrieval_metrics(scores, positives=positives, distractors=True).as_dict()
