// Attention of several tokens, in float32.

#pragma once

#include "eights.h"

namespace {

constexpr int64_t TALL = 6, WIDE = 16;  // rows and columns of a product whose sums all stay in registers

int64_t up_to_wide(int64_t columns) { return (columns + WIDE - 1) / WIDE * WIDE; }

// (depth, columns) in panels of WIDE columns, each (depth, WIDE), with zeros for columns that are missing; element
// (i, j) is `from[i * down + j * right]`.
void lay(const float* from, int64_t down, int64_t right, int64_t depth, int64_t columns, float* to) {
  for (int64_t first = 0; first < columns; first += WIDE)
    for (int64_t i = 0; i < depth; ++i, to += WIDE)
      for (int64_t j = 0; j < WIDE; ++j) to[j] = first + j < columns ? from[i * down + (first + j) * right] : 0;
}

// c: (TALL, WIDE) = a (TALL, depth) times a panel.
void multiply(const float* a, int64_t apart, const float* panel, int64_t depth, float* c, int64_t c_apart) {
  Eight sum[TALL][2] = {};
  for (int64_t i = 0; i < depth; ++i, panel += WIDE) {
    const Eight left = eight(panel), right = eight(panel + 8);
    for (int64_t r = 0; r < TALL; ++r) {
      sum[r][0] += a[r * apart + i] * left;
      sum[r][1] += a[r * apart + i] * right;
    }
  }
  for (int64_t r = 0; r < TALL; ++r) std::memcpy(c + r * c_apart, sum[r], sizeof(sum[r]));
}

// A head of keys in panels: keys (size, count), values (count, size).
struct Head {
  const float *keys, *values;
  int64_t count, size;
};

// How many keys there are up to the last one that counts for any of `rows` tokens.
int64_t end_of_mask(const bool* mask, int64_t rows, int64_t keys, int64_t down, int64_t right) {
  int64_t end = 0;
  for (int64_t row = rows; row-- > 0;) {  // the last one has most
    const bool* of = mask + row * down;
    int64_t key = keys;
    const auto none_of_eight = [&] {
      uint64_t eight;
      std::memcpy(&eight, of + key - 8, sizeof(eight));
      return eight == 0;
    };
    while (right == 1 && key - end >= 8 && none_of_eight()) key -= 8;
    while (key > end && !of[(key - 1) * right]) --key;
    end = key;
  }
  return end;
}

// What is added to the scores of TALL tokens: 0 for keys that count, minus infinity for others. None counts outside of
// `begin` to `end`, which is all that is set.
class Counted {
 public:
  explicit Counted(int64_t keys) : wide(up_to_wide(keys)), added(TALL * wide) {}

  // For `rows` tokens the first of which has the first `first` keys, and each later one a key more.
  void set_causal(int64_t rows, int64_t first) {
    begin = 0, end = first + rows - 1;
    set(rows, [&](int64_t row, int64_t key) { return key < first + row; });
  }

  // For `rows` tokens and `keys` by a mask.
  void set_masked(int64_t rows, int64_t keys, const bool* mask, int64_t down, int64_t right) {
    const auto counts = [&](int64_t row, int64_t key) { return mask[row * down + key * right]; };
    const auto any = [&](int64_t key) {
      for (int64_t row = 0; row < rows; ++row)
        if (counts(row, key)) return true;
      return false;
    };
    end = end_of_mask(mask, rows, keys, down, right);
    for (begin = 0; begin < end && !any(begin);) ++begin;
    begin = begin / WIDE * WIDE;
    set(rows, counts);
  }

  const float* of(int64_t row) const { return added.data() + row * wide; }

  int64_t wide, begin = 0, end = 0;

 private:
  template <typename Counts>
  void set(int64_t rows, Counts counts) {
    for (int64_t row = 0; row < TALL; ++row) {
      float* to = added.data() + row * wide;
      for (int64_t key = begin; key < up_to_wide(end); ++key) to[key] = -INFINITY;
      for (int64_t key = begin; row < rows && key < end; ++key) to[key] = counts(row, key) ? 0 : -INFINITY;
    }
  }

  std::vector<float> added;
};

// scores: those of one token become e to their power, relative to the largest. Returns one divided by their sum, or 0.
float shares(float* scores, const float* added, int64_t begin, int64_t end) {
  Eight most = Eight{} - INFINITY, sum = {};
  for (int64_t k = begin; k < end; k += 8) {
    const Eight score = eight(scores + k) + eight(added + k);
    most = score > most ? score : most;
    std::memcpy(scores + k, &score, sizeof(score));
  }
  const float largest = std::max({most[0], most[1], most[2], most[3], most[4], most[5], most[6], most[7]});
  for (int64_t k = begin; k < end; k += 8) {
    const Eight score = eight(scores + k), share = score == -INFINITY ? Eight{} : exponential(score - largest);
    std::memcpy(scores + k, &share, sizeof(share));
    sum += share;
  }
  const float whole = sum_of(sum);
  return whole == 0 ? 0 : 1 / whole;
}

// y: attention of `rows` queries of one head, at most TALL; room: for TALL rows of queries and of scores.
void attend_rows(
    const float* query, int64_t apart, int64_t rows, float scale, const Head& head, const Counted& counted, float* room,
    float* y, int64_t y_apart) {
  const int64_t begin = counted.begin, end = counted.end, wide = counted.wide, size = head.size;
  float *scores = room + TALL * size, inverse[TALL], part[TALL * WIDE];
  for (int64_t r = 0; r < TALL; ++r)
    for (int64_t i = 0; i < size; ++i) room[r * size + i] = r < rows ? query[r * apart + i] * scale : 0;
  for (int64_t k = begin; k < end; k += WIDE) multiply(room, size, head.keys + k * size, size, scores + k, wide);
  for (int64_t r = 0; r < TALL; ++r) inverse[r] = shares(scores + r * wide, counted.of(r), begin, up_to_wide(end));
  for (int64_t i = 0; i < size; i += WIDE) {
    multiply(scores + begin, wide, head.values + i * head.count + begin * WIDE, end - begin, part, WIDE);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < std::min(WIDE, size - i); ++j) y[r * y_apart + i + j] = part[r * WIDE + j] * inverse[r];
  }
}

// y: (batch, tokens, heads, size), attention of query (batch, heads, tokens, size); the rest as for `attention`.
void attend_prompts(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& used, float scale,
    float* y) {
  const int64_t of_keys = key.size(1), size = key.size(3), batch = key.size(0) * of_keys;
  const int64_t heads = query.size(1), shared = heads / of_keys, tokens = query.size(2);
  const auto mask = [&](int64_t b, int64_t token) {
    return used->const_data_ptr<bool>() + b * used->stride(0) + token * used->stride(2);
  };
  int64_t keys = used ? 0 : key.size(2);  // what a larger cache has beyond them is not read
  for (int64_t b = 0; used && b < key.size(0); ++b)
    keys = std::max(keys, end_of_mask(mask(b, 0), tokens, key.size(2), used->stride(2), used->stride(3)));
  const int64_t apart = up_to_wide(keys) * size, v_apart = up_to_wide(size) * keys;
  std::unique_ptr<float[]> laid_keys(new float[batch * apart]), laid_values(new float[batch * v_apart]);
  at::parallel_for(0, batch, GRAIN / (keys * size + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto at = [&](const Tensor& x) {
        return x.const_data_ptr<float>() + i / of_keys * x.stride(0) + i % of_keys * x.stride(1);
      };
      lay(at(key), key.stride(3), key.stride(2), size, keys, laid_keys.get() + i * apart);
      lay(at(value), value.stride(2), value.stride(3), keys, size, laid_values.get() + i * v_apart);
    }
  });
  // Late tokens have more keys than early ones: each part of the work is TALL of both.
  const int64_t blocks = (tokens + TALL - 1) / TALL, parts = (blocks + 1) / 2;
  const int64_t grain = GRAIN / (2 * TALL * shared * keys * size + 1) + 1;
  at::parallel_for(0, batch * parts, grain, [&](int64_t begin, int64_t end) {
    Counted counted(keys);
    std::vector<float> room(TALL * (size + counted.wide));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / parts, b = n / of_keys, early = i % parts, late = blocks - 1 - early;
      const Head head{laid_keys.get() + n * apart, laid_values.get() + n * v_apart, keys, size};
      for (int64_t block = early;; block = late) {
        const int64_t token = block * TALL, rows = std::min(TALL, tokens - token);
        if (used)
          counted.set_masked(rows, keys, mask(b, token), used->stride(2), used->stride(3));
        else
          counted.set_causal(rows, keys - tokens + token + 1);
        const float* of = query.const_data_ptr<float>() + b * query.stride(0) + token * query.stride(2);
        for (int64_t h = n % of_keys * shared; h < (n % of_keys + 1) * shared; ++h)
          attend_rows(
              of + h * query.stride(1), query.stride(2), rows, scale, head, counted, room.data(),
              y + ((b * tokens + token) * heads + h) * size, heads * size);
        if (block == late) break;
      }
    }
  });
}

}  // namespace
