"""Texts and conversations on which two tokenizers are compared.

What tokenizers treat apart: scripts, combining marks, emoji, digits, white space, code, special
tokens written out. What templates treat apart: roles, tools, documents, reasoning, parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEXTS: tuple[str, ...] = (
    "",
    " ",
    "  two  spaces  ",
    "\n",
    "a\n\n\nb\r\n\tc",
    "Hello, world!",
    " leading and trailing ",
    "It's 3.14159, isn't it? We've won 1,234,567 times.",
    "UPPER lower Title camelCase snake_case kebab-case",
    "naïve café Ångström ﬁne ½ ²",
    "e\u0301 e\u0301\u0327 \u1e69 s\u0323\u0307",  # combining marks, in both orders
    "Größe, Übermaß, ẞ",
    "Привет, мир! Как дела?",
    "Γειά σου Κόσμε, ΟΔΥΣΣΕΥΣ",
    "שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया ก็ไม่รู้ ខ្មែរ",
    "你好，世界！漢字とひらがな、カタカナ。한국어 텍스트",
    "😀👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪 ❤️ ☃",
    "𝒳𝓎𝓏 𐍈 \U0010ffff",
    "zero\u200bwidth\u200djoin\ufeffbom nbsp\u00a0em\u2003line\u2028sep",
    "control \x00\x01\x1b\x7f end",
    "\ufffd replacement",
    "def f(x: int) -> list[int]:\n    return [i ** 2 for i in range(x)]  # squares\n",
    '{"key": [1, 2.5e-3, null], "q": "a\\"b"}',
    "<s></s><|im_start|>user<|im_end|><|endoftext|>[INST][/INST][CLS][SEP]<pad><unk>",
    " <s> hi </s> ",
    "https://example.org/a?b=c&d=%20#e me@example.org",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "0 00 000 0000 00000 2024-11-28 12:34:56",
    "▁under ▁▁ ##ing Ġ Ċ ĉ",
    "don't can't I'm you're we'll they'd",
    "The quick brown fox jumps over the lazy dog. " * 6,
)

_PARTS = [{"type": "text", "text": "What is in "}, {"type": "text", "text": "this picture?"}]
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Zürich <b>", "days": 3}},
        }
    ],
}
_RESULT = {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "12 °C"}


def _turns(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    made = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return made if system is None else [{"role": "system", "content": system}, *made]


CONVERSATIONS: tuple[list[dict[str, Any]], ...] = (
    _turns("Hi"),
    _turns(" Hi, I am  Zoë 👋\n", "Hello!\n", "What's 2 < 3 & 'x'?"),
    _turns("Hi", system="You are terse."),
    _turns("Hi", "Hello", "Bye", system="  Two\n\nlines. "),
    _turns("a", "<think>\nlet me see\n</think>\n\nb", "c"),
    _turns("Hi", "Hello"),
    [{"role": "user", "content": _PARTS}],
    [*_turns("Weather?"), _CALL, _RESULT, *_turns("And in Bern?")],
    [*_turns("Weather?"), {**_CALL, "content": None}, _RESULT],
    [*_turns("Sum?"), {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}],
    [*_turns("Sum?"), {"role": "assistant", "content": "4", "thinking": "2 and 2"}],
    [*_turns(""), {"role": "assistant", "content": ""}],
    _turns("Hi", "Hello", "Hi", "Hello", "Hi", "Hello", "Hi"),
    [{"role": "developer", "content": "Be kind."}, *_turns("Hi")],
)
TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city, for so many days from today on, in °C.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "A city"},
                    "days": {"type": "integer", "enum": [1, 2, 3]},
                    "units": {"type": ["string", "number"]},
                    "more": {"type": "array", "items": {"type": "number"}},
                },
                "required": ["city"],
            },
        },
    },
)
DOCUMENTS: tuple[Mapping[str, Any], ...] = (
    {"title": "Bern", "text": "Bern is the capital of Switzerland."},
    {"title": "Größe", "text": "12 m"},
)
CONTEXTS: tuple[dict[str, Any], ...] = (
    {},
    {"tools": list(TOOLS)},
    {"documents": list(DOCUMENTS)},
    {"tools": list(TOOLS), "documents": list(DOCUMENTS)},
)
"""What a template is given beside the messages."""
