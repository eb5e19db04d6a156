"""What README.md points at is there."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_link_to_a_file_resolves():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 20 and all((ROOT / link).exists() for link in links if not link.startswith(("http", "#"))), links


def test_every_function_in_the_paper_to_code_table_exists_in_the_file_it_links_to():
    table = README[README.index("## From the paper to the code"):README.index("## The number of GPUs")]
    named = re.findall(r"\[`(\w+)\.(\w+)`\]\(([\w/.]+)\)", table)
    assert len(named) > 9
    for module, name, path in named:
        found = importlib.import_module(module)
        assert callable(getattr(found, name)) and Path(found.__file__) == ROOT / path, (module, name)


def test_every_preset_of_the_table_exists_and_no_other():
    from train import PRESETS
    table = README[README.index("## Models"):README.index("## The files")]
    assert set(re.findall(r"^\| `([a-z]\w+)` \|", table, re.M)) == set(PRESETS)


def test_the_lines_that_a_worked_modification_changes_are_there():
    blocks = re.findall(r"```diff\n--- (\S+)\n(.*?)```", README, re.S)
    assert len(blocks) == 5
    for path, block in blocks:
        source = (ROOT / path).read_text()
        before, after = ([line[1:].removesuffix("...").rstrip() for line in block.splitlines() if line[0] in signs] for signs in ("- ", "+ "))
        assert any(all(line in source for line in lines) for lines in (before, after)), (path, block)  # after: it was applied
