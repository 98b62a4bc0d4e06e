// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").
// Key: the sample's 64-bit seed. Counter: (element index / 4, low then high word; noise id; stream).
#pragma once

#include "affine.h"

namespace fastdiff {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// A seed whose round keys are worked out as they are needed: right where registers are dear (CUDA).
struct PhiloxKey {
  uint32_t k0, k1;
  FASTDIFF_MEMBER uint64_t first(int round) const { return k0 + kPhiloxW0 * static_cast<uint32_t>(round); }
  FASTDIFF_MEMBER uint64_t second(int round) const { return k1 + kPhiloxW1 * static_cast<uint32_t>(round); }
};

// All round keys in memory, each in a 64-bit cell so that a vector unit can broadcast it as an operand (CPU).
struct PhiloxSchedule {
  uint64_t k[2 * kPhiloxRounds];
  FASTDIFF_MEMBER uint64_t first(int round) const { return k[2 * round]; }
  FASTDIFF_MEMBER uint64_t second(int round) const { return k[2 * round + 1]; }
};

FASTDIFF_INLINE PhiloxSchedule philox_schedule(uint64_t seed) {
  const PhiloxKey key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  PhiloxSchedule schedule{};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    schedule.k[2 * round] = key.first(round);
    schedule.k[2 * round + 1] = key.second(round);
  }
  return schedule;
}

// Words live in the low half of 64-bit cells (L::U): the widening product then needs no shuffles, its own low half is
// the next word as it stands, and what is left in the upper halves is never looked at.
// n independent counters go side by side: one alone would wait for its multiplications.
template <class L, int n, class Key>
FASTDIFF_INLINE void philox(typename L::U (&c)[n][4], const Key& key) {
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    typename L::U p0[n], p1[n];
    for (int i = 0; i < n; ++i) p0[i] = L::multiply(c[i][0], kPhiloxM0);
    for (int i = 0; i < n; ++i) p1[i] = L::multiply(c[i][2], kPhiloxM1);
    for (int i = 0; i < n; ++i) {
      c[i][0] = L::xor3(L::high(p1[i]), c[i][1], key.first(round));
      c[i][1] = p1[i];
    }
    for (int i = 0; i < n; ++i) {
      c[i][2] = L::xor3(L::high(p0[i]), c[i][3], key.second(round));
      c[i][3] = p0[i];
    }
  }
}

}  // namespace fastdiff
