// The sum that the measure op makes of a part of a sample, on L's lanes, in double precision: to the last bits of single
// precision it is the same in any order, so that a sample's number does not depend on how it lies in memory.
// Bytes per element: kError 12 read; kChange 8 read and 4 written. It must reach 80 % of the bandwidth of a copy at sizes
// beyond the cache.
#pragma once

#include "access.h"
#include "executor.h"
#include "sums.h"

namespace fastdiff::cpu {
namespace {

template <class L, Quantity quantity>
double measure_sum(const MeasureArgs& args, int64_t first, int64_t count) {
  using F = typename L::F;
  double total[kLanes] = {};
  each_group(first, count, [&](auto partial, int64_t at, int64_t n) {
    constexpr bool kPartial = partial.value;
    float term[kLanes];
    for (int u = 0; u < registers<L>; ++u) {
      const int64_t place = at + u * L::kWidth;
      const int left = clip(n - u * L::kWidth, L::kWidth);
      const F value = load<L, kPartial>(args.value + place, left), before = load<L, kPartial>(args.before + place, left);
      F found;
      if (quantity == kError) {
        // absent elements are 0 / max(atol, 0)
        found = error_term<L>(value, before, load<L, kPartial>(args.after + place, left), args.rtol, args.atol);
      } else {
        found = change_term<L>(value, before);
        store<L, kPartial>(args.before + place, value, left);
      }
      L::store(term + u * L::kWidth, found);
    }
    for (int i = 0; i < kLanes; ++i) total[i] += static_cast<double>(term[i]);
  });
  double sum = 0.0;
  for (const double lane : total) sum += lane;
  return sum;
}

// Of elements first .. first + count of all samples' memory.
template <class L>
double measure(const MeasureArgs& args, int64_t first, int64_t count) {
  return args.quantity == kError ? measure_sum<L, kError>(args, first, count)
                                 : measure_sum<L, kChange>(args, first, count);
}

}  // namespace
}  // namespace fastdiff::cpu
