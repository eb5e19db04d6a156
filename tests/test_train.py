"""Training is exact however it is split, and it survives: processes really killed and stopped."""

import copy
import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch

import data
import evaluate
import train
from conftest import FORKS, ROOT, edit, finish, link_copy, start
from data import UserError
from make_shapes import SHAPES, make_shapes
from model import FCOS, ModelConfig, checkpoints_of, load_checkpoint
from train import PRESETS

# SGD at a gentle rate: AdamW magnifies the rounding of sums that are taken in another order.
TINY = ("demo --channels 8 --tower-depth 1 --frozen-stages 5 --train-short-sides 64 64 "
        "--short-side 64 --batch-size 8 --steps 12 --epochs 0 --optimizer sgd --lr 0.001 "
        "--log-every 2 --checkpoint-every 3 --eval-every 4 --precision fp32 "
        "--num-workers 0 --score-threshold 0").split()


def main(*options):
    """train.py in this process, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, options)])
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(train, "catch_signals", list)  # pytest's own handlers stay
        train.main()


def wait_for(condition, timeout=120):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def metrics_of(run):
    """RUN/metrics.jsonl without what depends on the clock."""
    path = run / "metrics.jsonl"
    entries = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in entry.items()
             if key not in ("images_per_second", "seconds")} for entry in entries]


def assert_equal_runs(run, other):
    """The same weights, bit for bit, and the same history."""
    a, b = load_checkpoint(run)["model"], load_checkpoint(other)["model"]
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert metrics_of(run) == metrics_of(other)


def assert_close_runs(run, other, steps):
    """The same losses and weights, up to the order of sums."""
    a, b = ([e for e in metrics_of(r) if "cls" in e] for r in (run, other))
    assert [e["step"] for e in a] == [e["step"] for e in b] == steps
    for x, y in zip(a, b):
        for name in train.TERMS:
            assert x[name] == pytest.approx(y[name], abs=5e-5, rel=1e-4), (x["step"], name)
    a, b = load_checkpoint(run)["model"], load_checkpoint(other)["model"]
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums depend on the number of threads; the processes started have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """48 generated images; two of three have nothing but a box between the locations."""
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, num_train=48, num_val=8, size=64)

    def hide(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 3 == 0]
        content["annotations"] += [
            {"id": 1000 + i, "image_id": i, "category_id": 1, "bbox": [5, 5, 2, 2], "iscrowd": 0}
            for i in range(1, 49) if i % 3]

    edit(root / "annotations" / "instances_train.json", hide)
    return root


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    main(*TINY, "--data", dataset, "--run-dir", run)
    return run


@pytest.fixture(scope="module")
def finished(uninterrupted):
    return load_checkpoint(uninterrupted)


# --- the number of processes changes nothing ----------------------------------------------------

@pytest.mark.parametrize("world, microbatch", [(1, 2), (2, 2)])
def test_processes_and_microbatches_change_neither_losses_nor_weights(
        dataset, uninterrupted, finished, tmp_path, world, microbatch):
    split = data.open_split(dataset, "train")
    sampler = data.TrainSampler(split.annotations.sizes, split.with_boxes(),
                                train.parse_arguments(TINY).config)
    # the images of a whole process have no positive location
    empty = [all(request.index % 3 != 2 for request in batch)
             for batch in data.microbatches(sampler, range(12), 1, rank=1, world=2)]
    assert 0 < sum(empty) < 12
    run = tmp_path / "run"
    codes = finish(start(tmp_path / "log", *TINY, "--skip-eval", "--data", dataset, "--run-dir",
                         run, "--microbatch", microbatch, world=world))
    assert codes == [0] * world, (tmp_path / "log").read_text()
    assert_close_runs(run, uninterrupted, steps=[2, 4, 6, 8, 10, 12])


def test_microbatches_are_equal_and_at_most_as_large_as_asked_for():
    for world, microbatch, expected in ((1, 0, 1), (1, 9, 1), (1, 4, 2), (1, 3, 4), (2, 3, 2)):
        config = replace(PRESETS["demo"], batch_size=8, microbatch=microbatch)
        assert train.count_microbatches(config, world) == expected
    with pytest.raises(UserError, match="8 images .* 6 processes; start 2 .GPUS=.*--batch-size"):
        train.count_microbatches(config, 6)


def test_evaluation_takes_no_more_images_at_once_than_a_microbatch(dataset, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *_, batch_size, **__: taken.append(batch_size))
    main(*TINY, "--data", dataset, "--run-dir", tmp_path, "--steps", 1, "--microbatch", 2)
    assert taken == [2]


# --- it survives --------------------------------------------------------------------------------

def test_killed_at_random_moments_it_resumes_bit_for_bit(dataset, uninterrupted, tmp_path):
    draw, run, log = random.Random(0), tmp_path / "run", tmp_path / "log"
    process = start(log, *TINY, "--data", dataset, "--run-dir", run, "--num-workers", 1)
    wait_for(lambda: checkpoints_of(run))
    for kill in range(3):
        time.sleep(draw.uniform(0, 1.5))
        process[0].kill()
        process[0].join()
        process = start(log, "--resume", "--run-dir", run)
    assert finish(process) == [0], log.read_text()
    assert_equal_runs(run, uninterrupted)


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("owner, function, calls, error, saved", [
    (train.Progress, "push", 5, RuntimeError, 4),  # the weights are those of step 6 already
    (train, "save_checkpoint", 2, Killed, 3),  # its line is written; step 3 waited for its own
    (evaluate, "evaluate", 0, Killed, 4),
    (evaluate, "evaluate", 2, Killed, 12),
    (data.CocoDataset, "load", 6, UserError, 5)],  # saves what was trained, unlike a kill
    ids=["after an update", "before a save", "before an evaluation", "before the last evaluation",
         "in loading"])
def test_what_was_due_when_it_ended_is_made_up_for(
        dataset, uninterrupted, tmp_path, monkeypatch, owner, function, calls, error, saved):
    original, left = getattr(owner, function), iter(range(calls))

    def fails(*args, **options):
        if next(left, None) is None:
            raise error
        return original(*args, **options)

    monkeypatch.setattr(owner, function, fails)
    with pytest.raises(error):
        main(*TINY, "--data", dataset, "--run-dir", tmp_path)
    assert load_checkpoint(tmp_path)["step"] == saved
    assert metrics_of(tmp_path) != metrics_of(uninterrupted)
    monkeypatch.undo()
    main("--resume", "--run-dir", tmp_path)
    assert_equal_runs(tmp_path, uninterrupted)


def test_sigterm_finishes_the_step_saves_and_exits_with_143(dataset, uninterrupted, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(log, *TINY, "--num-workers", 1, "--data", dataset, "--run-dir", run)
    wait_for(lambda: metrics_of(run))
    os.killpg(process[0].pid, signal.SIGTERM)  # as job schedulers do
    assert finish(process) == [128 + signal.SIGTERM]
    assert f"make resume RUN={run}" in log.read_text() and "Traceback" not in log.read_text()
    assert 2 <= load_checkpoint(run)["step"] < 12
    main("--resume", "--run-dir", run)
    assert_equal_runs(run, uninterrupted)


def test_torchrun_restarts_after_a_kill_and_passes_sigterm_on(dataset, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "1", ROOT / "train.py", *TINY, "--skip-eval", "--steps", 100_000,
               "--data", dataset, "--run-dir", run]
    with open(log, "w") as file:
        torchrun = subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    wait_for(lambda: checkpoints_of(run) and checkpoints_of(run)[0].stem > "checkpoint-0000002")
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)],
                              capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    wait_for(lambda: "resuming from step" in log.read_text())
    step = load_checkpoint(run)["step"]
    wait_for(lambda: checkpoints_of(run)[0].stem > f"checkpoint-{step:07d}")
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)],
                              capture_output=True, text=True).stdout.split()
    for pid in (*children, torchrun.pid):  # as job schedulers do; torchrun passes its own on
        os.kill(int(pid), signal.SIGTERM)
    assert torchrun.wait(60) != 0 and f"make resume RUN={run}" in log.read_text()
    assert load_checkpoint(run)["step"] > step


def test_a_loss_that_is_not_finite_stops_all_processes_and_keeps_the_checkpoint(dataset, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    codes = finish(start(log, *TINY, "--skip-eval", "--lr", "1e20", "--grad-clip", 0, "--box-unit",
                         "pixel", "--data", dataset, "--run-dir", run, world=2))
    assert codes == [1, 1] and "Traceback" not in log.read_text()
    (told,) = re.findall(r"error: the loss .* not finite at step (\d+) \(cls \S+, box \S+, "
                         r"centerness \S+, lr \S+, images \[([\d, ]+)\]\).*--init-from",
                         log.read_text())  # one message of two processes
    assert int(told[0]) > 0 and len(told[1].split(",")) == 8
    assert all(value.isfinite().all() for value in load_checkpoint(run)["model"].values())


def test_weights_that_are_not_finite_are_never_saved(dataset, tmp_path):
    with pytest.raises(UserError, match="weights are not finite at step 0 .*--init-from"):
        main(*TINY, "--data", dataset, "--run-dir", tmp_path, "--steps", 1, "--lr", "1e40",
             "--grad-clip", 0)  # the update overflows
    assert load_checkpoint(tmp_path)["step"] == 0 and not (tmp_path / "best.pt").exists()


def test_initial_weights_that_are_not_finite_are_told(dataset, uninterrupted, finished, tmp_path):
    broken = copy.deepcopy(finished)
    broken["model"]["scales"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pt")
    with pytest.raises(UserError, match="the initial weights are not finite; .*--init-from"):
        main("demo", "--init-from", tmp_path / "nan.pt", "--data", dataset, "--run-dir",
             tmp_path / "run", "--skip-eval")


def test_checkpoints_under_other_names_are_the_users(tmp_path):
    users = {"best.pt", "checkpoint-best.pt", "checkpoint-0000010-keep.pt"}
    for name in users:
        (tmp_path / name).write_text("kept")
    (tmp_path / "checkpoint-0000003.pt.part").write_bytes(b"left by a kill")
    for step in (3, 9_999_999, 10_000_000):
        train.save_checkpoint(tmp_path, {"step": step})
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-10000000.pt",
                                                                "checkpoint-9999999.pt"]
    assert {path.name for path in tmp_path.iterdir()} == users | {"checkpoint-10000000.pt",
                                                                  "checkpoint-9999999.pt"}
    assert all((tmp_path / name).read_text() == "kept" for name in users)


def test_damaged_checkpoints_ahead_do_not_count_among_the_last_two(tmp_path):
    for step in (1, 2, 3, 7, 4, 5, 8):  # 7 is damaged, so the run went on from 3
        train.save_checkpoint(tmp_path, {"step": step})
    assert [int(path.stem[11:]) for path in checkpoints_of(tmp_path)] == [8, 5]


def test_a_dropout_is_the_same_after_a_resume(dataset, tmp_path, monkeypatch):
    class WithDropout(FCOS):
        def normalize(self, images, image_sizes):
            x = super().normalize(images, image_sizes)
            return torch.nn.functional.dropout(x, training=self.training)

    monkeypatch.setattr(train, "FCOS", WithDropout)
    options = [*TINY, "--skip-eval", "--data", dataset, "--steps", 6]
    main(*options, "--run-dir", tmp_path / "whole")
    original, left = train.training_step, iter(range(4))

    def step(*args):
        if next(left, None) is None:
            raise Killed
        return original(*args)

    monkeypatch.setattr(train, "training_step", step)
    with pytest.raises(Killed):
        main(*options, "--run-dir", tmp_path / "killed")
    monkeypatch.setattr(train, "training_step", original)
    torch.rand(7)  # the generator of this process is elsewhere
    main("--resume", "--run-dir", tmp_path / "killed", "--skip-eval")
    assert_equal_runs(tmp_path / "killed", tmp_path / "whole")


def _wait_for_signals(ready):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    train.catch_signals()
    ready.touch()
    time.sleep(100)


def test_nohup_keeps_a_run_going():
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGHUP, signal.SIGTERM,
                                                            signal.SIGINT)}
    train.catch_signals()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_two_seconds_after_the_first_ends_the_process_at_once(tmp_path, number):
    process = FORKS.Process(target=_wait_for_signals, args=(tmp_path / "ready",))
    process.start()
    wait_for((tmp_path / "ready").exists)
    for _ in range(2):
        os.kill(process.pid, number)
        process.join(0.5)
        assert process.is_alive()
    time.sleep(1.5)
    os.kill(process.pid, number)
    assert finish([process], timeout=5) == [-number]


def test_a_line_of_metrics_that_cannot_be_written_is_a_warning(dataset, tmp_path, capsys):
    class Full(train.Progress):
        def __init__(self, run, checkpoint):
            super().__init__(run, checkpoint)
            self.path = tmp_path / "absent" / "metrics.jsonl"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Progress", Full)
        main(*TINY, "--skip-eval", "--data", dataset, "--steps", 2, "--run-dir", tmp_path / "run")
    assert "warning: " in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run")["step"] == 2


def test_all_machines_see_the_run_folder_as_rank_0_does(uninterrupted, tmp_path):
    runs = [link_copy(uninterrupted, tmp_path / f"run-{rank}") for rank in (0, 1)]
    (runs[0] / ".lock").unlink()  # its other name is locked by this process
    checkpoints_of(runs[0])[0].unlink()  # as a network drive may show it
    processes = start(tmp_path / "log", "--resume", "--run-dir", tmp_path / "run-RANK", world=2)
    assert finish(processes, timeout=30) == [0, 0], (tmp_path / "log").read_text()
    assert_close_runs(runs[0], uninterrupted, steps=[2, 4, 6, 8, 10, 12])


def test_an_error_of_rank_0_ends_all_processes_and_is_printed_once(
        dataset, uninterrupted, tmp_path):
    run, log = link_copy(uninterrupted, tmp_path / "run"), tmp_path / "log"
    assert finish(start(log, *TINY, "--data", dataset, "--run-dir", run, world=2)) == [1, 1]
    assert log.read_text().count("already holds a run") == 1
    assert "Traceback" not in log.read_text()


def test_a_machine_that_does_not_share_the_run_folder_is_told(dataset, tmp_path):
    processes = start(tmp_path / "log", *TINY, "--data", dataset, "--run-dir",
                      tmp_path / "run-RANK", world=2)
    assert finish(processes)[1] == 1
    assert "not the folder of rank 0; machines must share it" in (tmp_path / "log").read_text()


def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(train.fcntl, "lockf", unsupported)
    train.lock(tmp_path, fresh=True)
    assert f"warning: {tmp_path}: cannot be locked" in capsys.readouterr().out


def test_only_a_restart_by_the_same_torchrun_goes_on_with_a_run(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    main(*TINY, "--skip-eval", "--data", dataset, "--steps", 2, "--run-dir", tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    args = train.parse_arguments(["demo", "--run-dir", str(tmp_path), "--data", str(dataset)])
    assert train.load_run(args)[1]["step"] == 2
    (tmp_path / ".lock").write_text("none")  # every torchrun of several machines without an id
    for launch in ("second", "none"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        with pytest.raises(UserError, match="already holds a run"):
            train.load_run(args)


def test_a_failed_start_leaves_no_run_folder(dataset, tmp_path):
    for options in (["--center-radius", "0.01"], ["--data", tmp_path], ["--batch-size", 0]):
        with pytest.raises(UserError):
            main(*TINY, "--data", dataset, "--run-dir", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_torn_and_foreign_lines_of_metrics_are_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\nnoise\n[1]\n7\n\xff\n{"a": 1}\n{"step": "2"}\n\n{"step": 2}\n{"step": 3, "l')
    assert train.read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_second_training_in_the_same_folder_is_refused(dataset, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    train.lock(run, fresh=False)
    assert finish(start(log, *TINY, "--data", dataset, "--run-dir", run)) == [1]
    assert f"error: {run}: another process is training here" in log.read_text().splitlines()[-1]
    assert [path.name for path in run.iterdir()] == [".lock"]


def _die_with_a_worker(run):
    train.lock(run, fresh=False)
    if os.fork() == 0:
        time.sleep(5)  # as long as a loader worker takes to see that training is gone
    os._exit(0)


def test_a_worker_that_outlives_its_training_does_not_keep_the_folder(tmp_path):
    killed = FORKS.Process(target=_die_with_a_worker, args=(tmp_path,))
    killed.start()
    assert finish([killed]) == [0]
    train.lock(tmp_path, fresh=False)


# --- resume and init-from -----------------------------------------------------------------------

def resume(checkpoint, run, *options):
    """Go on from a checkpoint, as if it were the run's newest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_checkpoint", lambda path: checkpoint)
        main("--resume", "--run-dir", run, *options)


def test_a_run_keeps_the_best_weights_and_what_it_told(uninterrupted, finished):
    entries = metrics_of(uninterrupted)
    assert [e["step"] for e in entries if "AP" in e] == [4, 8, 12]
    assert [e["step"] for e in entries if "cls" in e] == [2, 4, 6, 8, 10, 12]
    best = max((e for e in entries if "AP" in e), key=lambda e: (e["AP"], e["step"]))
    assert load_checkpoint(uninterrupted / "best.pt")["step"] == best["step"]
    assert [path.name for path in checkpoints_of(uninterrupted)] == ["checkpoint-0000012.pt",
                                                                     "checkpoint-0000009.pt"]
    assert finished["categories"] == {"ids": [1, 2, 3], "names": list(SHAPES)}
    assert (uninterrupted / "detections.png").exists()


def test_a_finished_run_says_so_and_another_never_overwrites_it(
        dataset, uninterrupted, finished, capsys):
    before = metrics_of(uninterrupted)
    main("--resume", "--run-dir", uninterrupted)
    assert "finished, nothing left to train; --init-from" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a run; resume it .make resume RUN="):
        main(*TINY, "--data", dataset, "--run-dir", uninterrupted)
    assert metrics_of(uninterrupted) == before


def test_a_folder_whose_checkpoints_were_deleted_keeps_its_best_weights(dataset, tmp_path):
    (tmp_path / "best.pt").write_text("kept")
    with pytest.raises(UserError, match="already holds a run"):
        main(*TINY, "--data", dataset, "--run-dir", tmp_path)
    with pytest.raises(UserError, match="no checkpoint.* or a file, such as its best.pt"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("options, words", [
    (["--lr", "0.1"], "keeps the configuration of .*; leave out --lr, or .*--init-from"),
    (["demo", "--short-side", "64"], "leave out --short-side, demo")])
def test_resume_refuses_another_configuration(uninterrupted, options, words):
    with pytest.raises(UserError, match=words):
        main(*options, "--resume", "--run-dir", uninterrupted)


def test_resume_takes_what_may_change(uninterrupted, finished, tmp_path, capsys):
    resume(finished, link_copy(uninterrupted, tmp_path / "run"), "--microbatch", 2, "--log-every",
           3, "--skip-eval")
    assert "microbatches 4 of 2)" in capsys.readouterr().out


def test_resume_passes_over_a_damaged_newest_checkpoint(uninterrupted, tmp_path, capsys):
    run = link_copy(uninterrupted, tmp_path / "run")
    newest = checkpoints_of(run)[0]
    content = newest.read_bytes()
    newest.unlink()  # its other name keeps the content
    newest.write_bytes(content[:len(content) // 2])
    main("--resume", "--run-dir", run)
    assert "damaged" in capsys.readouterr().err
    assert_equal_runs(run, uninterrupted)


def other_boxes(content):
    content["annotations"][0]["bbox"][2] += 1


def renamed(content):
    content["categories"][1]["name"] = "oval"


@pytest.mark.parametrize("change, words", [
    (other_boxes, "this data has changed since .* started; .*--init-from"),
    (renamed, "categories are not those of .*: 2 'ellipse' is only there, 2 'oval' is only here")])
def test_resume_refuses_changed_data_and_categories(
        dataset, uninterrupted, tmp_path, change, words):
    root = link_copy(dataset, tmp_path / "data")
    for split in ("train", "val"):
        edit(root / "annotations" / f"instances_{split}.json", change)
    with pytest.raises(UserError, match=words):
        main("--resume", "--run-dir", uninterrupted, "--data", root)


def two_lines_of_the_model_exchanged(checkpoint):
    names = checkpoint["optimizer"]["param_groups"][0]["param_names"]
    names[0], names[1] = names[1], names[0]


@pytest.mark.parametrize("change, words", [
    (two_lines_of_the_model_exchanged, "optimizer state does not match this model; .*--init-from"),
    (lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.ones(1)),
     "its optimizer state does not match this model; .*--init-from"),
    (lambda c: c.pop("optimizer"), "its optimizer state does not match this model"),
    (lambda c: c["model"].pop("scales"), "weights do not match this model; .*scales"),
    (lambda c: c["config"].update(momentum=0.5), "fields this code does not know .momentum.; use"),
    (lambda c: c["config"].update(lr="x"), "--lr 'x': must be of the type of 0.01")])
def test_a_checkpoint_that_cannot_be_gone_on_from_says_why(uninterrupted, finished, change, words):
    checkpoint = copy.deepcopy(finished)
    change(checkpoint)
    with pytest.raises(UserError, match=words) as raised:
        resume(checkpoint, uninterrupted)
    assert "\n" not in str(raised.value)


def test_optimizer_state_takes_the_memory_format_of_the_weights(uninterrupted, tmp_path):
    run = link_copy(uninterrupted, tmp_path / "run")
    checkpoints_of(run)[0].unlink()
    checkpoint = load_checkpoint(run)  # of step 9, as a device with another format saves it
    for state in checkpoint["optimizer"]["state"].values():
        for key, value in state.items():
            if value.ndim == 4:
                state[key] = value.contiguous(memory_format=torch.channels_last)
    resume(checkpoint, run)
    assert_equal_runs(run, uninterrupted)


def test_init_from_takes_the_weights_and_the_outputs_of_classes_of_equal_names(
        uninterrupted, finished, capsys):
    config = ModelConfig(**{**finished["config"]["model"], "num_classes": 4})
    model, theirs = FCOS(config), finished["model"]
    before = model.head.cls_logits.weight.clone()
    train.init_from(model, uninterrupted, ["triangle", "cat", "rectangle", "dog"])
    ours = model.state_dict()
    for key in ("head.cls_logits.weight", "head.cls_logits.bias"):
        assert torch.equal(ours[key][[0, 2]], theirs[key][[2, 0]])
    assert torch.equal(ours["head.cls_logits.weight"][[1, 3]], before[[1, 3]])
    assert torch.equal(ours["fpn.inner_blocks.0.0.weight"], theirs["fpn.inner_blocks.0.0.weight"])
    assert "2 of 4 classes by name; newly initialised: cat, dog\n" in capsys.readouterr().out


def test_init_from_tells_classes_of_one_name_apart_by_their_position(uninterrupted, finished):
    model = FCOS(ModelConfig(**{**finished["config"]["model"], "num_classes": 3}))
    finished = finished | {"categories": {"ids": [1, 2, 3], "names": ["hole", "hole", "cat"]}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_checkpoint", lambda path: copy.deepcopy(finished))
        train.init_from(model, uninterrupted, ["hole", "hole", "hole"])
    theirs = finished["model"]["head.cls_logits.bias"]
    assert torch.equal(model.head.cls_logits.bias, theirs[[0, 1, 0]])


def test_init_from_starts_another_run_of_the_same_architecture(dataset, uninterrupted, tmp_path):
    other = load_checkpoint(uninterrupted)
    other["config"]["model"]["location_offset"] = 0.0  # as torchvision's
    torch.save(other, tmp_path / "other.pt")
    main("demo", "--init-from", tmp_path / "other.pt", "--data", dataset, "--run-dir", tmp_path,
         "--steps", 1, "--epochs", 0, "--frozen-stages", 5, "--skip-eval", "--num-workers", 0)
    checkpoint = load_checkpoint(tmp_path)
    model = checkpoint["config"]["model"]
    assert checkpoint["step"] == 1 and model["channels"] == 8 and model["location_offset"] == 0


# --- configuration ------------------------------------------------------------------------------

@pytest.mark.parametrize("config, rates", [
    (PRESETS["fcos_R_50_FPN_1x"], {0: 0.01 / 3, 499: 0.01 / 3, 500: 0.01, 59_999: 0.01,
                                   60_000: 1e-3, 79_999: 1e-3, 80_000: 1e-4, 89_999: 1e-4}),
    (replace(PRESETS["fcos_R_50_FPN_1x"], steps=90), {8: 0.01 / 3, 9: 0.01}),
    (replace(PRESETS["demo"], lr=1.0, steps=1000, warmup_steps=0), {0: 1, 500: 0.5, 1000: 0})],
    ids=["the paper's", "warm-up is a tenth at most", "cosine"])
def test_the_learning_rate_follows_its_schedule(config, rates):
    for step, lr in rates.items():
        assert train.lr_at(step, config) == pytest.approx(lr)


def test_without_a_c_compiler_the_network_is_not_compiled(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    config, device = PRESETS["fcos_R_50_FPN_1x"], torch.device("cuda")
    assert train.compile_and_distribute("the model", config, None, device) == "the model"
    assert "torch.compile needs a C compiler" in capsys.readouterr().out


def test_this_pytorch_knows_the_compile_options():
    torch.compile(torch.nn.Identity(), options=train.COMPILE_OPTIONS)  # raises on an unknown one


def test_biases_learn_twice_as_fast_and_do_not_decay():
    config = PRESETS["demo"]
    model = FCOS(replace(config.model, channels=8))
    weights, biases = train.build_optimizer(model, config).param_groups
    assert (biases["lr_factor"], biases["weight_decay"]) == (2, 0)
    assert (weights["lr_factor"], weights["weight_decay"]) == (1, 0.05)
    assert all(name.endswith("bias") for name in biases["param_names"])
    assert not any(name.endswith("bias") for name in weights["param_names"])


def test_every_field_is_an_option_and_its_comment_the_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        train.parse_arguments(["fcos_R_50_FPN_1x", "--help"])
    text = capsys.readouterr().out
    for f in (*fields(train.TrainConfig), *fields(ModelConfig)):
        if f.name not in ("model", "num_classes"):
            option = f.name.replace("_", "-")
            help_text = rf"^  --{option}\b.*?\n? {{2,}}(?!\(default)\w.+"
            assert re.search(help_text, text, re.M), option
    assert re.search(r"--canvas-sides N +how many .* may occur; fewer: fewer recompilations, more "
                     r"padding; 0: any \(default: 4\)", text)


def test_options_change_the_preset():
    args = train.parse_arguments("fcos_R_50_FPN_1x --batch-size 8 --epochs 0.5 --nms-iou 0.5 "
                                 "--train-short-sides 640 800 --no-enlarge".split())
    assert args.config == train.TrainConfig(batch_size=8, epochs=0.5, train_short_sides=(640, 800),
                                            model=ModelConfig(nms_iou=0.5, enlarge=False))


@pytest.mark.parametrize("option", [
    "--batch-size 0", "--steps 100000000000000000000", "--lr nan", "--flip 2", "--epochs=-1",
    "--train-short-sides 0 64", "--train-short-sides 800 640", "--channels 20"])
def test_a_value_that_cannot_be_meant_is_refused_in_a_sentence(option):
    name = re.match("--[a-z0-9-]+", option)[0]
    with pytest.raises(UserError, match=f"^{name} .*: (must be (at least|a mult)|the smaller)"):
        train.parse_arguments(["fcos_R_50_FPN_1x", *option.split()])


@pytest.mark.parametrize("options, sentence", [
    (["fcos_R_50_FPN_1x"], "no data; name a COCO-format folder with DATA="),
    (["fcos_R_50_FPN_1x_center_gio"], "invalid choice: 'fcos_R_50_FPN_1x_center_gio'"),
    (["demo", "--data", "nowhere"], "nowhere: no such folder; name the data with DATA="),
    (["--resume"], "run: no such run; name one with RUN="),
    (["demo", "--init-from", "nothing.pt", "--data", "."], "nothing.pt: no such file"),
    (["demo", "--init-from", "", "--data", "."], ": no checkpoint-*.pt here")])
def test_wrong_options_end_in_one_sentence(options, sentence, tmp_path, capsys):
    with pytest.raises((UserError, SystemExit)) as raised:
        main(*options, "--run-dir", tmp_path / "run")
    assert sentence in f"{raised.value} {capsys.readouterr().err}"


def test_boxes_without_a_location_are_counted_and_if_all_are_training_is_refused(
        dataset, tmp_path, capsys):
    main(*TINY, "--data", dataset, "--run-dir", tmp_path / "run", "--steps", 1, "--skip-eval")
    assert re.search(r"3\d of \d\d boxes, in .*, are not assigned", capsys.readouterr().out)
    with pytest.raises(UserError, match="no box is assigned to any location.*--center-radius"):
        main(*TINY, "--data", dataset, "--run-dir", tmp_path, "--center-radius", "0.01")


def test_other_categories_in_the_val_split_stop_before_training(dataset, tmp_path):
    root = link_copy(dataset, tmp_path / "data")
    edit(root / "annotations" / "instances_val.json", renamed)
    with pytest.raises(UserError, match="'ellipse'.*'oval'"):
        main(*TINY, "--data", root, "--run-dir", tmp_path / "run")
    assert not checkpoints_of(tmp_path / "run")
    (root / "annotations" / "instances_val.json").unlink()  # without evaluation it is not needed
    main(*TINY, "--data", root, "--run-dir", tmp_path / "run", "--steps", 1, "--skip-eval")
    assert load_checkpoint(tmp_path / "run")["step"] == 1
