"""What README.md points at is there, and its worked modifications still apply."""

import importlib
import re
from pathlib import Path

import pytest

from train import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DIFFS = re.findall(r"```diff\n--- (\S+)\n(.*?)```", README, re.S)


def test_every_link_to_a_file_resolves():
    text = re.sub("```.*?```", "", README, flags=re.S)
    links = re.findall(r"\]\(([^)]+)\)", text)
    files = [link for link in links if not link.startswith(("http", "#"))]
    assert len(files) > 10 and all((ROOT / file).exists() for file in files), files


def test_every_function_in_the_paper_to_code_table_exists_in_the_file_it_links_to():
    named = re.findall(r"\[`(\w+)\.(\w+)`\]\(([\w/.]+)\)", README)
    assert len(named) > 9
    for module, name, path in named:
        found = importlib.import_module(module)
        assert callable(getattr(found, name)) and Path(found.__file__) == ROOT / path


def test_every_preset_of_the_table_exists_and_no_other():
    table = README[README.index("## Models"):README.index("## Reading order")]
    assert set(re.findall(r"^\| `([a-z]\w+)` \|", table, re.M)) == set(PRESETS)


def test_the_line_counts_are_right_within_a_tenth():
    for file, lines in re.findall(r"^\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|", README, re.M):
        actual = len((ROOT / file).read_text().splitlines())
        assert abs(actual - int(lines)) <= 0.1 * actual, (file, actual)


def test_there_are_worked_modifications():
    assert len(DIFFS) == 6


@pytest.mark.parametrize("file, diff", DIFFS)
def test_a_worked_modification_applies_and_compiles(file, diff):
    source = (ROOT / file).read_text()
    for hunk in re.split(r"^@@.*\n", diff, flags=re.M)[1:]:
        lines = hunk.splitlines()
        old, new = ("".join(line[1:] + "\n" for line in lines if line[0] in signs)
                    for signs in (" -", " +"))
        assert source.count(old) == 1, (file, hunk)
        source = source.replace(old, new)
    compile(source, file, "exec")
