// Eight numbers at once.

#pragma once

#include "common.h"

namespace {

// Eight numbers, with the arithmetic of GCC and Clang for vectors.
typedef float Eight __attribute__((vector_size(32)));

Eight eight(const float* from) {
  Eight x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

Eight eight(const at::BFloat16* from) {
  typedef uint16_t Upper __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(32)));
  Upper upper;
  std::memcpy(&upper, from, sizeof(upper));
  return (Eight)(__builtin_convertvector(upper, Bits) << 16);
}

float sum_of(Eight x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

// e to the power of x, for x up to 0, within 2 units in the last place.
Eight exponential(Eight x) {
  const Eight least = Eight{} - 87.0f, bounded = x < least ? least : x;
  const Eight integer = Eight{} + 12582912.0f, whole = bounded * 1.44269504f + integer - integer;  // to the nearest
  const Eight r = bounded - whole * 0.693145752f - whole * 1.42860677e-6f;                         // ln 2 in two parts
  Eight e = r * 1.98412698e-4f + 1.38888889e-3f;
  for (const float next : {8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f}) e = e * r + next;
  typedef int32_t Bits __attribute__((vector_size(32)));
  return e * (Eight)((__builtin_convertvector(whole, Bits) + 127) << 23);
}

}  // namespace
