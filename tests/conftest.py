"""Small models of every family, and the real encoder and sentences."""

import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
# Tiny models gain nothing from threads, and the tests run in several processes. numpy reads it when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest

from tiny import EVERY_FAMILY, FAMILIES, tiny_model
from transformers_badge.demo.sources import encoder_path, read_reviews


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(params=sorted(EVERY_FAMILY))
def every_family(request):
    return request.param


@pytest.fixture
def model(family):
    return tiny_model(family)


@pytest.fixture
def bert():
    return tiny_model("bert")


@pytest.fixture(scope="session")
def minilm():
    """The folder of a real pretrained encoder, with its tokenizer."""
    return str(encoder_path())


@pytest.fixture(scope="session")
def reviews():
    """Real movie-review sentences and their polarity."""
    return read_reviews("movies")


def pytest_terminal_summary(terminalreporter):
    """Print what tests recorded: captured output of a passing test would go unseen."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{name}: {value}")
