"""Who can take part, by name; each class is imported in the process that runs it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from lora_edge.bench.players.player import Player

PLAYERS = {
    "bundle": "lora_edge.bench.players.own:BundlePlayer",
    "graph": "lora_edge.bench.players.own:GraphPlayer",
    "genai": "lora_edge.bench.players.genai:GenaiPlayer",
    "llama.cpp": "lora_edge.bench.players.llama_cpp:LlamaCppPlayer",
    "openvino": "lora_edge.bench.players.openvino:OpenvinoPlayer",
    "peft": "lora_edge.bench.players.pytorch:PeftPlayer",
    "optimum": "lora_edge.bench.players.pytorch:OptimumPlayer",
}


def make(name: str, given: Mapping[str, Any]) -> Player:
    """The player of a name; nothing is imported or opened yet."""
    module, _, cls = PLAYERS[name].partition(":")
    player: Player = getattr(importlib.import_module(module), cls)(given)
    return player
