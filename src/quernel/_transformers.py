"""Folders of transformers: what of a config may come from a file, and the files of a tokenizer.

Of a config that is numbers and names of layers, never where code comes from:
transformers lets a config name its attention as a kernel on a hub (downloaded, then run) and its classes in
modules beside the weights (``auto_map``). A file that Quernel opens may choose neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Both are part of transformers and torch.
ATTENTIONS = ("eager", "sdpa")
# Keys that choose code: hub kernels, remote classes, implementations by name, quantizers that import a package.
_CODE = re.compile(
    r"_?(attn|experts)_implementation\w*|auto_map|custom_pipelines|\w*kernel(s|_config|_mapping)|use_kernels?"
    r"|trust_remote_code|_from_auto|_commit_hash|quantization_config|_name_or_path|name_or_path"
)

# What tokenizers and processors of transformers read; config.json names the class where the others do not.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("preprocessor_config.json", "processor_config.json"),
    "config.json",
)


def tokenizer_files(source: str | None) -> dict[str, Path]:
    """Return the files of a local tokenizer by name; empty where there is none."""
    if not source or not Path(source).is_dir():
        return {}
    found = {name: Path(source) / name for name in TOKENIZER_FILES if (Path(source) / name).is_file()}
    return {} if set(found) <= {"config.json"} else found


def harmless_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config, nested ones included, without the keys that choose code or name a place."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {k: cleaned(v) for k, v in value.items() if not _CODE.fullmatch(str(k))}
            # Elsewhere the name of a backbone is looked up on a hub; its weights are in our file anyway.
            if kept.get("model_type") != "timm_backbone":
                kept.pop("backbone", None)
            return kept | {k: False for k in ("use_pretrained_backbone", "pretrained") if k in kept}
        return [cleaned(v) for v in value] if isinstance(value, list) else value

    plain: dict[str, Any] = cleaned(config)
    return plain


def harmless_attention(name: Any) -> str | None:
    """Return ``name`` if that attention needs no other code; None is transformers' own choice, mostly ``"sdpa"``."""
    return name if isinstance(name, str) and name in ATTENTIONS else None
