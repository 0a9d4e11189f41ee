// Products with weights of 8 and 4 bits: with what is stored, or with weights restored first, in float32 or in the dtype
// of the inputs, where a library's product is faster then.

#pragma once

#include "sums.h"

namespace {

#if defined(WIDER_THAN_256)
constexpr int64_t AS_STORED = 32;              // tokens up to which weights are not restored
constexpr int64_t AS_STORED_IN_BFLOAT16 = 16;  // and where inputs are in bfloat16
#elif defined(__AVX2__)
constexpr int64_t AS_STORED = INT64_MAX, AS_STORED_IN_BFLOAT16 = INT64_MAX;  // the products of sums.h are the fastest there
#else
constexpr int64_t AS_STORED = 128, AS_STORED_IN_BFLOAT16 = INT64_MAX;  // products in bfloat16 are slow there
#endif

// Calls `each(share, together)` in as many threads as pay for so many products of two numbers. share(n): of n things
// those of a thread, from the first number up to the second. After `together()` a thread sees what all have done.
template <typename Each>
void in_threads(int64_t products, Each each) {
#ifdef _OPENMP
  at::internal::lazy_init_num_threads();  // a thread of the caller's own has as many as torch's
#pragma omp parallel if (products > GRAIN)
  {
    const int64_t threads = std::min<int64_t>(omp_get_num_threads(), (products + GRAIN - 1) / GRAIN);
    const int64_t from = std::min<int64_t>(omp_get_thread_num(), threads), to = std::min(from + 1, threads);
    const auto together = [] {
#pragma omp barrier
    };
    each([=](int64_t n) { return std::pair(n * from / threads, n * to / threads); }, together);
  }
#else
  each([](int64_t n) { return std::pair<int64_t, int64_t>(0, n); }, [] {});
#endif
}

// y: (tokens, rows) = x W^T, or += where it is added onto what is there; x: (tokens, inputs)
void put_product(const float* x, int64_t tokens, const Stored& w, float* y, bool onto) {
  const Inputs in(x, tokens, w.inputs);
  in_threads(tokens * w.inputs * w.rows, [&](auto share, auto) {
    const auto [begin, end] = share(w.blocks());
    put_blocks(in, tokens, w, begin, end, y, onto);
  });
}

// The same for the sum of u[i](v[i](x)), weights: v[0], u[0], v[1] ... Threads share each `v`, then all `u`.
void put_products(const float* x, int64_t tokens, const std::vector<Stored>& weights, float* y, bool onto) {
  const size_t pairs = weights.size() / 2;
  const auto v = [&](size_t i) -> const Stored& { return weights[2 * i]; };
  const auto u = [&](size_t i) -> const Stored& { return weights[2 * i + 1]; };
  std::vector<std::unique_ptr<float[]>> z;
  int64_t bases = 0;
  for (size_t i = 0; i < pairs; ++i) {
    z.emplace_back(new float[tokens * v(i).rows]);
    bases += v(i).rows;
  }
  const Inputs in(x, tokens, v(0).inputs);
  const auto put_v = [&](auto share) {
    for (size_t i = 0; i < pairs; ++i) {
      const auto [begin, end] = share(v(i).blocks());
      put_blocks(in, tokens, v(i), begin, end, z[i].get(), false);
    }
  };
  const auto inputs_of_u = [&] {
    std::vector<Inputs> found;
    found.reserve(pairs);
    for (size_t i = 0; i < pairs; ++i) found.emplace_back(z[i].get(), tokens, v(i).rows);
    return found;
  };
  const auto put_u = [&](const std::vector<Inputs>& found, auto share) {
    const auto [begin, end] = share(u(0).blocks());
    for (size_t i = 0; i < pairs; ++i) put_blocks(found[i], tokens, u(i), begin, end, y, onto || i);
  };
  if (tokens <= FEW) {  // to start threads again takes longer than to round all z in each of them
    const int64_t products = tokens * bases * (v(0).inputs + u(0).rows);  // of two parts, as long as their mean
    in_threads(products / 2, [&](auto share, auto together) {
      put_v(share);
      together();
      put_u(inputs_of_u(), share);
    });
    return;
  }
  in_threads(tokens * bases * v(0).inputs, [&](auto share, auto) { put_v(share); });
  const std::vector<Inputs> found = inputs_of_u();
  in_threads(tokens * bases * u(0).rows, [&](auto share, auto) { put_u(found, share); });
}

// How many of so many tokens are multiplied at once. oneDNN, which multiplies in bfloat16, writes code for each shape, so
// that prompts of every length would each cost a hundred milliseconds and 50 MB: there they are of three sizes.
template <typename To>
int64_t tokens_at_once(int64_t tokens) {
  if (std::is_same_v<To, float>) return tokens;
  return tokens >= 1024 ? 1024 : tokens > 64 ? 128 : 64;
}

// `product` with weights restored in the dtype of x: (tokens, inputs); those of pairs are one v (all bases, inputs) and
// one u.
template <typename To>
Tensor product_of_many(const Tensor& x, const std::vector<Stored>& weights, const std::optional<Tensor>& bias) {
  const auto in_dtype = [&](std::initializer_list<int64_t> sizes) { return at::empty(sizes, x.options()); };
  const auto of = [](const Tensor& made) { return made.mutable_data_ptr<To>(); };
  std::vector<Tensor> factors;  // the one that is multiplied first comes first
  if (weights.size() == 1) {
    factors = {in_dtype({weights[0].rows, weights[0].inputs})};
    restore(weights[0], of(factors[0]), weights[0].inputs);
  } else {
    int64_t bases = 0, first = 0;
    for (size_t i = 0; i < weights.size(); i += 2) bases += weights[i].rows;
    factors = {in_dtype({bases, weights[0].inputs}), in_dtype({weights[1].rows, bases})};
    for (size_t i = 0; i < weights.size(); first += weights[i].rows, i += 2) {
      restore(weights[i], of(factors[0]) + first * weights[i].inputs, weights[i].inputs);
      restore(weights[i + 1], of(factors[1]) + first, bases);
    }
  }
  std::optional<Tensor> last;
  if (bias) last = bias->to(x.scalar_type());
  const int64_t tokens = x.size(0);
  Tensor y = in_dtype({tokens, weights.back().rows});
  for (int64_t start = 0; start < tokens;) {
    const int64_t size = tokens_at_once<To>(tokens - start), here = std::min(size, tokens - start);
    Tensor z = x.narrow(0, start, here);
    if (here < size) z = at::constant_pad_nd(z, {0, 0, 0, size - here});
    for (const Tensor& factor : factors)
      z = at::linear(z, factor, &factor == &factors.back() ? last : std::nullopt);
    y.narrow(0, start, here).copy_(z.narrow(0, 0, here));
    start += here;
  }
  return y;
}

// `x W^T + bias` of one weight, or `sum of u[i](v[i](x)) + bias` of pairs; x: (..., inputs).
// packed: holds what is Stored, one after the other: W, or v[0], u[0], v[1] ...; layout: at which byte the first begins,
// and (bits, rows, inputs) of each.
Tensor product(const Tensor& x, const Tensor& packed, at::IntArrayRef layout, const std::optional<Tensor>& bias) {
  std::vector<Stored> weights;
  weights.reserve(layout.size() / 3);
  for (size_t i = 1; i < layout.size(); i += 3) {
    const uint8_t* at = weights.empty() ? packed.const_data_ptr<uint8_t>() + layout[0] : weights.back().end();
    weights.emplace_back(at, layout[i], layout[i + 1], layout[i + 2]);
  }
  const int64_t tokens = x.numel() / x.size(-1), out = weights.back().rows;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out;
  if (tokens == 0) return at::empty(sizes, x.options());
  if (x.scalar_type() == at::kBFloat16 && tokens > AS_STORED_IN_BFLOAT16)
    return product_of_many<at::BFloat16>(x.reshape({tokens, -1}), weights, bias).view(sizes);
  const Tensor held = x.to(at::kFloat).contiguous();
  if (tokens > AS_STORED)
    return product_of_many<float>(held.view({tokens, -1}), weights, bias).view(sizes).to(x.scalar_type());
  Tensor y = at::empty(sizes, held.options());
  float* to = y.mutable_data_ptr<float>();
  if (bias) y.copy_(*bias);
  const float* in = held.const_data_ptr<float>();
  if (weights.size() == 1)
    put_product(in, tokens, weights[0], to, bias.has_value());
  else
    put_products(in, tokens, weights, to, bias.has_value());
  return y.to(x.scalar_type());
}

}  // namespace
