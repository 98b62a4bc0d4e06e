// Sixteen floats in an AVX-512 register (F, BW, DQ, VL). Included by one translation unit only.
#pragma once

#include <immintrin.h>

#include "../affine.h"

namespace fastdiff::cpu {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  struct U {  // 64-bit cells of lanes 0, 1, 4, 5, 8.. and of lanes 2, 3, 6, 7, 10..
    __m512i left, right;
  };
  static constexpr int kWidth = 16;
  static constexpr int kUnroll = 4;
  static constexpr const char* kName = "avx512";

  FASTDIFF_LANE F set(float v) { return _mm512_set1_ps(v); }
  FASTDIFF_LANE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  FASTDIFF_LANE F sqrt(F v) { return _mm512_sqrt_ps(v); }
  // max and min hand back their second operand when either is NaN.
  FASTDIFF_LANE F clamp(F v, F lo, F hi) { return _mm512_min_ps(hi, _mm512_max_ps(lo, v)); }

  FASTDIFF_LANE I bits(F v) { return _mm512_castps_si512(v); }
  FASTDIFF_LANE F from_bits(I v) { return _mm512_castsi512_ps(v); }
  FASTDIFF_LANE I iset(int32_t v) { return _mm512_set1_epi32(v); }
  FASTDIFF_LANE I add(I a, I b) { return _mm512_add_epi32(a, b); }
  FASTDIFF_LANE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  template <int n>
  FASTDIFF_LANE I shift_left(I v) { return _mm512_slli_epi32(v, n); }
  template <int n>
  FASTDIFF_LANE I shift_right(I v) { return _mm512_srai_epi32(v, n); }
  FASTDIFF_LANE I bit_and(I a, I b) { return _mm512_and_si512(a, b); }
  FASTDIFF_LANE I bit_xor(I a, I b) { return _mm512_xor_si512(a, b); }
  FASTDIFF_LANE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  FASTDIFF_LANE F to_float_unsigned(I v) { return _mm512_cvtepu32_ps(v); }
  FASTDIFF_LANE F select_negative(I sign, F yes, F no) {
    return _mm512_mask_mov_ps(no, _mm512_movepi32_mask(sign), yes);
  }
  FASTDIFF_LANE F flip_sign(F v, I sign) {  // v ^ (sign & 0x80000000)
    return from_bits(_mm512_ternarylogic_epi32(bits(v), sign, _mm512_set1_epi32(INT32_MIN), 0x78));
  }

  FASTDIFF_LANE U cells(uint64_t v) {
    const __m512i cell = _mm512_set1_epi64(static_cast<int64_t>(v));
    return {cell, cell};
  }
  FASTDIFF_LANE U uset(uint32_t v) { return cells(v); }
  FASTDIFF_LANE U multiply(U a, uint32_t m) {
    const U cell = uset(m);
    return {_mm512_mul_epu32(a.left, cell.left), _mm512_mul_epu32(a.right, cell.right)};
  }
  FASTDIFF_LANE U high(U v) { return {_mm512_srli_epi64(v.left, 32), _mm512_srli_epi64(v.right, 32)}; }
  FASTDIFF_LANE U xor2(U a, U b) { return {_mm512_xor_si512(a.left, b.left), _mm512_xor_si512(a.right, b.right)}; }
  FASTDIFF_LANE U xor3(U a, U b, uint64_t k) {
    const U cell = cells(k);
    return {_mm512_ternarylogic_epi64(a.left, b.left, cell.left, 0x96),
            _mm512_ternarylogic_epi64(a.right, b.right, cell.right, 0x96)};
  }
  FASTDIFF_LANE I words(U v) {  // the low halves
    return bits(_mm512_shuffle_ps(from_bits(v.left), from_bits(v.right), _MM_SHUFFLE(2, 0, 2, 0)));
  }
  FASTDIFF_LANE I high_words(U v) {
    return bits(_mm512_shuffle_ps(from_bits(v.left), from_bits(v.right), _MM_SHUFFLE(3, 1, 3, 1)));
  }
  FASTDIFF_LANE U counters(const uint64_t* q) {  // lane i counts q[i]
    const __m512i left = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13);
    const __m512i right = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
    const __m512i near = _mm512_loadu_si512(q), far = _mm512_loadu_si512(q + 8);
    return {_mm512_permutex2var_epi64(near, left, far), _mm512_permutex2var_epi64(near, right, far)};
  }
  FASTDIFF_LANE U advance(U q, uint64_t by) {
    const __m512i cell = _mm512_set1_epi64(static_cast<int64_t>(by));
    return {_mm512_add_epi64(q.left, cell), _mm512_add_epi64(q.right, cell)};
  }

  // v[word][lane 4L+k] holds the word of counter 4k+L; afterwards v[0..3] are 64 normals in the order of memory.
  FASTDIFF_LANE void transpose(F (&v)[4]) {
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1])), b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3])), d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
    v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }

  FASTDIFF_LANE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  FASTDIFF_LANE I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
  FASTDIFF_LANE void istore(int32_t* p, I v) { _mm512_store_si512(p, v); }
  FASTDIFF_LANE F load(const float* p) { return _mm512_loadu_ps(p); }
  FASTDIFF_LANE F load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  FASTDIFF_LANE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  FASTDIFF_LANE void store(float* p, F v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

  using H = __m256i;  // sixteen 16-bit floats
  FASTDIFF_LANE H load16(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  FASTDIFF_LANE H load16(const uint16_t* p, int n) { return _mm256_maskz_loadu_epi16(first(n), p); }
  FASTDIFF_LANE void store16(uint16_t* p, H v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  FASTDIFF_LANE void store16(uint16_t* p, H v, int n) { _mm256_mask_storeu_epi16(p, first(n), v); }
  FASTDIFF_LANE F from_half(H v) { return _mm512_cvtph_ps(v); }
  FASTDIFF_LANE H to_half(F v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  FASTDIFF_LANE F from_bfloat(H v) { return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  // By hand: the instruction of AVX512_BF16 flushes denormals.
  FASTDIFF_LANE H to_bfloat(F v) {
    const I b = bits(v);
    const I even = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    I r = _mm512_srli_epi32(add(b, add(even, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(r);
  }

  FASTDIFF_LANE bool any_nan(F v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
  struct Mask {
    __mmask16 m;
  };
  FASTDIFF_LANE Mask mask(uint32_t lanes) { return {static_cast<__mmask16>(lanes)}; }
  FASTDIFF_LANE F permute(F v, I lane) { return _mm512_permutexvar_ps(lane, v); }
  FASTDIFF_LANE F select(Mask m, F yes, F no) { return _mm512_mask_mov_ps(no, m.m, yes); }
};

}  // namespace
}  // namespace fastdiff::cpu
