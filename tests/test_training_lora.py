"""Low-rank adapters in the towers: they learn, the towers stay, and what is saved needs no peft."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_makers import TINY_BERT, tiny_config, write_scan
from transformers import AutoModel

peft = pytest.importorskip("peft", reason='low-rank adapters come with pip install ".[lora]"')

from modeling_tvrn.training import TrainingConfig  # noqa: E402
from modeling_tvrn.training.loop import Training  # noqa: E402
from modeling_tvrn.training.lora import merged_state  # noqa: E402

BERT = {**TINY_BERT, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scan(tmp_path_factory.mktemp("scan"))


def configure(data: Path, output: Path, **keys: Any) -> TrainingConfig:
    base = {"epochs": 1, "text_lora_rank": 3, "tower_learning_rate": 1e-2, "model": {"text_config": BERT}}
    return tiny_config(data, output, **{**base, **keys})


def test_adapters_learn_and_the_tower_stays(data: Path, tmp_path: Path) -> None:
    run = Training(configure(data, tmp_path))
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.fit()
    for name, value in run.model.named_parameters():
        changed = not torch.equal(value, before[name])
        if name.startswith("text_model."):
            assert changed is ("lora_" in name) is value.requires_grad, name
    assert sum("lora_" in name for name in before) == 2 * (2 * 6)  # query, key, value and three dense in each layer


def test_the_saved_model_scores_as_the_trained_one_without_peft(data: Path, tmp_path: Path) -> None:
    run = Training(configure(data, tmp_path, ema_decay=0.5))
    run.fit()
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if "lora" in name or "base_layer" in name]
    assert run.average is not None
    model = AutoModel.from_pretrained(tmp_path).eval()
    ids = torch.randint(1, 9, (4, 6))
    with run.average.applied(), torch.inference_mode():
        expected = run.model.eval().encode_texts(input_ids=ids).embeds
        found = model.encode_texts(input_ids=ids).embeds
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_run_with_adapters_goes_on_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    keys = {"epochs": 2, "keep_checkpoints": 10}
    whole = Training(configure(data, tmp_path / "whole", **keys))
    whole.fit()
    path = tmp_path / "whole" / "checkpoints"
    again = Training(configure(data, tmp_path / "again", **keys, resume=str(path / "step-00000004")))
    assert again.step == 4
    again.fit()
    assert again.step == whole.step > 4
    other = again.model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in whole.model.state_dict().items())


def test_merging_leaves_the_model_as_it_is_and_one_without_adapters_alone(data: Path, tmp_path: Path) -> None:
    run = Training(configure(data, tmp_path))
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    state = merged_state(run.model)
    assert state is not None
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    plain = Training(configure(data, tmp_path / "plain", text_lora_rank=None))
    assert merged_state(plain.model) is None and set(state) == set(plain.model.state_dict())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vision_lora_rank": 2}, "vision_lora_rank = 2, but this model has no vision_model"),
        ({"model": {"text_config": BERT, "freeze_text": True}}, "adapters learn; set model.freeze_text=false"),
    ],
)
def test_what_cannot_be_adapted_is_refused(data: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(configure(data, tmp_path, **keys))
