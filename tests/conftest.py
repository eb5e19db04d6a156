"""The top level and the tools can be imported, and results do not depend on the test order."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
