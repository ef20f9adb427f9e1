"""A CI job's check of a bundle: golden cases, reports, and a comparison with an earlier report.

python examples/validate_in_ci.py BUNDLE REPORTS [BASELINE]      # folders; an earlier report.json

Needs lora-edge[cpu]; no PyTorch. Exits as `lora-edge validate` does: 0 all is proved; 1 a case
failed, is unproved or got worse; 2 it could not run.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def main(bundle: str, reports: Path, baseline: str | None) -> int:
    reports.mkdir(parents=True, exist_ok=True)
    found = reports / "report.json"
    command = [sys.executable, "-m", "lora_edge", "validate", bundle, "--quick"]
    command += ["--json", str(found), "--html", str(reports / "report.html")]
    command += ["--junit", str(reports / "junit.xml"), "--repro", str(reports / "repro")]
    if baseline is not None:
        command += ["--baseline", baseline]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    if code == 2:
        print("the bundle could not be validated")
        return code

    report = json.loads(found.read_text(encoding="utf-8"))
    print(report["summary"])
    for case in report["cases"]:
        if case["status"] != "passed":
            print(f"{case['status']}: {case['name']}: {case['reason']}")
    worst = max(case["figures"]["effect_error"] for case in report["cases"] if case["figures"])
    print(f"largest error relative to an adapter's effect: {worst:.1e}")
    return code


if __name__ == "__main__":
    given = sys.argv[3] if len(sys.argv) > 3 else None
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), given))
