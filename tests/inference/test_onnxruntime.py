"""The engine ONNX Runtime: an export answers as the model does, and says what is wrong with it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

from tiny import (
    FAMILIES,
    PAD,
    VOCABULARY,
    exporting,
    in_threads,
    pad,
    random_rows,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from transformers_badge import (
    BadgeForSequenceClassification,
    BadgePredictor,
    ExitPolicy,
    calibrate,
    export_onnx,
    make_exit_table,
)
from transformers_badge.calibration.replay import replay, score_exits
from transformers_badge.inference import onnx_export, predict
from transformers_badge.inference.exit_logits import check_table_of_model
from transformers_badge.inference.named_stages import exit_stage
from transformers_badge.inference.onnx_export import _trace_stages
from transformers_badge.inference.onnx_stages import LEXICAL, graph_file
from transformers_badge.inference.predictor import FORMAT, MANIFEST, digest_file, digest_weights
from transformers_badge.inference.rowwise_int8 import quantize_rowwise
from transformers_badge.inference.stage_modules import unused_sizes
from transformers_badge.model.early_exit_badge import length_groups


pytestmark = exporting

LENGTHS = [1, 5, 60, 33, 12, 7, 90, 2, 3, 44] * 5
POLICY = {"criterion": "entropy", "threshold": 0.6}


def few_exits(family):
    """A model of a family, and the same with other weights.

    Four families have exit 0 and a stage of two blocks; the others are as small as may be, for tracing takes long, and
    have two labels, whose names a config does not store.
    """
    small = {"exit_layers": [1, 2], "num_labels": 2}
    fields = {"lexical_exit": True, "exit_layers": [0, 1, 3]} if family in FAMILIES else small
    blocks = {"n_layers" if family == "distilbert" else "num_hidden_layers": fields["exit_layers"][-1]}
    return [tiny_model(family, seed=seed, encoder=blocks, **fields) for seed in (0, 7)]


@pytest.fixture(scope="module")
def bert_model():
    model = tiny_model("bert", exit_layers=[0, 2, 4], lexical_exit=True)
    model.config.exit_policy = ExitPolicy(**POLICY, certificate={"summary": "shown"})
    return model


@pytest.fixture(scope="module")
def traced(bert_model, tmp_path_factory):
    """A checkpoint with its exports in it, and the graphs of their stages; traced once for both, for it takes long."""
    folder, stages = tmp_path_factory.mktemp("checkpoint"), {}

    def trace_once(model):
        if not stages:
            stages.update(_trace_stages(model))
        return stages

    bert_model.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_trace_stages", trace_once)
        for precision in ("fp32", "int8"):
            target = folder / f"onnxruntime-{precision}"
            export_onnx(bert_model, tiny_tokenizer(), target, precision, source=digest_weights(folder))
    return folder, stages


@pytest.fixture(scope="module")
def exports(traced):
    """A checkpoint with its exports in it."""
    folder, _ = traced
    return folder


@pytest.fixture(scope="module")
def fp32(exports):
    return BadgePredictor.from_pretrained(exports)


@pytest.fixture(scope="module")
def int8(exports):
    return BadgePredictor.from_pretrained(exports, precision="int8")


@pytest.fixture
def export(exports, tmp_path):
    """An export of one's own, to damage."""
    return shutil.copytree(exports / "onnxruntime-fp32", tmp_path / "export")


def far_from_threshold(table, policy):
    """Rows none of whose scores is within 1e-5 of the threshold."""
    return ~(np.abs(score_exits(table, policy) - policy.threshold)[:, :-1] <= 1e-5).any(axis=1)


def test_logits_and_exit_layers_are_the_models(every_family, tmp_path):
    model, other = few_exits(every_family)
    predictor = BadgePredictor.from_pretrained(export_onnx(model, tiny_tokenizer(), tmp_path / "export"))
    assert predictor.config.id2label == model.config.id2label
    rows = random_rows(LENGTHS, seed=5)
    expected = model.early_exit_predict(**pad(rows), policy=POLICY, output_exit_logits=True)
    layers, logits = expected.exit_layer.numpy(), expected.logits.numpy()
    assert len(np.unique(layers)) == len(model.exit_layers)
    for batch in (pad(rows), pad(rows, "left"), pad(rows, extra=5)):
        output = predictor.early_exit_predict(**batch, policy=POLICY, output_exit_logits=True)
        np.testing.assert_array_equal(output.exit_layer, layers)
        np.testing.assert_allclose(output.logits, logits, atol=1e-4)
        np.testing.assert_allclose(output.exit_logits, expected.exit_logits.numpy(), atol=1e-4)
    streamed = list(predictor.early_exit_stream([{"input_ids": row.tolist()} for row in rows], 4, policy=POLICY))
    assert [row.exit_layer for row in streamed] == layers.tolist()
    np.testing.assert_allclose([row.logits for row in streamed], logits, atol=1e-4)
    full = predictor.early_exit_predict(**pad(rows), policy=ExitPolicy(), output_exit_logits=True)
    np.testing.assert_allclose(full.exit_logits, model(**pad(rows)).exit_logits.detach().numpy(), atol=1e-4)
    # the control: other weights are told apart
    assert np.abs(other(**pad(rows)).exit_logits.detach().numpy() - full.exit_logits).max() > 0.1


def test_graphs_are_traced_with_sizes_that_nothing_else_has(every_family):
    # With as many rows as labels the exporter would take the two for one.
    for num_labels in (2, 3, 5, 11):
        fields = {"num_labels": num_labels, "lexical_exit": True, "lexical_buckets": 50}
        sizes = unused_sizes(BadgeForSequenceClassification(tiny_config(every_family, **fields)))
        assert len(set(sizes)) == 2
        assert min(sizes) > 1  # one row is a case of its own
        assert not {num_labels, 4, 8, 32, 64, 100} & set(sizes)  # labels, heads, their width, ..., the vocabulary


@pytest.mark.parametrize(
    "fields",
    [
        {"num_labels": 1, "problem_type": "regression"},
        {"bypass_size": 0, "num_labels": 4, "problem_type": "multi_label_classification"},
        {"bypass_reads": "pooled", "num_labels": 5, "lexical_exit": True, "lexical_ignored_ids": []},
    ],
    ids=lambda fields: " ".join(map(str, fields.values())),
)
def test_other_kinds_of_models_are_exported_too(fields, tmp_path):
    model = tiny_model("bert", exit_layers=[1, 2], encoder={"num_hidden_layers": 2}, **fields)
    predictor = BadgePredictor.from_pretrained(export_onnx(model, tiny_tokenizer(), tmp_path / "export"))
    batch = pad(random_rows(LENGTHS))
    policy = ExitPolicy() if "regression" in fields.values() else ExitPolicy(**POLICY)
    expected, output = (
        model.early_exit_predict(**batch, policy=policy),
        predictor.early_exit_predict(**batch, policy=policy),
    )
    np.testing.assert_allclose(output.logits, expected.logits.numpy(), atol=1e-4)
    np.testing.assert_array_equal(output.exit_layer, expected.exit_layer.numpy())
    words = predictor(["w5 w6", "w7"])
    assert words == [predictor(text)[0] for text in ("w5 w6", "w7")]


def test_a_stream_answers_thousands_of_rows_as_one_at_a_time(bert_model, exports, fp32):
    lengths = np.random.default_rng(1).integers(1, 60, 2000)
    rows = [{"input_ids": row.tolist()} for row in random_rows(lengths.tolist(), seed=2)]
    alone = [fp32.early_exit_predict([row["input_ids"]], output_exit_logits=True) for row in rows]
    table = replace_logits(bert_model, np.concatenate([output.exit_logits for output in alone]))
    sure = far_from_threshold(table, fp32.config.exit_policy)
    assert sure.mean() > 0.99
    side_by_side = BadgePredictor.from_pretrained(exports, workers=3)
    for start in range(0, 960, 64):  # batches are parted by length
        batch = pad([torch.tensor(row["input_ids"]) for row in rows[start : start + 64]])
        assert len(length_groups(batch["attention_mask"].numpy() > 0, side_by_side.stages.run_cost)) > 1
        output, here = side_by_side.early_exit_predict(**batch), sure[start : start + 64]
        expected = np.concatenate([each.exit_layer for each in alone[start : start + 64]])
        np.testing.assert_array_equal(output.exit_layer[here], expected[here])
    streams = [(fp32, order, 32) for order in (np.arange(2000), np.argsort(lengths), np.argsort(-lengths))]
    for predictor, order, batch_size in [*streams, *[(side_by_side, np.arange(2000), size) for size in (1, 8, 32)]]:
        answers = list(predictor.early_exit_stream((rows[i] for i in order), batch_size))
        assert [answer.index for answer in answers] == list(range(2000))
        layers = np.array([answer.exit_layer for answer in answers])
        expected = np.array([alone[i].exit_layer[0] for i in order])
        assert (layers == expected)[sure[order]].all()
        logits = np.stack([answer.logits for answer in answers])[sure[order]]
        np.testing.assert_allclose(logits, np.concatenate([alone[i].logits for i in order])[sure[order]], atol=1e-4)


def replace_logits(model, exit_logits):
    """An exit table of these logits."""
    from transformers_badge import ExitTable

    return ExitTable(exit_logits=exit_logits, exit_layers=tuple(model.exit_layers))


def test_int8_is_near_and_answers_no_row_by_its_neighbours(bert_model, int8):
    rows = random_rows(LENGTHS, seed=3)
    open_policy = ExitPolicy()
    together = int8.early_exit_predict(**pad(rows), policy=open_policy, output_exit_logits=True).exit_logits
    exact = bert_model(**pad(rows)).exit_logits.detach().numpy()
    error = np.abs(together - exact)
    assert 1e-4 < error[:, 1:].max() < 0.5, "int8 is int8, and near"
    assert (together.argmax(-1) == exact.argmax(-1)).mean() > 0.95
    alone = np.concatenate(
        [int8.early_exit_predict(row[None], policy=open_policy, output_exit_logits=True).exit_logits for row in rows]
    )
    np.testing.assert_allclose(alone, together, atol=1e-4)


def test_rowwise_int8_does_not_mix_rows_as_onnxruntimes_own_does(traced, tmp_path):
    """The negative control: one scale for a batch changes answers by more than rounding."""
    _, stages = traced
    stage = stages[exit_stage(4)]
    exact, own = tmp_path / "exact.onnx", tmp_path / "own.onnx"
    onnx.save(stage, exact)
    quantize_dynamic(exact, own, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    ours = tmp_path / "ours.onnx"
    onnx.save(quantize_rowwise(stage), ours)

    generator = np.random.default_rng(0)
    few = generator.normal(size=(1, 6, 32)).astype(np.float32)
    many = np.concatenate([few, 20 * generator.normal(size=(7, 6, 32)).astype(np.float32)])

    def answer(path, hidden_states):
        session = onnxruntime.InferenceSession(path)
        rows = len(hidden_states)
        given = {
            "hidden_states": hidden_states,
            "attention_mask": np.ones((rows, 6), np.int64),
            "lexical_logits": np.zeros((rows, 6), np.float32),
            "bypass_state": np.zeros((rows, 32), np.float32),
            "position_ids": np.tile(np.arange(6), (rows, 1)),
        }
        feeds = {value.name: given[value.name] for value in session.get_inputs()}
        return dict(zip([v.name for v in session.get_outputs()], session.run(None, feeds), strict=True))["logits"]

    differences = {path: np.abs(answer(path, few) - answer(path, many)[:1]).max() for path in (ours, own, exact)}
    assert differences[exact] < 1e-4
    assert differences[ours] < 1e-4
    assert differences[own] > 1e-2


def test_eight_threads_give_the_answers_of_one(fp32):
    batches = [pad(random_rows(LENGTHS[: 4 + i], seed=i)) for i in range(8)]
    expected = [fp32.early_exit_predict(**batch) for batch in batches]
    assert len({tuple(output.exit_layer) for output in expected}) > 1
    wrong, finished = [], []

    def work(i):
        for _ in range(10):
            output = fp32.early_exit_predict(**batches[i])
            if not (np.array_equal(output.exit_layer, expected[i].exit_layer)
                    and np.allclose(output.logits, expected[i].logits, atol=1e-4)):  # fmt: skip
                wrong.append(i)
        finished.append(i)

    in_threads(work, 8)
    assert wrong == []
    assert len(finished) == 8


def test_calibration_takes_the_table_of_the_engine_that_runs(bert_model, fp32, int8):
    texts = [" ".join(f"w{4 + (i * j) % 90}" for j in range(1, 2 + i % 9)) for i in range(300)]
    tables = {
        name: make_exit_table(model, tiny_tokenizer(), [texts])
        for name, model in (("model", bert_model), ("fp32", fp32), ("int8", int8))
    }
    np.testing.assert_allclose(tables["fp32"].exit_logits, tables["model"].exit_logits, atol=1e-4)
    assert np.abs(tables["int8"].exit_logits - tables["model"].exit_logits).max() > 1e-4
    for name, model in (("model", bert_model), ("fp32", fp32), ("int8", int8)):
        check_table_of_model(tables[name], model)
        with pytest.raises(ValueError, match="The exit table is of another model: its weights"):
            check_table_of_model(tables["int8" if name != "int8" else "fp32"], model)
    policy = calibrate(tables["int8"], "entropy", target_speedup=1.5)
    output = int8.early_exit_predict(**tiny_tokenizer()(texts, padding=True, return_tensors="np"), policy=policy)
    layers = np.array(tables["int8"].exit_layers)[replay(tables["int8"], policy)]
    np.testing.assert_array_equal(output.exit_layer, layers)
    assert len(np.unique(layers)) > 1
    with pytest.raises(ValueError, match="lexical_logits can be given to a BadgeForSequenceClassification alone"):
        make_exit_table(fp32, tiny_tokenizer(), [texts], lexical_logits=np.zeros((300, 3)))


def test_what_was_shown_of_the_model_was_not_shown_of_int8(bert_model, fp32, int8):
    assert fp32.config.exit_policy == bert_model.config.exit_policy
    assert int8.config.exit_policy == replace(bert_model.config.exit_policy, certificate=None)


def test_texts_are_classified_without_torch(exports, fp32):
    texts = ["w5 w6 w7", "w50", "w8 w9 w10 w11"]
    code = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(name)

import importlib.util
sys.meta_path.insert(0, NoTorch())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
import json
from transformers_badge import BadgePredictor
predictor = BadgePredictor.from_pretrained(sys.argv[1])
print(json.dumps([predictor(sys.argv[2:]), "torch" in sys.modules]))
"""
    command = [sys.executable, "-c", code, str(exports), *texts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answers, torch_is_there = json.loads(done.stdout.strip().splitlines()[-1])
    assert not torch_is_there
    assert answers == fp32(texts)


def test_many_texts_are_answered_a_chunk_at_a_time(fp32, monkeypatch):
    texts = ["w5 w6 w7", "w8", "w9 w10", "w5", "w11 w12 w13 w14"]
    pairs = [(text, "w6") for text in texts]
    told, chunks = [], []

    def tokenizer(*columns, **arguments):
        chunks.append(len(columns[0]))
        return fp32.tokenizer(*columns, **arguments)

    tokenizer.model_max_length = fp32.tokenizer.model_max_length
    scores = [[answer["score"] for answer in fp32(rows)] for rows in (texts, pairs)]
    assert np.ptp(scores[0]) > 1e-3  # the order can be seen
    monkeypatch.setattr(predict, "CHUNK", 2)
    answers = predict.predict_texts(fp32, tokenizer, texts, on_batch=told.append)
    assert [answer["score"] for answer in answers] == pytest.approx(scores[0], abs=1e-5)
    assert [answer["score"] for answer in fp32(pairs)] == pytest.approx(scores[1], abs=1e-5)
    assert chunks == [2, 2, 1]
    assert sum(told) == len(texts)


def test_a_text_by_itself_is_answered_as_in_a_list(fp32, exports):
    texts = ["w5 w6 w7", "w8", "w9 w10", "w5 " * 200]
    side_by_side = BadgePredictor.from_pretrained(exports, workers=2)
    for policy in ({}, {"criterion": "max_probability", "threshold": 0.4}, {"threshold": None}):
        alone = [fp32(text, **policy) for text in texts]
        assert alone == [fp32([text], **policy) for text in texts]
        assert [side_by_side(text, **policy)[0]["exit_layer"] for text in texts] == [
            row["exit_layer"] for (row,) in alone
        ]
    assert {row["exit_layer"] for (row,) in alone} == {4}  # the threshold was heard
    assert fp32("w8", policy={"criterion": "entropy"}) == fp32(["w8"], policy={"criterion": "entropy"})
    for texts in ("w8", ["w8"]):
        with pytest.raises(ValueError, match="batch_size must be a whole number, at least 1, got 0"):
            fp32(texts, batch_size=0)
        for unknown in ("output_exit_logits", "input_ids"):
            with pytest.raises(ValueError, match=f"An exit policy does not know '{unknown}'"):
                fp32(texts, **{unknown: True})


def test_texts_and_pairs_are_taken_and_nothing_else(fp32):
    assert fp32("w5 w6") == fp32(["w5 w6"])
    assert set(fp32("w5 w6")[0]) == {"label", "score", "exit_layer"}
    assert len(fp32([("w5", "w6"), ("w7", "w8")])) == 2
    assert fp32([]) == []
    assert [row["exit_layer"] for row in fp32(["w5", "w6"], threshold=None)] == [4, 4]
    with pytest.raises(TypeError, match="Row 1 must be a text or a pair of texts, got int"):
        fp32(["w5", 3])
    with pytest.raises(ValueError, match=r"Row 1 has 1 text\(s\), but those before it have 2: give one kind"):
        fp32([("w5", "w6"), "w7"])
    with pytest.raises(TypeError, match="Row 0 must be a text or a pair of texts, got dict"):
        list(fp32.early_exit_stream([{"text": "w5"}], tokenizer=fp32.tokenizer))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"input_ids": [1, 2]}, ValueError, r"input_ids must have the shape \(rows, tokens\), got \(2,\)"),
        ({"input_ids": np.zeros((0, 3), int)}, ValueError, "The batch is empty"),
        ({"input_ids": [[0.5]]}, TypeError, "input_ids must be whole numbers, got float64"),
        ({"input_ids": [[VOCABULARY]]}, ValueError, r"input_ids must be in \[0, 100\)"),
        ({"input_ids": np.full((1, 161), 5)}, ValueError, "The rows have 161 tokens, but this model takes at most 160"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, ValueError, "attention_mask must have the shape"),
        ({"input_ids": [[5, 6]], "attention_mask": [[2, 1]]}, ValueError, "attention_mask must hold only 0"),
        ({"input_ids": [[5], [PAD]], "attention_mask": [[1], [0]]}, ValueError, "attention_mask is all zero in row 1"),
        ({"input_ids": [[5]], "criterion": "luck"}, ValueError, "criterion must be one of"),
        ({"input_ids": [[5]], "threshold": [0.1]}, ValueError, "threshold"),
    ],
    ids=lambda value: "",
)
def test_bad_inputs_are_named(fp32, inputs, error, message):
    with pytest.raises(error, match=message):
        fp32.early_exit_predict(**inputs)


def test_bad_exports_are_named(export, exports, tmp_path):
    load = BadgePredictor.from_pretrained
    with pytest.raises(ValueError, match="engine must be one of onnxruntime, compiled, got 'tensorrt'"):
        load(export, engine="tensorrt")
    with pytest.raises(
        ValueError, match="ONNX Runtime has no provider 'TensorrtExecutionProvider' here: choose one of"
    ):
        load(export, provider="TensorrtExecutionProvider")
    for workers in (0, True, None):
        with pytest.raises(ValueError, match=f"workers must be a whole number, at least 1, got {workers}"):
            load(export, workers=workers)
    with pytest.raises(ValueError, match="threads must be a whole number, at least 1, got 1.5"):
        load(export, threads=1.5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="There is no export in .*: make one with transformers-badge export"):
        load(tmp_path / "empty")
    with pytest.raises(OSError, match="neither a folder nor a checkpoint that can be downloaded"):
        load(tmp_path / "nowhere")
    graph = export / graph_file(exit_stage(4))
    sound = graph.read_bytes()
    graph.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(ValueError, match="exit_4.onnx is not what was exported: export the model again"):
        load(export)
    graph.write_bytes(b"no graph")
    manifest = json.loads((export / MANIFEST).read_text())
    files = {**manifest["files"], graph.name: digest_file(graph)}
    (export / MANIFEST).write_text(json.dumps({**manifest, "files": files}))
    with pytest.raises(ValueError, match="ONNX Runtime cannot read .*exit_4.onnx"):
        load(export)
    graph.unlink()
    with pytest.raises(OSError, match="exit_4.onnx is missing: export the model again"):
        load(export)
    (export / MANIFEST).write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ValueError, match=f"was exported by another version \\(format 99; this one reads {FORMAT}\\)"):
        load(export)
    (export / MANIFEST).write_text(json.dumps({**manifest, "files": {}}))
    with pytest.raises(ValueError, match="onnxruntime.json is damaged"):
        load(export)
    (export / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="onnxruntime.json is damaged"):
        load(export)


def test_the_weights_of_exit_0_are_part_of_an_export(tmp_path):
    model = tiny_model("bert", lexical_exit=True, exit_layers=[0, 1], encoder={"num_hidden_layers": 1}, seed=1)
    model.exits[0].weight[0] = 5.0  # what is no n-gram counts for nothing
    batch = pad(random_rows([9, 3, 1, 14]))
    ours, digests = model.early_exit_predict(**batch, output_exit_logits=True), []
    for bias in (0.0, 1.0):
        model.exits[0].bias += bias
        export = export_onnx(model, tiny_tokenizer(), tmp_path / "export")
        predictor = BadgePredictor.from_pretrained(export)
        digests.append(predictor.digest)
        theirs = predictor.early_exit_predict(**batch, output_exit_logits=True)
        difference = np.abs(theirs.exit_logits - ours.exit_logits.numpy()).max()
        assert (difference < 1e-4) == (bias == 0)  # the second model is the negative control
    assert digests[0] != digests[1], "a table of the one would pass for one of the other"
    weights = (export / LEXICAL).read_bytes()
    (export / LEXICAL).write_bytes(weights[:-1])
    with pytest.raises(ValueError, match=r"lexical.safetensors is not what was exported: export the model again"):
        BadgePredictor.from_pretrained(export)
    manifest = json.loads((export / MANIFEST).read_text())
    files = {**manifest["files"], LEXICAL: digest_file(export / LEXICAL)}
    (export / MANIFEST).write_text(json.dumps({**manifest, "files": files}))
    with pytest.raises(ValueError, match=r"lexical.safetensors is damaged .*: export the model again"):
        BadgePredictor.from_pretrained(export)
    (export / LEXICAL).unlink()
    with pytest.raises(OSError, match=r"lexical.safetensors is missing: export the model again"):
        BadgePredictor.from_pretrained(export)


def test_a_damaged_config_is_named(export):
    (export / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is missing or damaged"):
        BadgePredictor.from_pretrained(export)


def test_an_export_of_other_weights_than_the_checkpoints_is_refused(exports, tmp_path):
    checkpoint = shutil.copytree(exports, tmp_path / "checkpoint")
    BadgePredictor.from_pretrained(checkpoint)
    tiny_model("bert", seed=3, exit_layers=[0, 2, 4], lexical_exit=True).save_pretrained(checkpoint)
    with pytest.raises(ValueError, match="have changed since onnxruntime-fp32 was made"):
        BadgePredictor.from_pretrained(checkpoint)


def test_an_engine_that_is_not_installed_is_named(bert_model, export, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'transformers-badge\[onnxruntime\]'"):
        BadgePredictor.from_pretrained(export)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'transformers-badge\[onnxruntime\]'"):
        export_onnx(bert_model, tiny_tokenizer(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_torch_that_is_too_old_for_exports_is_named(bert_model, tmp_path, monkeypatch):
    monkeypatch.setitem(onnx_export.EXPORT_TOOLS, "torch", "99.0")
    with pytest.raises(ModuleNotFoundError, match=r"An export needs torch 99\.0, onnx .* or newer: pip install"):
        export_onnx(bert_model, tiny_tokenizer(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_goes_wrong_in_an_export_leaves_the_earlier_one(bert_model, export, tmp_path, monkeypatch):
    before = {path.name: path.read_bytes() for path in export.iterdir()}
    small = [tiny_model("bert", seed=seed, exit_layers=[1], encoder={"num_hidden_layers": 1}) for seed in (0, 3)]
    monkeypatch.setattr(onnx_export, "_trace_stages", lambda model: _trace_stages(small[1]))
    with pytest.raises(ValueError, match="ONNX Runtime answers otherwise than the model: exit 1 is off by"):
        export_onnx(small[0], tiny_tokenizer(), export)
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    with monkeypatch.context() as patch:
        patch.setattr(onnx_export, "LARGEST", 1000)
        with pytest.raises(ValueError, match="weights up to exit_1 take .* bytes, and a graph may have 1000: export"):
            export_onnx(small[0], tiny_tokenizer(), export)
    assert {path.name: path.read_bytes() for path in export.iterdir()} == before
    with pytest.raises(ValueError, match="precision must be one of fp32, int8, got 'fp8'"):
        export_onnx(bert_model, tiny_tokenizer(), export, "fp8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(OSError, match="holds something that is not an export"):
        export_onnx(bert_model, tiny_tokenizer(), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_the_models_own_state_is_left_as_it_was(tmp_path):
    model = tiny_model("bert", exit_layers=[1], encoder={"num_hidden_layers": 1}).train().to(torch.bfloat16)
    attention = model.encoder.config._attn_implementation
    export_onnx(model, tiny_tokenizer(), tmp_path / "export")
    assert model.training
    assert model.dtype == torch.bfloat16
    assert model.encoder.config._attn_implementation == attention
