// A packed weight, as `Panels` of packed.py makes it.
//
// A weight [N, K] lies in panels of 32 rows, so that a vector's lanes are rows and nothing is summed across lanes:
//
//     codes  int32 [N/32, G, W, 32]   word w of row n holds 32/bits consecutive codes of one group, the first in the lowest bits
//     scale  float16 or float32 [N/32, G, 32]
//     zero   uint8, float16 or float32 [N/32, G, 32], or absent: the code 2^(bits-1)
//
// Rows and groups are padded with zeros.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <optional>

#include "vectors.h"

namespace {

// AHEAD: how many words ahead of their use they are fetched.
constexpr int PANEL = 32, VECTORS = PANEL / LANES, AHEAD = 512;

// Rows of 32 scales or zero points, read by vectors.
struct Grid {
  const void* data;
  at::ScalarType type;
  float otherwise;

  static Grid of(const at::Tensor& t) { return {t.const_data_ptr(), t.scalar_type(), 0}; }

  floats operator()(int64_t row, int vector) const {
    const int64_t at = row * PANEL + vector * LANES;
    if (data == nullptr) return all(otherwise);
    if (type == at::kFloat) return load<floats>(static_cast<const float*>(data) + at);
    if (type == at::kHalf) {
      const auto* from = static_cast<const c10::Half*>(data) + at;
#ifdef VECTORS_OF_INTEL
      return (floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
      floats made;
      for (int i = 0; i < LANES; i++) made[i] = static_cast<float>(from[i]);
      return made;
#endif
    }
    const auto* from = static_cast<const uint8_t*>(data) + at;
#ifdef VECTORS_OF_INTEL
    return (floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
    floats made;
    for (int i = 0; i < LANES; i++) made[i] = static_cast<float>(from[i]);
    return made;
#endif
  }

  float one(int64_t row, int lane) const {
    if (data == nullptr) return otherwise;
    const int64_t at = row * PANEL + lane;
    if (type == at::kFloat) return static_cast<const float*>(data)[at];
    if (type == at::kHalf) return static_cast<float>(static_cast<const c10::Half*>(data)[at]);
    return static_cast<const uint8_t*>(data)[at];
  }
};

struct Weight {
  const int32_t* codes;
  Grid scale, zero;
  int64_t rows, columns, group, groups, held;  // held: words of one group in one row

  Weight(const at::Tensor& codes, const at::Tensor& scale, const std::optional<at::Tensor>& zero, int64_t bits, int64_t group,
         int64_t rows, int64_t columns)
      : codes(codes.const_data_ptr<int32_t>()),
        scale(Grid::of(scale)),
        zero(zero ? Grid::of(*zero) : Grid{nullptr, at::kFloat, static_cast<float>(1 << (bits - 1))}),
        rows(rows), columns(columns), group(group), groups(codes.size(1)), held(codes.size(2)) {
    TORCH_CHECK(codes.is_contiguous() && scale.is_contiguous() && (!zero || zero->is_contiguous()), "packed weights lie in order");
  }
  int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
};

}  // namespace
