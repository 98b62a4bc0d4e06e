// Sums and the normalised image of some pixels of one sample, on L's lanes.
// Bytes per element: 2 or 4 each for x, the residual and the total where they are there, for x or the total again (from
// cache), and for y. Must reach 50 % of copy bandwidth where a sample fits the second-level cache: SiLU's exponential is
// the limit there, memory beyond.
#pragma once

#include "../normal.h"
#include "norm_images.h"

namespace fastdiff::cpu {
namespace {

// Pixels after which lanes go to double precision, and those whose mean a channel counts from: near the true one, so
// that neither a large mean nor an odd pixel drowns the squares.
constexpr int64_t kNormSpan = 64, kNormHead = 4;
// Pixels up to which planes of a group are added up as one run, and its registers after which lanes go to double: the
// run counts from the mean of its first register, which is not that of every plane.
constexpr int64_t kShortPlane = 32, kRunSpan = 8;

template <class L>
FASTDIFF_INLINE typename L::F silu(typename L::F v) {
  return v / (L::set(1.0f) + exponential<L>(L::set(0.0f) - v));
}

// ---- the map of a run of elements that lie next to each other: channels of a pixel, or pixels of a channel

// What is read and written, from pixel 0 on; in members of its own, which no store can change.
struct Run {
  const void *from, *residual;
  void* to;
  int64_t at, step, residual_at, residual_step, out, out_step;
  bool act;

  FASTDIFF_MEMBER Run(const Places& p, const NormArgs& a, const NormMap& map)
      : from(map.from_total ? a.total : p.x), residual(map.from_total ? nullptr : p.residual), to(map.to),
        at(map.from_total ? p.out : p.at), step(map.from_total ? p.out_step : p.step), residual_at(p.residual_at),
        residual_step(p.step), out(p.out), out_step(p.out_step), act(map.act) {}

  // value(partial, i, n, u) of the `count` elements from the first of `pixel` on.
  template <class L, int32_t dtype, class Value>
  FASTDIFF_MEMBER void map(int64_t pixel, int64_t count, const Value& value) const {
    const int64_t in = at + pixel * step, more = residual_at + pixel * residual_step, to_at = out + pixel * out_step;
    each_register<L>(count, [&](auto partial, int64_t i, int n) {
      typename L::F v = read<L, dtype, partial.value>(from, in + i, n);
      if (residual) v = v + read<L, dtype, partial.value>(residual, more + i, n);
      v = value(partial, i, n, v);
      write<L, dtype, partial.value>(to, to_at + i, act ? silu<L>(v) : v, n);
    });
  }
};

// ---- channels last: `count` registers of consecutive channels, pixel after pixel

// Sums over `size` pixels of the first n lanes, each a channel that counts from its head, into those of u and its square.
template <class L>
FASTDIFF_INLINE void add_channels(typename L::F sum, typename L::F square, typename L::F head, int64_t size, int n,
                                  double* __restrict totals, double* __restrict squares) {
  constexpr int w = L::kWidth;
  float s[w], q[w], h[w];
  L::store(s, sum);
  L::store(q, square);
  L::store(h, head);
  const double pixels = static_cast<double>(size);
  for (int i = 0; i < n; ++i) {
    const double k = h[i], total = s[i];
    totals[i] += total + pixels * k;
    squares[i] += q[i] + 2.0 * k * total + pixels * k * k;
  }
}

template <class L, int32_t dtype, bool kPartial, int count>
void sum_channels(const NormPatch& patch, int64_t c, int n, double* sums) {
  using F = typename L::F;
  constexpr int w = L::kWidth;
  const NormArgs& a = *patch.args;
  const Places p = places(patch, c);
  const int64_t width = patch.end - patch.channel;
  double* const to = sums + (c - patch.channel);
  F head[count], added[count];
  const auto get = [&](int64_t pixel, int u) {
    F v = read<L, dtype, kPartial>(p.x, p.at + pixel * p.step + u * w, n);
    if (p.residual) v = v + read<L, dtype, kPartial>(p.residual, p.residual_at + pixel * p.step + u * w, n);
    return v + added[u];
  };
  for (int u = 0; u < count; ++u)
    added[u] = a.before ? load<L, kPartial>(a.before + patch.b * a.before_stride + c + u * w, n) : L::set(0.0f);
  const int64_t few = patch.count < kNormHead ? patch.count : kNormHead;
  for (int u = 0; u < count; ++u) {
    head[u] = get(patch.first, u);
    for (int64_t i = 1; i < few; ++i) head[u] = head[u] + get(patch.first + i, u);
    head[u] = head[u] / L::set(static_cast<float>(few));
  }
  for (int64_t done = 0; done < patch.count; done += kNormSpan) {
    const int64_t size = patch.count - done < kNormSpan ? patch.count - done : kNormSpan;
    F sum[count], square[count];
    for (int u = 0; u < count; ++u) sum[u] = square[u] = L::set(0.0f);
    for (int64_t i = 0; i < size; ++i) {
      const int64_t pixel = patch.first + done + i;
      for (int u = 0; u < count; ++u) {
        const F v = get(pixel, u);
        if (a.total) write<L, dtype, kPartial>(a.total, p.out + pixel * p.out_step + u * w, v, n);
        const F away = v - head[u];
        sum[u] = sum[u] + away;
        square[u] = L::fma(away, away, square[u]);
      }
    }
    for (int u = 0; u < count; ++u)
      add_channels<L>(sum[u], square[u], head[u], size, kPartial ? n : w, to + u * w, to + u * w + width);
  }
}

// ---- channels first: one channel, or those of a group, a register of consecutive pixels after the other

// Lanes in four chains, which do not wait for each other.
template <class L>
FASTDIFF_INLINE double add_up(typename L::F v) {
  float lanes[L::kWidth];
  L::store(lanes, v);
  double part[4] = {};
  for (int i = 0; i < L::kWidth; ++i) part[i % 4] += static_cast<double>(lanes[i]);
  return (part[0] + part[1]) + (part[2] + part[3]);
}

// `count` elements from channel c's first pixel on; lanes go to double after `span` registers.
template <class L, int32_t dtype>
void sum_plane(const NormPatch& patch, int64_t c, int64_t count, int64_t span, double* sums) {
  using F = typename L::F;
  constexpr int w = L::kWidth;
  const NormArgs& a = *patch.args;
  const Places p = places(patch, c);
  const F added = L::set(a.before ? a.before[patch.b * a.before_stride + c] : 0.0f);
  const auto get = [&](auto partial, int64_t pixel, int n) {
    F v = read<L, dtype, partial.value>(p.x, p.at + pixel, n);
    if (p.residual) v = v + read<L, dtype, partial.value>(p.residual, p.residual_at + pixel, n);
    return v + added;
  };
  double* const to = sums + (c - patch.channel);
  float lanes[w];
  const int few = clip(count, w);
  L::store(lanes, get(std::true_type{}, patch.first, few));
  float middle = 0.0f;
  for (int i = 0; i < few; ++i) middle += lanes[i];
  middle /= static_cast<float>(few);
  const F head = L::set(middle);
  const double k = static_cast<double>(middle);
  for (int64_t done = 0; done < count; done += span * w) {
    const int64_t size = count - done < span * w ? count - done : span * w;
    F sum = L::set(0.0f), square = sum;
    each_register<L>(size, [&](auto partial, int64_t i, int n) {
      const int64_t pixel = patch.first + done + i;
      const F v = get(partial, pixel, n);
      if (a.total) write<L, dtype, partial.value>(a.total, p.out + pixel, v, n);
      F away = v - head;
      if (partial.value) away = L::select(L::mask((1u << n) - 1u), away, L::set(0.0f));
      sum = sum + away;
      square = L::fma(away, away, square);
    });
    const double total = add_up<L>(sum), squares = add_up<L>(square);
    to[0] += total + static_cast<double>(size) * k;
    to[patch.end - patch.channel] += squares + 2.0 * k * total + static_cast<double>(size) * k * k;
  }
}

// ---- what the driver calls

template <class L, int32_t dtype>
void norm_sums_of(const NormPatch& patch, double* sums) {
  const NormArgs& a = *patch.args;
  const int64_t channels = a.C / a.groups;
  if (!a.channels_last) {
    const bool run = a.P <= kShortPlane && !a.before;  // goes to the first of the channels
    each_image(patch, [&](int64_t first, int64_t end) {
      for (int64_t c = first, next; c < end; c = next) {
        const int64_t group = (c / channels + 1) * channels;
        next = !run ? c + 1 : group < end ? group : end;
        sum_plane<L, dtype>(patch, c, (next - c) * patch.count, run ? kRunSpan : kNormSpan, sums);
      }
    });
    return;
  }
  each_image(patch, [&](int64_t first, int64_t end) {
    each_channels<L>(first, end, [&](auto partial, auto count, int64_t c, int n) {
      sum_channels<L, dtype, partial.value, count.value>(patch, c, n, sums);
    });
  });
}

template <class L, int32_t dtype>
void norm_map_of(const NormPatch& patch, const NormMap& map) {
  const NormArgs& a = *patch.args;
  if (!a.channels_last) {
    for (int64_t c = patch.channel; c < patch.end; ++c) {
      const typename L::F middle = L::set(map.middle[c]), factor = L::set(map.factor[c]);
      const typename L::F constant = L::set(map.constant[c]);
      const Run run(places(patch, c), a, map);
      run.template map<L, dtype>(patch.first, patch.count, [&](auto, int64_t, int, auto v) {
        return L::fma(v - middle, factor, constant);
      });
    }
    return;
  }
  each_image(patch, [&](int64_t first, int64_t end) {
    const float *middle = map.middle + first, *factor = map.factor + first, *constant = map.constant + first;
    const Run run(places(patch, first), a, map);
    for (int64_t pixel = patch.first; pixel < patch.first + patch.count; ++pixel)
      run.template map<L, dtype>(pixel, end - first, [&](auto partial, int64_t i, int n, auto v) {
        constexpr bool part = partial.value;
        return L::fma(v - load<L, part>(middle + i, n), load<L, part>(factor + i, n), load<L, part>(constant + i, n));
      });
  });
}

template <class L>
void norm_sums(const NormPatch& patch, double* sums) {
  const int32_t dtype = patch.args->dtype;
  if (dtype == kFloat32) return norm_sums_of<L, kFloat32>(patch, sums);
  return dtype == kFloat16 ? norm_sums_of<L, kFloat16>(patch, sums) : norm_sums_of<L, kBFloat16>(patch, sums);
}

template <class L>
void norm_map(const NormPatch& patch, const NormMap& map) {
  const int32_t dtype = patch.args->dtype;
  if (dtype == kFloat32) return norm_map_of<L, kFloat32>(patch, map);
  return dtype == kFloat16 ? norm_map_of<L, kFloat16>(patch, map) : norm_map_of<L, kBFloat16>(patch, map);
}

}  // namespace
}  // namespace fastdiff::cpu
