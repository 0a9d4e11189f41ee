// Products of few tokens with weights of 8 and 4 bits, read as they are stored; attention of one token; the rounding of
// weights that train. What the bits stand for: rounding.py.
//
// Inputs become whole numbers of 16 bits with one scale for every GROUP of them, which is 100 times as precise as
// bfloat16; products of whole numbers are summed exactly within a group, groups in float32. Of many tokens the
// weights are restored first, in float32, or in the dtype of the inputs where a processor is wide enough: from there on
// a library's product is faster.
//
// Weights of 8 bits lie row after row. Those of 4 bits lie in blocks of ROWS rows, filled up with zeros, a row in each
// lane of a vector: a block is its groups, a group four vectors of eight inputs. Of inputs 2i and 2i + 1 of these the
// whole numbers, with 8 added, are bits 4i to 4i + 3 and 4i + 16 to 4i + 19 of a lane.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

constexpr int64_t GROUP = 32;                // inputs that share a scale at 4 bits
constexpr int64_t ROWS = 8;                  // of a block at 4 bits
constexpr int64_t BYTES = GROUP * ROWS / 2;  // of a group of a block
constexpr int64_t ALIGNED = 64;              // bytes of which everything begins at a multiple
#ifdef WIDER_THAN_256
constexpr int64_t FEW = 32;                  // tokens up to which weights are not restored
constexpr int64_t FEW_IN_BFLOAT16 = 16;      // and where inputs are in bfloat16
#else
constexpr int64_t FEW = 128, FEW_IN_BFLOAT16 = INT64_MAX;  // products in bfloat16 are slow there
#endif
constexpr int64_t AHEAD = 2048;              // bytes from where weights are read to where memory is asked for more
constexpr int64_t AT_ONCE = 1 << 16;         // weights that stay in the cache for all tokens
constexpr int64_t GRAIN = 1 << 16;           // products of two numbers below which a second thread does not pay

int64_t groups_of(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }

// Of its upper half.
float float_of(uint16_t upper) {
  const uint32_t bits = (uint32_t)upper << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

#ifdef __AVX2__

// The weights of a group of 8 bits as whole numbers of 16.
struct Weights {
  __m256i w[2];
  explicit Weights(const int8_t* from)
      : w{_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from)),
          _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(from + 16)))} {}
};

// The sum of products of a row, in eight parts.
struct Sum {
  __m256 parts = _mm256_setzero_ps();
  void add(const Weights& of, const int16_t* x, float scale) {
    const __m256i a = _mm256_madd_epi16(of.w[0], _mm256_loadu_si256((const __m256i*)x));
    const __m256i b = _mm256_madd_epi16(of.w[1], _mm256_loadu_si256((const __m256i*)(x + 16)));
    parts = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(a, b)), _mm256_set1_ps(scale), parts);
  }
  float total() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(parts), _mm256_extractf128_ps(parts, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

// The sums of products of a block, a row in each lane.
struct Sums {
  __m256 rows = _mm256_setzero_ps();
  // whole: of a group; scale: (ROWS,), the upper halves of float32; by: of the inputs
  void add(__m256i whole, const uint16_t* scale, float by) {
    const __m256i upper = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)scale));
    const __m256 each = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(upper, 16)), _mm256_set1_ps(by));
    rows = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), each, rows);
  }
  void add_to(float* y) const { _mm256_storeu_ps(y, _mm256_add_ps(rows, _mm256_loadu_ps(y))); }
};

// A group of a block times a group of inputs of T tokens, `apart` numbers from each other; eights: (T,), what the
// 8 that were added to weights have to take away, `groups` numbers from each other.
template <int T>
struct Products {
  __m256i of[T];
  Products(const uint8_t* q, const int16_t* x, int64_t apart, const int32_t* eights, int64_t groups) {
    for (int t = 0; t < T; ++t) of[t] = _mm256_set1_epi32(eights[t * groups]);
    const __m256i last = _mm256_set1_epi16(15);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i eight = _mm256_loadu_si256((const __m256i*)(q + 32 * v));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i moved = _mm256_srli_epi16(eight, 4 * i), pairs = i < 3 ? _mm256_and_si256(moved, last) : moved;
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          int32_t pair;
          std::memcpy(&pair, x + t * apart + 8 * v + 2 * i, sizeof(pair));
          of[t] = _mm256_add_epi32(of[t], _mm256_madd_epi16(pairs, _mm256_set1_epi32(pair)));
        }
      }
    }
  }
};

// The upper halves of numbers in float32, to the nearest; none of them is infinite or no number.
__m256i upper_halves(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff))), 16);
}

// The whole numbers of a group in order, of 8 bits, and of a row of a block.
void numbers_of(const int8_t* from, int64_t, __m128i* whole) {
  for (int i = 0; i < 2; ++i) whole[i] = _mm_loadu_si128((const __m128i*)(from + 16 * i));
}

void numbers_of(const uint8_t* from, int64_t row, __m128i* whole) {
  int32_t words[4];
  for (int v = 0; v < 4; ++v) std::memcpy(&words[v], from + 32 * v + 4 * row, sizeof(int32_t));
  const __m128i all = _mm_loadu_si128((const __m128i*)words), last = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
  const __m128i low = _mm_and_si128(all, last), high = _mm_and_si128(_mm_srli_epi16(all, 4), last);
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  whole[0] = _mm_sub_epi8(_mm_shuffle_epi8(_mm_unpacklo_epi8(low, high), order), eight);
  whole[1] = _mm_sub_epi8(_mm_shuffle_epi8(_mm_unpackhi_epi8(low, high), order), eight);
}

// The weights of a group in order, times `by`.
template <typename Q, typename To>
void restore_group(const Q* from, int64_t row, float by, To* to) {
  __m128i whole[2];
  numbers_of(from, row, whole);
  for (int i = 0; i < 2; ++i) {
    const __m256 scale = _mm256_set1_ps(by);
    const __m256 a = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(whole[i])), scale);
    const __m256 b = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(whole[i], 8))), scale);
    if constexpr (std::is_same_v<To, float>) {
      _mm256_storeu_ps(to + 16 * i, a);
      _mm256_storeu_ps(to + 16 * i + 8, b);
    } else {
      const __m256i pairs = _mm256_packus_epi32(upper_halves(a), upper_halves(b));
      _mm256_storeu_si256((__m256i*)(to + 16 * i), _mm256_permute4x64_epi64(pairs, 0b11011000));
    }
  }
}

// A group of inputs as whole numbers; returns their scale, which is no number where one of them is none.
float rounded(const float* x, int16_t* to) {
  __m256 v[4], largest = _mm256_setzero_ps(), unknown = _mm256_setzero_ps();
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_loadu_ps(x + 8 * i);
    largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v[i]));
    unknown = _mm256_or_ps(unknown, _mm256_cmp_ps(v[i], v[i], _CMP_UNORD_Q));
  }
  const bool is_number = _mm256_testz_ps(unknown, unknown);
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  const float whole = std::max(_mm_cvtss_f32(most), _mm_cvtss_f32(_mm_movehdup_ps(most)));
  const __m256 by = _mm256_set1_ps(whole > 0 ? 32767 / whole : 0);
  for (int i = 0; i < 2; ++i) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(v[2 * i], by));
    const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(v[2 * i + 1], by));
    const __m256i sorted = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0b11011000);
    _mm256_storeu_si256((__m256i*)(to + 16 * i), sorted);
  }
  return is_number ? whole / 32767 : NAN;
}

#else

struct Weights {
  int16_t w[GROUP];
  explicit Weights(const int8_t* from) { std::copy(from, from + GROUP, w); }
};

struct Sum {
  float whole = 0;
  void add(const Weights& of, const int16_t* x, float scale) {
    int32_t sum = 0;
    for (int i = 0; i < GROUP; ++i) sum += of.w[i] * x[i];
    whole += sum * scale;
  }
  float total() const { return whole; }
};

int number_of(const int8_t* from, int64_t, int64_t i) { return from[i]; }

int number_of(const uint8_t* from, int64_t row, int64_t i) {
  uint32_t word;
  std::memcpy(&word, from + i / 8 * 32 + 4 * row, sizeof(word));
  return (int)(word >> (i % 8 / 2 * 4 + i % 2 * 16) & 15) - 8;
}

struct Sums {
  float rows[ROWS] = {};
  void add(const int32_t* whole, const uint16_t* scale, float by) {
    for (int r = 0; r < ROWS; ++r) rows[r] += whole[r] * (float_of(scale[r]) * by);
  }
  void add_to(float* y) const {
    for (int r = 0; r < ROWS; ++r) y[r] += rows[r];
  }
};

template <int T>
struct Products {
  int32_t of[T][ROWS];
  Products(const uint8_t* q, const int16_t* x, int64_t apart, const int32_t*, int64_t) {
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < ROWS; ++r) {
        of[t][r] = 0;
        for (int i = 0; i < GROUP; ++i) of[t][r] += number_of(q, r, i) * x[t * apart + i];
      }
  }
};

template <typename Q, typename To>
void restore_group(const Q* from, int64_t row, float by, To* to) {
  for (int i = 0; i < GROUP; ++i) to[i] = static_cast<To>(number_of(from, row, i) * by);
}

float rounded(const float* x, int16_t* to) {
  float whole = 0;
  bool is_number = true;
  for (int i = 0; i < GROUP; ++i) {
    whole = std::max(whole, std::abs(x[i]));
    is_number = is_number && !std::isnan(x[i]);
  }
  const float by = whole > 0 ? 32767 / whole : 0;
  for (int i = 0; i < GROUP; ++i) to[i] = std::isfinite(x[i] * by) ? (int16_t)std::nearbyint(x[i] * by) : 1;
  return is_number ? whole / 32767 : NAN;
}

#endif

// Tokens of which every group is whole numbers times a scale, the last group filled up with zeros.
struct Inputs {
  int64_t groups;
  std::vector<int16_t> numbers;
  std::vector<float> scales;
  std::vector<int32_t> eights;  // of each group its sum times -8

  // x: (tokens, size)
  Inputs(const float* x, int64_t tokens, int64_t size)
      : groups(groups_of(size)), numbers(tokens * groups * GROUP), scales(tokens * groups), eights(tokens * groups) {
    at::parallel_for(0, tokens, std::max<int64_t>(1, GRAIN / size), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t g = 0; g < groups; ++g) {
          const float* from = x + t * size + g * GROUP;
          float last[GROUP] = {};
          if ((g + 1) * GROUP > size) {
            std::memcpy(last, from, (size - g * GROUP) * sizeof(float));
            from = last;
          }
          int16_t* to = numbers.data() + (t * groups + g) * GROUP;
          scales[t * groups + g] = rounded(from, to);
          int32_t sum = 0;
          for (int i = 0; i < GROUP; ++i) sum += to[i];
          eights[t * groups + g] = -8 * sum;
        }
    });
  }
};

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

// The keys or values of one of a batch, of those that count: `each[k]` begins at `at + used[k] * apart`.
template <typename T>
struct Rows {
  const T* at;
  int64_t apart;
  const std::vector<int64_t>& used;
  const T* operator[](int64_t k) const { return at + used[k] * apart; }
  int64_t size() const { return used.size(); }
};

// to: (H, keys) = query (H, size) times keys times `scale`; `apart`: from one head's to the next one's.
template <int H, typename T>
void match(const float* query, int64_t size, float scale, const Rows<T>& key, float* to, int64_t apart) {
  const int64_t whole = size / 8 * 8;
  for (int64_t k = 0; k < key.size(); ++k) {
    const T* of = key[k];
    Eight part[H] = {};
    for (int64_t i = 0; i < whole; i += 8)
      for (int h = 0; h < H; ++h) part[h] += eight(query + h * size + i) * eight(of + i);
    for (int h = 0; h < H; ++h) {
      float sum = sum_of(part[h]);
      for (int64_t i = whole; i < size; ++i) sum += query[h * size + i] * static_cast<float>(of[i]);
      to[h * apart + k] = sum * scale;
    }
  }
}

// y: (H, size) = shares (H, keys) times values, for V times 8 of `size` from `start` on.
template <int H, int V, typename T>
void mix_part(const float* shares, int64_t apart, int64_t size, const Rows<T>& value, int64_t start, float* y) {
  Eight sum[H][V] = {};
  for (int64_t k = 0; k < value.size(); ++k) {
    const T* of = value[k] + start;
    for (int h = 0; h < H; ++h)
      for (int v = 0; v < V; ++v) sum[h][v] += shares[h * apart + k] * eight(of + 8 * v);
  }
  for (int h = 0; h < H; ++h) std::memcpy(y + h * size + start, sum[h], sizeof(sum[h]));
}

// The same of all of `size`.
template <int H, typename T>
void mix(const float* shares, int64_t apart, int64_t size, const Rows<T>& value, float* y) {
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) mix_part<H, 2>(shares, apart, size, value, i, y);
  for (; i + 8 <= size; i += 8) mix_part<H, 1>(shares, apart, size, value, i, y);
  for (; i < size; ++i)
    for (int h = 0; h < H; ++h) {
      float sum = 0;
      for (int64_t k = 0; k < value.size(); ++k) sum += shares[h * apart + k] * static_cast<float>(value[k][i]);
      y[h * size + i] = sum;
    }
}

// Of H heads that share keys: query and y (H, size).
template <int H, typename T>
void attend(const float* query, int64_t size, float scale, const Rows<T>& key, const Rows<T>& value, float* y) {
  const int64_t keys = key.size(), apart = (keys + 7) / 8 * 8;
  std::vector<float> shares(H * apart, -INFINITY);
  match<H>(query, size, scale, key, shares.data(), apart);
  for (int h = 0; h < H; ++h) {
    float* of_head = shares.data() + h * apart;
    const float most = keys ? *std::max_element(of_head, of_head + keys) : 0;
    Eight sum = {};
    for (int64_t k = 0; k < apart; k += 8) {
      const Eight share = exponential(eight(of_head + k) - most);
      std::memcpy(of_head + k, &share, sizeof(share));
      sum += share;
    }
    const float whole = sum_of(sum);
    for (int64_t k = 0; k < keys; ++k) of_head[k] /= whole;
  }
  mix<H>(shares.data(), apart, size, value, y);
}

// `attention` of the dtype of key and value.
template <typename T>
void attend_all(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& used, float scale,
    float* y) {
  const int64_t batch = key.size(0), of_keys = key.size(1), keys = key.size(2), size = key.size(3);
  const int64_t heads = query.size(1) / of_keys;
  const float* q = query.const_data_ptr<float>();
  const T *k = key.const_data_ptr<T>(), *v = value.const_data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, GRAIN / (2 * heads * keys * size));
  at::parallel_for(0, batch * of_keys, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> here;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / of_keys, h = i % of_keys;
      if (i == begin || h == 0) {
        here.clear();
        const bool* one = used ? used->const_data_ptr<bool>() + b * used->stride(0) : nullptr;
        for (int64_t n = 0; n < keys; ++n)
          if (!one || one[n * used->stride(3)]) here.push_back(n);
      }
      const Rows<T> of_key{k + b * key.stride(0) + h * key.stride(1), key.stride(2), here};
      const Rows<T> of_value{v + b * value.stride(0) + h * value.stride(1), value.stride(2), here};
      const auto of_heads = [&]<int H>(int64_t n) {
        attend<H>(q + n * size, size, scale, of_key, of_value, y + n * size);
      };
      for (int64_t n = i * heads, left = heads; left > 0; n += 4, left -= 4) {
        if (left >= 4) of_heads.template operator()<4>(n);
        if (left == 3) of_heads.template operator()<3>(n);
        if (left == 2) of_heads.template operator()<2>(n);
        if (left == 1) of_heads.template operator()<1>(n);
      }
    }
  });
}

// Attention of one token: query (batch, heads, 1, size), key and value (batch, key heads, keys, size), heads that share
// keys side by side; used: (batch, 1, 1, keys), which keys count, all if there is none; of a sequence without any the
// result is zeros. Returns (batch, 1, heads, size).
Tensor attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& used, double scale) {
  const int64_t batch = query.size(0), heads = query.size(1), keys = key.size(2), size = query.size(3);
  TORCH_CHECK(
      query.size(2) == 1 && key.size(0) == batch && heads % key.size(1) == 0 && key.size(3) == size &&
          value.sizes() == key.sizes(),
      "attention of query ", query.sizes(), ", key ", key.sizes(), ", value ", value.sizes());
  const auto of_each = used ? std::optional(used->expand({batch, 1, 1, keys})) : std::nullopt;
  const bool narrow = key.scalar_type() == at::kBFloat16;
  const auto read = [&](const Tensor& x) {
    const Tensor held = x.to(narrow ? at::kBFloat16 : at::kFloat);
    return held.stride(3) == 1 ? held : held.contiguous();
  };
  const Tensor q = query.to(at::kFloat).contiguous(), k = read(key), v = read(value);
  Tensor y = at::empty({batch, 1, heads, size}, q.options());
  if (narrow)
    attend_all<at::BFloat16>(q, k, v, of_each, scale, y.mutable_data_ptr<float>());
  else
    attend_all<float>(q, k, v, of_each, scale, y.mutable_data_ptr<float>());
  return y.to(query.scalar_type());
}

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

TORCH_LIBRARY(basis_select, m) {
  m.def("product(Tensor x, Tensor packed, int[] layout, Tensor? bias) -> Tensor");
  m.def("attention(Tensor query, Tensor key, Tensor value, Tensor? used, float scale) -> Tensor");
  m.def("rounded_weight(Tensor weight, Tensor scale, float lowest, float highest, bool in_bfloat16) -> Tensor");
  m.def("rounded_weight_backward(Tensor weight, Tensor scale, Tensor grad, float lowest, float highest) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(basis_select, CPU, m) {
  m.impl("product", &product);
  m.impl("attention", &attention);
  m.impl("rounded_weight", &rounded_weight);
  m.impl("rounded_weight_backward", &rounded_weight_backward);
}
