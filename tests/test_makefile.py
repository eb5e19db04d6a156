"""What make runs for given variables; nothing is really started."""

import os
import subprocess
import sys
from dataclasses import asdict

import pytest

import train
from conftest import ROOT
from model import CHECKPOINT_FORMAT, ModelConfig


@pytest.fixture
def dry_run(tmp_path):
    """`make -n` in an empty folder; `gpus`: how many nvidia-smi finds."""
    def run(*arguments, gpus=0, **environment):
        fake = tmp_path / "bin" / "nvidia-smi"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/bin/sh\nfor i in $(seq {gpus}); do echo GPU $i: H100; done\n")
        fake.chmod(0o755)
        return subprocess.run(
            ["make", "-n", "-f", str(ROOT / "Makefile"), f"PYTHON={sys.executable}", *arguments],
            cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": f"{fake.parent}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment})

    return run


@pytest.mark.parametrize("preset, gpus, processes", [
    ("demo", 8, 4), ("demo", 3, None), ("fcos_R_50_FPN_1x", 8, 8), ("demo", 1, None)])
def test_as_many_gpus_are_used_as_share_the_batch_evenly(dry_run, preset, gpus, processes):
    printed = dry_run("train", f"MODEL={preset}", "DATA=/x", gpus=gpus)
    assert printed.returncode == 0, printed.stderr
    if processes:
        assert f"--nproc-per-node {processes} --standalone train.py {preset}" in printed.stdout
    else:
        assert f"{sys.executable} train.py demo" in printed.stdout


def test_evaluation_takes_all_gpus_and_resume_those_that_share_the_runs_batch(dry_run, tmp_path):
    printed = dry_run("eval", "train", "RUN=runs/a", "DATA=/x", gpus=8).stdout
    assert "--nproc-per-node 8 --standalone evaluate.py" in printed
    assert "--nproc-per-node 4 --standalone train.py" in printed
    run = tmp_path / "it's a run"
    run.mkdir()
    train.save_checkpoint(run, {
        "format": CHECKPOINT_FORMAT, "step": 1, "model": {},
        "categories": {"ids": [1], "names": ["cat"]},
        "config": {"model": asdict(ModelConfig(num_classes=1)), "batch_size": 12}})
    assert "--nproc-per-node 4" in dry_run("resume", f"RUN={run}", gpus=8).stdout
    assert not dry_run("train", "MODEL=typo", "DATA=/x", gpus=8).stderr


def test_the_last_run_may_have_spaces_and_its_data_may_have_moved(dry_run, tmp_path):
    for n, name in enumerate(("first run", "it's the last"), start=1):
        checkpoint = tmp_path / "runs" / name / "checkpoint-0000001.pt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        os.utime(checkpoint, (n, n))
    last = "'runs/it'\\''s the last'"
    assert f"train.py --resume --run-dir {last} --data 'a b'" in dry_run(
        "resume", "DATA=a b").stdout
    assert f"plots.py evaluation {last} --data 'a b'" in dry_run("plots", "DATA=a b").stdout


def test_gpus_that_are_hidden_are_not_counted(dry_run):
    for visible, launch in (("", f"{sys.executable} train.py"), ("2,3", "--nproc-per-node 2")):
        assert launch in dry_run("train", "DATA=/x", gpus=8, CUDA_VISIBLE_DEVICES=visible).stdout


def test_gpus_that_are_given_are_taken(dry_run):
    assert "--nproc-per-node 2" in dry_run("train", "DATA=/x", "GPUS=2", gpus=8).stdout
    for arguments in (["train", "DATA=/x"], ["predict", "RUN=a", "IMAGES=b"]):
        assert "CUDA_VISIBLE_DEVICES= " in dry_run(*arguments, "GPUS=0", gpus=8).stdout


@pytest.mark.parametrize("arguments, says", [
    (["train", "GPUS=abc"], "GPUS=abc: must be a number of processes"),
    (["train", "DATA=/x", "NNODES=2"], "name the first machine: MASTER=host:port"),
    (["resume"], "no run in runs/ yet"),
    (["eval"], "no run in runs/ yet"),
    (["predict", "RUN=runs/a"], 'make predict IMAGES="a.jpg folder/"'),
    (["check"], "name a COCO-format folder: DATA=")])
def test_what_is_missing_is_said_in_a_line(dry_run, arguments, says):
    printed = dry_run(*arguments)
    assert printed.returncode != 0 and says in printed.stderr


def test_letters_of_the_shell_in_file_names_are_not_executed(dry_run):
    names = "$(touch hit).jpg `touch hit`.jpg it's.jpg a;b.jpg"
    printed = dry_run("predict", "RUN=runs/a run", f"IMAGES={names.replace('$', '$$')}")
    (command,) = [line for line in printed.stdout.splitlines() if "--images" in line]
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {command.split('evaluate.py')[1]}"],
                           capture_output=True, text=True).stdout.splitlines()
    assert words == ["runs/a run", "--images", *names.split(" ")]
