// The transforms of one tile of a Winograd convolution with 3x3 taps, on L's lanes of channels.
// Bytes per element of the image: F(4x4) reads 4 and writes 9 for the input, reads 9 and writes 4 for the output, each
// from or to the second- or last-level cache; F(2x2) 16 in place of 9. About 6 operations an element each way: must
// reach half the copy bandwidth of that cache.
#pragma once

#include <type_traits>

#include "access.h"
#include "executor.h"

namespace fastdiff::cpu {
namespace {

// F(4, 3) with the points 0, +-a, +-b and infinity (Lavin & Gray 2015; a, b as in oneDNN: a third of the error of 1, 2).
template <class L, int size>
struct Winograd {
  using F = typename L::F;
  static constexpr int kTaps = 6;
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;

  FASTDIFF_LANE void into(F (&d)[kTaps]) {
    const F first = L::fma(L::set(-(a2 + b2)), d[2], L::fma(L::set(a2 * b2), d[0], d[4]));
    const F last = L::fma(L::set(-(a2 + b2)), d[3], L::fma(L::set(a2 * b2), d[1], d[5]));
    const F even_a = L::fma(L::set(-b2), d[2], d[4]), odd_a = L::fma(L::set(-b2), d[1], d[3]);
    const F even_b = L::fma(L::set(-a2), d[2], d[4]), odd_b = L::fma(L::set(-a2), d[1], d[3]);
    d[0] = first;
    d[1] = L::fma(L::set(a), odd_a, even_a);
    d[2] = L::fma(L::set(-a), odd_a, even_a);
    d[3] = L::fma(L::set(b), odd_b, even_b);
    d[4] = L::fma(L::set(-b), odd_b, even_b);
    d[5] = last;
  }

  FASTDIFF_LANE void out(F (&m)[kTaps]) {
    const F even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    m[0] = m[0] + even_a + even_b;
    m[1] = L::fma(L::set(a), odd_a, L::set(b) * odd_b);
    m[2] = L::fma(L::set(a2), even_a, L::set(b2) * even_b);
    m[3] = L::fma(L::set(a2 * a), odd_a, L::fma(L::set(b2 * b), odd_b, m[5]));
  }
};

// F(2, 3) with the points 0, 1, -1 and infinity.
template <class L>
struct Winograd<L, 2> {
  using F = typename L::F;
  static constexpr int kTaps = 4;

  FASTDIFF_LANE void into(F (&d)[kTaps]) {
    const F first = d[0] - d[2], last = d[3] - d[1], sum = d[1] + d[2], difference = d[2] - d[1];
    d[0] = first, d[1] = sum, d[2] = difference, d[3] = last;
  }

  FASTDIFF_LANE void out(F (&m)[kTaps]) {
    const F sum = m[0] + m[1] + m[2], difference = m[1] - m[2] + m[3];
    m[0] = sum, m[1] = difference;
  }
};

// Both transforms take a whole cache line of channels at a time, or one register, or what is left of one.
template <class L, class Step>
FASTDIFF_INLINE void each_line(int64_t channels, const Step& step) {
  constexpr int w = L::kWidth, count = w < 16 ? 16 / w : 1;
  int64_t c = 0;
  for (; c + count * w <= channels; c += count * w) step(std::false_type{}, std::integral_constant<int, count>{}, c, w);
  for (; c + w <= channels; c += w) step(std::false_type{}, std::integral_constant<int, 1>{}, c, w);
  if (c < channels) step(std::true_type{}, std::integral_constant<int, 1>{}, c, static_cast<int>(channels - c));
}

template <class L, int size>
void tile_into(const TileIn& tile, int64_t channels) {
  using F = typename L::F;
  using Of = Winograd<L, size>;
  constexpr int w = L::kWidth, taps = Of::kTaps;
  each_line<L>(channels, [&](auto partial, auto count, int64_t c, int n) {
    F half[taps][taps][count.value];
    for (int j = 0; j < taps; ++j) {
      for (int u = 0; u < count.value; ++u) {
        F d[taps];
        for (int i = 0; i < taps; ++i) d[i] = load<L, partial.value>(tile.pixel[i * taps + j] + c + u * w, n);
        Of::into(d);
        for (int i = 0; i < taps; ++i) half[i][j][u] = d[i];
      }
    }
    for (int i = 0; i < taps; ++i) {
      for (int u = 0; u < count.value; ++u) {
        F d[taps];
        for (int j = 0; j < taps; ++j) d[j] = half[i][j][u];
        Of::into(d);
        for (int j = 0; j < taps; ++j)
          store<L, partial.value>(tile.v + (i * taps + j) * channels + c + u * w, d[j], n);
      }
    }
  });
}

template <class L, int size>
void tile_out(const TileOut& tile, int64_t channels) {
  using F = typename L::F;
  using Of = Winograd<L, size>;
  constexpr int w = L::kWidth, taps = Of::kTaps;
  each_line<L>(channels, [&](auto partial, auto count, int64_t c, int n) {
    F half[size][taps][count.value];
    for (int j = 0; j < taps; ++j) {
      for (int u = 0; u < count.value; ++u) {
        F m[taps];
        for (int i = 0; i < taps; ++i)
          m[i] = load<L, partial.value>(tile.products + (i * taps + j) * channels + c + u * w, n);
        Of::out(m);
        for (int i = 0; i < size; ++i) half[i][j][u] = m[i];
      }
    }
    for (int i = 0; i < size; ++i) {
      for (int u = 0; u < count.value; ++u) {
        const F added = tile.bias ? load<L, partial.value>(tile.bias + c + u * w, n) : L::set(0.0f);
        F m[taps];
        for (int j = 0; j < taps; ++j) m[j] = half[i][j][u];
        Of::out(m);
        for (int j = 0; j < size; ++j)
          if (float* to = tile.pixel[i * size + j]) store<L, partial.value>(to + c + u * w, m[j] + added, n);
      }
    }
  });
}

template <class L>
void winograd_into(const TileIn& tile, int64_t channels, int64_t size) {
  size == 4 ? tile_into<L, 4>(tile, channels) : tile_into<L, 2>(tile, channels);
}

template <class L>
void winograd_out(const TileOut& tile, int64_t channels, int64_t size) {
  size == 4 ? tile_out<L, 4>(tile, channels) : tile_out<L, 2>(tile, channels);
}

}  // namespace
}  // namespace fastdiff::cpu
