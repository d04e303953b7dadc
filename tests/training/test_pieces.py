"""Rows that are made up of pieces of others."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from transformers_badge.training.fine_tune import special_ids, tokenize
from transformers_badge.training.lexical import FOLDS, text_folds
from transformers_badge.training.pieces import fill_up


# No word is in two texts, so that a piece tells where it is from; one text is empty, and one is there twice.
TEXTS = [" ".join(words) for words in np.array_split(["film", "plot", "actor", "music", "scene", "ending", "book",
    "play", "moon", "river", "stone", "garden", "bread", "water", "horse", "winter", "summer", "paper", "letter",
    "window", "door", "street", "city", "train", "ship", "ocean", "island", "forest", "bird", "tree", "house",
    "table"], 8)] + ["", "film plot actor music"]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return AutoTokenizer.from_pretrained(minilm)


def filled(tokenizer, columns, count=200, seed=0, max_tokens=64):
    rows = tokenize(tokenizer, columns, None, max_tokens)
    folds = text_folds(rows["input_ids"], 0)
    return rows, folds, *fill_up(rows, folds, special_ids(tokenizer), count, seed)


def is_piece(piece, whole):
    return any(whole[start : start + len(piece)] == piece for start in range(len(whole) - len(piece) + 1))


def test_made_up_rows_are_two_pieces_between_the_special_tokens(tokenizer):
    rows, folds, more, more_folds = filled(tokenizer, [TEXTS])
    assert len(more) == len(more_folds) == 200
    assert more.select(range(len(rows))).to_dict() == rows.to_dict()
    whole = rows["input_ids"]
    word_of = {token: row for row, ids in enumerate(whole[:8]) for token in ids[1:-1]}
    mixed = 0
    for ids, fold in zip(more["input_ids"][len(rows) :], more_folds[len(rows) :], strict=True):
        assert [ids[0], ids[-1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
        assert len(ids) <= max(map(len, whole))
        inner, sources = ids[1:-1], [word_of[token] for token in ids[1:-1]]
        assert {folds[source] for source in sources} <= {fold}
        mixed += len(set(sources)) > 1
        cuts = [cut for cut in range(len(inner) + 1) if len(set(sources[:cut])) <= 1 and len(set(sources[cut:])) <= 1]
        assert any(
            all(is_piece(part, whole[word_of[part[0]]]) for part in (inner[:cut], inner[cut:]) if part) for cut in cuts
        )
    assert mixed > 20
    assert not is_piece([1, 3], [1, 2, 3])  # the check itself can fail


def test_without_folds_texts_of_all_folds_come_together(tokenizer):
    """The control of what folds keep apart."""
    rows, folds, _, _ = filled(tokenizer, [TEXTS])
    more, _ = fill_up(rows, np.zeros(len(rows), int), special_ids(tokenizer), 200, 0)
    fold_of = {token: fold for ids, fold in zip(rows["input_ids"], folds, strict=True) for token in ids[1:-1]}
    assert any(len({fold_of[token] for token in ids[1:-1]}) > 1 for ids in more["input_ids"])


def test_pairs_stay_pairs_with_their_segments(tokenizer):
    pairs = [TEXTS[:8], TEXTS[7::-1]]
    rows, _, more, _ = filled(tokenizer, pairs, max_tokens=9)
    firsts, seconds = ({token for ids in tokenizer(texts)["input_ids"] for token in ids[1:-1]} for texts in pairs)
    assert firsts == seconds  # so only the segments can tell them apart
    longest = max(map(len, rows["input_ids"]))
    for ids, segments, mask in zip(more["input_ids"], more["token_type_ids"], more["attention_mask"], strict=True):
        assert ids.count(tokenizer.sep_token_id) == 2
        end = ids.index(tokenizer.sep_token_id) + 1
        assert segments == [0] * end + [1] * (len(ids) - end)
        assert mask == [1] * len(ids)
        assert len(ids) <= longest


def test_the_same_seed_makes_the_same_rows_and_enough_texts_none(tokenizer):
    first, second, other = (filled(tokenizer, [TEXTS], seed=seed)[2]["input_ids"] for seed in (0, 0, 1))
    assert first[:] == second[:]
    assert first[:] != other[:]
    rows, folds, more, more_folds = filled(tokenizer, [TEXTS], count=len(TEXTS))
    assert more is rows
    assert np.array_equal(folds, more_folds)
    assert set(folds) == set(range(FOLDS))
    assert folds[0] == folds[-1]  # the same text
