"""`phases` of a run: read from YAML, Python and key=value, and refused with its values where it is wrong."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from modeling_tvrn.cli import app
from modeling_tvrn.training import TrainingConfig, describe

TWO = "phases=[{train: embeddings, epochs: 4, batch_size: 32}, {train: all, epochs: 1}]"
PLAIN = "model.use_refined_features=false"
DISTILS = "model.distillation_loss_weight=1"


def read(*overrides: str) -> TrainingConfig:
    return TrainingConfig.from_yaml(None, overrides)


def test_yaml_python_and_overrides_say_the_same(tmp_path: Path) -> None:
    lines = ["phases:", "- train: [embeddings, late_interaction]", "  epochs: 5", "- {train: all, steps: 7}"]
    file = tmp_path / "recipe.yaml"
    file.write_text("\n".join(lines), encoding="utf-8")
    given = [{"train": ["embeddings", "late_interaction"], "epochs": 5}, {"train": "all", "steps": 7}]
    for config in (
        TrainingConfig.from_yaml(file),
        TrainingConfig(phases=given),
        TrainingConfig.from_mapping({"phases": given}),
        read("phases=[{train: [embeddings, late_interaction], epochs: 5}, {train: [all], steps: 7, epochs: null}]"),
        read(TWO, "phases.0.train=[embeddings,late_interaction]", "phases.0.epochs=5", "phases.0.batch_size=null",
             "phases.1={train: all, steps: 7}"),
    ):  # fmt: skip
        assert config.as_dict()["phases"] == given
        assert TrainingConfig.from_mapping(config.as_dict()) == config
    assert given[1] == {"train": "all", "steps": 7}, "the caller's own is not changed"


def test_an_override_changes_one_entry_of_the_file_s(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("phases:\n- {train: embeddings, epochs: 4}\n- {train: all, epochs: 1}\n", encoding="utf-8")
    overrides = ["phases.1.learning_rate=3e-3", "phases.0.epochs=null", "phases.0.steps=9", "batch_size=12"]
    config = TrainingConfig.from_yaml(file, overrides)
    kept = [{"train": "embeddings", "steps": 9}, {"train": "all", "epochs": 1, "learning_rate": 3e-3}]
    assert config.as_dict()["phases"] == kept
    assert [phase.batch_size for phase in config.schedule()] == [12, 12]
    whole = TrainingConfig.from_yaml(file, ["phases=null", "max_steps=3"])
    assert whole.phases is None and [phase.steps for phase in whole.schedule()] == [3]


WRONG: list[tuple[list[str], str]] = [
    (["phases=[{train: embedings, epochs: 1}]"], r"phases\.0\.train = 'embedings'; did you mean embeddings"),
    ([TWO, "phases.1.train=tokens"], r"phases\.1\.train = 'tokens'; known keys are .*late_interaction"),
    ([TWO, "phases.1.batchsize=3"], r"unknown key phases\.1\.batchsize; did you mean batch_size"),
    (["phases=[]"], r"phases = \[\] trains nothing; leave phases out for one phase of all"),
    ([TWO, "phases.0.train=[]"], r"phases\.0\.train = \[\] names nothing to train; expected of embeddings, late"),
    (["phases=[{epochs: 3}]"], r"phases\.0\.train = \[\] names nothing to train"),
    ([TWO, "phases.0.train=[all, embeddings]"], r"\['all', 'embeddings'\]: all is every component; leave out embed"),
    ([TWO, "phases.0.train=[embeddings, embeddings]"], "names something twice"),
    ([TWO, "phases.0.epochs=0"], r"phases\.0\.epochs = 0; expected at least 1"),
    ([TWO, "phases.0.epochs=2.5"], r"phases\.0\.epochs = 2\.5 is a float; expected int"),
    ([TWO, "phases.0.steps=0", "phases.0.epochs=null"], r"phases\.0\.steps = 0; expected at least 1"),
    ([TWO, "phases.0.batch_size=1"], r"phases\.0\.batch_size = 1; expected at least 2"),
    ([TWO, "phases.0.region_dropout=1"], r"phases\.0\.region_dropout = 1; expected below 1"),
    ([TWO, "phases.0.steps=5"], r"phases\.0\.epochs = 4 and phases\.0\.steps = 5; give one of them"),
    ([TWO, "phases.1.epochs=null"], r"phases\.1 \(all\) has neither epochs nor steps; give phases\.1\.epochs"),
    ([TWO, "epochs=3"], r"epochs = 3 beside phases\.0\.epochs = 4, phases\.1\.epochs = 1: .* leave out epochs"),
    ([TWO, "max_steps=9"], r"max_steps = 9 beside phases\.0\.epochs = 4, phases\.1\.epochs = 1"),
    ([TWO, "streaming=true", "text=a/b"], r"phases\.0\.epochs = 4 and streaming = True: .* give phases\.0\.epochs=nu"),
    ([TWO, "batch_captions_per_image=20"], r"leaves a batch of phases\.0\.batch_size = 32 with one image.*at most 16"),
    ([TWO, "phases.1.batch_size=9", "batch_size=8"], r"batch_size = 8 reaches no phase, .* \(32, 9\); give phases\.N"),
    ([TWO, "phases.2.epochs=3"], r"there is no phases\.2: phases is a list of 2 \(phases\.0 to phases\.1\)"),
    ([TWO, "phases.-1.epochs=3"], r"there is no phases\.-1: phases is a list of 2"),
    ([TWO, "phases.last.epochs=3"], r"there is no phases\.last: phases is a list of 2"),
    (["phases.0.epochs=3"], r"there is no phases\.0: this run has no phases; give some, as in phases=\[\{train:"),
    (["phases=embeddings"], r"phases = 'embeddings' is a str; expected a list, as in phases=\[\{train:"),
    (["phases={train: all, epochs: 1}"], r"phases = \{.*\} is a dict; expected a list"),
    (["phases=[all]"], r"phases\.0 = 'all' is a str; expected a mapping"),
    ([TWO, "phases.0.train=late_interaction", "model.use_late_interaction=false"],
     r"phases\.0\.train names late_interaction but model\.use_late_interaction = False: there is no late interaction"),
    ([TWO, "phases.0.train=embeddings", "model.contrastive_loss_weight=0"],
     r"phases\.0\.train names embeddings but model\.contrastive_loss_weight = 0: nothing would be learned"),
    ([TWO, "phases.1.train=reasoning", "model.matching_loss_weight=0"],
     r"names reasoning but model\.matching_loss_weight = 0, model\.pair_contrastive_loss_weight = 0\.0, model\.hard"),
    ([TWO, "phases.1.train=distilled_embeddings"],
     r"phases\.1\.train names distilled_embeddings but model\.distillation_loss_weight = 0\.0: nothing would be lear"),
    ([TWO, "phases.1.train=distilled_embeddings", DISTILS],
     r"phases\.1\.train = 'distilled_embeddings', but no phase before it trains late_interaction"),
    ([TWO, "phases.1.train=distilled_embeddings", DISTILS, "model.use_late_interaction=false"],
     r"names distilled_embeddings but model\.use_late_interaction = False: .* learn from"),
    ([TWO, "phases.1.train=[distilled_embeddings, reasoning]", DISTILS],
     r"distilled_embeddings learn from what stays as it is; leave out reasoning, or distilled_embeddings"),
    ([TWO, "phases.1.train=reasoning", DISTILS],
     r"model\.distillation_loss_weight = 1 but no phase trains embeddings beside what they would learn from"),
    ([TWO, "phases.1.train=late_interaction"],
     r"phases\.1 trains late_interaction, which moves the regions and words that embeddings sees, .*refined_features"),
    ([TWO, "phases.1.train=reasoning", "model.refinement=gru"],
     r"phases\.1 trains reasoning, which moves the refined words that embeddings sees.*or model\.refinement=gate"),
    ([TWO, "phases.0.train=reasoning", "phases.1.train=late_interaction", PLAIN],
     r"phases\.1 trains late_interaction, which moves the regions and words that reasoning sees.*name reasoning as"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_wrong_phases_are_refused_with_their_values(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(*overrides)


def test_the_command_refuses_them_without_a_traceback(tmp_path: Path) -> None:
    output = f"output_dir={tmp_path / 'run'}"
    result = CliRunner().invoke(app, ["train", output, TWO, "phases.1.train=reasonning"])
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "phases.1.train = 'reasonning'; did you mean reasoning" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        [TWO, "phases.1.train=late_interaction", PLAIN],
        [TWO, "phases.1.train=[late_interaction, reasoning]", PLAIN],
        [TWO, "phases.1.train=reasoning"],
        [TWO, "phases.0.train=reasoning", "phases.1.train=embeddings"],
        [TWO, "phases.1.train=reasoning", "model.use_late_interaction=false", PLAIN],
        [TWO, "phases.0.train=all", "phases.1.train=distilled_embeddings", DISTILS],
        [TWO, "phases.0.steps=3", "phases.0.epochs=null", "phases.1.steps=4", "phases.1.epochs=null", "text=a/b",
         "streaming=true"],
    ],
)  # fmt: skip
def test_what_makes_sense_is_read(overrides: list[str]) -> None:
    phases: Any = read(*overrides).phases
    assert len(phases) == 2


def test_help_explains_a_phase_with_an_example() -> None:
    text = describe(TrainingConfig)
    assert "  phases=null" in text and "phases=[{train: [embeddings, late_interaction], epochs: 5" in text
    for key in ("train", "epochs", "steps", "batch_size", "learning_rate", "region_dropout", "word_dropout"):
        assert f"phases.N.{key}\n" in text
    example = text.split("Example: ")[1].split("\n")[0]
    assert read(example, PLAIN).phases
