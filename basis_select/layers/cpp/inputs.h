// Inputs as whole numbers of 16 bits with one scale for every GROUP of them: 100 times as precise as bfloat16.

#pragma once

#include "stored.h"

namespace {

constexpr int64_t TOGETHER = 4;  // tokens whose numbers lie together
constexpr int64_t FEW = 8;       // for which it does not pay to make blocks of long rows of 8 bits

#ifdef __AVX2__

// A group of inputs as whole numbers, and -8 times their sum; returns their scale, which is no number where one of them
// is none.
float rounded(const float* x, int16_t* to, int32_t* eights) {
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
  __m256i sums = _mm256_setzero_si256();
  for (int i = 0; i < 2; ++i) {
    const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(v[2 * i], by));
    const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(v[2 * i + 1], by));
    const __m256i sorted = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0b11011000);
    _mm256_storeu_si256((__m256i*)(to + 16 * i), sorted);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(sorted, _mm256_set1_epi16(-8)));
  }
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b01001110));
  *eights = _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0b10110001)));
  return is_number ? whole / 32767 : NAN;
}

#else

float rounded(const float* x, int16_t* to, int32_t* eights) {
  float whole = 0;
  bool is_number = true;
  for (int i = 0; i < GROUP; ++i) {
    whole = std::max(whole, std::abs(x[i]));
    is_number = is_number && !std::isnan(x[i]);
  }
  const float by = whole > 0 ? 32767 / whole : 0;
  for (int i = 0; i < GROUP; ++i) to[i] = std::isfinite(x[i] * by) ? (int16_t)std::nearbyint(x[i] * by) : 1;
  *eights = -8 * std::accumulate(to, to + GROUP, 0);
  return is_number ? whole / 32767 : NAN;
}

#endif

// Tokens of which every group is whole numbers times a scale, the last group filled up with zeros. TOGETHER of them, and
// those that are left, lie together: their groups one after the other, of a group its pairs of numbers, of a pair that of
// each token. alone: of few tokens each by itself, too.
struct Inputs {
  int64_t groups;
  std::unique_ptr<int16_t[]> numbers, alone;
  std::vector<float> scales;
  std::vector<int32_t> eights;  // of each group its sum times -8

  // x: (tokens, size)
  Inputs(const float* x, int64_t tokens, int64_t size)
      : groups(groups_of(size)), numbers(new int16_t[tokens * groups * GROUP]), scales(tokens * groups),
        eights(tokens * groups) {
    if (tokens <= FEW) alone.reset(new int16_t[tokens * groups * GROUP]);
    const int64_t parts = (tokens + TOGETHER - 1) / TOGETHER;
    at::parallel_for(0, parts, std::max<int64_t>(1, GRAIN / (size * TOGETHER)), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * TOGETHER; first < std::min(end * TOGETHER, tokens); first += TOGETHER) {
        const int64_t count = std::min(TOGETHER, tokens - first);
        for (int64_t t = 0; t < count; ++t)
          for (int64_t g = 0; g < groups; ++g) {
            const float* from = x + (first + t) * size + g * GROUP;
            float last[GROUP];
            if ((g + 1) * GROUP > size) {
              std::fill_n(last, GROUP, 0.0f);
              std::memcpy(last, from, (size - g * GROUP) * sizeof(float));
              from = last;
            }
            const int64_t at = first * groups + g * count;
            int16_t own[GROUP], *to = numbers.get() + at * GROUP + 2 * t;
            int16_t* found = tokens <= FEW ? alone.get() + ((first + t) * groups + g) * GROUP : own;
            scales[at + t] = rounded(from, found, &eights[at + t]);
            for (int64_t i = 0; i < GROUP / 2; ++i) std::memcpy(to + 2 * i * count, found + 2 * i, 2 * sizeof(int16_t));
          }
      }
    });
  }
};

}  // namespace
