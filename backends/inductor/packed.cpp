// Products with packed weights on the processor: `lwcompile::packed_linear` and `lwcompile::packed_embedding`.
//
// A weight lies in panels (`panels.h`). Three forms:
//
//     few rows of x    a code stays where it is in its word: (word & mask) is code * 2^(bits*t), which float32 holds exactly, and
//                      x comes scaled by 2^-(bits*t). Per 8 weights: and, convert, multiply-add. Zero points meet the sums of x.
//     many rows of x   a panel's weights are made, (code - zero) * scale, a part that stays in the first cache at a time, and
//                      multiplied by blocks of 6 rows of x. No dense weight is kept.
//     x in int8        `int8.h`

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "int8.h"
#include "panels.h"

namespace {

constexpr int TILE = 16, BLOCK = 6, PANELS = 4, DEPTH = 320;

// Where a code lies in its word: shifted to the bottom if it reaches the sign, else left in place and x scaled instead.
template <int BITS>
struct Word {
  static constexpr int codes = 32 / BITS;
  static constexpr uint32_t mask = (1u << BITS) - 1;
  static constexpr bool top(int t) { return BITS * (t + 1) == 32; }
  static float factor(int t) { return top(t) ? 1.0f : std::ldexp(1.0f, -BITS * t); }
  static inline floats in_place(words w, int t) {
    return __builtin_convertvector((ints)(top(t) ? w >> (32 - BITS) : w & (mask << (BITS * t))), floats);
  }
  static inline floats code(words w, int t) { return __builtin_convertvector((ints)((w >> (BITS * t)) & mask), floats); }
};

// x [m, K] as the words lie, each group padded: [m, groups, held, codes of a word]. With `sums` [m, groups], which then holds the
// sums of x over each group, times the factor of each place.
template <int BITS>
void arrange(const float* x, int64_t m, const Weight& w, float* out, float* sums) {
  using W = Word<BITS>;
  const int64_t padded = w.held * W::codes;
  float factors[W::codes];
  for (int t = 0; t < W::codes; t++) factors[t] = sums ? W::factor(t) : 1.0f;
  for (int64_t row = 0; row < m; row++, x += w.columns)
    for (int64_t g = 0; g < w.groups; g++, out += padded) {
      const float* from = x + g * w.group;
      const int64_t count = std::min(w.group, w.columns - g * w.group), whole = count - count % W::codes;
      float sum[W::codes] = {};
      for (int64_t k = 0; k < whole; k += W::codes)
        for (int t = 0; t < W::codes; t++) {
          sum[t] += from[k + t];
          out[k + t] = from[k + t] * factors[t];
        }
      for (int64_t k = whole; k < padded; k++) {
        const float value = k < count ? from[k] : 0.0f;
        sum[k % W::codes] += value;
        out[k] = value * factors[k % W::codes];
      }
      if (sums) sums[row * w.groups + g] = std::accumulate(sum, sum + W::codes, 0.0f);
    }
}

// V vectors of a panel's rows, from vector `first` on, by M rows of x: out [M, 32].
template <int BITS, int M, int V>
void few(const Weight& w, int64_t panel, int first, const float* x, const float* sums, float* out) {
  using W = Word<BITS>;
  constexpr int CHAINS = M * V <= 4 ? 2 : 1;  // sums that do not wait for each other, as far as registers go
  const int64_t padded = w.held * W::codes, length = w.groups * padded;
  const int32_t* codes = w.codes + panel * w.groups * w.held * PANEL + first * LANES;
  floats total[M][V] = {};
  for (int64_t g = 0; g < w.groups; g++) {
    floats sum[CHAINS][M][V] = {};
    const float* given = x + g * padded;
    for (int64_t i = 0; i < w.held; i++, codes += PANEL, given += W::codes) {
      words word[V];
      for (int v = 0; v < V; v++) word[v] = load<words>(codes + v * LANES);
      __builtin_prefetch(codes + AHEAD);
      __builtin_prefetch(codes + AHEAD + PANEL / 2);
#pragma GCC unroll 16
      for (int t = 0; t < W::codes; t++) {
        floats code[V];
        for (int v = 0; v < V; v++) code[v] = W::in_place(word[v], t);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
          const floats each = all(given[m * length + t]);
          for (int v = 0; v < V; v++) sum[t % CHAINS][m][v] += code[v] * each;
        }
      }
    }
    for (int v = 0; v < V; v++) {
      const floats scale = w.scale(panel * w.groups + g, first + v), zero = w.zero(panel * w.groups + g, first + v);
      for (int m = 0; m < M; m++) {
        floats joined = sum[0][m][v];
        for (int c = 1; c < CHAINS; c++) joined += sum[c][m][v];
        total[m][v] += scale * (joined - zero * sums[m * w.groups + g]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) store(out + m * PANEL + (first + v) * LANES, total[m][v]);
}

// A panel's weights in some groups, one half of its rows after the other: [2, groups, held * codes of a word, 16].
template <int BITS>
void unpack(const Weight& w, int64_t panel, int64_t begin, int64_t end, float* out) {
  using W = Word<BITS>;
  const int64_t half = (end - begin) * w.held * W::codes * TILE;
  const int32_t* codes = w.codes + (panel * w.groups + begin) * w.held * PANEL;
  for (int64_t g = begin; g < end; g++) {
    floats scale[VECTORS], zero[VECTORS];
    for (int v = 0; v < VECTORS; v++) scale[v] = w.scale(panel * w.groups + g, v), zero[v] = w.zero(panel * w.groups + g, v);
    for (int64_t i = 0; i < w.held; i++, codes += PANEL) {
      words word[VECTORS];
      for (int v = 0; v < VECTORS; v++) word[v] = load<words>(codes + v * LANES);
#pragma GCC unroll 16
      for (int t = 0; t < W::codes; t++, out += TILE)
        for (int v = 0; v < VECTORS; v++)
          store(out + (v / 2) * half + (v % 2) * LANES, (W::code(word[v], t) - zero[v]) * scale[v]);
    }
  }
}

// out [M, 16] += x [M, depth] by w [depth, 16].
template <int M>
void multiply(const float* x, int64_t stride, const float* w, int64_t depth, float* out, int64_t out_stride) {
  floats sum[M][2];
  for (int m = 0; m < M; m++)
    for (int h = 0; h < 2; h++) sum[m][h] = load<floats>(out + m * out_stride + h * LANES);
  for (int64_t k = 0; k < depth; k++, w += TILE) {
    const floats a = load<floats>(w), b = load<floats>(w + LANES);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      const floats v = all(x[m * stride + k]);
      sum[m][0] += a * v;
      sum[m][1] += b * v;
    }
  }
  for (int m = 0; m < M; m++)
    for (int h = 0; h < 2; h++) store(out + m * out_stride + h * LANES, sum[m][h]);
}

void multiply_rows(int64_t rows, const float* x, int64_t stride, const float* w, int64_t depth, float* out, int64_t out_stride) {
  int64_t m = 0;
  for (; m + BLOCK <= rows; m += BLOCK) multiply<BLOCK>(x + m * stride, stride, w, depth, out + m * out_stride, out_stride);
  const float* rest = x + m * stride;
  float* to = out + m * out_stride;
  switch (rows - m) {
    case 5: return multiply<5>(rest, stride, w, depth, to, out_stride);
    case 4: return multiply<4>(rest, stride, w, depth, to, out_stride);
    case 3: return multiply<3>(rest, stride, w, depth, to, out_stride);
    case 2: return multiply<2>(rest, stride, w, depth, to, out_stride);
    case 1: return multiply<1>(rest, stride, w, depth, to, out_stride);
  }
}

template <int BITS, int M>
void few_step(const Weight& w, int64_t panel, const float* x, const float* sums, const float* bias, float* out) {
  float made[M * PANEL];
  if constexpr (M <= 2) {
    few<BITS, M, VECTORS>(w, panel, 0, x, sums, made);
  } else {
    few<BITS, M, VECTORS / 2>(w, panel, 0, x, sums, made);
    few<BITS, M, VECTORS / 2>(w, panel, VECTORS / 2, x, sums, made);
  }
  const int64_t first = panel * PANEL, count = std::min<int64_t>(PANEL, w.rows - first);
  for (int m = 0; m < M; m++)
    for (int64_t n = 0; n < count; n++) out[m * w.rows + first + n] = made[m * PANEL + n] + (bias ? bias[first + n] : 0.0f);
}

template <int BITS>
void few_rows(const Weight& w, const float* x, int64_t rows, const float* bias, float* out) {
  const int64_t length = w.groups * w.held * Word<BITS>::codes, grain = worth_a_thread(0.04 * PANEL * w.columns * rows);
  std::vector<float> given(rows * length), sums(rows * w.groups);
  arrange<BITS>(x, rows, w, given.data(), sums.data());
  at::parallel_for(0, w.panels(), grain, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++)
      for (int64_t row = 0; row < rows; row += 4) {
        const float *x = given.data() + row * length, *sum = sums.data() + row * w.groups;
        float* to = out + row * w.rows;
        switch (rows - row) {
          case 1: few_step<BITS, 1>(w, panel, x, sum, bias, to); break;
          case 2: few_step<BITS, 2>(w, panel, x, sum, bias, to); break;
          case 3: few_step<BITS, 3>(w, panel, x, sum, bias, to); break;
          default: few_step<BITS, 4>(w, panel, x, sum, bias, to);
        }
      }
  });
}

template <int BITS>
void many_rows(const Weight& w, const float* x, int64_t rows, const float* bias, float* out) {
  const int64_t padded = w.held * Word<BITS>::codes, length = w.groups * padded;
  std::vector<float> arranged;
  if (length != w.columns) {
    arranged.resize(rows * length);
    arrange<BITS>(x, rows, w, arranged.data(), nullptr);
    x = arranged.data();
  }
  const int64_t step = std::max<int64_t>(1, DEPTH / padded);  // groups at a time
  at::parallel_for(0, (w.panels() + PANELS - 1) / PANELS, 1, [&](int64_t first, int64_t last) {
    constexpr int64_t WIDTH = PANEL * PANELS;
    std::vector<float> weights(step * padded * PANEL), made(rows * WIDTH);
    for (int64_t block = first; block < last; block++) {
      const int64_t begin = block * PANELS, end = std::min(w.panels(), begin + PANELS);
      std::fill(made.begin(), made.end(), 0.0f);
      for (int64_t g = 0; g < w.groups; g += step)
        for (int64_t p = begin; p < end; p++) {
          const int64_t until = std::min(w.groups, g + step), depth = (until - g) * padded;
          unpack<BITS>(w, p, g, until, weights.data());
          for (int half = 0; half < PANEL / TILE; half++)
            multiply_rows(rows, x + g * padded, length, weights.data() + half * depth * TILE, depth,
                          made.data() + (p - begin) * PANEL + half * TILE, WIDTH);
        }
      const int64_t column = begin * PANEL, count = std::min(w.rows, end * PANEL) - column;
      for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < count; n++)
          out[m * w.rows + column + n] = made[m * WIDTH + n] + (bias ? bias[column + n] : 0.0f);
    }
  });
}

template <int BITS>
void product(const Weight& w, const float* x, int64_t rows, const float* bias, float* out, int64_t few, bool int8) {
  if (int8) {
    if constexpr (BITS == 2 || BITS == 4) return rows_int8<BITS>(w, x, rows, bias, out);
    TORCH_CHECK(false, "int8 products are of 2 and 4 bits");
  }
  if (rows <= few) return few_rows<BITS>(w, x, rows, bias, out);
  many_rows<BITS>(w, x, rows, bias, out);
}

template <int BITS>
void lookup(const Weight& w, const int64_t* ids, int64_t count, float* out) {
  using W = Word<BITS>;
  at::parallel_for(0, count, std::max<int64_t>(1, (1 << 15) / w.columns), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      TORCH_CHECK_INDEX(0 <= ids[i] && ids[i] < w.rows, "index ", ids[i], " is out of range for ", w.rows, " rows");
      const int64_t panel = ids[i] / PANEL, lane = ids[i] % PANEL;
      for (int64_t k = 0; k < w.columns; k++) {
        const int64_t g = k / w.group, place = k % w.group, row = panel * w.groups + g;
        const uint32_t word = w.codes[(row * w.held + place / W::codes) * PANEL + lane];
        const float code = (word >> (BITS * (place % W::codes))) & W::mask;
        out[i * w.columns + k] = (code - w.zero.one(row, lane)) * w.scale.one(row, lane);
      }
    }
  });
}

template <class F>
void by_bits(int64_t bits, F&& call) {
  switch (bits) {
    case 2: return call(std::integral_constant<int, 2>{});
    case 3: return call(std::integral_constant<int, 3>{});
    case 4: return call(std::integral_constant<int, 4>{});
    case 5: return call(std::integral_constant<int, 5>{});
    case 6: return call(std::integral_constant<int, 6>{});
    case 7: return call(std::integral_constant<int, 7>{});
    case 8: return call(std::integral_constant<int, 8>{});
  }
  TORCH_CHECK(false, "codes have 2 to 8 bits, not ", bits);
}

// Into `out` [..., out_features], float32 that lies in order.
void linear(at::Tensor& out, const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale,
            const std::optional<at::Tensor>& zero, const std::optional<at::Tensor>& bias, int64_t bits, int64_t group_size,
            int64_t out_features, int64_t few, bool int8) {
  const at::Tensor given = x.to(at::kFloat).contiguous();
  const int64_t columns = x.size(-1), rows = columns ? x.numel() / columns : 0;
  const Weight weight(codes, scale, zero, bits, group_size, out_features, columns);
  const at::Tensor added = bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
  const float* bias_data = bias ? added.const_data_ptr<float>() : nullptr;
  by_bits(bits, [&](auto b) {
    product<b>(weight, given.const_data_ptr<float>(), rows, bias_data, out.mutable_data_ptr<float>(), few, int8);
  });
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale,
                         const std::optional<at::Tensor>& zero, const std::optional<at::Tensor>& bias, int64_t bits,
                         int64_t group_size, int64_t out_features, int64_t few, bool int8) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out_features;
  at::Tensor out = at::empty(shape, x.options().dtype(at::kFloat));
  linear(out, x, codes, scale, zero, bias, bits, group_size, out_features, few, int8);
  return out.to(x.scalar_type());
}

void packed_linear_into(at::Tensor& out, const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scale,
                        const std::optional<at::Tensor>& zero, const std::optional<at::Tensor>& bias, int64_t bits,
                        int64_t group_size, int64_t out_features, int64_t few, bool int8) {
  TORCH_CHECK(out.size(-1) == out_features && out.numel() * x.size(-1) == x.numel() * out_features, "the result has another shape");
  if (x.scalar_type() == at::kFloat && out.scalar_type() == at::kFloat && out.is_contiguous())
    return linear(out, x, codes, scale, zero, bias, bits, group_size, out_features, few, int8);
  out.copy_(packed_linear(x, codes, scale, zero, bias, bits, group_size, out_features, few, int8));
}

at::Tensor packed_embedding(const at::Tensor& ids, const at::Tensor& codes, const at::Tensor& scale,
                            const std::optional<at::Tensor>& zero, int64_t bits, int64_t group_size, int64_t rows, int64_t columns) {
  const at::Tensor given = ids.to(at::kLong).contiguous();
  std::vector<int64_t> shape = ids.sizes().vec();
  shape.push_back(columns);
  at::Tensor out = at::empty(shape, ids.options().dtype(at::kFloat));
  const Weight weight(codes, scale, zero, bits, group_size, rows, columns);
  by_bits(bits, [&](auto b) {
    lookup<b>(weight, given.const_data_ptr<int64_t>(), given.numel(), out.mutable_data_ptr<float>());
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(lwcompile, CPU, m) {
  m.impl("packed_linear", &packed_linear);
  m.impl("packed_linear.into", &packed_linear_into);
  m.impl("packed_embedding", &packed_embedding);
}
