// Weights of 8 and 4 bits as they lie in memory, and restored. What the bits stand for: rounding.py.
//
// Those of 8 bits lie row after row. Those of 4 bits lie in blocks of ROWS rows, filled up with zeros, a row in each lane
// of a vector: a block is its groups, a group four vectors of eight inputs. Of inputs 2i and 2i + 1 of these the whole
// numbers, with 8 added, are bits 4i to 4i + 3 and 4i + 16 to 4i + 19 of a lane.

#pragma once

#include "common.h"

namespace {

constexpr int64_t ROWS = BASIS_SELECT_ROWS;        // of a block
constexpr int64_t BYTES = GROUP * ROWS / 2;        // of a group of a block of 4 bits
constexpr int64_t ALIGNED = BASIS_SELECT_ALIGNED;  // bytes of which everything begins at a multiple

int64_t groups_of(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }

// Of its upper half.
float float_of(uint16_t upper) {
  const uint32_t bits = (uint32_t)upper << 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

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

#ifdef __AVX2__

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

#else

int number_of(const int8_t* from, int64_t, int64_t i) { return from[i]; }

int number_of(const uint8_t* from, int64_t row, int64_t i) {
  uint32_t word;
  std::memcpy(&word, from + i / 8 * 32 + 4 * row, sizeof(word));
  return (int)(word >> (i % 8 / 2 * 4 + i % 2 * 16) & 15) - 8;
}

template <typename Q, typename To>
void restore_group(const Q* from, int64_t row, float by, To* to) {
  for (int i = 0; i < GROUP; ++i) to[i] = static_cast<To>(number_of(from, row, i) * by);
}

#endif

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

}  // namespace
