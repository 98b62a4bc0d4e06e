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
// into: B^T, out: A^T, spread: A, weights: G, weights_gradient: G^T, each of one row or column.
template <class L, int size>
struct Winograd {
  using F = typename L::F;
  static constexpr int kTaps = 6;
  static constexpr float a = 0.625f, b = 1.5f, a2 = a * a, b2 = b * b;
  // 1, p, p^2 of a point over the product of its distances from the others
  static constexpr float g0 = 1 / (a2 * b2), ga = 1 / (2 * a2 * (a2 - b2)), gb = 1 / (2 * b2 * (b2 - a2));

  FASTDIFF_LANE void into(const F (&d)[6], F (&to)[6]) {
    const F even_a = L::fma(L::set(-b2), d[2], d[4]), odd_a = L::fma(L::set(-b2), d[1], d[3]);
    const F even_b = L::fma(L::set(-a2), d[2], d[4]), odd_b = L::fma(L::set(-a2), d[1], d[3]);
    to[0] = L::fma(L::set(-(a2 + b2)), d[2], L::fma(L::set(a2 * b2), d[0], d[4]));
    to[1] = L::fma(L::set(a), odd_a, even_a);
    to[2] = L::fma(L::set(-a), odd_a, even_a);
    to[3] = L::fma(L::set(b), odd_b, even_b);
    to[4] = L::fma(L::set(-b), odd_b, even_b);
    to[5] = L::fma(L::set(-(a2 + b2)), d[3], L::fma(L::set(a2 * b2), d[1], d[5]));
  }

  FASTDIFF_LANE void out(const F (&m)[6], F (&to)[4]) {
    const F even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    to[0] = m[0] + even_a + even_b;
    to[1] = L::fma(L::set(a), odd_a, L::set(b) * odd_b);
    to[2] = L::fma(L::set(a2), even_a, L::set(b2) * even_b);
    to[3] = L::fma(L::set(a2 * a), odd_a, L::fma(L::set(b2 * b), odd_b, m[5]));
  }

  FASTDIFF_LANE void spread(const F (&y)[4], F (&to)[6]) {
    const F even_a = L::fma(L::set(a2), y[2], y[0]), odd_a = L::fma(L::set(a2 * a), y[3], L::set(a) * y[1]);
    const F even_b = L::fma(L::set(b2), y[2], y[0]), odd_b = L::fma(L::set(b2 * b), y[3], L::set(b) * y[1]);
    to[0] = y[0];
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
    to[5] = y[3];
  }

  FASTDIFF_LANE void weights(const F (&w)[3], F (&to)[6]) {
    const F even_a = L::fma(L::set(ga * a2), w[2], L::set(ga) * w[0]), odd_a = L::set(ga * a) * w[1];
    const F even_b = L::fma(L::set(gb * b2), w[2], L::set(gb) * w[0]), odd_b = L::set(gb * b) * w[1];
    to[0] = L::set(g0) * w[0];
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
    to[5] = w[2];
  }

  FASTDIFF_LANE void weights_gradient(const F (&u)[6], F (&to)[3]) {
    const F even_a = u[1] + u[2], odd_a = u[1] - u[2], even_b = u[3] + u[4], odd_b = u[3] - u[4];
    to[0] = L::fma(L::set(g0), u[0], L::fma(L::set(ga), even_a, L::set(gb) * even_b));
    to[1] = L::fma(L::set(ga * a), odd_a, L::set(gb * b) * odd_b);
    to[2] = L::fma(L::set(ga * a2), even_a, L::fma(L::set(gb * b2), even_b, u[5]));
  }
};

// F(2, 3) with the points 0, 1, -1 and infinity: into and out.
template <class L>
struct Winograd<L, 2> {
  using F = typename L::F;
  static constexpr int kTaps = 4;

  FASTDIFF_LANE void into(const F (&d)[4], F (&to)[4]) {
    to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[3] - d[1];
  }

  FASTDIFF_LANE void out(const F (&m)[4], F (&to)[2]) { to[0] = m[0] + m[1] + m[2], to[1] = m[1] - m[2] + m[3]; }
};

// A whole cache line of channels at a time, or one register, or what is left of one.
template <class L, class Step>
FASTDIFF_INLINE void each_line(int64_t channels, const Step& step) {
  constexpr int w = L::kWidth, count = w < kPanel ? kPanel / w : 1;
  int64_t c = 0;
  for (; c + count * w <= channels; c += count * w) step(std::false_type{}, std::integral_constant<int, count>{}, c, w);
  for (; c + w <= channels; c += w) step(std::false_type{}, std::integral_constant<int, 1>{}, c, w);
  if (c < channels) step(std::true_type{}, std::integral_constant<int, 1>{}, c, static_cast<int>(channels - c));
}

// The columns and then the rows of an n x n matrix to m x m, for `count` registers: of(i, j, u) reads one, put(i, j, u,
// value) takes one.
template <class L, int n, int m, int count, class Of, class Along, class Put>
FASTDIFF_INLINE void both_ways(const Of& of, const Along& along, const Put& put) {
  using F = typename L::F;
  F half[m][n][count];
  for (int j = 0; j < n; ++j) {
    for (int u = 0; u < count; ++u) {
      F from[n], to[m];
      for (int i = 0; i < n; ++i) from[i] = of(i, j, u);
      along(from, to);
      for (int i = 0; i < m; ++i) half[i][j][u] = to[i];
    }
  }
  for (int i = 0; i < m; ++i) {
    for (int u = 0; u < count; ++u) {
      F to[m], from[n];
      for (int j = 0; j < n; ++j) from[j] = half[i][j][u];
      along(from, to);
      for (int j = 0; j < m; ++j) put(i, j, u, to[j]);
    }
  }
}

// n x n pixels to all taps.
template <class L, int n, int taps, class Along>
FASTDIFF_INLINE void pixels_to_taps(const TileIn& tile, int64_t channels, const Along& along) {
  using F = typename L::F;
  constexpr int w = L::kWidth;
  each_line<L>(channels, [&](auto partial, auto count, int64_t c, int last) {
    float* const v = tile.v + c / kPanel * tile.panel + c % kPanel;
    both_ways<L, n, taps, count.value>(
        [&](int i, int j, int u) { return load<L, partial.value>(tile.pixel[i * n + j] + c + u * w, last); }, along,
        [&](int i, int j, int u, F value) {
          store<L, partial.value>(v + (i * taps + j) * tile.tap + u * w, value, last);
        });
  });
}

template <class L, int size>
void tile_into(const TileIn& tile, int64_t channels) {
  using Of = Winograd<L, size>;
  constexpr int taps = Of::kTaps;
  pixels_to_taps<L, taps, taps>(tile, channels, [](auto& from, auto& to) { Of::into(from, to); });
}

template <class L, int size>
void tile_out(const TileOut& tile, int64_t channels) {
  using F = typename L::F;
  using Of = Winograd<L, size>;
  constexpr int w = L::kWidth, taps = Of::kTaps;
  each_line<L>(channels, [&](auto partial, auto count, int64_t c, int n) {
    const float* const products = tile.products + c / kPanel * tile.panel + c % kPanel;
    F added[count.value];
    for (int u = 0; u < count.value; ++u)
      added[u] = tile.bias ? load<L, partial.value>(tile.bias + c + u * w, n) : L::set(0.0f);
    both_ways<L, taps, size, count.value>(
        [&](int i, int j, int u) {
          return load<L, partial.value>(products + (i * taps + j) * tile.tap + u * w, n);
        },
        [](auto& from, auto& to) { Of::out(from, to); },
        [&](int i, int j, int u, F value) {
          if (float* to = tile.pixel[i * size + j]) store<L, partial.value>(to + c + u * w, value + added[u], n);
        });
  });
}

template <class L>
void winograd_weights(const WeightPanel& panel) {
  using F = typename L::F;
  using Of = Winograd<L, 4>;
  constexpr int w = L::kWidth, taps = Of::kTaps;
  alignas(64) float block[9][kPanel][kPanel];  // so that each of the weight's cache lines is read once
  for (int64_t first = 0; first < panel.rows; first += kPanel) {
    for (int64_t column = 0; column < kPanel; ++column)
      for (int64_t k = 0; k < 9; ++k)
        for (int64_t row = 0; row < kPanel; ++row)
          block[k][row][column] = panel.weight[(first + row) * panel.row + column * panel.column + k * panel.tap];
    for (int64_t row = 0; row < kPanel; ++row) {
      float* const to = panel.transformed + (first + row) * kPanel;
      both_ways<L, 3, taps, kPanel / w>(
          [&](int i, int j, int u) { return L::load(&block[i * 3 + j][row][u * w]); },
          [](auto& from, auto& to) { Of::weights(from, to); },
          [&](int i, int j, int u, F value) { L::store(to + (i * taps + j) * panel.matrix + u * w, value); });
    }
  }
}

template <class L>
void winograd_weights_gradient(const WeightPanel& panel) {
  using F = typename L::F;
  using Of = Winograd<L, 4>;
  constexpr int w = L::kWidth, taps = Of::kTaps;
  alignas(64) float block[9][kPanel][kPanel];
  for (int64_t first = 0; first < panel.rows; first += kPanel) {
    for (int64_t row = 0; row < kPanel; ++row) {
      const float* const from = panel.transformed + (first + row) * kPanel;
      both_ways<L, taps, 3, kPanel / w>(
          [&](int i, int j, int u) { return L::load(from + (i * taps + j) * panel.matrix + u * w); },
          [](auto& from, auto& to) { Of::weights_gradient(from, to); },
          [&](int i, int j, int u, F value) { L::store(&block[i * 3 + j][row][u * w], value); });
    }
    for (int64_t row = 0; row < kPanel; ++row)
      for (int64_t k = 0; k < 9; ++k)
        for (int64_t column = 0; column < kPanel; ++column)
          panel.weight[(first + row) * panel.row + column * panel.column + k * panel.tap] = block[k][row][column];
  }
}

template <class L>
void winograd_into(const TileIn& tile, int64_t channels, int64_t size) {
  size == 4 ? tile_into<L, 4>(tile, channels) : tile_into<L, 2>(tile, channels);
}

template <class L>
void winograd_out(const TileOut& tile, int64_t channels, int64_t size) {
  size == 4 ? tile_out<L, 4>(tile, channels) : tile_out<L, 2>(tile, channels);
}

template <class L>
void winograd_spread(const TileIn& tile, int64_t channels) {
  pixels_to_taps<L, 4, 6>(tile, channels, [](auto& from, auto& to) { Winograd<L, 4>::spread(from, to); });
}

}  // namespace
}  // namespace fastdiff::cpu
