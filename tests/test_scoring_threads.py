"""Scoring on several cores: the scores of one, in the caller's precision, and nothing left behind."""

import pytest
import torch
from model_makers import regions, tiny_model, words

from modeling_tvrn.scoring import average, score_matrix
from modeling_tvrn.scoring import threads as on_cores


@pytest.fixture
def galleries(monkeypatch):
    """A model with its galleries, and two threads that start for any number of pairs."""
    monkeypatch.setattr(on_cores, "LEAST_PAIRS", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    model = tiny_model()
    with torch.no_grad():
        yield model, model.encode_images(**regions(5)), model.encode_texts(**words(11, 9))
    torch.set_num_threads(before)


@pytest.mark.parametrize("half", [False, True])
def test_the_scores_of_one_thread(galleries, half):
    model, images, texts = galleries
    seen = []
    handle = model.pair.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        scores = on_cores.match_on_cores(model, images, texts)
        assert len(seen) == 3 and set(seen) == {1}  # each share was scored by a thread with one core
        handle.remove()
        # In half precision a block's shape may move the last bits of the gates.
        torch.testing.assert_close(scores, model.match(images, texts), rtol=0, atol=2e-2 if half else 1e-5)
    assert torch.get_num_threads() == 3


def test_averaged_models_and_ragged_blocks(galleries):
    model, images, texts = galleries
    system = average([(model, images, texts), (model, images, texts)])
    scores = score_matrix(*system, progress=False)
    torch.testing.assert_close(scores, model.scores(model.match(images, texts).double()), rtol=0, atol=1e-5)


def test_an_error_reaches_the_caller_and_the_threads_stay_as_set(galleries):
    model, images, texts = galleries
    with torch.no_grad(), pytest.raises(ValueError, match="chunk_size 0"):
        on_cores.match_on_cores(model, images, texts, chunk_size=0)
    assert torch.get_num_threads() == 3


def test_with_gradients_the_scores_have_them(galleries):
    """Workers score without gradients; a caller that wants them must get them."""
    model, images, texts = galleries
    with torch.enable_grad():
        assert on_cores.match_on_cores(model, images, texts).requires_grad


def test_cores_share_the_images_and_copy_no_caption(galleries, monkeypatch):
    """Copies of a block's captions for every core once took more memory than all else."""
    model, _, texts = galleries
    images = model.encode_images(**regions(12))
    whole = model.match(images, texts)
    given = []
    plain = type(model).match
    monkeypatch.setattr(type(model), "match", lambda *sides, **keys: given.append(sides[1:]) or plain(*sides, **keys))
    torch.testing.assert_close(on_cores.match_on_cores(model, images, texts), whole, rtol=0, atol=1e-5)
    assert sorted(len(share) for share, _ in given) == [4, 4, 4]
    for share, captions in given:
        assert captions.words.data_ptr() == texts.words.data_ptr()
        assert (
            share.refined_regions.untyped_storage().data_ptr() == images.refined_regions.untyped_storage().data_ptr()
        )
