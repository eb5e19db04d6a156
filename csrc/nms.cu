// nms.cu: greedy non-maximum suppression inside every group of a whole batch, in two launches.
//
// Formula.  Best score first, a box survives iff no survivor before it in its group (image x
//     class) overlaps it with IoU(a, b) = |a ∩ b| / (|a| + |b| - |a ∩ b|) > iou_threshold. The
//     arithmetic is that of torchvision's CPU kernel, operation by operation, so both decide every
//     pair alike.
// Order.    By group, then best score first (NaN is the best, as in torch's sort), then by index.
//     A box's position is the number of boxes before it. Up to kCounted boxes, each warp counts
//     that for 8 of them: one launch of K^2 comparisons, about 10 us for 5,000 boxes and 60 us for
//     16,384 (estimated for an H100, at 5 instructions a comparison). Beyond, PyTorch sorts twice:
//     40 launches with the gather and the NMS, but no K^2.
// Layout.   boxes (K,4) float32 xyxy; scores (K,); groups (K,) int64, negative = padding. Once
//     they are in order, each block takes a chunk of 64 positions, whatever groups they belong to:
//       1. Bit j of row i: are boxes i and j of the chunk in one group, and would i suppress j?
//       2. Where a group reaches into the chunk from the left, the survivors of its earlier chunks
//          suppress. Wait for one chunk after the other: a word holds 32 survivors and, in bit 32,
//          that they are decided, so that no fence is needed.
//       3. Go through the 64 boxes and rows in order, then publish the survivors.
//     Chunks are handed out in order, so a block only waits for blocks that already run.
// Traffic.  25 bytes a box (16 box, 8 group, 1 flag), 28 written and read in between; a chunk
//     reads the boxes of its group's earlier chunks again. No K x K matrix is stored.
// Bound.    The pairs of a group are spread over all SMs, but a group of G boxes is a chain of G /
//     64 steps of about 2 us: 3 to 4 ms for one group of 80,000 (estimated). torchvision's nms
//     compares the same pairs, and then walks a matrix of 800 MB on one SM, a step for each
//     survivor.
// Proof.    tests/test_csrc.py: test_nms_kernel_equals_greedy_nms.
// Measured. not yet measured

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <climits>
#include <cmath>

namespace fcos { namespace {  // the tests find the kernels by this name

constexpr int kCounted = 16384;  // at most so many boxes are ranked by counting
constexpr int kRankThreads = 128;
constexpr int kRanked = 8;  // boxes that a warp ranks
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 64;  // positions that a block decides: one bit each in a 64-bit word
constexpr int kShare = kChunk * kChunk / kThreads;  // survivors of a chunk that a thread looks at

struct Sorted {         // what lies between the two launches, by position
    float4* boxes;      // (K,)
    int64_t* groups;    // (K,)
    int* index;         // (K,) where the box comes from
    uint64_t* decided;  // (2 * chunks,) 32 survivors each, and bit 32 once they are decided
    int* next;          // () the next chunk to hand out
};

// ---- device math -------------------------------------------------------------------------------

// The _rn intrinsics are never fused into multiply-adds, whose rounding would flip close decisions.
__device__ float area(float4 a) { return __fmul_rn(__fsub_rn(a.z, a.x), __fsub_rn(a.w, a.y)); }

__device__ bool overlaps(float4 a, float4 b, float threshold) {
    const float w = fmaxf(0.f, __fsub_rn(fminf(a.z, b.z), fmaxf(a.x, b.x)));
    const float h = fmaxf(0.f, __fsub_rn(fminf(a.w, b.w), fmaxf(a.y, b.y)));
    const float inter = __fmul_rn(w, h);
    if (!(inter > 0.f)) return false;  // most pairs: spare the division; also 0/0 of empty boxes
    const float both = __fsub_rn(__fadd_rn(area(a), area(b)), inter);
    return __fdiv_rn(inter, both) > threshold;  // false for NaN
}

// A box's place in the order as one number: group, then score, then index.
using Key = unsigned __int128;
__device__ Key key_of(int64_t group, float score, int index) {
    unsigned bits = __float_as_uint(score + 0.f);   // -0 + 0 = 0: they are equal
    bits = bits >> 31 ? ~bits : bits | 1u << 31;    // unsigned integers in the order of the floats
    if (score != score) bits = ~0u;
    return Key(uint64_t(group) ^ 1ull << 63) << 64 | uint64_t(~bits) << 32 | unsigned(index);
}

// ---- kernels -----------------------------------------------------------------------------------

__device__ void place(int i, int position, const float* boxes, const int64_t* groups,
                      const Sorted& sorted) {
    const float* box = boxes + int64_t(i) * 4;  // not a float4: it may not be aligned
    sorted.boxes[position] = {box[0], box[1], box[2], box[3]};
    sorted.groups[position] = groups[i];
    sorted.index[position] = i;
    if (position % 32 == 0) sorted.decided[position / 32] = 0;
    if (position == 0) *sorted.next = 0;
}

// The lanes share out the boxes to compare with; no shared memory, no barrier.
__global__ void __launch_bounds__(kRankThreads)
rank_kernel(const float* boxes, const float* scores, const int64_t* groups, int K, Sorted sorted) {
    const int lane = threadIdx.x % 32;
    const int first = (blockIdx.x * kRankThreads + threadIdx.x) / 32 * kRanked;
    Key key[kRanked];
    int before[kRanked] = {};
#pragma unroll
    for (int r = 0; r < kRanked; r++) {
        const int i = first + r;
        key[r] = i < K ? key_of(groups[i], scores[i], i) : 0;
    }
#pragma unroll 4
    for (int j = lane; j < K; j += 32) {
        const Key other = key_of(groups[j], scores[j], j);
#pragma unroll
        for (int r = 0; r < kRanked; r++) before[r] += other < key[r];
    }
#pragma unroll
    for (int r = 0; r < kRanked; r++) {
        for (int step = 16; step; step /= 2) before[r] += __shfl_xor_sync(~0u, before[r], step);
        if (lane == r && first + r < K) place(first + r, before[r], boxes, groups, sorted);
    }
}

__global__ void __launch_bounds__(kThreads)
gather_kernel(const float* boxes, const int64_t* groups, const int64_t* order, int K,
              Sorted sorted) {
    const int position = blockIdx.x * kThreads + threadIdx.x;
    if (position < K) place(order[position], position, boxes, groups, sorted);
}

__global__ void __launch_bounds__(kThreads)
nms_kernel(Sorted sorted, bool* keep, int K, float threshold) {
    __shared__ float4 mine[kChunk], theirs[kChunk];
    __shared__ int64_t group[kChunk];
    __shared__ uint64_t suppresses[kChunk];
    __shared__ unsigned survivors[2], out[kWarps];
    __shared__ int ticket;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    if (threadIdx.x == 0) ticket = atomicAdd(sorted.next, 1);
    __syncthreads();
    const int chunk = ticket, base = chunk * kChunk;
    if (threadIdx.x < kChunk) {
        const int position = base + threadIdx.x;
        mine[threadIdx.x] = position < K ? sorted.boxes[position] : float4{};
        group[threadIdx.x] = position < K ? sorted.groups[position] : -1;
    }
    __syncthreads();

    // 1. a warp takes row i, each lane the pairs (i, lane) and (i, lane + 32)
    for (int i = warp; i < kChunk; i += kWarps) {
        const auto pair = [&](int j) {
            return j > i && group[j] == group[i] && overlaps(mine[i], mine[j], threshold);
        };
        const unsigned low = __ballot_sync(~0u, pair(lane));
        const unsigned high = __ballot_sync(~0u, pair(lane + 32));
        if (lane == 0) suppresses[i] = low | uint64_t(high) << 32;
    }

    // 2. walk back to where the group of the first box begins, then forth over its earlier chunks
    int begin = base;
    if (group[0] >= 0)
        for (int same = kThreads; same == kThreads; begin -= same) {
            const int position = begin - kThreads + int(threadIdx.x);
            same = __syncthreads_count(position >= 0 && sorted.groups[position] == group[0]);
        }

    // four threads a box, a quarter of the survivors each, the same quarter in all of a warp
    const int j = threadIdx.x % kChunk, from = threadIdx.x / kChunk * kShare;
    bool suppressed = false;
    for (int other = begin / kChunk; other < chunk; other++) {
        if (threadIdx.x < kChunk) theirs[threadIdx.x] = sorted.boxes[other * kChunk + threadIdx.x];
        if (threadIdx.x < 2) {
            const volatile uint64_t* word = sorted.decided + 2 * other + threadIdx.x;
            uint64_t value = *word;
            while (!(value >> 32)) value = *word;
            survivors[threadIdx.x] = static_cast<unsigned>(value);
        }
        __syncthreads();
        unsigned rest = survivors[from / 32] >> from % 32 & ((1u << kShare) - 1);
        if (group[j] != group[0]) rest = 0;
        for (; rest && !suppressed; rest &= rest - 1) {
            const int i = from + __ffs(rest) - 1;
            suppressed = other * kChunk + i >= begin && overlaps(theirs[i], mine[j], threshold);
        }
        __syncthreads();
    }

    // 3. the greedy order is sequential: every thread goes through it, which saves a barrier
    const unsigned bits = __ballot_sync(~0u, suppressed || group[j] < 0);
    if (lane == 0) out[warp] = bits;
    __syncthreads();
    uint64_t alive = ~0ull;
    for (int w = 0; w < kWarps; w++) alive &= ~(uint64_t(out[w]) << 32 * (w % 2));
#pragma unroll
    for (int i = 0; i < kChunk; i++)
        if (alive >> i & 1) alive &= ~suppresses[i];

    const int position = base + threadIdx.x;
    if (threadIdx.x < kChunk && position < K) {
        keep[sorted.index[position]] = alive >> threadIdx.x & 1;
        if (lane == 0) {
            volatile uint64_t* word = sorted.decided + position / 32;
            *word = 1ull << 32 | static_cast<unsigned>(alive >> threadIdx.x);
        }
    }
}

// ---- launcher ----------------------------------------------------------------------------------

at::Tensor nms_mask(const at::Tensor& boxes_, const at::Tensor& scores_, const at::Tensor& groups_,
                    double iou_threshold) {
    TORCH_CHECK(boxes_.dim() == 2 && boxes_.size(1) == 4 && boxes_.scalar_type() == at::kFloat &&
                    boxes_.size(0) < INT_MAX / 4,
                "csrc.nms_mask: boxes must be (K,4) float32, got ", boxes_.sizes(), " ",
                boxes_.scalar_type());
    const int K = boxes_.size(0);
    TORCH_CHECK(scores_.dim() == 1 && scores_.size(0) == K && scores_.is_floating_point() &&
                    scores_.element_size() <= 4 && scores_.device() == boxes_.device(),
                "csrc.nms_mask: scores must be (", K, ",) float32 or half precision on ",
                boxes_.device(), ", got ", scores_.sizes(), " ", scores_.scalar_type(), " on ",
                scores_.device());
    TORCH_CHECK(groups_.dim() == 1 && groups_.size(0) == K && groups_.scalar_type() == at::kLong &&
                    groups_.device() == boxes_.device(),
                "csrc.nms_mask: groups must be (", K, ",) int64 on ", boxes_.device(), ", got ",
                groups_.sizes(), " ", groups_.scalar_type(), " on ", groups_.device());
    TORCH_CHECK(iou_threshold >= 0 && iou_threshold <= 1,
                "csrc.nms_mask: iou_threshold must be in [0, 1], got ", iou_threshold);

    const c10::cuda::CUDAGuard guard(boxes_.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    auto keep = boxes_.new_empty({K}, boxes_.options().dtype(at::kBool));
    if (K == 0) return keep;

    const auto boxes = boxes_.contiguous(), groups = groups_.contiguous();
    const auto scores = scores_.to(at::kFloat).contiguous();
    const int chunks = (K + kChunk - 1) / kChunk;
    const auto sorted_boxes = boxes.new_empty({K, 4}), sorted_groups = groups.new_empty({K});
    const auto index = groups.new_empty({K}, groups.options().dtype(at::kInt));
    const auto state = groups.new_empty({2 * chunks + 1});
    const Sorted sorted{reinterpret_cast<float4*>(sorted_boxes.mutable_data_ptr<float>()),
                        sorted_groups.mutable_data_ptr<int64_t>(), index.mutable_data_ptr<int>(),
                        reinterpret_cast<uint64_t*>(state.mutable_data_ptr<int64_t>()),
                        reinterpret_cast<int*>(state.mutable_data_ptr<int64_t>() + 2 * chunks)};

    if (K <= kCounted) {
        constexpr int per_block = kRankThreads / 32 * kRanked;
        rank_kernel<<<(K + per_block - 1) / per_block, kRankThreads, 0, stream>>>(
            boxes.const_data_ptr<float>(), scores.const_data_ptr<float>(),
            groups.const_data_ptr<int64_t>(), K, sorted);
    } else {
        const auto best_first = scores.argsort(/*stable=*/true, 0, /*descending=*/true);
        const auto by_group = groups.index_select(0, best_first).argsort(/*stable=*/true, 0);
        const auto order = best_first.index_select(0, by_group);
        gather_kernel<<<(K + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
            boxes.const_data_ptr<float>(), groups.const_data_ptr<int64_t>(),
            order.const_data_ptr<int64_t>(), K, sorted);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();

    // `float > double threshold` on the CPU is `float > threshold rounded down` here
    float threshold = static_cast<float>(iou_threshold);
    if (threshold > iou_threshold) threshold = std::nextafter(threshold, -1.f);
    bool* const out = keep.mutable_data_ptr<bool>();
    nms_kernel<<<chunks, kThreads, 0, stream>>>(sorted, out, K, threshold);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return keep;
}

} }  // namespace fcos

// ---- registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fcos, m) {
    m.def("nms_mask(Tensor boxes, Tensor scores, Tensor groups, float iou_threshold) -> Tensor");
}
TORCH_LIBRARY_IMPL(fcos, CUDA, m) { m.impl("nms_mask", &fcos::nms_mask); }
