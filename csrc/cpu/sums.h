// What a guidance rule sums over a part of a sample, and the magnitudes that dynamic thresholding ranks, on L's lanes.
// Bytes per element: 4 or 2 per branch read (kCfgZero Fc and Fu; kRescale Fp too where it counts; kApg Fc, Fu), and for
// kApg 4 for x and 8 for M. Sums must reach 80 % of the bandwidth of a read at sizes beyond the cache.
#pragma once

#include <type_traits>

#include "access.h"
#include "executor.h"

namespace fastdiff::cpu {
namespace {

// Lanes of a sum, the same for every instruction set: they then agree to the bit.
constexpr int kLanes = 16;
// Elements after which lanes go to double precision: a lane adds 64 numbers in single, which costs it 1e-6 at most.
constexpr int64_t kSpan = 64 * kLanes;

template <class L>
constexpr int registers = kLanes / L::kWidth;

// Calls step(at, n) for each group of kLanes elements of a span, n < kLanes in the last one only.
template <class Step>
FASTDIFF_INLINE void each_group(int64_t first, int64_t count, const Step& step) {
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) step(std::false_type{}, first + at, int64_t{kLanes});
  if (at < count) step(std::true_type{}, first + at, count - at);
}

template <class L, int n>
FASTDIFF_INLINE void to_lanes(const typename L::F (&v)[n], float (&lane)[kLanes]) {
  for (int u = 0; u < n; ++u) L::store(lane + u * L::kWidth, v[u]);
}

template <class L, int n>
FASTDIFF_INLINE double add_lanes(const typename L::F (&v)[n]) {
  float lane[kLanes];
  to_lanes<L>(v, lane);
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += static_cast<double>(lane[i]);
  return total;
}

// Fc, Fu, Fp; absent elements, and branches that are not read, are 0.
template <class L>
struct Branches {
  using Group = typename L::F[registers<L>];
  Group c, g, away;

  template <bool kPartial>
  FASTDIFF_MEMBER void load(const Part& p, int64_t at, int64_t n) {
    load_model<L, kPartial>(p.conditional, p.model_out_dtype, at, n, c);
    for (int u = 0; u < registers<L>; ++u) g[u] = away[u] = L::set(0.0f);
    if (p.unguided) load_model<L, kPartial>(p.unguided, p.model_out_dtype, at, n, g);
    if (p.perturbed) load_model<L, kPartial>(p.perturbed, p.model_out_dtype, at, n, away);
  }

  FASTDIFF_MEMBER void combine(const Asked& a, const Scalars& by, Group& f) const {
    for (int u = 0; u < registers<L>; ++u) f[u] = fastdiff::combine<L>(c[u], g[u], away[u], a, by);
  }
};

// Deviations of one quantity from its value at the head of each lane, which keeps a large mean out of the sums.
template <class L>
struct Spread {
  using F = typename L::F;
  static constexpr int count = registers<L>;
  F head[count], sum[count], square[count];

  FASTDIFF_MEMBER explicit Spread(const F (&v)[count]) {
    for (int u = 0; u < count; ++u) {
      head[u] = v[u];
      sum[u] = square[u] = L::set(0.0f);
    }
  }

  template <bool kPartial>
  FASTDIFF_MEMBER void add(const F (&v)[count], int64_t n) {
    for (int u = 0; u < count; ++u) {
      F away = v[u] - head[u];
      if (kPartial) {
        const uint32_t there = (1u << clip(n - u * L::kWidth, L::kWidth)) - 1u;
        away = L::select(L::mask(there), away, L::set(0.0f));
      }
      sum[u] = sum[u] + away;
      square[u] = L::fma(away, away, square[u]);
    }
  }

  // Into the sums of v and of its square, over `size` elements.
  FASTDIFF_MEMBER void settle(int64_t size, double (&total)[2]) const {
    float first[kLanes], sums[kLanes], squares[kLanes];
    to_lanes<L>(head, first);
    to_lanes<L>(sum, sums);
    to_lanes<L>(square, squares);
    for (int i = 0; i < kLanes && i < size; ++i) {
      const double n = static_cast<double>((size - i + kLanes - 1) / kLanes);
      const double above = static_cast<double>(sums[i]) / n, mean = static_cast<double>(first[i]) + above;
      total[0] += n * mean;
      total[1] += static_cast<double>(squares[i]) - n * above * above + n * mean * mean;
    }
  }
};

inline Moments moments(const double (&total)[2], int64_t size) {
  const double n = static_cast<double>(size), mean = total[0] / n, m2 = total[1] - total[0] * mean;
  return {static_cast<float>(n), static_cast<float>(mean), m2 < 0.0 ? 0.0f : static_cast<float>(m2)};
}

// Each branch counts from its value at the sample's first element: F is then as exact as its deviations are.
template <class L>
Sums rescale_sums(const Part& p) {
  constexpr int count = registers<L>;
  Branches<L> branches;
  float c0[kLanes], g0[kLanes], away0[kLanes];
  branches.template load<true>(p, 0, 1);
  to_lanes<L>(branches.c, c0);
  to_lanes<L>(branches.g, g0);
  to_lanes<L>(branches.away, away0);
  typename L::F f[count];
  const auto load = [&](auto partial, int64_t at, int64_t n) {
    branches.template load<partial.value>(p, at, n);
    for (int u = 0; u < count; ++u) {
      branches.c[u] = branches.c[u] - L::set(c0[0]);
      branches.g[u] = branches.g[u] - L::set(g0[0]);
      branches.away[u] = branches.away[u] - L::set(away0[0]);
    }
    branches.combine(p.asked, p.asked.by, f);
  };

  double plain[2] = {}, guided[2] = {};
  for (int64_t done = 0; done < p.count; done += kSpan) {
    const int64_t size = p.count - done < kSpan ? p.count - done : kSpan, first = p.first + done;
    load(std::true_type{}, first, size);
    Spread<L> of_c(branches.c), of_f(f);
    each_group(first, size, [&](auto partial, int64_t at, int64_t n) {
      load(partial, at, n);
      of_c.template add<partial.value>(branches.c, n);
      of_f.template add<partial.value>(f, n);
    });
    of_c.settle(size, plain);
    of_f.settle(size, guided);
  }
  return {moments(plain, p.count), moments(guided, p.count), {}};
}

template <class L, Rule rule>
Sums product_sums(const Part& p) {
  using F = typename L::F;
  constexpr int count = registers<L>, w = L::kWidth;
  const Scalars& by = p.asked.by;
  double total[3] = {};
  for (int64_t done = 0; done < p.count; done += kSpan) {
    F sum[3][count];
    for (auto& each : sum)
      for (F& v : each) v = L::set(0.0f);
    each_group(p.first + done, p.count - done < kSpan ? p.count - done : kSpan, [&](auto partial, int64_t at, int64_t n) {
      constexpr bool kPartial = partial.value;
      F c[count], g[count];
      load_model<L, kPartial>(p.conditional, p.model_out_dtype, at, n, c);
      load_model<L, kPartial>(p.unguided, p.model_out_dtype, at, n, g);
      for (int u = 0; u < count; ++u) {
        if (rule == kCfgZero) {
          sum[0][u] = L::fma(c[u], g[u], sum[0][u]);
          sum[1][u] = L::fma(g[u], g[u], sum[1][u]);
          continue;
        }
        const int left = clip(n - u * w, w);
        float* place = p.momentum + at + u * w;
        const F x = p.x ? load<L, kPartial>(p.x + at + u * w, left) : L::set(0.0f);
        const F m = L::fma(L::set(by.q), c[u] - g[u], L::set(p.beta) * load<L, kPartial>(place, left));
        store<L, kPartial>(place, m, left);
        const F d = denoise<L>(x, c[u], L::set(by.p), L::set(by.q));
        sum[0][u] = L::fma(m, m, sum[0][u]);
        sum[1][u] = L::fma(m, d, sum[1][u]);
        sum[2][u] = L::fma(d, d, sum[2][u]);
      }
    });
    for (int i = 0; i < 3; ++i) total[i] += add_lanes<L>(sum[i]);
  }
  Sums found = {};
  for (int i = 0; i < 3; ++i) found.product[i] = static_cast<float>(total[i]);
  return found;
}

template <class L>
Sums sums(const Part& p) {
  if (p.rule == kRescale) return rescale_sums<L>(p);
  return p.rule == kApg ? product_sums<L, kApg>(p) : product_sums<L, kCfgZero>(p);
}

template <class L>
void magnitudes(const Part& p, const Scalars& by, float* to) {
  using F = typename L::F;
  constexpr int count = registers<L>, w = L::kWidth;
  each_group(p.first, p.count, [&](auto partial, int64_t at, int64_t n) {
    constexpr bool kPartial = partial.value;
    Branches<L> branches;
    F f[count];
    branches.template load<kPartial>(p, at, n);
    branches.combine(p.asked, by, f);
    for (int u = 0; u < count; ++u) {
      const int left = clip(n - u * w, w);
      const F x = p.x ? load<L, kPartial>(p.x + at + u * w, left) : L::set(0.0f);
      F d = denoise<L>(x, f[u], L::set(by.p), L::set(by.q));
      if (p.momentum) d = L::fma(L::set(by.m), load<L, kPartial>(p.momentum + at + u * w, left), d);
      store<L, kPartial>(to + (at - p.first) + u * w, L::flip_sign(d, L::bits(d)), left);
    }
  });
}

}  // namespace
}  // namespace fastdiff::cpu
