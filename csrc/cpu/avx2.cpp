// The executor for AVX2, FMA and F16C (compiled with their flags).
#include "lanes_avx2.h"
#include "attention.h"
#include "measure_terms.h"
#include "noise.h"
#include "norm.h"
#include "norm_backward.h"
#include "products.h"
#include "step.h"
#include "sums.h"
#include "torch_normal.h"
#include "train_step.h"
#include "winograd.h"

namespace fastdiff::cpu {

void torch_normals_avx2(GeneratorBytes& bytes, float* z, int64_t n) { torch_normals<Avx2>(bytes, z, n); }

const Executor avx2_executor = {
    Avx2::kName, step<Avx2>, fill<Avx2>, fill_channels_last<Avx2>, sums<Avx2>, magnitudes<Avx2>,
    measure<Avx2>,
    torch_normals_avx2,
    pixels<Avx2>, noised<Avx2>, squares<Avx2>,
    norm_sums<Avx2>, norm_map<Avx2>, norm_gradient_sums<Avx2>, norm_gradient_map<Avx2>,
    attend<Avx2>, attend_backward<Avx2>,
    winograd_into<Avx2>, winograd_out<Avx2>, winograd_spread<Avx2>,
    winograd_weights<Avx2>, winograd_weights_gradient<Avx2>,
    panel_product<Avx2>,
};

}  // namespace fastdiff::cpu
