/* Kernels for 8-bit residual floats: declarations shared by the instruction sets. */
#ifndef HF_GG_RF8_H
#define HF_GG_RF8_H

#include <stdint.h>
#include <string.h>

#if !defined(HF_GG_PORTABLE) && (defined(__x86_64__) || defined(__i386__))
#define HF_GG_X86 1
#endif
#if !defined(HF_GG_PORTABLE) && defined(__aarch64__)
#define HF_GG_NEON 1
#endif

#define RF8_MOST_STEPS 8 /* candidates of a scale search */

enum { DTYPE_NONE = 0, DTYPE_F32 = 1, DTYPE_BF16 = 2, DTYPE_F16 = 3 };

enum {
  MODE_PEAK = 0,   /* scale out: largest magnitude of each row */
  MODE_ABSMAX = 1, /* scale and codes out */
  MODE_POW2 = 2,   /* scale and codes out */
  MODE_SEARCH = 3, /* scale and codes out */
  MODE_GIVEN = 4,  /* scale in, codes out */
  MODE_ERRORS = 5  /* scale in (the smallest candidate), squared errors out */
};

/* One format. `value` and `nearest` define it; the rest is derived by hf_gg_rf8_format_init. */
typedef struct {
  float value[256];      /* by code; NaN for a reserved one */
  uint8_t nearest[8192]; /* codes of positive x by (bits(x) - 1) >> 18; the last entry stands for zero */
  float rounded[8192];   /* values of `nearest` */
  float largest;

  uint8_t low[128], high[128]; /* bytes of the bfloat16 magnitudes */

  /* The same from two nibbles, if `nibbles`: low4[c & 15] and high4[c >> 3 & 15]; zero and reserved codes apart.
     If `halves`, the upper byte with its sign is sign4[c >> 4], and low4 is right for zero and reserved codes, too. */
  uint8_t low4[16], high4[16], reserved4[16], sign4[16];
  int32_t nibbles, halves, reserved;
  int32_t integers; /* the value of c < 128 is c */

  /* The same rounding in every octave, if `octaves`: see find_octaves in rf8.c. */
  uint32_t round32[32], code32[32];
  uint32_t zero_bits, small_bits, large_index, small_code;
  int32_t residual_bits, octaves;
} rf8_format;

typedef struct {
  const rf8_format *format;
  const void *x; /* packed rows, see pack_f32 and pack_bf16 in rf8.c */
  int64_t x_row; /* elements from one packed row to the next */
  const uint8_t *codes;
  int64_t code_row;
  const float *scale;
  int64_t scale_row;
  const void *bias;
  int32_t bias_dtype, y_dtype;
  void *y;
  int64_t y_row, m, k;
} rf8_linear_job;

typedef struct {
  const rf8_format *format;
  const uint8_t *codes;
  int64_t code_row;
  const float *scale;
  int64_t scale_batch, scale_row, scale_column;
  void *out;
  int32_t dtype;
  int64_t rows, columns; /* rows of one matrix of the batch */
} rf8_dequantize_job;

/* What an instruction set implements. */
typedef struct {
  int lanes; /* 128-bit lanes of a vector of codes, for the packing of x; 0: x in its natural order */
  /* outputs [begin, end) of every row of x */
  void (*linear_f32)(const rf8_linear_job *job, int64_t begin, int64_t end);
  void (*linear_bf16)(const rf8_linear_job *job, int64_t begin, int64_t end); /* NULL: x is widened to float32 */
  void (*dequantize)(const rf8_dequantize_job *job, int64_t begin, int64_t end);
  /* |w| as float32 into `magnitude`; returns the bits of the largest */
  uint32_t (*magnitudes)(const void *w, int32_t dtype, int64_t columns, float *magnitude);
  /* sums of squared errors for some scales; `magnitude` is followed by zeros up to a multiple of 16 */
  void (*errors)(const rf8_format *format, const float *magnitude, int64_t columns, const float *scale, int steps,
                 double *out);
  void (*encode)(const rf8_format *format, const void *w, int32_t dtype, int64_t columns, float scale, uint8_t *codes);
} rf8_kernels;

extern const rf8_kernels rf8_portable;
#ifdef HF_GG_X86
extern const rf8_kernels rf8_avx2, rf8_avx2_halves, rf8_avx2_integers, rf8_avx512;
#endif
#ifdef HF_GG_NEON
extern const rf8_kernels rf8_neon;
#endif

/* Scales, adds the bias to, rounds and stores a tile of sums, [rows, outs]. */
void rf8_finish(const rf8_linear_job *job, int64_t row, int rows, int64_t n, int outs, const float *sums);

static inline float rf8_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static inline uint32_t rf8_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline float rf8_from_bf16(uint16_t half) { return rf8_from_bits((uint32_t)half << 16); }

static inline uint16_t rf8_to_bf16(float x) {
  uint32_t bits = rf8_to_bits(x);
  if (x != x) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float rf8_from_f16(uint16_t half) {
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = (uint32_t)(half & 0x7fff) << 13;
  if (rest >= 0x0f800000) return rf8_from_bits(sign | (rest + 0x70000000)); /* infinity and NaN: exponent 255 */
  /* 2^112 moves the exponent's bias, and makes subnormals normal */
  return rf8_from_bits(sign | rf8_to_bits(rf8_from_bits(rest) * 0x1p112f));
}

static inline uint16_t rf8_to_f16(float x) {
  uint32_t bits = rf8_to_bits(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more round to infinity */
  if (rest < 0x38800000) /* subnormal: the sum's last place is 2^-24, so the addition rounds */
    return (uint16_t)(sign | (rf8_to_bits(rf8_from_bits(rest) + 0.5f) - 0x3f000000));
  return (uint16_t)(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

static inline float rf8_load(const void *at, int32_t dtype, int64_t index) {
  if (dtype == DTYPE_F32) return ((const float *)at)[index];
  uint16_t half = ((const uint16_t *)at)[index];
  return dtype == DTYPE_BF16 ? rf8_from_bf16(half) : rf8_from_f16(half);
}

static inline void rf8_store(void *at, int32_t dtype, int64_t index, float x) {
  if (dtype == DTYPE_F32)
    ((float *)at)[index] = x;
  else
    ((uint16_t *)at)[index] = dtype == DTYPE_BF16 ? rf8_to_bf16(x) : rf8_to_f16(x);
}

static inline int64_t rf8_size(int32_t dtype) { return dtype == DTYPE_F32 ? 4 : 2; }

static inline uint8_t rf8_nearest(const rf8_format *format, float x) {
  uint32_t bits = rf8_to_bits(x), code = format->nearest[((bits & 0x7fffffff) - 1) >> 18 & 8191];
  return (uint8_t)(code ? code | (bits >> 24 & 0x80) : 0);
}

#endif
