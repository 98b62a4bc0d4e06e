// The gradient of norm, one patch of one sample. Included once per instruction set, with L its registers.
//
// The first pass adds up per channel what the mean and the deviation hand on, the second writes du; SiLU's gradient is
// computed again in both. Bytes moved per element: 2 or 4 each for u and the gradient, twice (the second time from
// cache), and for du. Must reach 40 % of copy bandwidth where a sample fits the second-level cache, as the forward pass.
#pragma once

#include "norm.h"

namespace fastdiff::cpu {
namespace {

// u - middle, and the gradient of what SiLU was given.
template <class L, int32_t dtype, bool kPartial>
FASTDIFF_INLINE void gradient(const NormArgs& a, int64_t at, typename L::F middle, typename L::F factor,
                              typename L::F constant, int n, typename L::F& away, typename L::F& g) {
  using F = typename L::F;
  away = read<L, dtype, kPartial>(a.x, at, n) - middle;
  g = read<L, dtype, kPartial>(a.grad, at, n);
  if (!a.act) return;
  const F v = L::fma(away, factor, constant), one = L::set(1.0f);
  const F sigmoid = one / (one + exponential<L>(L::set(0.0f) - v));
  g = (g * sigmoid) * L::fma(v, one - sigmoid, one);
}

// Adds the first n lanes to a channel's three sums, `together`, or each to those of a channel of its own.
template <class L>
FASTDIFF_INLINE void add_sums(typename L::F sum, typename L::F product, typename L::F offset, int n, bool together,
                              double* to) {
  constexpr int w = L::kWidth;
  float lanes[3][w];
  L::store(lanes[0], sum);
  L::store(lanes[1], product);
  L::store(lanes[2], offset);
  for (int k = 0; k < 3; ++k)
    for (int i = 0; i < n; ++i) to[together ? k : 3 * i + k] += static_cast<double>(lanes[k][i]);
}

template <class L, int32_t dtype, bool kPartial, int count>
void gradient_sums_channels(const NormPatch& patch, const NormMap& map, int64_t c, int n, double* sums) {
  using F = typename L::F;
  constexpr int w = L::kWidth;
  const NormArgs& a = *patch.args;
  F middle[count], factor[count], constant[count];
  for (int u = 0; u < count; ++u) {
    middle[u] = load<L, kPartial>(map.middle + c + u * w, n);
    factor[u] = load<L, kPartial>(map.factor + c + u * w, n);
    constant[u] = load<L, kPartial>(map.constant + c + u * w, n);
  }
  for (int64_t done = 0; done < patch.count; done += kNormSpan) {
    const int64_t end = done + kNormSpan < patch.count ? done + kNormSpan : patch.count;
    F sum[count], product[count], offset[count], away, g;
    for (int u = 0; u < count; ++u) sum[u] = product[u] = offset[u] = L::set(0.0f);
    for (int64_t i = patch.first + done; i < patch.first + end; ++i) {
      for (int u = 0; u < count; ++u) {
        const int64_t at = (patch.b * a.P + i) * a.C + c + u * w;
        gradient<L, dtype, kPartial>(a, at, middle[u], factor[u], constant[u], n, away, g);
        sum[u] = sum[u] + g;
        product[u] = L::fma(g, away, product[u]);
        offset[u] = offset[u] + away;
      }
    }
    for (int u = 0; u < count; ++u) add_sums<L>(sum[u], product[u], offset[u], n, false, sums + 3 * (c + u * w));
  }
}

template <class L, int32_t dtype>
void gradient_sums_plane(const NormPatch& patch, const NormMap& map, int64_t c, double* sums) {
  using F = typename L::F;
  constexpr int w = L::kWidth;
  const NormArgs& a = *patch.args;
  const int64_t plane = (patch.b * a.C + c) * a.P;
  const F middle = L::set(map.middle[c]), factor = L::set(map.factor[c]), constant = L::set(map.constant[c]);
  for (int64_t done = 0; done < patch.count; done += kNormSpan * w) {
    const int64_t size = patch.count - done < kNormSpan * w ? patch.count - done : kNormSpan * w;
    F sum = L::set(0.0f), product = sum, offset = sum;
    each_register<L>(size, [&](auto partial, int64_t i, int n) {
      F away, g;
      gradient<L, dtype, partial.value>(a, plane + patch.first + done + i, middle, factor, constant, n, away, g);
      if (partial.value) {
        const auto there = L::mask((1u << n) - 1u);
        away = L::select(there, away, L::set(0.0f));
        g = L::select(there, g, L::set(0.0f));
      }
      sum = sum + g;
      product = L::fma(g, away, product);
      offset = offset + away;
    });
    add_sums<L>(sum, product, offset, w, true, sums + 3 * c);
  }
}

// du = factor g + slope (u - middle) + rest.
template <class L, int32_t dtype, bool kPartial>
FASTDIFF_INLINE void gradient_at(const NormArgs& a, int64_t at, const typename L::F (&by)[5], int n) {
  typename L::F away, g;
  gradient<L, dtype, kPartial>(a, at, by[0], by[1], by[2], n, away, g);
  write<L, dtype, kPartial>(a.y, at, L::fma(by[1], g, L::fma(by[3], away, by[4])), n);
}

template <class L, int32_t dtype>
void gradient_map_of(const NormPatch& patch, const NormMap& map) {
  using F = typename L::F;
  const NormArgs& a = *patch.args;
  const float* const from[5] = {map.middle, map.factor, map.constant, map.slope, map.rest};
  if (!a.channels_last) {
    for (int64_t c = patch.channel; c < patch.end; ++c) {
      F by[5];
      for (int k = 0; k < 5; ++k) by[k] = L::set(from[k][c]);
      const int64_t plane = (patch.b * a.C + c) * a.P;
      each_register<L>(patch.count, [&](auto partial, int64_t i, int n) {
        gradient_at<L, dtype, partial.value>(a, plane + patch.first + i, by, n);
      });
    }
    return;
  }
  each_channels<L, 2>(patch.channel, patch.end, [&](auto partial, auto count, int64_t c, int n) {
    constexpr int w = L::kWidth;
    F by[count.value][5];
    for (int u = 0; u < count.value; ++u)
      for (int k = 0; k < 5; ++k) by[u][k] = load<L, partial.value>(from[k] + c + u * w, n);
    for (int64_t i = patch.first; i < patch.first + patch.count; ++i)
      for (int u = 0; u < count.value; ++u)
        gradient_at<L, dtype, partial.value>(a, (patch.b * a.P + i) * a.C + c + u * w, by[u], n);
  });
}

template <class L, int32_t dtype>
void gradient_sums_of(const NormPatch& patch, const NormMap& map, double* sums) {
  const NormArgs& a = *patch.args;
  if (!a.channels_last) {
    for (int64_t c = patch.channel; c < patch.end; ++c) gradient_sums_plane<L, dtype>(patch, map, c, sums);
    return;
  }
  each_channels<L, 2>(patch.channel, patch.end, [&](auto partial, auto count, int64_t c, int n) {
    gradient_sums_channels<L, dtype, partial.value, count.value>(patch, map, c, n, sums);
  });
}

template <class L>
void norm_gradient_sums(const NormPatch& patch, const NormMap& map, double* sums) {
  const int32_t dtype = patch.args->dtype;
  if (dtype == kFloat32) return gradient_sums_of<L, kFloat32>(patch, map, sums);
  return dtype == kFloat16 ? gradient_sums_of<L, kFloat16>(patch, map, sums)
                           : gradient_sums_of<L, kBFloat16>(patch, map, sums);
}

template <class L>
void norm_gradient_map(const NormPatch& patch, const NormMap& map) {
  const int32_t dtype = patch.args->dtype;
  if (dtype == kFloat32) return gradient_map_of<L, kFloat32>(patch, map);
  return dtype == kFloat16 ? gradient_map_of<L, kFloat16>(patch, map) : gradient_map_of<L, kBFloat16>(patch, map);
}

}  // namespace
}  // namespace fastdiff::cpu
