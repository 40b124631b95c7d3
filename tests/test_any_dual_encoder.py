"""Any dual encoder where a model is asked for: what works, what it says of its scores, and what is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dual_encoder_makers import CONFIGS, VISION, WORDS, dual_encoder, inputs, save_dual_encoder, tokenizer
from PIL import Image
from test_cli import tvrn
from test_first_stage import SIZES, pictures

from modeling_tvrn import TVRNModel, TVRNProcessor, load_model
from modeling_tvrn.demo import Searches
from modeling_tvrn.evaluation import evaluate
from modeling_tvrn.evaluation.encoding import encode_dataset
from modeling_tvrn.explain import explain
from modeling_tvrn.hub import doctor
from modeling_tvrn.index import ImageTextIndex
from modeling_tvrn.index.fingerprint import OtherModelError
from modeling_tvrn.scoring import rank, score_matrix, search_then_rerank
from modeling_tvrn.scoring.finished import model_digest
from modeling_tvrn.scoring.models import AveragedModel

KINDS = ["clip", "siglip"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 37}
LONG = " ".join(["dog"] * 40)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dual_encoder(tmp_path_factory.mktemp("any") / request.param, request.param)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, and a table with a caption for each, two of them too long."""
    folder = tmp_path_factory.mktemp("photos")
    captions = [f"{WORDS[k]} {WORDS[k + 1]} {WORDS[k + 2]}" for k in range(6)]
    captions[1] = captions[4] = LONG
    rows = zip([path.name for path in pictures(folder, 6)], captions, strict=True)
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return folder


def records(photos: Path) -> list[dict[str, Any]]:
    from modeling_tvrn.data import load_pairs

    return [dict(record) for record in load_pairs(photos)]


def over(kind: str, folder: Path, **changes: Any) -> tuple[TVRNModel, TVRNProcessor]:
    """A TVRN with untrained heads over a dual encoder, whose score they are part of."""
    torch.manual_seed(0)
    config = SIZES | {"component_weight_init_value": 0.5} | changes
    processor = TVRNProcessor.from_dual_encoder(save_dual_encoder(folder / kind, kind))
    return TVRNModel.from_dual_encoder(dual_encoder(kind), **config).eval(), processor


class TestScores:
    """Ranking is by logit; a score says what it is."""

    def test_cosines_until_it_is_calibrated(self, folder: Path, photos: Path) -> None:
        model, processor = load_model(folder, device="cpu")
        index = ImageTextIndex.build(model, processor, photos, progress=False)
        before = index.search("a dog")
        assert {hit.score_kind for hit in before} == {"cosine"}
        assert [hit.score for hit in before] == pytest.approx([hit.cosine for hit in before], abs=1e-5)
        logits = [hit.logit for hit in before]
        assert logits == sorted(logits, reverse=True) and len(set(logits)) == 6
        model.calibration_scale.fill_(0.5)
        model.calibration_shift.fill_(-1.0)
        after = index.search("a dog")
        assert [hit.id for hit in after] == [hit.id for hit in before]
        assert {hit.score_kind for hit in after} == {"probability"}
        wanted = model.fits(torch.tensor(logits, dtype=torch.float64), len(index)).tolist()
        assert [hit.score for hit in after] == pytest.approx(wanted), "of any query, until one is known to be junk"

    @pytest.mark.slow
    def test_a_table_and_its_threshold(self, folder: Path, photos: Path, tmp_path: Path) -> None:
        outcome = tvrn("score", folder, photos / "captions.csv", "--batch-size", 2)
        rows = list(csv.DictReader(outcome.stdout.splitlines()))
        assert {row["score_kind"] for row in rows} == {"cosine"} and all(
            -1 <= float(row["score"]) <= 1 for row in rows
        )
        assert outcome.stderr.count("2 captions were cut") == 1
        refused = tvrn("score", folder, photos / "captions.csv", "--threshold", 0.5, code=2)
        assert "is 0.5" in refused.stderr and "is not calibrated" in refused.stderr
        model, processor = load_model(folder, device="cpu")
        model.calibration_shift.fill_(-1.0)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        kept = tvrn("score", tmp_path, photos / "captions.csv", "--threshold", 0.0, "--json").stdout.splitlines()
        assert [json.loads(line)["score_kind"] for line in kept] == ["matching score"] * 6

    @pytest.mark.slow
    def test_found_is_labelled(self, folder: Path, photos: Path, tmp_path: Path) -> None:
        place = ["--index", tmp_path / "index"]
        assert "cosine" in tvrn("search", folder, photos, "a dog", *place).stdout.splitlines()[0]
        hits = json.loads(tvrn("search", folder, photos, "a dog", "--json", *place).stdout)
        assert [hit["score_kind"] for hit in hits] == ["cosine"] * 6


class TestMeasured:
    def test_rank_and_rerank(self, folder: Path, photos: Path) -> None:
        model, processor = load_model(folder, device="cpu")
        different = [dict(record, captions=[" ".join(WORDS[k : k + 3])]) for k, record in enumerate(records(photos))]
        images, texts, rows = encode_dataset(model, processor, different, progress=False)  # equal captions would tie
        exact = rank(model, images, texts, rows, progress=False)
        searched = search_then_rerank(model, images, texts, rows, shortlist_size=6, progress=False)
        assert searched.rsum == exact.rsum
        cosines = images.embeds @ texts.embeds.T
        matrix = score_matrix(model, images, texts, progress=False)
        assert torch.equal(matrix.argsort(dim=0), cosines.argsort(dim=0))
        with pytest.raises(ValueError, match=r"A CLIPModel has no match\(images, texts\).*load_model"):
            rank(dual_encoder(), images, texts, rows)

    @pytest.mark.slow
    def test_provenance(self, photos: Path, tmp_path: Path) -> None:
        reports = []
        for seed in (3, 3, 4):
            place = save_dual_encoder(tmp_path / f"clip-{seed}", seed=seed)
            model, processor = load_model(place, device="cpu")
            reports.append(evaluate(model, processor, records(photos), data="photos", progress=False))
        marks = [report.models[0].sha256 for report in reports]
        assert marks[0] == marks[1] != marks[2]
        assert [report.models[0].name for report in reports] == ["clip-3", "clip-3", "clip-4"]
        assert len({report.gallery_fingerprint for report in reports}) == 1
        assert reports[0].truncated_captions == 2 and "cut at the length limit: 2" in reports[0].table()

    def test_a_protocol_of_another_size_is_refused(self, folder: Path, photos: Path) -> None:
        refused = tvrn("evaluate", folder, "--data", photos, "--protocol", "flickr8k-1k", code=2)
        assert "1000" in refused.stderr and "6" in refused.stderr


class TestCalibrated:
    def test_an_index_stays_and_another_model_s_does_not(self, folder: Path, photos: Path, tmp_path: Path) -> None:
        model, processor = load_model(folder, device="cpu")
        built = ImageTextIndex.build(model, processor, photos, tmp_path, progress=False)
        logits = [hit.logit for hit in built.search("a dog")]
        model.calibration_scale.fill_(0.3)
        opened = ImageTextIndex.load(tmp_path, model, processor)
        assert [hit.logit for hit in opened.search("a dog")] == logits
        assert ImageTextIndex.build(model, processor, photos, tmp_path, progress=False).report.encoded == 0
        with torch.no_grad():
            next(model.dual_encoder.parameters()).flatten()[0] += 0.5
        with pytest.raises(OtherModelError, match="weights_sha256"):
            ImageTextIndex.load(tmp_path, model, processor)

    def test_finished_blocks_too_unless_scores_are_averaged(self) -> None:
        model = TVRNModel.from_dual_encoder(dual_encoder(), use_late_interaction=False, use_reasoning=False)
        before, averaged = model_digest(model), model_digest(AveragedModel([model]))
        model.calibration_shift.fill_(-2.0)
        assert model_digest(model) == before
        assert model_digest(AveragedModel([model])) != averaged, "a mean of calibrated scores"
        model.logit_scale.data += 0.1
        assert model_digest(model) != before


class TestComputesNothingElse:
    @pytest.mark.parametrize("heads", [True, False])
    @pytest.mark.parametrize("kind", KINDS)
    def test_embeddings_alone(self, kind: str, heads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        switches = {} if heads else {"use_late_interaction": False, "use_reasoning": False}
        plain = dual_encoder(kind)
        model = TVRNModel.from_dual_encoder(dual_encoder(kind), **SIZES | switches).eval()
        given = inputs(plain, kind)
        texts = {name: value for name, value in given.items() if name != "pixel_values"}

        def thrown_away(*_: Any, **__: Any) -> Any:
            raise AssertionError("computed, and not wanted")

        for name in ("region_map", "grid_boxes", "masked_mean", "in_dtype"):
            monkeypatch.setattr(f"modeling_tvrn.modeling_tvrn.{name}", thrown_away)
        for name in ("region_projection", "word_projection", "word_perceptron"):
            if getattr(model, name, None) is not None:
                monkeypatch.setattr(getattr(model, name), "forward", thrown_away)
        with torch.no_grad():
            images = model.encode_images(given["pixel_values"], level="embeddings")
            captions = model.encode_texts(**texts, level="embeddings")
            wanted = plain(**given)
        torch.testing.assert_close(images.embeds, wanted.image_embeds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(captions.embeds, wanted.text_embeds, rtol=1e-5, atol=1e-6)

    def test_what_does_not_go_together_is_still_refused(self) -> None:
        model = TVRNModel.from_dual_encoder(dual_encoder(), **SIZES)
        with pytest.raises(ValueError, match="exactly one"):
            model.encode_images(level="embeddings")
        with pytest.raises(ValueError, match="beside pixel_values"):
            model.encode_images(torch.zeros(1, 3, 32, 32), image_embeds=torch.ones(1, 20), level="embeddings")


class TestLongCaptions:
    def test_an_index_counts_them(self, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
        model, processor = load_model(folder, device="cpu")
        report = ImageTextIndex.build(model, processor, ["a dog", LONG, f"{LONG} cat"], batch_size=1).report
        assert report is not None and report.truncated_captions == 2 and "2 captions cut" in str(report)
        said = [record for record in caplog.records if "are cut to" in record.getMessage()]
        assert len(said) == 1 and "the model reads no more" in said[0].getMessage()

    def test_search_and_explanation_say_so(self, photos: Path, tmp_path: Path, caplog: Any) -> None:
        model, processor = over("clip", tmp_path)
        index = ImageTextIndex.build(model, processor, photos, progress=False)
        index.search(LONG)
        index.search(LONG)
        explain(model, processor, photos / "0.png", LONG, leave_out_regions=False)
        assert processor.truncated_captions == 3
        assert sum("are cut to" in record.getMessage() for record in caplog.records) == 1


class TestExplain:
    def test_a_caption_padded_to_one_length_stays_so_without_a_word(self, photos: Path, tmp_path: Path) -> None:
        """SigLIP pools the last position: a shorter caption would be read at another one."""
        model, processor = over("siglip", tmp_path)
        caption = "a dog runs in snow"
        found = explain(model, processor, photos / "0.png", caption)
        assert [word.text for word in found.words] == caption.split()
        assert [caption[slice(*word.span)] for word in found.words] == caption.split(), "offsets, also of padded ids"
        for number, word in enumerate(found.words):
            rest = " ".join(each for place, each in enumerate(caption.split()) if place != number)
            with torch.no_grad():
                logits = model(**processor(images=[Image.open(photos / "0.png")], text=rest)).logits_per_image
            assert word.contribution == pytest.approx(found.logit - float(logits), abs=1e-4), word.text
        assert found.score_kind == "matching score (uncalibrated)" and "uncalibrated" in found.table()

    def test_without_heads_its_words_have_numbers_and_no_region_is_drawn(self, folder: Path, photos: Path) -> None:
        model, processor = load_model(folder, device="cpu")
        found = explain(model, processor, photos / "0.png", "a dog runs")
        assert found.words[0].attention is None and found.strength(found.by_region) is None
        assert found.score_kind == "cosine" and len({word.contribution for word in found.words}) == 3


class TestDemo:
    def test_the_page_searches_scores_and_says_what_its_numbers_are(self, folder: Path, photos: Path) -> None:
        model, processor = load_model(folder, device="cpu")
        page = Searches(model, processor, ImageTextIndex.build(model, processor, photos, progress=False), photos)
        gallery, state, said = page.by_text("a dog", 4)
        assert len(gallery) == 4 and said == "4 found. The numbers are: cosine."
        assert "cosine" in page.why(state, 0) and "“a dog”" in page.why(state, 0)
        part = page.score(photos / "0.png", "a dog")
        with torch.no_grad():
            inputs = processor(images=[Image.open(photos / "0.png")], text="a dog")
            cosine = model.readable_scores(model(**inputs).logits_per_image).item()
        assert f"cosine {cosine:.3f}" in part
        assert "too long" not in part
        for answer in (page.by_text(LONG)[2], page.score(photos / "0.png", LONG)):
            assert "16 tokens are read" in answer


class TestShared:
    def test_a_dual_encoder_passes_the_doctor(self, folder: Path) -> None:
        report = json.loads(tvrn("doctor", folder, "--json").stdout)
        assert report["ok"] and report["complete"]
        assert [check["name"] for check in report["checks"]] == [
            "files", "safetensors only", "values", "first stage", "scores",
        ]  # fmt: skip

    def test_a_broken_one_does_not(self, tmp_path: Path) -> None:
        folder = save_dual_encoder(tmp_path / "clip")
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
        assert doctor(folder)["safetensors only"].status == "warning" and doctor(folder).ok
        (folder / "model.safetensors").unlink()
        assert "model.safetensors" in doctor(folder)["files"].detail
        tvrn("doctor", folder, code=1)

    def test_somebody_else_s_is_not_published(self, folder: Path) -> None:
        for verb in (["push", folder, "me/mine"], ["card", folder]):
            refused = tvrn(*verb, code=2).stderr
            assert "holds a" in refused and "somebody else" in refused and len(refused.splitlines()) == 1


class TestRefused:
    """At the front door, each with what was found and what was expected."""

    @pytest.fixture
    def clip(self, tmp_path: Path) -> Path:
        return save_dual_encoder(tmp_path / "clip")

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda size: transformers.BertModel(transformers.BertConfig(**size, vocab_size=99)), "BertModel"),
            (
                lambda size: transformers.YolosForObjectDetection(
                    transformers.YolosConfig(**size, image_size=[32, 32], patch_size=8, num_detection_tokens=4)
                ),
                "YolosForObjectDetection",
            ),
            (lambda size: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2,
                                                                               vocab_size=99)), "GPT2LMHeadModel"),
        ],
    )  # fmt: skip
    def test_models_of_another_kind(self, make: Callable[..., Any], name: str, tmp_path: Path) -> None:
        make(SIZE).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=f"holds a {name}; expected a TVRN checkpoint or a dual encoder"):
            load_model(tmp_path / "other")

    def test_a_vision_language_model(self, clip: Path) -> None:
        text = transformers.LlamaConfig(**SIZE, vocab_size=99, num_key_value_heads=4)
        vision = transformers.CLIPVisionConfig(**VISION)
        config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=98)
        transformers.LlavaForConditionalGeneration(config).save_pretrained(clip)
        with pytest.raises(ValueError, match="LlavaModel can't be the first stage: get_image_features"):
            load_model(clip)

    def test_weights_without_a_processor(self, tmp_path: Path) -> None:
        dual_encoder().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no image processor in"):
            load_model(tmp_path)

    def test_files_cut_short(self, clip: Path) -> None:
        path = clip / "model.safetensors"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"weights don't load.*expected whole safetensors files"):
            load_model(clip)
        assert "don't load" in tvrn("search", clip, clip, "a dog", code=2).stderr

    def test_a_tvrn_cut_short(self, tmp_path: Path) -> None:
        model, processor = over("clip", tmp_path)
        model.save_pretrained(tmp_path / "tvrn")
        processor.save_pretrained(tmp_path / "tvrn")
        load_model(tmp_path / "tvrn", device="cpu")
        path = tmp_path / "tvrn" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"the weights of .* don't load"):
            load_model(tmp_path / "tvrn")

    @pytest.mark.parametrize(
        ("side", "key", "value", "message"),
        [
            ("vision_config", "num_hidden_layers", 3, "layers.2.* is missing"),
            (None, "projection_dim", 24, r"has shape \(20, .*not \(24,"),
        ],
    )
    def test_weights_that_are_not_those_of_the_config(
        self, clip: Path, side: str | None, key: str, value: int, message: str
    ) -> None:
        config = json.loads((clip / "config.json").read_text())
        (config if side is None else config[side])[key] = value
        (clip / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"does not hold a whole CLIPModel: .*{message}"):
            load_model(clip)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_processor_that_makes_other_pixels(self, kind: str, tmp_path: Path) -> None:
        folder = save_dual_encoder(tmp_path / kind, kind)
        for path in folder.glob("*processor_config.json"):
            text = path.read_text()
            for name in ("height", "width", "shortest_edge"):
                text = text.replace(f'"{name}": 32', f'"{name}": 48')
            path.write_text(text)
        with pytest.raises(
            ValueError, match=r"does not fit its model: .*refuses pixel_values of 48×48.*expected 32×32"
        ):
            load_model(folder)

    def test_a_tokenizer_of_another_model(self, clip: Path) -> None:
        other = tokenizer()
        other.add_tokens(["photograph"])
        other.save_pretrained(clip)
        with pytest.raises(ValueError, match="input_ids hold 23; expected ids from 0 to vocab_size − 1 = 22"):
            load_model(clip)

    def test_a_tower_beside_it(self) -> None:
        with pytest.raises(ValueError, match=r"came beside vision_config.*leave vision_config out"):
            TVRNModel.from_dual_encoder(dual_encoder(), vision_config=transformers.CLIPVisionConfig(**VISION))

    @pytest.mark.parametrize("name", ["projection_size", "region_feature_size", "word_embedding_size"])
    def test_sizes_that_are_not_its_own(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} is 7, but that of the dual encoder is"):
            TVRNModel.from_dual_encoder(dual_encoder(), **{name: 7})

    def test_a_logit_that_is_no_scaled_cosine(self) -> None:
        class Squared(transformers.CLIPModel):
            def forward(self, *arguments: Any, **options: Any) -> Any:
                output = super().forward(*arguments, **options)
                output.logits_per_image = output.logits_per_image**2
                return output

        with pytest.raises(ValueError, match=r"Squared can't be the first stage: its logit of the probe is"):
            TVRNModel.from_dual_encoder(Squared(CONFIGS["clip"]()))
