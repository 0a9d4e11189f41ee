// Groups of whole numbers: of weights of 8 and 4 bits, and of inputs. What the bits stand for: rounding.py.
//
// Inputs become whole numbers of 16 bits with one scale for every GROUP of them, which is 100 times as precise as
// bfloat16; products of whole numbers are summed exactly within a group, groups in float32.
//
// Weights of 8 bits lie row after row. Those of 4 bits lie in blocks of ROWS rows, filled up with zeros, a row in each
// lane of a vector: a block is its groups, a group four vectors of eight inputs. Of inputs 2i and 2i + 1 of these the
// whole numbers, with 8 added, are bits 4i to 4i + 3 and 4i + 16 to 4i + 19 of a lane.

#pragma once

#include "common.h"

namespace {

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

}  // namespace
