import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["peftprof.trace", "peftprof.report.breakdown", "peftprof.report.export"]
)
def test_reading_and_showing_import_no_torch(module: str) -> None:
    heavy = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "pandas"]
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
