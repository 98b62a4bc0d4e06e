// Matrix products on L's registers, summed in order, so that no result depends on the register's width. What adds to a
// sum is summed up first, as the errors of many parts are smaller than those of one long sum.
#pragma once

#include "executor.h"

namespace fastdiff::cpu {
namespace {

// to[n][..] = sum over m of a[n, m] x[m][..] for `rows` values of n; with kAdd added to what is there.
template <class L, int rows, int registers, bool kAdd>
FASTDIFF_INLINE void tile(const float* a, int64_t a_row, int64_t a_column, const float* x, int64_t x_row, int64_t M,
                          float* to, int64_t to_row) {
  using F = typename L::F;
  constexpr int w = L::kWidth;
  F sum[rows][registers];
  for (int r = 0; r < rows; ++r)
    for (int u = 0; u < registers; ++u) sum[r][u] = L::set(0.0f);
  for (int64_t m = 0; m < M; ++m) {
    F value[registers];
    for (int u = 0; u < registers; ++u) value[u] = L::load(x + m * x_row + u * w);
    for (int r = 0; r < rows; ++r) {
      const F factor = L::set(a[r * a_row + m * a_column]);
      for (int u = 0; u < registers; ++u) sum[r][u] = L::fma(factor, value[u], sum[r][u]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int u = 0; u < registers; ++u) {
      float* const place = to + r * to_row + u * w;
      L::store(place, kAdd ? L::load(place) + sum[r][u] : sum[r][u]);
    }
}

// As tile for `count` <= most rows, in one go.
template <class L, int most, bool kAdd>
FASTDIFF_INLINE void some_rows(int64_t count, const float* a, int64_t a_row, int64_t a_column, const float* x, int64_t M,
                               float* to) {
  constexpr int registers = kPanel / L::kWidth;
  if (count == most) {
    tile<L, most, registers, kAdd>(a, a_row, a_column, x, kPanel, M, to, kPanel);
  } else if constexpr (most > 1) {
    some_rows<L, most - 1, kAdd>(count, a, a_row, a_column, x, M, to);
  }
}

template <class L, bool kAdd>
FASTDIFF_INLINE void all_rows(int64_t N, const float* a, int64_t a_row, int64_t a_column, const float* x, int64_t M,
                              float* to) {
  constexpr int most = L::kWidth == 16 ? 12 : 6;  // sums, values and a factor fill the registers
  const int64_t parts = (N + most - 1) / most;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = N * part / parts;
    some_rows<L, most, kAdd>(N * (part + 1) / parts - first, a + first * a_row, a_row, a_column, x, M,
                             to + first * kPanel);
  }
}

template <class L>
void panel_product(const PanelProduct& p) {
  if (!p.turned) {
    all_rows<L, false>(p.N, p.a, p.a_row, 1, p.x, p.M, p.to);
  } else if (p.add) {
    all_rows<L, true>(p.N, p.a, 1, kPanel, p.x, p.M, p.to);
  } else {
    all_rows<L, false>(p.N, p.a, 1, kPanel, p.x, p.M, p.to);
  }
}

}  // namespace
}  // namespace fastdiff::cpu
