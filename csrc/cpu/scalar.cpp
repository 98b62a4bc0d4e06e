// The executor for any machine.
#include "lanes_scalar.h"
#include "noise.h"
#include "step.h"
#include "sums.h"
#include "train_step.h"

namespace fastdiff::cpu {

const Executor scalar_executor = {
    Plain::kName, step<Plain>, fill<Plain>, fill_channels_last<Plain>, sums<Plain>, magnitudes<Plain>,
    pixels<Plain>, noised<Plain>, squares<Plain>,
};

}  // namespace fastdiff::cpu
