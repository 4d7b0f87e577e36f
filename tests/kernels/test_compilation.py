import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus_that_are_not_here(capability: int) -> None:
    """The interpreter runs some kernels that the compiler refuses."""
    program = Path(__file__).with_name("compiling.py")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, program, str(capability)], env=environment, check=True)
