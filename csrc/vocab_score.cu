// A tile of logits -> log-probs of its targets, statistics and, in place, the vocab score (onehot - softmax).
//
// The tile is read once and written once in device memory, and the loops over a row have few instructions: issuing them
// limits the kernel as much as memory does (bench/NOTES.md has the counts). Asynchronous copies bring a row into shared
// memory once; it is reduced there, and its score is written from there. A row too long for one
// block (128k bf16 logits are 256 KB) is split over a thread-block cluster (sm_90), whose blocks exchange statistics
// through distributed shared memory. If the row fits in neither, or no score is wanted, it streams from global memory;
// the second read, for the score, then comes mostly from L2.
//
// Statistics are fp32 and summed in a fixed order. There are no atomics, so results are deterministic.

#include <cuda_pipeline.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common.cuh"
#include "kernels.h"
#include "online_softmax.cuh"
#include "vectors.cuh"

namespace {

constexpr int kMaxThreads = 256;          // at 64 registers each, four blocks share a multiprocessor
constexpr int kVectorsPerThread = 16;     // the aim is 256 bytes in flight per thread
constexpr int64_t kReservedBytes = 1024;  // shared memory that the CUDA runtime reserves per block

struct Params {
    void* logits;
    int64_t row_stride;
    int columns, vocab_size;
    const int64_t* targets;
    const float* bias;
    float logit_scale, softcap, inverse_softcap;
    float *logps, *lse, *entropy, *mean_logit, *log_sum_sq;
    bool* correct;
    bool score;
};

// __fmul_rn rounds these two products by themselves. In one fused operation with the subtraction of the maximum, the
// largest logit would differ from the maximum, and a log-prob near 0 would carry the rounding of the logit.
// 1 / softcap comes from the host, because a division takes some ten instructions.
__device__ inline float cap(float z, const Params& p) { return __fmul_rn(tanhf(z * p.inverse_softcap), p.softcap); }
__device__ inline float scaled(float z, const Params& p) { return __fmul_rn(z, p.logit_scale); }
__device__ inline float square(float x) { return x * x; }

// Converts a vector to fp32 logits with bias, scale and cap applied. Columns outside the vocabulary become -inf.
template <typename T>
__device__ __forceinline__ void unpack(const Params& p, const Row<T>& row, int vector, const Vector<T>& x,
                                       float (&z)[Vector<T>::kWidth]) {
    constexpr int kWidth = Vector<T>::kWidth;
    const int first = row.first_column(vector);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) z[i] = to_float(x.values[i]);
    if (p.bias) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
            if (inside(first + i, p.vocab_size)) z[i] += p.bias[first + i];
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) z[i] = scaled(z[i], p);
    if (p.softcap > 0) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) z[i] = cap(z[i], p);
    }
    if (!row.whole(vector, p.vocab_size)) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
            if (!inside(first + i, p.vocab_size)) z[i] = -INFINITY;
    }
}

// Calls `batch(v)` for kBatch whole vectors v, v + step, ... at a time, then `single(v)` for each other vector of a
// thread. A thread owns the vectors first, first + step, ... below end. Vectors from whole_begin up to whole_end are whole.
// whole_begin is 0 or 1, so at most one vector, the thread's first, lies before the whole ones.
template <int kBatch, typename Batch, typename Single>
__device__ __forceinline__ void for_each_vector(int first, int step, int end, int whole_begin, int whole_end,
                                                Batch batch, Single single) {
    int v = first < whole_begin ? first + step : first;
    for (; v + (kBatch - 1) * step < whole_end; v += kBatch * step) batch(v);
    for (int rest = first < whole_begin ? first : v; rest < end; rest = rest < whole_begin ? v : rest + step) single(rest);
}

// One row per cluster (kResident) or per block. kResident: dynamic shared memory holds the block's share of the row.
template <typename T, bool kResident, bool kStatistics>
__global__ void __launch_bounds__(kMaxThreads) vocab_score_kernel(const Params p) {
    constexpr int kWidth = Vector<T>::kWidth;
    constexpr int kBatch = kResident ? 2 : 4;  // vectors loaded before the first is used
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
    const int first = begin + threadIdx.x, step = blockDim.x;

    // The target's logit, read before the score overwrites it. A target outside the vocabulary is not read: NaN.
    const int64_t target = p.targets[row_index];
    const bool known = target >= 0 && target < p.vocab_size;
    float target_logit = NAN;
    if (known) {
        target_logit = to_float(logits[target]);
        if (p.bias) target_logit += p.bias[target];
        target_logit = scaled(target_logit, p);
        if (p.softcap > 0) target_logit = cap(target_logit, p);
    }

    // Stage 1: copy the share to shared memory. A thread uses only vectors that it copied itself, so no barrier is
    // needed between copy and use. Vectors that stick out of the row at either end are copied element by element.
    if (kResident) {
        for (int v = first; v < end; v += step) {
            if (row.whole(v, p.columns)) {
                __pipeline_memcpy_async(&resident[v - begin], row.at(v), 16);
            } else {
                resident[v - begin] = row.load(v, p.columns);
            }
        }
        __pipeline_commit();
        __pipeline_wait_prior(0);
    }

    // Without bias and cap, vectors inside the vocabulary take a short path: no test of a column, and kBatch loads are
    // issued before the first is used, to hide latency. All other vectors are handled one at a time.
    const bool plain = !p.bias && !(p.softcap > 0);
    const int whole_begin = row.shift > 0 ? 1 : 0;
    const int whole_end = plain ? min(end, (row.shift + p.vocab_size) / kWidth) : 0;

    // Stage 2: statistics of this thread's vectors.
    Online<kStatistics> mine;
    const auto reduce_whole = [&](int v0) {
        Vector<T> x[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
            x[b].bits = kResident ? resident[v0 + b * step - begin].bits : row.load_whole(v0 + b * step);
        float z[kBatch * kWidth];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) to_floats(x[b], z + b * kWidth);
#pragma unroll
        for (int i = 0; i < kBatch * kWidth; ++i) z[i] = scaled(z[i], p);
        mine.add(z);
        if (kStatistics) {
#pragma unroll
            for (int i = 0; i < kBatch * kWidth; ++i) mine.total += z[i];
        }
    };
    const auto reduce = [&](int v) {
        float z[kWidth];
        Vector<T> x;
        if (kResident) {
            x = resident[v - begin];
        } else {
            x = row.load(v, p.columns);
        }
        unpack(p, row, v, x, z);
        mine.add(z);
        if (kStatistics) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i)
                if (inside(row.first_column(v) + i, p.vocab_size)) mine.total += z[i];
        }
    };
    for_each_vector<kBatch>(first, step, end, whole_begin, whole_end, reduce_whole, reduce);

    // Stage 3: merge the statistics of the row; one thread writes the results.
    const Online<kStatistics> all = merge_row<kResident>(mine, shared);
    const float lse = all.m + logf(all.s);
    if (rank == 0 && threadIdx.x == 0) {
        p.logps[row_index] = target_logit - all.m - logf(all.s);
        p.lse[row_index] = lse;
        if (kStatistics) {
            p.entropy[row_index] = logf(all.s) - all.w / all.s;
            p.mean_logit[row_index] = all.total / p.vocab_size;
            p.correct[row_index] = known && lse == lse && fmaxf(target_logit, -FLT_MAX) >= all.m;
            p.log_sum_sq[row_index] = logf(all.q) - 2 * logf(all.s);
        }
    }

    // Stage 4: overwrite the row with its score. Padding columns above the vocabulary get 0.
    if (p.score) {
        // Maximum and sum stay apart: e^(z - lse) would carry the rounding of lse, which is large in a peaked row.
        const float normaliser = known ? 1 / all.s : NAN;
        const int target_vector = known ? static_cast<int>((target + row.shift) / kWidth) : -1;
        const int target_element = known ? static_cast<int>((target + row.shift) % kWidth) : -1;
        const float slope = -normaliser * p.logit_scale;
        // A selection adds 1 to the target's element. An addition under `if (i == target_element)` compiles to an array in
        // local memory that target_element indexes.
        const auto score_whole = [&](int v0) {
            Vector<T> x[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; ++b)
                x[b].bits = kResident ? resident[v0 + b * step - begin].bits : row.load_whole(v0 + b * step);
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const int v = v0 + b * step;
                float z[kWidth];
                to_floats(x[b], z);
#pragma unroll
                for (int i = 0; i < kWidth; ++i) z[i] = exponential(scaled(z[i], p) - all.m) * slope;
                if (v == target_vector) {
#pragma unroll
                    for (int i = 0; i < kWidth; ++i)
                        z[i] += i == target_element ? p.logit_scale : 0;
                }
#pragma unroll
                for (int i = 0; i < kWidth; i += 2) store_pair(&x[b].values[i], z[i], z[i + 1]);
                row.store_whole(v, x[b]);
            }
        };
        const auto score = [&](int v) {
            Vector<T> x;
            if (kResident) {
                x = resident[v - begin];
            } else {
                x = row.load(v, p.columns);
            }
            float z[kWidth], gradient[kWidth];
            unpack(p, row, v, x, z);
#pragma unroll
            for (int i = 0; i < kWidth; ++i) gradient[i] = -exponential(z[i] - all.m) * normaliser;
            if (v == target_vector) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i)
                    gradient[i] += i == target_element ? 1 : 0;
            }
#pragma unroll
            for (int i = 0; i < kWidth; ++i) gradient[i] *= p.logit_scale;
            if (p.softcap > 0) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i) gradient[i] *= 1 - square(z[i] * p.inverse_softcap);
            }
            if (!row.whole(v, p.vocab_size)) {
#pragma unroll
                for (int i = 0; i < kWidth; ++i)
                    if (!inside(row.first_column(v) + i, p.vocab_size)) gradient[i] = 0;
            }
#pragma unroll
            for (int i = 0; i < kWidth; i += 2) store_pair(&x.values[i], gradient[i], gradient[i + 1]);
            row.store(v, p.columns, x);
        };
        for_each_vector<kBatch>(first, step, end, whole_begin, whole_end, score_whole, score);
    }
    // No block may leave while others read its statistics. Each thread arrived after its last such read, so nothing here
    // waits for the stores of the score.
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
// reduction and a third's writes overlap. If there is none, it takes the largest cluster, provided that two blocks share
// a multiprocessor. With clusters one block is enough: the row is still read once and not twice.
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

template <typename T, bool kResident, bool kStatistics>
void launch(const Params& p, int64_t rows, const Plan& plan, cudaStream_t stream) {
    const auto kernel = vocab_score_kernel<T, kResident, kStatistics>;
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

template <typename T>
void launch(const Params& p, int64_t rows, bool statistics, cudaStream_t stream) {
    constexpr int kWidth = Vector<T>::kWidth;
    // A row that does not start at a 16-byte boundary touches one more vector.
    const int64_t row_vectors = ceil_divide(p.columns + kWidth - 1, kWidth);
    const int64_t unaligned = statistics ? sizeof(SharedStatistics<true>) : sizeof(SharedStatistics<false>);
    const int64_t statistics_bytes = ceil_divide(unaligned, 16) * 16;
    const Plan plan = make_plan(row_vectors, statistics_bytes, p.score);
    require(rows <= INT32_MAX / plan.cluster, "vocab_score: too many rows for one launch");
    if (plan.resident) {
        (statistics ? launch<T, true, true> : launch<T, true, false>)(p, rows, plan, stream);
    } else {
        (statistics ? launch<T, false, true> : launch<T, false, false>)(p, rows, plan, stream);
    }
}

}  // namespace

void vocab_score(Pointer logits, const std::string& dtype, int64_t rows, int64_t columns, int64_t row_stride,
                 int64_t vocab_size, Pointer targets, Pointer bias, float logit_scale, float softcap, Pointer logps,
                 Pointer lse, Pointer entropy, Pointer mean_logit, Pointer correct, Pointer log_sum_sq, bool score,
                 Pointer stream) {
    require(rows >= 0 && columns > 0 && columns <= INT32_MAX / 2, "vocab_score: rows or columns out of range");
    require(vocab_size > 0 && vocab_size <= columns, "vocab_score: vocab_size is not within the columns");
    require(!score || rows <= 1 || row_stride >= columns, "vocab_score: rows overlap, no score can be written over them");
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
    p.logps = reinterpret_cast<float*>(logps);
    p.lse = reinterpret_cast<float*>(lse);
    p.entropy = reinterpret_cast<float*>(entropy);
    p.mean_logit = reinterpret_cast<float*>(mean_logit);
    p.correct = reinterpret_cast<bool*>(correct);
    p.log_sum_sq = reinterpret_cast<float*>(log_sum_sq);
    p.score = score;
    const auto cuda_stream = reinterpret_cast<cudaStream_t>(stream);
    if (dtype == "bfloat16") {
        launch<__nv_bfloat16>(p, rows, statistics, cuda_stream);
    } else if (dtype == "float16") {
        launch<__half>(p, rows, statistics, cuda_stream);
    } else if (dtype == "float32") {
        launch<float>(p, rows, statistics, cuda_stream);
    } else {
        throw std::invalid_argument("vocab_score: no kernel for dtype " + dtype);
    }
}
