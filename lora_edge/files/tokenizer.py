"""Which files of a folder make a tokenizer, and its chat templates; without reading a vocabulary.

Knows Hugging Face's folder layout; knows nothing of what the files mean.
"""

from __future__ import annotations

from pathlib import Path

from lora_edge.errors import BundleError
from lora_edge.files.json import decode_text, read_bytes, read_object

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
# What tokenizers are made of: BPE, WordPiece, SentencePiece, tiktoken.
VOCABULARIES = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "tekken.json", "*.model", "*.spm",
    "*.tiktoken", "bpe.codes", "vocab.bpe", "encoder.json",
)  # fmt: skip
_AGAIN = "Copy it again."


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder holds files of a tokenizer."""
    return any(any(folder.glob(pattern)) for pattern in VOCABULARIES)


def read_templates(folder: Path) -> dict[str, str]:
    """Name -> chat template of a model folder, as transformers finds them.

    Files come before ``tokenizer_config.json``, whatever names it has.

    Raises:
        BundleError: a file cannot be read.
    """
    found = {}
    if (folder / TEMPLATE_FILE).is_file():
        found["default"] = _template(folder / TEMPLATE_FILE)
    for file in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja")):
        found[file.name.removesuffix(".jinja")] = _template(file)
    config = folder / "tokenizer_config.json"
    if found or not config.is_file():
        return found
    given = read_object(config, BundleError, _AGAIN, nonfinite=True).get("chat_template")
    if isinstance(given, str):
        return {"default": given}
    if isinstance(given, list):  # several, by name
        given = {
            x["name"]: x.get("template")
            for x in given
            if isinstance(x, dict) and isinstance(x.get("name"), str)
        }
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(x, str) for x in given.values()):
        raise BundleError(f"{config}: chat_template is neither text nor named texts", _AGAIN)
    return dict(given)


def _template(file: Path) -> str:
    data = read_bytes(file, BundleError, _AGAIN, max_bytes=1 << 20)
    # transformers takes a byte order mark for text, so it is printed.
    mark = "\ufeff" if data.startswith(b"\xef\xbb\xbf") else ""
    return mark + decode_text(data, str(file), BundleError, _AGAIN)
