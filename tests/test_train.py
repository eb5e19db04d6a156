"""Training is exact, whatever it is split over, and survives: processes really started, really killed, files really damaged."""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import train
from model import FCOS, ModelConfig, build_detector, checkpoints_of, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
BCCD = ROOT.parent / "shared" / "data" / "bccd"
# A detector so small that a start takes longer than its training. SGD at a gentle rate: AdamW or a rough start would magnify
# the rounding of sums taken in another order from 1e-7 to 1e-3 within 30 steps.
TINY = ["demo", "--channels", "32", "--tower-depth", "1", "--train-short-sides", "64", "64", "--short-side", "64", "--batch-size", "8",
        "--steps", "30", "--epochs", "0", "--optimizer", "sgd", "--lr", "0.001", "--warmup-steps", "5", "--log-every", "1",
        "--precision", "fp32", "--skip-eval"]


def start(*options, processes=1, torchrun=()):
    """train.py as a user starts it, on the CPU."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *torchrun] if processes > 1 else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *launcher, "train.py", *map(str, options)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def finish(process, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def run_to_end(*options, **launch):
    code, output = finish(start(*options, **launch))
    assert code == 0, output
    return output


def main(monkeypatch, *options):
    """train.py in this process, where starting another one would prove no more."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    train.main()


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line["cls"], line["box"], line["centerness"]] for line in lines]


def weights_of(run):
    return load_checkpoint(run)["model"]


def assert_same_bits(run, other):
    a, b = weights_of(run), weights_of(other)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def wait_for(condition, process, timeout=120):
    end = time.time() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.time() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """48 generated images; every third has one box that lies between the locations, so that whole portions have no positive."""
    root = tmp_path_factory.mktemp("shapes")
    data.make_shapes(root, num_train=48, num_val=8, size=64)
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    hopeless = {image["id"] for image in content["images"][::3]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in hopeless]
    content["annotations"] += [{"id": 10_000 + i, "image_id": i, "category_id": 1, "bbox": [5, 5, 2, 2], "area": 4, "iscrowd": 0}
                               for i in hopeless]
    path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def uninterrupted(dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run_to_end(*TINY, "--data", dataset, "--run-dir", run, "--num-workers", 1)
    return run


# --- the GPU count changes nothing ------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", [dict(processes=2), dict(accumulate=4), dict(processes=2, accumulate=2)], ids=str)
def test_processes_and_accumulation_change_neither_losses_nor_weights(dataset, uninterrupted, tmp_path, split):
    run_to_end(*TINY, "--data", dataset, "--run-dir", tmp_path, "--num-workers", 0, "--accumulate", split.get("accumulate", 1),
               processes=split.get("processes", 1))
    one, other = losses_of(uninterrupted), losses_of(tmp_path)
    assert len(one) == len(other) == 30
    for step, (a, b) in enumerate(zip(one, other)):
        assert a == pytest.approx(b, abs=5e-5, rel=1e-4), f"step {step}"
    a, b = weights_of(uninterrupted), weights_of(tmp_path)
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5


@pytest.mark.skipif(not BCCD.exists(), reason="no real photographs beside the repository (../shared/data/bccd)")
def test_two_processes_agree_with_one_on_real_photographs(tmp_path):
    for processes in (1, 2):
        run_to_end(*TINY, "--data", BCCD, "--run-dir", tmp_path / str(processes), "--num-workers", 0, processes=processes)
    for a, b in zip(losses_of(tmp_path / "1"), losses_of(tmp_path / "2")):
        assert a == pytest.approx(b, abs=5e-5, rel=1e-4)
    a, b = weights_of(tmp_path / "1"), weights_of(tmp_path / "2")
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5


def test_images_per_gpu_sets_the_accumulation(dataset, tmp_path, monkeypatch, capsys):
    main(monkeypatch, *TINY, "--data", dataset, "--run-dir", tmp_path, "--steps", 1, "--images-per-gpu", 3)
    assert "8 images a step: 1 process x 4 portions x 2 images" in capsys.readouterr().out  # 3 portions do not divide a batch of 8


def test_a_batch_that_cannot_be_shared_is_refused(dataset, tmp_path, monkeypatch):
    with pytest.raises(train.ConfigError, match="a batch of 8 images cannot be shared evenly by 1 processes x 3 accumulation steps"):
        main(monkeypatch, *TINY, "--data", dataset, "--run-dir", tmp_path, "--accumulate", 3)


# --- it survives ------------------------------------------------------------------------------------------------------

def test_killed_at_random_moments_it_resumes_bit_for_bit(dataset, uninterrupted, tmp_path):
    draw = random.Random(0)
    options = ["--num-workers", 1, "--checkpoint-every", 2]
    process = start(*TINY, "--data", dataset, "--run-dir", tmp_path, *options)
    wait_for(lambda: checkpoints_of(tmp_path), process)
    for kill in range(3):
        if kill % 2:  # while a checkpoint is being written
            wait_for(lambda: process.poll() is not None or list(tmp_path.glob("*.part")), process)
        else:
            time.sleep(draw.uniform(0, 1.5))
        process.kill()
        process.communicate()
        process = start("--resume", "--run-dir", tmp_path, "--skip-eval", *options)
        wait_for(lambda: (tmp_path / "metrics.jsonl").exists(), process)
        before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
        wait_for(lambda: (tmp_path / "metrics.jsonl").stat().st_mtime_ns != before, process)  # it trains again
    code, output = finish(process)
    assert code == 0, output
    assert_same_bits(tmp_path, uninterrupted)
    assert losses_of(tmp_path) == losses_of(uninterrupted)  # nothing twice, nothing missing


def test_sigterm_finishes_the_step_saves_and_says_so_by_its_exit_code(dataset, uninterrupted, tmp_path):
    process = start(*TINY, "--data", dataset, "--run-dir", tmp_path, "--num-workers", 1)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(losses_of(tmp_path)) >= 2, process)
    os.killpg(process.pid, signal.SIGTERM)  # as timeout and job schedulers do: to the loader's workers as well
    code, output = finish(process)
    assert code == 128 + signal.SIGTERM and f"make resume RUN={tmp_path}" in output
    stopped = load_checkpoint(tmp_path)["step"]
    assert 2 <= stopped < 30 and len(losses_of(tmp_path)) == stopped
    run_to_end("--resume", "--run-dir", tmp_path, "--skip-eval")
    assert_same_bits(tmp_path, uninterrupted)


def test_sigterm_to_torchrun_saves_as_well(dataset, tmp_path):
    process = start(*TINY, "--data", dataset, "--run-dir", tmp_path, "--num-workers", 1, "--steps", 100_000, processes=2)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(losses_of(tmp_path)) >= 2, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code != 0 and f"make resume RUN={tmp_path}" in output
    assert load_checkpoint(tmp_path)["step"] == len(losses_of(tmp_path)) >= 2


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(dataset, uninterrupted, tmp_path):
    process = start(*TINY, "--data", dataset, "--run-dir", tmp_path, "--checkpoint-every", 5)
    wait_for(lambda: len(checkpoints_of(tmp_path)) == 2 and (tmp_path / "checkpoint-0000010.pt").exists(), process)
    process.kill()
    process.communicate()
    newest = checkpoints_of(tmp_path)[0]
    with open(newest, "r+b") as file:
        file.truncate(newest.stat().st_size // 2)
    output = run_to_end("--resume", "--run-dir", tmp_path, "--skip-eval")
    assert f"{newest}: damaged" in output and re.search(r"going on from step \d", output)
    assert_same_bits(tmp_path, uninterrupted)


def test_torchrun_restarts_a_run_whose_process_was_killed(dataset, uninterrupted, tmp_path):
    process = start(*TINY, "--data", dataset, "--run-dir", tmp_path, "--num-workers", 0, "--checkpoint-every", 5, processes=2,
                    torchrun=["--max-restarts", "1"])
    wait_for(lambda: (tmp_path / "checkpoint-0000005.pt").exists(), process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    code, output = finish(process)
    assert code == 0 and "going on from step" in output, output
    a, b = weights_of(uninterrupted), weights_of(tmp_path)
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5


def test_one_dying_process_ends_all_within_a_minute(dataset, tmp_path):
    process = start(*TINY, "--data", dataset, "--run-dir", tmp_path, "--num-workers", 0, "--steps", 100_000, processes=2)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and losses_of(tmp_path), process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    killed = time.time()
    code, output = finish(process)
    assert code != 0 and time.time() - killed < 60


def workers_of(torchrun):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(torchrun.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_checkpoint(dataset, tmp_path):
    code, output = finish(start(*TINY, "--data", dataset, "--run-dir", tmp_path, "--lr", "1e20", "--grad-clip", 0, "--box-unit", "pixel"))
    assert code == 1 and "the loss is not finite at step" in output and "Traceback" not in output
    told = json.loads((tmp_path / "non_finite.json").read_text())
    assert len(told["image_ids"]) == 8 and f"at step {told['step']} " in output and set(told["losses"]) == {"cls", "box", "centerness"}
    assert all(value.isfinite().all() for value in weights_of(tmp_path).values())


@pytest.mark.parametrize("batch_size, remedy", [(8, "set --images-per-gpu 4, or lower --train-short-sides"),
                                                (1, "lower --channels, or lower --train-short-sides")])
def test_out_of_memory_names_images_pixels_boxes_and_what_to_set(dataset, tmp_path, monkeypatch, batch_size, remedy):
    def too_large(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    shown, as_loaded = [], data.Batch.to
    monkeypatch.setattr(data.Batch, "to", lambda batch, device: shown.append(batch) or as_loaded(batch, device))
    monkeypatch.setattr(FCOS, "forward", too_large)
    monkeypatch.setattr(train.signal, "signal", lambda *args: None)  # pytest's own stay
    config = train.parse_arguments([*TINY, "--data", str(dataset), "--batch-size", str(batch_size), "--num-workers", "0"]).config
    with pytest.raises(data.DataError, match=rf"^step 0 does not fit into the memory of cpu: {batch_size} images? on \d+ x 64 pixels, "
                                             rf"with up to (\d) boxes; {remedy}$") as raised:
        train.train(config, tmp_path, torch.device("cpu"))
    (step_0,) = shown
    assert f"on {step_0.images.shape[3]} x {step_0.images.shape[2]} pixels" in str(raised.value)
    assert f"up to {max(map(len, step_0.boxes))} boxes" in str(raised.value)
    assert load_checkpoint(tmp_path)["step"] == 0


def test_training_ends_with_the_evaluation_and_both_are_in_metrics_jsonl(dataset, tmp_path):
    options = [option for option in TINY if option != "--skip-eval"]
    output = run_to_end(*options, "--data", dataset, "--run-dir", tmp_path, "--steps", 2, "--warmup-steps", 1, "--log-every", 2,
                        "--eval-every", 1)
    first, told, last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (first["step"], told["step"], last["step"]) == (1, 2, 2) and "cls" in told and 0 <= first["AP50"] <= 1 and "AP50" in last
    assert re.search(r"waiting for data \d+% \| \d+\.\d GB \|", output) and (tmp_path / "detections.png").exists()


def test_evaluations_on_the_way_change_nothing_and_curves_are_drawn_of_them(dataset, uninterrupted, tmp_path, monkeypatch):
    options = [option for option in TINY if option != "--skip-eval"]
    output = run_to_end(*options, "--data", dataset, "--run-dir", tmp_path / "run", "--eval-every", 10)
    assert_same_bits(tmp_path / "run", uninterrupted)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "AP" in line] == [10, 20, 30] and "step 20/30 | AP " in output
    run_to_end("--resume", "--run-dir", tmp_path / "run")  # finished: evaluated once more, written down once
    assert train.read_metrics(tmp_path / "run") == lines
    monkeypatch.chdir(tmp_path)
    train.plot([tmp_path / "run", uninterrupted])
    assert min(Image.open("runs/curves.png").size) > 300


def test_curves_of_a_run_that_reported_nothing_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(data.DataError, match="nothing was reported yet"):
        train.plot([tmp_path])


def test_weights_that_are_not_finite_are_never_saved(dataset, tmp_path):
    code, output = finish(start(*TINY, "--data", dataset, "--run-dir", tmp_path, "--steps", 1, "--lr", "1e39"))  # the update overflows
    assert code == 1 and "the weights are not finite after step 1" in output and "--init-from" in output
    assert load_checkpoint(tmp_path)["step"] == 0


def test_without_evaluation_no_val_split_is_needed(dataset, tmp_path, monkeypatch):
    (tmp_path / "data" / "annotations").mkdir(parents=True)
    shutil.copy(dataset / "annotations" / "instances_train.json", tmp_path / "data" / "annotations")
    (tmp_path / "data" / "train").symlink_to(dataset / "train")
    main(monkeypatch, *TINY, "--data", tmp_path / "data", "--run-dir", tmp_path / "run", "--steps", 1, "--eval-every", 1)  # TINY: --skip-eval
    assert load_checkpoint(tmp_path / "run")["step"] == 1


def test_train_and_val_of_different_categories_stop_before_training(dataset, tmp_path, monkeypatch):
    shutil.copytree(dataset, tmp_path / "data")
    val = tmp_path / "data" / "annotations" / "instances_val.json"
    val.write_text(val.read_text().replace("ellipse", "oval"))
    options = [option for option in TINY if option != "--skip-eval"]
    with pytest.raises(data.DataError, match="'oval'.*'ellipse'"):
        main(monkeypatch, *options, "--data", tmp_path / "data", "--run-dir", tmp_path / "run")
    assert not checkpoints_of(tmp_path / "run")


def test_a_finished_run_says_so_and_another_never_overwrites_it(dataset, uninterrupted, monkeypatch, capsys):
    main(monkeypatch, "--resume", "--run-dir", uninterrupted, "--skip-eval")
    assert "finished at step 30, nothing left to train" in capsys.readouterr().out
    with pytest.raises(train.ConfigError, match="holds a run already; go on with it .make resume RUN="):
        main(monkeypatch, *TINY, "--data", dataset, "--run-dir", uninterrupted)


def test_resume_refuses_another_configuration_and_a_changed_data_set(dataset, uninterrupted, tmp_path, monkeypatch):
    with pytest.raises(train.ConfigError, match="leave out --lr"):
        main(monkeypatch, "--resume", "--run-dir", uninterrupted, "--lr", "0.1")
    other = tmp_path / "other"
    data.make_shapes(other, num_train=8, num_val=8, size=64, seed=1)
    with pytest.raises(train.ConfigError, match="is not what .* --init-from"):
        main(monkeypatch, "--resume", "--run-dir", uninterrupted, "--data", other)


@pytest.mark.parametrize("change, says", [
    (lambda c: c.pop("optimizer"), "its checkpoint holds weights but not what is needed to go on .KeyError.*--init-from"),
    (lambda c: c.update(optimizer={"state": {}, "param_groups": []}), "its checkpoint holds weights but not what is needed to go on"),
    (lambda c: c.update(optimizer=None), "its checkpoint holds weights but not what is needed to go on"),
    (lambda c: c.update(random_state=torch.zeros(3)), "its checkpoint holds weights but not what is needed to go on"),
    (lambda c: c.pop("data_hash"), "is not what .* was trained on so far"),
    (lambda c: c["config"].pop("lr"), "its TrainConfig is not one of this version.*1 fields are missing or unknown: lr.*--init-from"),
    (lambda c: c["config"].update(momentum=0.5), "its TrainConfig is not one of this version of the code .1 fields.*: momentum"),
    (lambda c: c["config"].update(lr="x"), "its TrainConfig is not one of this version of the code .--lr 'x': must be of type float"),
    (lambda c: c.update(format=0), "not a checkpoint of this version of the code"),
])
def test_a_checkpoint_that_cannot_be_gone_on_from_says_why_and_stays(uninterrupted, tmp_path, monkeypatch, change, says):
    checkpoint = load_checkpoint(uninterrupted)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "checkpoint-0000030.pt")
    before = (tmp_path / "checkpoint-0000030.pt").read_bytes()
    with pytest.raises((data.DataError, train.ConfigError), match=says) as raised:
        main(monkeypatch, "--resume", "--run-dir", tmp_path)
    assert "\n" not in str(raised.value) and (tmp_path / "checkpoint-0000030.pt").read_bytes() == before


def test_checkpoints_hold_nothing_but_tensors_and_plain_types_and_two_are_kept(uninterrupted):
    checkpoint = torch.load(checkpoints_of(uninterrupted)[0], weights_only=True)
    assert {"model", "optimizer", "step", "random_state", "config", "categories"} <= checkpoint.keys()
    assert train.config_from(checkpoint, "it").model.num_classes == 3 and checkpoint["categories"]["names"] == list(data.SHAPES)
    assert len(checkpoints_of(uninterrupted)) == 2


def test_what_a_kill_left_unfinished_is_gone_with_the_next_checkpoint(tmp_path):
    (tmp_path / "checkpoint-0000002.pt.part").write_bytes(b"half")
    train.save_checkpoint(tmp_path, {"step": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0000003.pt"]


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(train.ConfigError, match="No space left on device.*start again"):
        train.save_checkpoint(tmp_path, {"step": 0})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    train.save_checkpoint(tmp_path, {"step": 1})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(train.ConfigError, match="No space left on device.*--resume"):
        train.save_checkpoint(tmp_path, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0000001.pt"]


def test_init_from_takes_the_weights_but_not_the_outputs_of_other_classes(uninterrupted, capsys):
    model = FCOS(replace(build_detector(load_checkpoint(uninterrupted)).config, num_classes=5))
    before = model.head.cls_logits.weight.clone()
    train.init_from(model, uninterrupted, {"names": list("abcde")})
    told = capsys.readouterr().out
    assert "fresh: head.cls_logits.bias, head.cls_logits.weight" in told
    assert torch.equal(model.head.cls_logits.weight, before)
    assert torch.equal(model.backbone.resnet.conv1.weight, weights_of(uninterrupted)["backbone.resnet.conv1.weight"])


# --- configuration ----------------------------------------------------------------------------------------------------

def differences(name, other):
    """The fields in which one preset differs from another."""
    found = {}
    for owner in (lambda c: c, lambda c: c.model):
        a, b = owner(train.PRESETS[name]), owner(train.PRESETS[other])
        found |= {f.name: getattr(b, f.name) for f in dataclasses.fields(a)
                  if f.name != "model" and getattr(a, f.name) != getattr(b, f.name)}
    return found


def test_presets_differ_by_what_their_names_say():
    base = "fcos_R_50_FPN_1x"
    two_x = {"backbone": "resnet101", "steps": 180_000, "train_short_sides": (640, 800)}
    improved = {"centerness_on_box_tower": True, "box_unit": "stride", "sqrt_score": True}
    assert differences(base, base + "_center") == {"center_radius": 1.5}
    assert differences(base + "_center", base + "_center_liou") == {"box_loss": "linear_iou"}
    assert differences(base + "_center", base + "_center_giou") == {"box_loss": "giou"}
    assert differences(base, "fcos_R_101_FPN_2x") == two_x
    assert differences("fcos_R_101_FPN_2x", "fcos_R_101_FPN_2x_center_giou") == {"center_radius": 1.5, "box_loss": "giou"}
    assert differences(base + "_center_giou", "fcos_imprv_R_50_FPN_1x") == improved
    assert differences("fcos_imprv_R_50_FPN_1x", "fcos_imprv_R_101_FPN_2x") == two_x


def test_learning_rate_is_the_schedule_of_the_paper():
    one_x, two_x = train.PRESETS["fcos_R_50_FPN_1x"], train.PRESETS["fcos_R_101_FPN_2x"]
    for step, lr in ((0, 0.01 / 3), (499, 0.01 / 3), (500, 0.01), (59_999, 0.01), (60_000, 1e-3), (79_999, 1e-3), (80_000, 1e-4)):
        assert train.lr_at(step, one_x) == pytest.approx(lr)
    for step, lr in ((119_999, 0.01), (120_000, 1e-3), (159_999, 1e-3), (160_000, 1e-4), (179_999, 1e-4)):
        assert train.lr_at(step, two_x) == pytest.approx(lr)


def test_every_field_of_both_configurations_is_an_option_with_help():
    for owner in (train.TrainConfig, ModelConfig):
        for f in dataclasses.fields(owner):
            assert f.name in ("model", "num_classes") or f.metadata["help"]
    args = train.parse_arguments(["fcos_R_50_FPN_1x", "--batch-size", "8", "--lr", "0.005", "--center-radius", "0", "--nms-iou", "0.5",
                                  "--train-short-sides", "640", "800", "--no-enlarge"])
    expected = replace(train.PRESETS["fcos_R_50_FPN_1x"], batch_size=8, lr=0.005, train_short_sides=(640, 800),
                       model=ModelConfig(nms_iou=0.5, enlarge=False))
    assert args.config == expected


NONSENSE = {int: ("-1", "99999999999999999999"), float: ("-1", "nan", "inf")}
NONSENSE_TOO = ["--batch-size 0", "--steps 0", "--lr 0", "--train-short-sides 0 64", "--train-short-sides 800 640", "--flip 2",
                "--log-every 0", "--checkpoint-every 0", "--frozen-stages 6", "--channels 20", "--channels 0",
                "--location-offset 7", "--pixel-std 0 1 1", "--pixel-mean nan 1 1", "--short-side 0", "--long-side 0",
                "--score-threshold 2", "--candidates-per-level 0", "--nms-iou 2", "--max-detections 0"]


def test_a_number_that_cannot_be_meant_is_refused_with_what_it_must_be():
    given = [option.split() for option in NONSENSE_TOO]
    for owner in (train.TrainConfig, ModelConfig):
        for f in dataclasses.fields(owner):
            given += [[f"--{f.name.replace('_', '-')}={value}"] for value in NONSENSE.get(f.type, ()) if f.name != "num_classes"]
    assert len(given) > 70
    for options in given:
        with pytest.raises(train.ConfigError, match=rf"^{options[0].split('=')[0]} .*: must be (>|in|a multiple)[^()]* \(.+\)$"):
            train.parse_arguments(["demo", *options])


@pytest.mark.parametrize("field, value, must", [
    ("lr", "0.1", "of type float"), ("batch_size", 8.0, "of type int"), ("batch_size", True, "of type int"), ("data", None, "of type str"),
    ("train_short_sides", (64,), "of type tuple"), ("train_short_sides", [64, 64], "of type tuple"), ("model", {}, "of type ModelConfig"),
    ("val_split", None, "of type str"), ("box_loss", "nonsense", f"one of {', '.join(train.BOX_LOSSES)}")])
def test_a_value_of_another_type_is_refused_wherever_it_comes_from(field, value, must):
    with pytest.raises(train.ConfigError, match=f"^--{field.replace('_', '-')} .*: must be {must}"):
        replace(train.PRESETS["demo"], **{field: value})


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(train.ConfigError, match="did you mean fcos_R_50_FPN_1x_center_giou"):
        train.parse_arguments(["fcos_R_50_FPN_1x_center_gio"])


def test_a_run_folder_that_is_a_file_is_refused_and_left(tmp_path, monkeypatch):
    (tmp_path / "run").write_text("kept")
    with pytest.raises(data.DataError, match=r"run: no folder that can be written to .*; name another with RUN=... \(--run-dir\)"):
        main(monkeypatch, "--run-dir", tmp_path / "run")
    assert (tmp_path / "run").read_text() == "kept"


@pytest.mark.parametrize("options, sentence", [
    (["fcos_R_50_FPN_1x"], "no data set; name a COCO-format folder with DATA="),
    (["demo", "--data", "nowhere"], "nowhere/annotations: no such folder"),
    (["demo", "--resume"], "run: no such file or folder"),
    (["demo", "--init-from", "nothing.pt"], "nothing.pt: no such file or folder"),
    (["demo", "--backbone-weights", "nothing.pth"], "nothing.pth"),
    (["demo", "--box-loss", "nonsense"], "invalid choice: 'nonsense'"),
    (["demo", "--resume", "--init-from", "runs/other"], "argument --init-from: not allowed with argument --resume"),
    (["demo", "--batch-size", "many"], "invalid int value: 'many'"),
    (["demo", "--center-radius", "many"], "invalid float value: 'many'"),
    (["demo", "--train-short-sides", "800", "640"], "--train-short-sides (800, 640): must be >= 1, lower first"),
])
def test_wrong_options_end_in_one_sentence(options, sentence, tmp_path, monkeypatch, capsys):
    with pytest.raises((data.DataError, train.ConfigError, SystemExit)) as raised:
        main(monkeypatch, *options, "--run-dir", tmp_path / "run")
    assert sentence in f"{raised.value} {capsys.readouterr().err}"


def test_an_error_is_one_line_and_an_exit_code(tmp_path):
    code, output = finish(start("demo", "--data", "nowhere", "--run-dir", tmp_path / "run"))
    assert code == 1 and re.fullmatch("error: .*nowhere/annotations: no such folder; .*\n", output)
