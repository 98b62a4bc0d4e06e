// The fused row on a run of elements, on L's lanes.
// Bytes per element (fp32 state, fp32 model output): 4 per register read or written, 4 per branch of the model output
// read, 2 or 4 per copy of the next model input; DDIM 12, DPM++2M 20. At sizes beyond the cache it must reach 90 % of
// the bandwidth of a copy, 60 % with one noise term where the copy comes from memory rather than from cache.
// Stores are ordinary ones: what a step writes is what the network or the next step reads, and stores around the cache
// measured slower at every size.
#pragma once

#include "../affine.h"
#include "executor.h"

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

template <class L, bool kPartial>
FASTDIFF_INLINE void load_model(const void* p, int32_t dtype, int64_t at, int64_t n, typename L::F (&f)[L::kUnroll]) {
  constexpr int w = L::kWidth;
  if (dtype == kFloat32) {
    for (int u = 0; u < L::kUnroll; ++u)
      f[u] = load<L, kPartial>(static_cast<const float*>(p) + at + u * w, clip(n - u * w, w));
  } else if (dtype == kFloat16) {
    for (int u = 0; u < L::kUnroll; ++u) f[u] = L::from_half(load16<L, kPartial>(p, at + u * w, clip(n - u * w, w)));
  } else {
    for (int u = 0; u < L::kUnroll; ++u) f[u] = L::from_bfloat(load16<L, kPartial>(p, at + u * w, clip(n - u * w, w)));
  }
}

template <class L, bool kPartial>
FASTDIFF_INLINE void emit(void* const* to, int32_t dtype, int64_t at, int64_t n, const typename L::F (&v)[L::kUnroll]) {
  constexpr int w = L::kWidth;
  for (int copy = 0; copy < 2 && to[copy]; ++copy) {
    for (int u = 0; u < L::kUnroll; ++u) {
      const int left = clip(n - u * w, w);
      if (dtype == kFloat32) {
        store<L, kPartial>(static_cast<float*>(to[copy]) + at + u * w, v[u], left);
        continue;
      }
      const typename L::H h = dtype == kFloat16 ? L::to_half(v[u]) : L::to_bfloat(v[u]);
      uint16_t* cell = static_cast<uint16_t*>(to[copy]) + at + u * w;
      if (kPartial) {
        L::store16(cell, h, left);
      } else {
        L::store16(cell, h);
      }
    }
  }
}

// One group of kUnroll registers' worth of elements. The tests on the row are the same for every group, so they
// predict; what they guard is unrolled. All loads come before the stores: outputs may overwrite inputs.
template <class L, int kOutputs, bool kPartial>
FASTDIFF_INLINE void group(const Stretch& s, int64_t at, int64_t n, typename L::F (&watch)[L::kUnroll]) {
  using F = typename L::F;
  constexpr int w = L::kWidth, unroll = L::kUnroll;
  const Row& row = *s.row;

  F x[unroll], d[unroll];
  for (int u = 0; u < unroll; ++u) {
    x[u] = row.reads_x ? load<L, kPartial>(s.x + at + u * w, clip(n - u * w, w)) : L::set(0.0f);
    d[u] = L::set(0.0f);
  }
  if (row.reads_model) {
    F f[unroll];
    load_model<L, kPartial>(s.conditional, s.model_out_dtype, at, n, f);
    // 0 * f is 0 for every finite f and NaN for the rest.
    for (int u = 0; u < unroll; ++u) watch[u] = L::fma(f[u], L::set(0.0f), watch[u]);
    if (s.unconditional) {
      F g[unroll];
      load_model<L, kPartial>(s.unconditional, s.model_out_dtype, at, n, g);
      for (int u = 0; u < unroll; ++u) {
        watch[u] = L::fma(g[u], L::set(0.0f), watch[u]);
        f[u] = guide<L>(f[u], g[u], L::set(s.w));
      }
    }
    for (int u = 0; u < unroll; ++u) d[u] = denoise<L>(x[u], f[u], L::set(row.p), L::set(row.q));
    if (row.clamps)
      for (int u = 0; u < unroll; ++u) d[u] = L::clamp(d[u], L::set(row.lo), L::set(row.hi));
  }

  F out[kOutputs][unroll], base[kOutputs][unroll];
  for (int o = 0; o < kOutputs; ++o) {
    for (int u = 0; u < unroll; ++u) {
      base[o][u] = L::set(row.d[o]) * x[u];
      out[o][u] = L::fma(L::set(row.b[o]), d[u] - base[o][u], L::set(row.k[o]) * x[u]);
    }
  }
  for (int j = 0; j < row.slots; ++j) {
    for (int u = 0; u < unroll; ++u) {
      const F r = load<L, kPartial>(s.slot[j] + at + u * w, clip(n - u * w, w));
      for (int o = 0; o < kOutputs; ++o) out[o][u] = L::fma(L::set(row.a[j][o]), r - base[o][u], out[o][u]);
    }
  }
  for (int t = 0; t < row.terms; ++t) {
    for (int u = 0; u < unroll; ++u) {
      const F z = load<L, kPartial>(s.z[t] + at + u * w, clip(n - u * w, w));
      for (int o = 0; o < kOutputs; ++o) out[o][u] = L::fma(L::set(row.term[t].weight[o]), z, out[o][u]);
    }
  }

  for (int o = 0; o < kOutputs; ++o) {
    for (int u = 0; u < unroll; ++u) {
      out[o][u] = out[o][u] + base[o][u];
      store<L, kPartial>(s.out[o] + at + u * w, out[o][u], clip(n - u * w, w));
    }
  }
  if (s.denoised)
    for (int u = 0; u < unroll; ++u) store<L, kPartial>(s.denoised + at + u * w, d[u], clip(n - u * w, w));
  if (s.emit[0]) {
    F scaled[unroll];
    for (int u = 0; u < unroll; ++u) scaled[u] = L::set(row.emit_scale) * out[0][u];
    emit<L, kPartial>(s.emit, s.model_in_dtype, at, n, scaled);
  }
}

template <class L, int kOutputs>
bool run(const Stretch& s) {
  constexpr int64_t size = L::kWidth * L::kUnroll;
  typename L::F watch[L::kUnroll];
  for (int u = 0; u < L::kUnroll; ++u) watch[u] = L::set(0.0f);
  int64_t at = 0;
  for (; at + size <= s.count; at += size) group<L, kOutputs, false>(s, at, size, watch);
  if (at < s.count) group<L, kOutputs, true>(s, at, s.count - at, watch);
  typename L::F sum = watch[0];
  for (int u = 1; u < L::kUnroll; ++u) sum = sum + watch[u];
  return L::any_nan(sum);
}

template <class L>
bool step(const Stretch& s) {
  switch (s.row->outputs) {
    case 1: return run<L, 1>(s);
    case 2: return run<L, 2>(s);
    default: return run<L, 3>(s);
  }
}

}  // namespace
}  // namespace fastdiff::cpu
