/* AVX-512 with VBMI (byte permutes of 128-entry tables), and the bfloat16 dot product where there is one. */
#include "rf8.h"

#ifdef HF_GG_X86
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx2,fma,f16c")))
#define TARGET_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16,avx2,fma,f16c")))
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  __m512i low0, low1, high0, high1;
} tables;

TARGET INLINE tables load_tables(const rf8_format *f) {
  return (tables){_mm512_loadu_si512(f->low), _mm512_loadu_si512(f->low + 64), _mm512_loadu_si512(f->high),
                  _mm512_loadu_si512(f->high + 64)};
}

/* 64 codes to bfloat16: per 128-bit lane, `a` holds the values of its first 8 codes, `b` those of its last 8. */
TARGET INLINE void decode(const tables *t, __m512i codes, __m512i *a, __m512i *b) {
  __m512i low = _mm512_permutex2var_epi8(t->low0, codes, t->low1);
  __m512i high = _mm512_permutex2var_epi8(t->high0, codes, t->high1);
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8((char)0x80), 0x78); /* high ^ (codes & 0x80) */
  *a = _mm512_unpacklo_epi8(low, high);
  *b = _mm512_unpackhi_epi8(low, high);
}

TARGET INLINE __mmask64 tail_mask(int64_t count) { return count >= 64 ? ~0ULL : (1ULL << count) - 1; }

/* --- linear --- */

#define MAX_ROWS 8
#define MAX_OUTS 4
#define AHEAD 2048 /* bytes by which codes are fetched ahead: what the processor does by itself ends at a page */

TARGET_BF16 INLINE void step_bf16(const rf8_linear_job *job, const tables *t, const uint8_t *codes, const uint16_t *x,
                                  __mmask64 mask, int rows, int outs, __m512 sums[MAX_ROWS][MAX_OUTS]) {
#pragma GCC unroll 8
  for (int n = 0; n < outs; n++) {
    __m512i a, b;
    decode(t, _mm512_maskz_loadu_epi8(mask, codes + n * job->code_row), &a, &b);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const uint16_t *at = x + r * job->x_row;
      sums[r][n] = _mm512_dpbf16_ps(sums[r][n], (__m512bh)_mm512_loadu_si512(at), (__m512bh)a);
      sums[r][n] = _mm512_dpbf16_ps(sums[r][n], (__m512bh)_mm512_loadu_si512(at + 32), (__m512bh)b);
    }
  }
}

TARGET INLINE void step_f32(const rf8_linear_job *job, const tables *t, const uint8_t *codes, const float *x,
                            __mmask64 mask, int rows, int outs, __m512 sums[MAX_ROWS][MAX_OUTS]) {
  const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
#pragma GCC unroll 8
  for (int n = 0; n < outs; n++) {
    __m512i a, b;
    decode(t, _mm512_maskz_loadu_epi8(mask, codes + n * job->code_row), &a, &b);
    __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), w1 = _mm512_castsi512_ps(_mm512_and_si512(a, odd));
    __m512 w2 = _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), w3 = _mm512_castsi512_ps(_mm512_and_si512(b, odd));
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const float *at = x + r * job->x_row;
      sums[r][n] = _mm512_fmadd_ps(_mm512_loadu_ps(at), w0, sums[r][n]);
      sums[r][n] = _mm512_fmadd_ps(_mm512_loadu_ps(at + 16), w1, sums[r][n]);
      sums[r][n] = _mm512_fmadd_ps(_mm512_loadu_ps(at + 32), w2, sums[r][n]);
      sums[r][n] = _mm512_fmadd_ps(_mm512_loadu_ps(at + 48), w3, sums[r][n]);
    }
  }
}

/* For each type of x: a tile of `rows` rows of x by `outs` outputs, a strip of tiles, and the kernel. */
#define DEFINE_LINEAR(NAME, ATTRIBUTE, TYPE) \
  ATTRIBUTE INLINE void tile_##NAME(const rf8_linear_job *job, const tables *t, int64_t n, int64_t row, int rows, \
                                    int outs) { \
    const uint8_t *codes = job->codes + n * job->code_row; \
    const TYPE *x = (const TYPE *)job->x + row * job->x_row; \
    __m512 sums[MAX_ROWS][MAX_OUTS]; \
    float results[MAX_ROWS * MAX_OUTS]; \
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) \
        _Pragma("GCC unroll 8") for (int o = 0; o < outs; o++) sums[r][o] = _mm512_setzero_ps(); \
    for (int64_t k = 0; k < job->k; k += 64) { \
      _Pragma("GCC unroll 8") for (int o = 0; o < outs; o++) \
          _mm_prefetch((const char *)codes + o * job->code_row + k + AHEAD, _MM_HINT_T0); \
      step_##NAME(job, t, codes + k, x + k, tail_mask(job->k - k), rows, outs, sums); \
    } \
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; r++) \
        _Pragma("GCC unroll 8") for (int o = 0; o < outs; o++) results[r * outs + o] = \
            _mm512_reduce_add_ps(sums[r][o]); \
    rf8_finish(job, row, rows, n, outs, results); \
  } \
 \
  ATTRIBUTE INLINE void strip_##NAME(const rf8_linear_job *job, const tables *t, int64_t begin, int64_t end, \
                                     int64_t row, int rows, int outs) { \
    int64_t n = begin; \
    for (; n + outs <= end; n += outs) tile_##NAME(job, t, n, row, rows, outs); \
    for (; n < end; n++) tile_##NAME(job, t, n, row, rows, 1); \
  } \
 \
  ATTRIBUTE static void linear_##NAME(const rf8_linear_job *job, int64_t begin, int64_t end) { \
    const tables t = load_tables(job->format); \
    for (int64_t row = 0; row < job->m;) { \
      int64_t left = job->m - row; \
      int rows = left > 8 ? (left < 12 ? (int)(left + 1) / 2 : 8) : (int)left; \
      switch (rows) { \
        case 1: strip_##NAME(job, &t, begin, end, row, 1, 4); break; \
        case 2: strip_##NAME(job, &t, begin, end, row, 2, 4); break; \
        case 3: strip_##NAME(job, &t, begin, end, row, 3, 4); break; \
        case 4: strip_##NAME(job, &t, begin, end, row, 4, 4); break; \
        case 5: strip_##NAME(job, &t, begin, end, row, 5, 2); break; \
        case 6: strip_##NAME(job, &t, begin, end, row, 6, 2); break; \
        case 7: strip_##NAME(job, &t, begin, end, row, 7, 2); break; \
        default: strip_##NAME(job, &t, begin, end, row, 8, 2); break; \
      } \
      row += rows; \
    } \
  }

DEFINE_LINEAR(f32, TARGET, float)
DEFINE_LINEAR(bf16, TARGET_BF16, uint16_t)

/* --- dequantize --- */

TARGET INLINE __m256i round_bf16(__m512 x) {
  __m512i bits = _mm512_castps_si512(x), last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
  __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  sum = _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
}

TARGET INLINE __m256i round_half(__m512 x, int32_t dtype) {
  return dtype == DTYPE_BF16 ? round_bf16(x) : _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* Low bytes of 64 words. */
TARGET INLINE __m512i low_bytes(__m512i first, __m512i second) {
  __m512i bytes = _mm512_castsi256_si512(_mm512_cvtepi16_epi8(first));
  return _mm512_inserti64x4(bytes, _mm512_cvtepi16_epi8(second), 1);
}

/* Tables of one row's 16-bit values: 128 magnitudes times the scale, rounded, split into bytes. */
TARGET INLINE tables scaled_tables(const rf8_format *f, float scale, int32_t dtype) {
  __m512i low[4], high[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __m512 s = _mm512_set1_ps(scale);
    __m256i a = round_half(_mm512_mul_ps(_mm512_loadu_ps(f->value + 32 * i), s), dtype);
    __m256i b = round_half(_mm512_mul_ps(_mm512_loadu_ps(f->value + 32 * i + 16), s), dtype);
    low[i] = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
    high[i] = _mm512_srli_epi16(low[i], 8);
  }
  return (tables){low_bytes(low[0], low[1]), low_bytes(low[2], low[3]), low_bytes(high[0], high[1]),
                  low_bytes(high[2], high[3])};
}

/* 0x80 reads as plain zero. */
TARGET INLINE __m512i load_codes(const uint8_t *codes, __mmask64 mask) {
  __m512i c = _mm512_maskz_loadu_epi8(mask, codes);
  return _mm512_maskz_mov_epi8(_mm512_cmpneq_epi8_mask(c, _mm512_set1_epi8((char)0x80)), c);
}

TARGET static void dequantize_halves(const rf8_dequantize_job *job, const uint8_t *codes, float scale, uint16_t *out) {
  const tables t = scaled_tables(job->format, scale, job->dtype);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); /* so that unpacking leaves the natural order */
  __m512i a, b;
  int64_t i = 0;
  for (; i + 64 <= job->columns; i += 64) {
    decode(&t, _mm512_permutexvar_epi64(order, load_codes(codes + i, ~0ULL)), &a, &b);
    _mm512_storeu_si512(out + i, a);
    _mm512_storeu_si512(out + i + 32, b);
  }
  if (i < job->columns) {
    __mmask64 mask = tail_mask(job->columns - i);
    decode(&t, _mm512_permutexvar_epi64(order, load_codes(codes + i, mask)), &a, &b);
    _mm512_mask_storeu_epi16(out + i, (__mmask32)mask, a);
    _mm512_mask_storeu_epi16(out + i + 32, (__mmask32)(mask >> 32), b);
  }
}

TARGET INLINE void dequantize_block(const rf8_dequantize_job *job, const tables *t, const uint8_t *codes,
                                    const float *scale, __mmask64 mask, void *out) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i zero = _mm512_setzero_si512();
  __m512i half[2], w[4];
  decode(t, _mm512_permutexvar_epi32(order, load_codes(codes, mask)), half, half + 1);
  w[0] = _mm512_unpacklo_epi16(zero, half[0]);
  w[1] = _mm512_unpackhi_epi16(zero, half[0]);
  w[2] = _mm512_unpacklo_epi16(zero, half[1]);
  w[3] = _mm512_unpackhi_epi16(zero, half[1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    __mmask16 part = (__mmask16)(mask >> (16 * i));
    __m512 s = job->scale_column ? _mm512_maskz_loadu_ps(part, scale + 16 * i) : _mm512_set1_ps(*scale);
    __m512 y = _mm512_mul_ps(_mm512_castsi512_ps(w[i]), s);
    if (job->dtype == DTYPE_F32)
      _mm512_mask_storeu_ps((float *)out + 16 * i, part, y);
    else
      _mm256_mask_storeu_epi16((uint16_t *)out + 16 * i, part, round_half(y, job->dtype));
  }
}

TARGET static void dequantize(const rf8_dequantize_job *job, int64_t begin, int64_t end) {
  const tables t = load_tables(job->format);
  int64_t size = rf8_size(job->dtype);
  for (int64_t r = begin; r < end; r++) {
    const uint8_t *codes = job->codes + r * job->code_row;
    const float *scale = job->scale + r / job->rows * job->scale_batch + r % job->rows * job->scale_row;
    char *out = (char *)job->out + r * job->columns * size;
    if (job->dtype != DTYPE_F32 && job->scale_column == 0 && job->columns >= 256) {
      dequantize_halves(job, codes, *scale, (uint16_t *)(void *)out);
      continue;
    }
    int64_t i = 0;
    for (; i + 64 <= job->columns; i += 64)
      dequantize_block(job, &t, codes + i, scale + i * job->scale_column, ~0ULL, out + i * size);
    if (i < job->columns)
      dequantize_block(job, &t, codes + i, scale + i * job->scale_column, tail_mask(job->columns - i), out + i * size);
  }
}

/* --- quantize --- */

TARGET INLINE __m512 load_weights(const void *w, int32_t dtype, int64_t i, __mmask16 mask) {
  if (dtype == DTYPE_F32) return _mm512_maskz_loadu_ps(mask, (const float *)w + i);
  __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)w + i);
  if (dtype == DTYPE_F16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

TARGET INLINE __mmask16 row_mask(int64_t count) { return count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1); }

TARGET static uint32_t magnitudes(const void *w, int32_t dtype, int64_t columns, float *magnitude) {
  __m512i peak = _mm512_setzero_si512();
  for (int64_t i = 0; i < columns; i += 16) {
    __mmask16 mask = row_mask(columns - i);
    __m512i bits = _mm512_castps_si512(load_weights(w, dtype, i, mask));
    bits = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    _mm512_mask_storeu_epi32(magnitude + i, mask, bits);
    peak = _mm512_max_epu32(peak, bits);
  }
  return _mm512_reduce_max_epu32(peak);
}

TARGET INLINE __m512 squared_errors(const rf8_format *f, __m512i round0, __m512i round1, __m512 w, __m512 scale) {
  __m512i bits = _mm512_castps_si512(_mm512_div_ps(w, scale));
  __m512i large = _mm512_set1_epi32((int)f->large_index);
  __m512i index = _mm512_min_epu32(_mm512_sub_epi32(bits, _mm512_set1_epi32(1)), large);
  __m512i octave = _mm512_and_si512(index, _mm512_set1_epi32((int)0xff800000));
  __m512i q = _mm512_permutex2var_epi32(round0, _mm512_srli_epi32(index, 18), round1); /* reads the low five bits */
  q = _mm512_max_epu32(_mm512_add_epi32(q, octave), _mm512_set1_epi32((int)f->small_bits));
  __mmask16 some = _mm512_cmpgt_epu32_mask(bits, _mm512_set1_epi32((int)f->zero_bits));
  __m512 error = _mm512_sub_ps(_mm512_maskz_mul_ps(some, _mm512_castsi512_ps(q), scale), w);
  return _mm512_mul_ps(error, error);
}

/* `count` candidates in one walk over the row. */
TARGET INLINE void walk(const rf8_format *f, const float *magnitude, int64_t columns, const float *scale, int count,
                        double *out) {
  const __m512i round0 = _mm512_loadu_si512(f->round32), round1 = _mm512_loadu_si512(f->round32 + 16);
  __m512d sums[4][2];
#pragma GCC unroll 4
  for (int c = 0; c < count; c++) sums[c][0] = sums[c][1] = _mm512_setzero_pd();
  for (int64_t i = 0; i < columns; i += 16) {
    __m512 w = _mm512_loadu_ps(magnitude + i);
#pragma GCC unroll 4
    for (int c = 0; c < count; c++) {
      __m512 square = squared_errors(f, round0, round1, w, _mm512_set1_ps(scale[c]));
      sums[c][0] = _mm512_add_pd(sums[c][0], _mm512_cvtps_pd(_mm512_castps512_ps256(square)));
      sums[c][1] = _mm512_add_pd(sums[c][1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(square, 1)));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < count; c++) out[c] = _mm512_reduce_add_pd(_mm512_add_pd(sums[c][0], sums[c][1]));
}

TARGET static void errors(const rf8_format *f, const float *magnitude, int64_t columns, const float *scale, int steps,
                          double *out) {
  if (!f->octaves) {
    rf8_portable.errors(f, magnitude, columns, scale, steps, out);
    return;
  }
  for (int j = 0; j < steps; j += 4) switch (steps - j) {
      case 1: walk(f, magnitude, columns, scale + j, 1, out + j); break;
      case 2: walk(f, magnitude, columns, scale + j, 2, out + j); break;
      case 3: walk(f, magnitude, columns, scale + j, 3, out + j); break;
      default: walk(f, magnitude, columns, scale + j, 4, out + j); break;
    }
}

TARGET static void encode(const rf8_format *f, const void *w, int32_t dtype, int64_t columns, float scale,
                          uint8_t *codes) {
  if (!f->octaves) {
    rf8_portable.encode(f, w, dtype, columns, scale, codes);
    return;
  }
  const __m512i code0 = _mm512_loadu_si512(f->code32), code1 = _mm512_loadu_si512(f->code32 + 16);
  const __m512i large = _mm512_set1_epi32((int)f->large_index);
  const __m128i shift = _mm_cvtsi32_si128(f->residual_bits);
  for (int64_t i = 0; i < columns; i += 16) {
    __mmask16 mask = row_mask(columns - i);
    __m512i signed_bits = _mm512_castps_si512(_mm512_div_ps(load_weights(w, dtype, i, mask), _mm512_set1_ps(scale)));
    __m512i bits = _mm512_and_si512(signed_bits, _mm512_set1_epi32(0x7fffffff));
    __m512i index = _mm512_min_epu32(_mm512_sub_epi32(bits, _mm512_set1_epi32(1)), large);
    __m512i octave = _mm512_sll_epi32(_mm512_srli_epi32(index, 23), shift);
    __m512i code = _mm512_permutex2var_epi32(code0, _mm512_srli_epi32(index, 18), code1);
    code = _mm512_max_epi32(_mm512_add_epi32(code, octave), _mm512_set1_epi32((int)f->small_code));
    __m512i sign = _mm512_and_si512(_mm512_srli_epi32(signed_bits, 24), _mm512_set1_epi32(0x80));
    __mmask16 some = _mm512_cmpgt_epu32_mask(bits, _mm512_set1_epi32((int)f->zero_bits));
    _mm512_mask_cvtepi32_storeu_epi8(codes + i, mask, _mm512_maskz_or_epi32(some, code, sign));
  }
}

const rf8_kernels rf8_avx512 = {
    .lanes = 4,
    .linear_f32 = linear_f32,
    .linear_bf16 = linear_bf16,
    .dequantize = dequantize,
    .magnitudes = magnitudes,
    .errors = errors,
    .encode = encode,
};
#endif
