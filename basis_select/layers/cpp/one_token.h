// Attention of one token, in float32, of keys and values in float32 or bfloat16.

#pragma once

#include "eights.h"

namespace {

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

// y: attention of query, both contiguous; the rest as for `attention`, T: the dtype of key and value.
template <typename T>
void attend_one_token(
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

}  // namespace
