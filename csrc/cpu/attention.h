// attention and its gradient, one head of one sample at a time. Included once per instruction set, with L its registers.
//
// Lanes are queries: two registers of them, whose logits to all keys stay in the first two levels of the cache, so that
// neither the largest logit nor the sum needs lanes to be added up, and any head size and number of keys fits. Only what
// is summed over queries, the gradients of keys and values, has the head's elements in lanes.
// Memory is not the limit: a head reads and writes each of its tensors once. Must be twice as fast as torch's blocked
// kernel where the head has 8 elements.
#pragma once

#include <limits>

#include "../normal.h"
#include "executor.h"
#include "products.h"

namespace fastdiff::cpu {
namespace {

template <class L, int rows, int registers, bool kAdd>
FASTDIFF_INLINE void column(const float* a, int64_t a_row, int64_t a_column, const float* x, int64_t x_row, int64_t N,
                            int64_t M, float* to, int64_t to_row) {
  int64_t n = 0;
  for (; n + rows <= N; n += rows)
    tile<L, rows, registers, kAdd>(a + n * a_row, a_row, a_column, x, x_row, M, to + n * to_row, to_row);
  for (; n < N; ++n) tile<L, 1, registers, kAdd>(a + n * a_row, a_row, a_column, x, x_row, M, to + n * to_row, to_row);
}

// As tile, for all n < N and `width` elements of x, a multiple of the register.
template <class L, bool kAdd>
void product(const float* a, int64_t a_row, int64_t a_column, const float* x, int64_t x_row, int64_t N, int64_t M,
             int64_t width, float* to, int64_t to_row) {
  constexpr int w = L::kWidth;
  int64_t c = 0;
  for (; c + 2 * w <= width; c += 2 * w)
    column<L, 4, 2, kAdd>(a, a_row, a_column, x + c, x_row, N, M, to + c, to_row);
  if (c < width) column<L, 8, 1, kAdd>(a, a_row, a_column, x + c, x_row, N, M, to + c, to_row);
}

// One head: its tensors, and the buffers of a thread.
template <class L>
struct Head {
  static constexpr int w = L::kWidth, lanes = 2 * w;
  const AttentionArgs& a;
  int64_t T, d, wide, step, at, stat;  // wide: d in whole registers; step: from token to token; at: of token 0
  float* scratch;

  Head(const AttentionArgs& args, int64_t which, float* scratch)
      : a(args), T(args.T), d(args.d), wide((d + w - 1) / w * w), step(args.H * d),
        at(which / args.H * T * step + which % args.H * d), stat(2 * which * T), scratch(scratch) {}

  float* take(int64_t count) {
    float* const mine = scratch;
    scratch += count;
    return mine;
  }

  // All tokens as [T][wide], the head's unused elements 0.
  float* packed(const float* from) {
    float* const to = take(T * wide);
    rows(from, 0, T, to);
    return to;
  }

  // Tokens first .. first + n as [n][wide].
  void rows(const float* from, int64_t first, int64_t n, float* to) const {
    for (int64_t i = 0; i < n; ++i) {
      const float* row = from + at + (first + i) * step;
      for (int64_t c = 0; c < d; ++c) to[i * wide + c] = row[c];
      for (int64_t c = d; c < wide; ++c) to[i * wide + c] = 0.0f;
    }
  }

  // [n][wide] as [d][lanes], lanes from n on 0.
  void turned(const float* from, int64_t n, float* to) const {
    for (int64_t c = 0; c < d; ++c) {
      for (int64_t i = 0; i < n; ++i) to[c * lanes + i] = from[i * wide + c];
      for (int64_t i = n; i < lanes; ++i) to[c * lanes + i] = 0.0f;
    }
  }

  // [d][lanes] into tokens first .. first + n, each lane times its factor.
  void put(const float* from, int64_t first, int64_t n, const float* factor, float* to) const {
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < d; ++c) to[at + (first + i) * step + c] = from[c * lanes + i] * factor[i];
  }
};

template <class L>
void attend(const AttentionArgs& args, int64_t which, float* scratch) {
  using F = typename L::F;
  Head<L> head(args, which, scratch);
  constexpr int w = L::kWidth, lanes = Head<L>::lanes;
  const int64_t T = head.T, d = head.d, wide = head.wide;
  const float *k = head.packed(args.k), *v = head.packed(args.v);
  float *rows = head.take(lanes * wide), *q = head.take(d * lanes), *weight = head.take(T * lanes);
  float *sum = head.take(d * lanes), *most = head.take(lanes), *share = head.take(lanes);
  const F top = L::set(std::numeric_limits<float>::infinity()), scale = L::set(args.scale);
  for (int64_t first = 0; first < T; first += lanes) {
    const int64_t n = T - first < lanes ? T - first : lanes;
    head.rows(args.q, first, n, rows);
    head.turned(rows, n, q);
    product<L, false>(k, wide, 1, q, lanes, T, d, lanes, weight, lanes);
    for (int u = 0; u < lanes; u += w) {
      F largest = L::load(weight + u), total = L::set(0.0f);
      for (int64_t j = 1; j < T; ++j) largest = L::clamp(L::load(weight + j * lanes + u), largest, top);
      for (int64_t j = 0; j < T; ++j) {
        const F e = exponential<L>((L::load(weight + j * lanes + u) - largest) * scale);
        L::store(weight + j * lanes + u, e);
        total = total + e;
      }
      L::store(most + u, largest);
      L::store(share + u, L::set(1.0f) / total);
    }
    product<L, false>(v, 1, wide, weight, lanes, d, T, lanes, sum, lanes);
    head.put(sum, first, n, share, args.out);
    for (int64_t i = 0; i < n; ++i) {
      args.stats[head.stat + 2 * (first + i)] = most[i];
      args.stats[head.stat + 2 * (first + i) + 1] = share[i];
    }
  }
}

template <class L>
void attend_backward(const AttentionArgs& args, int64_t which, float* scratch) {
  using F = typename L::F;
  Head<L> head(args, which, scratch);
  constexpr int w = L::kWidth, lanes = Head<L>::lanes;
  const int64_t T = head.T, d = head.d, wide = head.wide;
  const float *k = head.packed(args.k), *v = head.packed(args.v);
  float *dk = head.take(T * wide), *dv = head.take(T * wide);
  float *q_rows = head.take(lanes * wide), *g_rows = head.take(lanes * wide);
  float *q = head.take(d * lanes), *g = head.take(d * lanes), *dq = head.take(d * lanes);
  float *weight = head.take(T * lanes), *slope = head.take(T * lanes);
  float *most = head.take(lanes), *share = head.take(lanes), *delta = head.take(lanes), *scales = head.take(lanes);
  for (int64_t i = 0; i < T * wide; ++i) dk[i] = dv[i] = 0.0f;
  for (int i = 0; i < lanes; ++i) scales[i] = args.scale;
  for (int64_t first = 0; first < T; first += lanes) {
    const int64_t n = T - first < lanes ? T - first : lanes;
    head.rows(args.q, first, n, q_rows);
    head.rows(args.grad, first, n, g_rows);
    head.turned(q_rows, n, q);
    head.turned(g_rows, n, g);
    for (int64_t i = 0; i < lanes; ++i) {
      const bool there = i < n;  // a lane without a query weighs nothing
      most[i] = there ? args.stats[head.stat + 2 * (first + i)] : 0.0f;
      share[i] = there ? args.stats[head.stat + 2 * (first + i) + 1] : 0.0f;
      delta[i] = 0.0f;
      for (int64_t c = 0; there && c < d; ++c)
        delta[i] += args.out[head.at + (first + i) * head.step + c] * g_rows[i * wide + c];
    }
    product<L, false>(k, wide, 1, q, lanes, T, d, lanes, weight, lanes);
    product<L, false>(v, wide, 1, g, lanes, T, d, lanes, slope, lanes);
    for (int u = 0; u < lanes; u += w) {
      const F largest = L::load(most + u), part = L::load(share + u), mean = L::load(delta + u);
      const F scale = L::set(args.scale);
      for (int64_t j = 0; j < T; ++j) {
        float *const p = weight + j * lanes + u, *const s = slope + j * lanes + u;
        const F value = exponential<L>((L::load(p) - largest) * scale) * part;
        L::store(p, value);
        L::store(s, value * (L::load(s) - mean));
      }
    }
    product<L, true>(weight, lanes, 1, g_rows, wide, T, n, wide, dv, wide);
    product<L, true>(slope, lanes, 1, q_rows, wide, T, n, wide, dk, wide);
    product<L, false>(k, 1, wide, slope, lanes, d, T, lanes, dq, lanes);
    head.put(dq, first, n, scales, args.dq);
  }
  for (int64_t j = 0; j < T; ++j)
    for (int64_t c = 0; c < d; ++c) {
      args.dk[head.at + j * head.step + c] = dk[j * wide + c] * args.scale;
      args.dv[head.at + j * head.step + c] = dv[j * wide + c];
    }
}

}  // namespace
}  // namespace fastdiff::cpu
