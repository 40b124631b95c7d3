"""The pair scores of other papers: each as its formulas, looped over; one pair at a time as in any batch; trained."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from model_makers import FEATURES, SIZES, one, regions, shake, words
from torch import Tensor
from training_makers import write_scan

from modeling_tvrn import TVRNConfig

PATH = Path(__file__).resolve().parents[1] / "examples" / "baselines" / "peers.py"
PEERS = ["vse", "saf", "sgr", "imram"]


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers"] = module  # a dataclass or a saved class looks its module up there
    spec.loader.exec_module(module)
    return module


def build(peers: ModuleType, name: str, **settings: Any):
    model_class, fields = peers.SCORES[name]
    sizes = {"region_feature_size": FEATURES, **SIZES, **fields, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return shake(model_class(TVRNConfig(**sizes))).double()


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def attend(queries: list[Tensor], sources: list[Tensor], slope: float, scale: float) -> list[Tensor]:
    """SCAN's attention: affinities normalised over the queries, then a softmax over the sources; unit contexts."""
    table = [[(lambda a: a if a > 0 else slope * a)(float(x @ y)) for y in sources] for x in queries]
    norms = [math.sqrt(sum(row[j] ** 2 for row in table)) or 1.0 for j in range(len(sources))]
    contexts = []
    for row in table:
        powers = [math.exp(scale * value / norm) for value, norm in zip(row, norms, strict=True)]
        contexts.append(unit(sum(p * y for p, y in zip(powers, sources, strict=True)) / sum(powers)))
    return contexts


def naive_vse(stage: Any, image: list[Tensor], text: list[Tensor]) -> Tensor:
    def pooled(pooling: Any, fragments: list[Tensor]) -> Tensor:
        positions = torch.zeros(1, len(fragments), 32, dtype=torch.float64)
        for k in range(len(fragments)):
            for place in range(16):
                angle = k / 10000 ** (2 * place / 32)
                positions[0, k, 2 * place], positions[0, k, 2 * place + 1] = math.sin(angle), math.cos(angle)
        states = pooling.gru(positions)[0][0]
        theta = torch.softmax((states[:, :32] + states[:, 32:]) / 2 @ pooling.score.weight[0] / 0.1, dim=0)
        columns = zip(*[fragment.tolist() for fragment in fragments], strict=True)
        return unit(
            torch.stack([sum(t * v for t, v in zip(theta, sorted(c, reverse=True), strict=True)) for c in columns])
        )

    return stage.scale[0].exp() * pooled(stage.region_pooling, image) @ pooled(stage.word_pooling, text)


def naive_pooling(pooling: Any, fragments: list[Tensor]) -> Tensor:
    mean = pooling.overall(sum(fragments) / len(fragments))
    scores = torch.stack([pooling.score(pooling.local(x) * mean)[0] for x in fragments])
    return unit(sum(w * x for w, x in zip(scores.softmax(dim=0), fragments, strict=True)))


def naive_sgraf(stage: Any, image: list[Tensor], text: list[Tensor], text_pooling: Any) -> Tensor:
    config = stage.config
    contexts = attend(text, image, config.leaky_slope, config.attention_scale)
    overall = naive_pooling(stage.image_pooling, image) - naive_pooling(text_pooling, text)
    nodes = [unit(stage.global_similarity.weight @ overall**2)]
    nodes += [unit(stage.local_similarity.weight @ (c - t) ** 2) for c, t in zip(contexts, text, strict=True)]
    head = stage.head
    if config.similarity_head == "saf":
        gates = [torch.sigmoid(head.gate(node)) for node in nodes]
        return head.logit(unit(sum(g * s for g, s in zip(gates, nodes, strict=True)) / sum(gates)))[0]
    for step in head.steps:
        edges = [torch.stack([step.source(p) @ step.target(q) for q in nodes]).softmax(dim=0) for p in nodes]
        nodes = [torch.relu(step.update(sum(e * s for e, s in zip(row, nodes, strict=True)))) for row in edges]
    return head.logit(nodes[0])[0]


def naive_imram(stage: Any, image: list[Tensor], text: list[Tensor]) -> Tensor:
    total = 0.0
    for fragments, sources, memory in ((text, image, stage.word_memory), (image, text, stage.region_memory)):
        queries = fragments
        for _ in range(3):
            contexts = attend(queries, sources, 0.0, stage.config.attention_scale)
            total += sum(x @ c for x, c in zip(fragments, contexts, strict=True)) / len(fragments)
            pairs = [torch.cat([q, c]) for q, c in zip(queries, contexts, strict=True)]
            gates = [torch.sigmoid(memory.gate(pair)) for pair in pairs]
            queries = [
                unit(g * q + (1 - g) * torch.tanh(memory.update(pair)))
                for g, q, pair in zip(gates, queries, pairs, strict=True)
            ]
    return stage.scale[0].exp() * total / 6


@torch.no_grad()
@pytest.mark.parametrize("name", PEERS)
def test_a_score_is_its_formulas(peers: ModuleType, name: str) -> None:
    model = build(peers, name)
    image_inputs, text_inputs = regions(dtype=torch.float64), words()
    logits = model.match(model.encode_images(**image_inputs), model.encode_texts(**text_inputs))
    images = model.encode_images(**image_inputs, level="late_interaction")
    texts = model.encode_texts(**text_inputs, level="late_interaction")
    for i in range(len(images)):
        image = list(images.regions[i][images.region_mask[i]])
        for t in range(len(texts)):
            text = list(texts.words[t][texts.word_mask[t]])
            expected = {
                "vse": lambda: naive_vse(model.pair, image, text),  # noqa: B023
                "imram": lambda: naive_imram(model.pair, image, text),  # noqa: B023
            }.get(name, lambda: naive_sgraf(model.pair, image, text, model.text_pooling))()  # noqa: B023
            assert float(logits[i, t]) == pytest.approx(float(expected), abs=1e-9, rel=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", PEERS)
def test_a_score_depends_on_its_pair_alone(peers: ModuleType, name: str) -> None:
    model = build(peers, name).train()  # as dropout would be off: nothing of a batch enters in training either
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    image_inputs, text_inputs = regions(dtype=torch.float64), words()
    images, texts = model.encode_images(**image_inputs), model.encode_texts(**text_inputs)
    logits = model.match(images, texts)
    torch.testing.assert_close(model.match(images, texts, chunk_size=3), logits)
    own = model.match_aligned(images, texts.select([0, 3, 2, 1, 1, 0]))
    torch.testing.assert_close(own, logits.gather(1, torch.tensor([[0, 3], [2, 1], [1, 0]])))
    alone = model.encode_images(**{"region_mask": None} | one(image_inputs, 1))
    for t in range(len(texts)):
        single = model.match(alone, model.encode_texts(**one(text_inputs, t)))
        torch.testing.assert_close(single[0, 0], logits[1, t])


@pytest.mark.parametrize("name", PEERS)
def test_every_weight_of_the_pair_stage_learns(peers: ModuleType, name: str) -> None:
    model = build(peers, name, contrastive_loss_weight=0.0).train()
    inputs = regions(4, dtype=torch.float64) | words()
    model(**inputs, return_loss=True).loss.backward()
    free = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    silent = {key for key, weight in free.items() if weight.grad is None or not weight.grad.abs().sum() > 0}
    assert all(key.startswith(("pooled_", "logit_scale")) or key.endswith(("bias_hh_l0", "bias")) for key in silent), (
        silent
    )


def test_a_peer_refuses_what_it_has_not(peers: ModuleType) -> None:
    with pytest.raises(ValueError, match="use_text_refinement to be False"):
        build(peers, "imram", use_text_refinement=True)


@pytest.mark.slow
def test_the_program_trains_peers_beside_tvrn_and_compares(
    peers: ModuleType, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(sys.modules["modeling_tvrn.evaluation.compare"], "RESAMPLES", 50)
    data, output = write_scan(tmp_path), tmp_path / "runs"
    sizes = {"hidden_size": 10, "projection_size": 7, "similarity_size": 6, "word_embedding_size": 9}
    absent = ("regions", "vision", "text", "text_features", "model.vision_grid_size", "model.freeze_text")
    keys = [f"data={data}", "data_options.captions_per_image=2", "cpu=true", "mixed_precision=no"]
    keys += [f"{name}=null" for name in (*absent, "model.freeze_vision")]
    keys += [f"model.{name}={value}" for name, value in sizes.items()]
    arguments = [*keys, "--output", str(output), "--epochs", "1", "--batch-size", "8"]
    trained = ["vse", "imram", "tvrn"]
    assert peers.main([*arguments, "--scores", ",".join(trained)]) == 0
    table = capsys.readouterr().out
    report = json.loads((output / "comparison.json").read_text())
    for name in trained:
        assert f"{name}, pair score" in table
        assert (output / name / "results.json").is_file() and (output / name / "curve.png").is_file()
        assert (output / name / "README.md").is_file() is (name == "tvrn"), "a peer has no card that calls it TVRN"
    assert [score["model"] for score in report["scores"]] == [name for name in trained for _ in range(2)]
    operations = {score["model"]: score["operations_a_pair"] for score in report["scores"][::2]}
    assert operations["vse"] == 2 * 10 and operations["imram"] == max(operations.values())
    first = (output / "imram" / "model.safetensors").stat().st_mtime_ns
    assert peers.main([*arguments, "--scores", "imram,vse"]) == 0, "what is there already is compared anew"
    assert (output / "imram" / "model.safetensors").stat().st_mtime_ns == first
    assert peers.main([*arguments, "--scores", "scan"]) == 2 and "'scan'" in capsys.readouterr().err
