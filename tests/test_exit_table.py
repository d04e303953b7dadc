"""Exit tables on disk: the same table comes back, or an error that names the file."""

import errno
import hashlib
import json
import os
from dataclasses import fields

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file, save_file

from transformers_badge import exit_table
from transformers_badge.exit_table import FORMAT, VERSION, ExitTable, digest_rows


ROWS, EXITS, LABELS = 7, 3, 4
TEXTS = [f"text {i}" for i in range(ROWS)]
FLOATS = ["f2", "f4", "f8"]
OPTIONAL = ["labels", "lengths", "row_digests"]


def make(dtype="f4", several=False, **fields):
    """A table with everything in it."""
    generator = np.random.default_rng(0)
    return ExitTable(**{
        "exit_logits": generator.normal(size=(ROWS, EXITS, LABELS)).astype(dtype),
        "exit_layers": (2, 5, 6),
        "costs": np.array([1.5, 4.0, 9.25]),
        "problem_type": "multi_label_classification" if several else "single_label_classification",
        "labels": generator.integers(0, 2 if several else LABELS, (ROWS, LABELS) if several else ROWS),
        "lengths": np.arange(3, 3 + ROWS, dtype=np.int32),
        "row_digests": digest_rows([TEXTS]),
        "label_names": ("no", "yes", "perhaps", "Ünknown ☂"),
        "model": "0123456789abcdef",
        **fields,
    })  # fmt: skip


def assert_same(one, other):
    for field in fields(ExitTable):
        mine, yours = getattr(one, field.name), getattr(other, field.name)
        assert (mine is None) == (yours is None), field.name
        if isinstance(mine, np.ndarray):
            assert mine.dtype == yours.dtype, field.name
            assert np.array_equal(mine, yours), field.name
        else:
            assert mine == yours, field.name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "movies.table"


# There and back


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_table_comes_back_as_it_was(dtype, several, path):
    table = make(dtype, several)
    table.save(path)
    assert_same(table, ExitTable.load(path))
    assert ExitTable.load(str(path)).data == table.data != ""
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_table_with_logits_alone_comes_back_as_it_was(dtype, path):
    table = ExitTable(exit_logits=make(dtype).exit_logits, exit_layers=(1, 2, 3))
    assert table.costs.tolist() == [1.0, 2.0, 3.0]
    assert table.label_names == ("0", "1", "2", "3")
    assert table.data == table.model == ""
    assert (len(table), table.blocks) == (ROWS, 3)
    table.save(path)
    assert_same(table, ExitTable.load(path))


@pytest.mark.parametrize("absent", OPTIONAL)
def test_each_optional_array_may_be_absent(absent, path):
    table = make(**{absent: None})
    table.save(path)
    loaded = ExitTable.load(path)
    assert getattr(loaded, absent) is None
    assert_same(table, loaded)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
def test_labels_and_lengths_of_every_whole_type_come_back(dtype, path):
    table = make(labels=make().labels.astype(dtype), lengths=make().lengths.astype(dtype))
    table.save(path)
    assert_same(table, ExitTable.load(path))


def test_logits_that_are_not_finite_come_back_too(path):
    table = make()
    table.exit_logits[0, 0] = [np.nan, np.inf, -np.inf, -0.0]
    table.save(path)
    assert ExitTable.load(path).exit_logits.tobytes() == table.exit_logits.tobytes()


def test_arrays_of_another_layout_or_byte_order_come_back_equal(path):
    for change in (np.asfortranarray, lambda logits: logits.astype(">f4"), lambda logits: logits[:, ::-1]):
        table = make(exit_logits=change(make().exit_logits))
        table.save(path)
        assert np.array_equal(ExitTable.load(path).exit_logits, table.exit_logits)


def test_a_table_is_an_ordinary_safetensors_file(path):
    table = make()
    table.save(path)
    tensors = load_file(path)
    assert set(tensors) == {"exit_logits", "costs", *OPTIONAL}
    for name, array in tensors.items():
        assert np.array_equal(array, getattr(table, name)), name
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == (FORMAT, str(VERSION))
    assert json.loads(metadata["header"]) == {
        "exit_layers": [2, 5, 6],
        "problem_type": "single_label_classification",
        "label_names": ["no", "yes", "perhaps", "Ünknown ☂"],
        "model": "0123456789abcdef",
    }


# Memory-mapping


def test_a_large_table_is_mapped_and_a_small_one_is_read(path, monkeypatch):
    table = make()
    table.save(path)
    loaded = ExitTable.load(path)
    assert not any(isinstance(getattr(loaded, name), np.memmap) for name in ("exit_logits", *OPTIONAL))
    loaded.exit_logits[0] = 0  # what was read is the caller's own
    monkeypatch.setattr(exit_table, "MAPPED_FROM", table.exit_logits.nbytes)
    mapped = ExitTable.load(path)
    assert isinstance(mapped.exit_logits, np.memmap)
    assert not isinstance(mapped.labels, np.memmap)  # smaller than the limit
    assert_same(table, mapped)
    with pytest.raises(ValueError, match="read-only"):
        mapped.exit_logits[0] = 0
    monkeypatch.setattr(exit_table, "MAPPED_FROM", table.exit_logits.nbytes + 1)
    assert not isinstance(ExitTable.load(path).exit_logits, np.memmap)


def test_a_mapped_table_can_be_selected_from_and_saved_over_its_own_file(path, monkeypatch):
    monkeypatch.setattr(exit_table, "MAPPED_FROM", 1)
    table = make()
    table.save(path)
    mapped = ExitTable.load(path)
    part = mapped.select([5, 1])
    part.save(path)
    assert_same(table.select([5, 1]), ExitTable.load(path))
    assert np.array_equal(mapped.exit_logits, table.exit_logits)  # and the mapping holds on to what it showed


# Whole or not at all


def half_written(error):
    def save(tensors, path, metadata):
        path.write_bytes(b"half")
        raise error

    return save


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), safetensors.SafetensorError("I/O error"), MemoryError()]
)
def test_a_failing_save_leaves_the_old_file_and_nothing_else(path, monkeypatch, error):
    old = make()
    old.save(path)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", half_written(error))
        with pytest.raises(OSError, match=r"No space left|The exit table .*movies.table could not be written"):
            make(model="new").save(path)
    assert os.listdir(path.parent) == [path.name]
    assert_same(old, ExitTable.load(path))


def test_an_interrupted_save_leaves_the_old_file_too(path, monkeypatch):
    old = make()
    old.save(path)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.numpy, "save_file", half_written(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            make(model="new").save(path)
    assert os.listdir(path.parent) == [path.name]
    assert_same(old, ExitTable.load(path))


def test_a_save_that_cannot_be_put_in_place_leaves_nothing_behind(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        make().save(tmp_path / "folder")
    with pytest.raises(OSError, match="The exit table .*table could not be written"):
        make().save(tmp_path / "nowhere" / "table")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_save_replaces_the_old_file(path):
    make().save(path)
    make("f8", model="new").save(path)
    assert_same(make("f8", model="new"), ExitTable.load(path))
    assert os.listdir(path.parent) == [path.name]


# What is refused


def test_a_file_that_is_not_there_is_named(tmp_path):
    for missing in (tmp_path / "gone.table", tmp_path, tmp_path / "gone" / "gone.table"):
        with pytest.raises(FileNotFoundError, match=f"There is no exit table {missing}: make one with"):
            ExitTable.load(missing)


@pytest.mark.parametrize(
    "content",
    [b"", b"a", b"text,label\n", b"A longer text, of more than eight characters.\n" * 100, bytes(8), bytes(100),
     b"\xff" * 100, (4).to_bytes(8, "little") + b"null", (5).to_bytes(8, "little") + b'"abc"',
     (3).to_bytes(8, "little") + b"\xff\xfe\xfd", (10**12).to_bytes(8, "little") + b"{}"],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(OSError, match=f"{path} is not an exit table, or is cut short: copy it again, or make it anew"):
        ExitTable.load(path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"version": "1"}])
def test_another_safetensors_file_is_refused(path, metadata):
    save_file({"exit_logits": make().exit_logits}, path, metadata)
    with pytest.raises(ValueError, match=f"{path} is not an exit table: make one with transformers-badge evaluate"):
        ExitTable.load(path)


@pytest.mark.parametrize("version", [str(VERSION + 1), "10", "1.5", "", "x"])
def test_a_newer_version_is_refused(path, monkeypatch, version):
    monkeypatch.setattr(exit_table, "VERSION", version)
    make().save(path)
    monkeypatch.setattr(exit_table, "VERSION", VERSION)
    message = f"{path} is an exit table of version {version}, and this release reads up to {VERSION}: install a newer"
    with pytest.raises(ValueError, match=message):
        ExitTable.load(path)


@pytest.mark.parametrize("several", [False, True])
def test_a_table_that_is_cut_short_is_refused_wherever_it_is_cut(path, several):
    make("f8", several).save(path)
    whole = path.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    places = {*range(10), data - 2, data - 1, data, data + 1, len(whole) - 8, len(whole) - 1}
    places |= {int(place) for place in np.linspace(0, len(whole) - 1, 40)}
    assert len(places) > 45
    for place in sorted(places):
        path.write_bytes(whole[:place])
        with pytest.raises((OSError, ValueError)) as caught:
            ExitTable.load(path)
        assert str(path) in str(caught.value), place
        assert "cut short" in str(caught.value), place
    path.write_bytes(whole)
    assert_same(make("f8", several), ExitTable.load(path))


def test_a_table_whose_shapes_do_not_fit_its_data_is_refused(path):
    make().save(path)
    whole = path.read_bytes()
    changed = whole.replace(f"[{ROWS},{EXITS},{LABELS}]".encode(), f"[{ROWS},{EXITS},{LABELS - 1}]".encode())
    assert changed != whole
    path.write_bytes(changed)
    with pytest.raises(
        OSError, match=f"The exit table {path} is cut short or damaged .*: copy it again, or make it anew"
    ):
        ExitTable.load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"exit_logits": np.zeros((ROWS, LABELS))},
            "exit_logits must be a floating-point array .*float64 \\(7, 4\\)",
        ),
        (
            {"exit_logits": np.zeros((ROWS, EXITS, LABELS), int)},
            "exit_logits must be .*got int64 \\(7, 3, 4",
        ),
        ({"exit_logits": [[[0.5]]]}, "exit_logits must be a floating-point array .*got list \\(1, 1, 1\\)"),
        ({"exit_logits": np.zeros((0, EXITS, LABELS))}, "at least one row, exit and label, got \\(0, 3, 4\\)"),
        ({"exit_logits": np.zeros((ROWS, 0, LABELS))}, "at least one row, exit and label, got \\(7, 0, 4\\)"),
        ({"exit_logits": np.zeros((ROWS, EXITS, 0))}, "at least one row, exit and label, got \\(7, 3, 0\\)"),
        ({"exit_layers": (2, 6)}, "exit_layers must be 3 ascending depths, one per exit, got \\[2, 6\\]"),
        ({"exit_layers": ()}, "exit_layers must be 3 ascending depths, one per exit, got \\[\\]"),
        ({"exit_layers": (5, 2, 6)}, "exit_layers must be 3 ascending depths"),
        ({"exit_layers": (2, 2, 6)}, "exit_layers must be 3 ascending depths"),
        ({"exit_layers": (-1, 2, 6)}, "exit_layers must be 3 ascending depths"),
        ({"problem_type": "regression"}, "needs problem_type='single_label_.*or 'multi_label_.*, got 'regression'"),
        ({"problem_type": None}, "needs problem_type=.*, got None"),
        ({"costs": [1, 2]}, "costs must be 3 finite ascending numbers >= 0, one per exit, got \\[1.0, 2.0\\]"),
        ({"costs": [1, 3, 2]}, "costs must be 3 finite ascending numbers"),
        ({"costs": [1, 2, np.inf]}, "costs must be 3 finite ascending numbers"),
        ({"costs": [1, np.nan, 2]}, "costs must be 3 finite ascending numbers"),
        ({"costs": [0, 0, 0]}, "costs must be 3 finite ascending numbers"),
        ({"label_names": ("no", "yes")}, "label_names lists 2 names for 4 labels"),
        ({"lengths": np.ones(ROWS + 1, int)}, "lengths must have the shape \\(7,\\), one per row, got \\(8,\\)"),
        ({"row_digests": np.ones((ROWS, 1), "u8")}, "row_digests must have the shape \\(7,\\).*got \\(7, 1\\)"),
        ({"labels": np.zeros(ROWS - 1, int)}, "labels must be whole numbers of the shape \\(7,\\), got int64 \\(6,\\)"),
        ({"labels": np.zeros((ROWS, LABELS), int)}, "labels must be whole numbers of the shape \\(7,\\), got int64"),
        ({"labels": np.zeros(ROWS)}, "labels must be whole numbers of the shape \\(7,\\), got float64 \\(7,\\)"),
        ({"labels": np.full(ROWS, LABELS)}, "labels must be in \\[0, 4\\), got 4 to 4"),
        ({"labels": np.array([0, 1, 2, 3, -1, 0, 0])}, "labels must be in \\[0, 4\\), got -1 to 3"),
        ({"several": True, "labels": np.zeros(ROWS, int)}, "labels must be whole numbers of the shape \\(7, 4\\), got"),
        ({"several": True, "labels": np.full((ROWS, LABELS), 2)}, "labels must be in \\[0, 2\\), got 2 to 2"),
    ],
)
def test_a_bad_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


# Selecting rows


@pytest.mark.parametrize("rows", [[5, 0, 0, 2], slice(1, 6, 2), np.arange(ROWS) % 3 == 0, np.array([6])])
def test_select_takes_rows_of_every_array(rows):
    table = make()
    part = table.select(rows)
    for name in ("exit_logits", *OPTIONAL):
        assert np.array_equal(getattr(part, name), getattr(table, name)[rows]), name
    for name in ("exit_layers", "problem_type", "label_names", "model"):
        assert getattr(part, name) == getattr(table, name), name
    assert np.array_equal(part.costs, table.costs)
    assert len(part) == len(table.labels[rows])


def test_select_leaves_absent_arrays_absent():
    part = make(**dict.fromkeys(OPTIONAL)).select([1, 2])
    assert [getattr(part, name) for name in OPTIONAL] == [None, None, None]


@pytest.mark.parametrize("rows", [[], slice(0, 0), np.zeros(ROWS, dtype=bool)])
def test_select_of_no_row_is_refused(rows):
    with pytest.raises(ValueError, match="An exit table needs at least one row, exit and label, got \\(0, 3, 4\\)"):
        make().select(rows)


# Digests


def test_the_digest_of_the_data_is_that_of_its_texts_in_any_order():
    table, order = make(), np.random.default_rng(0).permutation(ROWS)
    assert table.select(order).data == table.data
    assert len(table.data) == 16
    for texts in (
        [*TEXTS[:-1], "another"],
        [*TEXTS[:-1], TEXTS[-1] + " "],
        [*TEXTS[:-1], TEXTS[0]],
    ):
        assert make(row_digests=digest_rows([texts])).data != table.data, texts
    assert table.select(slice(0, -1)).data != table.data
    twice = table.select([*range(ROWS), 0])
    assert twice.data != table.data, "a row more is other data, even one that was there"
    assert make(exit_logits=table.exit_logits + 1, labels=None, model="other").data == table.data


def test_row_digests_are_the_same_everywhere():
    digests = digest_rows([["abc", "", "Ü", "abc"]])
    assert digests.dtype == np.uint64
    assert digests.shape == (4,)
    assert digests[0] == digests[3]
    assert len(set(digests.tolist())) == 3
    assert int(digests[0]) == int.from_bytes(hashlib.blake2b(b'["abc"]', digest_size=8).digest(), "little")
    digests[0] = 0  # the caller's own


def test_a_pair_of_texts_is_another_row_than_its_texts_joined_or_swapped():
    pair = digest_rows([["ab"], ["c"]])
    for other in ([["abc"]], [["ab c"]], [["ab"]], [["c"], ["ab"]], [["a"], ["bc"]], [["ab"], ["c"], [""]]):
        assert digest_rows(other) != pair, other
    assert digest_rows([["ab"], [""]]) != digest_rows([["ab"]])


def test_texts_that_are_no_valid_unicode_have_a_digest():
    assert len(set(digest_rows([["\ud800", "\udfff", "?"]]).tolist())) == 3


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        digest_rows([["a", "b"], ["c"]])
