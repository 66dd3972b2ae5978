// Products of x in int8: each block of a row of x is rounded to bytes, and what that left again where it matters; codes of 2 and 4 bits
// are multiplied as bytes (vpdpbusd, or vpmaddubsw and widened before 16 bits overflow), exactly.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "panels.h"

namespace {

// x as the codes lie in bytes, 4 to a word, in blocks of 32 numbers or what is left of a group. The first term of a block is x rounded
// to 127 steps of its largest value, the second what that left, rounded to steps a 254th as large. It is there if the step is more than
// `LARGE` of the root mean square of its row: without it no row errs by more than 1 % of itself.
struct Rounded {
  int64_t blocks = 0;
  std::vector<int32_t> words;  // [m, blocks, 2, words of a block, 8/bits]
  std::vector<float> steps;    // [m, blocks, 2], 0 for a term that is not there
  std::vector<uint8_t> two;    // [m, blocks], whether the second is there: `steps` say it too, but the loop over rows asks this in one load
  std::vector<float> sums;     // [m, groups], of what x was rounded to
};

constexpr float LARGE = 4.0f / 127.0f;
constexpr int NEAR = 2;  // panels that rows of x are multiplied by while both lie in the first cache

template <int BITS>
struct Block {
  static constexpr int parts = 8 / BITS, words = 8 / parts, length = words * parts, codes = 32;  // their products fit 16 bits: 8 * 2 * 15 * 127 < 2^15
  static int64_t of(const Weight& w) { return (w.held + words - 1) / words; }  // in one group
};

// 32 numbers of one byte each, in the order of the codes.
template <int BITS>
inline void store_bytes(const ints (&each)[4], int32_t* out) {
#ifdef VECTORS_OF_INTEL
  const __m256i halves[] = {_mm256_packs_epi32((__m256i)each[0], (__m256i)each[1]), _mm256_packs_epi32((__m256i)each[2], (__m256i)each[3])};
  const __m256i mixed = _mm256_packs_epi16(halves[0], halves[1]);  // four of each, and the other four of each
  const __m256i made = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m128i order = BITS == 4 ? _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)
                                  : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_shuffle_epi8(made, _mm256_broadcastsi128_si256(order)));
#else
  auto* to = reinterpret_cast<int8_t*>(out);
  constexpr int parts = 8 / BITS, whole = 4 * parts;
  for (int k = 0; k < 4 * LANES; k++) to[k / whole * whole + k % parts * 4 + k % whole / parts] = static_cast<int8_t>(each[k / LANES][k % LANES]);
#endif
}

// Rounds `block` to multiples of `step`, as bytes in the order of the codes, and leaves the rest in it; what it was rounded to is added
// to `sum`.
template <int BITS>
inline void round_block(floats (&block)[4], float step, int32_t* out, floats& sum) {
  const floats shift = all(12582912.0f), inverse = all(step > 1e-37f ? 1.0f / step : 0.0f);  // adding 1.5 * 2^23 rounds to an integer
  floats whole = {};
  ints each[4];
  for (int v = 0; v < 4; v++) {
    const floats steps = (block[v] * inverse + shift) - shift;
    block[v] -= steps * all(step);
    whole += steps;
    each[v] = __builtin_convertvector(steps, ints);
  }
  sum += whole * all(step);
  store_bytes<BITS>(each, out);
}

float root_mean_square(const float* x, int64_t count) {
  floats sums[4] = {};  // that do not wait for each other
  int64_t k = 0;
  for (; k + 4 * LANES <= count; k += 4 * LANES)
    for (int i = 0; i < 4; i++) sums[i] += load<floats>(x + k + i * LANES) * load<floats>(x + k + i * LANES);
  floats sum = sums[0] + sums[1] + (sums[2] + sums[3]);
  for (; k + LANES <= count; k += LANES) sum += load<floats>(x + k) * load<floats>(x + k);
  float square = total(sum);
  for (; k < count; k++) square += x[k] * x[k];
  if (std::isfinite(square)) return std::sqrt(square / count);
  const double exact = std::accumulate(x, x + count, 0.0, [](double sum, double v) { return sum + v * v; });
  return static_cast<float>(std::sqrt(exact / count));
}

template <int BITS>
void round_row(const float* x, int64_t row, const Weight& w, Rounded& made) {
  using B = Block<BITS>;
  const float size = root_mean_square(x, w.columns), large = LARGE * size;
  const float unknown = std::isfinite(size) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  int32_t* out = made.words.data() + row * made.blocks * 2 * B::length;
  float* steps = made.steps.data() + row * made.blocks * 2;
  uint8_t* two = made.two.data() + row * made.blocks;
  for (int64_t g = 0, start = 0; g < w.groups; g++, start += w.group) {
    const int64_t end = std::min(start + w.group, w.columns);
    floats sum = {};
    for (int64_t i = 0, at = start; i < B::of(w); i++, at += B::codes, out += 2 * B::length, steps += 2, two++) {
      floats block[4] = {};
      if (at + B::codes <= end)
        for (int v = 0; v < 4; v++) block[v] = load<floats>(x + at + v * LANES);
      else if (at < end)
        std::memcpy(block, x + at, (end - at) * sizeof(float));
      floats most = size_of(block[0]);
      for (int v = 1; v < 4; v++) most = larger(most, size_of(block[v]));
      steps[0] = largest(most) / 127.0f + unknown;
      steps[1] = steps[0] > large ? steps[0] / 254.0f : 0.0f;
      *two = steps[1] != 0.0f;
      round_block<BITS>(block, steps[0], out, sum);
      if (*two) round_block<BITS>(block, steps[1], out + B::length, sum);
    }
    made.sums[row * w.groups + g] = total(sum);
  }
}

// Into a room of this thread's, which its next call takes again.
template <int BITS>
const Rounded& round_rows(const float* x, int64_t m, const Weight& w) {
  using B = Block<BITS>;
  static thread_local Rounded made;
  if (made.words.capacity() > 1 << 18) made = Rounded();  // what a long text took is given back
  const int64_t blocks = made.blocks = w.groups * B::of(w);
  made.words.resize(m * blocks * 2 * B::length);
  made.steps.resize(m * blocks * 2);
  made.two.resize(m * blocks);
  made.sums.resize(m * w.groups);
  at::parallel_for(0, m, worth_a_thread(0.5 * w.columns), [&, made = &made](int64_t row, int64_t end) {
    for (; row < end; row++) round_row<BITS>(x + row * w.columns, row, w, *made);
  });
  return made;
}

// Vectors of products are twice as wide where the processor has VNNI, unless WITHOUT_VNNI is defined: half of a panel then is one
// vector, and four rows by it leave registers free, which compilers spill four rows by two vectors for.
#if defined(VECTORS_OF_INTEL) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(WITHOUT_VNNI)
#define VNNI
constexpr int WIDE = 2 * LANES;
#else
constexpr int WIDE = LANES;
#endif
constexpr int WIDES = PANEL / WIDE, HALF = WIDES / 2;
typedef float wide_floats __attribute__((vector_size(4 * WIDE)));
typedef int32_t wide_ints __attribute__((vector_size(4 * WIDE)));
typedef uint32_t wide_words __attribute__((vector_size(4 * WIDE)));
typedef int16_t wide_shorts __attribute__((vector_size(4 * WIDE)));
typedef uint16_t wide_unsigned_shorts __attribute__((vector_size(4 * WIDE)));

inline wide_floats wide(const Grid& grid, int64_t row, int vector) {
#ifdef VNNI
  return __builtin_shufflevector(grid(row, 2 * vector), grid(row, 2 * vector + 1), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  return grid(row, vector);
#endif
}

// sum + bytes of a, 0 to 15, by bytes of b, added by twos or by fours (VNNI); and a sum of them by fours.
#ifdef VNNI
typedef wide_ints Sum;
inline Sum add_products(Sum sum, wide_words a, wide_words b) { return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b); }
inline wide_ints by_fours(Sum sum) { return sum; }
#elif defined(VECTORS_OF_INTEL)
typedef wide_shorts Sum;
inline Sum add_products(Sum sum, wide_words a, wide_words b) { return sum + (wide_shorts)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
inline wide_ints by_fours(Sum sum) { return (wide_ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)); }
#else
typedef wide_shorts Sum;
inline Sum add_products(Sum sum, wide_words a, wide_words b) {
  const wide_shorts codes = (wide_shorts)a, x = (wide_shorts)b;
  return sum + (codes & 255) * ((x << 8) >> 8) + (codes >> 8) * (x >> 8);
}
inline wide_ints by_fours(Sum sum) { return (((wide_ints)sum << 16) >> 16) + ((wide_ints)sum >> 16); }
#endif

// sum [M][V] += T terms, from number `first` on, of block `at` of M rows of x, by the weights' `held` words from `codes` on.
template <int BITS, int M, int V, int T>
inline void add_block(const int32_t* codes, int64_t held, const Rounded& x, int64_t at, int64_t first, wide_floats (&sum)[M][V]) {
  using B = Block<BITS>;
  const int32_t* given = x.words.data() + (2 * at + first) * B::length;
  const float* steps = x.steps.data() + 2 * at + first;
  const int64_t row = 2 * x.blocks;
  Sum narrow[M][T][V] = {};
#pragma GCC unroll 1  // or a compiler hoists more than there are registers
  for (int64_t i = 0; i < held; i++, codes += PANEL, given += B::parts) {
    wide_words word[V];
    for (int v = 0; v < V; v++) word[v] = load<wide_words>(codes + v * WIDE);
#pragma GCC unroll 4
    for (int part = 0; part < B::parts; part++) {
      wide_words code[V];
      for (int v = 0; v < V; v++) code[v] = (wide_words)((wide_unsigned_shorts)word[v] >> (BITS * part)) & (((1u << BITS) - 1) * 0x01010101u);
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) {
          const wide_words each = (uint32_t)given[(m * row + t) * B::length + part] - wide_words{};
          for (int v = 0; v < V; v++) narrow[m][t][v] = add_products(narrow[m][t][v], code[v], each);
        }
    }
  }
  for (int m = 0; m < M; m++)
    for (int t = 0; t < T; t++)
      for (int v = 0; v < V; v++) sum[m][v] += __builtin_convertvector(by_fours(narrow[m][t][v]), wide_floats) * (steps[m * row + t] - wide_floats{});
}

// V vectors of a panel's rows by M rows of x in int8, from `row` on: out [M, 32].
template <int BITS, int M, int V>
void few_int8(const Weight& w, int64_t panel, int first, const Rounded& x, int64_t row, float* out) {
  using B = Block<BITS>;
  const int32_t* codes = w.codes + panel * w.groups * w.held * PANEL + first * WIDE;
  wide_floats total[M][V] = {};
  for (int64_t g = 0, at = row * x.blocks; g < w.groups; g++) {
    wide_floats sum[M][V] = {};
    for (int64_t i = 0; i < w.held; i += B::words, at++) {
      const int64_t held = std::min<int64_t>(B::words, w.held - i);
      if (V == WIDES)
        for (int line = 0; line < 2 * B::words; line++) __builtin_prefetch(codes + AHEAD + line * (PANEL / 2));
      uint8_t two = 0;
      for (int m = 0; m < M; m++) two |= x.two[at + m * x.blocks];
      if (M == 1 && two) {
        add_block<BITS, M, V, 2>(codes, held, x, at, 0, sum);
      } else {
        add_block<BITS, M, V, 1>(codes, held, x, at, 0, sum);
        if (two) add_block<BITS, M, V, 1>(codes, held, x, at, 1, sum);
      }
      codes += held * PANEL;
    }
    for (int v = 0; v < V; v++) {
      const wide_floats scale = wide(w.scale, panel * w.groups + g, first + v), zero = wide(w.zero, panel * w.groups + g, first + v);
      for (int m = 0; m < M; m++) total[m][v] += scale * (sum[m][v] - zero * x.sums[(row + m) * w.groups + g]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) std::memcpy(out + m * PANEL + (first + v) * WIDE, &total[m][v], sizeof(wide_floats));
}

template <int BITS>
void rows_int8(const Weight& w, const float* x, int64_t rows, const float* bias, float* out) {
  const Rounded& given = round_rows<BITS>(x, rows, w);
  const int64_t grain = worth_a_thread(0.02 * PANEL * w.columns * rows);
  at::parallel_for(0, w.panels(), grain, [&](int64_t first, int64_t last) {
    for (int64_t begin = first; begin < last; begin += NEAR)
      for (int64_t row = 0; row < rows; row += 4)
        for (int64_t panel = begin; panel < std::min(last, begin + NEAR); panel++) {
          const int64_t count = std::min<int64_t>(4, rows - row);
          float made[4 * PANEL];
          const auto halves = [&](auto m) {
            for (int half = 0; half < WIDES; half += HALF) few_int8<BITS, m, HALF>(w, panel, half, given, row, made);
          };
          if (count == 1) few_int8<BITS, 1, WIDES>(w, panel, 0, given, row, made);
          if (count == 2) halves(std::integral_constant<int, 2>{});
          if (count == 3) halves(std::integral_constant<int, 3>{});
          if (count == 4) halves(std::integral_constant<int, 4>{});
          const int64_t place = panel * PANEL, width = std::min<int64_t>(PANEL, w.rows - place);
          for (int64_t m = 0; m < count; m++)
            for (int64_t n = 0; n < width; n++)
              out[(row + m) * w.rows + place + n] = made[m * PANEL + n] + (bias ? bias[place + n] : 0.0f);
        }
  });
}

}  // namespace
