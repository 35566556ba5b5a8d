// Token log-probs -> completion log-probs -> one loss per pair -> one weight per completion, in one launch.
//
// The launch is cooperative and has one grid-wide barrier. Before it, blocks sum the tokens of completions. After it,
// every loss and every weight is a function of a few completion log-probs. The weight of a completion sums over its
// pairs. A warp finds them by scanning all pairs in order, so the order of the sum is fixed, there are no atomics, and
// no list of pairs per completion is needed.
//
// Sums and losses are fp64. There are few values, so fp64 costs little, and neither sums over 100k tokens nor closed
// forms need care for rounding.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 256;

enum class Kind { kSigmoid, kHinge, kIpo, kSlic, kSft };

struct Params {
    const float* token_logps;
    int64_t tokens;
    const void* cu_completions;
    bool wide;
    int64_t completions;
    const int64_t *chosen, *rejected, *targets;
    int64_t pairs;
    const float* ref_logps;
    Kind kind;
    double beta, label_smoothing, slic_delta, slic_lambda;
    bool slic_length_normalize;
    double tokens_per_pair;
    float *completion_logps, *losses, *weights;
};

// Start of completion `s`, clamped to the tokens, so that bad offsets read nothing else.
__device__ inline int64_t start_of(const Params& p, int64_t s) {
    const int64_t start = p.wide ? static_cast<const int64_t*>(p.cu_completions)[s]
                                 : static_cast<const int32_t*>(p.cu_completions)[s];
    return min(max(start, int64_t(0)), p.tokens);
}

__device__ inline double sum_warp(double x) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

__device__ inline double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }
__device__ inline double logistic(double x) { return 1 / (1 + exp(-x)); }

// What a loss reads of a completion. An index out of range gives NaN, and no read elsewhere.
struct Side {
    double logp, ref_logp, length;
    __device__ Side(const Params& p, int64_t s) {
        const bool known = s >= 0 && s < p.completions;
        logp = known ? p.completion_logps[s] : NAN;
        ref_logp = known && p.ref_logps ? p.ref_logps[s] : NAN;
        length = known ? static_cast<double>(start_of(p, s + 1) - start_of(p, s)) : NAN;
    }
    __device__ double ratio() const { return logp - ref_logp; }
};

struct PairLoss {
    double loss, chosen, rejected, target;  // the loss, and its derivatives by the log-probs of the three sides
};

// A loss of cpt_kernels.losses and its derivatives; w, l and y are the chosen, rejected and target side.
__device__ inline PairLoss pair_loss_of(const Params& p, int64_t pair) {
    const int64_t chosen = p.chosen[pair];
    const Side w(p, chosen);
    if (p.kind == Kind::kSft) return {-w.logp / p.tokens_per_pair, -1 / p.tokens_per_pair, 0, 0};
    const Side l(p, p.rejected[pair]);
    if (p.kind == Kind::kSigmoid) {
        const double h = p.beta * (w.ratio() - l.ratio()), e = p.label_smoothing;
        const double slope = p.beta * (e * logistic(h) - (1 - e) * logistic(-h));
        return {(1 - e) * softplus(-h) + e * softplus(h), slope, -slope, 0};
    }
    if (p.kind == Kind::kHinge) {
        const double margin = 1 - p.beta * (w.ratio() - l.ratio());
        const double slope = margin <= 0 ? 0 : -p.beta;  // a NaN margin counts as active, as in PyTorch's relu
        return {margin <= 0 ? 0 : margin, slope, -slope, 0};
    }
    if (p.kind == Kind::kIpo) {
        const double h = w.ratio() / w.length - l.ratio() / l.length - 1 / (2 * p.beta);
        return {h * h, 2 * h / w.length, -2 * h / l.length, 0};
    }
    const Side y(p, p.targets ? p.targets[pair] : chosen);
    const bool mean = p.slic_length_normalize;
    const double nw = mean ? w.length : 1, nl = mean ? l.length : 1, ny = mean ? y.length : 1;
    const double margin = p.slic_delta - w.logp / nw + l.logp / nl, active = margin <= 0 ? 0 : 1;
    return {(margin <= 0 ? 0 : margin) - p.slic_lambda * (y.logp / ny), -active / nw, active / nl, -p.slic_lambda / ny};
}

__global__ void __launch_bounds__(kThreads) pair_loss_kernel(const Params p) {
    CPT_SHARED_MEMORY(memory);
    auto* partial = reinterpret_cast<double*>(memory);  // (kThreads / kWarp,)
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

    // Stage 1: one block per completion sums its tokens: threads, then warps, then the block, in a fixed order.
    for (int64_t s = blockIdx.x; s < p.completions; s += gridDim.x) {
        double sum = 0;
        const int64_t end = start_of(p, s + 1);
#pragma unroll 4
        for (int64_t i = start_of(p, s) + threadIdx.x; i < end; i += kThreads) sum += p.token_logps[i];
        sum = sum_warp(sum);
        if (lane == 0) partial[warp] = sum;
        __syncthreads();  // partial sums are there
        if (threadIdx.x == 0) {
            for (int i = 1; i < kThreads / kWarp; ++i) sum += partial[i];
            p.completion_logps[s] = static_cast<float>(sum);
        }
        __syncthreads();  // partial sums were read
    }
    cg::this_grid().sync();  // completion log-probs are there

    // Stage 2: one thread per pair writes its loss, and one warp per completion its weight.
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t pair = thread; pair < p.pairs; pair += threads)
        p.losses[pair] = static_cast<float>(pair_loss_of(p, pair).loss);

    for (int64_t s = thread / kWarp; s < p.completions; s += threads / kWarp) {
        double weight = 0;
        for (int64_t pair = lane; pair < p.pairs; pair += kWarp) {
            const int64_t chosen = p.chosen[pair];
            const bool is_chosen = chosen == s, is_rejected = p.rejected && p.rejected[pair] == s;
            const bool is_target = (p.targets ? p.targets[pair] : chosen) == s;
            if (!(is_chosen || is_rejected || is_target)) continue;
            const PairLoss it = pair_loss_of(p, pair);
            weight += (is_chosen ? it.chosen : 0) + (is_rejected ? it.rejected : 0) + (is_target ? it.target : 0);
        }
        weight = sum_warp(weight);
        if (lane == 0) p.weights[s] = static_cast<float>(weight);
    }
}

Kind kind_of(const std::string& loss) {
    if (loss == "sigmoid") return Kind::kSigmoid;
    if (loss == "hinge") return Kind::kHinge;
    if (loss == "ipo") return Kind::kIpo;
    if (loss == "slic") return Kind::kSlic;
    if (loss == "sft") return Kind::kSft;
    throw std::invalid_argument("pair_loss: no kernel for loss " + loss);
}

}  // namespace

void pair_loss(Pointer token_logps, int64_t tokens, Pointer cu_completions, bool wide, int64_t completions,
               Pointer chosen, Pointer rejected, Pointer targets, int64_t pairs, Pointer ref_logps,
               const std::string& loss, double beta, double label_smoothing, double slic_delta, double slic_lambda,
               bool slic_length_normalize, double tokens_per_pair, Pointer completion_logps, Pointer losses,
               Pointer weights, Pointer stream) {
    const Kind kind = kind_of(loss);
    require(tokens >= 0 && completions >= 0 && pairs >= 0, "pair_loss: a size is negative");
    require(completions > 0 || pairs == 0, "pair_loss: pairs without completions");
    if (completions == 0) return;
    require(cu_completions && completion_logps && weights && (token_logps || tokens == 0),
            "pair_loss: a pointer is missing");
    require(pairs == 0 || (chosen && losses), "pair_loss: a pointer is missing");
    require(pairs == 0 || rejected || kind == Kind::kSft, "pair_loss: this loss needs rejected completions");
    require(pairs == 0 || ref_logps || kind == Kind::kSft || kind == Kind::kSlic,
            "pair_loss: this loss needs reference log-probs");

    Params p{};
    p.token_logps = reinterpret_cast<const float*>(token_logps);
    p.tokens = tokens;
    p.cu_completions = reinterpret_cast<const void*>(cu_completions);
    p.wide = wide;
    p.completions = completions;
    p.chosen = reinterpret_cast<const int64_t*>(chosen);
    p.rejected = reinterpret_cast<const int64_t*>(rejected);
    p.targets = reinterpret_cast<const int64_t*>(targets);
    p.pairs = pairs;
    p.ref_logps = reinterpret_cast<const float*>(ref_logps);
    p.kind = kind;
    p.beta = beta, p.label_smoothing = label_smoothing;
    p.slic_delta = slic_delta, p.slic_lambda = slic_lambda, p.slic_length_normalize = slic_length_normalize;
    p.tokens_per_pair = tokens_per_pair;
    p.completion_logps = reinterpret_cast<float*>(completion_logps);
    p.losses = reinterpret_cast<float*>(losses);
    p.weights = reinterpret_cast<float*>(weights);

    constexpr size_t kSharedBytes = kThreads / kWarp * sizeof(double);
    int blocks_each = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_each, pair_loss_kernel, kThreads, kSharedBytes),
          "pair_loss: occupancy");
    const int64_t resident = static_cast<int64_t>(blocks_each) * device_attribute(cudaDevAttrMultiProcessorCount);
    const int64_t useful = std::max(completions, (pairs + kThreads - 1) / kThreads);

    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min(resident, useful)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kSharedBytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaLaunchKernelEx(&config, pair_loss_kernel, p), "pair_loss");
    check(cudaGetLastError(), "pair_loss");
}
