// The executor for any machine.
#include "lanes_scalar.h"
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

const Executor scalar_executor = {
    Plain::kName, step<Plain>, fill<Plain>, fill_channels_last<Plain>, sums<Plain>, magnitudes<Plain>,
    measure<Plain>,
    torch_normals<Plain>,
    pixels<Plain>, noised<Plain>, squares<Plain>,
    norm_sums<Plain>, norm_map<Plain>, norm_gradient_sums<Plain>, norm_gradient_map<Plain>,
    attend<Plain>, attend_backward<Plain>,
    winograd_into<Plain>, winograd_out<Plain>, winograd_spread<Plain>,
    winograd_weights<Plain>, winograd_weights_gradient<Plain>,
    panel_product<Plain>,
};

}  // namespace fastdiff::cpu
