// What the shared object shows to the outside: C functions, called through ctypes.
#pragma once

#include "affine.h"

#define FASTDIFF_EXPORT extern "C" __attribute__((visibility("default")))
