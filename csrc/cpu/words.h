// Philox words of one noise, many consecutive counters of which only the lowest word varies.
// On AVX2 a round of eight counters is 14 vector instructions (16 as philox.h writes it), 6 in the first two.
#pragma once

#include "../philox.h"

namespace fastdiff::cpu {
namespace {

// What the rounds exclusive-or to their products, each cell for two words. The high half goes to the word that is made
// in this round, and holds its round key; the low half to the word that this product leaves for the round after the
// next, and holds the key of the next round, which then needs none of its own.
// Round 0 multiplies constants (id), round 1 too (what came of them): those products are part of the cells.
struct WordKeys {
  uint64_t cell[kPhiloxRounds];

  WordKeys(const PhiloxSchedule& key, uint32_t id, uint32_t stream, uint32_t counter_high) {
    const auto low = [](uint64_t v) { return v & 0xffffffffu; };
    const uint64_t of_id = uint64_t{id} * kPhiloxM1;
    const uint64_t of_word = low((of_id >> 32) ^ counter_high ^ key.first(0)) * kPhiloxM0;
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const int next = round + 1;
      const bool second = round % 2 == 0;
      const uint64_t now = second ? key.second(round) : key.first(round);
      const uint64_t then = next == kPhiloxRounds ? 0 : second ? key.second(next) : key.first(next);
      cell[round] = now << 32 | then;
    }
    cell[0] ^= uint64_t{stream} << 32 | of_word >> 32;
    cell[1] ^= low(of_id) << 32;
    cell[2] ^= low(of_word) << 32;
  }
};

// The four words of n registers of counters, from the first product of each: its low word times kPhiloxM0.
template <class L, int n>
FASTDIFF_INLINE void words_of(const typename L::U (&product)[n], const WordKeys& keys, typename L::I (&words)[n][4]) {
  using U = typename L::U;
  U a[n], b[n], c[n], d[n];
  const auto cell = [&](int round) __attribute__((always_inline)) { return L::cells(keys.cell[round]); };
  for (int i = 0; i < n; ++i) {
    const U second = L::xor2(product[i], cell(0));
    const U first = L::xor2(L::multiply(L::high(second), kPhiloxM1), cell(1));
    a[i] = L::high(first);
    b[i] = first;
    c[i] = second;
  }
  for (int i = 0; i < n; ++i) {
    const U first = L::multiply(c[i], kPhiloxM1), second = L::xor2(L::multiply(a[i], kPhiloxM0), cell(2));
    a[i] = L::xor2(L::high(first), b[i]);
    b[i] = first;
    c[i] = L::high(second);
    d[i] = second;
  }
#pragma GCC unroll 10
  for (int round = 3; round < kPhiloxRounds - 1; ++round) {
    for (int i = 0; i < n; ++i) {
      U first = L::multiply(c[i], kPhiloxM1), second = L::multiply(a[i], kPhiloxM0);
      if (round % 2) {
        first = L::xor2(first, cell(round));
      } else {
        second = L::xor2(second, cell(round));
      }
      a[i] = L::xor2(L::high(first), b[i]);
      b[i] = first;
      c[i] = L::xor2(L::high(second), d[i]);
      d[i] = second;
    }
  }
  for (int i = 0; i < n; ++i) {
    const U first = L::multiply(c[i], kPhiloxM1), second = L::multiply(a[i], kPhiloxM0);
    const auto key = L::iset(static_cast<int32_t>(keys.cell[kPhiloxRounds - 1] >> 32));
    words[i][0] = L::bit_xor(L::bit_xor(L::high_words(first), L::words(b[i])), key);
    words[i][1] = L::words(first);
    words[i][2] = L::bit_xor(L::high_words(second), L::words(d[i]));
    words[i][3] = L::words(second);
  }
}

}  // namespace
}  // namespace fastdiff::cpu
