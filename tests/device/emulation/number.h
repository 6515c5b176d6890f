// Half precision in integer arithmetic, for hosts that have no such type.
#pragma once

#include <cstdint>
#include <cstring>

namespace bsfast::emulation {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = half >> 10 & 31u, fraction = half & 1023u;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
  return float_from_bits(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}

// To the nearest; ties to even.
inline uint16_t half_from_float(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7fffu;   // NaN
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 2^16 and more, infinity
  if (magnitude < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24
    // Adding 0.5 leaves the multiple in the last bits of a float, rounded by the hardware.
    return sign | uint16_t(bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f));
  }
  const uint32_t odd = magnitude >> 13 & 1u;
  return sign | uint16_t((magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

}  // namespace bsfast::emulation
