"""Checkpoints that load anywhere: in a fresh process in which this package cannot be imported."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tiny import FAMILIES, pad, random_rows, tiny_classifier, tiny_model
from transformers_badge import BadgeForSequenceClassification


MODEL_FOLDER = Path(__file__).parents[1] / "src" / "transformers_badge" / "model"
SHIPPED = {path.name for path in MODEL_FOLDER.glob("*_badge.py")}
BATCH = pad(random_rows([9, 30, 4]))
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["transformers_badge"] = None  # any import of it fails from here on
import json, torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
"""


def in_a_fresh_process(code, *arguments):
    """Run code where the package cannot be imported; returns what it prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_THE_PACKAGE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_save_pretrained_writes_all_that_loading_needs(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == SHIPPED
    assert (tmp_path / "model.safetensors").exists()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_badge.BadgeConfig",
        "AutoModelForSequenceClassification": "modeling_badge.BadgeForSequenceClassification",
    }
    assert config["custom_pipelines"]["text-classification"]["impl"] == "pipeline_badge.BadgeTextClassificationPipeline"


def test_with_the_package_no_trust_is_needed(tmp_path, model):
    model.config.exit_policy = {"threshold": 0.7}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is BadgeForSequenceClassification
    ours, theirs = model.early_exit_predict(**BATCH), loaded.early_exit_predict(**BATCH)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-6)  # loaded weights may be aligned otherwise in memory
    assert torch.equal(ours.exit_layer, theirs.exit_layer)


def test_a_fresh_process_loads_trains_saves_and_loads_again(tmp_path, family):
    policy = {"criterion": "entropy", "threshold": 0.8, "window": 3}
    model = tiny_model(family, exit_policy=policy, lexical_exit=family == "bert")
    model.save_pretrained(tmp_path / "first")
    torch.save(BATCH, tmp_path / "batch.pt")
    answer = in_a_fresh_process(
        """
first, second, batch = sys.argv[1] + "/first", sys.argv[1] + "/second", torch.load(sys.argv[1] + "/batch.pt")
model = AutoModelForSequenceClassification.from_pretrained(first, trust_remote_code=True)
assert "transformers_modules" in type(model).__module__, type(model).__module__
early = model.early_exit_predict(**batch)
rows = [{name: value[i].tolist() for name, value in batch.items()} for i in range(3)]
streamed = [row.exit_layer for row in model.early_exit_stream(rows, 2)]
with torch.no_grad():
    logits = model(**batch).exit_logits

rows = [{**{name: value[i] for name, value in batch.items()}, "labels": i} for i in range(3)]
arguments = TrainingArguments(sys.argv[1] + "/run", max_steps=2, report_to=[], save_strategy="no", learning_rate=1e-2,
                              disable_tqdm=True, use_cpu=True)
Trainer(model=model, args=arguments, train_dataset=rows).train()
model.eval().save_pretrained(second)
again = AutoModelForSequenceClassification.from_pretrained(second, trust_remote_code=True)
with torch.no_grad():
    trained, reloaded = model(**batch).exit_logits, again(**batch).exit_logits
print(json.dumps({
    "logits": logits.tolist(), "layers": early.exit_layer.tolist(), "early": early.logits.tolist(),
    "streamed": streamed,
    "moved": float((trained - logits).abs().max()), "kept": bool(torch.equal(trained, reloaded)),
    "policy": again.config.exit_policy.to_dict(), "again": again.early_exit_predict(**batch).exit_layer.tolist(),
}))
""",
        tmp_path,
    )
    with torch.no_grad():
        assert torch.equal(torch.tensor(answer["logits"]), model(**BATCH).exit_logits)
    early = model.early_exit_predict(**BATCH)
    assert answer["layers"] == early.exit_layer.tolist()
    assert answer["streamed"] == early.exit_layer.tolist()
    # rows that were gathered can lie elsewhere in memory, which may change the last bit
    assert torch.allclose(torch.tensor(answer["early"]), early.logits, atol=1e-5)
    assert answer["moved"] > 1e-3
    assert answer["kept"]
    assert answer["policy"] == model.config.exit_policy.to_dict()
    assert {path.name for path in (tmp_path / "second").glob("*.py")} == SHIPPED
    with_package = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert with_package.early_exit_predict(**BATCH).exit_layer.tolist() == answer["again"]


def test_converted_classifiers_load_in_a_fresh_process(tmp_path):
    sources = {family: tiny_classifier(family) for family in FAMILIES}
    models = {}
    for family, source in sources.items():
        source.save_pretrained(tmp_path / "source" / family)
        models[family] = BadgeForSequenceClassification.from_classifier(tmp_path / "source" / family)
        models[family].save_pretrained(tmp_path / family)
    torch.save(BATCH, tmp_path / "batch.pt")
    answers = in_a_fresh_process(
        """
folder, *families = sys.argv[1:]
answers = {}
for family in families:
    model = AutoModelForSequenceClassification.from_pretrained(f"{folder}/{family}", trust_remote_code=True)
    with torch.no_grad():
        output = model(**torch.load(folder + "/batch.pt"))
    answers[family] = {
        "logits": output.logits.tolist(), "exits": output.exit_logits.tolist(),
        "trained": sorted({name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}),
    }
print(json.dumps(answers))
""",
        tmp_path,
        *FAMILIES,
    )
    for family, answer in answers.items():
        with torch.no_grad():
            assert torch.allclose(torch.tensor(answer["logits"]), sources[family](**BATCH).logits, atol=1e-6)
            assert torch.allclose(torch.tensor(answer["exits"]), models[family](**BATCH).exit_logits, atol=1e-6)
        assert answer["trained"] == ["bypasses", "exits"]
    assert set(answers) == set(FAMILIES)


def imports_of(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name, node.level) for alias in node.names)


def test_every_import_of_the_shipped_files_resolves_without_the_package(tmp_path, bert):
    bert.save_pretrained(tmp_path)
    outside = set()
    for file in tmp_path.glob("*.py"):
        for module, name, level in imports_of(file):
            if level:
                assert level == 1, f"{file.name} imports from outside its folder"
                assert module, f"{file.name}: `from . import x` is not copied with a checkpoint"
                sibling = importlib.import_module(f"transformers_badge.model.{module}")
                assert hasattr(sibling, name), f"{file.name} imports {name} from {module}"
                assert (tmp_path / f"{module}.py").exists(), f"{file.name} imports {module}, which was not copied"
            else:
                outside.add((module, name))
    assert {module.split(".")[0] for module, _ in outside} - sys.stdlib_module_names <= {
        "huggingface_hub", "numpy", "safetensors", "torch", "transformers",
    }  # fmt: skip
    missing = in_a_fresh_process(
        """
import importlib
missing = []
for module, name in json.loads(sys.argv[1]):
    found = importlib.import_module(module)
    if name and not hasattr(found, name):
        try:  # a submodule, then
            importlib.import_module(f"{module}.{name}")
        except ImportError:
            missing.append([module, name])
print(json.dumps(missing))
""",
        json.dumps(sorted(outside, key=str)),
    )
    assert missing == []


def test_a_truncated_weights_file_is_a_plain_error(tmp_path, bert):
    bert.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    with pytest.raises(OSError, match="cut short or damaged .*: copy or download the checkpoint again"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_an_output_directory_that_is_a_file_is_a_plain_error(tmp_path, bert):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="is not a directory that can be written to"):
        bert.save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"
