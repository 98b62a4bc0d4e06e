// The fused row on a run of elements, on L's lanes.
// Bytes per element (fp32 state, fp32 model output): 4 per register read or written, 4 per branch of the model output
// read, for the momentum and for the variance where the row has them, 2 or 4 per copy of the next model input; DDIM 12,
// DPM++2M 20. At sizes beyond the cache it must reach 90 % of
// the bandwidth of a copy, 60 % with one noise term where the copy comes from memory rather than from cache.
// Stores are ordinary ones: what a step writes is what the network or the next step reads, and stores around the cache
// measured slower at every size.
#pragma once

#include "../normal.h"
#include "access.h"
#include "executor.h"

namespace fastdiff::cpu {
namespace {

// One group of kUnroll registers' worth of elements. The tests on the row are the same for every group, so they
// predict; what they guard is unrolled. All loads come before the stores: outputs may overwrite inputs.
// kExtras: what a plain guided step has none of (see Stretch::extras), kept out of its instructions.
template <class L, int kOutputs, bool kExtras, bool kPartial>
FASTDIFF_INLINE void group(const Stretch& s, int64_t at, int64_t n, typename L::F (&watch)[L::kUnroll]) {
  using F = typename L::F;
  constexpr int w = L::kWidth, unroll = L::kUnroll;
  const Row& row = *s.row;

  F x[unroll], d[unroll], other[unroll];
  for (int u = 0; u < unroll; ++u) {
    x[u] = row.reads_x ? load<L, kPartial>(s.x + at + u * w, clip(n - u * w, w)) : L::set(0.0f);
    d[u] = other[u] = L::set(0.0f);
  }
  if (row.reads_model) {
    F f[unroll];
    load_model<L, kPartial>(s.conditional, s.model_out_dtype, at, n, f);
    // 0 * f is 0 for every finite f and NaN for the rest.
    for (int u = 0; u < unroll; ++u) watch[u] = L::fma(f[u], L::set(0.0f), watch[u]);
    F away[unroll];
    if (kExtras) {
      for (int u = 0; u < unroll; ++u) {
        other[u] = f[u];
        away[u] = L::set(0.0f);
      }
    }
    if (kExtras && s.perturbed) {
      load_model<L, kPartial>(s.perturbed, s.model_out_dtype, at, n, away);
      for (int u = 0; u < unroll; ++u) {
        watch[u] = L::fma(away[u], L::set(0.0f), watch[u]);
        away[u] = f[u] - away[u];
      }
    }
    if (s.unguided) {
      F g[unroll];
      load_model<L, kPartial>(s.unguided, s.model_out_dtype, at, n, g);
      for (int u = 0; u < unroll; ++u) {
        watch[u] = L::fma(g[u], L::set(0.0f), watch[u]);
        if (kExtras) {
          other[u] = g[u];
          if (s.by.w != 1.0f) f[u] = guide<L>(f[u], L::set(s.by.u) * g[u], L::set(s.by.w));
        } else {
          f[u] = guide<L>(f[u], g[u], L::set(s.by.w));
        }
      }
    }
    if (kExtras && s.perturbed)
      for (int u = 0; u < unroll; ++u) f[u] = L::fma(L::set(s.by.s), away[u], f[u]);
    for (int u = 0; u < unroll; ++u) d[u] = denoise<L>(x[u], f[u], L::set(s.by.p), L::set(s.by.q));
    if (kExtras) {
      if (s.momentum)
        for (int u = 0; u < unroll; ++u)
          d[u] = L::fma(L::set(s.by.m), load<L, kPartial>(s.momentum + at + u * w, clip(n - u * w, w)), d[u]);
      for (int u = 0; u < unroll; ++u)
        other[u] = row.e_unguided ? denoise<L>(x[u], other[u], L::set(row.p), L::set(row.q)) : d[u];
    }
    if (s.clamps)
      for (int u = 0; u < unroll; ++u) d[u] = L::clamp(d[u], L::set(s.by.lo), L::set(s.by.hi));
    if (kExtras)
      for (int u = 0; u < unroll; ++u) d[u] = L::set(s.by.post) * d[u];
  }

  F out[kOutputs][unroll], base[kOutputs][unroll];
  for (int o = 0; o < kOutputs; ++o) {
    for (int u = 0; u < unroll; ++u) {
      base[o][u] = L::set(row.d[o]) * x[u];
      out[o][u] = L::fma(L::set(row.b[o]), d[u] - base[o][u], L::set(row.k[o]) * x[u]);
    }
  }
  if (kExtras && row.reads_e)
    for (int o = 0; o < kOutputs; ++o)
      for (int u = 0; u < unroll; ++u) out[o][u] = L::fma(L::set(row.e[o]), other[u] - base[o][u], out[o][u]);
  for (int j = 0; j < row.slots; ++j) {
    for (int u = 0; u < unroll; ++u) {
      const F r = load<L, kPartial>(s.slot[j] + at + u * w, clip(n - u * w, w));
      for (int o = 0; o < kOutputs; ++o) out[o][u] = L::fma(L::set(row.a[j][o]), r - base[o][u], out[o][u]);
    }
  }
  F spread[unroll];
  if (kExtras && s.variance) {
    load_model<L, kPartial>(s.variance, s.model_out_dtype, at, n, spread);
    for (int u = 0; u < unroll; ++u)
      spread[u] = exponential<L>(L::fma(L::set(row.spread_slope), spread[u], L::set(row.spread_log)));
  }
  for (int t = 0; t < row.terms; ++t) {
    for (int u = 0; u < unroll; ++u) {
      F z = load<L, kPartial>(s.z[t] + at + u * w, clip(n - u * w, w));
      if (kExtras && s.variance) z = z * spread[u];
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
    for (int copy = 0; copy < kMaxBranches && s.emit[copy]; ++copy)
      store_model<L, kPartial>(s.emit[copy], s.model_in_dtype, at, n, scaled);
  }
}

template <class L, int kOutputs, bool kExtras>
bool run(const Stretch& s) {
  constexpr int64_t size = L::kWidth * L::kUnroll;
  typename L::F watch[L::kUnroll];
  for (int u = 0; u < L::kUnroll; ++u) watch[u] = L::set(0.0f);
  int64_t at = 0;
  for (; at + size <= s.count; at += size) group<L, kOutputs, kExtras, false>(s, at, size, watch);
  if (at < s.count) group<L, kOutputs, kExtras, true>(s, at, s.count - at, watch);
  typename L::F sum = watch[0];
  for (int u = 1; u < L::kUnroll; ++u) sum = sum + watch[u];
  return L::any_nan(sum);
}

template <class L>
bool step(const Stretch& s) {
  switch (s.row->outputs) {
    case 1: return s.extras ? run<L, 1, true>(s) : run<L, 1, false>(s);
    case 2: return s.extras ? run<L, 2, true>(s) : run<L, 2, false>(s);
    default: return s.extras ? run<L, 3, true>(s) : run<L, 3, false>(s);
  }
}

}  // namespace
}  // namespace fastdiff::cpu
