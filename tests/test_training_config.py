"""Keys of a run: read from YAML and the command line, checked, and explained where they are wrong."""

import dataclasses
import time
from pathlib import Path

import pytest
from transformers import PreTrainedConfig

from modeling_tvrn.configuration_tvrn import BY_FIRST_STAGE, TVRNConfig
from modeling_tvrn.training import TrainingConfig, describe
from modeling_tvrn.training.settings import model_fields

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "examples" / "configs").glob("*.yaml"))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "batch_size: 12\nepochs: 3\nmodel: {hidden_size: 16, dropout: 0.1}\n")
    config = TrainingConfig.from_yaml(path, ["batch_size=24", "model.hidden_size=32", "model.similarity_head=sgr"])
    assert (config.batch_size, config.epochs) == (24, 3)
    assert config.model == {"hidden_size": 32, "dropout": 0.1, "similarity_head": "sgr"}
    assert config.seed == TrainingConfig().seed


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("learning_rate=5e-4", 5e-4),  # PyYAML alone reads a string: YAML 1.1 wants a point in it
        ("learning_rate=1", 1.0),
        ("mixed_precision=no", "no"),  # and False here
        ("max_steps=null", None),
        ("cpu=true", True),
        ("decay_epochs=[3, 5]", [3, 5]),
        ("trackers=tensorboard", ["tensorboard"]),
        ("query=left: a red circle", "left: a red circle"),
        ("query=2024-01-02", "2024-01-02"),
        ("query=1:30", "1:30"),
        ("query=010", "010"),
        ("batch_size=64", 64),
        ("data_options={count: 3}", {"count": 3}),
    ],
)
def test_values_are_read_as_yaml_of_today(override: str, value: object) -> None:
    name = override.partition("=")[0]
    found = getattr(TrainingConfig.from_yaml(None, [override]), name)
    assert found == value and type(found) is type(value)


def test_dotted_keys_in_a_file_and_in_mappings_reach_the_model(tmp_path: Path) -> None:
    path = written(tmp_path, "model.hidden_size: 8\nmodel: {dropout: 0.0}\ndata_options: {count: 5}\n")
    config = TrainingConfig.from_yaml(path, ["model.vision_config.model_type=vit", "data_options.seed=3"])
    assert config.model == {"dropout": 0.0, "hidden_size": 8, "vision_config": {"model_type": "vit"}}
    assert config.data_options == {"count": 5, "seed": 3}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batchsize=8"], "unknown key 'batchsize'; did you mean batch_size"),
        (["learning_rates=1"], "unknown key 'learning_rates'; did you mean learning_rate"),
        (["model.hiden_size=8"], "unknown key model.hiden_size; did you mean hidden_size"),
        (["model.zzz=8"], "unknown key model.zzz; known keys are .*hidden_size.*"),
        (["query=[left"], "not valid YAML(.|\n)*quote it"),
        (["batch_size"], "'batch_size' is not of the form key=value"),
        (["batch_size=eight"], "batch_size = 'eight' is a str; expected int"),
        (["epochs=2.5"], "epochs = 2.5 is a float; expected int"),
        (["epochs=true"], "epochs = True is a bool; expected int"),
        (["batch_size=1"], "batch_size = 1; expected at least 2"),
        (["seed=1e20"], r"seed = 1e\+20 is a float; expected int"),
        (["seed=4294967296"], "seed = 4294967296; expected at most 4294967295"),
        (["batch_size=99999999999999999999"], r"batch_size = 1e\+20; expected a number below 4,294,967,296"),
        (["model.hidden_size=99999999999999999999"], r"model.hidden_size = 1e\+20; expected a number below"),
        (["learning_rate=1e999"], "learning_rate = inf; expected a number below"),
        (["seed=" + "9" * 5000], "seed=999.*not valid YAML .Exceeds the limit"),
        (["model=" + "{a: " * 3000 + "1" + "}" * 3000], "nested more than 50 deep"),
        (["a" + ".a" * 5000 + "=1"], "nested more than 50 deep"),
        (["model.hidden_size=&a [*a]"], "nested more than 50 deep"),
        (["learning_rate=0"], "learning_rate = 0; expected above 0"),
        (["word_dropout=1"], "word_dropout = 1; expected below 1"),
        (["mixed_precision=fp8"], "mixed_precision = 'fp8'; expected one of no, bf16, fp16"),
        (["trackers=comet"], "trackers = 'comet'; expected one of tensorboard, trackio, wandb"),
        (["model=8"], "model = 8 is a int; expected dict"),
        (["cpu=yes"], "cpu = 'yes' is a str; expected true or false"),
        (["batch_size=010"], "batch_size = '010' is a str; expected int"),
        (["model.freeze_vision=no"], "model.freeze_vision = 'no'; expected true or false"),
        (["model.hidden_size=64.0"], "model.hidden_size = 64.0; expected a whole number such as 1024"),
        (["scheduler=step"], "scheduler = 'step' needs decay_epochs"),
        (["batch_size=6", "batch_captions_per_image=5"], "batch_captions_per_image = 5 leaves .* use at most 3"),
        (
            ["text_features=captions", "text=some/encoder"],
            "needs a frozen text tower, but model.freeze_text = False",
        ),
        (["text_features=captions", "model.freeze_text=true"], "needs a text tower, got text = None"),
        (["word_embeddings=some/encoder", "text=some/encoder"], "but there is a text tower .* set text=null"),
        (["model.freeze_word_embeddings=true"], "word_embeddings = None: the words would stay as they were drawn"),
        (["vision=some/tower", "model.vision_config.model_type=vit"], "both name a vision model"),
        (["text=some/tower", "model.text_config.model_type=bert"], "both name a text model"),
        (["detector=some/tower", "model.detector_config.model_type=yolos"], "both name a detector model"),
        (["regions=cache", "vision=some/tower"], "but model.freeze_vision = False"),
    ],
)
def test_a_wrong_key_or_value_says_what_was_expected(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig.from_yaml(None, overrides)


def test_a_missing_or_misshapen_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no configuration file .*gone.yaml"):
        TrainingConfig.from_yaml(tmp_path / "gone.yaml")
    with pytest.raises(ValueError, match="holds a list; expected `key: value` lines"):
        TrainingConfig.from_yaml(written(tmp_path, "- batch_size\n"))
    with pytest.raises(ValueError, match="the key 'model' stands twice; keep one of the two"):
        TrainingConfig.from_yaml(written(tmp_path, "model: {hidden_size: 8}\nseed: 1\nmodel: {dropout: 0.1}\n"))
    assert TrainingConfig.from_yaml(written(tmp_path, "# nothing\n")) == TrainingConfig()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: [a\nb: c", r"expected ',' or ']', but got ':' \(line 2"),
        (b"\tdata: a", r"found character .* \(line 1"),
        (b"data: \xe9", "unexpected end of data"),
        (b"data: \x00", "special characters are not allowed"),
        (b"? [a, b]\n: 1", "unhashable key"),
        (b"data: !!python/object/apply:os.system ['ls']", "could not determine a constructor for the tag"),
        (b"data: " + b"[" * 9000, "nested more than 50 deep"),
        (b"model: &m\n  hidden_size: *m", "nested more than 50 deep"),
        (b"model:\n  dropout: 0.1\n  dropout: 0.2", "the key 'dropout' stands twice; keep one of the two"),
        (
            b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 40)),
            "with its aliases it has more than 100,000 values",
        ),
    ],
)
def test_yaml_that_cannot_be_read_names_its_file_at_once(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=f"run.yaml is not valid YAML: .*{message}.*; correct it there"):
        TrainingConfig.from_yaml(tmp_path / "run.yaml")
    assert time.perf_counter() - started < 5


def test_help_explains_every_key_with_its_default() -> None:
    text = describe(TrainingConfig)
    for name, field in TrainingConfig.model_fields.items():
        assert field.description is not None and len(field.description) > 10
        assert f"  {name}=" in text and field.description in text
    assert "batch_size=64" in text and "mixed_precision=no" in text and "model.hidden_size=1024" in text
    assert (
        "model.freeze_text=null" in text
        and "model.freeze_first_stage=true" in text
        and "model.chunk_size_feed_forward" not in text
    )
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  model."):
            assert lines[number + 1].startswith("      ") and len(lines[number + 1].split()) >= 3, line
    assert "(gate or gru)" in text.replace('"', "")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_survive_a_round_trip(path: Path) -> None:
    config = TrainingConfig.from_yaml(path)
    assert TrainingConfig.from_mapping(config.as_dict()) == config


def test_reading_a_configuration_loads_no_torch(run_python) -> None:
    code = """
import sys
from modeling_tvrn.training import TrainingConfig, describe
TrainingConfig.from_yaml("flickr8k", ["model.hidden_size=8"])
describe(TrainingConfig)
print(sorted({"torch", "transformers", "accelerate"} & set(sys.modules)))
"""
    assert run_python(code).split() == ["[]"]


def test_fields_of_the_model_are_those_that_its_configuration_has() -> None:
    """They are read from its source, which is no import."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"pad_token_id"}
    fields = {field.name: field.default for field in dataclasses.fields(TVRNConfig) if field.name not in inherited}
    assert model_fields() == fields
    for has_dual_encoder in (False, True):
        chosen = {name: both[has_dual_encoder] for name, both in BY_FIRST_STAGE.items()}
        assert model_fields(has_dual_encoder) == {**fields, **chosen}


def test_all_that_is_wrong_is_said_at_once_a_line_each() -> None:
    with pytest.raises(ValueError) as caught:
        TrainingConfig(batchsize=8, epochs="two", trackers=["comet"], phases=[{"train": "all", "epoch": 1}, "all"])
    said = str(caught.value)
    for line in (
        "unknown key 'batchsize'; did you mean batch_size",
        "epochs = 'two' is a str; expected int or null",
        "trackers = 'comet'; expected one of tensorboard, trackio, wandb (where values are tracked)",
        "unknown key phases.0.epoch; did you mean epochs?",
        "phases.1 = 'all' is a str; expected a mapping, as in phases=[{train:",
    ):
        assert f"\n{line}" in f"\n{said}", said
    assert len(said.splitlines()) == 5


def test_an_override_wins_over_a_dotted_key_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "model.hidden_size: 8\nphases: [{train: all, epochs: 1}]\nphases.0.epochs: 2\n")
    config = TrainingConfig.from_yaml(path, ["model.hidden_size=16", "phases.0.epochs=3"])
    assert config.model == {"hidden_size": 16} and config.as_dict()["phases"] == [{"train": "all", "epochs": 3}]


def test_paths_and_tuples_of_python_are_strings_and_lists(tmp_path: Path) -> None:
    phases = ({"train": "embeddings", "epochs": 1}, {"train": "all", "epochs": 2})
    config = TrainingConfig(data=tmp_path / "pairs.csv", output_dir=tmp_path, phases=phases)
    assert (config.data, config.output_dir) == (str(tmp_path / "pairs.csv"), str(tmp_path))
    assert [phase.epochs for phase in config.phases] == [1, 2]


def test_the_caller_s_own_values_are_not_changed() -> None:
    given = {"model": {"vision_config": {"model_type": "vit"}}, "model.vision_config.hidden_size": 8}
    assert TrainingConfig.from_mapping(given).model["vision_config"] == {"model_type": "vit", "hidden_size": 8}
    assert given["model"] == {"vision_config": {"model_type": "vit"}}


def test_what_may_change_on_resuming_is_said_where_a_key_is_defined() -> None:
    """Where a cache lies, or what is measured beside the training, reaches no weight; what is trained on does."""
    from modeling_tvrn.training.state import compared, differences

    base = {"text": "some/encoder", "model": {"freeze_text": True}, "text_features": "captions"}
    first = compared(TrainingConfig.from_mapping(base))
    free = {"zero_shot": "animals", "zero_shot_prompt": "{}!", "text_features": "elsewhere", "output_dir": "runs/x"}
    assert differences(first, compared(TrainingConfig.from_mapping({**base, **free}))) == []
    for key, value in (("seed", 1), ("evaluation_images", 5), ("learning_rate", 1e-2)):
        others = differences(first, compared(TrainingConfig.from_mapping({**base, key: value})))
        assert others == [f"{key}: {TrainingConfig().as_dict()[key]!r} → {value!r}"]
