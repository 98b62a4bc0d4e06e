// Four consecutive elements, which is what a CUDA thread handles at a time: 16 bytes of fp32, 8 of a 16-bit float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>

#include "../affine.h"

namespace fastdiff {
namespace {

struct Quad {
  float v[4];
};

// `left`: elements of the sample from `at` on, at least 1. kVector: all sizes and addresses are multiples of 16 bytes.
template <bool kVector>
__device__ __forceinline__ Quad load(const float* p, int64_t at, int64_t left) {
  Quad q;
  if (kVector) {
    const float4 all = *reinterpret_cast<const float4*>(p + at);
    q.v[0] = all.x, q.v[1] = all.y, q.v[2] = all.z, q.v[3] = all.w;
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) q.v[e] = e < left ? p[at + e] : 0.0f;
  }
  return q;
}

template <bool kVector>
__device__ __forceinline__ void store(float* p, int64_t at, int64_t left, const Quad& q) {
  if (kVector) {
    *reinterpret_cast<float4*>(p + at) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < left) p[at + e] = q.v[e];
  }
}

__device__ __forceinline__ float widen(uint16_t h, int32_t dtype) {
  return dtype == kFloat16 ? __half2float(__ushort_as_half(h)) : __uint_as_float(static_cast<uint32_t>(h) << 16);
}

__device__ __forceinline__ uint32_t narrow(float v, int32_t dtype) {
  return dtype == kFloat16 ? __half_as_ushort(__float2half_rn(v)) : __bfloat16_as_ushort(__float2bfloat16_rn(v));
}

template <bool kVector>
__device__ __forceinline__ Quad load_model(const void* base, int32_t dtype, int64_t at, int64_t left) {
  if (dtype == kFloat32) return load<kVector>(static_cast<const float*>(base), at, left);
  const uint16_t* p = static_cast<const uint16_t*>(base) + at;
  Quad q;
  if (kVector) {
    const uint2 all = *reinterpret_cast<const uint2*>(p);
    q.v[0] = widen(all.x & 0xffff, dtype), q.v[1] = widen(all.x >> 16, dtype);
    q.v[2] = widen(all.y & 0xffff, dtype), q.v[3] = widen(all.y >> 16, dtype);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) q.v[e] = e < left ? widen(p[e], dtype) : 0.0f;
  }
  return q;
}

template <bool kVector>
__device__ __forceinline__ void store_model(void* base, int32_t dtype, int64_t at, int64_t left, const Quad& q) {
  if (dtype == kFloat32) return store<kVector>(static_cast<float*>(base), at, left, q);
  uint16_t* p = static_cast<uint16_t*>(base) + at;
  if (kVector) {
    *reinterpret_cast<uint2*>(p) = make_uint2(narrow(q.v[0], dtype) | narrow(q.v[1], dtype) << 16,
                                              narrow(q.v[2], dtype) | narrow(q.v[3], dtype) << 16);
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (e < left) p[e] = static_cast<uint16_t>(narrow(q.v[e], dtype));
  }
}

// All addresses and sizes allow 16-byte accesses.
inline bool aligned(std::initializer_list<const void*> pointers, int64_t N) {
  uintptr_t addresses = 0;
  for (const void* pointer : pointers) addresses |= reinterpret_cast<uintptr_t>(pointer);
  return N % 4 == 0 && addresses % 16 == 0;
}

}  // namespace
}  // namespace fastdiff
