/* The NEON kernel against the plain one, on ARM or in an emulator of it: 0 if they agree. Reads the 256 values and 8192
   nearest codes of a format from standard input. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "rf8.h"

int64_t hf_gg_rf8_isa(void);
int64_t hf_gg_rf8_format_init(void *out, const float *values, const uint8_t *nearest, int64_t residual_bits);
int64_t hf_gg_rf8_linear(const void *format, int64_t isa, int64_t threads, const void *x, int64_t x_row,
                         int64_t x_dtype, const uint8_t *codes, int64_t code_row, const float *scale,
                         int64_t scale_row, const void *bias, int64_t bias_dtype, void *y, int64_t y_row, int64_t m,
                         int64_t n, int64_t k);

int main(int count, char **arguments) {
  static rf8_format format;
  static float values[256], x[17 * 1000], y[17 * 37], plain[17 * 37], scale[37];
  static uint8_t nearest[8192], codes[37 * 1000];
  if (count != 2 || fread(values, 4, 256, stdin) != 256 || fread(nearest, 1, 8192, stdin) != 8192) return 2;
  if (hf_gg_rf8_isa() != 1 || hf_gg_rf8_format_init(&format, values, nearest, atoi(arguments[1]))) return 3;
  const int64_t widths[] = {1, 15, 16, 33, 63, 1000};
  for (int i = 0; i < 6; i++)
    for (int64_t m = 1; m <= 17; m++) {
      int64_t k = widths[i], n = 37;
      for (int64_t j = 0; j < n * k; j++) do codes[j] = (uint8_t)rand(); while (values[codes[j]] != values[codes[j]]);
      for (int64_t j = 0; j < m * k; j++) x[j] = (float)rand() / (float)RAND_MAX - 0.5f;
      for (int64_t j = 0; j < n; j++) scale[j] = (float)(j + 1);
      for (int64_t j = 0; j < m * n; j++) y[j] = NAN;
      hf_gg_rf8_linear(&format, 0, 1, x, k, DTYPE_F32, codes, k, scale, 1, NULL, 0, plain, n, m, n, k);
      hf_gg_rf8_linear(&format, 1, 1, x, k, DTYPE_F32, codes, k, scale, 1, NULL, 0, y, n, m, n, k);
      for (int64_t r = 0; r < m; r++)
        for (int64_t o = 0; o < n; o++) {
          double size = 0;
          for (int64_t j = 0; j < k; j++) size += fabs((double)x[r * k + j] * values[codes[o * k + j]] * scale[o]);
          if (!(fabs((double)y[r * n + o] - plain[r * n + o]) <= 2e-6 * size)) return 4;
        }
    }
  codes[5] = 0x7f; /* reserved where a format has such codes */
  hf_gg_rf8_linear(&format, 1, 1, x, 1000, DTYPE_F32, codes, 1000, scale, 1, NULL, 0, y, 1, 1, 1, 1000);
  return (y[0] != y[0]) == (values[0x7f] != values[0x7f]) ? 0 : 5;
}
