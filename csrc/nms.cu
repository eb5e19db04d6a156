// nms.cu: greedy non-maximum suppression inside every group of a whole batch, in one launch.
//
// Formula.  Best score first, a box is kept iff no kept box before it in its group (image x class) overlaps it with
//     IoU(a, b) = |a ∩ b| / (|a| + |b| - |a ∩ b|) > iou_threshold.
//     The arithmetic is that of torchvision's CPU kernel, operation by operation, so both decide every pair alike.
// Layout.   boxes (K,4) float32 xyxy; order (K,) int64, indices best first; groups (K,) int64, negative = padding.
//     A stable sort by group makes each group one run of neighbours, still best first. The block that owns the first
//     box of a run walks it in chunks of 64: decide the chunk, then let its survivors suppress what follows.
//       chunk      | 0 1 2 ... 63 |    bit j of row i: would box i suppress box j of the same chunk?
//       the rest   | 64 ... end   |    one thread a box, against the chunk's survivors only
// Traffic.  25 bytes a box (16 box, 8 group, 1 flag) and the two sorts; boxes again once per 64 survivors of their
//     group. Pairs are formed inside a group alone; no K x K matrix is written. A single huge group runs on one block.
// Proof.    tests/test_csrc.py: test_nms_kernel_equals_the_reference.
// Measured. not yet measured

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>

namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 64;   // boxes decided together: one bit each in a 64-bit word
constexpr int kWindow = 32;  // positions whose runs one block owns: one bit each in a ballot

// ---- device math ---------------------------------------------------------------------------------------------------

// The _rn intrinsics are never fused into multiply-adds, whose other rounding would flip close decisions.
__device__ float area(float4 a) { return __fmul_rn(__fsub_rn(a.z, a.x), __fsub_rn(a.w, a.y)); }

__device__ bool overlaps(float4 a, float4 b, float threshold) {
    const float w = fmaxf(0.f, __fsub_rn(fminf(a.z, b.z), fmaxf(a.x, b.x)));
    const float h = fmaxf(0.f, __fsub_rn(fminf(a.w, b.w), fmaxf(a.y, b.y)));
    const float inter = __fmul_rn(w, h);
    if (!(inter > 0.f)) return false;  // most pairs: spare the division; also 0/0 of empty boxes
    return __fdiv_rn(inter, __fsub_rn(__fadd_rn(area(a), area(b)), inter)) > threshold;  // false for NaN
}

// ---- kernel --------------------------------------------------------------------------------------------------------

// Decide the run [begin, end). Every thread of the block comes here together.
__device__ void suppress(const float4* boxes, const int64_t* index, bool* keep, int64_t begin, int64_t end,
                         float threshold) {
    __shared__ float4 chunk[kChunk];
    __shared__ bool alive_before[kChunk];
    __shared__ uint64_t suppresses[kChunk];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    for (int64_t base = begin; base < end; base += kChunk) {
        const int n = end - base < kChunk ? end - base : kChunk;
        if (threadIdx.x < n) {
            chunk[threadIdx.x] = boxes[base + threadIdx.x];
            alive_before[threadIdx.x] = keep[index[base + threadIdx.x]];
        }
        __syncthreads();

        // a warp takes row i, each lane the pairs (i, lane) and (i, lane + 32)
        for (int i = warp; i < n; i += kWarps) {
            const int j = lane + 32;
            const bool low = lane > i && lane < n && overlaps(chunk[i], chunk[lane], threshold);
            const bool high = j > i && j < n && overlaps(chunk[i], chunk[j], threshold);
            const uint64_t bits = __ballot_sync(~0u, low) | uint64_t(__ballot_sync(~0u, high)) << 32;
            if (lane == 0) suppresses[i] = bits;
        }
        __syncthreads();

        // the greedy order is sequential: every thread runs through it, so that nobody has to wait for the answer
        uint64_t alive = 0;
        for (int i = 0; i < n; i++) alive |= uint64_t(alive_before[i]) << i;
        for (int i = 0; i < n; i++)
            if (alive >> i & 1) alive &= ~suppresses[i];

        if (threadIdx.x < n) keep[index[base + threadIdx.x]] = alive >> threadIdx.x & 1;
        for (int64_t j = base + kChunk + threadIdx.x; j < end; j += kThreads) {
            if (!keep[index[j]]) continue;
            const float4 box = boxes[j];
            for (uint64_t rest = alive; rest; rest &= rest - 1)
                if (overlaps(chunk[__ffsll(rest) - 1], box, threshold)) {
                    keep[index[j]] = false;
                    break;
                }
        }
        __syncthreads();
    }
}

__global__ void __launch_bounds__(kThreads)
nms_kernel(const float4* boxes, const int64_t* groups, const int64_t* index, bool* keep, int64_t K, float threshold) {
    // each warp looks for the runs that start in this block's window, and finds what its neighbours find
    const int64_t window = int64_t(blockIdx.x) * kWindow, mine = window + threadIdx.x % 32;
    const bool starts = mine < K && groups[mine] >= 0 && (mine == 0 || groups[mine - 1] != groups[mine]);

    for (unsigned runs = __ballot_sync(~0u, starts); runs; runs &= runs - 1) {
        const int64_t begin = window + __ffs(runs) - 1;
        int64_t end = begin;
        for (int same = kThreads; same == kThreads; end += same) {  // the sort ends a run where the group changes
            const int64_t j = end + threadIdx.x;
            const bool member = j < K && groups[j] == groups[begin];
            if (member) keep[index[j]] = true;
            same = __syncthreads_count(member);
        }
        if (end - begin > 1) suppress(boxes, index, keep, begin, end, threshold);
    }
}

// ---- launcher ------------------------------------------------------------------------------------------------------

at::Tensor nms_mask(const at::Tensor& boxes, const at::Tensor& order, const at::Tensor& groups, double iou_threshold) {
    TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.scalar_type() == at::kFloat,
                "fcos::nms_mask: boxes must be (K,4) float32, got ", boxes.sizes(), " ", boxes.scalar_type());
    const int64_t K = boxes.size(0);
    for (const auto& x : {order, groups})
        TORCH_CHECK(x.dim() == 1 && x.size(0) == K && x.scalar_type() == at::kLong && x.device() == boxes.device(),
                    "fcos::nms_mask: order and groups must be (", K, ",) int64 on ", boxes.device(), ", got ",
                    x.sizes(), " ", x.scalar_type(), " on ", x.device());

    const c10::cuda::CUDAGuard guard(boxes.device());
    auto keep = boxes.new_zeros({K}, boxes.options().dtype(at::kBool));
    if (K == 0) return keep;

    const auto [runs, by_group] = groups.index_select(0, order).sort(/*stable=*/true, 0, /*descending=*/false);
    const auto index = order.index_select(0, by_group);
    const auto sorted = boxes.index_select(0, index);  // contiguous and aligned, whatever the caller's were

    // `float > double threshold` on the CPU is `float > threshold rounded down` here
    float threshold = static_cast<float>(iou_threshold);
    if (threshold > iou_threshold) threshold = std::nextafter(threshold, -1.f);

    nms_kernel<<<(K + kWindow - 1) / kWindow, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        reinterpret_cast<const float4*>(sorted.const_data_ptr<float>()), runs.const_data_ptr<int64_t>(),
        index.const_data_ptr<int64_t>(), keep.mutable_data_ptr<bool>(), K, threshold);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return keep;
}

}  // namespace

// ---- registration --------------------------------------------------------------------------------------------------

TORCH_LIBRARY_IMPL(fcos, CUDA, m) { m.impl("nms_mask", &nms_mask); }  // the schema is in __init__.py
