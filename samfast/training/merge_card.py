# SPDX-License-Identifier: Apache-2.0
"""The model card of a merged model: what its adapter's card and record say of the training."""

import re
from pathlib import Path
from typing import Any

from samfast.files.format import AdapterFile
from samfast.files.model_card import (
    CARD,
    NO_LICENSE,
    UNKNOWN,
    base_model,
    card,
    section,
    table,
)
from samfast.training.run_card import DATA, family, weights_text


def merged_card(
    adapter: AdapterFile,
    checkpoint: Path | None,
    license: str | None,
    chosen: tuple[str, int] | None,
    class_name: str,
) -> bytes:
    """README.md for a Hugging Face folder.

    license: None takes that of the adapter's card   chosen: task and channel; None for one mask
    class_name: transformers' class that opens the folder
    """
    base = adapter.record["base"]
    told, rest = _of_adapter(adapter.folder / CARD)
    license = license or told
    named = base_model(checkpoint)
    front = {
        "library_name": "transformers",
        "base_model": named,
        "base_model_relation": named and "finetune",
        "license": license or UNKNOWN,
        "pipeline_tag": "mask-generation",
        "tags": ["samfast", family(base["name"])],
    }
    about = (
        f"The Segment Anything model {base['name']} with {weights_text(base)}, into which samfast "
        f"merged an adapter of method {adapter.record['method']['name']}."
    )
    if chosen is not None:
        about += f" Its mask is that of task {chosen[0]}, class {chosen[1]}."
    if not license:
        about += f"\n\n{NO_LICENSE}"
    code = f'model = transformers.{class_name}.from_pretrained("FOLDER")'
    use = section(
        "Use",
        f"```python\nimport transformers\n\n{code}\n```",
        "Ask for one mask (`multimask_output=False`), which is the one that was trained.",
    )
    return card(
        front, f"{base['name']} with a merged adapter", [about, use, *rest, *_scores(adapter, rest)]
    )


def _of_adapter(path: Path) -> tuple[str | None, list[str]]:
    """The license in an adapter's card, and what it says of the training."""
    if not path.is_file():
        return None, []
    text = path.read_text(encoding="utf-8", errors="replace")
    front = text.split("\n---\n", 1)[0] if text.startswith("---\n") else ""
    found = re.search(r"^license: *\"?([\w.+-]+)\"? *$", front, re.MULTILINE)
    license = found[1] if found and found[1] != UNKNOWN else None
    _, heading, rest = text.partition(f"\n## {DATA}\n")
    return license, [f"## {DATA}\n{rest.rstrip()}"] if heading else []


def _scores(adapter: AdapterFile, rest: list[str]) -> list[str]:
    """The scores in the adapter's record, where no card has them."""
    extra: dict[str, Any] = adapter.record["extra"]
    rows = [
        (name, value)
        for name, value in extra.items()
        if name.startswith("val_") and isinstance(value, (int, float))
    ]
    if rest or not rows:
        return []
    epoch = f"Epoch {extra['epoch']}." if "epoch" in extra else ""
    return [section("Scores on the validation images", epoch, table(("score", "adapter"), rows))]
