// CUDA C++ on the CPU: the part of the language and of its runtime that g++ needs to compile the .cu files of csrc/
// unchanged. They run at small sizes, so their logic is tested without a GPU.
//
// Threads that can synchronise (a block, a cluster, the grid of a cooperative launch) run together as fibers, each up to
// its next barrier. The scheduler always runs the lowest thread that can run (or always the highest), so threads are as
// far apart as barriers allow. If a barrier is missing between a write and another thread's access, one of the two
// orders shows it every time. Shared memory holds NaNs when a block starts and again after it has left. Asynchronous
// copies arrive only when the kernel waits for them. With -DEMULATION_THREADS fibers become std::threads, for the
// sanitizers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#ifdef EMULATION_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CPT_SHARED_MEMORY(name) unsigned char* const name = emulation::current->block->shared.get()

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace emulation {

// Properties of the emulated device; see configure() in emulation.cpp.
struct Device {
    bool descending = false;
    int major = 9;
    int shared_per_multiprocessor = 228 << 10;
    int multiprocessors = 4;
};
extern Device device;

class Barrier {
  public:
    explicit Barrier(int expected) : expected_(expected) {}
    void wait() { finish(arrive()); }
    int arrive();                  // returns the generation that finish() waits for
    void finish(int generation);

  private:
    int expected_;
#ifdef EMULATION_THREADS
    // Each barrier has its own lock. One lock for all would order threads that share no barrier, and hide their races
    // from the thread sanitizer.
    struct State {
        std::mutex mutex;
        std::condition_variable changed;
        int arrived = 0, generation = 0;
    };
    std::unique_ptr<State> state_ = std::make_unique<State>();
#else
    int arrived_ = 0, generation_ = 0;
    std::vector<size_t> waiting_;
#endif
};

constexpr int kWarp = 32;

struct Warp {
    Barrier barrier;
    // Shuffles alternate between two sets of slots, so that a lane one shuffle ahead overwrites no unread value.
    uint64_t slots[2][kWarp];
    explicit Warp(int lanes) : barrier(lanes) {}
};

struct Launch {
    dim3 grid, block;
    int shared_bytes, cluster;
    bool cooperative;
};

struct Block {
    const Launch* launch;
    unsigned index;
    Block* cluster_first;  // the blocks of a cluster are consecutive
    Barrier* cluster_barrier;
    Barrier* grid_barrier;
    Barrier barrier;
    std::vector<std::unique_ptr<Warp>> warps;
    std::unique_ptr<unsigned char[]> shared;
    int running;
    Block(const Launch& launch, unsigned index);
    void poison() { std::memset(shared.get(), 0xff, launch->shared_bytes); }
};

struct Thread {
    Block* block;
    unsigned index;
    unsigned shuffles = 0;
    bool arrived = false;        // at the cluster's barrier, and has not waited yet
    int cluster_generation = 0;  // of the cluster's barrier at the arrival
    struct Copy {
        void* to;
        const void* from;
        size_t bytes;
    };
    std::vector<Copy> copies;
    Warp& warp() const { return *block->warps[index / kWarp]; }
    int lane() const { return index % kWarp; }
};

#ifdef EMULATION_THREADS
extern thread_local Thread* current;
#else
extern Thread* current;
#endif

void run(const Launch& launch, const std::function<void()>& kernel);  // rethrows the exception of a thread

// Where it is set, it gets each launch in place of the emulated kernel: the kernel's address, blocks, threads of a block,
// bytes of dynamic shared memory, blocks of a cluster, whether blocks run together, and the bytes of the one argument.
using Interceptor = void (*)(const void* kernel, int, int, int, int, int, const void* argument, size_t bytes);
extern Interceptor interceptor;

template <typename T>
T shuffle(T value, int from) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Thread& self = *current;
    uint64_t* slots = self.warp().slots[self.shuffles++ % 2];
    std::memcpy(&slots[self.lane()], &value, sizeof(T));
    self.warp().barrier.wait();
    std::memcpy(&value, &slots[from], sizeof(T));
    return value;
}

}  // namespace emulation

// ---- Device functions -----------------------------------------------------------------------------------------------

using std::max;
using std::min;

namespace emulation {
template <unsigned (*get)()>
struct Builtin {  // a variable whose value depends on the thread that reads it
    struct {
        operator unsigned() const { return get(); }
    } x;
};
inline unsigned thread_index() { return current->index; }
inline unsigned block_index() { return current->block->index; }
inline unsigned block_size() { return current->block->launch->block.x; }
inline unsigned grid_size() { return current->block->launch->grid.x; }
}  // namespace emulation
static const emulation::Builtin<emulation::thread_index> threadIdx{};
static const emulation::Builtin<emulation::block_index> blockIdx{};
static const emulation::Builtin<emulation::block_size> blockDim{};
static const emulation::Builtin<emulation::grid_size> gridDim{};

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
template <typename T>
T __ldg(const T* address) {
    return *address;
}
inline void __stwb(uint4* to, uint4 bits) {
    if (reinterpret_cast<uintptr_t>(to) % sizeof(uint4)) throw std::logic_error("misaligned store");
    *to = bits;
}

inline void __syncthreads() { emulation::current->block->barrier.wait(); }

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return emulation::shuffle(value, lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int distance) {
    return emulation::shuffle(value, emulation::current->lane() ^ distance);
}

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
        throw std::logic_error("misaligned asynchronous copy");
    emulation::current->copies.push_back({to, from, bytes});
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {
    for (const auto& copy : emulation::current->copies) std::memcpy(copy.to, copy.from, copy.bytes);
    emulation::current->copies.clear();
}

namespace cooperative_groups {

struct cluster_group {
    int block_rank() const { return emulation::current->block - emulation::current->block->cluster_first; }
    int num_blocks() const { return emulation::current->block->launch->cluster; }
    void sync() const { emulation::current->block->cluster_barrier->wait(); }
    void barrier_arrive() const {
        emulation::current->arrived = true;
        emulation::current->cluster_generation = emulation::current->block->cluster_barrier->arrive();
    }
    void barrier_wait() const {
        if (!emulation::current->arrived) throw std::logic_error("waits for a barrier without an arrival");
        emulation::current->arrived = false;
        emulation::current->block->cluster_barrier->finish(emulation::current->cluster_generation);
    }
    template <typename T>
    T* map_shared_rank(T* mine, int rank) const {
        if (emulation::current->arrived) throw std::logic_error("reads a block that may have left");
        const auto* self = emulation::current->block;
        const auto offset = reinterpret_cast<unsigned char*>(mine) - self->shared.get();
        return reinterpret_cast<T*>(self->cluster_first[rank].shared.get() + offset);
    }
};
inline cluster_group this_cluster() { return {}; }

struct grid_group {
    void sync() const { emulation::current->block->grid_barrier->wait(); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups

// ---- 16-bit floats --------------------------------------------------------------------------------------------------

struct __half {
    _Float16 value;
};
struct __half2 {
    __half x, y;
};
inline float __half2float(__half x) { return x.value; }
inline __half2 __hmax2(__half2 a, __half2 b) {
    return {{_Float16(std::fmax(__half2float(a.x), __half2float(b.x)))}, {_Float16(std::fmax(__half2float(a.y), __half2float(b.y)))}};
}
inline __half2 __floats2half2_rn(float a, float b) { return {{_Float16(a)}, {_Float16(b)}}; }

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline __nv_bfloat16 to_bfloat16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return {0x7fff};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {to_bfloat16(a), to_bfloat16(b)}; }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __floats2bfloat162_rn(std::fmax(__bfloat162float(a.x), __bfloat162float(b.x)),
                                 std::fmax(__bfloat162float(a.y), __bfloat162float(b.y)));
}

// ---- Runtime --------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
    cudaDevAttrMultiProcessorCount,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        struct {
            unsigned x, y, z;
        } clusterDim;
        int cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
#define CUDART_VERSION 12000
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? emulation::device.major
             : attribute == cudaDevAttrMultiProcessorCount  ? emulation::device.multiprocessors
                                                            : emulation::device.shared_per_multiprocessor;
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
    return bytes <= emulation::device.shared_per_multiprocessor ? cudaSuccess : cudaErrorInvalidValue;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    return *blocks = 1, cudaSuccess;
}

template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params), Params params) {
    emulation::Launch launch{config->gridDim, config->blockDim, int(config->dynamicSmemBytes), 1, false};
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) launch.cluster = config->attrs[i].val.clusterDim.x;
        if (config->attrs[i].id == cudaLaunchAttributeCooperative) launch.cooperative = config->attrs[i].val.cooperative;
    }
    if (launch.block.x == 0 || launch.block.x > 1024 || launch.grid.x == 0 || launch.grid.x % launch.cluster ||
        (launch.cooperative && launch.grid.x > unsigned(emulation::device.multiprocessors)))
        return cudaErrorInvalidConfiguration;
    if (emulation::interceptor) {
        emulation::interceptor(reinterpret_cast<const void*>(kernel), launch.grid.x, launch.block.x, launch.shared_bytes,
                               launch.cluster, launch.cooperative, &params, sizeof(params));
    } else {
        emulation::run(launch, [=] { kernel(params); });
    }
    return cudaSuccess;
}
