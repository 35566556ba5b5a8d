// Access to a row of bf16, fp16 or fp32 numbers by 16 bytes at a time, at any start address.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Stores two numbers at once: one instruction converts a pair.
__device__ inline void store_pair(float* out, float a, float b) { out[0] = a, out[1] = b; }
__device__ inline void store_pair(__half* out, float a, float b) {
    *reinterpret_cast<__half2*>(out) = __floats2half2_rn(a, b);
}
__device__ inline void store_pair(__nv_bfloat16* out, float a, float b) {
    *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(a, b);
}

// Pack<T> is what one maximum takes: two 16-bit numbers, or one fp32 number. The maximum of a NaN and a number is the
// number.
template <typename T>
struct PackOf {
    using type = T;
};
template <>
struct PackOf<__half> {
    using type = __half2;
};
template <>
struct PackOf<__nv_bfloat16> {
    using type = __nv_bfloat162;
};
template <typename T>
using Pack = typename PackOf<T>::type;

__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline __half2 larger(__half2 a, __half2 b) { return __hmax2(a, b); }
__device__ inline __nv_bfloat162 larger(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmax2(a, b); }
__device__ inline float largest_in(float x) { return x; }
template <typename P>
__device__ inline float largest_in(P x) {
    return fmaxf(to_float(x.x), to_float(x.y));
}

template <typename T>
union alignas(16) Vector {
    static constexpr int kWidth = 16 / sizeof(T);
    uint4 bits;
    T values[kWidth];
    // A plain assignment compiles to four 4-byte stores where the bits were packed in registers.
    __device__ void store_to(T* address) const { __stwb(reinterpret_cast<uint4*>(address), bits); }
};

template <int kCount>
__device__ inline float largest_of(const float (&x)[kCount]) {
    float result = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) result = fmaxf(result, x[i]);
    return result;
}

// The largest number in some vectors.
template <typename T, int kVectors>
__device__ inline float largest_of(const Vector<T> (&x)[kVectors]) {
    const auto* packs = reinterpret_cast<const Pack<T>*>(x);
    Pack<T> result = packs[0];
#pragma unroll
    for (int i = 1; i < kVectors * 16 / sizeof(Pack<T>); ++i) result = larger(result, packs[i]);
    return largest_in(result);
}

// Converts a vector. A bf16 number is the upper half of an fp32 number, so a shift or a mask converts it.
template <typename T>
__device__ inline void to_floats(const Vector<T>& x, float* out) {
#pragma unroll
    for (int i = 0; i < Vector<T>::kWidth; ++i) out[i] = to_float(x.values[i]);
}
#ifdef __CUDA_ARCH__
__device__ inline void to_floats(const Vector<__nv_bfloat16>& x, float* out) {
    const unsigned words[4] = {x.bits.x, x.bits.y, x.bits.z, x.bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
#endif

__device__ inline bool inside(int column, int columns) { return column >= 0 && column < columns; }

// A row as aligned 16-byte vectors: column c is element `c + shift` of the vectors that start at `base`. `base` lies up
// to 15 bytes before the row. Vectors that stick out of the row at either end are accessed element by element, because
// the memory around the row is not ours.
template <typename T>
struct Row {
    static constexpr int kWidth = Vector<T>::kWidth;
    T* base;
    int shift;

    __device__ explicit Row(T* row) {
        const auto address = reinterpret_cast<uintptr_t>(row);
        shift = static_cast<int>((address & 15) / sizeof(T));
        base = row - shift;  // not computed from the integer, so that the compiler knows it is global memory
    }
    __device__ int vectors(int columns) const { return (shift + columns + kWidth - 1) / kWidth; }
    __device__ int first_column(int vector) const { return vector * kWidth - shift; }
    __device__ bool whole(int vector, int columns) const {
        return first_column(vector) >= 0 && first_column(vector) + kWidth <= columns;
    }
    __device__ T* at(int vector) const { return base + static_cast<int64_t>(vector) * kWidth; }
    __device__ __forceinline__ Vector<T> load(int vector, int columns) const {
        Vector<T> x;
        if (whole(vector, columns)) {
            x.bits = *reinterpret_cast<const uint4*>(at(vector));
            return x;
        }
        x.bits = uint4{0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
            if (inside(first_column(vector) + i, columns)) x.values[i] = at(vector)[i];
        return x;
    }
    __device__ __forceinline__ void store(int vector, int columns, const Vector<T>& x) const {
        if (whole(vector, columns)) {
            x.store_to(at(vector));
            return;
        }
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
            if (inside(first_column(vector) + i, columns)) at(vector)[i] = x.values[i];
    }
};

}  // namespace
