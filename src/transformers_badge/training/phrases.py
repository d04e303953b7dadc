"""Fitting the phrases of exit 0: filters over word vectors that learn what the last exit answers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformers_badge.model.lexical_badge import pool_phrases
from transformers_badge.model.loss_badge import infer_problem_type
from transformers_badge.model.ngrams_badge import find_words
from transformers_badge.model.phrases_badge import VECTOR_SHARE, WINDOW
from transformers_badge.model.rows_badge import pad_rows
from transformers_badge.training.answers import last_logits
from transformers_badge.training.lexical import text_folds
from transformers_badge.training.recipes import distillation_losses


Array = np.ndarray[Any, np.dtype[Any]]

MOST_ROWS = 50_000  # that are learnt from: more would hardly teach more
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 6, 32, 1e-3, 0.05
# Folds that a net does not see, so that there is one to say something of each that it has not seen. The first is kept.
HELD_OUT = ((0,), (1, 2), (3, 4))
DROPOUT = 0.4  # of what the filters found; half as much of the vectors
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of what the phrases say, of which the best for rows held out is taken
_MIXED = 50  # batches of similar length are cut from so many batches of random rows


def fit_phrases(
    model: Any,
    tokenizer: Any,
    rows: Any,
    folds: Any | None = None,
    answers: Any | None = None,
    *,
    seed: int = 0,
    show_progress: bool = True,
) -> Any:
    """Fit the phrases of a model's exit 0 to what its last exit answers; the rest of the model stays as it is.

    The vectors start from the encoder's token embeddings, so that phrases of words that the rows do not have are known
    too. What the phrases say is weighed on rows held out: where that is of no use, they say nothing.

    Args:
        model: a fine-tuned `BadgeForSequenceClassification`. Without phrases there is nothing to do.
        tokenizer: of its encoder.
        rows: a `datasets.Dataset` with `input_ids`, not padded, and `lexical_logits`, as `fit_lexical_exit` has them.
            Many: made-up ones will do (`pieces.fill_up`), and without these little is gained.
        folds: (rows,), whole numbers from 0 to 4; the rows of a fold are held out together. Default: at random, but
            equal rows together.
        answers: logits of the last exit, (rows, labels). Default: it is asked.
        seed: of everything random.

    Returns:
        The rows; in their `lexical_logits` stands also what phrases fitted to other rows say of each.
    """
    if not model.config.phrase_filters:
        return rows
    rng = np.random.default_rng(seed)
    folds = text_folds(rows["input_ids"], seed) if folds is None else np.asarray(folds)
    weighed = np.isin(folds, HELD_OUT[0])
    chosen = np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(part))[:MOST_ROWS] for part in (~weighed, weighed)])
    )
    seen = rows.select(chosen)
    answers = last_logits(model, tokenizer, seen, show_progress) if answers is None else np.asarray(answers)[chosen]
    problem_type = infer_problem_type(model.config.problem_type, model.num_labels, None)
    ngrams = np.asarray(rows["lexical_logits"], np.float32)[:, : model.num_labels]
    data = _Rows(model, seen["input_ids"], ngrams[chosen], answers)

    phrases, nets = np.zeros_like(ngrams), []
    devices = [] if model.device.type == "cpu" else [model.device]
    for held_out in HELD_OUT:
        apart = np.isin(folds[chosen], held_out)
        with torch.random.fork_rng(devices, device_type=model.device.type if devices else "cuda"):
            torch.manual_seed(seed)
            nets.append(_learn(data, np.flatnonzero(~apart), problem_type, rng, show_progress))
        phrases[chosen[apart]] = _answers(nets[-1], model, [data.ids[row] for row in np.flatnonzero(apart)])
    others = np.setdiff1d(np.arange(len(rows)), chosen)
    phrases[others] = _answers(nets[0], model, rows.select(others)["input_ids"])

    ours = np.flatnonzero(weighed[chosen])
    said = torch.from_numpy(phrases[chosen[ours]]).to(model.device)
    losses = [_loss(data.ngrams[ours] + share * said, data.answers[ours], problem_type).item() for share in SHARES]
    share = SHARES[int(np.argmin(losses))]
    nets[0].write(model.exits[0].phrases, share)
    return rows.remove_columns("lexical_logits").add_column(
        "lexical_logits", list(np.concatenate([ngrams, share * phrases], axis=1))
    )


class _Rows:
    """Token rows, and what n-grams and last exit say of them, (rows, labels), float32."""

    def __init__(self, model: Any, input_ids: Any, ngrams: Array, answers: Array) -> None:
        self.model, self.ids = model, list(input_ids)
        self.ngrams = torch.as_tensor(ngrams, dtype=torch.float32, device=model.device)
        self.answers = torch.as_tensor(answers, dtype=torch.float32, device=model.device)
        self.lengths = np.array([len(row) for row in self.ids])

    def batch(self, chosen: Array) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of these rows ids and words, (rows, tokens), and what n-grams and last exit say."""
        return *_tokens(self.model, [self.ids[row] for row in chosen]), self.ngrams[chosen], self.answers[chosen]


def _tokens(model: Any, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Padded ids, and which of them are words, (rows, tokens)."""
    inputs, mask = pad_rows([{"input_ids": row} for row in ids], padding_id=0)
    words = find_words(inputs["input_ids"], mask, model.config.ignored_ids)
    return torch.from_numpy(inputs["input_ids"]).to(model.device), torch.from_numpy(words).to(model.device)


class PhraseNet(nn.Module):
    """The phrases while they learn: their vectors are a projection of the encoder's token embeddings."""

    embeddings: Tensor
    spread: Tensor

    def __init__(self, model: Any, spread: Tensor) -> None:
        super().__init__()
        embeddings = model.get_input_embeddings().weight.detach().float()
        embeddings = embeddings - embeddings.mean(dim=0)
        self.register_buffer("embeddings", embeddings / embeddings.std().clamp(min=1e-12))
        self.register_buffer("spread", spread)  # of the answers, (labels,): weights of a fresh head are about 1
        filters, size = model.config.lexical_filters, model.config.lexical_filters // VECTOR_SHARE
        self.project = nn.Linear(embeddings.shape[1], size - 1)  # one component of a vector is a constant
        self.filter = nn.Linear(WINDOW * size, filters, bias=False)
        self.head = nn.Linear(2 * filters, model.num_labels, bias=False)
        self.dropout, self.vector_dropout = nn.Dropout(DROPOUT), nn.Dropout(DROPOUT / 2)

    def forward(self, input_ids: Tensor, words: Tensor) -> Tensor:
        """Logits (rows, labels)."""
        vectors = F.pad(self.vector_dropout(self.project(self.embeddings[input_ids])), (0, 1), value=1.0)
        vectors = F.pad(vectors * words[..., None], (0, 0, WINDOW - 1, WINDOW - 1))
        found = self.dropout(pool_phrases(vectors, words, self.filter.weight.t()))
        return self.head(found) * self.spread  # type: ignore[no-any-return]

    @torch.no_grad()
    def write(self, phrases: Any, share: float) -> None:
        """Put it into a model, with what it says times a number."""
        phrases.vectors[:-1] = F.pad(self.project(self.embeddings), (0, 1), value=1.0).to(phrases.vectors)
        phrases.filters.copy_(self.filter.weight.t())
        phrases.weight.copy_(self.head.weight.t() * self.spread * share)


def _learn(data: _Rows, rows: Array, problem_type: str, rng: Any, show_progress: bool) -> PhraseNet:
    """A net fitted to these rows."""
    from tqdm.auto import tqdm

    answers = data.answers[rows]
    # Values of a regression are as large as they are.
    regression = problem_type == "regression"
    spread = answers.std(dim=0).clamp(min=1e-6) if regression else torch.ones_like(answers[0])
    net = PhraseNet(data.model, spread).to(data.model.device)
    steps = EPOCHS * -(-len(rows) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    net.train()
    with torch.enable_grad(), tqdm(total=steps, desc="phrases", unit="step", disable=not show_progress) as bar:
        for _ in range(EPOCHS):
            for chunk in _batches_by_length(rng.permutation(rows), data.lengths, rng):
                input_ids, words, ngrams, answers = data.batch(chunk)
                says = ngrams + net(input_ids, words)
                loss = _loss(says / spread, answers / spread, problem_type)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(1)
    return net.eval().requires_grad_(False)


def _answers(net: PhraseNet, model: Any, ids: Any) -> Array:
    """What a net says of rows of token ids, (rows, labels), float32."""
    said = [net(*_tokens(model, chunk)).cpu().numpy() for chunk in _chunks(ids, 512)]
    return np.concatenate([np.zeros((0, model.num_labels), np.float32), *said])


def _loss(says: Tensor, answers: Tensor, problem_type: str) -> Tensor:
    """Of logits against those of the last exit, both (rows, labels)."""
    return distillation_losses(torch.stack([says, answers], dim=1), problem_type, 1.0)[0]


def _batches_by_length(order: Any, lengths: Any, rng: Any) -> Any:
    """Batches of rows of similar length, in random order."""
    batches = []
    for chunk in _chunks(order, _MIXED * BATCH_SIZE):
        batches += _chunks(chunk[np.argsort(lengths[chunk], kind="stable")], BATCH_SIZE)
    return [batches[index] for index in rng.permutation(len(batches))]


def _chunks(order: Any, size: int) -> list[Any]:
    return [order[start : start + size] for start in range(0, len(order), size)]
