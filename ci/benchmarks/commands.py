"""What whole commands take: an export with its proof, and an adapter that is added."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from made import ON, Made
from row import Kind, Row


def _command(name: str, text: str, most: float, kind: Kind = "value") -> Row:
    """A row that no bench and no bundle is behind."""
    return Row(name, text, "", (), "", "", "", {"": most}, least=False, kind=kind)


_ROWS = (
    _command(
        "export-peak", "export with proof, peak memory / model bytes in float32", 2.0, "ratio"
    ),
    _command("export-cpu", "export with proof, CPU s", 60.0),
    _command("export-int4-peak", "export with proof, int4, peak memory in GB", 12.0),
    _command("add-cpu", "add an adapter to an int4 bundle, CPU s", 1.0),
)
COMMANDS = {row.name: row for row in _ROWS}


def measure_command(name: str, made: Made) -> float:
    """Run the command of a row in a process of its own; the row's figure.

    Raises:
        RuntimeError: the command failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        if name == "add-cpu":
            bundle = Path(folder) / "bundle"
            shutil.copytree(made.bundle("int4").directory, bundle, copy_function=os.link)
            return _run(["add", str(bundle), "-a", f"new={made.adapter(0)}"])[0]
        command = ["export", str(made.base()), "-a", f"{ON}={made.adapter(0)}"]
        if name == "export-int4-peak":
            command += ["--precision", "int4"]
        seconds, peak = _run([*command, "-o", str(Path(folder) / "bundle")])
    if name == "export-cpu":
        return seconds
    return peak / 1e9 if name == "export-int4-peak" else peak / made.base_bytes()


_COUNTED = """
import sys
from pathlib import Path
from lora_edge.__main__ import main
peak = Path(sys.argv.pop(1))
try:
    main()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    peak.write_text(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def _run(arguments: list[str]) -> tuple[float, int]:
    """CPU seconds and peak bytes of a command."""
    with tempfile.TemporaryFile() as said, tempfile.NamedTemporaryFile() as peak:
        process = subprocess.Popen(
            [sys.executable, "-c", _COUNTED, peak.name, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=said,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            tail = said.read().decode("utf-8", "replace")[-2000:]
            raise RuntimeError(f"lora-edge {' '.join(arguments)} failed:\n{tail}")
        # usage.ru_maxrss would count the process that started this one.
        return usage.ru_utime + usage.ru_stime, int(peak.read()) * 1024
