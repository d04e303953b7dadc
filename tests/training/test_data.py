"""Labels of a file as the class indices of a model."""

import datasets
import pytest

from transformers_badge.training.data import class_indices, labelled_rows, load_table


STARS = ["1", "2", "3", "4", "5"]


def table(labels, feature=None):
    made = datasets.Dataset.from_dict({"text": ["a text"] * len(labels), "label": labels})
    return made if feature is None else made.cast_column("label", feature)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["pos", "neg"], ["neg", "pos"], [1, 0]),
        ([0, 1, 1], ["neg", "pos"], [0, 1, 1]),
        ([5, 1, 3], STARS, [4, 0, 2]),  # not the second class, which has index 1
        ([1, 2], STARS, [0, 1]),
        ([0, 4, 1], STARS, [0, 4, 1]),  # 0 is no star: these are indices
        ([1, 0, 1], ["1", "0"], [0, 1, 0]),
        ([True, False], ["False", "True"], [1, 0]),
    ],
)
def test_labels_go_by_name_and_other_whole_numbers_are_indices(labels, names, expected):
    assert class_indices(table(labels), "label", names, "rows.csv") == expected


def test_names_of_a_data_set_count_more_than_its_numbers():
    feature = datasets.ClassLabel(names=["neg", "pos"])
    assert class_indices(table([0, 1], feature), "label", ["pos", "neg"], "imdb") == [1, 0]
    # names that the model does not have: then the numbers
    assert class_indices(table([0, 1], feature), "label", ["LABEL_0", "LABEL_1"], "imdb") == [0, 1]


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        (
            ["pos", "meh"],
            ["neg", "pos"],
            "Row 2 of rows.csv has the class 'meh', which is not among the model's: neg, pos",
        ),
        ([0, 2], ["neg", "pos"], "Row 2 of rows.csv has the class 2"),
        ([0, 5], STARS, "Row 2 of rows.csv has the class 5"),  # an index and a name do not go together
        ([-1, 1], ["neg", "pos"], "Row 1 of rows.csv has the class -1"),
        (["pos", None], ["neg", "pos"], "Row 2 of rows.csv has the class None"),
    ],
)
def test_labels_that_the_model_does_not_have_are_named(labels, names, message):
    with pytest.raises(ValueError, match=message):
        class_indices(table(labels), "label", names, "rows.csv")


@pytest.mark.parametrize("labels", [[5, 1, 3, 2, 4], ["b", "a"], [0, 1], [10, 9]])
def test_what_a_model_is_trained_on_is_what_it_is_measured_on(labels):
    rows = labelled_rows(table(labels), ["text"], "label", "rows.csv")
    assert class_indices(table(labels), "label", rows.names, "rows.csv") == rows.labels
    assert class_indices(table(labels[:1]), "label", rows.names, "rows.csv") == rows.labels[:1]


@pytest.mark.parametrize("label", [["a", "b"], {"a": 1}])
def test_a_label_that_is_no_single_class_is_named(label):
    with pytest.raises(ValueError, match="Row 1 of rows.jsonl has the label .* must be a text or a whole number"):
        labelled_rows(table([label, label]), ["text"], "label", "rows.jsonl")


def test_a_file_with_names_of_columns_alone_has_no_rows(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=r"rows.csv has no rows"):
        load_table(str(tmp_path / "rows.csv"))
