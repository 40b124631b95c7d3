"""The training scripts beside examples/train.py."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = sorted((ROOT / "examples" / "configs" / "accelerate").glob("*.yaml"))


def script(name: str) -> ModuleType:
    path = ROOT / "examples" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_plain_trainer_trains_and_saves_a_model_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("train_with_trainer")
    whole, logs = module.load_pairs, []
    monkeypatch.setattr(
        module, "load_pairs", lambda data, split: whole(data, split=split, count=24 if split == "train" else 12)
    )
    logged = module.Trainer.log
    monkeypatch.setattr(
        module.Trainer, "log", lambda self, values, *rest: (logs.append(dict(values)), logged(self, values, *rest))
    )
    arguments = ["--output", str(tmp_path), "--batch-size", "12", "--hidden-size", "24", "--epochs", "8"]
    assert module.main(arguments) == 0
    said = [each["loss"] for each in logs if "loss" in each]
    assert len(said) >= 2 and said[-1] < said[0]
    assert "validation rSum" in capsys.readouterr().out
    model, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    validation = whole("scenes", split="validation", count=12)
    recalls = [each["eval_rsum"] for each in logs if "eval_rsum" in each]
    assert len(recalls) == 8, "after every epoch"
    assert recalls[-1] == pytest.approx(module.evaluate(model, processor, validation).embedding_metrics.rsum)
    record = validation[0]
    with torch.inference_mode():
        output = model.eval()(**processor(images=[record["image"]], text=record["captions"][:1]))
    assert output.logits_per_image.shape == (1, 1)


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_the_launchers_configurations(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    expected = {"one_gpu": (1, 1), "eight_gpus": (8, 1), "two_nodes": (16, 2)}[path.stem]
    assert (config.num_processes, config.num_machines) == expected
    assert config.distributed_type.value == ("NO" if config.num_processes == 1 else "MULTI_GPU")
    assert not getattr(config, "use_cpu", False)
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config)), "keys that accelerate does not know"
