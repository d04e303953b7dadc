"""The model card: what a reader of a checkpoint has to know about its exits, and what was shown about its policy."""

import os
import re
from pathlib import Path
from typing import Any

from transformers_badge.model.policy_badge import ExitPolicy


START, END = "<!-- exit policy: written by transformers-badge -->", "<!-- end of exit policy -->"


def write_card(folder: Path, config: Any) -> None:
    """Make or renew the model card of a checkpoint.

    A card that is there keeps all but the part between the two marks; without marks the part is added at its end.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path, section = folder / "README.md", _section(config)
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if START in text and END in text:
            text = re.sub(re.escape(START) + ".*?" + re.escape(END), lambda match: section, text, flags=re.DOTALL)
        else:
            text = f"{text.rstrip()}\n\n{section}\n"
    else:
        data = ModelCardData(
            library_name="transformers", pipeline_tag="text-classification", tags=["early-exit", "badge"]
        )
        encoder = config.encoder_config.model_type
        text = str(
            ModelCard(
                f"---\n{data.to_yaml()}\n---\n\n# A text classifier that leaves early\n\n"
                f"A {encoder} encoder of {config.num_hidden_layers} blocks with exits at depths "
                f"{', '.join(map(str, config.exit_layers))}, made with transformers-badge.\n\n{section}\n"
            )
        )
    unfinished = path.with_name("README.md.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _section(config: Any) -> str:
    policy: ExitPolicy = config.exit_policy
    if policy.threshold is None:
        says = "It runs at full depth: no threshold has been set."
        if policy.certificate and policy.certificate.get("summary"):
            says = str(policy.certificate["summary"])
        dials = ""
    else:
        thresholds = policy.threshold if isinstance(policy.threshold, tuple) else (policy.threshold,)
        listed = ", ".join("closed" if t is None else f"{t:.4g}" for t in thresholds)
        dials = f"Criterion `{policy.criterion}`, threshold {listed}.\n\n"
        certificate = policy.certificate or {}
        says = str(
            certificate.get("summary", "Nothing has been shown about this threshold: calibrate it on your data.")
        )
        if certificate.get("date"):
            says += f" Calibrated on {certificate['date']}"
            says += f", data `{certificate['data']}`." if certificate.get("data") else "."
            says += " This holds for rows of the same kind as those."
    return f"""{START}
## Early exit

{dials}{says}

```python
from transformers import pipeline

classify = pipeline("text-classification", model="path/to/this/checkpoint", trust_remote_code=True)
classify("A text.")  # label, score, and exit_layer: how many blocks ran
```
{END}"""
