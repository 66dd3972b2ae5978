// Attention of a few queries over a long cache, in float32: `lwcompile::few_attention`.
//
//     query [B, H, S, D], key and value [B, H / n, T, D], mask bool or float [B or 1, H or 1, S or 1, T] or absent -> [B, H, S, D]
//
// Keys are read eight at a time, and no eight that the mask closes; values only where it is open.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "vectors.h"

namespace {

// e^x for x <= 0, to 2 units in the last place: 2^n * e^r with |r| <= ln(2) / 2, by Cephes' polynomial. 0 below -87.
inline floats exponential(floats x) {
  const floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const ints tiny = x < all(-87.0f);
  const floats n = (x * all(1.44269504f) + shift) - shift;
  const floats r = (x - n * all(0.693359375f)) + n * all(2.12194440e-4f);
  floats p = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + all(c);
  p = p * r * r + r + all(1.0f);
  const ints power = (__builtin_convertvector(n, ints) + 127) << 23;
  floats scale;
  std::memcpy(&scale, &power, sizeof(scale));
  p = p * scale;
  ints bits;
  std::memcpy(&bits, &p, sizeof(bits));
  bits &= ~tiny;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

struct Mask {
  const void* data = nullptr;
  bool booleans = false;
  int64_t batch = 0, head = 0, query = 0, key = 0;

  explicit Mask(const std::optional<at::Tensor>& given, at::IntArrayRef shape) {
    if (!given) return;
    const at::Tensor mask = given->expand(shape);
    data = mask.const_data_ptr();
    booleans = mask.scalar_type() == at::kBool;
    batch = mask.stride(0), head = mask.stride(1), query = mask.stride(2), key = mask.stride(3);
  }
  float operator()(int64_t b, int64_t h, int64_t s, int64_t t) const {
    if (data == nullptr) return 0.0f;
    const int64_t at = b * batch + h * head + s * query + t * key;
    if (booleans) return static_cast<const bool*>(data)[at] ? 0.0f : -std::numeric_limits<float>::infinity();
    return static_cast<const float*>(data)[at];
  }
};

// Where row [b, h, s] of a tensor [B, H, S, D] begins.
struct Rows {
  const float* data;
  int64_t batch, head, place;
  explicit Rows(const at::Tensor& t) : data(t.const_data_ptr<float>()), batch(t.stride(0)), head(t.stride(1)), place(t.stride(2)) {}
  const float* operator()(int64_t b, int64_t h, int64_t s) const { return data + b * batch + h * head + s * place; }
};

// The totals of 8 vectors.
inline floats totals(const floats (&s)[LANES]) {
  floats four[4], two[2];
  for (int i = 0; i < 4; i++)
    four[i] = __builtin_shufflevector(s[2 * i], s[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
              __builtin_shufflevector(s[2 * i], s[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; i++)
    two[i] = __builtin_shufflevector(four[2 * i], four[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
             __builtin_shufflevector(four[2 * i], four[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(two[0], two[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(two[0], two[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// A query by 8 keys that lie `stride` apart, of which the last `LANES - count` are not there.
template <int V>
inline floats dots(const float* query, const float* key, int64_t stride, int64_t count) {
  floats sums[LANES];
#pragma GCC unroll 8
  for (int j = 0; j < LANES; j++) {
    const float* from = key + (j < count ? j : 0) * stride;
    sums[j] = load<floats>(query) * load<floats>(from);
    for (int v = 1; v < V; v++) sums[j] += load<floats>(query + v * LANES) * load<floats>(from + v * LANES);
  }
  return totals(sums);
}

// One query of each of `heads` heads from `h` on, V vectors wide, over the T keys of group g. scores: heads * T numbers of room, T rounded
// up to vectors.
template <int V>
void attend(const Rows& query, const Rows& key, const Rows& value, const Mask& mask, int64_t b, int64_t g, int64_t s, int64_t h,
            int64_t heads, int64_t keys, float scale, float* scores, float* out, int64_t out_head) {
  const int64_t width = (keys + LANES - 1) / LANES * LANES;
  const float closed = -std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < keys; t += LANES) {
    const int64_t count = std::min<int64_t>(LANES, keys - t);
    floats open = {};
    for (int64_t i = 0; i < heads; i++) {
      if (i == 0 || mask.head != 0)
        for (int j = 0; j < LANES; j++) open[j] = j < count ? mask(b, h + i, s, t + j) : closed;
      floats score = all(closed);
      if (largest(open) != closed) {
        score = dots<V>(query(b, h + i, s), key(b, g, t), key.place, count) * all(scale) + open;
        score = open == all(closed) ? all(closed) : score;  // whatever lies in a key that is closed
      }
      store(scores + i * width + t, score);
    }
  }
  for (int64_t i = 0; i < heads; i++) {
    float* row = scores + i * width;
    floats most = all(closed);
    for (int64_t t = 0; t < width; t += LANES) most = larger(most, load<floats>(row + t));
    const floats top = all(largest(most));
    if (top[0] == closed) {  // nothing to read is 0, as torch has it
      std::fill(out + i * out_head, out + i * out_head + V * LANES, 0.0f);
      continue;
    }
    floats sum = {};
    for (int64_t t = 0; t < width; t += LANES) {
      const floats weight = exponential(load<floats>(row + t) - top);
      store(row + t, weight);
      sum += weight;
    }
    floats made[V] = {};
    for (int64_t t = 0; t < keys; t++) {
      if (row[t] == 0.0f) continue;
      const float* from = value(b, g, t);
      for (int v = 0; v < V; v++) made[v] += all(row[t]) * load<floats>(from + v * LANES);
    }
    const floats share = all(1.0f / total(sum));
    for (int v = 0; v < V; v++) store(out + i * out_head + v * LANES, made[v] * share);
  }
}

template <int V>
void attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Mask& mask, float scale, at::Tensor& out) {
  const Rows query(q), key(k), value(v);
  const int64_t heads = q.size(1), queries = q.size(2), groups = k.size(1), keys = k.size(2), shared = heads / groups;
  float* made = out.mutable_data_ptr<float>();
  // heads of a group share what they read, but a thread too many that waits is worse
  const int64_t each = q.size(0) * groups * queries % at::get_num_threads() == 0 ? shared : 1, parts = heads / each;
  at::parallel_for(0, q.size(0) * parts * queries, worth_a_thread(0.5 * keys * V * each), [&](int64_t first, int64_t last) {
    std::vector<float> scores(each * (keys + LANES));
    for (int64_t i = first; i < last; i++) {
      const int64_t s = i % queries, h = i / queries % parts * each, b = i / queries / parts;
      attend<V>(query, key, value, mask, b, h / shared, s, h, each, keys, scale, scores.data(),
                made + ((b * heads + h) * queries + s) * V * LANES, queries * V * LANES);
    }
  });
}

void few_attention_into(at::Tensor& out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const std::optional<at::Tensor>& mask, double scale) {
  for (const at::Tensor& t : {query, key, value})
    TORCH_CHECK(t.dim() == 4 && t.scalar_type() == at::kFloat && (t.size(3) == 1 || t.stride(3) == 1), "rows of float32 that lie in order");
  TORCH_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0 && key.size(3) == query.size(3) && value.size(3) == query.size(3),
              "heads of one width, shared evenly");
  TORCH_CHECK(out.sizes() == query.sizes() && out.scalar_type() == at::kFloat && out.is_contiguous(), "a result like the query, in order");
  const Mask open(mask, {query.size(0), query.size(1), query.size(2), key.size(2)});
  switch (query.size(3)) {
    case 32: attention<4>(query, key, value, open, scale, out); break;
    case 64: attention<8>(query, key, value, open, scale, out); break;
    case 96: attention<12>(query, key, value, open, scale, out); break;
    case 128: attention<16>(query, key, value, open, scale, out); break;
    default: TORCH_CHECK(false, "heads of width 32, 64, 96 or 128");
  }
}

at::Tensor few_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const std::optional<at::Tensor>& mask, double scale) {
  at::Tensor out = at::empty(query.sizes(), query.options());
  few_attention_into(out, query, key, value, mask, scale);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(lwcompile, CPU, m) {
  m.impl("few_attention", &few_attention);
  m.impl("few_attention.into", &few_attention_into);
}
