// Statistics of a softmax in one pass over a row, merged over threads, warps, blocks and thread-block clusters.
#pragma once

#include <cfloat>
#include <cmath>

#include "common.cuh"

namespace {

// 2^x in one instruction. Results below 2^-126 become 0.
__device__ inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

__device__ inline float reciprocal_fast(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1 / x;
#endif
}

// A sum as its rounded value and what rounding lost (Knuth's two-sum). The sum of a peaked row is 1 and very little,
// and its logarithm is the result, which would be a rounding error without `low`. log() is right for sums from 1 on,
// and for 0. An infinite value makes low NaN, which log() ignores.
struct Sum {
    float high = 0, low = 0;
    __device__ void add(float x) {
        const float before = high;
        high = __fadd_rn(before, x);  // not in one operation with a product that `before` comes from
        const float added = high - before;
        low += (before - (high - added)) + (x - added);
    }
    __device__ void add(Sum other) {
        add(other.high);
        low += other.low;
    }
    __device__ void scale(float factor) { high *= factor, low *= factor; }
    __device__ float log() const { return log1pf(high - 1 + (low == low ? low : 0)); }
    __device__ Sum shuffle_xor(int distance) const {
        Sum other;
        other.high = __shfl_xor_sync(kAllLanes, high, distance);
        other.low = __shfl_xor_sync(kAllLanes, low, distance);
        return other;
    }
};

// Sums over some numbers y of which the logits z are a multiple: e^(z - max z) = 2^t with t = unit (y - m), m = max y
// and unit = (z / y) log2 e. The subtraction comes first, so that t is 0 at the maximum, and a number that all y have
// in common costs no digits. m stays finite, so the difference of two maxima is never inf - inf. An infinite logit then
// shows as an infinite sum and a NaN as a NaN sum, and every statistic equals eager PyTorch's without any branch.
template <bool kStatistics>
struct Online {
    float m = -FLT_MAX;
    Sum s;             // of 2^t
    Sum q;             // of 2^2t
    float w = 0;       // sum t 2^t
    float total = 0;   // sum y
    float unused = 0;  // fills 32 bytes: copies take 16 bytes at a time, and read nothing that was not written

    __device__ void rescale(float new_m, float unit) {
        const float t = fmaxf((m - new_m) * unit, -1e4f);  // 2^-10000 is 0 as well, and s * t stays finite
        const float factor = exp2_fast(t);
        if (kStatistics) {
            w = (w + s.high * t) * factor;
            q.scale(factor * factor);
        }
        s.scale(factor);
        m = new_m;
    }

    // Adds to all sums but `total`: padding columns come as -inf, which must not enter a sum of y.
    template <int kCount>
    __device__ __forceinline__ void add(const float (&y)[kCount], float largest, float unit) {
        rescale(fminf(fmaxf(m, largest), FLT_MAX), unit);
        float sum = 0, square_sum = 0;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            const float t = (y[i] - m) * unit, e = exp2_fast(t);
            sum += e;
            if (kStatistics) {
                w += fmaxf(t, -FLT_MAX) * e;  // -inf * 0 would be NaN
                square_sum += e * e;
            }
        }
        s.add(sum);
        if (kStatistics) q.add(square_sum);
    }

    __device__ void merge(Online other, float unit) {
        const float new_m = fmaxf(m, other.m);
        rescale(new_m, unit);
        other.rescale(new_m, unit);
        s.add(other.s), q.add(other.q), w += other.w, total += other.total;
    }

    // Merges the lanes of a warp by a fixed tree. Lane 0 holds the result; other lanes may differ by rounding.
    __device__ void merge_warp(float unit) {
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            Online other;
            other.m = __shfl_xor_sync(kAllLanes, m, distance);
            other.s = s.shuffle_xor(distance);
            if (kStatistics) {
                other.q = q.shuffle_xor(distance);
                other.w = __shfl_xor_sync(kAllLanes, w, distance);
                other.total = __shfl_xor_sync(kAllLanes, total, distance);
            }
            merge(other, unit);
        }
    }
};

// The thread-block cluster that a row is split over.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
struct Cluster {
    __device__ static int rank() { return cg::this_cluster().block_rank(); }
    __device__ static int size() { return cg::this_cluster().num_blocks(); }
    __device__ static void sync() { cg::this_cluster().sync(); }
    __device__ static void arrive() { cg::this_cluster().barrier_arrive(); }
    __device__ static void wait() { cg::this_cluster().barrier_wait(); }
    template <typename V>
    __device__ static V read(V* shared, int of_rank) {
        return *cg::this_cluster().map_shared_rank(shared, of_rank);
    }
};
#else  // before Hopper there are no clusters: each block is its own
struct Cluster {
    __device__ static int rank() { return 0; }
    __device__ static int size() { return 1; }
    __device__ static void sync() { __syncthreads(); }
    __device__ static void arrive() {}
    __device__ static void wait() {}
    template <typename V>
    __device__ static V read(V* shared, int) {
        return *shared;
    }
};
#endif

template <bool kStatistics>
struct SharedStatistics {
    Online<kStatistics> warps[kWarp];
    Online<kStatistics> block;
};

// Merges the statistics of a whole row. Every thread gets m and s.high; lane 0 of each warp gets all. With kSplit,
// every thread has arrived at the cluster's barrier afterwards and must wait for it before it leaves.
template <bool kSplit, bool kStatistics>
__device__ Online<kStatistics> merge_row(Online<kStatistics> mine, SharedStatistics<kStatistics>* shared, float unit) {
    const int lane = threadIdx.x % kWarp;
    mine.merge_warp(unit);
    if (lane == 0) shared->warps[threadIdx.x / kWarp] = mine;
    __syncthreads();  // the warps' statistics are there
    mine = lane < blockDim.x / kWarp ? shared->warps[lane] : Online<kStatistics>();
    mine.merge_warp(unit);
    if (kSplit) {
        if (threadIdx.x == 0) shared->block = mine;
        Cluster::sync();  // the blocks' statistics are there
        mine = lane < Cluster::size() ? Cluster::read(&shared->block, lane) : Online<kStatistics>();
        Cluster::arrive();  // this thread reads no other block's memory any more
        mine.merge_warp(unit);
    }
    mine.m = __shfl_sync(kAllLanes, mine.m, 0);
    mine.s.high = __shfl_sync(kAllLanes, mine.s.high, 0);
    return mine;
}

}  // namespace
