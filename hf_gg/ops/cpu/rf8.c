/* Entry points: formats, the choice of an instruction set, threads. Python, which calls them, checks the arguments. */
#include "rf8.h"

#include <math.h>
#include <stdlib.h>
#include <unistd.h>

enum { ISA_PORTABLE = 0, ISA_AVX2 = 1, ISA_AVX512 = 2, ISA_AVX512_BF16 = 3, ISA_NEON = 1 /* on ARM */ };

#define EXPORT __attribute__((visibility("default")))

/* --- instruction sets --- */

/* The best one of this processor. */
EXPORT int64_t hf_gg_rf8_isa(void) {
#ifdef HF_GG_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return ISA_PORTABLE;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512vbmi"))
    return ISA_AVX2;
  return __builtin_cpu_supports("avx512bf16") ? ISA_AVX512_BF16 : ISA_AVX512;
#elif defined(HF_GG_NEON)
  return ISA_NEON; /* every 64-bit ARM has it */
#else
  return ISA_PORTABLE;
#endif
}

static const rf8_kernels *kernels_for(int64_t isa, const rf8_format *format) {
#ifdef HF_GG_X86
  if (isa >= ISA_AVX512) return &rf8_avx512;
  if (isa == ISA_AVX2 && format->halves) return &rf8_avx2_halves;
  if (isa == ISA_AVX2 && format->nibbles) return &rf8_avx2;
  if (isa == ISA_AVX2 && format->integers) return &rf8_avx2_integers;
#elif defined(HF_GG_NEON)
  if (isa >= ISA_NEON) return &rf8_neon;
#endif
  (void)isa, (void)format;
  return &rf8_portable;
}

/* --- threads --- */

#ifdef _OPENMP
/* The threads of GNU OpenMP do not survive a fork: a child whose parent has used them would wait for ever. */
static int threads_survive(void) {
  static pid_t owner;
  pid_t self = getpid(), nobody = 0;
  return __atomic_compare_exchange_n(&owner, &nobody, self, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED) || nobody == self;
}
#endif

typedef void (*range_function)(void *context, int64_t begin, int64_t end);

/* Calls `function` on parts of [0, count), whole multiples of `step`, by at most `threads` threads. */
static void parallel(int64_t count, int64_t step, int64_t threads, range_function function, void *context) {
#ifdef _OPENMP
  int64_t steps = (count + step - 1) / step, most = threads * 8; /* some parts a thread, to even out their speeds */
  if (threads > 1 && steps > 1 && threads_survive()) {
    if (steps > most) step *= (steps + most - 1) / most;
    int64_t parts = (count + step - 1) / step;
#pragma omp parallel for num_threads((int)threads) schedule(dynamic, 1)
    for (int64_t part = 0; part < parts; part++) {
      int64_t begin = part * step, end = begin + step < count ? begin + step : count;
      function(context, begin, end);
    }
    return;
  }
#endif
  (void)step, (void)threads;
  if (count > 0) function(context, 0, count);
}

/* --- formats --- */

/* Entry of bucket `index` = (bits(x) - 1) >> 18 by the octave's table and the two ends. */
static uint32_t round_octaves(const rf8_format *f, uint32_t index, const uint32_t *table, uint32_t octave,
                              uint32_t least) {
  if (((index + 1) << 18) <= f->zero_bits) return 0;
  if (index > f->large_index >> 18) index = f->large_index >> 18;
  uint32_t result = table[index & 31] + (index >> 5) * octave;
  return (int32_t)result > (int32_t)least ? result : least;
}

/* Whether one table of 32 steps, moved by the octave, and its two ends give the nearest code and value of every x. */
static int32_t find_octaves(rf8_format *f) {
  uint32_t first = 0, last = 0, octave = 1u << f->residual_bits;
  while (first < 8160 && f->nearest[first] == 0) first++;
  while (last < 8160 && f->rounded[last] < f->largest) last++;
  if (first == 0 || last >= 8160 || last < first + 128) return 0;
  f->zero_bits = first << 18;
  f->small_code = f->nearest[first];
  f->small_bits = rf8_to_bits(f->rounded[first]);
  f->large_index = last << 18;
  uint32_t middle = (first / 32 + 2) * 32;
  for (uint32_t i = 0; i < 32; i++) {
    f->round32[i] = rf8_to_bits(f->rounded[middle + i]) - (middle << 18);
    f->code32[i] = f->nearest[middle + i] - (middle >> 5) * octave;
  }
  for (uint32_t i = 0; i < 32; i++) /* so that a byte can hold each */
    if (f->round32[i] & 0x7ffff || f->round32[i] >> 19 > 127 || f->code32[i] - f->code32[0] > 127) return 0;
  for (uint32_t i = 0; i < 8160; i++)
    if (round_octaves(f, i, f->round32, 1u << 23, f->small_bits) != rf8_to_bits(f->rounded[i]) ||
        round_octaves(f, i, f->code32, octave, f->small_code) != f->nearest[i])
      return 0;
  return 1;
}

/* Whether a code's two overlapping nibbles, c & 15 and c >> 3 & 15, give the bytes of its value. */
static int32_t find_nibbles(rf8_format *f) {
  for (int c = 1; c < 128; c++) {
    if (f->value[c] != f->value[c]) {
      f->reserved4[c & 15] = 0xff;
    } else {
      f->low4[c & 15] = f->low[c];
      f->high4[c >> 3 & 15] = f->high[c];
    }
  }
  for (int c = 1; c < 128; c++) {
    int reserved = f->value[c] != f->value[c];
    if ((f->reserved4[c & 15] != 0) != reserved) return 0;
    if (!reserved && (f->low4[c & 15] != f->low[c] || f->high4[c >> 3 & 15] != f->high[c])) return 0;
  }
  return 1;
}

/* Whether c & 15 and c >> 4 do, the sign included; after find_nibbles, whose low4 gets the low byte of a NaN. */
static int32_t find_halves(rf8_format *f) {
  if (!f->nibbles || f->low4[0]) return 0;
  for (int i = 0; i < 16; i++)
    if (f->reserved4[i]) f->low4[i] = 0xc0;
  for (int c = 1; c < 128; c++)
    if (f->value[c] == f->value[c]) f->sign4[c >> 4] = f->high[c], f->sign4[8 + (c >> 4)] = f->high[c] | 0x80;
  for (int c = 1; c < 128; c++)
    if (f->value[c] == f->value[c] && f->sign4[c >> 4] != f->high[c]) return 0;
  return 1;
}

EXPORT int64_t hf_gg_rf8_format_size(void) { return (int64_t)sizeof(rf8_format); }

/* Fills `out` from 256 values and the nearest codes of positive numbers. Returns 1 if the kernels cannot serve it. */
EXPORT int64_t hf_gg_rf8_format_init(void *out, const float *values, const uint8_t *nearest, int64_t residual_bits) {
  rf8_format *f = out;
  memset(f, 0, sizeof *f);
  f->integers = 1;
  memcpy(f->value, values, sizeof f->value);
  memcpy(f->nearest, nearest, sizeof f->nearest);
  f->residual_bits = (int32_t)residual_bits;
  for (int c = 0; c < 128; c++) {
    uint32_t bits = rf8_to_bits(values[c]), negative = rf8_to_bits(values[c + 128]);
    int reserved = values[c] != values[c];
    if (values[c] != (float)c) f->integers = 0;
    if (c == 0 ? values[0] != 0.0f || values[128] != 0.0f : reserved != (values[c + 128] != values[c + 128])) return 1;
    if (!reserved && (bits & 0x8000ffff || (c > 0 && negative != (bits | 0x80000000)))) return 1;
    f->low[c] = (uint8_t)(reserved ? 0xc0 : bits >> 16);
    f->high[c] = (uint8_t)(reserved ? 0x7f : bits >> 24);
    f->reserved |= reserved;
    if (!reserved && values[c] > f->largest) f->largest = values[c];
  }
  for (int i = 0; i < 8192; i++) f->rounded[i] = values[nearest[i]];
  if (nearest[8191] != 0) return 1;
  f->nibbles = find_nibbles(f);
  f->halves = find_halves(f);
  f->octaves = find_octaves(f);
  return 0;
}

/* --- linear --- */

static inline __attribute__((always_inline)) void scatter(const float *part, int lanes, float *out) {
#pragma GCC unroll 4
  for (int lane = 0; lane < lanes; lane++)
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) /* a lane's two halves; in each the even, then the odd elements */
      out[(i / 8 * 2 + i % 2) * 4 * lanes + lane * 4 + i % 8 / 2] = part[lane * 16 + i];
}

/* Packs a row, padded with zeros, into the order in which vectors of `lanes` 128-bit lanes decode their codes. */
static void pack_f32(const void *x, int32_t dtype, int64_t k, int lanes, float *out) {
  int64_t block = lanes ? 16 * lanes : 64;
  for (int64_t start = 0; start < k; start += block, out += block) {
    float part[64];
    int64_t count = k - start < block ? k - start : block;
    if (dtype == DTYPE_F32)
      memcpy(part, (const float *)x + start, (size_t)count * 4);
    else if (dtype == DTYPE_BF16)
      for (int64_t i = 0; i < count; i++) part[i] = rf8_from_bf16(((const uint16_t *)x)[start + i]);
    else
      for (int64_t i = 0; i < count; i++) part[i] = rf8_from_f16(((const uint16_t *)x)[start + i]);
    for (int64_t i = count; i < block; i++) part[i] = 0.0f;
    if (lanes == 2)
      scatter(part, 2, out);
    else if (lanes == 4)
      scatter(part, 4, out);
    else
      memcpy(out, part, sizeof part);
  }
}

static void pack_bf16(const uint16_t *x, int64_t k, int lanes, uint16_t *out) {
  int64_t block = 16 * lanes;
  for (int64_t start = 0; start < k; start += block, out += block) {
    uint16_t part[64] = {0};
    memcpy(part, x + start, (size_t)(k - start < block ? k - start : block) * 2);
    for (int lane = 0; lane < lanes; lane++)
      for (int half = 0; half < 2; half++) memcpy(out + (half * lanes + lane) * 8, part + lane * 16 + half * 8, 16);
  }
}

void rf8_finish(const rf8_linear_job *job, int64_t row, int rows, int64_t n, int outs, const float *sums) {
  for (int r = 0; r < rows; r++)
    for (int o = 0; o < outs; o++) {
      float y = sums[r * outs + o] * job->scale[(n + o) * job->scale_row];
      if (job->bias_dtype != DTYPE_NONE) y += rf8_load(job->bias, job->bias_dtype, n + o);
      rf8_store(job->y, job->y_dtype, (row + r) * job->y_row + n + o, y);
    }
}

typedef struct {
  rf8_linear_job job; /* of the whole x; a group's own differs by its rows and its weight */
  void (*run)(const rf8_linear_job *, int64_t, int64_t);
  const char *x;
  int64_t x_row, n;
  int32_t x_dtype, bf16;
  int lanes;
  void *packed;
  const int64_t *groups; /* for each: its number, its first row, its last but one */
  int64_t codes_group, scale_group;
} linear_context;

/* Outputs [begin, end) of the groups, one group's n after the other's. */
static void linear_part(void *context, int64_t begin, int64_t end) {
  const linear_context *c = context;
  while (begin < end) {
    const int64_t *group = c->groups + begin / c->n * 3;
    int64_t first = begin % c->n, last = end - begin < c->n - first ? first + end - begin : c->n;
    rf8_linear_job job = c->job;
    job.m = group[2] - group[1];
    job.x = (const char *)job.x + group[1] * job.x_row * (c->bf16 ? 2 : 4);
    job.codes += group[0] * c->codes_group;
    job.scale += group[0] * c->scale_group;
    job.y = (char *)job.y + group[1] * job.y_row * rf8_size(job.y_dtype);
    c->run(&job, first, last);
    begin += last - first;
  }
}

static void pack_part(void *context, int64_t begin, int64_t end) {
  linear_context *c = context;
  for (int64_t r = begin; r < end; r++) {
    const void *x = c->x + r * c->x_row * rf8_size(c->x_dtype);
    if (c->bf16)
      pack_bf16(x, c->job.k, c->lanes, (uint16_t *)c->packed + r * c->job.x_row);
    else
      pack_f32(x, c->x_dtype, c->job.k, c->lanes, (float *)c->packed + r * c->job.x_row);
  }
}

/* y[r, n] = x[r, k] · (decode(codes[g, n, k]) · scale[g, n])ᵀ + bias[n] for the rows r of each of `count` groups, y like
   x; `groups` holds three numbers a group: g, its first row, the row after its last. m rows in all. Returns 1 without
   memory. */
EXPORT int64_t hf_gg_rf8_grouped(const void *format, int64_t isa, int64_t threads, const void *x, int64_t x_row,
                                 int64_t x_dtype, const uint8_t *codes, int64_t codes_group, int64_t code_row,
                                 const float *scale, int64_t scale_group, int64_t scale_row, const void *bias,
                                 int64_t bias_dtype, void *y, int64_t y_row, const int64_t *groups, int64_t count,
                                 int64_t m, int64_t n, int64_t k) {
  const rf8_kernels *kernels = kernels_for(isa, format);
  int32_t bf16 = x_dtype == DTYPE_BF16 && isa >= ISA_AVX512_BF16 && kernels->linear_bf16;
  int64_t padded = (k + 63) / 64 * 64;
  void *packed = NULL;
  if (padded > 0 && posix_memalign(&packed, 64, (size_t)(m * padded * (bf16 ? 2 : 4)))) return 1;
  linear_context c = {.run = bf16 ? kernels->linear_bf16 : kernels->linear_f32,
                      .x = x,
                      .x_row = x_row,
                      .n = n,
                      .x_dtype = (int32_t)x_dtype,
                      .bf16 = bf16,
                      .lanes = kernels->lanes,
                      .packed = packed,
                      .groups = groups,
                      .codes_group = codes_group,
                      .scale_group = scale_group};
  c.job = (rf8_linear_job){.format = format,
                           .x = packed,
                           .x_row = padded,
                           .codes = codes,
                           .code_row = code_row,
                           .scale = scale,
                           .scale_row = scale_row,
                           .bias = bias,
                           .bias_dtype = (int32_t)bias_dtype,
                           .y_dtype = (int32_t)x_dtype,
                           .y = y,
                           .y_row = y_row,
                           .k = k};
  int64_t products = 0;
  for (int64_t g = 0; g < count; g++) products += (groups[3 * g + 2] - groups[3 * g + 1]) * n * k;
  parallel(m, 1, m * k > 32768 ? threads : 1, pack_part, &c);
  /* waking the threads costs some microseconds, as much as 100,000 weights */
  parallel(count * n, 8, products > 131072 ? threads : 1, linear_part, &c);
  free(packed);
  return 0;
}

/* The same for one group of all rows. */
EXPORT int64_t hf_gg_rf8_linear(const void *format, int64_t isa, int64_t threads, const void *x, int64_t x_row,
                                int64_t x_dtype, const uint8_t *codes, int64_t code_row, const float *scale,
                                int64_t scale_row, const void *bias, int64_t bias_dtype, void *y, int64_t y_row,
                                int64_t m, int64_t n, int64_t k) {
  const int64_t all[3] = {0, 0, m};
  return hf_gg_rf8_grouped(format, isa, threads, x, x_row, x_dtype, codes, 0, code_row, scale, 0, scale_row, bias,
                           bias_dtype, y, y_row, all, 1, m, n, k);
}

/* --- dequantize --- */

typedef struct {
  rf8_dequantize_job job;
  void (*run)(const rf8_dequantize_job *, int64_t, int64_t);
} dequantize_context;

static void dequantize_part(void *context, int64_t begin, int64_t end) {
  dequantize_context *c = context;
  c->run(&c->job, begin, end);
}

/* out[batch, rows, columns] = decode(codes) · scale, in float32, then rounded. Strides of the scale may be zero. */
EXPORT void hf_gg_rf8_dequantize(const void *format, int64_t isa, int64_t threads, const uint8_t *codes,
                                 int64_t code_row, const float *scale, int64_t scale_batch, int64_t scale_row,
                                 int64_t scale_column, void *out, int64_t dtype, int64_t batch, int64_t rows,
                                 int64_t columns) {
  dequantize_context c = {.run = kernels_for(isa, format)->dequantize};
  c.job = (rf8_dequantize_job){.format = format,
                               .codes = codes,
                               .code_row = code_row,
                               .scale = scale,
                               .scale_batch = scale_batch,
                               .scale_row = scale_row,
                               .scale_column = scale_column,
                               .out = out,
                               .dtype = (int32_t)dtype,
                               .rows = rows,
                               .columns = columns};
  parallel(batch * rows, 1, batch * rows * columns > 65536 ? threads : 1, dequantize_part, &c);
}

/* --- quantize --- */

typedef struct {
  const rf8_format *format;
  const rf8_kernels *kernels;
  const char *w;
  int64_t w_row, columns, mode;
  int32_t dtype;
  const float *factors; /* candidates of the search relative to the smallest */
  int steps;
  uint8_t *codes;
  int64_t code_row;
  float *scale;
  double *errors;
  int64_t bad, no_memory;
} quantize_context;

static void lower(int64_t *to, int64_t value) {
  int64_t old = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(to, &old, value, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
}

/* Scales stay normal numbers. */
static float clamp_scale(float scale) {
  const float tiny = 0x1p-126f, huge = 0x1.fffffep+125f;
  return scale < tiny ? tiny : scale > huge ? huge : scale;
}

static void candidates(const quantize_context *c, float base, float *out) {
  for (int j = 0; j < c->steps; j++) out[j] = clamp_scale(base * c->factors[j]);
}

static float choose_scale(const quantize_context *c, const float *magnitude, float peak) {
  float base = peak / c->format->largest, scales[RF8_MOST_STEPS];
  double errors[RF8_MOST_STEPS];
  int best = 0, exponent;
  if (!(peak > 0)) return 1.0f;
  if (c->mode == MODE_POW2) { /* the smallest power of two that clips nothing */
    float mantissa = frexpf(base, &exponent);
    return clamp_scale(ldexpf(1.0f, exponent - (mantissa == 0.5f)));
  }
  if (c->mode == MODE_ABSMAX) return clamp_scale(base);
  candidates(c, base, scales);
  c->kernels->errors(c->format, magnitude, c->columns, scales, c->steps, errors);
  for (int j = 1; j < c->steps; j++)
    if (errors[j] < errors[best]) best = j;
  return scales[best];
}

static void quantize_part(void *context, int64_t begin, int64_t end) {
  quantize_context *c = context;
  int64_t padded = (c->columns + 31) / 16 * 16;
  float *magnitude = calloc((size_t)padded, sizeof(float)); /* at least 16 zeros stay behind the row */
  if (!magnitude) {
    __atomic_store_n(&c->no_memory, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t r = begin; r < end; r++) {
    const void *w = c->w + r * c->w_row * rf8_size(c->dtype);
    uint32_t peak = c->kernels->magnitudes(w, c->dtype, c->columns, magnitude);
    if (c->mode == MODE_PEAK) c->scale[r] = rf8_from_bits(peak);
    if (peak >= 0x7f800000) lower(&c->bad, r);
    if (peak >= 0x7f800000 || c->mode == MODE_PEAK) continue;
    if (c->mode == MODE_ERRORS) {
      float scales[RF8_MOST_STEPS];
      candidates(c, c->scale[r], scales);
      c->kernels->errors(c->format, magnitude, c->columns, scales, c->steps, c->errors + r * c->steps);
      continue;
    }
    if (c->mode != MODE_GIVEN) c->scale[r] = choose_scale(c, magnitude, rf8_from_bits(peak));
    c->kernels->encode(c->format, w, c->dtype, c->columns, c->scale[r], c->codes + r * c->code_row);
  }
  free(magnitude);
}

/* See the MODE_ constants; at most RF8_MOST_STEPS steps. Returns the first row that holds NaN or infinity, -1 if none does, -2 without memory. */
EXPORT int64_t hf_gg_rf8_quantize(const void *format, int64_t isa, int64_t threads, int64_t mode, const void *w,
                                  int64_t w_row, int64_t dtype, int64_t rows, int64_t columns, const float *factors,
                                  int64_t steps, uint8_t *codes, int64_t code_row, float *scale, double *errors) {
  quantize_context c = {.format = format,
                        .kernels = kernels_for(isa, format),
                        .w = w,
                        .w_row = w_row,
                        .columns = columns,
                        .mode = mode,
                        .dtype = (int32_t)dtype,
                        .factors = factors,
                        .steps = (int)steps,
                        .codes = codes,
                        .code_row = code_row,
                        .scale = scale,
                        .errors = errors,
                        .bad = INT64_MAX};
  parallel(rows, 1, rows * columns > 16384 ? threads : 1, quantize_part, &c);
  if (c.no_memory) return -2;
  return c.bad == INT64_MAX ? -1 : c.bad;
}
