// How tensor cores add, as measured by Fasi et al. (PeerJ Computer Science 7:e330) and by Khattak
// and Mikaitis (arXiv 2512.07004). The terms are the accumulator and a block of products: 8 before
// Hopper, 16 on Hopper. All terms are aligned to the largest one and have two bits more than a
// float32. Lower bits of the terms and of their sum are truncated; nothing is rounded.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

inline uint64_t bits_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}

inline double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

inline float truncate(double x) {
  const uint64_t bits = bits_of(x) & ~((uint64_t{1} << 29) - 1);
  std::memcpy(&x, &bits, 8);
  return static_cast<float>(x);
}

// c plus BLOCK products; product(k) returns the one with index k.
template <int BLOCK, typename Product>
float add_block(float c, Product product) {
  constexpr int EXTRA_BITS = 2, NOT_FINITE = 0x7FF;
  double terms[BLOCK + 1];
  int largest = 0;
  for (int k = 0; k <= BLOCK; ++k) {
    terms[k] = k < BLOCK ? product(k) : static_cast<double>(c);
    const int exponent = static_cast<int>(bits_of(terms[k]) >> 52 & NOT_FINITE);
    largest = exponent > largest ? exponent : largest;
  }
  double sum = 0;
  if (largest == 0 || largest == NOT_FINITE) {
    for (double term : terms) sum += term;
    return static_cast<float>(sum);
  }
  const int unit = largest - 1023 - 23 - EXTRA_BITS;
  const double units = power_of_two(-unit);
  int64_t count = 0;
  for (double term : terms) count += static_cast<int64_t>(term * units);
  return truncate(static_cast<double>(count) * power_of_two(unit));
}

// c plus the 16 products of one instruction.
template <int BLOCK, typename Product>
float add_products(float c, Product product) {
  for (int first = 0; first < 16; first += BLOCK) {
    c = add_block<BLOCK>(c, [&](int k) { return product(first + k); });
  }
  return c;
}

}  // namespace emulator
