"""What every test finds: no native library that the user may have built."""

from __future__ import annotations

import os

os.environ["LORA_EDGE_NATIVE"] = "0"
