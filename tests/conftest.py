"""Shared by the tests: the modules of the top level can be imported, and results do not depend on the test order."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
