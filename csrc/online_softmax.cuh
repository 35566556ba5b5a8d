// Statistics of a softmax in one pass over a row, merged over threads, warps, blocks and thread-block clusters.
#pragma once

#include <cfloat>
#include <cmath>

#include "common.cuh"

namespace {

// e^x in two instructions. __expf takes five, because it handles subnormal results; these become 0 here.
__device__ inline float exponential(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
    return result;
#else
    return expf(x);
#endif
}

// Sums over some logits z, relative to their maximum m. m stays finite, so the difference of two maxima is never
// inf - inf. An infinite logit then shows as an infinite sum and a NaN as a NaN sum, and every statistic equals eager
// PyTorch's without any branch.
template <bool kStatistics>
struct Online {
    float m = -FLT_MAX;
    float s = 0;      // sum e^(z-m)
    float w = 0;      // sum (z-m) e^(z-m)
    float q = 0;      // sum e^2(z-m)
    float total = 0;  // sum z

    __device__ void rescale(float new_m) {
        const float d = fmaxf(m - new_m, -1e4f);  // e^-10000 is 0 as well, and s * d stays finite
        const float factor = exponential(d);
        if (kStatistics) {
            w = (w + s * d) * factor;
            q *= factor * factor;
        }
        s *= factor;
        m = new_m;
    }

    // Adds to all sums but `total`: padding columns come as -inf, which must not enter a sum of z.
    template <int kWidth>
    __device__ void add(const float (&z)[kWidth]) {
        float largest = z[0];
#pragma unroll
        for (int i = 1; i < kWidth; ++i) largest = fmaxf(largest, z[i]);
        rescale(fminf(fmaxf(m, largest), FLT_MAX));
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
            const float d = z[i] - m;
            const float e = exponential(d);
            s += e;
            if (kStatistics) {
                w += fmaxf(d, -FLT_MAX) * e;  // -inf * 0 would be NaN
                q += e * e;
            }
        }
    }

    __device__ void merge(Online other) {
        const float new_m = fmaxf(m, other.m);
        rescale(new_m);
        other.rescale(new_m);
        s += other.s, w += other.w, q += other.q, total += other.total;
    }

    // Merges the lanes of a warp by a fixed tree. Lane 0 holds the result; other lanes may differ by rounding.
    __device__ void merge_warp() {
#pragma unroll
        for (int distance = kWarp / 2; distance > 0; distance /= 2) {
            Online other;
            other.m = __shfl_xor_sync(kAllLanes, m, distance);
            other.s = __shfl_xor_sync(kAllLanes, s, distance);
            if (kStatistics) {
                other.w = __shfl_xor_sync(kAllLanes, w, distance);
                other.q = __shfl_xor_sync(kAllLanes, q, distance);
                other.total = __shfl_xor_sync(kAllLanes, total, distance);
            }
            merge(other);
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

// Merges the statistics of a whole row. Every thread gets m and s; lane 0 of each warp also gets w, q and total. With
// kSplit, every thread has arrived at the cluster's barrier afterwards and must wait for it before it leaves.
template <bool kSplit, bool kStatistics>
__device__ Online<kStatistics> merge_row(Online<kStatistics> mine, SharedStatistics<kStatistics>* shared) {
    const int lane = threadIdx.x % kWarp;
    mine.merge_warp();
    if (lane == 0) shared->warps[threadIdx.x / kWarp] = mine;
    __syncthreads();  // the warps' statistics are there
    mine = lane < blockDim.x / kWarp ? shared->warps[lane] : Online<kStatistics>();
    mine.merge_warp();
    if (kSplit) {
        if (threadIdx.x == 0) shared->block = mine;
        Cluster::sync();  // the blocks' statistics are there
        mine = lane < Cluster::size() ? Cluster::read(&shared->block, lane) : Online<kStatistics>();
        Cluster::arrive();  // this thread reads no other block's memory any more
        mine.merge_warp();
    }
    mine.m = __shfl_sync(kAllLanes, mine.m, 0);
    mine.s = __shfl_sync(kAllLanes, mine.s, 0);
    return mine;
}

}  // namespace
