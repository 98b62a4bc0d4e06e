// Keeps an allocation that fails from ending the process, as an exception does that leaves a C function.
#pragma once

#include <exception>

#include "../affine.h"

namespace fastdiff::cpu {
namespace {

// op(), or the error of a buffer that cannot be had: bad_alloc, or length_error for more than there can be. Nothing else
// throws here.
template <class Op>
Error guarded(const Op& op) {
  try {
    return op();
  } catch (const std::exception&) {
    return kOutOfMemory;
  }
}

// What a C function returns: op(*args), or why not.
template <class Op, class Args>
int answer(const Op& op, const Args* args) {
  return args ? guarded([&] { return op(*args); }) : kNullPointer;
}

}  // namespace
}  // namespace fastdiff::cpu
