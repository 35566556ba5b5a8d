// What both kernels need. The same sources are compiled by nvcc and, to be run without a GPU, by g++ against the
// emulation in tests/emulation; nothing here may assume that nvcc reads it.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace cg = cooperative_groups;

// The block's dynamic shared memory, as bytes. The emulation gives every block memory of its own.
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
