// The executor for AVX-512 F, BW, DQ, VL (compiled with their flags).
#include "lanes_avx512.h"
#include "attention.h"
#include "measure_terms.h"
#include "noise.h"
#include "norm.h"
#include "norm_backward.h"
#include "products.h"
#include "step.h"
#include "sums.h"
#include "train_step.h"
#include "winograd.h"

namespace fastdiff::cpu {

const Executor avx512_executor = {
    Avx512::kName, step<Avx512>, fill<Avx512>, fill_channels_last<Avx512>, sums<Avx512>, magnitudes<Avx512>,
    measure<Avx512>,
    torch_normals_avx2,
    pixels<Avx512>, noised<Avx512>, squares<Avx512>,
    norm_sums<Avx512>, norm_map<Avx512>, norm_gradient_sums<Avx512>, norm_gradient_map<Avx512>,
    attend<Avx512>, attend_backward<Avx512>,
    winograd_into<Avx512>, winograd_out<Avx512>, winograd_spread<Avx512>,
    winograd_weights<Avx512>, winograd_weights_gradient<Avx512>,
    panel_product<Avx512>,
};

}  // namespace fastdiff::cpu
