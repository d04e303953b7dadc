"""Trainer as it stands."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

from tiny import PAD, pad, random_rows, tiny_classifier, tiny_model
from transformers_badge import BadgeForSequenceClassification, compute_exit_metrics, fresh_modules


class Rows(Dataset):
    """Rows of random tokens; the class is told by whether token 7 occurs more often than token 8."""

    def __init__(self, number, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for ids in random_rows([int(n) for n in torch.randint(8, 20, (number,), generator=generator)], seed=seed):
            label = int(torch.randint(0, 2, (1,), generator=generator))
            ids[torch.randperm(len(ids), generator=generator)[:3]] = 7 + label
            self.rows.append({"input_ids": ids, "labels": label})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def collate(rows):
    return {**pad([row["input_ids"] for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}


def trainer(model, tmp_path, rows=None, **arguments):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        "remove_unused_columns": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **arguments}),
        train_dataset=rows or Rows(64),
        eval_dataset=Rows(40, seed=1),
        data_collator=collate,
        compute_metrics=compute_exit_metrics,
    )


def without_dropout(family="bert", **fields):
    names = {"bert": ("hidden_dropout_prob", "attention_probs_dropout_prob")}[family]
    return tiny_model(family, num_labels=2, exit_dropout=0.0, encoder=dict.fromkeys(names, 0.0), **fields)


def test_training_learns_and_metrics_name_every_exit(tmp_path, family):
    model = tiny_model(family, num_labels=2)
    run = trainer(model, tmp_path, Rows(256), num_train_epochs=6, learning_rate=3e-3, logging_steps=8)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert float(losses[-1]) < 0.6 * float(losses[0])
    metrics = run.evaluate()
    assert metrics["eval_accuracy"] > 0.8
    assert {f"eval_accuracy_exit_{i}" for i in (1, 2, 3, 4)} <= metrics.keys()
    assert metrics["eval_accuracy"] == metrics["eval_accuracy_exit_4"]


def test_predict_returns_the_logits_of_all_exits(tmp_path, bert):
    output = trainer(tiny_model("bert", num_labels=2), tmp_path).predict(Rows(40, seed=1))
    logits, exit_logits = output.predictions
    assert logits.shape == (40, 2)
    assert exit_logits.shape == (40, 4, 2)
    assert np.array_equal(logits, exit_logits[:, -1])


def gradients_after(tmp_path, batch_size, steps):
    """Weights after one optimizer step of plain SGD, which moves by the gradient."""
    model = without_dropout()
    run = trainer(
        model, tmp_path, Rows(16), per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps,
        max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
    )  # fmt: skip
    run.train()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_accumulated_gradients_equal_one_large_batch(tmp_path):
    large = gradients_after(tmp_path / "a", 16, 1)
    accumulated = gradients_after(tmp_path / "b", 4, 4)
    start = dict(without_dropout().named_parameters())
    for name, weight in large.items():
        assert torch.allclose(weight, accumulated[name], atol=1e-6), name
    assert any(not torch.allclose(large[name], start[name], atol=1e-4) for name in large), "the step must have moved it"


def test_losing_the_division_by_the_steps_would_show(tmp_path, monkeypatch):
    """Negative control: with loss arguments accepted, Trainer leaves out the division, and the weights differ."""
    large = gradients_after(tmp_path / "a", 16, 1)
    monkeypatch.setattr(BadgeForSequenceClassification, "accepts_loss_kwargs", True)
    forward = BadgeForSequenceClassification.forward
    monkeypatch.setattr(
        BadgeForSequenceClassification,
        "forward",
        lambda self, num_items_in_batch=None, **inputs: forward(self, **inputs),
    )
    wrong = gradients_after(tmp_path / "b", 4, 4)
    assert any(not torch.allclose(large[name], wrong[name], atol=1e-4) for name in large)


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}])
def test_gradient_checkpointing_and_bf16_run(tmp_path, family, options):
    run = trainer(tiny_model(family, num_labels=2), tmp_path, Rows(16), **options)
    before = copy.deepcopy(run.model.state_dict())
    assert np.isfinite(run.train().training_loss)
    assert any(not torch.equal(before[name], value) for name, value in run.model.state_dict().items())


def test_what_trainer_leaves_on_the_config_does_not_keep_a_checkpoint_from_loading(tmp_path):
    model = tiny_model("bert", num_labels=2)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "use_cache"):  # set by one release or another
        setattr(model.config, key, 1)
    model.save_pretrained(tmp_path)
    assert BadgeForSequenceClassification.from_pretrained(tmp_path).config.pad_token_id == 1


def test_a_run_can_be_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 1}
    whole = trainer(without_dropout(), tmp_path / "whole", **saving)
    whole.train()
    resumed = trainer(without_dropout(seed=5), tmp_path / "whole", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, weight in whole.model.state_dict().items():
        assert torch.allclose(weight, resumed.model.state_dict()[name], atol=1e-6), name


def test_best_model_is_loaded_at_the_end(tmp_path):
    run = trainer(
        tiny_model("bert", num_labels=2), tmp_path, save_strategy="epoch", eval_strategy="epoch", num_train_epochs=2,
        load_best_model_at_end=True, metric_for_best_model="accuracy_exit_2", learning_rate=1e-3,
    )  # fmt: skip
    run.train()
    assert run.state.best_metric == max(
        entry["eval_accuracy_exit_2"] for entry in run.state.log_history if "eval_accuracy_exit_2" in entry
    )


def lora(model, **options):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], **options))


@pytest.mark.parametrize("options", [{"task_type": "SEQ_CLS"}, {}], ids=["SEQ_CLS", "no task"])
def test_lora_trains_the_exits_too_and_is_saved_and_merged(tmp_path, options):
    fields = {"num_labels": 2, "lexical_exit": True, "lexical_buckets": 64}
    base = tiny_model("bert", **fields)
    encoder = copy.deepcopy(base.encoder.state_dict())
    model = lora(base, modules_to_save=fresh_modules(base), **options)
    start = copy.deepcopy(model.state_dict())
    run = trainer(model, tmp_path, learning_rate=1e-2)
    run.data_collator = lambda rows: {
        **collate(rows),
        "lexical_logits": torch.tensor([[1.0, -1.0, 0.5, 0.0]] * len(rows)),
    }
    run.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert all(name.split(".")[2] != "encoder" or ".lora_" in name for name in moved)
    for part in ("encoder.", "bypasses.0.up", "bypasses.2.down", "exits.1.query", "exits.2.lexical", "exits.4.class"):
        assert any(name.startswith(f"base_model.model.{part}") for name in moved), part

    batch = collate(Rows(6, seed=2).rows)
    expected = model.eval()(**batch).exit_logits
    model.save_pretrained(tmp_path / "adapter")
    other = tiny_model("bert", seed=3, **fields)
    other.encoder.load_state_dict(encoder)
    assert not torch.allclose(other(**batch).exit_logits, expected, atol=1e-2)
    again = PeftModel.from_pretrained(other, tmp_path / "adapter").eval()
    assert torch.allclose(again(**batch).exit_logits, expected, atol=1e-5)

    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = BadgeForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(loaded(**batch).exit_logits, expected, atol=1e-5)


def test_lora_leaves_out_what_it_is_not_told_of():
    """Negative control: without `fresh_modules` bypasses are not trained."""
    model = lora(tiny_model("bert", num_labels=2), task_type="SEQ_CLS")
    assert not any("bypasses" in name for name, weight in model.named_parameters() if weight.requires_grad)


def test_fresh_modules_of_a_converted_classifier_leave_its_head_alone(tmp_path):
    tiny_classifier("bert").save_pretrained(tmp_path)
    model = BadgeForSequenceClassification.from_classifier(tmp_path)
    last = len(model.exit_layers) - 1
    names = fresh_modules(model)
    assert f"exits.{last - 1}.classifier" in names
    assert not any(name.startswith((f"exits.{last}", "encoder")) for name in names)


def test_metrics_by_hand():
    exit_logits = np.array([[[1.0, 0], [0, 1]], [[1, 0], [0, 1]], [[0, 1], [0, 1]]])
    prediction = EvalPrediction(predictions=(exit_logits[:, -1], exit_logits), label_ids=np.array([0, 1, 1]))
    assert compute_exit_metrics(prediction, exit_layers=[2, 4]) == pytest.approx(
        {"accuracy": 2 / 3, "accuracy_exit_2": 2 / 3, "accuracy_exit_4": 2 / 3}
    )
    multi = EvalPrediction(
        predictions=(exit_logits[:, -1], exit_logits), label_ids=np.array([[1.0, 0], [1, 1], [0, 1]])
    )
    assert compute_exit_metrics(multi)["accuracy_exit_1"] == pytest.approx(5 / 6)
    values = np.array([[[1.0], [2.0]], [[0.0], [0.0]]])
    regression = EvalPrediction(predictions=(values[:, -1], values), label_ids=np.array([2.0, 1.0]))
    assert compute_exit_metrics(regression) == pytest.approx({"mse": 0.5, "mse_exit_1": 1.0, "mse_exit_2": 0.5})


def test_metrics_say_what_is_missing():
    prediction = EvalPrediction(predictions=np.zeros((3, 2)), label_ids=np.zeros(3))
    with pytest.raises(ValueError, match="needs the exit logits"):
        compute_exit_metrics(prediction)
    prediction = EvalPrediction(predictions=(np.zeros((3, 2)), np.zeros((3, 4, 2))), label_ids=np.zeros(3))
    with pytest.raises(ValueError, match="names 2 exits, but the predictions hold 4"):
        compute_exit_metrics(prediction, exit_layers=[1, 2])


def test_padding_token_is_not_a_class_mark():
    assert PAD not in {7, 8}
