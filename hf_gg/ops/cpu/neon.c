/* NEON of 64-bit ARM: linear layers from two 16-entry byte look-ups (`halves`), or converted (`integers`); the rest is
   plain C. */
#include "rf8.h"

#ifdef HF_GG_NEON
#include <arm_neon.h>

#define INLINE static inline __attribute__((always_inline))
#define ROWS 4

typedef struct {
  uint8x16_t low4, high4, reserved4;
} tables;

/* 16 codes to float32, in their order. */
INLINE void decode(const tables *t, uint8x16_t codes, int integers, float32x4_t w[4]) {
  if (integers) {
    int8x16_t magnitude = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(127)));
    int8x16_t values = vbslq_s8(vcltzq_s8(vreinterpretq_s8_u8(codes)), vnegq_s8(magnitude), magnitude);
    int16x8_t a = vmovl_s8(vget_low_s8(values)), b = vmovl_high_s8(values);
    w[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(a)));
    w[1] = vcvtq_f32_s32(vmovl_high_s16(a));
    w[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(b)));
    w[3] = vcvtq_f32_s32(vmovl_high_s16(b));
    return;
  }
  uint8x16_t lower = vandq_u8(codes, vdupq_n_u8(15));
  uint8x16_t low = vqtbl1q_u8(t->low4, lower);
  uint8x16_t high = vandq_u8(vqtbl1q_u8(t->high4, vshrq_n_u8(codes, 4)), vtstq_u8(codes, vdupq_n_u8(127)));
  high = vorrq_u8(high, vqtbl1q_u8(t->reserved4, lower));
  uint16x8_t a = vreinterpretq_u16_u8(vzip1q_u8(low, high)), b = vreinterpretq_u16_u8(vzip2q_u8(low, high));
  w[0] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(a), 16));
  w[1] = vreinterpretq_f32_u32(vshll_high_n_u16(a, 16));
  w[2] = vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(b), 16));
  w[3] = vreinterpretq_f32_u32(vshll_high_n_u16(b, 16));
}

INLINE void step(const rf8_linear_job *job, const tables *t, int integers, const uint8_t *codes, const float *x,
                 int rows, float32x4_t sums[ROWS][4]) {
  float32x4_t w[4];
  decode(t, vld1q_u8(codes), integers, w);
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[r][i] = vfmaq_f32(sums[r][i], w[i], vld1q_f32(x + r * job->x_row + 4 * i));
}

INLINE void tile(const rf8_linear_job *job, const tables *t, int integers, int64_t n, int64_t row, int rows) {
  const uint8_t *codes = job->codes + n * job->code_row;
  const float *x = (const float *)job->x + row * job->x_row;
  float32x4_t sums[ROWS][4];
  float results[ROWS];
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) sums[r][i] = vdupq_n_f32(0.0f);
  int64_t k = 0;
  for (; k + 16 <= job->k; k += 16) step(job, t, integers, codes + k, x + k, rows, sums);
  if (k < job->k) {
    uint8_t last[16] = {0};
    memcpy(last, codes + k, (size_t)(job->k - k));
    step(job, t, integers, last, x + k, rows, sums);
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; r++)
    results[r] = vaddvq_f32(vaddq_f32(vaddq_f32(sums[r][0], sums[r][1]), vaddq_f32(sums[r][2], sums[r][3])));
  rf8_finish(job, row, rows, n, 1, results);
}

INLINE void linear(const rf8_linear_job *job, int integers, int64_t begin, int64_t end) {
  const rf8_format *f = job->format;
  const tables t = {vld1q_u8(f->low4), vld1q_u8(f->sign4), vld1q_u8(f->reserved4)};
  for (int64_t n = begin; n < end; n++)
    for (int64_t row = 0; row < job->m; row += ROWS) switch (job->m - row) {
        case 1: tile(job, &t, integers, n, row, 1); break;
        case 2: tile(job, &t, integers, n, row, 2); break;
        case 3: tile(job, &t, integers, n, row, 3); break;
        default: tile(job, &t, integers, n, row, 4); break;
      }
}

static void linear_f32(const rf8_linear_job *job, int64_t begin, int64_t end) {
  if (job->format->halves)
    linear(job, 0, begin, end);
  else if (job->format->integers)
    linear(job, 1, begin, end);
  else
    rf8_portable.linear_f32(job, begin, end);
}

static void dequantize(const rf8_dequantize_job *job, int64_t begin, int64_t end) {
  rf8_portable.dequantize(job, begin, end);
}

static uint32_t magnitudes(const void *w, int32_t dtype, int64_t columns, float *magnitude) {
  return rf8_portable.magnitudes(w, dtype, columns, magnitude);
}

static void errors(const rf8_format *format, const float *magnitude, int64_t columns, const float *scale, int steps,
                   double *out) {
  rf8_portable.errors(format, magnitude, columns, scale, steps, out);
}

static void encode(const rf8_format *format, const void *w, int32_t dtype, int64_t columns, float scale,
                   uint8_t *codes) {
  rf8_portable.encode(format, w, dtype, columns, scale, codes);
}

const rf8_kernels rf8_neon = {
    .lanes = 0,
    .linear_f32 = linear_f32,
    .linear_bf16 = NULL,
    .dequantize = dequantize,
    .magnitudes = magnitudes,
    .errors = errors,
    .encode = encode,
};
#endif
