// Products with weights of 8 and 4 bits: of few tokens with what is stored. Of many tokens the weights are restored
// first, in float32, or in the dtype of the inputs where a processor is wide enough: from there on a library's product is
// faster.

#pragma once

#include "groups.h"

namespace {

// A weight (rows, inputs) of so many bits, as it lies in memory: its scales, then its whole numbers.
struct Stored {
  int64_t bits, rows, inputs;
  const uint8_t *scales, *q;

  Stored(const uint8_t* at, int64_t bits, int64_t rows, int64_t inputs)
      : bits(bits), rows(rows), inputs(inputs), scales(at) {
    q = at + aligned(bits == 8 ? rows * sizeof(float) : blocks() * groups_of(inputs) * ROWS * sizeof(uint16_t));
  }
  static int64_t aligned(int64_t bytes) { return (bytes + ALIGNED - 1) / ALIGNED * ALIGNED; }
  int64_t blocks() const { return (rows + ROWS - 1) / ROWS; }
  const uint8_t* end() const {
    return q + aligned(bits == 8 ? rows * inputs : blocks() * groups_of(inputs) * BYTES);
  }
  // Of 8 bits, one for a row.
  const float* scale() const { return (const float*)scales; }
  // Of a block of 4 bits, ROWS for each group.
  const uint16_t* scale(int64_t block) const {
    return (const uint16_t*)scales + block * groups_of(inputs) * ROWS;
  }
  const uint8_t* block(int64_t i) const { return q + i * groups_of(inputs) * BYTES; }
};

// y: (tokens, rows) += x W^T for a row of 8 bits and T tokens from `first` on. A last group goes on into the next row,
// where its inputs are zeros; EDGE: it may go beyond the last row.
template <int T, bool EDGE>
void add_row(const Inputs& x, int64_t first, const Stored& w, int64_t row, float* y) {
  const int64_t groups = x.groups;
  const int8_t *q = (const int8_t*)w.q + row * w.inputs, *end = (const int8_t*)w.q + w.rows * w.inputs;
  const int16_t* numbers = x.numbers.data() + first * groups * GROUP;
  const float* scales = x.scales.data() + first * groups;
  Sum sum[T];
  for (int64_t g = 0; g < groups; ++g) {
    const int8_t* from = q + g * GROUP;
    int8_t last[GROUP];
    if (EDGE && from + GROUP > end) {
      std::memset(last, 0, GROUP);
      std::memcpy(last, from, end - from);
      from = last;
    }
    __builtin_prefetch(q + g * GROUP + AHEAD);
    const Weights of(from);
    for (int t = 0; t < T; ++t) sum[t].add(of, numbers + (t * groups + g) * GROUP, scales[t * groups + g]);
  }
  for (int t = 0; t < T; ++t) y[(first + t) * w.rows + row] += sum[t].total() * w.scale()[row];
}

// The same for a block of rows of 4 bits.
template <int T>
void add_block(const Inputs& x, int64_t first, const Stored& w, int64_t block, float* y) {
  const int64_t groups = x.groups, row = block * ROWS;
  const uint8_t* q = w.block(block);
  const uint16_t* own = w.scale(block);
  const int64_t of_first = first * groups;
  Sums sums[T];
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < BYTES; i += ALIGNED) __builtin_prefetch(q + g * BYTES + i + AHEAD);
    const Products<T> found(
        q + g * BYTES, x.numbers.data() + (of_first + g) * GROUP, groups * GROUP,
        x.eights.data() + of_first + g, groups);
    for (int t = 0; t < T; ++t) sums[t].add(found.of[t], own + g * ROWS, x.scales[of_first + t * groups + g]);
  }
  for (int t = 0; t < T; ++t) {
    float* to = y + (first + t) * w.rows + row;
    if (row + ROWS <= w.rows) {
      sums[t].add_to(to);
      continue;
    }
    float each[ROWS] = {};
    sums[t].add_to(each);
    for (int64_t r = 0; r < w.rows - row; ++r) to[r] += each[r];
  }
}

// The same for blocks of ROWS rows of either, from `begin` up to `end`.
template <int T>
void add_tokens(const Inputs& x, int64_t first, const Stored& w, int64_t begin, int64_t end, float* y) {
  if (w.bits == 4) {
    for (int64_t b = begin; b < end; ++b) add_block<T>(x, first, w, b, y);
    return;
  }
  const int64_t beyond = x.groups * GROUP - w.inputs, last = std::min(end * ROWS, w.rows);
  const int64_t inside = w.rows - (beyond + w.inputs - 1) / w.inputs;  // rows whose last group does not go beyond all
  for (int64_t r = begin * ROWS; r < std::min(last, inside); ++r) add_row<T, false>(x, first, w, r, y);
  for (int64_t r = std::max(begin * ROWS, inside); r < last; ++r) add_row<T, true>(x, first, w, r, y);
}

// The same for all tokens.
void add_blocks(const Inputs& x, int64_t tokens, const Stored& w, int64_t begin, int64_t end, float* y) {
  const int64_t cached = std::max<int64_t>(1, AT_ONCE / (x.groups * GROUP * ROWS));
  for (; begin < end; begin += cached) {
    const int64_t last = std::min(end, begin + cached);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) add_tokens<4>(x, t, w, begin, last, y);
    for (; t + 2 <= tokens; t += 2) add_tokens<2>(x, t, w, begin, last, y);
    for (; t < tokens; ++t) add_tokens<1>(x, t, w, begin, last, y);
  }
}

// Calls `each(begin, end)` for parts of so many blocks of rows with `inputs` each, in all threads if that pays.
template <typename Each>
void for_blocks(int64_t blocks, int64_t inputs, int64_t tokens, Each each) {
  at::parallel_for(0, blocks, std::max<int64_t>(1, GRAIN / (inputs * ROWS * tokens)), each);
}

// y: (tokens, rows) += x W^T, x: (tokens, inputs)
void add_product(const float* x, int64_t tokens, const Stored& w, float* y) {
  const Inputs in(x, tokens, w.inputs);
  for_blocks(w.blocks(), w.inputs, tokens, [&](int64_t begin, int64_t end) {
    add_blocks(in, tokens, w, begin, end, y);
  });
}

// y: (tokens, rows) += sum of u[i](v[i](x)), weights: v[0], u[0], v[1] ... Threads share all `v`, then all `u`.
void add_products(const float* x, int64_t tokens, const std::vector<Stored>& weights, float* y) {
  const size_t pairs = weights.size() / 2;
  const auto v = [&](size_t i) -> const Stored& { return weights[2 * i]; };
  const auto u = [&](size_t i) -> const Stored& { return weights[2 * i + 1]; };
  std::vector<std::vector<float>> z;
  int64_t blocks = 0, bases = 0;
  for (size_t i = 0; i < pairs; ++i) {
    z.emplace_back(tokens * v(i).rows);
    blocks += v(i).blocks();
    bases += v(i).rows;
  }
  const Inputs in(x, tokens, v(0).inputs);
  for_blocks(blocks, v(0).inputs, tokens, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < pairs; begin -= v(i).blocks(), end -= v(i).blocks(), ++i)
      add_blocks(in, tokens, v(i), std::max<int64_t>(begin, 0), std::min(end, v(i).blocks()), z[i].data());
  });
  std::vector<Inputs> found;
  for (size_t i = 0; i < pairs; ++i) found.emplace_back(z[i].data(), tokens, v(i).rows);
  for_blocks(u(0).blocks(), bases, tokens, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < pairs; ++i) add_blocks(found[i], tokens, u(i), begin, end, y);
  });
}

// The weight (rows, inputs), its rows `stride` numbers apart.
template <typename Q, typename To>
void restore(const Stored& w, To* to, int64_t stride) {
  constexpr bool WIDE = std::is_same_v<Q, int8_t>;
  const int64_t groups = groups_of(w.inputs), whole = w.inputs / GROUP;
  at::parallel_for(0, w.rows, std::max<int64_t>(1, GRAIN / w.inputs), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      To* row = to + r * stride;
      for (int64_t g = 0; g < groups; ++g) {
        const Q* from = (const Q*)(WIDE ? w.q + r * w.inputs + g * GROUP : w.block(r / ROWS) + g * BYTES);
        const float by = WIDE ? w.scale()[r] : float_of(w.scale(r / ROWS)[g * ROWS + r % ROWS]);
        if (g < whole) {
          restore_group(from, r % ROWS, by, row + g * GROUP);
          continue;
        }
        Q last[BYTES] = {};
        To found[GROUP];
        std::memcpy(last, from, WIDE ? w.inputs - whole * GROUP : sizeof(last));
        restore_group(last, r % ROWS, by, found);
        std::memcpy(row + whole * GROUP, found, (w.inputs - whole * GROUP) * sizeof(To));
      }
    }
  });
}

template <typename To>
void restore(const Stored& w, To* to, int64_t stride) {
  w.bits == 8 ? restore<int8_t>(w, to, stride) : restore<uint8_t>(w, to, stride);
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
// packed: what is Stored, one after the other: W, or v[0], u[0], v[1] ...; layout: (bits, rows, inputs) of each.
Tensor product(const Tensor& x, const Tensor& packed, at::IntArrayRef layout, const std::optional<Tensor>& bias) {
  std::vector<Stored> weights;
  for (size_t i = 0; i < layout.size(); i += 3) {
    const uint8_t* at = weights.empty() ? packed.const_data_ptr<uint8_t>() : weights.back().end();
    weights.emplace_back(at, layout[i], layout[i + 1], layout[i + 2]);
  }
  const int64_t tokens = x.numel() / x.size(-1), out = weights.back().rows;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = out;
  if (tokens == 0) return at::empty(sizes, x.options());
  if (x.scalar_type() == at::kBFloat16 && tokens > FEW_IN_BFLOAT16)
    return product_of_many<at::BFloat16>(x.reshape({tokens, -1}), weights, bias).view(sizes);
  const Tensor held = x.to(at::kFloat).contiguous();
  if (tokens > FEW)
    return product_of_many<float>(held.view({tokens, -1}), weights, bias).view(sizes).to(x.scalar_type());
  Tensor y = at::empty(sizes, held.options());
  float* to = y.mutable_data_ptr<float>();
  if (bias)
    y.copy_(*bias);
  else
    std::fill_n(to, tokens * out, 0.0f);
  const float* in = held.const_data_ptr<float>();
  if (weights.size() == 1)
    add_product(in, tokens, weights[0], to);
  else
    add_products(in, tokens, weights, to);
  return y.to(x.scalar_type());
}

}  // namespace
