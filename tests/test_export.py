"""ONNX exports: the same numbers as the model at every size, with nothing but onnxruntime and NumPy to run them."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from dual_encoder_makers import save_dual_encoder
from hub_makers import FEATURES, pixel_model, region_model
from model_makers import VARIANTS, name, overlapping_boxes, regions, tiny_model, words
from torch import Tensor
from transformers import CLIPImageProcessorPil

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.export.graphs import exportable, image_graph, pair_graph, text_graph

EXTRA = ("onnx", "onnxscript", "onnxruntime")
needs_extra = pytest.mark.skipif(
    any(importlib.util.find_spec(library) is None for library in EXTRA),
    reason='exports come with pip install ".[export]"',
)
GATES = [variant for variant in VARIANTS if variant["refinement"] == "gate"]
GRU = next(variant for variant in VARIANTS if variant["refinement"] == "gru")
HEADS = {"hidden_size": 24, "similarity_size": 12, "vision_grid_size": 2, "component_weight_init_value": 0.7}
ITEMS = [(1, 1), (2, 12), (5, 3)]  # (items, fragments): none of the traced sizes
SENTENCES = ["A dog runs in the snow.", "snow", "two zebras sleep, one cat!"]


def loop(step: Callable, state: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What a scan computes; outside an export a scan is compiled first, which takes seconds."""
    outputs = []
    for value in values:
        state, output = step(state, value)
        outputs.append(output)
    return state, torch.stack(outputs)


def region_inputs(images: int, count: int) -> dict[str, Tensor]:
    """Of `hub_makers.region_model`, with holes in the mask."""
    mask = torch.rand(images, count) < 0.6
    mask[0], mask[:, count // 2] = True, True
    features, boxes = torch.randn(images, count, FEATURES), overlapping_boxes(images, count).float()
    return {"region_features": features, "region_boxes": boxes, "region_mask": mask}


def word_inputs(model: TVRNModel, texts: int, count: int) -> dict[str, Tensor]:
    """Token ids; text 0 attends to all, each to one at least, and a first token that is no word where it can."""
    vocabulary = model.config.vocab_size if model.config.text_config is None else model.config.text_config.vocab_size
    attended = torch.arange(count) < torch.randint(1, count + 1, (texts, 1))
    attended[0] = True
    word = attended.clone()
    word[attended.sum(dim=1) > 1, 0] = False
    ids = torch.randint(1, vocabulary, (texts, count))
    return {"input_ids": ids, "attention_mask": attended.long(), "word_mask": word.long()}


def arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in inputs.items()}


def photographs() -> list[PIL.Image.Image]:
    random = np.random.default_rng(3)
    sizes = ((61, 45), (45, 80), (35, 35))
    return [PIL.Image.fromarray(random.integers(0, 256, (high, wide, 3), np.uint8)) for wide, high in sizes]


@torch.no_grad()
def logits_of(model: TVRNModel, images: dict[str, Tensor], texts: dict[str, Tensor]) -> np.ndarray:
    return model.match(model.encode_images(**images), model.encode_texts(**texts)).numpy()


@pytest.mark.parametrize("variant", [*GATES[::4], GRU], ids=name)
def test_the_exported_modules_compute_what_the_model_computes(variant, monkeypatch):
    """Before any exporter: they leave out checks and widths, and never a part of the score."""
    monkeypatch.setattr("modeling_tvrn.export.graphs.scan", loop)
    model = tiny_model(**variant)
    images, texts = regions(3, 6), words(4, 7)
    copied, encoded = exportable(model), {}
    with torch.no_grad():
        for graph, inputs in ((image_graph(copied, None), images), (text_graph(copied), texts)):
            encoded |= graph.module({key: inputs[key] for key in graph.axes})
        pairs = pair_graph(copied, encoded)
        logits = pairs.module({key: encoded[key] for key in pairs.axes})["logits"]
    np.testing.assert_allclose(logits.numpy(), logits_of(model, images, texts), atol=2e-5)


@needs_extra
class TestRefused:
    """Before anything is written."""

    @pytest.fixture
    def export(self):
        from modeling_tvrn.export import export_onnx

        return export_onnx

    def test_a_missing_extra_names_the_command(self, export, tmp_path, monkeypatch):
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
        with pytest.raises(ImportError, match=r'onnxscript: pip install "modeling-tvrn\[export\]"'):
            export(*region_model(), tmp_path / "onnx")

    @pytest.mark.parametrize(
        ("image_input", "message"),
        [("pixels", "neither a vision tower nor a detector"), ("grid", 'expected "pixels" or "regions"')],
    )
    def test_an_input_that_the_model_does_not_read(self, export, tmp_path, image_input, message):
        with pytest.raises(ValueError, match=message):
            export(*region_model(), tmp_path / "onnx", image_input=image_input)

    def test_regions_of_a_dual_encoder(self, export, tmp_path):
        folder = save_dual_encoder(tmp_path / "clip")
        model, processor = TVRNModel.from_dual_encoder(folder, **HEADS), TVRNProcessor.from_dual_encoder(folder)
        with pytest.raises(ValueError, match="embeddings of a dual encoder are made of pixels"):
            export(model, processor, tmp_path / "onnx", image_input="regions")

    def test_half_precision(self, export, tmp_path):
        model, processor = region_model()
        with pytest.raises(ValueError, match=r"weights in torch.bfloat16.*dtype=torch.float32"):
            export(model.to(torch.bfloat16), processor, tmp_path / "onnx")

    def test_a_folder_of_something_else_stays_as_it_is(self, export, tmp_path):
        (tmp_path / "thesis.txt").write_text("years of work")
        with pytest.raises(ValueError, match="something else than an export"):
            export(*region_model(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def test_pictures_of_different_shapes(self, export, tmp_path):
        model, processor = pixel_model()
        ragged = CLIPImageProcessorPil(size={"shortest_edge": 35}, do_center_crop=False)
        with pytest.raises(ValueError, match="pictures of different shapes"):
            export(model, TVRNProcessor(ragged, processor.tokenizer), tmp_path / "onnx")

    @pytest.mark.slow
    def test_a_tower_that_decides_by_values_is_named_and_leaves_nothing_behind(self, export, tmp_path, monkeypatch):
        model, processor = pixel_model()
        kind = type(model.vision_model)
        plain = kind.forward

        def deciding(self, pixel_values):
            return plain(self, pixel_values=pixel_values * (2 if pixel_values.sum() > 1e9 else 1))

        monkeypatch.setattr(kind, "forward", deciding)
        with pytest.raises(
            ValueError, match=r"image side .*tower 'vit' cannot be exported: .*image_input=\"regions\""
        ):
            export(model, processor, tmp_path / "onnx")
        assert not list(tmp_path.iterdir())


@needs_extra
@pytest.mark.slow
class TestRegions:
    """Region features and a BiGRU, gate and SAF: every recurrence is in the text side."""

    @pytest.fixture(scope="class")
    @classmethod
    def exported(cls, tmp_path_factory):
        from modeling_tvrn.export import export_onnx

        model, processor = region_model()
        folder = tmp_path_factory.mktemp("regions") / "onnx"
        return model, processor, folder, export_onnx(model, processor, folder)

    @pytest.fixture(scope="class")
    @classmethod
    def runner(cls, exported):
        from modeling_tvrn.export import OnnxModel

        return OnnxModel(exported[2], threads=1)

    @pytest.mark.parametrize("items", ITEMS)
    def test_any_number_of_images_regions_captions_and_words(self, exported, runner, items):
        model = exported[0]
        images, texts = region_inputs(*items), word_inputs(model, *items[::-1])
        left, right = runner.encode_images(**arrays(images)), runner.encode_texts(**arrays(texts))
        np.testing.assert_allclose(runner.match(left, right), logits_of(model, images, texts), atol=1e-4)
        with torch.no_grad():
            wanted = model.encode_images(**images).embeds, model.encode_texts(**texts).embeds
        np.testing.assert_allclose(left["images.embeds"], wanted[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(right["texts.embeds"], wanted[1].numpy(), atol=1e-5)

    def test_padding_and_neighbours_change_nothing(self, exported, runner):
        """Alone, in a batch, in batches of one, in blocks of pairs: one number a pair."""
        model = exported[0]
        images, texts = arrays(region_inputs(4, 9)), arrays(word_inputs(model, 19, 8))
        together = runner.match(runner.encode_images(**images), runner.encode_texts(**texts))
        apart = runner.encode_images(**images, batch_size=1), runner.encode_texts(**texts, batch_size=3)
        np.testing.assert_allclose(runner.match(*apart, pairs_at_once=5), together, atol=1e-5)
        kept = images["region_mask"][2]
        alone = {key: value[2:3, kept] for key, value in images.items()}
        scores = runner.match(runner.encode_images(**alone), runner.encode_texts(**texts))
        np.testing.assert_allclose(scores[0], together[2], atol=1e-5)

    def test_the_report_tells_sizes_and_differences(self, exported):
        report = exported[3]
        assert report.worst < 1e-4
        assert {each.images for each in report.parity} == {1, 2, 5}
        assert set(report.megabytes) == {"image.onnx", "text.onnx", "pair.onnx"}
        assert "36" in str(report)
        json.dumps(report.as_dict())

    def test_the_manifest_says_what_the_files_read_and_give(self, exported):
        import onnx

        manifest = json.loads((exported[2] / "tvrn_onnx.json").read_text())
        types = {"float32": 1, "int64": 7, "bool": 9}
        for part, about in manifest["graphs"].items():
            graph = onnx.load(exported[2] / f"{part}.onnx").graph
            for listed, values in ((about["inputs"], graph.input), (about["outputs"], graph.output)):
                found = {}
                for value in values:
                    kind = value.type.tensor_type
                    found[value.name] = (kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim])
                assert list(found) == [each["name"] for each in listed]
                for each in listed:
                    kind, shape = found[each["name"]]
                    assert kind == types[each["dtype"]]
                    wanted = [size for size in each["shape"] if isinstance(size, int)]
                    assert [size for size in shape if isinstance(size, int)] == wanted, each

    def test_captions_as_the_processor_reads_them(self, exported, runner):
        _, processor, *_ = exported
        wanted = processor(text=SENTENCES, return_tensors="np")
        found = runner.tokens(SENTENCES)
        for key in ("input_ids", "attention_mask", "word_mask"):
            np.testing.assert_array_equal(found[key], wanted[key])

    def test_it_runs_without_torch_transformers_and_this_package(self, exported, tmp_path):
        model, processor, folder, _ = exported
        images = region_inputs(2, 5)
        np.savez(tmp_path / "inputs.npz", **arrays(images))
        code = f"""
import sys
for name in ("torch", "transformers", "modeling_tvrn"):
    sys.modules[name] = None
sys.path.insert(0, {str(folder)!r})
import numpy as np
from tvrn_onnx import OnnxModel
model = OnnxModel({str(folder)!r}, threads=1)
logits = model.match(model.encode_images(**np.load("inputs.npz")), model.encode_texts({SENTENCES!r}))
np.save("logits.npy", logits)
"""
        finished = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stderr
        wanted = logits_of(model, images, processor(text=SENTENCES))
        np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), wanted, atol=1e-4)

    def test_int8_is_smaller_and_near(self, exported, tmp_path):
        from modeling_tvrn.export import OnnxModel, quantize_onnx

        model, _, folder, _ = exported
        copied = Path(shutil.copytree(folder, tmp_path / "onnx"))
        with pytest.raises(ValueError, match="holds float32"):
            OnnxModel(copied, "int8")
        with pytest.raises(ValueError, match="expected some of image, text, pair"):
            quantize_onnx(copied, ["head"])
        sizes = quantize_onnx(copied)
        assert set(sizes) == {"image.int8.onnx", "text.int8.onnx", "pair.int8.onnx"}
        runner = OnnxModel(copied, "int8", threads=1)
        images, texts = region_inputs(4, 6), word_inputs(model, 5, 7)
        embeds = runner.encode_images(**arrays(images))["images.embeds"]
        with torch.no_grad():
            cosines = (embeds * model.encode_images(**images).embeds.numpy()).sum(axis=1)
        assert (cosines > 0.999).all() and (cosines < 1 - 1e-7).any(), "0.91 where products overflow"
        scores = runner.match(runner.encode_images(**arrays(images)), runner.encode_texts(**arrays(texts)))
        wanted = logits_of(model, images, texts)
        assert np.corrcoef(scores.ravel(), wanted.ravel())[0, 1] > 0.998

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"region_mask": np.zeros((2, 5), bool)}, "region_mask keeps nothing of item 0"),
            ({"region_features": np.full((2, 5, FEATURES), np.nan, np.float32)}, "region_features holds NaN"),
            ({"region_features": np.ones((2, 5, FEATURES + 1), np.float32)}, rf"expected .*{FEATURES}"),
            ({"pixel_values": np.ones((2, 3, 4, 4), np.float32)}, r"unknown \['pixel_values'\]"),
        ],
    )
    def test_wrong_images_are_refused_as_the_graph_itself_would_not(self, runner, change, message):
        with pytest.raises(ValueError, match=message):
            runner.encode_images(**arrays(region_inputs(2, 5)) | change)

    def test_wrong_captions_are_refused(self, exported, runner):
        texts = arrays(word_inputs(exported[0], 2, 4))
        with pytest.raises(ValueError, match="input_ids holds 0 to 9999"):
            runner.encode_texts(**texts | {"input_ids": np.array([[0, 1, 2, 9999]] * 2)})
        with pytest.raises(ValueError, match="either captions or"):
            runner.encode_texts(["a dog"], **texts)
        with pytest.raises(ValueError, match="no items"):
            runner.encode_texts([])
        with pytest.raises(ValueError, match="reads no pictures"):
            runner.encode_images(photographs())

    def test_too_large_a_difference_leaves_the_earlier_export(self, exported, tmp_path, monkeypatch):
        from modeling_tvrn.export import export_onnx, writing

        model, processor, folder, _ = exported
        copied = Path(shutil.copytree(folder, tmp_path / "onnx"))
        before = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}

        def same_graphs(*arguments):
            for path in folder.glob("*.onnx"):
                shutil.copy(path, arguments[-1])
            return json.loads((folder / "tvrn_onnx.json").read_text())

        monkeypatch.setattr(writing, "_write_graphs", same_graphs)
        with pytest.raises(ValueError, match="more than tolerance=1e-09"):
            export_onnx(model, processor, copied, tolerance=1e-9)
        assert {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


@needs_extra
@pytest.mark.slow
class TestPictures:
    """A ViT and a BERT, GRU refinement and SGR: recurrences on both sides and in the pair stage."""

    @pytest.fixture(scope="class")
    @classmethod
    def exported(cls, tmp_path_factory):
        from modeling_tvrn.export import OnnxModel, export_onnx

        model, processor = pixel_model(refinement="gru", similarity_head="sgr")
        folder = tmp_path_factory.mktemp("pixels") / "onnx"
        report = export_onnx(model, processor, folder)
        assert report.worst < 1e-4 and report.reads_images and report.reads_captions
        return model, processor, OnnxModel(folder, threads=1)

    def test_pictures_and_sentences_to_logits(self, exported):
        model, processor, runner = exported
        images, texts = processor(images=photographs()), processor(text=SENTENCES)
        np.testing.assert_array_equal(runner.pixels(photographs()), images["pixel_values"].numpy())
        found = runner.match(runner.encode_images(photographs(), batch_size=2), runner.encode_texts(SENTENCES))
        np.testing.assert_allclose(found, logits_of(model, dict(images), dict(texts)), atol=1e-4)

    def test_a_file_is_a_picture_too(self, exported, tmp_path):
        _, _, runner = exported
        photographs()[0].save(tmp_path / "one.png")
        found = runner.encode_images(tmp_path / "one.png")["images.embeds"]
        np.testing.assert_array_equal(found, runner.encode_images(photographs()[:1])["images.embeds"])

    @pytest.mark.parametrize("items", ITEMS)
    def test_any_number_of_captions_and_words(self, exported, items):
        model, processor, runner = exported
        images, texts = processor(images=photographs()), word_inputs(model, *items)
        found = runner.match(runner.encode_images(photographs()), runner.encode_texts(**arrays(texts)))
        np.testing.assert_allclose(found, logits_of(model, dict(images), texts), atol=1e-4)


@needs_extra
@pytest.mark.slow
class TestDualEncoders:
    """Exported with their heads, and without: then captions and pictures are embeddings alone."""

    SENTENCES = ("a dog runs in snow", "cat", "the small red circle above a large blue square")

    @pytest.mark.parametrize("heads", [True, False], ids=["heads", "plain"])
    @pytest.mark.parametrize("kind", ["clip", "siglip", "vision-text-dual-encoder"])
    def test_pictures_and_sentences_to_logits(self, kind, heads, tmp_path):
        from modeling_tvrn.export import OnnxModel, export_onnx

        folder = save_dual_encoder(tmp_path / kind, kind)
        without = {"use_late_interaction": False, "use_reasoning": False}
        model = TVRNModel.from_dual_encoder(folder, **HEADS if heads else without).eval()
        model.calibration_scale.fill_(0.1)
        model.calibration_shift.fill_(-1.0)
        processor = TVRNProcessor.from_dual_encoder(folder)
        report = export_onnx(model, processor, tmp_path / "onnx")
        assert report.reads_images and report.reads_captions
        runner = OnnxModel(tmp_path / "onnx", threads=1)
        found = runner.match(runner.encode_images(photographs()), runner.encode_texts(self.SENTENCES))
        inputs = processor(images=photographs(), text=list(self.SENTENCES))
        with torch.no_grad():
            wanted = model(**inputs).logits_per_image
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-4 * max(1.0, float(wanted.abs().max())))
        np.testing.assert_allclose(runner.scores(found), model.scores(wanted).numpy(), atol=1e-4)
        assert np.ptp(found) > 1e-3
