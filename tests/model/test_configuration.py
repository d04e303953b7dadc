"""Configuration: strict, typed, and clear about what is wrong."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BertConfig

from tiny import tiny_config
from transformers_badge import BadgeConfig, ExitPolicy


def test_defaults_follow_the_encoder():
    config = BadgeConfig()
    assert config.encoder_config.model_type == "bert"
    assert config.exit_layers == list(range(1, 13))
    assert config.bypass_size == 256  # hidden 768 / 3
    assert BadgeConfig(bypass_reads="block_output").bypass_size == 64  # and / 12, where every token is read
    assert config.exit_policy == ExitPolicy()
    assert config.exit_policy.threshold is None
    assert tiny_config("bert").bypass_size == 10


def test_the_encoder_config_is_an_object_or_a_dict():
    as_object = BadgeConfig(encoder_config=BertConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=4))
    as_dict = BadgeConfig(encoder_config=as_object.encoder_config.to_dict())
    assert as_object.encoder_config.to_dict() == as_dict.encoder_config.to_dict()
    assert (as_dict.hidden_size, as_dict.num_hidden_layers) == (48, 3)


def test_a_config_survives_json(tmp_path):
    policy = {"criterion": "entropy", "threshold": [0.1, None, float("inf"), 0.0], "patience": 2}
    config = tiny_config(
        "modernbert",
        exit_layers=[1, 2, 3, 4],
        exit_policy=policy,
        exit_loss_weights=[1, 0, 2.5, 1],
        num_labels=2,
        id2label={0: "a", 1: "b"},
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, BadgeConfig)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert again.exit_policy == ExitPolicy.of(policy)
    assert again.exit_policy.threshold == (0.1, None, float("inf"), 0.0)
    assert again.id2label == {0: "a", 1: "b"}


def test_the_policy_stands_in_config_json_even_when_it_is_the_default(tmp_path):
    tiny_config("bert").save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["exit_policy"]["criterion"] == "max_probability"
    assert stored["exit_policy"]["threshold"] is None


def test_a_checkpoint_does_not_tell_where_its_encoder_lay(tmp_path):
    config = tiny_config("bert")
    config.encoder_config._name_or_path = "/home/somebody/secret"
    config.save_pretrained(tmp_path)
    assert "somebody" not in (tmp_path / "config.json").read_text()


def test_loss_weights_sum_to_one():
    assert tiny_config("bert").loss_weights == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert tiny_config("bert", exit_layers=[2, 4]).loss_weights == pytest.approx([1 / 3, 2 / 3])
    assert tiny_config("bert", exit_loss_weights="uniform").loss_weights == pytest.approx([0.25] * 4)
    assert tiny_config("bert", exit_loss_weights=[0, 0, 1, 3]).loss_weights == pytest.approx([0, 0, 0.25, 0.75])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exit_layer": [1]}, "does not know 'exit_layer'; it takes .*exit_layers"),
        ({"exit_layers": [2, 1, 4]}, "ascending depths from 1 to 4 that end with the last block, 4, got \\[2, 1, 4\\]"),
        ({"exit_layers": []}, "exit_layers must be ascending"),
        ({"exit_layers": [1, 2]}, "end with the last block, 4"),
        ({"exit_layers": [0, 4]}, "takes lexical_exit=True"),
        ({"exit_layers": [-1, 4]}, "from 1 to 4"),
        ({"lexical_exit": True, "lexical_ngrams": 5}, "lexical_ngrams must be from 1 to 4, got 5"),
        ({"lexical_exit": True, "lexical_buckets": 1}, "lexical_buckets must be at least 2"),
        ({"lexical_exit": True, "lexical_filters": 7}, "lexical_filters must be 0 or a multiple of 4 from 8, got 7"),
        ({"lexical_exit": True, "lexical_filters": -2}, "lexical_filters must be 0 or a multiple of 4 from 8, got -2"),
        ({"exit_layers": [1, 1, 4]}, "ascending"),
        ({"exit_layers": [1, 5]}, "from 1 to 4"),
        ({"bypass_size": -1}, "bypass_size must be 0 .* or a positive width, got -1"),
        ({"exit_loss_weights": [1, 2]}, "lists 2 numbers for 4 exits"),
        ({"exit_loss_weights": [0, 0, 0, 0]}, "not all 0"),
        ({"exit_loss_weights": [1, 1, 1, float("nan")]}, "must be finite"),
        ({"exit_gradient": 1.5}, "exit_gradient must be between 0 and 1"),
        ({"exit_gradient": float("nan")}, "exit_gradient must be between 0 and 1"),
        ({"label_smoothing": -0.1}, "label_smoothing must be between"),
        ({"label_smoothing": 0.1, "problem_type": "regression", "num_labels": 1}, "no meaning"),
        ({"exit_policy": {"criterion": "vibes"}}, "criterion must be one of 'entropy', .*, got 'vibes'"),
        ({"exit_policy": {"thresold": 1.0}}, "does not know 'thresold'; it takes .*threshold"),
        ({"exit_policy": {"threshold": [0.1, 0.2]}}, "lists 2 numbers, but the model has 4 exits"),
        ({"exit_policy": {"criterion": "learned"}}, "criterion='learned' needs a rule"),
        (
            {"exit_policy": {"criterion": "learned", "rule": [[0.0] * 7] * 4}},
            "with 5 exits, but this one has 4",
        ),
        ({"exit_policy": 0.3}, "must be an ExitPolicy or a dict"),
    ],
)
def test_a_bad_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("bert", **fields)


@pytest.mark.parametrize(
    "fields", [{"bypass_size": "64"}, {"exit_layers": "all"}, {"exit_loss_weights": "quadratic"}, {"pooling": "max"}]
)
def test_a_value_of_the_wrong_type_is_named(fields):
    with pytest.raises(StrictDataclassError, match=next(iter(fields))):
        tiny_config("bert", **fields)


def test_a_policy_set_later_is_validated_too():
    config = tiny_config("bert")
    with pytest.raises(ValueError, match="criterion must be one of"):
        config.exit_policy = {"criterion": "vibes"}
    config.exit_policy = {"threshold": 0.5}
    assert config.exit_policy == ExitPolicy(threshold=0.5)


def test_another_models_config_says_what_to_call(tmp_path):
    BertConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type 'bert'.*from_encoder"):
        BadgeConfig.from_pretrained(tmp_path)
