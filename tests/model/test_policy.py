"""The exit policy: plain data, strict, and clear about what is wrong."""

import importlib.util
import json
import sys
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from transformers import AutoConfig

from tiny import tiny_config
from transformers_badge import ExitPolicy
from transformers_badge.model import policy_badge
from transformers_badge.model.criteria_badge import COMBINATORS, CRITERIA
from transformers_badge.model.exit_rule_badge import FEATURES


WIDTH = len(FEATURES) + 1
RULE = [[0.5 * i - j / 3 for j in range(WIDTH)] for i in range(3)]  # for 4 exits
CERTIFICATE = {"summary": "shown", "rows": 1000, "observed": {"layer_speedup": 2.5}, "data": ["a", None]}
PARTS = [{"criterion": "entropy", "threshold": 0.3}, {"criterion": "patience", "threshold": 0, "patience": 2}]

# Every kind of policy: each field that can be set, at every type that it takes.
KINDS = [
    {},
    *[{"criterion": name, "threshold": 0.25} for name in CRITERIA if name != "learned"],
    {"threshold": (0.1, None, float("inf"), 0.0)},
    {"threshold": 0.2, "temperature": 1.7},
    {"threshold": 0.2, "temperature": (0.5, 1.0, 2.0, 1.0), "patience": 3},
    {"criterion": "dge", "window": 3, "confidence_weight": 0.0, "divergence": "symmetric_kl", "threshold": 0.1},
    {"criterion": "learned", "rule": RULE, "threshold": 0.02, "certificate": CERTIFICATE},
    *[{"criterion": name, "parts": PARTS, "threshold": 1.0} for name in COMBINATORS],
    {"criterion": "all_of", "threshold": 0.9, "patience": 2, "certificate": CERTIFICATE, "parts": [
        {"criterion": "learned", "rule": RULE, "threshold": [0.1, None, 0.2, 0.3], "temperature": [1, 2, 3, 4]},
        {"criterion": "any_of", "parts": PARTS, "threshold": 1},
    ]},
]  # fmt: skip


def test_the_default_never_leaves_early():
    policy = ExitPolicy()
    assert (policy.criterion, policy.threshold, policy.patience) == ("max_probability", None, 1)
    assert policy.thresholds(3) == [None, None, None]


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "learned"])
def test_patience_is_two_where_the_criterion_is_about_patience_and_else_one(criterion):
    expected = 2 if criterion in ("pcee", "f_pabee", "f_pabee_averaged") else 1
    assert ExitPolicy(criterion=criterion).patience == expected
    assert ExitPolicy(criterion=criterion, patience=1).patience == 1
    assert ExitPolicy(criterion=criterion, patience=5).patience == 5
    assert ExitPolicy.of({"criterion": criterion}).patience == expected


def test_a_policy_is_frozen_and_takes_its_fields_by_name_alone():
    with pytest.raises(FrozenInstanceError):
        ExitPolicy().threshold = 0.1
    with pytest.raises(TypeError):
        ExitPolicy("entropy")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"criterion": "vibes"}, "^criterion must be one of 'entropy', .*'learned', 'all_of', 'any_of', got 'vibes'"),
        ({"criterion": None}, "criterion must be one of .*, got None"),
        ({"divergence": "cosine"}, "divergence must be one of 'jensen_shannon', 'kl', .*, got 'cosine'"),
        ({"threshold": float("nan")}, "threshold must be a number >= 0 .*, got nan; use None to never leave"),
        ({"threshold": -0.1}, "threshold must be a number >= 0 .*, got -0.1"),
        ({"threshold": [0.1, float("nan")]}, "threshold must be a number >= 0 .*, got nan"),
        ({"threshold": [0.1, "0.2"]}, "threshold must be a number >= 0 .*, got '0.2'"),
        ({"threshold": [0.1, True]}, "threshold must be a number >= 0 .*, got True"),
        ({"threshold": np.ones((2, 2))}, "threshold must be a number >= 0 .*, got array"),
        ({"threshold": "low"}, "threshold must be a number, a list with one per exit, or None, got 'low'"),
        ({"threshold": {"first": 1}}, "threshold must be a number, a list .*, got {'first': 1}"),
        ({"threshold": True}, "threshold must be a number, a list with one per exit, or None, got True"),
        ({"window": 0}, "window must be a whole number of exits, at least 1, got 0"),
        ({"window": 1.5}, "window must be a whole number of exits, at least 1, got 1.5"),
        ({"window": True}, "window must be a whole number of exits, at least 1, got True"),
        ({"patience": 0}, "patience must be a whole number of exits, at least 1, got 0"),
        ({"patience": -1}, "patience must be a whole number of exits, at least 1, got -1"),
        ({"patience": "2"}, "patience must be a whole number of exits, at least 1, got '2'"),
        ({"confidence_weight": float("inf")}, "confidence_weight must be a finite number >= 0, got inf"),
        ({"confidence_weight": -1}, "confidence_weight must be a finite number >= 0, got -1"),
        ({"confidence_weight": None}, "confidence_weight must be a finite number >= 0, got None"),
        (
            {"criterion": "dge", "window": 1, "confidence_weight": 0},
            "window=1 with confidence_weight=0 leaves nothing to score: give a window of at least 2, or a .* above 0",
        ),
        ({"certificate": "shown"}, "certificate must be a dict, got 'shown'"),
        ({"temperature": 0}, "temperature must be a finite number > 0, a list with one per exit, or None, got 0"),
        ({"temperature": -1.0}, "temperature must be .*, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be .*, got nan"),
        ({"temperature": float("inf")}, "temperature must be .*, got inf"),
        ({"temperature": [1.0, 0.0]}, "temperature must be .*, got \\[1.0, 0.0\\]"),
        ({"temperature": [1.0, None]}, "temperature must be .*, got \\[1.0, None\\]"),
        ({"temperature": []}, "temperature must be .*, got \\[\\]"),
        ({"temperature": "hot"}, "temperature must be .*, got 'hot'"),
        ({"temperature": True}, "temperature must be .*, got True"),
        (
            {"criterion": "learned"},
            "criterion='learned' needs a rule, which has to be fitted to the model: call transformers_badge.calibrate",
        ),
        (
            {"criterion": "learned", "rule": []},
            "rule must list 7 finite numbers for every exit but the last, got",
        ),
        ({"criterion": "learned", "rule": 0.5}, "rule must list 7 finite numbers .*, got 0.5"),
        ({"criterion": "learned", "rule": [0.5] * 7}, "rule must list 7 finite numbers"),
        ({"criterion": "learned", "rule": [[0.5] * 7, [0.5] * 6]}, "rule must list 7 finite numbers"),
        ({"criterion": "learned", "rule": [[0.5] * 6 + [float("nan")]]}, "rule must list 7 finite numbers"),
        ({"criterion": "learned", "rule": [[0.5] * 6 + ["1"]]}, "rule must list 7 finite numbers"),
        ({"criterion": "all_of"}, "criterion='all_of' needs parts, two or more policies, got None"),
        ({"criterion": "any_of", "parts": [{}]}, "criterion='any_of' needs parts, two or more policies, got \\[{}\\]"),
        ({"criterion": "any_of", "parts": {"criterion": "entropy"}}, "needs parts, two or more policies, got {"),
        ({"criterion": "all_of", "parts": [{}, "margin"]}, "must be an ExitPolicy or a dict, got 'margin'"),
        ({"criterion": "all_of", "parts": [{}, {"treshold": 1}]}, "does not know 'treshold'; it takes .*threshold"),
        ({"criterion": "all_of", "parts": [{}, {"patience": 0}]}, "patience must be a whole number"),
    ],
)
def test_a_bad_policy_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy(**fields)
    with pytest.raises(ValueError, match=message):
        ExitPolicy.of(fields)
    with pytest.raises(ValueError, match=message):
        ExitPolicy.of(None, **fields)


def test_nothing_to_score_matters_to_dge_alone():
    assert ExitPolicy(criterion="entropy", window=1, confidence_weight=0).confidence_weight == 0.0


def test_numpy_numbers_are_numbers():
    policy = ExitPolicy(
        criterion="learned",
        threshold=np.array([0.1, 0.2], dtype=np.float32),
        confidence_weight=np.float64(2),
        temperature=np.array([1, 2]),
        rule=np.ones((1, WIDTH), dtype=np.float32),
    )
    assert policy.threshold == pytest.approx((0.1, 0.2))
    assert policy.temperature == (1.0, 2.0)
    assert policy.rule == ((1.0,) * WIDTH,)
    assert ExitPolicy(threshold=np.float32(0.5), temperature=np.int64(2)) == ExitPolicy(threshold=0.5, temperature=2.0)
    json.dumps(policy.to_dict(), allow_nan=False)


def test_a_rule_and_parts_belong_to_their_criteria_alone():
    policy = ExitPolicy(criterion="margin", rule=RULE, parts=PARTS)
    assert policy.rule is None
    assert policy.parts is None


def test_parts_become_policies():
    policy = ExitPolicy(criterion="all_of", parts=[PARTS[0], ExitPolicy(**PARTS[1])])
    assert policy.parts == (ExitPolicy(**PARTS[0]), ExitPolicy(**PARTS[1]))


# of()


def test_of_takes_a_policy_a_dict_or_nothing():
    policy = ExitPolicy(criterion="margin", threshold=0.3)
    assert ExitPolicy.of(policy) == policy
    assert ExitPolicy.of({"criterion": "margin", "threshold": 0.3}) == policy
    assert ExitPolicy.of(None) == ExitPolicy.of({}) == ExitPolicy()
    assert ExitPolicy.of(None, criterion="margin", threshold=0.3) == policy


@pytest.mark.parametrize("value", [0.3, "entropy", ["entropy"], ("criterion", "entropy")])
def test_of_refuses_what_is_no_policy(value):
    with pytest.raises(ValueError, match="An exit policy must be an ExitPolicy or a dict, got"):
        ExitPolicy.of(value)


def test_of_names_unknown_fields_wherever_they_stand():
    known = ", ".join(sorted(field.name for field in fields(ExitPolicy)))
    for stored, overrides in (({"b": 1, "a": 2}, {}), ({"b": 1}, {"a": 2}), (None, {"a": 1, "b": 2})):
        with pytest.raises(ValueError, match=f"An exit policy does not know 'a', 'b'; it takes {known}."):
            ExitPolicy.of(stored, **overrides)


def test_an_override_replaces_one_field():
    policy = ExitPolicy(criterion="dge", threshold=0.3, window=3, patience=2, temperature=2.0)
    assert ExitPolicy.of(policy, threshold=0.5) == ExitPolicy(
        criterion="dge", threshold=0.5, window=3, patience=2, temperature=2.0
    )
    assert ExitPolicy.of(policy, temperature=None).temperature is None
    assert ExitPolicy.of(policy, threshold=None).threshold is None
    assert policy.threshold == 0.3, "the policy itself is as it was"
    with pytest.raises(ValueError, match="window must be"):
        ExitPolicy.of(policy, window=0)


def test_another_criterion_asks_for_a_threshold_of_its_own():
    policy = ExitPolicy(criterion="max_probability", threshold=0.3)
    message = "threshold was chosen for criterion='max_probability': pass a threshold together with criterion='margin'"
    for stored in (policy, policy.to_dict(), {"threshold": 0.3}, {"threshold": [0.3, None]}):
        with pytest.raises(ValueError, match=message):
            ExitPolicy.of(stored, criterion="margin")
    assert ExitPolicy.of(policy, criterion="margin", threshold=0.2) == ExitPolicy(criterion="margin", threshold=0.2)
    assert ExitPolicy.of(policy, criterion="margin", threshold=None) == ExitPolicy(criterion="margin")
    assert ExitPolicy.of(ExitPolicy(), criterion="margin") == ExitPolicy(criterion="margin")  # there was none
    assert ExitPolicy.of(policy, criterion="max_probability") == policy  # it is the same criterion


def test_another_criterion_brings_its_own_patience():
    pcee = ExitPolicy(criterion="pcee", threshold=0.3)
    assert ExitPolicy.of(pcee, criterion="entropy", threshold=0.3).patience == 1
    assert ExitPolicy.of(ExitPolicy(patience=4), criterion="f_pabee").patience == 2
    assert ExitPolicy.of(ExitPolicy(patience=4), criterion="f_pabee", patience=3).patience == 3
    assert ExitPolicy.of(ExitPolicy(patience=4), criterion="max_probability").patience == 4  # it is the same criterion


def test_another_criterion_leaves_rule_and_parts_behind():
    learned = ExitPolicy(criterion="learned", rule=RULE)
    assert ExitPolicy.of(learned, criterion="entropy") == ExitPolicy(criterion="entropy")
    both = ExitPolicy(criterion="all_of", parts=PARTS)
    assert ExitPolicy.of(both, criterion="entropy") == ExitPolicy(criterion="entropy")
    assert ExitPolicy.of(both, criterion="any_of") == ExitPolicy(criterion="any_of", parts=PARTS)
    with pytest.raises(ValueError, match="criterion='learned' needs a rule"):
        ExitPolicy.of(ExitPolicy(), criterion="learned")


def test_a_policy_that_is_changed_loses_its_certificate():
    policy = ExitPolicy(threshold=0.3, certificate=CERTIFICATE)
    assert ExitPolicy.of(policy).certificate == CERTIFICATE
    assert ExitPolicy.of(policy.to_dict()).certificate == CERTIFICATE
    for change in ({"threshold": 0.31}, {"temperature": 2.0}, {"patience": 2}, {"criterion": "pcee", "threshold": 0.3}):
        assert ExitPolicy.of(policy, **change).certificate is None, change
    assert ExitPolicy.of(policy, certificate={"rows": 3}).certificate == {"rows": 3}


# JSON


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.get("criterion", "entropy"))
def test_a_policy_survives_json(kind, tmp_path):
    policy = ExitPolicy(**kind)
    stored = json.loads(json.dumps(policy.to_dict()))
    assert stored == policy.to_dict()  # nothing that JSON would turn into something else
    assert ExitPolicy.of(stored) == policy
    assert ExitPolicy.of(stored).to_dict() == stored
    # and a checkpoint's config.json
    tiny_config("bert", exit_policy=policy).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).exit_policy == policy


def test_the_kinds_that_go_through_json_are_all_of_them():
    assert {kind.get("criterion", "entropy") for kind in KINDS} == {*CRITERIA, *COMBINATORS}
    assert {name for kind in KINDS for name in kind} == {field.name for field in fields(ExitPolicy)}


def test_what_is_not_set_is_left_out_of_json():
    always = {"criterion", "threshold", "window", "confidence_weight", "divergence", "patience"}
    assert set(ExitPolicy().to_dict()) == always
    assert set(ExitPolicy(temperature=2, certificate={}).to_dict()) == always | {"temperature", "certificate"}


def test_what_is_not_set_in_a_part_is_left_out_of_json_too():
    stored = ExitPolicy(criterion="all_of", parts=PARTS).to_dict()
    assert stored["parts"] == [ExitPolicy(**part).to_dict() for part in PARTS]


def test_the_json_of_a_policy_is_a_copy():
    policy = ExitPolicy(certificate={"observed": {"rows": 3}})
    policy.to_dict()["certificate"]["observed"]["rows"] = 4
    assert policy.certificate == {"observed": {"rows": 3}}


# thresholds()


def test_one_threshold_stands_for_all_exits_and_a_list_for_its_own():
    assert ExitPolicy(threshold=0.3).thresholds(3) == [0.3, 0.3, 0.3]
    assert ExitPolicy(threshold=[0.3, None, 1]).thresholds(3) == [0.3, None, 1.0]
    parts = ({"threshold": [0.1, 0.2, 0.3]}, {"temperature": [1, 2, 3]})
    assert ExitPolicy(criterion="all_of", threshold=1, parts=parts).thresholds(3) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"threshold": [0.1, 0.2]},
            "^threshold lists 2 numbers, but the model has 4 exits: give one per exit",
        ),
        ({"threshold": []}, "^threshold lists 0 numbers, but the model has 4 exits"),
        (
            {"temperature": [1, 2, 3, 4, 5]},
            "^temperature lists 5 numbers, but the model has 4 exits: give",
        ),
        (
            {"criterion": "learned", "rule": RULE[:2]},
            "^rule was fitted to a model with 3 exits, but this one has 4: calibrate this model",
        ),
    ],
)
def test_a_policy_for_another_number_of_exits_is_refused(fields, message):
    part = ExitPolicy(**fields)
    whole = ExitPolicy(criterion="any_of", parts=[{"criterion": "margin"}, part])
    for policy in (part, whole, ExitPolicy(criterion="all_of", parts=[whole, whole], threshold=[1, 1, 1, 1])):
        with pytest.raises(ValueError, match=message):
            policy.thresholds(4)
        with pytest.raises(ValueError, match=message):
            tiny_config("bert", exit_policy=policy)


# A second copy of the class, as code that is loaded from a checkpoint brings one.


@pytest.fixture
def other_class(monkeypatch):
    name = "transformers_badge.model.second_policy_badge"
    spec = importlib.util.spec_from_file_location(name, policy_badge.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    assert module.ExitPolicy is not ExitPolicy
    return module.ExitPolicy


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.get("criterion", "entropy"))
def test_a_policy_of_a_second_copy_of_the_class_is_taken(kind, other_class):
    policy, other = ExitPolicy(**kind), other_class(**kind)
    assert not isinstance(other, ExitPolicy)
    taken = ExitPolicy.of(other)
    assert type(taken) is ExitPolicy
    assert taken == policy
    assert all(type(part) is ExitPolicy for part in taken.parts or ())
    assert tiny_config("bert", exit_policy=other).exit_policy == policy
    assert ExitPolicy.of(other, threshold=None) == ExitPolicy.of(policy, threshold=None)


def test_parts_of_a_second_copy_of_the_class_are_taken(other_class):
    mixed = ExitPolicy(criterion="all_of", parts=[other_class(**PARTS[0]), ExitPolicy(**PARTS[1])])
    assert mixed == ExitPolicy(criterion="all_of", parts=PARTS)
    assert {type(part) for part in mixed.parts} == {ExitPolicy}
