# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a model folder, as far as dynamo.trtllm looks into it: the id that health checks send."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace


class TokenizerBase:
    """Knows its special tokens; it doesn't turn text into tokens."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        generation = folder / "generation_config.json"
        if generation.exists():
            config |= json.loads(generation.read_text(encoding="utf-8"))
        ends = config.get("eos_token_id")
        self.end_ids = frozenset([ends] if isinstance(ends, int) else ends or ())
        self.tokenizer = SimpleNamespace(bos_token_id=config.get("bos_token_id"))


def tokenizer_factory(model: str, *, trust_remote_code: bool = False) -> TokenizerBase | None:
    """Return the tokenizer of a model folder, None where there is no such folder."""
    del trust_remote_code
    folder = Path(model)
    return TokenizerBase(folder) if folder.is_dir() else None
