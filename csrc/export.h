// What the shared object shows to the outside: C functions, called through ctypes, and Python's (cpu/python.cpp).
#pragma once

#include "affine.h"
#include "norm.h"
#include "train.h"

#define FASTDIFF_EXPORT extern "C" __attribute__((visibility("default")))

FASTDIFF_EXPORT int fastdiff_affine_step_cpu(const AffineArgs* args);
FASTDIFF_EXPORT int fastdiff_affine_step_apart_cpu(const AffineArgs* args, int32_t i, const void* model_out,
                                                   const float* x, float* next, void* model_in, float* denoised);
FASTDIFF_EXPORT int fastdiff_norm_cpu(const NormArgs* args);
FASTDIFF_EXPORT int fastdiff_noise_images_cpu(const TrainArgs* args);
FASTDIFF_EXPORT int fastdiff_loss_cpu(const TrainArgs* args);
