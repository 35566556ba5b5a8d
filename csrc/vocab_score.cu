// A tile of logits -> log-probs of its targets, statistics and, in place, the vocab score (onehot - softmax).
//
// The tile is read once and written once in device memory. An H200 moves an element (two times two bytes) in the time
// of some 20 instructions, so the loops over a row must have fewer (bench/NOTES.md has the counts): loops over whole
// vectors test no column, maxima are taken over packed pairs, scale and log2 e are one factor of the exponent, and the
// target's element is written apart.
//
// Asynchronous copies bring a row into shared memory once; it is reduced there, and its score is written from there. A
// row too long for one block (128k bf16 logits are 256 KB) is split over a thread-block cluster (sm_90), whose blocks
// exchange statistics through distributed shared memory. If the row fits in neither, or no score is wanted, it streams
// from global memory; the second read, for the score, then comes mostly from L2.
//
// Statistics are fp32 and summed in a fixed order. There are no atomics, so results are deterministic.

#include <cuda_pipeline.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common.cuh"
#include "kernels.h"
#include "online_softmax.cuh"
#include "vectors.cuh"

namespace {

constexpr int kMaxThreads = 256;
constexpr int kBlocks = 3;                // of this many threads share a multiprocessor, so a thread has 80 registers
constexpr int kVectorsPerThread = 16;     // the aim is 256 bytes in flight per thread
constexpr int64_t kReservedBytes = 1024;  // shared memory that the CUDA runtime reserves per block
constexpr double kLog2E = 1.4426950408889634;
constexpr float kLn2 = 0.6931471805599453f;

struct Params {
    void* logits;
    int64_t row_stride;
    int columns, vocab_size;
    const int64_t* targets;
    const float* bias;
    float logit_scale, softcap, inverse_softcap;
    float factor, unit;  // logits are `factor` times the numbers that are reduced; unit = factor log2 e
    float *logps, *lse, *entropy, *mean_logit, *log_sum_sq;
    bool* correct;
    bool score;
};

// Applies the scale and, if kCapped, c tanh(u / c). Every operation rounds as written, so that z has the same bits
// wherever it is computed. Otherwise the largest logit could differ from the maximum, and a log-prob near 0 would carry
// the difference.
// Near 0 tanh is an odd polynomial, because 1 - 2 / (e^2x + 1) cancels there.
template <bool kCapped>
__device__ __forceinline__ float scaled(float z, const Params& p) {
    z = __fmul_rn(z, p.logit_scale);
    if (!kCapped) return z;
    const float x = __fmul_rn(z, p.inverse_softcap), square = __fmul_rn(x, x);
    float small = __fmaf_rn(1.64374650e-2f, square, -5.26717548e-2f);
    small = __fmaf_rn(small, square, 1.33207242e-1f);
    small = __fmaf_rn(small, square, -3.33329466e-1f);
    small = __fmaf_rn(__fmul_rn(small, square), z, z);
    const float e = exp2_fast(__fmul_rn(fabsf(x), static_cast<float>(2 * kLog2E)));
    const float large = copysignf(__fmaf_rn(-2 * p.softcap, reciprocal_fast(1 + e), p.softcap), z);
    return fabsf(x) < 0.55f ? small : large;
}
__device__ inline float square(float x) { return x * x; }

// Applies bias, scale and cap to the columns first, first + 1, ... kWhole: all lie within the vocabulary, and their
// bias starts at a multiple of 16 bytes.
template <bool kWhole, int kWidth>
__device__ __forceinline__ void adjust(const Params& p, int first, float* z) {
    if (p.bias) {
        const float* const bias = p.bias + first;
        if (kWhole) {
#pragma unroll
            for (int i = 0; i < kWidth; i += 4) {
                Vector<float> four;
                four.bits = __ldg(reinterpret_cast<const uint4*>(bias + i));
#pragma unroll
                for (int j = 0; j < 4; ++j) z[i + j] += four.values[j];
            }
        } else {
#pragma unroll
            for (int i = 0; i < kWidth; ++i)
                if (inside(first + i, p.vocab_size)) z[i] += __ldg(bias + i);
        }
    }
    if (p.softcap > 0) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[i] = scaled<true>(z[i], p);
    } else {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[i] = scaled<false>(z[i], p);
    }
}

// A number of vectors as a type, so that a lambda can be compiled for several.
template <int kCount>
using Count = std::integral_constant<int, kCount>;

// Calls f(Count<kBatch>, v) for batches of the whole vectors v, v + kWarp, ..., and f(Count<1>, v) for each other
// vector. A batch of a warp is kBatch * kWarp consecutive vectors, so all addresses in it are one address and
// constants. Which thread owns a vector depends on begin and kBatch alone. Vectors from whole_begin up to whole_end are
// whole; at most the first vector of a row lies before them.
template <int kBatch, typename F>
__device__ __forceinline__ void for_each_vector(int begin, int end, int whole_begin, int whole_end, F f) {
    constexpr int kChunk = kBatch * kWarp;
    const int lane = threadIdx.x % kWarp, step = blockDim.x * kBatch;
    const int first = begin + static_cast<int>(threadIdx.x / kWarp) * kChunk;
    const bool ragged = first < whole_begin;
    int chunk = ragged ? first + step : first;
    for (; chunk + kChunk <= whole_end; chunk += step) f(Count<kBatch>(), chunk + lane);
    for (int rest = ragged ? first : chunk; rest < end; rest = rest < whole_begin ? chunk : rest + step) {
#pragma unroll 1
        for (int v = rest + lane; v < min(rest + kChunk, end); v += kWarp) f(Count<1>(), v);
    }
}

// One row per cluster (kResident) or per block. kResident: dynamic shared memory holds the block's share of the row.
// kAdjusted: logits have a bias, a cap or a scale that is not positive. Otherwise the raw logits x are reduced, and the
// scale is part of `unit` and `factor`.
template <typename T, bool kResident, bool kStatistics, bool kAdjusted>
__global__ void __launch_bounds__(kMaxThreads, kBlocks) vocab_score_kernel(const Params p) {
    constexpr int kWidth = Vector<T>::kWidth;
    constexpr int kBatch = 4;  // vectors loaded before the first is used
    CPT_SHARED_MEMORY(memory);
    auto* shared = reinterpret_cast<SharedStatistics<kStatistics>*>(memory);
    auto* resident = reinterpret_cast<Vector<T>*>(memory + (sizeof(SharedStatistics<kStatistics>) + 15) / 16 * 16);

    // This block's share of the row, in 16-byte vectors.
    const int rank = kResident ? Cluster::rank() : 0, size = kResident ? Cluster::size() : 1;
    const int64_t row_index = blockIdx.x / size;
    T* const logits = static_cast<T*>(p.logits) + row_index * p.row_stride;
    const Row<T> row(logits);
    const int vectors = row.vectors(p.columns), share = (vectors + size - 1) / size;
    const int begin = min(rank * share, vectors), end = min(begin + share, vectors);
    const int whole_begin = row.shift > 0 ? 1 : 0;
    const auto whole_end = [&](int columns) { return min(end, (row.shift + columns) / kWidth); };
    // A bias is read 16 bytes at a time, too; where it does not lie as the row does, vectors are used one by one.
    const bool aligned = !kAdjusted || !p.bias || reinterpret_cast<uintptr_t>(p.bias - row.shift) % 16 == 0;
    const int batches_end = aligned ? whole_end(p.vocab_size) : 0;

    // The target's logit, read before the score overwrites it. A target outside the vocabulary is not read: NaN.
    const int64_t target = p.targets[row_index];
    const bool known = target >= 0 && target < p.vocab_size;
    float target_y = NAN;
    if (known) {
        target_y = to_float(logits[target]);
        if (kAdjusted) adjust<false, 1>(p, static_cast<int>(target), &target_y);
    }

    // Stage 1: copy the share to shared memory. A thread uses only vectors that it copied itself, so no barrier is
    // needed between copy and use. Vectors that stick out of the row at either end are copied element by element.
    if (kResident) {
        for_each_vector<kBatch>(begin, end, whole_begin, whole_end(p.columns), [&](auto count, int v) {
            constexpr int n = decltype(count)::value;
            if (n > 1 || row.whole(v, p.columns)) {
#pragma unroll
                for (int b = 0; b < n * kWarp; b += kWarp)
                    __pipeline_memcpy_async(&resident[v - begin + b], row.at(v) + b * kWidth, 16);
            } else {
                resident[v - begin] = row.load(v, p.columns);
            }
        });
        __pipeline_commit();
        __pipeline_wait_prior(0);
    }

    // Reads some vectors x, and the numbers y that are reduced. All loads are issued before the first is used, to hide
    // latency. A single vector may stick out of the vocabulary: y is -inf there.
    const auto read = [&](auto count, int v, auto& x, auto& y) {
        constexpr int n = decltype(count)::value;
#pragma unroll
        for (int b = 0; b < n; ++b) {
            if (kResident) {
                x[b] = resident[v - begin + b * kWarp];
            } else if (n > 1) {
                x[b].bits = *reinterpret_cast<const uint4*>(row.at(v) + b * kWarp * kWidth);
            } else {
                x[b] = row.load(v, p.columns);
            }
        }
#pragma unroll
        for (int b = 0; b < n; ++b) {
            to_floats(x[b], y + b * kWidth);
            if (kAdjusted) adjust<(n > 1), kWidth>(p, row.first_column(v + b * kWarp), y + b * kWidth);
        }
        if (n == 1 && !row.whole(v, p.vocab_size)) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i)
                if (!inside(row.first_column(v) + i, p.vocab_size)) y[i] = -INFINITY;
        }
    };

    // Stage 2: statistics of this thread's vectors.
    Online<kStatistics> mine;
    for_each_vector<kBatch>(begin, end, whole_begin, batches_end, [&](auto count, int v) {
        constexpr int n = decltype(count)::value;
        Vector<T> x[n];
        float y[n * kWidth];
        read(count, v, x, y);
        mine.add(y, n == 1 || kAdjusted ? largest_of(y) : largest_of(x), p.unit);
        if (kStatistics) {
#pragma unroll
            for (int i = 0; i < n * kWidth; ++i)
                if (n > 1 || inside(row.first_column(v) + i, p.vocab_size)) mine.total += y[i];
        }
    });

    // Stage 3: merge the statistics of the row; one thread writes the results.
    const Online<kStatistics> all = merge_row<kResident>(mine, shared, p.unit);
    const float largest = p.factor * all.m, log_sum = all.s.log(), lse = largest + log_sum;
    if (rank == 0 && threadIdx.x == 0) {
        p.logps[row_index] = (target_y - all.m) * p.factor - log_sum;
        p.lse[row_index] = lse;
        if (kStatistics) {
            p.entropy[row_index] = log_sum - kLn2 * all.w / all.s.high;
            p.mean_logit[row_index] = p.factor * all.total / p.vocab_size;
            p.correct[row_index] = known && lse == lse && p.factor * fmaxf(target_y, -FLT_MAX) >= largest;
            p.log_sum_sq[row_index] = all.q.log() - 2 * log_sum;
        }
    }

    // Stage 4: overwrite the row with its score. Padding columns above the vocabulary get 0.
    if (p.score) {
        // Maximum and sum stay apart: e^(z - lse) would carry the rounding of lse, which is large in a peaked row. The
        // factor on the exponential is part of the exponent where a 16-bit result hides the rounding of its logarithm.
        const float normaliser = known ? 1 / all.s.high : NAN;
        const float slope = -normaliser * p.logit_scale, log_slope = log2f(-slope);
        const bool capped = kAdjusted && p.softcap > 0;
        for_each_vector<kBatch>(begin, end, whole_begin, batches_end, [&](auto count, int v) {
            constexpr int n = decltype(count)::value;
            Vector<T> x[n];
            float y[n * kWidth];
            read(count, v, x, y);
#pragma unroll
            for (int i = 0; i < n * kWidth; ++i) {
                const float d = y[i] - all.m;
                if (sizeof(T) == 2 && !kAdjusted) {
                    y[i] = -exp2_fast(d * p.unit + log_slope);
                } else {
                    y[i] = exp2_fast(d * p.unit) * slope * (capped ? 1 - square(y[i] * p.inverse_softcap) : 1);
                }
                if (n == 1 && !inside(row.first_column(v) + i, p.vocab_size)) y[i] = 0;
            }
#pragma unroll
            for (int b = 0; b < n; ++b) {
#pragma unroll
                for (int i = 0; i < kWidth; i += 2)
                    store_pair(&x[b].values[i], y[b * kWidth + i], y[b * kWidth + i + 1]);
                if (n > 1) {
                    x[b].store_to(row.at(v) + b * kWarp * kWidth);
                } else {
                    row.store(v, p.columns, x[b]);
                }
            }
        });
        // The thread that wrote the target's vector overwrites the target's element: a test in the loop costs more.
        const int own = static_cast<int>(target + row.shift) / kWidth - begin;
        const int owner = own / (kBatch * kWarp) * kWarp % blockDim.x + own % kWarp;
        if (known && own >= 0 && own < end - begin && owner == threadIdx.x) {
            const float slope_of_cap = capped ? 1 - square(target_y * p.inverse_softcap) : 1;
            const float gradient = 1 - exp2_fast((target_y - all.m) * p.unit) * normaliser;
            Vector<T> x;
            store_pair(x.values, gradient * p.logit_scale * slope_of_cap, 0);
            logits[target] = x.values[0];
        }
    }
    // No block may leave while others read its statistics. Each thread arrived after its last such read, so nothing
    // here waits for the stores of the score.
    if (kResident) Cluster::wait();
}

struct Plan {
    bool resident;
    int cluster;  // blocks per row
    int threads;
    int64_t shared_bytes;
};

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chooses the smallest cluster with which three blocks share a multiprocessor: then one block's reads, another's
// reduction and a third's writes overlap. If there is none, it takes the largest cluster, provided that two blocks
// share a multiprocessor. With clusters one block is enough: the row is still read once and not twice.
Plan make_plan(int64_t row_vectors, int64_t statistics_bytes, bool score) {
    const auto threads_for = [](int64_t vectors) {
        const int64_t warps = ceil_divide(ceil_divide(vectors, kVectorsPerThread), kWarp);
        return static_cast<int>(std::min<int64_t>(std::max<int64_t>(warps, 1) * kWarp, kMaxThreads));
    };
    const bool clusters = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
    const int64_t per_multiprocessor = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    const int largest = clusters ? 8 : 1;  // every device with clusters supports 8
    for (int cluster = 1; score && cluster <= largest; cluster *= 2) {
        const int64_t share = ceil_divide(row_vectors, cluster), bytes = statistics_bytes + 16 * share;
        const int64_t blocks = per_multiprocessor / (bytes + kReservedBytes);
        if (blocks >= 3 || (cluster == largest && blocks >= (clusters ? 1 : 2)))
            return {true, cluster, threads_for(share), bytes};
    }
    return {false, 1, threads_for(row_vectors), statistics_bytes};
}

template <typename T, bool kResident, bool kStatistics, bool kAdjusted>
void launch(const Params& p, int64_t rows, const Plan& plan, cudaStream_t stream) {
    const auto kernel = vocab_score_kernel<T, kResident, kStatistics, kAdjusted>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
          "vocab_score: shared memory");
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.cluster, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(rows * plan.cluster));
    config.blockDim = dim3(plan.threads);
    config.dynamicSmemBytes = plan.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = plan.cluster > 1 ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, p), "vocab_score");
    check(cudaGetLastError(), "vocab_score");
}

template <typename T, bool kAdjusted>
void launch(const Params& p, int64_t rows, bool statistics, cudaStream_t stream) {
    constexpr int kWidth = Vector<T>::kWidth;
    // A row that does not start at a 16-byte boundary touches one more vector.
    const int64_t row_vectors = ceil_divide(p.columns + kWidth - 1, kWidth);
    const int64_t unaligned = statistics ? sizeof(SharedStatistics<true>) : sizeof(SharedStatistics<false>);
    const int64_t statistics_bytes = ceil_divide(unaligned, 16) * 16;
    const Plan plan = make_plan(row_vectors, statistics_bytes, p.score);
    require(rows <= INT32_MAX / plan.cluster, "vocab_score: too many rows for one launch");
    if (plan.resident) {
        (statistics ? launch<T, true, true, kAdjusted> : launch<T, true, false, kAdjusted>)(p, rows, plan, stream);
    } else {
        (statistics ? launch<T, false, true, kAdjusted> : launch<T, false, false, kAdjusted>)(p, rows, plan, stream);
    }
}

}  // namespace

void vocab_score(Pointer logits, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
                 int64_t vocab_size, Pointer targets, Pointer bias, float logit_scale, float softcap, Pointer logps,
                 Pointer lse, Pointer entropy, Pointer mean_logit, Pointer correct, Pointer log_sum_sq, bool score,
                 Pointer stream) {
    require(rows >= 0 && columns > 0 && columns <= INT32_MAX / 2, "vocab_score: rows or columns out of range");
    require(vocab_size > 0 && vocab_size <= columns, "vocab_score: vocab_size is not within the columns");
    require(!score || rows <= 1 || row_stride >= columns,
            "vocab_score: rows overlap, no score can be written over them");
    require(softcap >= 0, "vocab_score: softcap must be positive, or 0 for none");
    if (rows == 0) return;
    require(logits && targets && logps && lse, "vocab_score: a pointer is missing");
    const bool statistics = entropy != 0;
    require(statistics == (mean_logit != 0) && statistics == (correct != 0) && statistics == (log_sum_sq != 0),
            "vocab_score: all four statistics or none");

    Params p{};
    p.logits = reinterpret_cast<void*>(logits);
    p.row_stride = row_stride;
    p.columns = static_cast<int>(columns);
    p.vocab_size = static_cast<int>(vocab_size);
    p.targets = reinterpret_cast<const int64_t*>(targets);
    p.bias = reinterpret_cast<const float*>(bias);
    p.logit_scale = logit_scale;
    p.softcap = softcap;
    p.inverse_softcap = softcap > 0 ? 1 / softcap : 0;
    // A maximum of raw logits is one of scaled logits only if the scale is positive.
    const bool adjusted = bias || softcap > 0 || !(logit_scale > 0);
    p.factor = adjusted ? 1 : logit_scale;
    p.unit = static_cast<float>(p.factor * kLog2E);
    p.logps = reinterpret_cast<float*>(logps);
    p.lse = reinterpret_cast<float*>(lse);
    p.entropy = reinterpret_cast<float*>(entropy);
    p.mean_logit = reinterpret_cast<float*>(mean_logit);
    p.correct = reinterpret_cast<bool*>(correct);
    p.log_sum_sq = reinterpret_cast<float*>(log_sum_sq);
    p.score = score;
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (dtype == "bfloat16") {
        (adjusted ? launch<__nv_bfloat16, true> : launch<__nv_bfloat16, false>)(p, rows, statistics, cuda_stream);
    } else if (dtype == "float16") {
        (adjusted ? launch<__half, true> : launch<__half, false>)(p, rows, statistics, cuda_stream);
    } else if (dtype == "float32") {
        (adjusted ? launch<float, true> : launch<float, false>)(p, rows, statistics, cuda_stream);
    } else {
        throw std::invalid_argument("vocab_score: no kernel for dtype " + dtype);
    }
}
