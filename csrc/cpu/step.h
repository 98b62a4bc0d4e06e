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
  float* const estimates[] = {s.denoised, s.copy};
  for (float* to : estimates)
    if (to)
      for (int u = 0; u < unroll; ++u) store<L, kPartial>(to + at + u * w, d[u], clip(n - u * w, w));
  if (s.emit[0]) {
    F scaled[unroll];
    for (int u = 0; u < unroll; ++u) scaled[u] = L::set(row.emit_scale) * out[0][u];
    for (int copy = 0; copy < kMaxBranches && s.emit[copy]; ++copy)
      store_model<L, kPartial>(s.emit[copy], s.model_in_dtype, at, n, scaled);
  }
}

template <class L>
bool any_nan(const typename L::F (&watch)[L::kUnroll]) {
  typename L::F sum = watch[0];
  for (int u = 1; u < L::kUnroll; ++u) sum = sum + watch[u];
  return L::any_nan(sum);
}

// The last elements, fewer than fill a group.
template <class L, int kOutputs, bool kExtras>
__attribute__((noinline)) void tail(const Stretch& s, int64_t at, typename L::F (&watch)[L::kUnroll]) {
  group<L, kOutputs, kExtras, true>(s, at, s.count - at, watch);
}

template <class L, int kOutputs, bool kExtras>
bool run(const Stretch& s) {
  constexpr int64_t size = L::kWidth * L::kUnroll;
  typename L::F watch[L::kUnroll];
  for (int u = 0; u < L::kUnroll; ++u) watch[u] = L::set(0.0f);
  int64_t at = 0;
  for (; at + size <= s.count; at += size) group<L, kOutputs, kExtras, false>(s, at, size, watch);
  if (at < s.count) tail<L, kOutputs, kExtras>(s, at, watch);
  return any_nan<L>(watch);
}

// Rows as most are (see `plain`), a register at a time. What depends on the row alone is fixed before the loop, whose
// stores would otherwise have it read again: half the instructions of `run`, which tells where memory is near.
// kShifts: some output counts from a multiple of x. kReadsE: some output has E, which is D before its clamp.
template <class L, int kOutputs, int kSlots, bool kShifts, bool kNoise, bool kReadsE>
bool run_plain(const Stretch& s) {
  using F = typename L::F;
  constexpr int w = L::kWidth;
  const Row& row = *s.row;
  const F p = L::set(s.by.p), q = L::set(s.by.q), lo = L::set(s.by.lo), hi = L::set(s.by.hi), zero = L::set(0.0f);
  F k[kOutputs], shift[kOutputs], b[kOutputs], c[kOutputs], e[kOutputs], a[kSlots + 1][kOutputs];
  const float* slot[kSlots + 1];
  float* out[kOutputs];
  for (int o = 0; o < kOutputs; ++o) {
    out[o] = s.out[o];
    k[o] = L::set(row.k[o]);
    shift[o] = L::set(row.d[o]);
    b[o] = L::set(row.b[o]);
    e[o] = L::set(row.e[o]);
    c[o] = L::set(kNoise ? row.term[0].weight[o] : 0.0f);
  }
  for (int j = 0; j < kSlots; ++j) {
    slot[j] = s.slot[j];
    for (int o = 0; o < kOutputs; ++o) a[j][o] = L::set(row.a[j][o]);
  }
  const float *x = s.x, *model = static_cast<const float*>(s.conditional), *z = kNoise ? s.z[0] : nullptr;
  float *denoised = s.denoised, *copy = s.copy;
  const bool clamps = s.clamps;
  const int64_t count = s.count;
  F watch[L::kUnroll];
  for (F& each : watch) each = zero;
  int64_t at = 0;
  for (; at + w <= count; at += w) {
    const F xs = L::load(x + at), f = L::load(model + at), noise = kNoise ? L::load(z + at) : zero;
    F r[kSlots + 1], made[kOutputs];
    for (int j = 0; j < kSlots; ++j) r[j] = L::load(slot[j] + at);
    watch[0] = L::fma(f, zero, watch[0]);
    const F free = denoise<L>(xs, f, p, q), d = clamps ? L::clamp(free, lo, hi) : free;
    for (int o = 0; o < kOutputs; ++o) {
      const F base = kShifts ? shift[o] * xs : zero;
      made[o] = L::fma(b[o], kShifts ? d - base : d, k[o] * xs);
      if (kReadsE) made[o] = L::fma(e[o], kShifts ? free - base : free, made[o]);
      for (int j = 0; j < kSlots; ++j) made[o] = L::fma(a[j][o], kShifts ? r[j] - base : r[j], made[o]);
      if (kNoise) made[o] = L::fma(c[o], noise, made[o]);
      if (kShifts) made[o] = made[o] + base;
    }
    for (int o = 0; o < kOutputs; ++o) L::store(out[o] + at, made[o]);
    if (denoised) L::store(denoised + at, d);
    if (copy) L::store(copy + at, d);
  }
  if (at < count) tail<L, kOutputs, kReadsE>(s, at, watch);
  return any_nan<L>(watch);
}

// Whether `run_plain` has this: fp32 output of one branch, no next model input, few of everything. Of the extras it has
// E alone, where no slot is read.
inline bool plain(const Stretch& s) {
  const Row& row = *s.row;
  if (s.extras && (row.e_unguided || s.perturbed || s.momentum || s.variance || s.by.post != 1.0f || row.slots > 0))
    return false;
  return row.reads_model && row.reads_x && s.model_out_dtype == kFloat32 && !s.unguided && !s.emit[0] &&
         row.outputs <= 2 && row.slots <= 4 && row.terms <= 1;
}

template <class L, int kOutputs, int kSlots, bool kReadsE>
bool choose_plain(const Stretch& s) {
  bool shifts = false;
  for (int o = 0; o < kOutputs; ++o) shifts |= s.row->d[o] != 0.0f;
  if (s.row->terms)
    return shifts ? run_plain<L, kOutputs, kSlots, true, true, kReadsE>(s)
                  : run_plain<L, kOutputs, kSlots, false, true, kReadsE>(s);
  return shifts ? run_plain<L, kOutputs, kSlots, true, false, kReadsE>(s)
                : run_plain<L, kOutputs, kSlots, false, false, kReadsE>(s);
}

template <class L, int kOutputs>
bool step_of(const Stretch& s) {
  if constexpr (kOutputs <= 2) {
    if (plain(s)) {
      switch (s.row->slots) {
        case 0: return s.extras ? choose_plain<L, kOutputs, 0, true>(s) : choose_plain<L, kOutputs, 0, false>(s);
        case 1: return choose_plain<L, kOutputs, 1, false>(s);
        case 2: return choose_plain<L, kOutputs, 2, false>(s);
        case 3: return choose_plain<L, kOutputs, 3, false>(s);
        default: return choose_plain<L, kOutputs, 4, false>(s);
      }
    }
  }
  return s.extras ? run<L, kOutputs, true>(s) : run<L, kOutputs, false>(s);
}

template <class L>
bool step(const Stretch& s) {
  switch (s.row->outputs) {
    case 1: return step_of<L, 1>(s);
    case 2: return step_of<L, 2>(s);
    default: return step_of<L, 3>(s);
  }
}

}  // namespace
}  // namespace fastdiff::cpu
