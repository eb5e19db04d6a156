"""csrc: the references against brute force, float64 and torchvision; the kernels against the references; the build."""

import functools
import itertools
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision

import csrc

ROOT = Path(__file__).parents[1]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
needs_nvcc = pytest.mark.skipif(csrc._cuda_home() is None, reason="needs a CUDA toolkit with nvcc")

KINDS = ("random", "integers", "identical", "empty", "reversed", "huge", "nonfinite", "ties")


def candidates(K, G, kind="random", seed=0):
    """K boxes of one kind in about G groups, one of them padding where there are several."""
    rng = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(K, 2, generator=rng) * 60, torch.rand(K, 2, generator=rng) * 40
    boxes, scores = torch.cat([corner, corner + size], 1), torch.rand(K, generator=rng)
    groups = torch.randperm(K, generator=rng) if G >= K else torch.randint(-(G > 1), G, (K,), generator=rng)
    if kind == "integers":
        boxes = boxes.round()
    if kind == "identical":
        boxes[:] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    if kind == "empty":
        boxes[::3, 2:] = boxes[::3, :2]
    if kind == "reversed":
        boxes[::3] = boxes[::3][:, [2, 3, 0, 1]]
    if kind == "huge":
        boxes = boxes * 1e6 + 1e8
    if kind == "nonfinite":
        boxes[::4, 1], boxes[1::4, 2], boxes[2::9] = float("nan"), float("inf"), -float("inf")
        scores[::5] = float("nan")
    if kind == "ties":
        scores = (scores * 4).round() / 4
    return boxes, scores, groups


def brute_force_nms(boxes, scores, groups, iou_threshold):
    """The definition, one candidate after the other, in the kernels' float32 arithmetic."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        rivals = torch.tensor([k for k in kept if groups[k] == groups[i]], dtype=torch.int64)
        low, high = torch.maximum(boxes[rivals, :2], boxes[i, :2]), torch.minimum(boxes[rivals, 2:], boxes[i, 2:])
        inter = (high - low).clamp(min=0).prod(1)
        iou = inter / (area[rivals] + area[i] - inter)
        if groups[i] >= 0 and not (iou.double() > iou_threshold).any():
            kept.append(i)
    return torch.tensor(kept, dtype=torch.int64)


# ---- NMS -------------------------------------------------------------------------------------------------------------


def test_nms_keeps_the_best_of_two_that_overlap_and_the_third_that_does_not():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 30, 30]])  # IoU of the first two: 0.8
    scores, one_group = torch.tensor([0.5, 0.9, 0.1]), torch.zeros(3, dtype=torch.int64)
    assert csrc.batched_nms(boxes, scores, one_group, 0.6).tolist() == [1, 2]
    assert csrc.nms_mask(boxes, scores, one_group, 0.6).tolist() == [False, True, True]
    assert csrc.batched_nms(boxes, scores, one_group, 0.9).tolist() == [1, 0, 2]
    assert csrc.batched_nms(boxes, scores, torch.tensor([0, 1, 0]), 0.6).tolist() == [1, 0, 2]


def test_a_suppressed_box_suppresses_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])  # a chain: only neighbours overlap
    assert csrc.batched_nms(boxes, torch.tensor([3.0, 2, 1]), torch.zeros(3, dtype=torch.int64), 0.4).tolist() == [0, 2]


def test_equal_scores_go_to_the_lower_index():
    boxes, scores = torch.tensor([[0.0, 0, 9, 9]]).repeat(200, 1), torch.full((200,), 0.5)
    assert csrc.batched_nms(boxes, scores, torch.zeros(200, dtype=torch.int64), 0.5).tolist() == [0]
    assert csrc.batched_nms(boxes, scores, torch.arange(200) % 2, 0.5).tolist() == [0, 1]
    assert csrc.batched_nms(boxes, scores, torch.arange(200), 0.5).tolist() == list(range(200))


def test_padding_neither_survives_nor_suppresses():
    boxes, scores = torch.tensor([[0.0, 0, 9, 9]]).repeat(3, 1), torch.tensor([3.0, 2, 1])
    assert csrc.nms_mask(boxes, scores, torch.tensor([-1, 0, -1]), 0.5).tolist() == [False, True, False]
    assert csrc.batched_nms(boxes, scores, torch.tensor([-1, -2, -1]), 0.5).tolist() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [0, 1, 31, 65, 150])
def test_nms_equals_brute_force(K, kind):
    for seed, (G, iou_threshold) in enumerate([(1, 0.6), (4, 0.3), (K, 0.5), (2, 0.0), (2, 1.0)]):
        case = *candidates(K, G, kind, seed), iou_threshold
        expected = brute_force_nms(*case)
        assert csrc.batched_nms(*case).equal(expected)
        assert csrc.nms_mask(*case).nonzero()[:, 0].equal(expected.sort()[0])


@pytest.mark.parametrize("K, G", [(1025, 1), (1025, 80), (5000, 80)])
def test_nms_equals_torchvision_where_the_offsets_are_exact(K, G):
    boxes, scores, groups = candidates(K, G, "integers")
    groups = groups.clamp(min=0)  # integer boxes below 2^24 are shifted without rounding
    scores = scores.argsort() / K  # no ties, which torchvision breaks by chance
    assert csrc.batched_nms(boxes, scores, groups, 0.6).equal(torchvision.ops.batched_nms(boxes, scores, groups, 0.6))


def test_nms_is_exact_where_an_offset_between_groups_would_round_the_boxes():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0.6, 0, 1.6, 1]]) + 1e4
    groups, scores = torch.full((2,), 10**6), torch.tensor([2.0, 1.0])
    assert csrc.batched_nms(boxes, scores, groups, 0.5).tolist() == [0, 1]  # IoU 0.25; shifted by 1e10 both vanish
    assert csrc.batched_nms(boxes, scores, groups, 0.2).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_boxes_are_compared_in_float32(dtype):
    boxes, scores, groups = candidates(500, 3)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    assert csrc.nms_mask(boxes, scores, groups, 0.5).equal(csrc.nms_mask(boxes.float(), scores.float(), groups, 0.5))


# ---- focal loss ------------------------------------------------------------------------------------------------------


def float64_focal_loss(logits, labels, alpha=0.25, gamma=2.0, scale=1.0):
    """eq. 5 in float64, by log-sigmoids; its gradient comes from autograd."""
    x = logits.detach().double().cpu().requires_grad_()
    hot = labels.cpu()[:, None] == torch.arange(x.shape[1])
    z = torch.where(hot, -x, x)
    log_q, log_p = torch.nn.functional.logsigmoid(z), torch.nn.functional.logsigmoid(-z)
    loss = (torch.where(hot, alpha, 1 - alpha) * (gamma * log_q).exp() * -log_p).sum() * float(scale)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def rows(R, C, dtype=torch.float32, device="cpu", spread=4.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(R, C, generator=rng) * spread, torch.randint(-1, C, (R,), generator=rng)
    return logits.to(device, dtype).requires_grad_(), labels.to(device)


def assert_focal_loss_is_right(logits, labels, **options):
    loss = csrc.focal_loss(logits, labels, **options)
    grad, = torch.autograd.grad(loss, logits)
    expected_loss, expected_grad = float64_focal_loss(logits, labels, **options)
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}[logits.dtype]
    assert loss.dtype == torch.float32 and grad.dtype == logits.dtype
    torch.testing.assert_close(loss.double().cpu(), expected_loss, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(grad.double().cpu(), expected_grad, rtol=rounding, atol=1e-6)


def test_focal_loss_of_an_undecided_logit_is_a_quarter_of_the_weighted_cross_entropy():
    log2 = 0.6931472
    assert csrc.focal_loss(torch.zeros(1, 1), torch.tensor([0])).item() == pytest.approx(0.25 * 0.25 * log2)
    assert csrc.focal_loss(torch.zeros(1, 1), torch.tensor([-1])).item() == pytest.approx(0.75 * 0.25 * log2)
    assert csrc.focal_loss(torch.zeros(1, 3), torch.tensor([1]), scale=4).item() == pytest.approx((0.25 + 1.5) * log2)


@pytest.mark.parametrize("R, C", [(1, 1), (1, 80), (31, 3), (65, 80), (1025, 7)])
@pytest.mark.parametrize("gamma", [2.0, 0.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_focal_loss_and_gradient_equal_float64(R, C, gamma, dtype):
    assert_focal_loss_is_right(*rows(R, C, dtype), gamma=gamma)


def test_focal_loss_is_safe_for_logits_of_a_hundred():
    logits = torch.tensor([[100.0, -100, 89, -89], [100, -100, 100, -100]], requires_grad=True)
    assert_focal_loss_is_right(logits, torch.tensor([1, 0]))
    assert csrc.focal_loss(logits[1:, 1::2], torch.tensor([-1])) == 0


def test_focal_loss_without_an_object_and_without_a_row():
    logits, _ = rows(65, 80)
    assert_focal_loss_is_right(logits, torch.full((65,), -1))
    nothing = torch.zeros(0, 80, requires_grad=True)
    loss = csrc.focal_loss(nothing, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and nothing.grad.shape == (0, 80)


def test_focal_loss_of_nan_is_nan():
    assert csrc.focal_loss(torch.tensor([[float("nan"), 0.0]]), torch.tensor([1])).isnan()


@pytest.mark.parametrize("scale", [0.125, torch.tensor(0.125), torch.tensor([0.125], dtype=torch.float64)])
def test_focal_loss_is_scaled_by_a_number_or_a_tensor(scale):
    assert_focal_loss_is_right(*rows(31, 5), scale=scale)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_focal_loss_can_be_differentiated_twice_over_a_retained_graph(device):
    logits, labels = rows(31, 5, device=device)
    loss = csrc.focal_loss(logits, labels) * 3
    first, = torch.autograd.grad(loss, logits, retain_graph=True)
    second, = torch.autograd.grad(loss, logits)
    assert first.equal(second)
    torch.testing.assert_close(first.double().cpu(), 3 * float64_focal_loss(logits, labels)[1], rtol=1e-5, atol=1e-6)


# ---- operators -------------------------------------------------------------------------------------------------------


def some_boxes():
    return torch.rand(7, 4), torch.rand(7), torch.zeros(7, dtype=torch.int64)


@pytest.mark.parametrize("wrong, message", [
    (lambda b, s, g: csrc.nms_mask(b[:, :3], s, g, 0.5), r"boxes: \(K,4\) floating point; got \(7, 3\)"),
    (lambda b, s, g: csrc.nms_mask(b, s[:5], g, 0.5), r"scores: \(7,\) on cpu; got \(5,\)"),
    (lambda b, s, g: csrc.batched_nms(b, s, g.int(), 0.5), r"groups: \(7,\) int64 on cpu; got \(7,\) torch.int32"),
    (lambda b, s, g: csrc.batched_nms(b, s, g.to("meta"), 0.5), "got .* on meta"),
    (lambda b, s, g: csrc.batched_nms(b, s, g, 60), r"iou_threshold in \[0, 1\], got 60"),
    (lambda b, s, g: csrc.focal_loss(b[None], g), r"logits: \(R,C\) float32, .*; got \(1, 7, 4\)"),
    (lambda b, s, g: csrc.focal_loss(b.double(), g), "got .* torch.float64"),
    (lambda b, s, g: csrc.focal_loss(b, g[:3]), r"labels: \(7,\) int64 on cpu; got \(3,\)"),
    (lambda b, s, g: csrc.focal_loss(b, g, gamma=-1), "gamma >= 0, got -1"),
    (lambda b, s, g: csrc.focal_loss(b, g, scale=s), r"scale: \(\) on cpu; got \(7,\)"),
])
def test_wrong_inputs_are_refused_with_what_was_got(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(*some_boxes())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_operators_pass_opcheck(device):
    boxes, scores, groups = (x.to(device) for x in some_boxes())
    torch.library.opcheck(torch.ops.fcos.nms_mask, (boxes, scores.argsort(), groups, 0.5))
    for dtype, scale in itertools.product([torch.float32, torch.bfloat16], [None, torch.tensor(0.5, device=device)]):
        logits, labels = rows(31, 5, dtype, device)
        torch.library.opcheck(torch.ops.fcos.focal_loss, (logits, labels, 0.25, 2.0, scale))
    torch.library.opcheck(torch.ops.fcos.scale_, (torch.rand(3, 5, device=device), torch.tensor(2.0, device=device)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_operators_compile_without_a_graph_break(device):
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor")
    case = *(x.to(device) for x in candidates(65, 3)), 0.5
    assert compiled(csrc.nms_mask)(*case).equal(csrc.nms_mask(*case))
    logits, labels = rows(31, 5, device=device)
    step = lambda x: csrc.focal_loss(x * 2, labels, scale=torch.ones((), device=device) / 7) * 3  # noqa: E731
    expected, = torch.autograd.grad(step(logits), logits)
    got, = torch.autograd.grad(compiled(step)(logits), logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_focal_loss_under_autocast_is_float32(device):
    layer, x = torch.nn.Linear(8, 5, device=device), torch.randn(31, 8, device=device)
    labels = torch.randint(-1, 5, (31,), device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = layer(x)
        loss = csrc.focal_loss(logits, labels)
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32 and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss.double().cpu(), float64_focal_loss(logits, labels)[0], rtol=1e-5, atol=0)


# ---- the kernels -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels():
    assert csrc.available(), "the CUDA extension could not be built; run python -m csrc --build"


def on(device, *tensors):
    return [x.to(device) for x in tensors]


@gpu
@pytest.mark.parametrize("K", [0, 1, 31, 64, 65, 1025, 5000, 80000])
def test_nms_kernel_equals_the_reference(kernels, K):
    counts, kinds = [80, 1280, K] + [1] * (K <= 5000), KINDS if K <= 1025 else ("random", "ties")
    for seed, (G, kind) in enumerate(itertools.product(counts, kinds)):
        boxes, scores, groups = on("cuda", *candidates(K, G, kind, seed))
        order = scores.argsort(descending=True, stable=True)
        keep = torch.ops.fcos.nms_mask(boxes, order, groups, 0.6)
        assert keep.equal(csrc.nms_mask_reference(boxes, order, groups, 0.6)), (K, G, kind)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("R, C", [(0, 80), (1, 1), (31, 3), (64, 80), (65, 7), (1025, 91), (80000, 80), (80000, 1)])
def test_focal_kernel_equals_the_reference(kernels, R, C, dtype):
    for seed, gamma, scale in itertools.product(range(3), [2.0, 1.5, 0.0], [1.0, torch.tensor(1 / 7, device="cuda")]):
        assert_focal_loss_is_right(*rows(R, C, dtype, "cuda", seed=seed), gamma=gamma, scale=scale)


@gpu
def test_focal_kernel_takes_what_is_not_aligned_or_not_contiguous(kernels):
    for dtype in (torch.float32, torch.bfloat16):
        logits, labels = rows(66, 7, dtype, "cuda")
        assert_focal_loss_is_right(logits.detach()[1:].requires_grad_(), labels[1:])
        assert_focal_loss_is_right(logits.detach().t().contiguous().t().requires_grad_(), labels)


@gpu
def test_focal_kernel_is_safe_for_logits_of_a_hundred(kernels):
    logits = torch.tensor([[100.0, -100, 89, -89], [100, -100, 100, -100]], device="cuda", requires_grad=True)
    assert_focal_loss_is_right(logits, torch.tensor([1, 0], device="cuda"))
    assert csrc.focal_loss(logits * float("nan"), torch.tensor([-1, 0], device="cuda")).isnan()


@gpu
def test_kernels_give_the_same_bits_every_run(kernels):
    logits, labels = rows(22400, 80, torch.bfloat16, "cuda")
    first, *others = [torch.ops.fcos.focal_loss(logits, labels, 0.25, 2.0, None) for _ in range(5)]
    assert all(first[0].equal(loss) and first[1].equal(grad) for loss, grad in others)


@gpu
def test_kernels_follow_the_current_stream(kernels):
    case, (logits, labels) = on("cuda", *candidates(5000, 80)), rows(1025, 80, device="cuda")
    expected = csrc.nms_mask(*case, 0.6), csrc.focal_loss(logits, labels)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)  # what follows must queue behind this
        boxes, doubled = case[0] + 0, logits * 1
        got = csrc.nms_mask(boxes, *case[1:], 0.6), csrc.focal_loss(doubled, labels)
        torch.cuda.current_stream().synchronize()
    assert got[0].equal(expected[0]) and got[1].equal(expected[1])


@two_gpus
def test_kernels_run_on_the_device_of_their_inputs(kernels):
    case, (logits, labels) = on("cuda:1", *candidates(1025, 80)), rows(65, 80, device="cuda:1")
    assert csrc.batched_nms(*case, 0.6).cpu().equal(csrc.batched_nms(*on("cpu", *case), 0.6))
    assert_focal_loss_is_right(logits, labels)


@gpu
def test_fixed_size_forms_can_be_captured_and_replayed(kernels):
    case, (logits, labels) = on("cuda", *candidates(5000, 80)), rows(1025, 80, device="cuda")
    run = lambda: (csrc.nms_mask(*case, 0.6), csrc.focal_loss(logits.detach(), labels))  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for seed in (1, 2):  # new candidates in the same memory
        for static, fresh in zip(case, candidates(5000, 80, seed=seed)):
            static.copy_(fresh)
        graph.replay()
        assert all(got.equal(expected) for got, expected in zip(outputs, run()))


@gpu
def test_kernels_do_not_wait_for_the_device(kernels):
    case, (logits, labels) = on("cuda", *candidates(5000, 80)), rows(1025, 80, device="cuda")
    csrc.focal_loss(logits, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        csrc.nms_mask(*case, 0.6)
        csrc.focal_loss(logits, labels, scale=0.5).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_kernels_are_clean_under_compute_sanitizer(kernels, tool):
    code = ("import sys; sys.path[:0] = ['.', 'tests']; from test_csrc import *\n"
            "for K in (1, 65, 1025): csrc.batched_nms(*on('cuda', *candidates(K, 7)), 0.6)\n"
            "for C in (3, 80): csrc.focal_loss(*rows(65, C, device='cuda'), scale=0.5).mul(2).backward()")
    subprocess.run(["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", code],
                   cwd=ROOT, check=True, timeout=300)


# ---- build -----------------------------------------------------------------------------------------------------------

# A compiler that starts by writing half a library, takes its time, and keeps a count of its runs.
PRETEND = """import os, pathlib, sys, time
scratch = pathlib.Path(sys.argv[1])
with open(scratch.parent / "runs", "a") as runs: runs.write("x")
(scratch / "fcos.so").write_text("half")
time.sleep(float(os.environ.get("BUILD_SECONDS", "0")))
if "BUILD_ERROR" in os.environ: print("nms.cu(7): error: expected a ;"); sys.exit(1)
(scratch / "fcos.so").write_text("whole")"""
BUILDER = f"import csrc; csrc.BUILD = {PRETEND!r}; csrc.requirements = lambda: []; print(csrc.library(), flush=True)"


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """Builds in this process, and in those it starts with BUILDER, go to a folder of their own and take no time."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(csrc, "BUILD", PRETEND)
    monkeypatch.setattr(csrc, "requirements", lambda: [])
    csrc.available.cache_clear()
    yield csrc.build_folder()
    csrc.available.cache_clear()


def start_builder(**environment):
    return subprocess.Popen([sys.executable, "-c", BUILDER], cwd=ROOT, env={**os.environ, **environment},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited in vain"
        time.sleep(0.05)


def test_nothing_is_built_at_import_or_for_the_cpu(tmp_path):
    code = ("import csrc, torch; csrc.focal_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64));"
            "assert csrc.available.cache_info().currsize == 0")
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert not list(tmp_path.iterdir())


def test_a_build_killed_half_way_does_not_hinder_the_next(pretend):
    builder = start_builder(BUILD_SECONDS="30")
    wait_for(lambda: list(pretend.glob("building-*/fcos.so")))
    builder.kill()  # SIGKILL: nothing is cleaned up
    builder.wait()
    assert (pretend / "lock").exists() and list(pretend.glob("building-*"))
    assert csrc.library().read_text() == "whole"
    assert not list(pretend.glob("building-*"))


def test_waiting_for_another_builder_ends_with_a_message_and_the_fallback(pretend, monkeypatch, caplog):
    builder = start_builder(BUILD_SECONDS="30")
    wait_for(lambda: list(pretend.glob("building-*/fcos.so")))
    monkeypatch.setattr(csrc, "TIMEOUT", 0.2)
    try:
        with pytest.raises(TimeoutError, match="another process has held .*lock for 0.2 s"):
            csrc.library()
        assert not csrc.available() and "another process has held" in caplog.text
    finally:
        builder.kill()
        builder.wait()


def test_two_processes_build_once(pretend):
    builders = [start_builder(BUILD_SECONDS="1") for _ in range(2)]
    outputs = [builder.communicate(timeout=60)[0].strip() for builder in builders]
    assert outputs == [str(pretend / "fcos.so")] * 2
    assert (pretend / "runs").read_text() == "x"


def test_a_failed_build_is_told_in_one_line_and_the_references_go_on(pretend, monkeypatch, caplog):
    monkeypatch.setenv("BUILD_ERROR", "1")
    assert not csrc.available() and not csrc.available()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert "nms.cu(7): error: expected a ;" in record.getMessage() and (pretend / "failed.log").exists()
    monkeypatch.delenv("BUILD_ERROR")
    assert csrc.library().read_text() == "whole"  # the next run tries again


@pytest.mark.parametrize("absent", ["a GPU", "a CUDA toolkit", "ninja", "a C++ compiler", "CUDA 13, like PyTorch's"])
def test_what_is_missing_is_named_with_its_remedy(pretend, monkeypatch, caplog, absent):
    monkeypatch.setattr(csrc, "requirements", lambda: [(absent, None, "how to get it"), ("the rest", "found", "")])
    assert not csrc.available()
    assert [record.getMessage().count(f"missing {absent} (how to get it)") for record in caplog.records] == [1]
    assert csrc.batched_nms(*some_boxes(), 0.5).numel()


def test_ninja_beside_python_is_found_though_it_is_not_on_the_path(monkeypatch, tmp_path):
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert {name: found for name, found, _ in csrc.requirements()}["ninja"] == str(tmp_path / "ninja")


def toolkit(folder, libcudart=True):
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/nvcc").write_text(f'#!/bin/sh\necho "#$ TOP={folder}/bin/.." >&2\necho release 13.0\n')
    (folder / "bin/nvcc").chmod(0o755)
    if libcudart:
        (folder / "lib64").mkdir()
        (folder / "lib64/libcudart.so").touch()
    return folder


@pytest.mark.parametrize("link", [True, False], ids=["a link", "a script"])
def test_cuda_is_found_behind_an_nvcc_that_is_a_link_or_a_script(monkeypatch, tmp_path, link):
    home, on_path = toolkit(tmp_path / "cuda"), tmp_path / "bin/nvcc"
    on_path.parent.mkdir()
    if link:
        on_path.symlink_to(home / "bin/nvcc")
    else:
        on_path.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
        on_path.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    assert csrc._cuda_home() == home


def test_a_toolkit_without_libcudart_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "headless", libcudart=False)))
    monkeypatch.setenv("CUDA_PATH", str(toolkit(tmp_path / "whole")))
    assert csrc._cuda_home() == tmp_path / "whole"


def test_another_cuda_major_is_not_a_match(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    for version, matches in [("13.2", True), ("12.8", False)]:
        monkeypatch.setattr(torch.version, "cuda", version)
        found = {name: found for name, found, _ in csrc.requirements()}
        assert bool(found[f"CUDA {version[:2]}, like PyTorch's"]) == matches


def test_diagnosis_names_every_requirement_and_a_failed_build_exits_with_an_error(tmp_path):
    run = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, env={
        **os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"})
    diagnosis = run([sys.executable, "-m", "csrc"])
    assert diagnosis.returncode == 0 and "missing: install g++" in diagnosis.stdout
    assert all(name in diagnosis.stdout for name, _, _ in csrc.requirements())
    build = run([sys.executable, "-m", "csrc", "--build"])
    assert build.returncode == 1 and "no-such-compiler" in build.stderr


@needs_nvcc
def test_extension_compiles_and_registers_its_kernels_even_without_a_gpu():
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or "9.0"}
    subprocess.run([sys.executable, "-m", "csrc", "--build"], cwd=ROOT, env=environment, check=True)
    code = ("import csrc, torch; assert csrc.available(); C, meta = torch._C, dict(device='meta')\n"
            "for name in ('nms_mask', 'focal_loss', 'scale_'):\n"
            "    assert C._dispatch_has_kernel_for_dispatch_key(f'fcos::{name}', 'CUDA'), name\n"
            "x, i = torch.empty(5, 4, **meta), torch.empty(5, dtype=torch.int64, **meta)\n"
            "assert csrc.nms_mask(x, x[:, 0], i, 0.5).shape == (5,)\n"
            "assert csrc.focal_loss(x, i).shape == ()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
