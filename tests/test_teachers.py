"""Teachers give the vectors their models were trained to give; a cache gives back theirs, and never another's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import tvrn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    MobileNetV2Config,
    MobileNetV2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    ViTImageProcessorPil,
)

from modeling_tvrn import TVRNModel, TVRNProcessor
from modeling_tvrn.data import load_pairs
from modeling_tvrn.teachers import RegionCache, StaleStoreError, Teacher, TeacherCache

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "a",
    "dog",
    "cat",
    "runs",
    "sleeps",
    "number",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "over",
    "red",
]
CAPTIONS = ["a dog runs over the red hill", "a cat", "the red cat sleeps", "one two three four five six dog runs"]
TEXT = {
    "vocab_size": 20, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 17,
    "max_position_embeddings": 9,
}  # fmt: skip
VISION = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 17, "image_size": 21,
    "patch_size": 7,
}  # fmt: skip
SENTENCE_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]


def make_models() -> dict[str, torch.nn.Module]:
    clip_text = TEXT | {"eos_token_id": 19, "bos_token_id": 18, "pad_token_id": 0}
    return {
        "bert": BertModel(BertConfig(**TEXT)),
        "clip": CLIPModel(CLIPConfig(text_config=clip_text, vision_config=VISION, projection_dim=11)),
        "siglip": SiglipModel(SiglipConfig(text_config=TEXT | {"projection_size": 12}, vision_config=VISION)),
        "dinov2": Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**VISION | {"mlp_ratio": 2, "num_register_tokens": 3})
        ),
        "cnn": MobileNetV2Model(
            MobileNetV2Config(depth_multiplier=0.05, image_size=64, finegrained_output=True, num_channels=3)
        ),
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<unk>": 1} | {word: 2 + row for row, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", model_max_length=9,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """Tiny models with random weights, saved as the Hub has them."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(4)
    for name, model in make_models().items():
        for weights in model.parameters():
            weights.data += 0.3 * torch.randn_like(weights)
        model.save_pretrained(folder / name)
        side = 64 if name == "cnn" else 21
        if name != "bert":
            ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder / name)
        if name in ("bert", "clip", "siglip"):
            make_tokenizer().save_pretrained(folder / name)
    return folder


def pictures(count: int, seed: int = 0) -> list[PIL.Image.Image]:
    random = np.random.default_rng(seed)
    return [PIL.Image.fromarray(random.integers(0, 256, (9, 13, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Seven images with one to three captions each."""
    folder, rows = tmp_path_factory.mktemp("photographs"), []
    for number, picture in enumerate(pictures(7)):
        picture.save(folder / f"{number}.png")
        captions = [f"the dog runs number {WORDS[6 + number]} {WORDS[k]}" for k in range(1 + number % 3)]
        rows.append({"image": f"{number}.png", "image_id": 50 + 3 * number, "captions": captions})
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def with_pooling(hub: Path, tmp_path: Path, settings: dict, modules: list[dict] | None = None, **sentence) -> Path:
    """A copy of the text model with sentence-transformers' files."""
    target = tmp_path / "sentence"
    AutoModel.from_pretrained(hub / "bert").save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 12} | settings))
    (target / "modules.json").write_text(json.dumps(modules or SENTENCE_MODULES))
    (target / "sentence_bert_config.json").write_text(json.dumps(sentence))
    return target


# -- what a teacher's vectors are ---------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "last"])
def test_pooled_tokens_are_those_of_the_text_alone(hub: Path, pooling: str) -> None:
    """Padding beside longer texts must not move a vector: each is compared with its text run by itself."""
    teacher = Teacher.from_pretrained(hub / "bert", "text", pooling=pooling)
    model, tokenizer = AutoModel.from_pretrained(hub / "bert").eval(), make_tokenizer()
    for text, vector in zip(CAPTIONS, teacher(CAPTIONS, batch_size=3), strict=True):
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        expected = {"mean": states.mean(0), "cls": states[0], "max": states.amax(0), "last": states[-1]}[pooling]
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-4)


def test_a_vision_transformers_mean_leaves_class_and_register_tokens_out(hub: Path) -> None:
    images = pictures(3)
    pixels = ViTImageProcessorPil(size={"height": 21, "width": 21})(images=images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        states = AutoModel.from_pretrained(hub / "dinov2").eval()(pixel_values=pixels).last_hidden_state
    assert states.shape[1] == 1 + 3 + 9
    mean = Teacher.from_pretrained(hub / "dinov2", "image", pooling="mean")
    torch.testing.assert_close(mean(images), states[:, 4:].mean(dim=1), atol=1e-5, rtol=1e-4)
    preset = Teacher.from_pretrained(hub / "dinov2", "image")
    assert preset.pooling == "cls"
    torch.testing.assert_close(preset(images), states[:, 0], atol=1e-5, rtol=1e-4)


def test_a_cnns_vector_is_the_mean_of_its_map(hub: Path) -> None:
    teacher = Teacher.from_pretrained(hub / "cnn", "image")
    inputs = teacher.prepare(pictures(2))
    with torch.inference_mode():
        states = teacher.model(**inputs).last_hidden_state
    assert teacher.pooling == "mean" and states.ndim == 4
    torch.testing.assert_close(teacher.embed(inputs), states.mean(dim=(2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_two_tower_models_give_their_own_features(hub: Path, name: str) -> None:
    images, texts = (Teacher.from_pretrained(hub / name, side) for side in ("image", "text"))
    assert images.pooling == texts.pooling == "features"
    model = AutoModel.from_pretrained(hub / name).eval()
    with torch.inference_mode():
        expected = model.get_image_features(pixel_values=images.prepare(pictures(2))["pixel_values"]).pooler_output
        inputs = texts.prepare(CAPTIONS)
        if name == "siglip":  # trained on captions padded to the full length, and without a mask
            assert inputs["input_ids"].shape == (4, 9)
        found = texts(CAPTIONS, batch_size=2)
        alone = torch.cat([texts.embed(texts.prepare([text])) for text in CAPTIONS])
    torch.testing.assert_close(images(pictures(2)), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-4)


def test_the_pooling_file_of_sentence_transformers_decides(hub: Path, tmp_path: Path) -> None:
    modes = {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True, "pooling_mode_cls_token": False}
    folder = with_pooling(hub, tmp_path, modes, max_seq_length=5, do_lower_case=True)
    teacher = Teacher.from_pretrained(folder, "text")
    assert (teacher.pooling, teacher.prepare.max_length) == ("max", 5)
    torch.testing.assert_close(teacher(["A DOG runs"]), teacher(["a dog runs"]))


@pytest.mark.parametrize(
    ("settings", "modules", "message"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, None, "pooling_mode_weightedmean_tokens"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, None, "exactly one of"),
        (
            {"pooling_mode_mean_tokens": True},
            [*SENTENCE_MODULES[:2], {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}],
            "modules.json lists Dense",
        ),
    ],
)
def test_a_pooling_that_is_not_ours_is_refused(hub, tmp_path, settings, modules, message) -> None:
    folder = with_pooling(hub, tmp_path, settings, modules)
    with pytest.raises(ValueError, match=message):
        Teacher.from_pretrained(folder, "text")
    assert Teacher.from_pretrained(folder, "text", pooling="mean").pooling == "mean"


def test_the_real_text_teacher_ranks_paraphrases_first(minilm: Path) -> None:
    teacher = Teacher.from_pretrained(minilm, "text")
    assert (teacher.pooling, teacher.prepare.max_length) == ("mean", 256)
    vectors = torch.nn.functional.normalize(
        teacher(["A dog runs through snow.", "A puppy is running in the snow.", "A man plays the guitar."]), dim=1
    )
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.6 > 0.3 > cosines[0, 2]


def test_a_teacher_is_frozen_and_hidden_from_the_model_in_training(hub: Path) -> None:
    teacher = Teacher.from_pretrained(hub / "bert", "text")
    student = torch.nn.Linear(2, 2)
    student.teacher = teacher
    assert len(list(student.parameters())) == 2 and len(student.state_dict()) == 2
    student.train()
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not teacher(CAPTIONS).requires_grad
        torch.testing.assert_close(teacher(CAPTIONS), Teacher.from_pretrained(hub / "bert", "text")(CAPTIONS))


def test_half_precision_teachers_give_nearly_the_same_vectors(hub: Path) -> None:
    whole, half = (Teacher.from_pretrained(hub / "clip", "image", dtype=dtype) for dtype in ("float32", "bfloat16"))
    vectors = half(pictures(3))
    assert vectors.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert torch.cosine_similarity(vectors, whole(pictures(3))).min() > 0.99


def test_random_weights_are_no_teacher(hub: Path, tmp_path: Path) -> None:
    """A pooler that the checkpoint lacks is drawn anew at every load, and transformers only warns."""
    folder = with_pooling(hub, tmp_path, {"pooling_mode_mean_tokens": True})
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "pooler" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 weights, the first is 'pooler.dense.bias'.*pooling='mean'"):
        Teacher.from_pretrained(folder, "text", pooling="pooler")
    prints = [Teacher.from_pretrained(folder, "text").fingerprint() for _ in range(2)]
    assert prints[0] == prints[1]
    save_file({k: v for k, v in weights.items() if "layer.1" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="random weights teach"):
        Teacher.from_pretrained(folder, "text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"modality": "sound"}, "modality is 'sound', expected 'image' or 'text'"),
        ({"modality": "text", "pooling": "sum"}, "pooling is 'sum', expected one of features"),
        ({"modality": "text", "pooling": "features"}, "BertModel has no get_text_features"),
        ({"modality": "text", "dtype": "int8"}, "dtype is 'int8'"),
        ({"modality": "text", "max_length": 10}, "max_length is 10, expected 1 to 9"),
    ],
)
def test_arguments_that_cannot_work_are_refused(hub: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher.from_pretrained(hub / "bert", **arguments)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no teacher at .*nowhere"):
        Teacher.from_pretrained(tmp_path / "nowhere", "image")


# -- the cache ----------------------------------------------------------------------------------------


def test_a_cache_gives_the_teachers_vectors_by_id(hub: Path, photographs: Path, tmp_path: Path) -> None:
    records = load_pairs(photographs)
    images, texts = (Teacher.from_pretrained(hub / "clip", side) for side in ("image", "text"))
    cache = TeacherCache.build(images, records, tmp_path / "images", batch_size=3, progress=False)
    assert len(cache) == 7 and cache.size == 11 and cache.modality == "image"
    wanted = [68, 50, 59, 50]
    expected = images([records[records.image_ids.index(image_id)]["image"] for image_id in wanted])
    assert cache[wanted].dtype == torch.float16
    torch.testing.assert_close(
        cache[wanted].float(), torch.nn.functional.normalize(expected, dim=1), atol=1e-3, rtol=0
    )
    cache = TeacherCache.build(texts, records, tmp_path / "texts", batch_size=2, dtype="float32", progress=False)
    ids = [caption_id for of_image in records.caption_ids for caption_id in of_image]
    captions = [caption for of_image in records.captions for caption in of_image]
    assert list(cache.ids) == ids
    expected = torch.nn.functional.normalize(texts(captions), dim=1)[[4, 0, 9]]
    torch.testing.assert_close(cache[[ids[4], ids[0], ids[9]]], expected, atol=1e-5, rtol=0)
    with pytest.raises(KeyError, match="'another'"):
        cache[[ids[0], "another"]]


def test_a_stream_gives_the_same_cache(hub: Path, photographs: Path, tmp_path: Path) -> None:
    for modality in ("image", "text"):
        teacher = Teacher.from_pretrained(hub / "siglip", modality)
        whole = TeacherCache.build(teacher, load_pairs(photographs), tmp_path / f"a{modality}", progress=False)
        stream = load_pairs(photographs, streaming=True)
        streamed = TeacherCache.build(
            teacher, stream, tmp_path / f"b{modality}", shard_size=2, batch_size=2, progress=False
        )
        assert streamed.ids == whole.ids and streamed.fingerprint == whole.fingerprint
        torch.testing.assert_close(streamed[whole.ids], whole[whole.ids], atol=2e-3, rtol=0)


class Failing:
    """Records whose fifth photograph cannot be read, until it can."""

    def __init__(self, records):
        self.records, self.fails, self.read = records, True, 0

    def __len__(self):
        return len(self.records)

    def __getattr__(self, name):
        return getattr(self.records, name)

    def __getitem__(self, row):
        self.read += 1
        if self.fails and row == 4:
            raise OSError("the disk is gone")
        return self.records[row]


def test_a_build_that_was_cut_short_continues(hub: Path, photographs: Path, tmp_path: Path) -> None:
    teacher, records = Teacher.from_pretrained(hub / "dinov2", "image"), Failing(load_pairs(photographs))
    settings = {"shard_size": 2, "batch_size": 1, "progress": False}
    with pytest.raises(OSError, match="disk is gone"):
        TeacherCache.build(teacher, records, tmp_path / "a", **settings)
    with pytest.raises(ValueError, match="is unfinished: "):
        TeacherCache.load(tmp_path / "a")
    records.fails, records.read = False, 0
    resumed = TeacherCache.build(teacher, records, tmp_path / "a", **settings)
    assert records.read == 3 and resumed.info["resumed_after"] == 4
    whole = TeacherCache.build(teacher, load_pairs(photographs), tmp_path / "b", **settings)
    torch.testing.assert_close(resumed[whole.ids], whole[whole.ids], atol=0, rtol=0)
    records.read = 0
    assert TeacherCache.build(teacher, records, tmp_path / "a", **settings).ids == whole.ids
    assert records.read == 0  # a finished cache is just opened


@pytest.mark.slow
def test_a_killed_build_continues_after_its_last_whole_shard(hub: Path, photographs: Path, tmp_path: Path) -> None:
    script = f"""
import os, signal
from modeling_tvrn.data import load_pairs
from modeling_tvrn.teachers import Teacher, TeacherCache
teacher, embed, calls = Teacher.from_pretrained({str(hub / "dinov2")!r}, "image"), Teacher.embed, []
def embed_and_die(self, inputs):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return embed(self, inputs)
Teacher.embed = embed_and_die
TeacherCache.build(teacher, load_pairs({str(photographs)!r}), {str(tmp_path / "c")!r}, shard_size=2, batch_size=1)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    teacher = Teacher.from_pretrained(hub / "dinov2", "image")
    cache = TeacherCache.build(teacher, load_pairs(photographs), tmp_path / "c", shard_size=2, progress=False)
    assert cache.info["resumed_after"] == 4 and len(cache) == 7


def test_parts_of_several_processes_make_the_same_cache(hub: Path, photographs: Path, tmp_path: Path) -> None:
    for modality in ("image", "text"):
        teacher, records = Teacher.from_pretrained(hub / "clip", modality), load_pairs(photographs)
        folder, settings = tmp_path / modality, {"progress": False, "batch_size": 3, "shard_size": 2}
        parts = [TeacherCache.build(teacher, records, folder, process=k, processes=3, **settings) for k in (0, 1)]
        with pytest.raises(FileNotFoundError, match="part-00002-of-00003"):
            TeacherCache.join(folder)
        parts.append(TeacherCache.build(teacher, records, folder, process=2, processes=3, **settings))
        assert all(len(part) < len(parts[0]) + len(parts[1]) for part in parts)
        joined = TeacherCache.join(folder)
        whole = TeacherCache.build(teacher, records, tmp_path / f"whole-{modality}", progress=False)
        assert joined.ids == whole.ids and joined.fingerprint == whole.fingerprint
        torch.testing.assert_close(joined[whole.ids], whole[whole.ids], atol=2e-3, rtol=0)
        again = TeacherCache.build(teacher, records, folder, process=1, processes=3, **settings)
        assert len(again) == len(whole)


def test_a_cache_of_another_teacher_is_refused_with_both_values(hub: Path, photographs: Path, tmp_path: Path) -> None:
    records, teacher = load_pairs(photographs), Teacher.from_pretrained(hub / "bert", "text")
    cache = TeacherCache.build(teacher, records, tmp_path / "a", progress=False)
    assert TeacherCache.load(tmp_path / "a", teacher=teacher, dataset=records, modality="text").ids == cache.ids
    for other, message in (
        (Teacher.from_pretrained(hub / "bert", "text", pooling="max"), "pooling: stored 'mean', expected 'max'"),
        (Teacher.from_pretrained(hub / "bert", "text", max_length=7), "max_length: stored 9, expected 7"),
        (Teacher.from_pretrained(hub / "clip", "text"), "class: stored 'BertModel', expected 'CLIPModel'"),
    ):
        with pytest.raises(StaleStoreError, match=message):
            TeacherCache.load(tmp_path / "a", teacher=other)
        with pytest.raises(StaleStoreError, match=message):
            TeacherCache.build(other, records, tmp_path / "a", progress=False)
    with torch.no_grad():
        teacher.model.embeddings.word_embeddings.weight[3, 5] += 0.01
    with pytest.raises(StaleStoreError, match=r"weights_sha256: stored '[0-9a-f]{64}', expected '[0-9a-f]{64}'"):
        TeacherCache.load(tmp_path / "a", teacher=teacher)
    with pytest.raises(StaleStoreError, match=r"modality 'text', expected 'image'.*exchanged"):
        TeacherCache.load(tmp_path / "a", modality="image")


def rewritten(photographs: Path, folder: Path, change) -> Path:
    """The same photographs and ids with other captions or file names."""
    folder.mkdir()
    rows = json.loads((photographs / "captions.json").read_text())
    for row in rows:
        old = photographs / row["image"]
        change(row)
        (folder / row["image"]).write_bytes(old.read_bytes())
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def test_a_cache_of_other_data_is_refused(hub: Path, photographs: Path, tmp_path: Path) -> None:
    """Numbers from 0 are everybody's ids: what they stand for is compared too."""
    records = load_pairs(photographs)
    texts = TeacherCache.build(Teacher.from_pretrained(hub / "bert", "text"), records, tmp_path / "t", progress=False)
    images = TeacherCache.build(Teacher.from_pretrained(hub / "cnn", "image"), records, tmp_path / "i", progress=False)
    texts.check(records), images.check(records), images.check(records.select([5, 2]))
    other_words = rewritten(
        photographs, tmp_path / "w", lambda row: row.update(captions=["a cat", *row["captions"][1:]])
    )
    with pytest.raises(StaleStoreError, match="for 7 of 13 ids.*'a cat'"):
        texts.check(load_pairs(other_words))
    images.check(load_pairs(other_words))  # the photographs are the same
    renamed = rewritten(photographs, tmp_path / "r", lambda row: row.update(image=f"new{row['image']}"))
    images.check(load_pairs(renamed))
    others = rewritten(
        photographs, tmp_path / "o", lambda row: row.update(image=f"new{row['image']}", captions=["a cat"])
    )
    with pytest.raises(StaleStoreError, match=r"for 7 of 7 ids, the first 50, .*'new0.png'"):
        images.check(load_pairs(others))
    more = rewritten(photographs, tmp_path / "m", lambda row: row.update(image_id=row["image_id"] + 1))
    with pytest.raises(KeyError, match="the first is 51"):
        images.check(load_pairs(more))


def test_a_vector_without_a_direction_is_refused_with_its_id(hub: Path, photographs: Path, tmp_path: Path) -> None:
    for value, message in ((0.0, "norm 0.0"), (float("nan"), "norm nan")):
        teacher = Teacher.from_pretrained(hub / "bert", "text")
        embed = teacher.embed
        teacher.embed = lambda inputs, embed=embed, value=value: embed(inputs).index_fill(0, torch.tensor([0]), value)
        with pytest.raises(ValueError, match=f"the vector of item .* has the {message}"):
            TeacherCache.build(teacher, load_pairs(photographs), tmp_path / message, progress=False)


@pytest.mark.slow
def test_vectors_from_cached_regions_are_their_means(hub: Path, photographs: Path, tmp_path: Path) -> None:
    """A CNN's mean over its map, without another pass over the photographs."""
    records, teacher = load_pairs(photographs), Teacher.from_pretrained(hub / "cnn", "image")
    model = TVRNModel.from_backbones(
        hub / "cnn", freeze_vision=True, hidden_size=8, projection_size=8, similarity_size=8
    )
    processor = TVRNProcessor.from_backbones(hub / "cnn")
    regions = RegionCache.build(model, processor, records, tmp_path / "regions", dtype="float32", progress=False)
    cache = TeacherCache.from_regions(regions, records, tmp_path / "means", dtype="float32", progress=False)
    expected = torch.nn.functional.normalize(teacher([record["image"] for record in records]), dim=1)
    torch.testing.assert_close(cache[records.image_ids], expected, atol=1e-4, rtol=1e-3)
    assert TeacherCache.load(tmp_path / "means", dataset=records, modality="image").info["regions"]
    other = RegionCache.build(model, processor, records, tmp_path / "half", progress=False)
    with pytest.raises(StaleStoreError, match="numbers.regions.dtype: stored 'float32', expected 'float16'"):
        TeacherCache.from_regions(other, records, tmp_path / "means", dtype="float32", progress=False)


def test_empty_texts_and_records_without_photographs_are_refused(hub: Path, photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text 1 of the batch is ' '"):
        Teacher.from_pretrained(hub / "bert", "text").prepare(["a", " "])
    stream = ({"image_id": row, "captions": ["a"], "caption_ids": [row], "region_features": 0} for row in range(3))
    with pytest.raises(ValueError, match="image 0 has no image"):
        TeacherCache.build(Teacher.from_pretrained(hub / "cnn", "image"), stream, tmp_path, progress=False)


def test_captions_that_are_cut_are_counted(hub: Path, photographs: Path, tmp_path: Path, caplog) -> None:
    teacher = Teacher.from_pretrained(hub / "bert", "text", max_length=5)
    cache = TeacherCache.build(teacher, load_pairs(photographs), tmp_path, progress=False)
    assert cache.info["captions_cut"] == 13 and "13 captions are longer" in caplog.text


def test_the_verb_builds_and_says_what(hub: Path, photographs: Path, tmp_path: Path) -> None:
    arguments = ["teachers", photographs, hub / "dinov2", "--modality", "image", "--device", "cpu", "--batch-size", 2]
    said = tvrn(*arguments, "--output", tmp_path / "d")
    assert "items=7, size=12), pooling 'cls'" in said.stdout
    cache = TeacherCache.load(tmp_path / "d", dataset=load_pairs(photographs), modality="image")
    assert len(cache) == 7 and cache.info["teacher"] == str(hub / "dinov2")
    again = json.loads(tvrn(*arguments, "--output", tmp_path / "d", "--json").stdout)
    assert again == {"cache": str(tmp_path / "d"), "items": 7, "bytes": cache.store.bytes, "pooling": "cls"}


def test_the_verb_takes_the_means_of_regions(hub: Path, photographs: Path, tmp_path: Path) -> None:
    tvrn("regions", photographs, "--features", hub / "dinov2", "-o", tmp_path / "regions", "--device", "cpu")
    arguments = ["teachers", photographs, "--regions", tmp_path / "regions", "--modality", "image"]
    assert "items=7, size=12), means of RegionCache" in tvrn(*arguments, "-o", tmp_path / "means").stdout
    (tmp_path / "other").mkdir()
    pictures(1)[0].save(tmp_path / "other" / "9.png")
    row = {"image": "9.png", "image_id": 9, "captions": ["the dog runs"]}
    (tmp_path / "other" / "captions.json").write_text(json.dumps([row]))
    arguments[1] = tmp_path / "other"
    assert "--regions is of other data" in tvrn(*arguments, "-o", tmp_path / "other-means", code=2).stderr


@pytest.mark.slow
def test_the_verb_s_mistakes_are_one_sentence_and_code_2(hub: Path, photographs: Path, tmp_path: Path) -> None:
    tvrn("teachers", photographs, hub / "bert", "--modality", "text", "-o", tmp_path / "bert", "--device", "cpu")
    text = ["--modality", "text", "-o", tmp_path / "cache", "--device", "cpu"]
    wrong = {
        "'nowhere'": ["nowhere", hub / "bert", *text],
        "no teacher at": [photographs, tmp_path / "nothing", *text],
        "no teacher": [photographs, hub / "cnn", *text],
        "--modality is 'sound'": [photographs, hub / "bert", "--modality", "sound", "-o", tmp_path / "cache"],
        "either a MODEL": [photographs, *text],
        "exactly one": [photographs, hub / "bert", *text, "--regions", tmp_path / "regions"],
        "--modality image": [photographs, *text, "--regions", tmp_path / "regions"],
        "pooling is 'sum'": [photographs, hub / "bert", *text, "--pooling", "sum"],
        "stored 'mean', expected 'cls'": [
            photographs, hub / "bert", "--modality", "text", "-o", tmp_path / "bert", "--pooling", "cls"
        ],
    }  # fmt: skip
    for message, arguments in wrong.items():
        said = tvrn("teachers", *arguments, code=2)
        assert message in said.stderr and said.stdout == "" and "Traceback" not in said.stderr, said.stderr


@pytest.mark.slow
def test_two_processes_of_the_verb_make_one_cache(hub: Path, photographs: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m",
        "modeling_tvrn.cli", "teachers", str(photographs), str(hub / "clip"), "--modality", "text",
        "--output", str(tmp_path / "two"), "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.count("TeacherCache(") == 1, ran.stderr
    cache = TeacherCache.load(tmp_path / "two", dataset=load_pairs(photographs))
    assert len(cache.info["parts"]) == 2  # the world had two processes
    teacher = Teacher.from_pretrained(hub / "clip", "text", device="cpu")
    whole = TeacherCache.build(teacher, load_pairs(photographs), tmp_path / "one", progress=False)
    torch.testing.assert_close(cache[whole.ids], whole[whole.ids], atol=2e-3, rtol=0)
