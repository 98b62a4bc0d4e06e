// Draws from the bytes of a torch generator.
#include "../check.h"
#include "../export.h"
#include "executor.h"

#include <cstring>

using namespace fastdiff;

// n >= 16 normals into out, as torch's normal_ fills contiguous floats; after receives the state as torch leaves it, and
// may be state. out null: only that.
FASTDIFF_EXPORT int fastdiff_torch_normal(const GeneratorBytes* state, int64_t size, int64_t n, float* out,
                                          GeneratorBytes* after) {
  if (!state || !after) return kNullPointer;
  if (n < kGroup || size != sizeof(GeneratorBytes)) return kBadShape;
  // a generator that was just seeded has one word left, of a turn that never was
  const int64_t left = state->left, next = static_cast<int64_t>(state->next);
  if (left != 1 && (left < 1 || next < 1 || left + next != kWords + 1)) return kBadShape;
  std::memmove(after, state, sizeof *after);
  cpu::executor().torch_normals(*after, out, n);
  return kOk;
}

// Whether a generator is in the same state as before.
FASTDIFF_EXPORT int fastdiff_torch_generator_unmoved(const GeneratorBytes* before, const GeneratorBytes* now) {
  return std::memcmp(before, now, sizeof *now) == 0;
}
