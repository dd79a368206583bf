/* What the sources in C share. */

#include <stdint.h>
#include <string.h>

#define LOG2_E 1.44269504088896341f
#define LOWEST_POWER (-60.0f * LOG2_E)
#define HIGHEST_POWER 126.0f

/* 2^x for -126 < x < 127, relative error 1e-7: 2^round(x) by its exponent bits, the rest by a polynomial. */
static inline float power_of_two(float x) {
  const float shifter = 12582912.0f; /* 1.5 x 2^23: adding it leaves round(x) in the lowest bits */
  float shifted = x + shifter;
  float rest = x - (shifted - shifter);
  float value = 1.54614447e-4f;
  value = value * rest + 1.34004282e-3f;
  value = value * rest + 9.61805668e-3f;
  value = value * rest + 5.55032723e-2f;
  value = value * rest + 2.40226509e-1f;
  value = value * rest + 6.93147207e-1f;
  value = value * rest + 1.0f;
  int32_t exponent, bits;
  memcpy(&exponent, &shifted, sizeof exponent);
  memcpy(&bits, &value, sizeof bits);
  bits += (int32_t)((uint32_t)exponent << 23);
  memcpy(&value, &bits, sizeof value);
  return value;
}
