"""Large galleries: memory budgets, captions without padding, several processes, runs that go on where they stopped."""

import copy
import datetime
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from model_makers import HEADS, name, regions, shake, tiny_model, words

from modeling_tvrn.encoded_tvrn import EncodedTexts
from modeling_tvrn.metrics import retrieval_metrics
from modeling_tvrn.scoring import RaggedTexts, average, rank, score_matrix, search_then_rerank
from modeling_tvrn.scoring import finished as finished_module
from modeling_tvrn.scoring.plan import BlockPlan, item_bytes, plan_blocks

CPU = torch.device("cpu")


@torch.no_grad()
def galleries(images: int = 7, texts: int = 19):
    """A model, its galleries of ragged items, and the row of each caption's image, shuffled."""
    model = tiny_model()
    rows = np.random.default_rng(0).permutation(np.arange(texts) % images)
    return model, model.encode_images(**regions(images)), model.encode_texts(**words(texts, 9)), rows


class TestPlan:
    @pytest.mark.parametrize("budget", [1e-7, 1e-5, 1e-4, 1e-3, 1.0])
    @pytest.mark.parametrize("sizes", [(7, 19), (100, 3), (3, 200)], ids=str)
    def test_blocks_fit_the_budget_and_cover_the_matrix_once(self, budget: float, sizes: tuple[int, int]) -> None:
        """At least one pair a block, whatever the budget; beyond that never more than it allows."""
        _, images, texts, _ = galleries()
        images = images.select(torch.arange(sizes[0]) % 7)
        texts = texts.select(torch.arange(sizes[1]) % 19)
        order = np.random.default_rng(1).permutation(sizes[1])
        plan = plan_blocks(images, texts, order, budget, CPU)
        seen = np.zeros(sizes, dtype=int)
        for block in plan.blocks():
            rows, columns = plan.rows(block[0]), plan.columns(block[1])
            seen[np.ix_(rows, columns)] += 1
            needed = len(rows) * item_bytes(images) + len(columns) * item_bytes(texts) + 24 * len(rows) * len(columns)
            assert needed <= budget * 1e9 or (len(rows), len(columns)) == (1, 1)
        assert (seen == 1).all()
        if budget == 1.0:
            assert plan.shape == (1, 1)

    def test_a_larger_budget_means_fewer_blocks(self) -> None:
        _, images, texts, _ = galleries()
        images, texts = images.select([0] * 300), texts.select([0] * 900)
        plans = [plan_blocks(images, texts, np.arange(900), budget, CPU) for budget in (1e-4, 1e-3, 1.0)]
        counts = [plan.shape[0] * plan.shape[1] for plan in plans]
        assert counts == sorted(counts, reverse=True) and counts[0] > 10 * counts[-1]

    def test_blocks_that_hold_pairs(self) -> None:
        plan = BlockPlan(10, np.random.default_rng(0).permutation(23), 3, 4)
        pairs = np.array([[0, 5], [9, 22], [4, 4], [4, 5]])
        holds = {
            (i, j): any(row in plan.rows(i) and column in plan.columns(j) for row, column in pairs)
            for i, j in plan.blocks()
        }
        expected = {block for block, some in holds.items() if some}
        assert set(plan.blocks_of(pairs)) == expected

    @pytest.mark.parametrize("budget", [0, -1.0, float("nan"), float("inf")])
    def test_a_budget_is_above_nothing(self, budget: float) -> None:
        model, images, texts, rows = galleries()
        with pytest.raises(ValueError, match=f"memory_budget is {budget}; expected gigabytes above 0"):
            rank(model, images, texts, rows, memory_budget=budget)


class TestRaggedTexts:
    def test_any_selection_is_the_padded_gallerys(self) -> None:
        """In the asked order, with repeats, each with all of its tensors; no column is padding in every text."""
        _, _, texts, _ = galleries()
        ragged = RaggedTexts.of(texts)
        assert len(ragged) == 19 and torch.equal(ragged.embeds, texts.embeds)
        for indices in (slice(None), slice(3, 9), [4], [18, 0, 7, 0], torch.tensor([5, 2]), np.array([11, 3])):
            found, expected = ragged.select(indices), texts.select(torch.arange(19)[indices]).trim()
            assert len(found) == len(expected)
            for key, value in expected.tensors().items():
                per_word = key not in ("embeds", "word_mask")  # at padding there is nothing to compare
                kept = expected.word_mask if per_word else slice(None)
                assert torch.equal(found.tensors()[key][kept], value[kept]), key
            assert found.model_fingerprint == texts.model_fingerprint is not None
        assert len(ragged.select([])) == 0

    def test_parts_hold_no_padding_and_one_long_caption_costs_its_own_words_alone(self) -> None:
        model, _, texts, _ = galleries()
        with torch.no_grad():
            long = model.encode_texts(input_ids=torch.randint(1, 31, (1, 300)))
        padded, ragged = EncodedTexts.cat([texts, long]), RaggedTexts.collect([(texts, range(19)), (long, [19])])
        assert all(part.word_mask.all() for part in ragged.parts)
        assert ragged.nbytes < 0.15 * sum(value.nbytes for value in padded.tensors().values())
        assert item_bytes(ragged) * 20 == pytest.approx(ragged.nbytes)

    def test_scores_as_the_padded_gallery(self) -> None:
        model, images, texts, rows = galleries()
        ragged = RaggedTexts.of(texts)
        expected = score_matrix(model, images, texts, progress=False)
        torch.testing.assert_close(score_matrix(model, images, ragged, progress=False), expected, rtol=0, atol=1e-6)
        assert rank(model, images, ragged, rows, progress=False) == retrieval_metrics(expected, rows)
        found, padded = (
            search_then_rerank(model, images, side, rows, shortlist_size=3, progress=False) for side in (ragged, texts)
        )
        assert found.image_to_text_ranks.tolist() == padded.image_to_text_ranks.tolist()

    def test_half_precision_leaves_the_embeddings(self) -> None:
        _, _, texts, _ = galleries()
        half = RaggedTexts.of(texts).to(torch.bfloat16)
        assert half.embeds.dtype == torch.float32 and half.select([3]).words.dtype == torch.bfloat16

    def test_places_that_do_not_cover_the_gallery_are_refused(self) -> None:
        _, _, texts, _ = galleries()
        with pytest.raises(ValueError, match="expected 0 to 18, once each"):
            RaggedTexts.collect([(texts, range(1, 20))])
        with pytest.raises(ValueError, match="places holds 0 numbers"):
            RaggedTexts([], [])


class TestAlignedPairs:
    @pytest.mark.parametrize(
        "variant",
        [*HEADS, HEADS[0] | {"use_late_interaction": True}, HEADS[3] | {"use_text_refinement": False}],
        ids=name,
    )
    @torch.no_grad()
    def test_each_image_with_its_own_texts(self, variant) -> None:
        """A shortlist's block holds the scores of the whole matrix; lengths and masks of its own for every image."""
        model = tiny_model(**variant)
        images, texts = model.encode_images(**regions(5)), model.encode_texts(**words(11, 9))
        whole = model.match(images, texts)
        chosen = torch.randint(0, 11, (5, 3))
        found = model.match_aligned(images, texts.select(chosen.flatten()))
        torch.testing.assert_close(found, whole.gather(1, chosen), rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_texts_that_do_not_divide_are_refused(self) -> None:
        model, images, texts, _ = galleries()
        with pytest.raises(ValueError, match="7 images and 19 texts; expected at least 1 of each, and the same"):
            model.match_aligned(images, texts)


class TestPrecision:
    def test_bfloat16_is_near_and_float32_is_the_models_own(self) -> None:
        model, images, texts, _ = galleries()
        expected = score_matrix(model, images, texts, progress=False)
        half = score_matrix(model, images, texts, progress=False, dtype=torch.bfloat16)
        assert half.dtype == torch.float32 and not torch.equal(half, expected)
        assert (half - expected).abs().max() < 0.05 * expected.std()
        assert torch.equal(score_matrix(model, images, texts, progress=False, dtype=torch.float32), expected)

    def test_impossible_dtypes_are_refused(self) -> None:
        model, images, texts, _ = galleries()
        with pytest.raises(ValueError, match=r"dtype is torch.float16; expected torch.float32, torch.bfloat16"):
            score_matrix(model, images, texts, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"float32 were asked of a model with weights in torch.bfloat16"):
            score_matrix(copy.deepcopy(model).bfloat16(), images, texts, dtype=torch.float32)


class TestTwoModels:
    @pytest.mark.parametrize("score", [score_matrix, rank, search_then_rerank])
    def test_galleries_of_another_model_are_refused(self, score) -> None:
        """Both from one other model, or one side from each: the fingerprints are named."""
        model, images, texts, rows = galleries()
        other = shake(copy.deepcopy(model), seed=3)
        arguments = [] if score is score_matrix else [rows]
        options = {"shortlist_size": 2} if score is search_then_rerank else {}
        with torch.no_grad():
            foreign = other.encode_texts(**words(19, 9))
        marks = [images.model_fingerprint[:12], foreign.model_fingerprint[:12], other.fingerprint()[:12]]
        assert marks[1] == marks[2]
        for scorer, right in ((model, foreign), (other, texts)):
            with pytest.raises(ValueError, match="not of one checkpoint") as refusal:
                score(scorer, images, right, *arguments, **options)
            assert marks[0] in str(refusal.value) and marks[1] in str(refusal.value)

    def test_averages_are_checked_model_by_model(self) -> None:
        model, images, texts, rows = galleries()
        other = shake(copy.deepcopy(model), seed=3)
        with pytest.raises(ValueError, match="not of one checkpoint"):
            rank(*average([(model, images, texts), (other, images, texts)]), rows)


class Crash(Exception):
    """Stands for whatever ends a run."""


class TestResume:
    def counted(self, monkeypatch, model, after: int | None = None) -> list[int]:
        """Pairs of every call of `match`; the run dies in the call after `after`."""
        calls: list[int] = []
        plain = model.match

        def match(images, texts, **options):
            if after is not None and len(calls) >= after:
                raise Crash
            calls.append(len(images) * len(texts))
            return plain(images, texts, **options)

        monkeypatch.setattr(model, "match", match)
        return calls

    @pytest.mark.slow
    @pytest.mark.parametrize("done", [1, 4, 9])
    def test_goes_on_where_it_stopped(self, done: int, tmp_path: Path, monkeypatch) -> None:
        """The finished blocks are not scored again; the result is that of a run in one piece, bit by bit."""
        model, images, texts, rows = galleries()
        budget = {"memory_budget": 2e-5, "progress": False}
        expected = rank(model, images, texts, rows, **budget)
        with monkeypatch.context() as patch:
            self.counted(patch, model, after=done)
            with pytest.raises(Crash):
                rank(model, images, texts, rows, folder=tmp_path / "blocks", **budget)
        assert len(list((tmp_path / "blocks").glob("block-*"))) == done
        with monkeypatch.context() as patch:
            calls = self.counted(patch, model)
            assert rank(model, images, texts, rows, folder=tmp_path / "blocks", **budget) == expected
            assert 0 < sum(calls) < 7 * 19 and max(calls) * done >= 7 * 19 - sum(calls)
            calls.clear()
            assert rank(model, images, texts, rows, folder=tmp_path / "blocks", memory_budget=1.0) == expected
            assert calls == []

    def test_matrix_and_ranks_share_a_folder(self, tmp_path: Path, monkeypatch) -> None:
        """Where captions come in the order of their images both cut the matrix alike."""
        model, images, texts, rows = galleries()
        rows = np.sort(rows)
        matrix = score_matrix(model, images, texts, folder=tmp_path, memory_budget=2e-5, progress=False)
        calls = self.counted(monkeypatch, model)
        assert rank(model, images, texts, rows, folder=tmp_path, progress=False) == retrieval_metrics(matrix, rows)
        assert torch.equal(score_matrix(model, images, texts, folder=tmp_path, progress=False), matrix)
        assert calls == []

    def test_a_block_that_another_run_left_there_is_scored_again(self, tmp_path: Path) -> None:
        """Of two runs that began in one empty folder at once, where the disk has no locks."""
        model, images, texts, _ = galleries()
        images.model_fingerprint = texts.model_fingerprint = None  # both models take them
        small = {"memory_budget": 2e-5, "progress": False}
        expected = score_matrix(model, images, texts, folder=tmp_path / "own", **small)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.logit_scale += 1.0
        score_matrix(other, images, texts, folder=tmp_path / "other", **small)
        for path in list((tmp_path / "other").glob("block-*"))[::2]:
            shutil.copy(path, tmp_path / "own")
        assert torch.equal(score_matrix(model, images, texts, folder=tmp_path / "own", **small), expected)

    def test_a_folder_of_another_run_is_refused(self, tmp_path: Path) -> None:
        """Another model, another gallery, another precision: each is named with both values."""
        model, images, texts, rows = galleries()
        rank(model, images, texts, rows, folder=tmp_path, progress=False)
        other = shake(copy.deepcopy(model), seed=3)
        with torch.no_grad():
            sides = other.encode_images(**regions(7)), other.encode_texts(**words(19, 9))
        with pytest.raises(ValueError, match=r"another run:\n  model: there \w+, here \w+\n  images: .*\n  texts: "):
            rank(other, *sides, rows, folder=tmp_path)
        fewer = images.select(slice(0, 6))
        with pytest.raises(ValueError, match=r"another run:\n  images: there 7 \w+, here 6 \w+\n"):
            score_matrix(model, fewer, texts, folder=tmp_path)
        with pytest.raises(ValueError, match=r"  dtype: there None, here torch.bfloat16\n"):
            rank(model, images, texts, rows, folder=tmp_path, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=r"  caption order: "):
            rank(model, images, texts, rows[::-1].copy(), folder=tmp_path)

    def test_a_damaged_block_is_scored_again_and_a_foreign_folder_refused(self, tmp_path: Path, caplog) -> None:
        model, images, texts, rows = galleries()
        first = rank(model, images, texts, rows, folder=tmp_path, memory_budget=2e-5, progress=False)
        damaged = sorted(tmp_path.glob("block-*"))[2]
        damaged.write_bytes(damaged.read_bytes()[:50])
        assert rank(model, images, texts, rows, folder=tmp_path, progress=False) == first
        assert "is scored again" in caplog.text and damaged.name in caplog.text
        (tmp_path / "manifest.json").write_text(json.dumps({"format": "tvrn-array-store"}))
        with pytest.raises(
            ValueError,
            match="of format tvrn-array-store: this release reads .* 2; give another",
        ):
            rank(model, images, texts, rows, folder=tmp_path)
        (tmp_path / "manifest.json").write_text("{")
        with pytest.raises(ValueError, match=r"manifest.json is damaged: it can't be read"):
            rank(model, images, texts, rows, folder=tmp_path)

    def test_needs_weights_to_tell_models_apart(self, tmp_path: Path) -> None:
        model, images, texts, rows = galleries()

        class Plain:
            match = model.match

        with pytest.raises(ValueError, match="weights of a Plain cannot be read"):
            rank(Plain(), images, texts, rows, folder=tmp_path)
        both = average([(model, images, texts), (model, images, texts)])
        expected = rank(*both, rows, progress=False)
        assert rank(*both, rows, folder=tmp_path, progress=False) == expected
        assert finished_module.model_digest(both[0]) != finished_module.model_digest(model)


def scored_by(model) -> list[int]:
    """Pairs of each call of `match`, from now on."""
    scored: list[int] = []
    plain = model.match

    def match(images, texts, **options):
        scored.append(len(images) * len(texts))
        return plain(images, texts, **options)

    model.match = match
    return scored


def everything(number: int, world: int, folder: Path | None) -> dict:
    """What one process finds: ranks, the matrix, a two-stage search; and the pairs it scored for the first of them."""
    model, images, texts, rows = galleries()
    scored, options = scored_by(model), {"memory_budget": 2e-5, "progress": False}
    found = rank(model, images, texts, rows, folder=folder, **options)
    ranked = sum(scored)
    positives = [(i, t) for i in range(7) for t in range(19) if (i + t) % 3]
    several = rank(model, images, texts, positives=positives, **options)
    matrix = score_matrix(model, images, texts, **options)
    search = search_then_rerank(model, images, texts, rows, shortlist_size=3, progress=False)
    return {
        "found": [
            each.as_dict() | {"ranks": each.image_to_text_ranks.tolist() + each.text_to_image_ranks.tolist()}
            for each in (found, several)
        ],
        "matrix": matrix.numpy().tobytes().hex(),
        "search": search.image_to_text_ranks.tolist() + search.text_to_image_ranks.tolist(),
        "pairs": search.costs.pairs_scored,
        "ranked": ranked,
        "alone": torch.equal(matrix, score_matrix(model, images, texts, share=False, **options)),
    }


def slowly(number: int, world: int, folder: Path | None) -> dict:
    """As `everything`, slow enough to be killed in the middle."""
    model, images, texts, rows = galleries()
    plain = model.match

    def match(*sides, **options):
        time.sleep(0.1)
        return plain(*sides, **options)

    model.match = match
    rank(model, images, texts, rows, folder=folder, memory_budget=2e-5, progress=False)
    return {}


def failing(number: int, world: int, folder: Path | None) -> dict:
    """The last process fails; says what each of them raises."""
    model, images, texts, rows = galleries()
    if number == world - 1:
        images.refined_regions[:] = torch.nan
    with pytest.raises((ValueError, RuntimeError)) as error:
        rank(model, images, texts, rows, memory_budget=2e-5, progress=False)
    return {"kind": type(error.value).__name__, "error": str(error.value)}


def differing(number: int, world: int, folder: Path | None) -> dict:
    """Each process has another gallery; says what each of them raises."""
    model, images, texts, _ = galleries()
    with pytest.raises(ValueError) as error:
        score_matrix(model, images.select(slice(0, 7 - number)), texts, progress=False)
    return {"error": str(error.value)}


def child(work, number: int, world: int, place: Path, folder: Path | None) -> None:
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    torch.manual_seed(0)
    if world > 1:
        store = f"file://{place}-store"
        dist.init_process_group(
            "gloo", init_method=store, rank=number, world_size=world, timeout=datetime.timedelta(seconds=100)
        )
        assert dist.get_world_size() == world
    result = work(number, world, folder)
    Path(f"{place}-{number}.json").write_text(json.dumps(result))
    os._exit(0)  # not the parent's clean-up


def start(work, world: int, place: Path, folder: Path | None = None) -> list:
    """That many processes, forked: each would take seconds to import torch again."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=child, args=(work, number, world, place, folder)) for number in range(world)]
    for process in processes:
        process.start()
    return processes


def results(processes: list, place: Path) -> list[dict]:
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0] * len(processes)
    return [json.loads(Path(f"{place}-{number}.json").read_text()) for number in range(len(processes))]


def run(work, world: int, place: Path, folder: Path | None = None) -> list[dict]:
    return results(start(work, world, place, folder), place)


needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")


@needs_gloo
@pytest.mark.slow
def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """One, two and three processes: the same metrics, ranks and bits in every process, each pair scored once."""
    found = {world: run(everything, world, tmp_path / f"world{world}") for world in (1, 2, 3)}
    reference = found[1][0]
    for parts in found.values():
        for part in parts:
            for key in ("found", "matrix", "search", "pairs"):
                assert part[key] == reference[key], key
            assert part["alone"]
        assert sum(part["ranked"] for part in parts) == 7 * 19
        assert len(parts) == 1 or all(0 < part["ranked"] < 7 * 19 for part in parts)


@needs_gloo
@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_with_three(tmp_path: Path) -> None:
    folder = tmp_path / "blocks"
    processes = start(slowly, 2, tmp_path / "killed", folder)
    deadline = time.monotonic() + 100
    while len(list(folder.glob("block-*.safetensors"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert len(list(folder.glob("block-*.safetensors"))) >= 4
    parts, alone = run(everything, 3, tmp_path / "again", folder), run(everything, 1, tmp_path / "alone")
    assert all(part["found"] == alone[0]["found"] for part in parts)
    assert 0 < sum(part["ranked"] for part in parts) < 7 * 19


@needs_gloo
def test_a_process_that_fails_takes_the_others_with_it(tmp_path: Path) -> None:
    """None is left waiting for a result that will not come."""
    first, second = run(failing, 2, tmp_path / "failing")
    assert first["kind"] == "RuntimeError" and "Another process failed" in first["error"]
    assert second["kind"] == "ValueError" and "is nan" in second["error"]


@needs_gloo
def test_processes_with_different_galleries_are_refused(tmp_path: Path) -> None:
    errors = [part["error"] for part in run(differing, 2, tmp_path / "differing")]
    assert "The 2 processes were given different galleries or settings (this one, 1: 6 × 19" in errors[1]
    assert "(this one, 0: 7 × 19" in errors[0]
