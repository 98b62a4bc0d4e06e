// Which instruction set the CPU ops run on: the best of this machine, decided at the first call.
#include <atomic>

#include "../export.h"
#include "executor.h"

namespace fastdiff::cpu {
namespace {

const Executor* const kExecutors[] = {
    &scalar_executor,
#if defined(__x86_64__)
    &avx2_executor,
    &avx512_executor,
#endif
};

int best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // F16C came before AVX2 on every machine, and older compilers do not know its name here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 2 : avx2 ? 1 : 0;
#else
  return 0;
#endif
}

std::atomic<int> chosen_isa{-1};

int isa() {
  int current = chosen_isa.load(std::memory_order_relaxed);
  if (current < 0) {
    current = best_isa();
    chosen_isa.store(current, std::memory_order_relaxed);
  }
  return current;
}

}  // namespace

const Executor& executor() { return *kExecutors[isa()]; }

}  // namespace fastdiff::cpu

using namespace fastdiff;

// 0 scalar, 1 AVX2, 2 AVX-512: use it if this machine has it (for tests). -1: as it stands. Returns what is in use.
FASTDIFF_EXPORT int fastdiff_cpu_isa(int wanted) {
  if (wanted >= 0 && wanted <= cpu::best_isa()) cpu::chosen_isa.store(wanted, std::memory_order_relaxed);
  return cpu::isa();
}

FASTDIFF_EXPORT const char* fastdiff_cpu_isa_name(int which) {
  constexpr int count = sizeof cpu::kExecutors / sizeof *cpu::kExecutors;
  return which >= 0 && which < count ? cpu::kExecutors[which]->name : "";
}
