"""Streamed ranks, two-stage search and averages, against the full matrix and metrics of it."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from modeling_tvrn import scoring
from modeling_tvrn.metrics import retrieval_metrics
from modeling_tvrn.scoring import EmbeddingScore, average, rank, score_matrix, search_then_rerank
from modeling_tvrn.scoring import blocks as blocks_module
from modeling_tvrn.scoring.plan import BlockPlan


@dataclass
class Items:
    """A gallery of vectors: what the pair score reads, and a noisy copy as embeddings."""

    vectors: torch.Tensor
    embeds: torch.Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    def select(self, indices) -> "Items":
        return Items(self.vectors[indices], self.embeds[indices])


class CountingModel(torch.nn.Module):
    """Integer products, so that every block order gives the same bits and ties abound; counts what it scores."""

    def __init__(self, scale: float = 1.0, shift: float = 0.0):
        super().__init__()
        self.shift = shift
        self.scale, self.scored, self.largest, self.seen_training = scale, 0, 0, False

    def match(self, images: Items, texts: Items, chunk_size: int | None = None) -> torch.Tensor:
        self.scored += len(images) * len(texts)
        self.largest = max(self.largest, len(images) * len(texts))
        self.seen_training |= self.training
        return self.scale * (images.vectors @ texts.vectors.T)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(logits + self.shift)


def galleries(seed: int, images: int = 23) -> tuple[Items, Items, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    rows = np.repeat(np.arange(images), np.random.default_rng(seed).integers(1, 5, size=images))
    np.random.default_rng(seed + 1).shuffle(rows)
    left = torch.randint(-1, 2, (images, 9), generator=generator).float()
    right = left[rows] * (torch.rand(len(rows), 9, generator=generator) < 0.7)
    noisy = [side + 0.6 * torch.randn(side.shape, generator=generator) for side in (left, right)]
    unit = [torch.nn.functional.normalize(side, dim=1) for side in noisy]
    return Items(left, unit[0]), Items(right, unit[1]), rows


@pytest.fixture(params=[(1, 1), (3, 7), (5, 1000), (1000, 4), (256, 512)], ids=str)
def block_shape(request, monkeypatch) -> tuple[int, int]:
    """Every test that takes it runs at several block sizes."""

    def plan(images, texts, order, memory_budget, device) -> BlockPlan:
        return BlockPlan(len(images), order, *request.param)

    monkeypatch.setattr(blocks_module, "plan_blocks", plan)
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_rank_equals_ranking_the_matrix_at_any_block_size(seed: int, block_shape) -> None:
    """Ties included, captions shuffled; no pair is scored twice and no block is larger than asked for."""
    images, texts, rows = galleries(seed)
    expected = retrieval_metrics(images.vectors @ texts.vectors.T, rows)
    model = CountingModel()
    found = rank(model, images, texts, rows, progress=False)
    assert found == expected and found.ties > 0
    assert found.image_to_text_ranks.tolist() == expected.image_to_text_ranks.tolist()
    assert found.text_to_image_ranks.tolist() == expected.text_to_image_ranks.tolist()
    assert model.scored == len(images) * len(texts)
    assert model.largest <= block_shape[0] * block_shape[1]


def test_score_matrix_is_the_matrix(block_shape) -> None:
    images, texts, _ = galleries(0)
    found = score_matrix(CountingModel(), images, texts, progress=False)
    assert torch.equal(found, images.vectors @ texts.vectors.T)


@pytest.mark.slow
def test_rank_with_several_images_a_caption(block_shape) -> None:
    """Positives all over the matrix: blocks that the memory cannot keep are scored again, to the same result."""
    images, texts, rows = galleries(2)
    generator = np.random.default_rng(0)
    more = np.stack([generator.integers(0, len(images), 60), generator.integers(0, len(texts), 60)], axis=1)
    positives = np.concatenate([np.stack([rows, np.arange(len(rows))], axis=1), more])
    expected = retrieval_metrics(images.vectors @ texts.vectors.T, positives=positives)
    found = rank(CountingModel(), images, texts, positives=positives, memory_budget=2e-7, progress=False)
    assert found == expected and found.text_to_image_ranks.tolist() == expected.text_to_image_ranks.tolist()


def test_scoring_is_done_in_evaluation_mode_and_without_gradients() -> None:
    """Validation in the middle of training: dropout off, and on again afterwards."""
    images, texts, rows = galleries(0)
    images.vectors.requires_grad_()
    model = CountingModel().train()
    rank(model, images, texts, rows, progress=False)
    assert not score_matrix(model, images, texts, progress=False).requires_grad
    assert not model.seen_training and model.training


def test_the_chunk_size_reaches_the_model() -> None:
    images, texts, rows = galleries(0)
    seen = []

    class Recorder(CountingModel):
        def match(self, images, texts, chunk_size=None):
            seen.append(chunk_size)
            return super().match(images, texts)

    rank(Recorder(), images, texts, rows, chunk_size=77, progress=False)
    assert set(seen) == {77}


def whole_search(images: Items, texts: Items, rows: np.ndarray, size: int, scores: np.ndarray):
    """Oracle: unscored = −inf in the whole matrix, one direction at a time."""
    cosines = (images.embeds @ texts.embeds.T).numpy()
    by_image, by_caption = np.full_like(scores, -np.inf), np.full_like(scores, -np.inf)
    for i in range(len(images)):
        chosen = np.argsort(-cosines[i])[:size]
        by_image[i, chosen] = scores[i, chosen]
    for t in range(len(texts)):
        chosen = np.argsort(-cosines[:, t])[:size]
        by_caption[chosen, t] = scores[chosen, t]
    union = np.isfinite(by_image) | np.isfinite(by_caption)
    return retrieval_metrics(by_image, rows), retrieval_metrics(by_caption, rows), int(union.sum())


@pytest.mark.parametrize("size", [1, 3, 11, 23, 40])
def test_search_then_rerank_ranks_within_each_shortlist(size: int) -> None:
    """Equal to −inf outside the shortlist, each direction by its own list; a pair in both is scored once."""
    images, texts, rows = galleries(3)
    scores = (images.vectors @ texts.vectors.T).numpy()
    left, right, pairs = whole_search(images, texts, rows, size, scores)
    model = CountingModel()
    found = search_then_rerank(model, images, texts, rows, shortlist_size=size, progress=False)
    assert found.image_to_text_ranks.tolist() == left.image_to_text_ranks.tolist()
    assert found.text_to_image_ranks.tolist() == right.text_to_image_ranks.tolist()
    assert model.scored == found.costs.pairs_scored == pairs
    assert found.costs.pairs_total == scores.size
    missed = [found.image_to_text_unscored / len(images), found.text_to_image_unscored / len(texts)]
    recalls = [found.costs.image_to_text_shortlist_recall, found.costs.text_to_image_shortlist_recall]
    assert recalls == pytest.approx([100 * (1 - share) for share in missed])


def test_a_shortlist_of_everything_is_exhaustive() -> None:
    images, texts, rows = galleries(4)
    found = search_then_rerank(CountingModel(), images, texts, rows, shortlist_size=len(texts), progress=False)
    exact = rank(CountingModel(), images, texts, rows, progress=False)
    assert found.image_to_text == exact.image_to_text and found.text_to_image == exact.text_to_image
    assert found.ties == exact.ties and found.costs.pairs_scored == found.costs.pairs_total
    assert found.as_dict()["seconds"] >= found.as_dict()["rerank_seconds"]


def test_embeddings_alone_rank_by_cosine() -> None:
    images, texts, rows = galleries(5)
    expected = retrieval_metrics((images.embeds @ texts.embeds.T).numpy(), rows)
    assert rank(EmbeddingScore(), images, texts, rows, progress=False) == expected
    halves = [Items(side.vectors, side.embeds.bfloat16()) for side in (images, texts)]
    assert EmbeddingScore().match(*halves).dtype == torch.float32


def test_averaged_models_average_matching_scores() -> None:
    """Each model's calibrated scores, in a precision in which confident ones do not tie; the mean of the cosines."""
    images, texts, rows = galleries(6)
    other_images, other_texts, _ = galleries(6)
    other_images.embeds = torch.nn.functional.normalize(other_images.vectors + 0.5, dim=1)
    other_texts.embeds = torch.nn.functional.normalize(other_texts.vectors + 0.5, dim=1)
    systems = [(CountingModel(4.0), images, texts), (CountingModel(-0.5, shift=1.5), other_images, other_texts)]
    model, both_images, both_texts = average(systems)
    logits = (images.vectors @ texts.vectors.T).double().numpy()
    expected = (1 / (1 + np.exp(-4 * logits)) + 1 / (1 + np.exp(0.5 * logits - 1.5))) / 2
    found = score_matrix(model, both_images, both_texts, progress=False)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert rank(model, both_images, both_texts, rows, progress=False) == retrieval_metrics(found, rows)
    cosines = EmbeddingScore().match(both_images, both_texts)
    parts = [EmbeddingScore().match(left, right) for _, left, right in systems]
    torch.testing.assert_close(cosines, (parts[0] + parts[1]) / 2)
    searched = search_then_rerank(model, both_images, both_texts, rows, shortlist_size=5, progress=False)
    assert searched.costs.pairs_scored < found.numel()


def test_one_averaged_model_is_itself_and_sizes_must_agree() -> None:
    images, texts, _ = galleries(0)
    model = CountingModel()
    assert average([(model, images, texts)]) == (model, images, texts)
    fewer = images.select(slice(0, 5))
    with pytest.raises(ValueError, match=r"\[23, 5\] items"):
        average([(model, images, texts), (model, fewer, texts)])
    with pytest.raises(ValueError, match="no systems"):
        average([])


@pytest.mark.parametrize("size", [0, -1, 1000])
def test_an_impossible_shortlist_is_refused(size: int) -> None:
    images, texts, rows = galleries(0)
    with pytest.raises(ValueError, match=f"shortlist_size is {size}; expected at least 1"):
        search_then_rerank(CountingModel(), images, texts, rows, shortlist_size=size)


def test_bad_galleries_are_refused() -> None:
    images, texts, rows = galleries(0)
    empty = images.select(slice(0, 0))
    with pytest.raises(ValueError, match="0 images and"):
        score_matrix(CountingModel(), empty, texts)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        rank(CountingModel(), images, texts, rows, chunk_size=0)
    with pytest.raises(ValueError, match="one image row per caption"):
        rank(CountingModel(), images, texts, rows[:-1])
    images.vectors[4, 0] = torch.nan
    with pytest.raises(ValueError, match=r"image 4 and caption 0 is nan"):
        score_matrix(CountingModel(), images, texts)
    for score in (rank, search_then_rerank):
        with pytest.raises(ValueError, match=r"image 4 and caption \d+ is nan"):
            score(
                CountingModel(), images, texts, rows, **({"shortlist_size": 5} if score is search_then_rerank else {})
            )


def test_public_names_exist() -> None:
    assert all(hasattr(scoring, name) for name in scoring.__all__)
