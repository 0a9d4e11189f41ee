// Attention in float32.

#pragma once

#include "one_token.h"
#include "prompts.h"

namespace {

// Attention: query (batch, heads, tokens, size), key and value (batch, key heads, keys, size), heads that share keys
// side by side; used: (batch, 1, tokens, keys), which keys count; without it the last key is the last token's, and each
// token has the keys up to its own. A token without any has zeros. Returns (batch, tokens, heads, size).
Tensor attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& used, double scale) {
  const int64_t batch = query.size(0), heads = query.size(1), tokens = query.size(2);
  const int64_t keys = key.size(2), size = query.size(3);
  TORCH_CHECK(
      tokens <= keys && key.size(0) == batch && heads % key.size(1) == 0 && key.size(3) == size &&
          value.sizes() == key.sizes(),
      "attention of query ", query.sizes(), ", key ", key.sizes(), ", value ", value.sizes());
  const int64_t sizes[] = {batch, 1, tokens, keys};
  const auto of_each = used && used->sizes() != sizes ? used->expand(sizes) : used;
  const bool narrow = tokens == 1 && key.scalar_type() == at::kBFloat16;
  const auto read = [](const Tensor& x, at::ScalarType dtype) {
    const Tensor held = x.to(dtype);
    return held.stride(3) == 1 ? held : held.contiguous();
  };
  const Tensor q = read(query, at::kFloat), k = read(key, narrow ? at::kBFloat16 : at::kFloat);
  const Tensor v = read(value, k.scalar_type());
  Tensor y = at::empty({batch, tokens, heads, size}, q.options());
  float* to = y.mutable_data_ptr<float>();
  if (tokens > 1)
    attend_prompts(q, k, v, of_each, scale, to);
  else if (narrow)
    attend_one_token<at::BFloat16>(q.contiguous(), k, v, of_each, scale, to);
  else if (tokens == 1)
    attend_one_token<float>(q.contiguous(), k, v, of_each, scale, to);
  return y.to(query.scalar_type());
}

}  // namespace
