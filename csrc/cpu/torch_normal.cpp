// Draws from the bytes of a torch generator.
#include "../check.h"
#include "../export.h"
#include "executor.h"

using namespace fastdiff;

// n >= 16 normals into out, as torch's normal_ fills contiguous floats; state is moved on as torch moves it. out null:
// only that.
FASTDIFF_EXPORT int fastdiff_torch_normal(GeneratorBytes* state, int64_t size, int64_t n, float* out) {
  if (!state) return kNullPointer;
  if (n < kGroup || size != sizeof(GeneratorBytes)) return kBadShape;
  // a generator that was just seeded has one word left, of a turn that never was
  const int64_t left = state->left, next = static_cast<int64_t>(state->next);
  if (left != 1 && (left < 1 || next < 1 || left + next != kWords + 1)) return kBadShape;
  cpu::executor().torch_normals(*state, out, n);
  return kOk;
}
