// The executor for AVX2, FMA and F16C (compiled with their flags).
#include "lanes_avx2.h"
#include "noise.h"
#include "step.h"
#include "sums.h"
#include "train_step.h"

namespace fastdiff::cpu {

const Executor avx2_executor = {
    Avx2::kName, step<Avx2>, fill<Avx2>, fill_channels_last<Avx2>, sums<Avx2>, magnitudes<Avx2>,
    pixels<Avx2>, noised<Avx2>, squares<Avx2>,
};

}  // namespace fastdiff::cpu
