// Loads and stores of L's registers, the last ones of a run in part.
#pragma once

#include "../affine.h"

namespace fastdiff::cpu {
namespace {

// n: elements left from p on, of use in the last group only.
template <class L, bool kPartial>
FASTDIFF_INLINE typename L::F load(const float* p, int n) {
  return kPartial ? L::load(p, n) : L::load(p);
}

template <class L, bool kPartial>
FASTDIFF_INLINE typename L::H load16(const void* p, int64_t at, int n) {
  const uint16_t* cell = static_cast<const uint16_t*>(p) + at;
  return kPartial ? L::load16(cell, n) : L::load16(cell);
}

template <class L, bool kPartial>
FASTDIFF_INLINE void store(float* p, typename L::F v, int n) {
  if (kPartial) {
    L::store(p, v, n);
  } else {
    L::store(p, v);
  }
}

FASTDIFF_INLINE int clip(int64_t n, int width) { return n <= 0 ? 0 : n >= width ? width : static_cast<int>(n); }

// A branch of the model output, widened to fp32: `count` registers of it.
template <class L, bool kPartial, int count>
FASTDIFF_INLINE void load_model(const void* p, int32_t dtype, int64_t at, int64_t n, typename L::F (&f)[count]) {
  constexpr int w = L::kWidth;
  if (dtype == kFloat32) {
    for (int u = 0; u < count; ++u)
      f[u] = load<L, kPartial>(static_cast<const float*>(p) + at + u * w, clip(n - u * w, w));
  } else if (dtype == kFloat16) {
    for (int u = 0; u < count; ++u) f[u] = L::from_half(load16<L, kPartial>(p, at + u * w, clip(n - u * w, w)));
  } else {
    for (int u = 0; u < count; ++u) f[u] = L::from_bfloat(load16<L, kPartial>(p, at + u * w, clip(n - u * w, w)));
  }
}

// `count` registers into a tensor of the model's dtype.
template <class L, bool kPartial, int count>
FASTDIFF_INLINE void store_model(void* p, int32_t dtype, int64_t at, int64_t n, const typename L::F (&f)[count]) {
  constexpr int w = L::kWidth;
  for (int u = 0; u < count; ++u) {
    const int left = clip(n - u * w, w);
    if (dtype == kFloat32) {
      store<L, kPartial>(static_cast<float*>(p) + at + u * w, f[u], left);
      continue;
    }
    const typename L::H h = dtype == kFloat16 ? L::to_half(f[u]) : L::to_bfloat(f[u]);
    uint16_t* cell = static_cast<uint16_t*>(p) + at + u * w;
    if (kPartial) {
      L::store16(cell, h, left);
    } else {
      L::store16(cell, h);
    }
  }
}

}  // namespace
}  // namespace fastdiff::cpu
