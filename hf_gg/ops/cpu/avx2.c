/* AVX2 with FMA and F16C: values from two 16-entry byte shuffles (`nibbles`, `halves`), or converted (`integers`). */
#include "rf8.h"

#ifdef HF_GG_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline))

/* How a format is decoded, fixed when a kernel is compiled: see rf8_format. */
enum { NIBBLES, HALVES, HALVES_RESERVED, INTEGERS };

typedef struct {
  __m256i low4, high4, reserved4;
} tables;

TARGET INLINE __m256i both_lanes(const uint8_t *table) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)table));
}

TARGET INLINE tables load_tables(const rf8_format *f, int how) {
  return (tables){both_lanes(f->low4), both_lanes(how == NIBBLES ? f->high4 : f->sign4), both_lanes(f->reserved4)};
}

TARGET INLINE __m256i load_codes(const uint8_t *codes) {
  return _mm256_loadu_si256((const __m256i *)(const void *)codes);
}

/* 32 codes to bfloat16: per 128-bit lane, `a` holds the values of its first 8 codes, `b` those of its last 8. */
TARGET INLINE void decode(const tables *t, __m256i codes, int how, __m256i *a, __m256i *b) {
  if (how != NIBBLES) {
    /* a shuffle takes the low nibble of an index that is not negative; `sign` gives zero for a magnitude of zero */
    __m256i magnitude = _mm256_and_si256(codes, _mm256_set1_epi8(127));
    __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15));
    __m256i low = _mm256_shuffle_epi8(t->low4, magnitude);
    __m256i high = _mm256_sign_epi8(_mm256_shuffle_epi8(t->high4, upper), magnitude);
    if (how == HALVES_RESERVED) high = _mm256_or_si256(high, _mm256_shuffle_epi8(t->reserved4, magnitude));
    *a = _mm256_unpacklo_epi8(low, high);
    *b = _mm256_unpackhi_epi8(low, high);
    return;
  }
  const __m256i nibble = _mm256_set1_epi8(15), sign = _mm256_set1_epi8((char)0x80);
  __m256i residual = _mm256_and_si256(codes, nibble);
  __m256i exponent = _mm256_and_si256(_mm256_srli_epi16(codes, 3), nibble);
  __m256i reserved = _mm256_shuffle_epi8(t->reserved4, residual);
  __m256i low = _mm256_shuffle_epi8(t->low4, residual);
  __m256i high = _mm256_or_si256(_mm256_shuffle_epi8(t->high4, exponent), _mm256_and_si256(codes, sign));
  __m256i zero = _mm256_cmpeq_epi8(_mm256_andnot_si256(sign, codes), _mm256_setzero_si256());
  low = _mm256_or_si256(_mm256_andnot_si256(zero, low), reserved);
  high = _mm256_or_si256(_mm256_andnot_si256(zero, high), reserved);
  *a = _mm256_unpacklo_epi8(low, high);
  *b = _mm256_unpackhi_epi8(low, high);
}

/* 32 sign-magnitude codes to two's complement. */
TARGET INLINE __m256i signed_bytes(__m256i codes) {
  return _mm256_sign_epi8(_mm256_and_si256(codes, _mm256_set1_epi8(127)), _mm256_or_si256(codes, _mm256_set1_epi8(1)));
}

/* --- linear --- */

/* 32 codes to float32 in the order of the packed x: per half of a 128-bit lane, the even, then the odd ones. */
TARGET INLINE void packed_floats(const tables *t, __m256i codes, int how, __m256 w[4]) {
  __m256i a, b;
  if (how == INTEGERS) {
    __m256i values = signed_bytes(codes);
    a = _mm256_unpacklo_epi8(values, values);
    b = _mm256_unpackhi_epi8(values, values);
    w[0] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 16), 24));
    w[1] = _mm256_cvtepi32_ps(_mm256_srai_epi32(a, 24));
    w[2] = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(b, 16), 24));
    w[3] = _mm256_cvtepi32_ps(_mm256_srai_epi32(b, 24));
  } else {
    const __m256i odd = _mm256_set1_epi32((int)0xffff0000);
    decode(t, codes, how, &a, &b);
    w[0] = _mm256_castsi256_ps(_mm256_slli_epi32(a, 16));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(a, odd));
    w[2] = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
    w[3] = _mm256_castsi256_ps(_mm256_and_si256(b, odd));
  }
}

/* Sums of a tile: one or two rows of x have four for each output, so that an addition need not wait for the one before;
   more rows take two outputs at once. */
#define SUMS 8
/* Bytes by which codes are fetched ahead: what the processor does by itself ends at a page. */
#define AHEAD 2048
/* Outputs between two blocks of rows of x: so many codes stay in the second cache. */
#define STRIP 32

TARGET INLINE void step(const rf8_linear_job *job, const tables *t, int how, const uint8_t *codes, int64_t code_row,
                        const float *x, int rows, int outs, __m256 sums[SUMS]) {
  const int chains = rows > 2 ? 1 : 4;
#pragma GCC unroll 2
  for (int o = 0; o < outs; o++) {
    __m256 w[4];
    packed_floats(t, load_codes(codes + o * code_row), how, w);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        __m256 *sum = sums + (o * rows + r) * chains + i % chains;
        *sum = _mm256_fmadd_ps(_mm256_loadu_ps(x + r * job->x_row + 8 * i), w[i], *sum);
      }
  }
}

TARGET INLINE float add_lanes(__m256 x) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* The sums of `outs` outputs for `rows` rows of x, at results[r * stride + o]. One or two rows take outputs one after the
   other: their codes side by side were slower, up to twice where they are 4,096 bytes apart. */
TARGET INLINE void tile(const rf8_linear_job *job, const tables *t, int how, int64_t n, int64_t row, int rows, int outs,
                        float *results, int stride) {
  const int chains = rows > 2 ? 1 : 4;
  const uint8_t *codes = job->codes + n * job->code_row;
  const float *x = (const float *)job->x + row * job->x_row;
  __m256 sums[SUMS];
#pragma GCC unroll 8
  for (int i = 0; i < rows * outs * chains; i++) sums[i] = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + 32 <= job->k; k += 32) {
#pragma GCC unroll 2
    for (int o = 0; o < outs; o++) _mm_prefetch((const char *)codes + o * job->code_row + k + AHEAD, _MM_HINT_T0);
    step(job, t, how, codes + k, job->code_row, x + k, rows, outs, sums);
  }
  if (k < job->k) {
    uint8_t last[2][32] = {{0}};
    for (int o = 0; o < outs; o++) memcpy(last[o], codes + o * job->code_row + k, (size_t)(job->k - k));
    step(job, t, how, last[0], 32, x + k, rows, outs, sums);
  }
#pragma GCC unroll 2
  for (int o = 0; o < outs; o++)
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
      __m256 *sum = sums + (o * rows + r) * chains, all = sum[0];
      if (chains > 1) all = _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
      results[r * stride + o] = add_lanes(all);
    }
}

TARGET INLINE void strip(const rf8_linear_job *job, const tables *t, int how, int64_t n, int outs, int64_t row,
                         int rows) {
  float results[4 * STRIP];
  int o = 0;
  if (rows > 2)
    for (; o + 2 <= outs; o += 2) tile(job, t, how, n + o, row, rows, 2, results + o, outs);
  for (; o < outs; o++) tile(job, t, how, n + o, row, rows, 1, results + o, outs);
  rf8_finish(job, row, rows, n, outs, results);
}

TARGET INLINE void linear(const rf8_linear_job *job, int how, int64_t begin, int64_t end) {
  const tables t = load_tables(job->format, how);
  for (int64_t n = begin; n < end; n += STRIP) {
    int outs = end - n < STRIP ? (int)(end - n) : STRIP;
    for (int64_t row = 0; row < job->m; row += 4) switch (job->m - row) {
        case 1: strip(job, &t, how, n, outs, row, 1); break;
        case 2: strip(job, &t, how, n, outs, row, 2); break;
        case 3: strip(job, &t, how, n, outs, row, 3); break;
        default: strip(job, &t, how, n, outs, row, 4); break;
      }
  }
}

TARGET static void linear_nibbles(const rf8_linear_job *job, int64_t begin, int64_t end) {
  linear(job, NIBBLES, begin, end);
}

TARGET static void linear_halves(const rf8_linear_job *job, int64_t begin, int64_t end) {
  if (job->format->reserved)
    linear(job, HALVES_RESERVED, begin, end);
  else
    linear(job, HALVES, begin, end);
}

TARGET static void linear_integers(const rf8_linear_job *job, int64_t begin, int64_t end) {
  linear(job, INTEGERS, begin, end);
}

/* --- dequantize --- */

TARGET INLINE __m256i round_bf16(__m256 x) {
  __m256i bits = _mm256_castps_si256(x), last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
  __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  sum = _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(nan));
  return _mm256_srli_epi32(sum, 16);
}

/* 32 codes to float32 in their natural order. */
TARGET INLINE void ordered_floats(const tables *t, __m256i codes, int how, __m256 w[4]) {
  if (how == INTEGERS) {
    __m256i values = signed_bytes(codes);
    __m128i low = _mm256_castsi256_si128(values), high = _mm256_extracti128_si256(values, 1);
    w[0] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low));
    w[1] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(low, 8)));
    w[2] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high));
    w[3] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(high, 8)));
  } else {
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), zero = _mm256_setzero_si256();
    __m256i a, b;
    decode(t, _mm256_permutevar8x32_epi32(codes, order), how, &a, &b);
    w[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, a));
    w[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, a));
    w[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, b));
    w[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, b));
  }
}

TARGET INLINE void dequantize_block(const rf8_dequantize_job *job, const tables *t, int how, const uint8_t *codes,
                                    const float *scale, void *out) {
  __m256 w[4], y[4];
  ordered_floats(t, load_codes(codes), how, w);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m256 s = job->scale_column ? _mm256_loadu_ps(scale + 8 * i) : _mm256_set1_ps(*scale);
    y[i] = _mm256_mul_ps(w[i], s);
  }
  if (job->dtype == DTYPE_F32) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm256_storeu_ps((float *)out + 8 * i, y[i]);
  } else if (job->dtype == DTYPE_BF16) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      __m256i pair = _mm256_packus_epi32(round_bf16(y[2 * i]), round_bf16(y[2 * i + 1]));
      _mm256_storeu_si256((__m256i *)out + i, _mm256_permute4x64_epi64(pair, 0xd8));
    }
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) _mm_storeu_si128((__m128i *)out + i, _mm256_cvtps_ph(y[i], _MM_FROUND_TO_NEAREST_INT));
  }
}

TARGET INLINE void dequantize_rows(const rf8_dequantize_job *job, int how, int64_t begin, int64_t end) {
  const tables t = load_tables(job->format, how);
  int64_t size = rf8_size(job->dtype);
  for (int64_t r = begin; r < end; r++) {
    const uint8_t *codes = job->codes + r * job->code_row;
    const float *scale = job->scale + r / job->rows * job->scale_batch + r % job->rows * job->scale_row;
    char *out = (char *)job->out + r * job->columns * size;
    int64_t i = 0;
    for (; i + 32 <= job->columns; i += 32)
      dequantize_block(job, &t, how, codes + i, scale + i * job->scale_column, out + i * size);
    for (; i < job->columns; i++)
      rf8_store(out, job->dtype, i, job->format->value[codes[i]] * scale[i * job->scale_column]);
  }
}

TARGET static void dequantize_nibbles(const rf8_dequantize_job *job, int64_t begin, int64_t end) {
  dequantize_rows(job, NIBBLES, begin, end);
}

TARGET static void dequantize_halves(const rf8_dequantize_job *job, int64_t begin, int64_t end) {
  dequantize_rows(job, HALVES_RESERVED, begin, end);
}

TARGET static void dequantize_integers(const rf8_dequantize_job *job, int64_t begin, int64_t end) {
  dequantize_rows(job, INTEGERS, begin, end);
}

/* --- quantize --- */

TARGET INLINE __m256 load_weights(const void *w, int32_t dtype, int64_t i) {
  if (dtype == DTYPE_F32) return _mm256_loadu_ps((const float *)w + i);
  __m128i half = _mm_loadu_si128((const __m128i *)(const void *)((const uint16_t *)w + i));
  if (dtype == DTYPE_F16) return _mm256_cvtph_ps(half);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

TARGET static uint32_t magnitudes(const void *w, int32_t dtype, int64_t columns, float *magnitude) {
  __m256i peaks = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= columns; i += 8) {
    __m256i bits = _mm256_castps_si256(load_weights(w, dtype, i));
    bits = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
    _mm256_storeu_si256((__m256i *)(void *)(magnitude + i), bits);
    peaks = _mm256_max_epu32(peaks, bits);
  }
  uint32_t lanes[8], peak = 0;
  _mm256_storeu_si256((__m256i *)(void *)lanes, peaks);
  for (int j = 0; j < 8; j++) peak = lanes[j] > peak ? lanes[j] : peak;
  for (; i < columns; i++) {
    uint32_t bits = rf8_to_bits(rf8_load(w, dtype, i)) & 0x7fffffff;
    magnitude[i] = rf8_from_bits(bits);
    peak = bits > peak ? bits : peak;
  }
  return peak;
}

/* Entry (index >> 18) & 31 of a table of bytes, in 32-bit lanes. */
TARGET INLINE __m256i look_up(__m256i first, __m256i second, __m256i index) {
  __m256i entry = _mm256_and_si256(_mm256_srli_epi32(index, 18), _mm256_set1_epi32(31));
  __m256i upper = _mm256_cmpgt_epi32(entry, _mm256_set1_epi32(15));
  entry = _mm256_or_si256(entry, _mm256_set1_epi32((int)0x80808000)); /* the other bytes give zero */
  return _mm256_blendv_epi8(_mm256_shuffle_epi8(first, entry), _mm256_shuffle_epi8(second, entry), upper);
}

/* `count` candidates in one walk over the row. `table` holds the sixteenths of the rounded mantissas. */
TARGET INLINE void walk(const rf8_format *f, const uint8_t *table, const float *magnitude, int64_t columns,
                        const float *scale, int count, double *out) {
  const __m256i first = both_lanes(table), second = both_lanes(table + 16);
  const __m256i one = _mm256_set1_epi32(1), exponent = _mm256_set1_epi32((int)0xff800000);
  const __m256i large = _mm256_set1_epi32((int)f->large_index), small = _mm256_set1_epi32((int)f->small_bits);
  const __m256i zero = _mm256_set1_epi32((int)f->zero_bits);
  __m256d sums[2][2];
#pragma GCC unroll 2
  for (int c = 0; c < count; c++) sums[c][0] = sums[c][1] = _mm256_setzero_pd();
  for (int64_t i = 0; i < columns; i += 8) {
    __m256 w = _mm256_loadu_ps(magnitude + i);
#pragma GCC unroll 2
    for (int c = 0; c < count; c++) {
      __m256 s = _mm256_set1_ps(scale[c]);
      __m256i bits = _mm256_castps_si256(_mm256_div_ps(w, s));
      __m256i index = _mm256_min_epu32(_mm256_sub_epi32(bits, one), large);
      __m256i q = _mm256_slli_epi32(look_up(first, second, index), 19);
      q = _mm256_max_epu32(_mm256_add_epi32(q, _mm256_and_si256(index, exponent)), small);
      q = _mm256_and_si256(q, _mm256_cmpgt_epi32(bits, zero));
      __m256 error = _mm256_sub_ps(_mm256_mul_ps(_mm256_castsi256_ps(q), s), w);
      error = _mm256_mul_ps(error, error);
      sums[c][0] = _mm256_add_pd(sums[c][0], _mm256_cvtps_pd(_mm256_castps256_ps128(error)));
      sums[c][1] = _mm256_add_pd(sums[c][1], _mm256_cvtps_pd(_mm256_extractf128_ps(error, 1)));
    }
  }
  for (int c = 0; c < count; c++) {
    double lanes[4];
    _mm256_storeu_pd(lanes, _mm256_add_pd(sums[c][0], sums[c][1]));
    out[c] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
}

TARGET static void errors(const rf8_format *f, const float *magnitude, int64_t columns, const float *scale, int steps,
                          double *out) {
  if (!f->octaves) {
    rf8_portable.errors(f, magnitude, columns, scale, steps, out);
    return;
  }
  uint8_t table[32];
  for (int i = 0; i < 32; i++) table[i] = (uint8_t)(f->round32[i] >> 19);
  int j = 0;
  for (; j + 2 <= steps; j += 2) walk(f, table, magnitude, columns, scale + j, 2, out + j);
  if (j < steps) walk(f, table, magnitude, columns, scale + j, 1, out + j);
}

TARGET static void encode(const rf8_format *f, const void *w, int32_t dtype, int64_t columns, float scale,
                          uint8_t *codes) {
  if (!f->octaves) {
    rf8_portable.encode(f, w, dtype, columns, scale, codes);
    return;
  }
  uint8_t table[32];
  for (int i = 0; i < 32; i++) table[i] = (uint8_t)(f->code32[i] - f->code32[0]);
  const __m256i first = both_lanes(table), second = both_lanes(table + 16);
  const __m256i one = _mm256_set1_epi32(1), offset = _mm256_set1_epi32((int)f->code32[0]);
  const __m256i large = _mm256_set1_epi32((int)f->large_index), small = _mm256_set1_epi32((int)f->small_code);
  const __m256i zero = _mm256_set1_epi32((int)f->zero_bits), sign = _mm256_set1_epi32((int)0x80000000);
  const __m128i shift = _mm_cvtsi32_si128(f->residual_bits);
  const __m256 s = _mm256_set1_ps(scale);
  int64_t i = 0;
  for (; i + 8 <= columns; i += 8) {
    __m256i signed_bits = _mm256_castps_si256(_mm256_div_ps(load_weights(w, dtype, i), s));
    __m256i bits = _mm256_andnot_si256(sign, signed_bits);
    __m256i index = _mm256_min_epu32(_mm256_sub_epi32(bits, one), large);
    __m256i octave = _mm256_sll_epi32(_mm256_srli_epi32(index, 23), shift);
    __m256i code = _mm256_add_epi32(_mm256_add_epi32(look_up(first, second, index), offset), octave);
    code = _mm256_max_epi32(code, small);
    code = _mm256_or_si256(code, _mm256_srli_epi32(_mm256_and_si256(signed_bits, sign), 24));
    code = _mm256_and_si256(code, _mm256_cmpgt_epi32(bits, zero));
    code = _mm256_packus_epi32(code, code);
    code = _mm256_packus_epi16(code, code);
    int32_t lane0 = _mm256_extract_epi32(code, 0), lane1 = _mm256_extract_epi32(code, 4);
    memcpy(codes + i, &lane0, 4);
    memcpy(codes + i + 4, &lane1, 4);
  }
  for (; i < columns; i++) codes[i] = rf8_nearest(f, rf8_load(w, dtype, i) / scale);
}

const rf8_kernels rf8_avx2 = {
    .lanes = 2,
    .linear_f32 = linear_nibbles,
    .linear_bf16 = NULL,
    .dequantize = dequantize_nibbles,
    .magnitudes = magnitudes,
    .errors = errors,
    .encode = encode,
};

const rf8_kernels rf8_avx2_halves = {
    .lanes = 2,
    .linear_f32 = linear_halves,
    .linear_bf16 = NULL,
    .dequantize = dequantize_halves,
    .magnitudes = magnitudes,
    .errors = errors,
    .encode = encode,
};

const rf8_kernels rf8_avx2_integers = {
    .lanes = 2,
    .linear_f32 = linear_integers,
    .linear_bf16 = NULL,
    .dequantize = dequantize_integers,
    .magnitudes = magnitudes,
    .errors = errors,
    .encode = encode,
};
#endif
