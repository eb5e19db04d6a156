// focal_loss.cu: the summed focal loss and its gradient, in one pass over the logits.
//
// Formula.  For a logit x and its target (1 for the row's class, else 0) let z = -x, w = alpha, or
//     z = x, w = 1 - alpha. With q = sigmoid(z), the probability given to the wrong answer
//     (Lin et al., arXiv:1708.02002, eq. 5),
//         loss = w q^gamma softplus(z)     dloss/dz = w q^gamma (gamma (1 - q) softplus(z) + q).
//     The gradient of the sum is known but for the factor that comes from above. So the forward
//     pass writes it, and the backward pass multiplies it, and not even that if the factor is 1.
// Layout.   logits and gradient (R,C) are read and written as one flat array, 16 bytes a thread at
//     a time; labels (R,) int64. A thread first takes out the element of its row's class; all
//     others are background. Each block leaves a partial sum, and the block that finishes last adds
//     them in a fixed order: the same bits every run.
// Traffic.  2 R C sizeof(logit) + 8 R bytes, as much as one copy of the logits; backward 4 bytes if
//     the factor is 1. Launches: a memset of 4 bytes and one kernel, and one kernel backward.
// Proof.    tests/test_csrc.py: test_focal_kernel_equals_float64.
// Measured. not yet measured

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <climits>

namespace fcos { namespace {  // the tests find the kernels by this name

constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 5;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kNothing = -1e4f;  // so negative a logit has no loss and no gradient

template <typename T> struct alignas(16) Pack {  // what one thread moves in one instruction
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};

// ---- device math -------------------------------------------------------------------------------

// One instruction each. Their C spellings add code for denormals, which may be zeros here.
__device__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float log2_(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ float rcp_(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Adds the loss of z to `sum`, in units of log 2 (a multiplication less), and returns dloss/dz.
template <bool kSquare> __device__ float focal(float z, float weight, float gamma, float& sum) {
    const float y = z * kLog2e;
    const float clamped = y > 115.f ? 115.f : y;  // exp2 must stay finite; NaN passes
    const float e = exp2_(clamped), u = 1.f + e, not_q = rcp_(u), q = e * not_q;
    // log2(1 + e), by its series where 1 + e would round e away
    const float series = e * (kLog2e - e * (kLog2e / 2 - e * (kLog2e / 3)));
    const float log_u = e < 0.02f ? series : log2_(u);
    const float softplus = fmaxf(y, log_u);  // y itself where y was clamped
    const float log_q = clamped - log_u;
    const float power = weight * (kSquare ? q * q : exp2_(gamma * log_q));
    sum += power * softplus;
    return power * (gamma * kLn2 * (not_q * softplus) + q);
}

// 16 bytes at i as floats; one by one at the end of the array, or where it is not aligned.
template <typename T, int V>
__device__ void load(const T* from, int64_t i, int64_t n, bool aligned, float (&x)[V]) {
    if (aligned && i + V <= n) {
        const auto pack = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
        for (int j = 0; j < V; j++) x[j] = static_cast<float>(pack.at[j]);
    } else {
#pragma unroll
        for (int j = 0; j < V; j++) x[j] = i + j < n ? static_cast<float>(from[i + j]) : kNothing;
    }
}

template <typename T, int V>
__device__ void store(T* to, int64_t i, int64_t n, bool aligned, const float (&x)[V]) {
    if (aligned && i + V <= n) {
        Pack<T> pack;
#pragma unroll
        for (int j = 0; j < V; j++) pack.at[j] = static_cast<T>(x[j]);
        *reinterpret_cast<Pack<T>*>(to + i) = pack;
    } else {
#pragma unroll
        for (int j = 0; j < V; j++)
            if (i + j < n) to[i + j] = static_cast<T>(x[j]);
    }
}

// The block's sum, in thread 0, always added in the same order.
template <typename F> __device__ F block_sum(F sum) {
    __shared__ F of_warp[kThreads / 32];
    for (int step = 16; step; step /= 2) sum += __shfl_down_sync(~0u, sum, step);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 1; i < kThreads / 32; i++) sum += of_warp[i];
    return sum;
}

// ---- kernels -----------------------------------------------------------------------------------

template <typename T, bool kSquare>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
focal_kernel(const T* __restrict__ logits, const int64_t* __restrict__ labels,
             const float* __restrict__ scale, T* __restrict__ grad, float* partial, int* finished,
             float* loss, int R, int C, float alpha, float gamma, bool aligned) {
    constexpr int V = Pack<T>::size;
    const float unit = scale ? *scale : 1.f;
    const float positive = alpha * unit, negative = (1.f - alpha) * unit;
    const int64_t n = int64_t(R) * C;
    // a thread's start and stride are below 2^31 (see blocks_for); a division a step would cost
    // more than the loss, so row and column advance with i
    const int start = (blockIdx.x * kThreads + threadIdx.x) * V, stride = gridDim.x * kThreads * V;
    const int row_stride = stride / C, col_stride = stride % C;
    int row = start / C, col = start % C;
    float sum = 0.f;

    for (int64_t i = start; i < n; i += stride, row += row_stride, col += col_stride) {
        if (col >= C) col -= C, row++;
        float x[V], g[V] = {};
        load(logits, i, n, aligned, x);

        // the row's class, if it is among these V; a second row where one ends, more where C < V
        for (int r = row, first = -col; r < R && first < V; r++, first += C) {
            const int64_t label = labels[r];
            if (label < 0 || label >= C) continue;
            const int hot = first + int(label);
            if (hot < 0 || hot >= V) continue;
            float logit = 0.f;
#pragma unroll
            for (int j = 0; j < V; j++)
                if (j == hot) logit = x[j], x[j] = kNothing;
            const float slope = -focal<kSquare>(-logit, positive, gamma, sum);
#pragma unroll
            for (int j = 0; j < V; j++)
                if (j == hot) g[j] = slope;
        }
#pragma unroll
        for (int j = 0; j < V; j++) g[j] += focal<kSquare>(x[j], negative, gamma, sum);
        store(grad, i, n, aligned, g);
    }

    // the block that finishes last adds the partial sums of all
    __shared__ bool last;
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(finished, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    double total = 0;
    for (int b = threadIdx.x; b < gridDim.x; b += kThreads) total += __ldcg(partial + b);
    total = block_sum(total);
    if (threadIdx.x == 0) *loss = static_cast<float>(total * kLn2);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
scale_kernel(T* grad, const float* factor, int64_t n, bool aligned) {
    constexpr int V = Pack<T>::size;
    const float f = *factor;
    if (f == 1.f) return;  // the usual case; only the device knows
    const int64_t stride = int64_t(gridDim.x) * kThreads * V;
    for (int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V; i < n; i += stride) {
        float x[V];
        load(grad, i, n, aligned, x);
        for (float& value : x) value *= f;
        store(grad, i, n, aligned, x);
    }
}

// ---- launchers ---------------------------------------------------------------------------------

template <typename F> void for_dtype(const at::Tensor& x, F launch) {
    switch (x.scalar_type()) {
        case at::kFloat: return launch(float{});
        case at::kHalf: return launch(c10::Half{});
        case at::kBFloat16: return launch(c10::BFloat16{});
        default:
            TORCH_CHECK(false, "csrc.focal_loss: logits must be float32, float16 or bfloat16, got ",
                        x.scalar_type());
    }
}

int blocks_for(const at::Tensor& x) {  // at most as many as the device runs at once
    int sms = 0;
    C10_CUDA_CHECK(
        cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, x.get_device()));
    const int64_t per_block = kThreads * 16 / x.element_size();
    return std::min<int64_t>((x.numel() + per_block - 1) / per_block, sms * kBlocksPerSM);
}

bool is_aligned(const at::Tensor& x) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
}

void check_factor(const char* name, const at::Tensor& factor, const at::Tensor& x) {
    TORCH_CHECK(factor.numel() == 1 && factor.scalar_type() == at::kFloat &&
                    factor.device() == x.device(),
                "csrc.focal_loss: ", name, " must be one float32 on ", x.device(), ", got ",
                factor.sizes(), " ", factor.scalar_type(), " on ", factor.device());
}

std::tuple<at::Tensor, at::Tensor> focal_loss(const at::Tensor& logits_, const at::Tensor& labels_,
                                              double alpha, double gamma,
                                              const std::optional<at::Tensor>& scale) {
    TORCH_CHECK(logits_.dim() == 2 && logits_.size(0) < INT_MAX && logits_.size(1) < INT_MAX,
                "csrc.focal_loss: logits must be (R,C), got ", logits_.sizes());
    TORCH_CHECK(labels_.dim() == 1 && labels_.size(0) == logits_.size(0) &&
                    labels_.scalar_type() == at::kLong && labels_.device() == logits_.device(),
                "csrc.focal_loss: labels must be (", logits_.size(0), ",) int64 on ",
                logits_.device(), ", got ", labels_.sizes(), " ", labels_.scalar_type(), " on ",
                labels_.device());
    TORCH_CHECK(gamma >= 0, "csrc.focal_loss: gamma must be >= 0, got ", gamma);
    if (scale) check_factor("scale", *scale, logits_);

    const c10::cuda::CUDAGuard guard(logits_.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const auto logits = logits_.contiguous(), labels = labels_.contiguous();
    const auto as_float = logits.options().dtype(at::kFloat);
    auto grad = logits.new_empty(logits.sizes());
    if (logits.numel() == 0) return {logits.new_zeros({}, as_float), grad};

    const int blocks = blocks_for(logits);
    auto loss = logits.new_empty({}, as_float), partial = logits.new_empty({blocks}, as_float);
    auto finished = logits.new_empty({}, logits.options().dtype(at::kInt));
    C10_CUDA_CHECK(cudaMemsetAsync(finished.mutable_data_ptr<int>(), 0, sizeof(int), stream));
    for_dtype(logits, [&](auto zero) {
        using T = decltype(zero);
        const auto kernel = gamma == 2 ? focal_kernel<T, true> : focal_kernel<T, false>;
        kernel<<<blocks, kThreads, 0, stream>>>(
            logits.const_data_ptr<T>(), labels.const_data_ptr<int64_t>(),
            scale ? scale->const_data_ptr<float>() : nullptr, grad.mutable_data_ptr<T>(),
            partial.mutable_data_ptr<float>(), finished.mutable_data_ptr<int>(),
            loss.mutable_data_ptr<float>(), logits.size(0), logits.size(1), alpha, gamma,
            is_aligned(logits));
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return {loss, grad};
}

void scale_(at::Tensor grad, const at::Tensor& factor) {
    TORCH_CHECK(grad.is_contiguous(), "csrc.focal_loss: the gradient must be contiguous, got ",
                grad.strides());
    check_factor("the factor", factor, grad);
    if (grad.numel() == 0) return;
    const c10::cuda::CUDAGuard guard(grad.device());
    const auto stream = c10::cuda::getCurrentCUDAStream();
    for_dtype(grad, [&](auto zero) {
        using T = decltype(zero);
        scale_kernel<<<blocks_for(grad), kThreads, 0, stream>>>(
            grad.mutable_data_ptr<T>(), factor.const_data_ptr<float>(), grad.numel(),
            is_aligned(grad));
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} }  // namespace fcos

// ---- registration ------------------------------------------------------------------------------

TORCH_LIBRARY_FRAGMENT(fcos, m) {
    m.def("focal_loss(Tensor logits, Tensor labels, float alpha, float gamma, Tensor? scale)"
          " -> (Tensor loss, Tensor grad)");
    m.def("scale_(Tensor(a!) grad, Tensor factor) -> ()");
}
TORCH_LIBRARY_IMPL(fcos, CUDA, m) {
    m.impl("focal_loss", &fcos::focal_loss);
    m.impl("scale_", &fcos::scale_);
}
