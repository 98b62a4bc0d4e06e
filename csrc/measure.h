// The measure op, as the CPU and CUDA see it: the argument block and the term of one element (see
// fastdiff/engine/measure.py for the equations). Torch-free.
#pragma once

#include "guide.h"

extern "C" {

// Mirrored by fastdiff/engine/native_blocks.py; fastdiff_measure_args_size() lets native.py compare the two.
struct MeasureArgs {
  const float* value;       // [B, N]
  float* before;            // [B, N]; kChange replaces it by value
  const float* after;       // [B, N]; of kError only
  const int32_t* status;    // [B] or null
  float* found;             // [B, 2]: the number, and the status
  double* partial;          // [B, kParts]: scratch
  int32_t* ticket;          // [B]: blocks arrived, CUDA only; zero between calls
  int64_t B, N;
  float rtol, atol;         // of kError
  int32_t quantity, reserved;
};
}

namespace fastdiff {

enum Quantity : int32_t { kError = 0, kChange = 1 };

template <class L, class V>
FASTDIFF_INLINE V magnitude(V v) { return L::flip_sign(v, L::bits(v)); }

// (value / max(atol, rtol max(|before|, |after|)))^2; a NaN of value or after stays.
template <class L, class V>
FASTDIFF_INLINE V error_term(V value, V before, V after, float rtol, float atol) {
  const V most = L::set(Scalar::from_bits(0x7f800000));
  const V size = L::clamp(magnitude<L>(after), magnitude<L>(before), most);
  const V relative = value / L::clamp(L::set(rtol) * size, L::set(atol), most);
  return relative * relative;
}

template <class L, class V>
FASTDIFF_INLINE V change_term(V value, V before) { return magnitude<L>(value - before); }

// A sample's number from the sum of its terms: the root of their mean, or their mean.
FASTDIFF_INLINE float measured(int32_t quantity, double sum, int64_t N) {
  const double mean = sum / static_cast<double>(N);
  return static_cast<float>(quantity == kError ? ::sqrt(mean) : mean);
}

}  // namespace fastdiff
