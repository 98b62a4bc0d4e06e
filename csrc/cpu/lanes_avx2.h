// Eight floats in an AVX register (AVX2, FMA, F16C). Included by one translation unit only.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../affine.h"

namespace fastdiff::cpu {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  struct U {  // 64-bit cells of lanes 0, 1, 4, 5 and of lanes 2, 3, 6, 7
    __m256i left, right;
  };
  static constexpr int kWidth = 8;
  static constexpr int kUnroll = 2;
  static constexpr const char* kName = "avx2";

  FASTDIFF_LANE F set(float v) { return _mm256_set1_ps(v); }
  FASTDIFF_LANE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  FASTDIFF_LANE F sqrt(F v) { return _mm256_sqrt_ps(v); }
  // max and min hand back their second operand when either is NaN.
  FASTDIFF_LANE F clamp(F v, F lo, F hi) { return _mm256_min_ps(hi, _mm256_max_ps(lo, v)); }

  FASTDIFF_LANE I bits(F v) { return _mm256_castps_si256(v); }
  FASTDIFF_LANE F from_bits(I v) { return _mm256_castsi256_ps(v); }
  FASTDIFF_LANE I iset(int32_t v) { return _mm256_set1_epi32(v); }
  FASTDIFF_LANE I add(I a, I b) { return _mm256_add_epi32(a, b); }
  FASTDIFF_LANE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
  template <int n>
  FASTDIFF_LANE I shift_left(I v) { return _mm256_slli_epi32(v, n); }
  template <int n>
  FASTDIFF_LANE I shift_right(I v) { return _mm256_srai_epi32(v, n); }
  template <int n>
  FASTDIFF_LANE I shift_right_unsigned(I v) { return _mm256_srli_epi32(v, n); }
  FASTDIFF_LANE I bit_and(I a, I b) { return _mm256_and_si256(a, b); }
  FASTDIFF_LANE I bit_xor(I a, I b) { return _mm256_xor_si256(a, b); }
  FASTDIFF_LANE I truncate(F v) { return _mm256_cvttps_epi32(v); }
  FASTDIFF_LANE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  // Both halves convert exactly and the product is exact, so the one rounding is that of the conversion.
  FASTDIFF_LANE F to_float_unsigned(I v) {
    const F high = _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 16));
    const F low = _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)));
    return _mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), low);
  }
  FASTDIFF_LANE F select_negative(I sign, F yes, F no) { return _mm256_blendv_ps(no, yes, from_bits(sign)); }
  FASTDIFF_LANE F flip_sign(F v, I sign) {
    return _mm256_xor_ps(v, from_bits(_mm256_and_si256(sign, _mm256_set1_epi32(INT32_MIN))));
  }

  FASTDIFF_LANE U cells(uint64_t v) {
    const __m256i cell = _mm256_set1_epi64x(static_cast<int64_t>(v));
    return {cell, cell};
  }
  FASTDIFF_LANE U uset(uint32_t v) { return cells(v); }
  FASTDIFF_LANE U multiply(U a, uint32_t m) {
    const U cell = uset(m);
    return {_mm256_mul_epu32(a.left, cell.left), _mm256_mul_epu32(a.right, cell.right)};
  }
  FASTDIFF_LANE U high(U v) { return {_mm256_srli_epi64(v.left, 32), _mm256_srli_epi64(v.right, 32)}; }
  FASTDIFF_LANE U xor2(U a, U b) { return {_mm256_xor_si256(a.left, b.left), _mm256_xor_si256(a.right, b.right)}; }
  FASTDIFF_LANE U xor3(U a, U b, uint64_t k) { return xor2(xor2(b, cells(k)), a); }
  FASTDIFF_LANE I words(U v) {  // the low halves
    return bits(_mm256_shuffle_ps(from_bits(v.left), from_bits(v.right), _MM_SHUFFLE(2, 0, 2, 0)));
  }
  FASTDIFF_LANE I high_words(U v) {
    return bits(_mm256_shuffle_ps(from_bits(v.left), from_bits(v.right), _MM_SHUFFLE(3, 1, 3, 1)));
  }
  FASTDIFF_LANE U counters(const uint64_t* q) {  // lane i counts q[i]
    return {_mm256_setr_epi64x(static_cast<int64_t>(q[0]), static_cast<int64_t>(q[1]), static_cast<int64_t>(q[4]),
                               static_cast<int64_t>(q[5])),
            _mm256_setr_epi64x(static_cast<int64_t>(q[2]), static_cast<int64_t>(q[3]), static_cast<int64_t>(q[6]),
                               static_cast<int64_t>(q[7]))};
  }
  FASTDIFF_LANE U advance(U q, uint64_t by) {
    const __m256i cell = _mm256_set1_epi64x(static_cast<int64_t>(by));
    return {_mm256_add_epi64(q.left, cell), _mm256_add_epi64(q.right, cell)};
  }

  // v[word][lane 4L+k] holds the word of counter 2k+L; afterwards v[0..3] are 32 normals in the order of memory.
  FASTDIFF_LANE void transpose(F (&v)[4]) {
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1])), b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3])), d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
    v[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
    v[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
    v[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
    v[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
  }

  FASTDIFF_LANE __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  FASTDIFF_LANE I iload(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  FASTDIFF_LANE void istore(int32_t* p, I v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
  FASTDIFF_LANE F load(const float* p) { return _mm256_loadu_ps(p); }
  FASTDIFF_LANE F load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  FASTDIFF_LANE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  FASTDIFF_LANE void store(float* p, F v, int n) { _mm256_maskstore_ps(p, first(n), v); }

  using H = __m128i;  // eight 16-bit floats
  FASTDIFF_LANE H load16(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  FASTDIFF_LANE H load16(const uint16_t* p, int n) {
    alignas(16) uint16_t cells[kWidth] = {};
    std::memcpy(cells, p, static_cast<size_t>(n) * sizeof *p);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(cells));
  }
  FASTDIFF_LANE void store16(uint16_t* p, H v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
  FASTDIFF_LANE void store16(uint16_t* p, H v, int n) {
    alignas(16) uint16_t cells[kWidth];
    _mm_store_si128(reinterpret_cast<__m128i*>(cells), v);
    std::memcpy(p, cells, static_cast<size_t>(n) * sizeof *p);
  }
  FASTDIFF_LANE F from_half(H v) { return _mm256_cvtph_ps(v); }
  FASTDIFF_LANE H to_half(F v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
  FASTDIFF_LANE F from_bfloat(H v) { return from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  FASTDIFF_LANE H to_bfloat(F v) {
    const I b = bits(v);
    const I even = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    I r = _mm256_srli_epi32(add(b, add(even, _mm256_set1_epi32(0x7fff))), 16);
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), bits(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }

  FASTDIFF_LANE bool any_nan(F v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
  struct Mask {
    F m;
  };
  FASTDIFF_LANE Mask mask(uint32_t lanes) {
    const I lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return {from_bits(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(lanes)), lane), lane))};
  }
  FASTDIFF_LANE F permute(F v, I lane) { return _mm256_permutevar8x32_ps(v, lane); }
  FASTDIFF_LANE F select(Mask m, F yes, F no) { return _mm256_blendv_ps(no, yes, m.m); }
};

}  // namespace
}  // namespace fastdiff::cpu
