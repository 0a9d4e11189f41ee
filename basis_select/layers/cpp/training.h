// The rounding of weights that train, and its gradients: straight_through.py.

#pragma once

#include "common.h"

namespace {

// Calls `each(start, size, i)` for every group of weights (rows, inputs), where `i` is its scale; scale: (rows, groups).
template <typename Each>
void for_groups(const Tensor& weight, const Tensor& scale, Each each) {
  const int64_t rows = weight.size(0), inputs = weight.size(1), groups = scale.size(1);
  const int64_t width = groups == 1 ? inputs : GROUP;
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / inputs), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t g = 0; g < groups; ++g)
        each(r * inputs + g * width, std::min(width, inputs - g * width), r * groups + g);
  });
}

// The range of the whole numbers.
struct Range {
  float lowest, highest;
  float whole(float x) const { return std::min(std::max(std::nearbyint(x), lowest), highest); }
  bool has(float x) const { return x >= lowest && x <= highest; }
};

// weight: (rows, inputs) rounded to whole numbers times `scale`: (rows, groups), all float32.
template <typename To>
void round_to(const Tensor& weight, const Tensor& scale, Range range, Tensor& made) {
  const float *w = weight.const_data_ptr<float>(), *s = scale.const_data_ptr<float>();
  To* to = made.mutable_data_ptr<To>();
  for_groups(weight, scale, [=](int64_t start, int64_t size, int64_t g) {
    for (int64_t i = start; i < start + size; ++i) to[i] = static_cast<To>(range.whole(w[i] / s[g]) * s[g]);
  });
}

Tensor rounded_weight(const Tensor& weight, const Tensor& scale, double lowest, double highest, bool in_bfloat16) {
  const Range range{static_cast<float>(lowest), static_cast<float>(highest)};
  Tensor made = at::empty(weight.sizes(), in_bfloat16 ? at::kBFloat16 : at::kFloat);
  in_bfloat16 ? round_to<at::BFloat16>(weight, scale, range, made) : round_to<float>(weight, scale, range, made);
  return made;
}

// Of a group: the gradients of its weights, and returns that of its scale.
template <typename From>
float group_gradients(const float* w, const From* grad, float by, Range range, float* to, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    const float x = w[i] / by, g = static_cast<float>(grad[i]);
    const bool inside = range.has(x);
    to[i] = inside ? g : 0.0f;
    sum += (range.whole(x) - (inside ? x : 0.0f)) * g;
  }
  return sum;
}

// Gradients of the weight, as if there were no rounding, none beyond the range, and of the scales (LSQ).
std::tuple<Tensor, Tensor> rounded_weight_backward(
    const Tensor& weight, const Tensor& scale, const Tensor& grad, double lowest, double highest) {
  const Range range{static_cast<float>(lowest), static_cast<float>(highest)};
  Tensor of_weight = at::empty_like(weight), of_scale = at::empty_like(scale);
  const float *w = weight.const_data_ptr<float>(), *s = scale.const_data_ptr<float>();
  float *to = of_weight.mutable_data_ptr<float>(), *sums = of_scale.mutable_data_ptr<float>();
  const auto from = [&](const auto* g) {
    for_groups(weight, scale, [=](int64_t start, int64_t size, int64_t i) {
      sums[i] = group_gradients(w + start, g + start, s[i], range, to + start, size);
    });
  };
  if (grad.scalar_type() == at::kBFloat16)
    from(grad.const_data_ptr<at::BFloat16>());
  else
    from(grad.const_data_ptr<float>());
  return {of_weight, of_scale};
}

}  // namespace
