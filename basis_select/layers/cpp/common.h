#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

constexpr int64_t GROUP = 32;       // weights of few bits that share a scale
constexpr int64_t GRAIN = 1 << 16;  // products of two numbers below which a second thread does not pay

}  // namespace
