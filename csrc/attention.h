// Softmax attention of every token to every token of its sample, and its gradient: the argument block every executor
// sees. Torch-free. See fastdiff/engine/attention.py for the equation.
#pragma once

#include <cstdint>

extern "C" {

// Mirrored by fastdiff/engine/native_blocks.py; fastdiff_attention_args_size() lets native.py compare the two.
struct AttentionArgs {
  const float* q;        // [B, T, H, d], as k, v, grad, dq, dk, dv
  const float* k;
  const float* v;
  float* out;            // [B, T, H, d]: written forward, read backward
  float* stats;          // [B, H, T, 2]: largest q k, 1 / sum of the exponentials; written forward, read backward
  const float* grad;     // of out; null: forward
  float* dq;
  float* dk;
  float* dv;
  int64_t B, T, H, d;
  float scale;
  int32_t reserved;
};
}
