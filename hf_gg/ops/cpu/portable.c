/* Plain C, for every machine: tables, and loops that a compiler can vectorize. */
#include "rf8.h"

#define BLOCK 64
#define ROWS 4 /* rows of x that share a decoded block */

static void linear_rows(const rf8_linear_job *job, int64_t n, int64_t row, int rows) {
  const uint8_t *codes = job->codes + n * job->code_row;
  const float *x = (const float *)job->x + row * job->x_row;
  float sums[ROWS][16] = {{0}}, w[BLOCK];
  for (int64_t k = 0; k < job->k; k += BLOCK) {
    int64_t count = job->k - k < BLOCK ? job->k - k : BLOCK;
    for (int64_t i = 0; i < count; i++) w[i] = job->format->value[codes[k + i]];
    for (int64_t i = count; i < BLOCK; i++) w[i] = 0.0f;
    for (int r = 0; r < rows; r++)
      for (int i = 0; i < BLOCK; i += 16)
        for (int j = 0; j < 16; j++) sums[r][j] += w[i + j] * x[r * job->x_row + k + i + j];
  }
  for (int r = 0; r < rows; r++) {
    float sum = 0.0f;
    for (int j = 0; j < 16; j++) sum += sums[r][j];
    rf8_finish(job, row + r, 1, n, 1, &sum);
  }
}

static void linear_f32(const rf8_linear_job *job, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n++)
    for (int64_t row = 0; row < job->m; row += ROWS)
      linear_rows(job, n, row, (int)(job->m - row < ROWS ? job->m - row : ROWS));
}

static void dequantize(const rf8_dequantize_job *job, int64_t begin, int64_t end) {
  int64_t columns = job->columns;
  for (int64_t r = begin; r < end; r++) {
    const uint8_t *codes = job->codes + r * job->code_row;
    const float *scale = job->scale + r / job->rows * job->scale_batch + r % job->rows * job->scale_row;
    void *out = (char *)job->out + r * columns * rf8_size(job->dtype);
    if (job->scale_column == 0 && columns >= 512) { /* a table of the row's 256 values pays */
      uint16_t half[256];
      float single[256];
      for (int c = 0; c < 256; c++) {
        single[c] = job->format->value[c] * *scale;
        if (job->dtype != DTYPE_F32) rf8_store(half, job->dtype, c, single[c]);
      }
      if (job->dtype == DTYPE_F32)
        for (int64_t i = 0; i < columns; i++) ((float *)out)[i] = single[codes[i]];
      else
        for (int64_t i = 0; i < columns; i++) ((uint16_t *)out)[i] = half[codes[i]];
    } else {
      for (int64_t i = 0; i < columns; i++)
        rf8_store(out, job->dtype, i, job->format->value[codes[i]] * scale[i * job->scale_column]);
    }
  }
}

static uint32_t magnitudes(const void *w, int32_t dtype, int64_t columns, float *magnitude) {
  uint32_t peak = 0;
  for (int64_t i = 0; i < columns; i++) {
    uint32_t bits = rf8_to_bits(rf8_load(w, dtype, i)) & 0x7fffffff;
    magnitude[i] = rf8_from_bits(bits);
    peak = bits > peak ? bits : peak;
  }
  return peak;
}

static void errors(const rf8_format *format, const float *magnitude, int64_t columns, const float *scale, int steps,
                   double *out) {
  double sums[RF8_MOST_STEPS] = {0};
  for (int64_t i = 0; i < columns; i++)
    for (int j = 0; j < steps; j++) {
      uint32_t index = (rf8_to_bits(magnitude[i] / scale[j]) - 1) >> 18 & 8191;
      float error = format->rounded[index] * scale[j] - magnitude[i];
      error *= error;
      sums[j] += (double)error;
    }
  memcpy(out, sums, (size_t)steps * sizeof(double));
}

static void encode(const rf8_format *format, const void *w, int32_t dtype, int64_t columns, float scale,
                   uint8_t *codes) {
  for (int64_t i = 0; i < columns; i++) codes[i] = rf8_nearest(format, rf8_load(w, dtype, i) / scale);
}

const rf8_kernels rf8_portable = {
    .lanes = 0,
    .linear_f32 = linear_f32,
    .linear_bf16 = NULL,
    .dequantize = dequantize,
    .magnitudes = magnitudes,
    .errors = errors,
    .encode = encode,
};
