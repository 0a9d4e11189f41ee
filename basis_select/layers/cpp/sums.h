// Products with weights as they are stored. Products of whole numbers are summed exactly within a group, groups in float32.

#pragma once

#include "inputs.h"

namespace {

#ifdef __AVX2__

constexpr int64_t AHEAD = 2048;       // least bytes from where weights are read to where memory is asked for more
constexpr int64_t AT_ONCE = 1 << 15;  // bytes of weights that stay in the cache for all tokens
constexpr int64_t SHORT = 2;          // groups of a row for which sums across lanes take longer than its products

// A group of a block as whole numbers of 16 bits: those of inputs 2i and 2i + 1 in `of[i]`, a row in each lane.
struct Pairs {
  __m256i of[GROUP / 2];

  // From 8 bits, rows `apart` numbers from each other.
  void read(const int8_t* q, int64_t apart) {
    __m256i one[ROWS], two[ROWS];  // in each half 16 inputs of a row; then 2, 4 and 8 rows together
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) one[r] = _mm256_loadu_si256((const __m256i*)(q + r * apart));
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      two[r] = _mm256_unpacklo_epi16(one[2 * r], one[2 * r + 1]);
      two[r + 4] = _mm256_unpackhi_epi16(one[2 * r], one[2 * r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      one[2 * r] = _mm256_unpacklo_epi32(two[2 * r], two[2 * r + 1]);
      one[2 * r + 1] = _mm256_unpackhi_epi32(two[2 * r], two[2 * r + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const __m256i a = one[4 * i + j], b = one[4 * i + 2 + j];
        const __m256i both[2] = {_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)};
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
          of[4 * i + 2 * j + k] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(both[k]));
          of[4 * i + 2 * j + k + 8] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(both[k], 1));
        }
      }
  }
};

// Scales of the rows of a block, the upper halves of float32.
__m256 scales_of(const uint16_t* upper) {
  const __m256i whole = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)upper));
  return _mm256_castsi256_ps(_mm256_slli_epi32(whole, 16));
}

// Blocks of 4 bits, of which pairs are made when they are used.
struct Narrow {
  static constexpr bool EIGHTS = true;  // 8 is added to each whole number
  const uint8_t* q;
  const uint16_t* scale;
  int64_t groups;

  Narrow(const Stored& w, int64_t block, int64_t groups) : q(w.block(block)), scale(w.scale(block)), groups(groups) {}
  // Asks for what comes behind `count` blocks that are read at once.
  void ahead(int count, int b, int64_t g) const {
    const uint8_t* from = q + (b * groups + g) * BYTES + std::max(AHEAD, count * groups * BYTES);
    for (int64_t i = 0; i < BYTES; i += ALIGNED) __builtin_prefetch(from + i);
  }
  __m256 scales(int b, int64_t g) const { return scales_of(scale + (b * groups + g) * ROWS); }
  __m256i pairs(int b, int64_t g, int i) const {
    const uint8_t* eight = q + (b * groups + g) * BYTES + i / 4 * 32;
    const __m256i moved = _mm256_srli_epi16(_mm256_loadu_si256((const __m256i*)eight), i % 4 * 4);
    return i % 4 < 3 ? _mm256_and_si256(moved, _mm256_set1_epi16(15)) : moved;
  }
};

// Of ROWS rows of 8 bits, or those that are left, a group that may be read in memory, its rows `apart` numbers from each
// other. A last group goes on into the next row, where its inputs are zeros; it is copied if it would go beyond the end.
struct GroupOf8 {
  const int8_t* q;
  int64_t apart;
  int8_t copied[ROWS * GROUP];

  GroupOf8(const Stored& w, int64_t row, int64_t g) : q((const int8_t*)w.q + row * w.inputs + g * GROUP), apart(w.inputs) {
    const int8_t* end = (const int8_t*)w.q + w.rows * w.inputs;
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(q + r * apart + std::max(AHEAD, ROWS * apart));
    if (row + ROWS <= w.rows && q + (ROWS - 1) * apart + GROUP <= end) return;
    std::fill_n(copied, ROWS * GROUP, 0);
    for (int64_t r = 0; r < std::min(ROWS, w.rows - row); ++r)
      std::memcpy(copied + r * GROUP, q + r * apart, std::min<int64_t>(GROUP, end - q - r * apart));
    q = copied;
    apart = GROUP;
  }
};

// Blocks of 8 bits as Pairs, and the scales of their rows.
struct Widened {
  std::unique_ptr<Pairs[]> pairs;
  std::vector<float> scales;

  Widened(const Stored& w, int64_t begin, int64_t end)
      : pairs(new Pairs[(end - begin) * groups_of(w.inputs)]), scales((end - begin) * ROWS) {
    const int64_t groups = groups_of(w.inputs);
    for (int64_t b = begin; b < end; ++b)
      for (int64_t g = 0; g < groups; ++g) {
        const GroupOf8 of(w, b * ROWS, g);
        pairs[(b - begin) * groups + g].read(of.q, of.apart);
      }
    std::copy(w.scale() + begin * ROWS, w.scale() + std::min(end * ROWS, w.rows), scales.begin());
  }
};

struct Wide {
  static constexpr bool EIGHTS = false;
  const Pairs* of;
  const float* scale;
  int64_t groups;

  Wide(const Widened& w, int64_t block, int64_t groups)
      : of(&w.pairs[block * groups]), scale(&w.scales[block * ROWS]), groups(groups) {}
  void ahead(int, int, int64_t) const {}
  __m256 scales(int b, int64_t) const { return _mm256_loadu_ps(scale + b * ROWS); }
  __m256i pairs(int b, int64_t g, int i) const { return of[b * groups + g].of[i]; }
};

// y: (count,) = x: (ROWS,), or += where it is added onto what is there.
void put(float* y, __m256 x, int64_t count, bool onto) {
  if (count >= ROWS) return _mm256_storeu_ps(y, onto ? _mm256_add_ps(x, _mm256_loadu_ps(y)) : x);
  float each[ROWS];
  _mm256_storeu_ps(each, x);
  for (int64_t i = 0; i < count; ++i) y[i] = onto ? y[i] + each[i] : each[i];
}

// y: (T, rows) = x W^T for T tokens that lie together from `first` on, and B blocks, whose first row is `row`.
template <int T, int B, typename Blocks>
void put_some(const Inputs& x, int64_t first, const Blocks& w, int64_t row, int64_t rows, float* y, bool onto) {
  __m256 sums[T][B] = {};
  for (int64_t g = 0; g < x.groups; ++g) {
    const int64_t at = first * x.groups + g * T;
    const int16_t* numbers = &x.numbers[at * GROUP];
    __m256i whole[T][B];
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      w.ahead(B, b, g);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) whole[t][b] = _mm256_set1_epi32(Blocks::EIGHTS ? x.eights[at + t] : 0);
    }
#pragma GCC unroll 16
    for (int i = 0; i < GROUP / 2; ++i) {
      __m256i pairs[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) pairs[b] = w.pairs(b, g, i);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        int32_t pair;
        std::memcpy(&pair, numbers + 2 * (i * T + t), sizeof(pair));
        const __m256i both = _mm256_set1_epi32(pair);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) whole[t][b] = _mm256_add_epi32(whole[t][b], _mm256_madd_epi16(pairs[b], both));
      }
    }
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      const __m256 own = w.scales(b, g);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m256 scale = _mm256_mul_ps(own, _mm256_set1_ps(x.scales[at + t]));
        sums[t][b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole[t][b]), scale, sums[t][b]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
      put(y + t * rows + row + b * ROWS, sums[t][b], rows - row - b * ROWS, onto);
}

// sums: (T, ROWS), at 0 of each the sum of a row of 8 bits in eight parts, for T tokens that lie together from `first` on.
// A last group goes on into the next row, where its inputs are zeros; EDGE: it may go beyond the `end` of all.
template <int T, bool EDGE>
void sum_row(const int8_t* q, const int8_t* end, const Inputs& x, int64_t first, __m256* sums) {
  const int16_t* numbers = x.alone.get() + first * x.groups * GROUP;
  const float* scales = &x.scales[first * x.groups];
  __m256 sum[T] = {};
  for (int64_t g = 0; g < x.groups; ++g, q += GROUP) {
    const int8_t* from = q;
    int8_t last[GROUP];
    if (EDGE && from + GROUP > end) {
      std::fill_n(last, GROUP, 0);
      std::memcpy(last, from, end - from);
      from = last;
    }
    __builtin_prefetch(q + AHEAD);
    const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
    const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(from + 16)));
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      const int16_t* own = numbers + (t * x.groups + g) * GROUP;
      const __m256i a = _mm256_madd_epi16(low, _mm256_loadu_si256((const __m256i*)own));
      const __m256i b = _mm256_madd_epi16(high, _mm256_loadu_si256((const __m256i*)(own + 16)));
      sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(a, b)), _mm256_set1_ps(scales[g * T + t]), sum[t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) sums[t * ROWS] = sum[t];
}

// The totals of eight sums in parts, one in each lane.
__m256 totals(const __m256* parts) {
  __m256 two[4], four[2];
  for (int i = 0; i < 4; ++i) {
    const __m256 a = parts[2 * i], b = parts[2 * i + 1];
    two[i] = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256 a = two[2 * i], b = two[2 * i + 1];
    four[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0b01000100), _mm256_shuffle_ps(a, b, 0b11101110));
  }
  const __m256 low = _mm256_permute2f128_ps(four[0], four[1], 0x20);
  return _mm256_add_ps(low, _mm256_permute2f128_ps(four[0], four[1], 0x31));
}

// y: (T, rows) = x W^T for a block of 8 bits and T tokens that lie together from `first` on, or += where it is added onto
// what is there.
template <int T>
void put_rows(const Inputs& x, int64_t first, const Stored& w, int64_t block, float* y, bool onto) {
  const int64_t row = block * ROWS, count = std::min(ROWS, w.rows - row);
  const int8_t *q = (const int8_t*)w.q + row * w.inputs, *end = (const int8_t*)w.q + w.rows * w.inputs;
  __m256 sums[T * ROWS];
  float scale[ROWS] = {};
  if (count == ROWS && q + (ROWS - 1) * w.inputs + x.groups * GROUP <= end) {
    for (int r = 0; r < ROWS; ++r) sum_row<T, false>(q + r * w.inputs, end, x, first, sums + r);
    std::copy_n(w.scale() + row, ROWS, scale);
  } else {
    std::fill_n(sums, T * ROWS, _mm256_setzero_ps());
    for (int r = 0; r < count; ++r) sum_row<T, true>(q + r * w.inputs, end, x, first, sums + r);
    std::copy_n(w.scale() + row, count, scale);
  }
  for (int t = 0; t < T; ++t)
    put(y + t * w.rows + row, _mm256_mul_ps(totals(sums + t * ROWS), _mm256_loadu_ps(scale)), count, onto);
}

// y: (tokens, rows) = x W^T for blocks of ROWS rows from `begin` up to `end`, or += where it is added onto what is there.
void put_blocks(const Inputs& x, int64_t tokens, const Stored& w, int64_t begin, int64_t end, float* y, bool onto) {
  const auto by_tokens = [&](auto put) {
    int64_t t = 0;
    for (; t + TOGETHER <= tokens; t += TOGETHER) put(std::integral_constant<int, TOGETHER>(), t, y + t * w.rows);
    if (tokens - t == 3) put(std::integral_constant<int, 3>(), t, y + t * w.rows);
    if (tokens - t == 2) put(std::integral_constant<int, 2>(), t, y + t * w.rows);
    if (tokens - t == 1) put(std::integral_constant<int, 1>(), t, y + t * w.rows);
  };
  if (w.bits == 8 && (tokens == 1 || (tokens <= FEW && x.groups > SHORT))) {
    for (int64_t b = begin; b < end; ++b)
      by_tokens([&]<int T>(std::integral_constant<int, T>, int64_t t, float* to) { put_rows<T>(x, t, w, b, to, onto); });
    return;
  }
  const int64_t groups = x.groups, two = 2 * groups * (w.bits == 8 ? sizeof(Pairs) : BYTES);
  const int64_t at_once = 2 * std::max<int64_t>(1, AT_ONCE / two);
  for (; begin < end; begin += at_once) {
    const int64_t last = std::min(end, begin + at_once);
    const auto put_all = [&](auto blocks) {
      by_tokens([&]<int T>(std::integral_constant<int, T>, int64_t t, float* to) {
        int64_t b = begin;
        for (; b + 2 <= last; b += 2) put_some<T, 2>(x, t, blocks(b), b * ROWS, w.rows, to, onto);
        if (b < last) put_some<T, 1>(x, t, blocks(b), b * ROWS, w.rows, to, onto);
      });
    };
    if (w.bits == 4) {
      put_all([&](int64_t b) { return Narrow(w, b, groups); });
    } else {
      const Widened wide(w, begin, last);
      put_all([&](int64_t b) { return Wide(wide, b - begin, groups); });
    }
  }
}

#else

int number_of(const Stored& w, int64_t row, int64_t i) {
  if (w.bits == 8) return ((const int8_t*)w.q)[row * w.inputs + i];
  return number_of(w.block(row / ROWS) + i / GROUP * BYTES, row % ROWS, i % GROUP);
}

void put_blocks(const Inputs& x, int64_t tokens, const Stored& w, int64_t begin, int64_t end, float* y, bool onto) {
  for (int64_t row = begin * ROWS; row < std::min(end * ROWS, w.rows); ++row)
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = onto ? y[t * w.rows + row] : 0;
      const int64_t first = t / TOGETHER * TOGETHER, count = std::min(TOGETHER, tokens - first);
      for (int64_t g = 0; g < x.groups; ++g) {
        const int64_t at = first * x.groups + g * count;
        const int16_t* numbers = &x.numbers[at * GROUP] + 2 * (t - first);
        int32_t whole = 0;
        for (int64_t i = 0; i < std::min(GROUP, w.inputs - g * GROUP); ++i)
          whole += number_of(w, row, g * GROUP + i) * numbers[i / 2 * 2 * count + i % 2];
        const float scale = w.bits == 8 ? w.scale()[row] : float_of(w.scale(row / ROWS)[g * ROWS + row % ROWS]);
        sum += whole * (scale * x.scales[at + t - first]);
      }
      y[t * w.rows + row] = sum;
    }
}

#endif

}  // namespace
