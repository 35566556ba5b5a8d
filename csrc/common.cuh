// Shared by both kernels. nvcc compiles these sources; g++ compiles them against the emulation in
// tests/helpers/emulation, to run them without a GPU. Code here must not assume that nvcc compiles it.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace cg = cooperative_groups;

// The block's dynamic shared memory, as bytes. The emulation defines this macro to give every block its own memory.
#ifndef CPT_SHARED_MEMORY
#define CPT_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}
