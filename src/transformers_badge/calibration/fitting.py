"""What is learned from an exit table: the learned criterion's rule, temperatures, and how often who is right."""

from typing import Any, Literal

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, softmax

from transformers_badge.calibration.replay import answers, correctness
from transformers_badge.exit_table import ExitTable
from transformers_badge.model.criteria_badge import exit_probabilities
from transformers_badge.model.exit_rule_badge import FEATURES, rule_features


Array = np.ndarray[Any, np.dtype[Any]]

# What a rule learns to predict; see `fit_rule`.
Goal = Literal["disagreement", "regret", "labelled_regret"]

_TEMPERATURES = (0.05, 20.0)
# Penalties of the squared weights over standardised features: of the rule that all exits share, and of what an exit
# departs from it (its constant may depart further). Chosen on exit tables of 400 to 2,000 rows.
_SHARED, _DEPARTURE, _CONSTANT = 1.0, 10.0, 1.0
_POOL_PENALTY = 1e-3  # of the squared weights of exits in the pool, beside the mean log loss
_DISAGREEMENT = 1.0  # of the squares by which odds where two exits disagree depart from the pool's, beside the log loss
# When an exit is taken to be as good as the last: one-sided at 5 %, and on no fewer rows. Of 200 rows it was luck that
# picked the exits, and certificates paid for it with 3 % of their speed.
_STANDARD_ERRORS, _ROWS_TO_COMPARE = 1.645, 500
_NOTHING_LOST = (*(0.0 for _ in FEATURES), -30.0)  # the weights of an exit where everyone may leave


def fit_rule(
    table: ExitTable,
    temperature: float | tuple[float, ...] | None = None,
    goal: Goal = "regret",
    enough: int | None = None,
) -> tuple[tuple[float, ...], ...]:
    """Fit the learned criterion: at every exit but the last a logistic regression on the features of the exits so far.

    An answer's regret is by how much less probable a teacher holds it than the teacher's own. That is 0 where they
    agree, and little where the teacher is torn itself. Exits share most of their rule, which keeps it sound where few
    rows disagree.

    Args:
        table: rows like those to come. They may have been trained on, but for the goal `"labelled_regret"`.
        temperature: of the policy that the rule is for.
        goal: what is predicted. `"regret"`: that of the last exit. `"disagreement"`: the mean of whether the last exit
            answers otherwise and of its regret, which is less noisy; best where answers are to be those of the last
            exit. `"labelled_regret"`, best where they are to be right: the teacher is the mean of the last exit and of
            all exits together, weighted as the labels teach (see `expected_losses`); and where the labels show an
            exit to be as good as the last, nobody goes past it (see `deep_enough`). The others need no labels.
        enough: the index of an exit that nobody is to go past, where more rows than these have shown it.

    Returns:
        `ExitPolicy.rule`: (exits - 1, features + 1).

    Raises:
        ValueError: the model has one exit only, or labels are missing that the rule is to be taught by.
    """
    probabilities = exit_probabilities(table.exit_logits, table.problem_type, temperature)
    exits, classes = probabilities.shape[-2:]
    if exits < 2:
        raise ValueError("The model has one exit only: there is nothing to learn, and nowhere to leave early.")
    pairs = probabilities.reshape(-1, exits, classes)  # a row of several labels asks several questions
    teacher = probabilities[..., -1, :]
    if goal == "labelled_regret":
        teacher = (teacher + _pooled(probabilities, _truth(table))) / 2
    teacher, each = teacher.reshape(-1, classes), np.arange(len(pairs))
    features, goals = [], []
    for index in range(exits - 1):
        features.append(rule_features(pairs[:, : index + 1]))
        answer = pairs[:, index].argmax(axis=-1)
        aim = teacher.max(axis=-1) - teacher[each, answer]
        goals.append((aim + (answer != teacher.argmax(axis=-1))) / 2 if goal == "disagreement" else aim)
    center, spread = np.mean(features, axis=(0, 1)), np.std(features, axis=(0, 1))
    spread = np.where(spread < 1e-9, 1.0, spread)  # a feature that never changes gets no weight
    inputs = [(part - center) / spread for part in features]
    nothing = np.zeros(len(center) + 1)
    shared = _logistic(np.concatenate(inputs), np.concatenate(goals), nothing, _SHARED, 0.0)
    rule = []
    for part, aim in zip(inputs, goals, strict=True):
        fitted = _logistic(part, aim, shared, _DEPARTURE, _CONSTANT)
        weights = fitted[:-1] / spread
        rule.append((*map(float, weights), float(fitted[-1] - weights @ center)))
    if enough is None and goal == "labelled_regret":
        enough = deep_enough(table)
    if enough is not None:
        rule[enough:] = [_NOTHING_LOST] * len(rule[enough:])
    return tuple(rule)


def deep_enough(table: ExitTable) -> int:
    """The exit that is right most often, of the last and those that the labels show to be as good.

    These are right more often than the last, by more than chance, or on the very same rows. By McNemar's test: of rows
    that one of two has right and the other wrong, chance gives each as many. Source: Q. McNemar, "Note on the sampling
    error of the difference between correlated proportions or percentages", Psychometrika 1947.

    Returns:
        Its index; of the last where there are too few rows to tell.
    """
    right = correctness(table)
    better, worse = (right & ~right[:, -1:]).sum(axis=0), (~right & right[:, -1:]).sum(axis=0)
    as_good = better - worse >= _STANDARD_ERRORS * np.sqrt(better + worse)
    if len(table) < _ROWS_TO_COMPARE:
        as_good[:-1] = False
    return int(np.where(as_good, right.sum(axis=0), -1).argmax())


def _logistic(inputs: Array, goal: Array, prior: Array, penalty: float, penalty_constant: float) -> Array:
    """Weights and, last, constant of a logistic regression on goals in [0, 1], drawn to a prior."""
    # One row of average features and goal 1/2 keeps the constant finite where all goals are 0.
    inputs = np.concatenate([inputs, np.zeros((1, inputs.shape[1]))])
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    goal = np.append(goal, 0.5)
    penalties = np.append(np.full(inputs.shape[1] - 1, penalty), penalty_constant)

    def loss(parameters: Array) -> tuple[float, Array]:
        logit, departure = inputs @ parameters, parameters - prior
        value = (np.logaddexp(0, logit) - goal * logit).sum() + (penalties * departure**2).sum() / 2
        return float(value), inputs.T @ (expit(logit) - goal) + penalties * departure

    return np.asarray(minimize(loss, prior, jac=True, method="L-BFGS-B").x)


def fit_temperatures(table: ExitTable) -> tuple[float, ...]:
    """A temperature per exit, by which its probabilities fit best (smallest mean log loss).

    With labels they are fitted to these. Without, the inner exits are fitted to the last exit's probabilities, and its
    own temperature is 1. Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Returns:
        (exits,), each in [0.05, 20].
    """
    logits = np.asarray(table.exit_logits, dtype=np.float64)
    if table.problem_type == "multi_label_classification":
        logits = np.stack([np.zeros_like(logits), logits], axis=-1)
        labels = None if table.labels is None else np.stack([1 - table.labels, table.labels], axis=-1)
    else:
        labels = None if table.labels is None else np.eye(logits.shape[-1])[table.labels]
    goal = exit_probabilities(table.exit_logits, table.problem_type)[:, :, -1] if labels is None else labels
    goal = goal.reshape(len(logits), *logits.shape[2:])
    low, high = np.log(_TEMPERATURES)

    def best(exit_logits: Array) -> float:
        def loss(log_temperature: float) -> float:
            return float(-(goal * log_softmax(exit_logits / np.exp(log_temperature), axis=-1)).sum(axis=-1).mean())

        return float(np.exp(minimize_scalar(loss, bounds=(low, high), method="bounded").x))

    found = [best(logits[:, index]) for index in range(logits.shape[1])]
    return (*found[:-1], found[-1] if labels is not None else 1.0)


def expected_losses(table: ExitTable) -> Array:
    """By how much less probable it is that an exit answers a row rightly than that the last does.

    The mean of it over rows, at the exits that a policy takes, estimates what the policy loses with less noise than
    counting does: where two exits answer otherwise, a label says which was right, and this says how likely that was.
    The exits' log-probabilities are pooled with one weight for each, fitted to the labels (a logarithmic opinion pool:
    Genest and Zidek, "Combining Probability Distributions", Statistical Science 1986). That pool is right on average
    over all rows, and tends to think too well of an exit on the few where it and the last disagree; so which of the two
    is right is a logistic regression on their log-odds at every exit, fitted to these rows and drawn to the pool.

    Returns:
        (rows, exits), in [-1, 1], and 0 where an exit answers as the last does; of several labels, that all are right.

    Raises:
        ValueError: the table has no labels.
    """
    truth, logs = _truth(table), _logs(exit_probabilities(table.exit_logits, table.problem_type))
    weights = _pool_weights(logs, truth)
    pooled = _pool(logs, weights)
    given = answers(table).astype(int)
    given = np.moveaxis(given, -1, 1) if given.ndim == 3 else given[:, None]  # (rows, questions, exits)
    last = given[..., -1:]
    right = np.take_along_axis(pooled, last, axis=-1)[..., 0]
    losses = np.zeros((len(logs), logs.shape[2]))
    for index in range(logs.shape[2] - 1):
        rows, questions = differ = np.nonzero(given[..., index] != last[..., 0])
        mine, its = given[..., index][differ], last[..., 0][differ]
        odds = logs[rows, questions, :, its] - logs[rows, questions, :, mine]
        it_is_right = truth[rows, questions, its]
        either = it_is_right + truth[rows, questions, mine] > 0
        fitted = _logistic(odds[either], it_is_right[either], np.append(weights, 0.0), _DISAGREEMENT, _DISAGREEMENT)
        share = expit(odds @ fitted[:-1] + fitted[-1])
        both = pooled[rows, questions, its] + pooled[rows, questions, mine]
        of_last, of_mine = right.copy(), right.copy()
        of_last[differ], of_mine[differ] = both * share, both * (1 - share)
        losses[:, index] = of_last.prod(axis=1) - of_mine.prod(axis=1)
    return losses


def _truth(table: ExitTable) -> Array:
    """What the labels hold probable: (rows, questions, classes), 0 or 1; questions as in `exit_probabilities`."""
    if table.labels is None:
        raise ValueError("The exit table has no labels: make it from rows that have them.")
    labels = np.asarray(table.labels, dtype=int)
    if table.problem_type == "multi_label_classification":
        return np.asarray(np.eye(2)[labels])
    return np.asarray(np.eye(table.exit_logits.shape[-1])[labels[:, None]])


def _pooled(probabilities: Array, truth: Array) -> Array:
    """What all exits together hold probable: from (rows, questions, exits, classes) to (rows, questions, classes)."""
    logs = _logs(probabilities)
    return _pool(logs, _pool_weights(logs, truth))


def _logs(probabilities: Array) -> Array:
    return np.asarray(np.log(np.maximum(probabilities, 1e-12)))


def _pool(logs: Array, weights: Array) -> Array:
    """From log-probabilities (rows, questions, exits, classes) and a weight per exit to (rows, questions, classes)."""
    return np.asarray(softmax(np.einsum("nqec,e->nqc", logs, weights), axis=-1))


def _pool_weights(logs: Array, truth: Array) -> Array:
    """The weight of every exit by which the pool fits the labels best, (exits,)."""

    def loss(weights: Array) -> tuple[float, Array]:
        pooled = log_softmax(np.einsum("nqec,e->nqc", logs, weights), axis=-1)
        slope = np.einsum("nqec,nqc->e", logs, np.exp(pooled) - truth) / len(logs)
        value = -(truth * pooled).sum() / len(logs) + _POOL_PENALTY * weights @ weights
        return float(value), slope + 2 * _POOL_PENALTY * weights

    exits = logs.shape[2]
    return np.asarray(minimize(loss, np.full(exits, 1 / exits), jac=True, method="L-BFGS-B").x)
