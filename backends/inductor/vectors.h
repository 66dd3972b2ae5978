// Vectors of 8 lanes, as compilers have them on any processor. VECTORS_OF_INTEL: with AVX2's own instructions, unless PLAIN is defined.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) && !defined(PLAIN)
#define VECTORS_OF_INTEL
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 8;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));
typedef uint16_t unsigned_shorts __attribute__((vector_size(4 * LANES)));

template <class V, class T>
inline V load(const T* from) {
  V made;
  std::memcpy(&made, from, sizeof(V));
  return made;
}

inline void store(float* to, floats value) { std::memcpy(to, &value, sizeof(value)); }

inline floats all(float value) { return value - floats{}; }

inline floats size_of(floats x) { return (floats)((words)x & 0x7fffffffu); }

inline floats larger(floats a, floats b) { return a > b ? a : b; }

inline float largest(floats x) {
  x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
  return x[0] > x[1] ? x[0] : x[1];
}

inline float total(floats x) {
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x += __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
  return x[0] + x[1];
}

// How many steps of `nanoseconds` one thread takes while the others wake, by the median of some tries: fewer are not worth a thread.
inline int64_t worth_a_thread(double nanoseconds) {
  static thread_local int threads = 0;
  static thread_local double waking = 0;
  if (threads != at::get_num_threads()) {
    threads = at::get_num_threads();
    double took[21];
    for (double& each : took) {
      const auto begin = std::chrono::steady_clock::now();
      at::parallel_for(0, threads, 1, [](int64_t, int64_t) {});
      each = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count();
    }
    std::nth_element(took, took + 10, took + 21);
    waking = took[10];
  }
  return 1 + static_cast<int64_t>(waking / nanoseconds);
}

}  // namespace
