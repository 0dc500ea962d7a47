/* Sums over tensors for the fits, in chunks that threads share. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define PAIR for (int u = 0; u < 2; u++)

/* A chunk is what a thread takes at once; a block of it is converted to float64 in the first cache. */
enum { FLOAT64, FLOAT32, BFLOAT16, FLOAT16, CHUNK = 1 << 15, BLOCK = 512, ORDERS = 9, FEWER_ORDERS = 5 };
#define FAR 6.0

typedef double vec __attribute__((vector_size(32)));
typedef int64_t lanes __attribute__((vector_size(32)));
typedef uint64_t bits __attribute__((vector_size(32)));

/* A run of values in memory, and what is asked about them; the last three for `near` alone. */
typedef struct {
  const void *x;
  int64_t count, dtype;
  double parameters[4];
  double *near;
  int64_t capacity, *found;
} job;

/* Adds to the sums of `moments` values of any kind. */
static void add_one_by_one(const double *w, int64_t count, double pivot, double *out) {
  for (int64_t i = 0; i < count; i++) {
    if (!isfinite(w[i])) {
      out[1] += 1;
      continue;
    }
    double d = w[i] - pivot;
    out[0] += 1;
    out[2] += d;
    out[3] += (d > 0) - (d < 0);
    out[4] += fabs(d);
    out[5] += d * d;
    out[6] += d * d * d;
    out[7] += d * d * (d * d);
    if (w[i] < out[8]) out[8] = w[i];
    if (w[i] > out[9]) out[9] = w[i];
  }
}

#define TARGET
#define NAME(name) name##_portable
#include "kernels.h"
#undef TARGET
#undef NAME

#if defined(__x86_64__) && !defined(HF_GG_PORTABLE)
#define HF_GG_X86 1
#define TARGET __attribute__((target("avx2,fma")))
#define NAME(name) name##_avx2
#include "kernels.h"
#endif

/* The best instruction set of this processor: 1 for AVX2, 0 for portable C. */
EXPORT int64_t hf_gg_ggd_isa(void) {
#ifdef HF_GG_X86
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 0;
#endif
}

/* A function for the instruction set. */
#ifdef HF_GG_X86
#define CHOOSE(isa, name) ((isa) > 0 ? name##_avx2 : name##_portable)
#else
#define CHOOSE(isa, name) ((void)(isa), name##_portable)
#endif

typedef void chunk_function(const job *, int64_t begin, int64_t end, double *out);

/* The function's sums of each job, [jobs, sums]; added chunk after chunk, so that threads change nothing. With
   `extremes` the last two are a minimum and a maximum. Returns 1 where there is no memory for the chunks' sums. */
static int64_t run(chunk_function *function, int64_t threads, int64_t jobs, const job *j, int sums, int extremes,
                   double *out) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < jobs; i++) chunks += (j[i].count + CHUNK - 1) / CHUNK;
  double *parts = malloc((size_t)(chunks + 1) * (size_t)sums * sizeof *parts);
  int64_t *owner = malloc((size_t)(chunks + 1) * 2 * sizeof *owner);
  if (!parts || !owner) {
    free(parts);
    free(owner);
    return 1;
  }
  for (int64_t i = 0, c = 0; i < jobs; i++)
    for (int64_t begin = 0; begin < j[i].count; begin += CHUNK, c++) owner[2 * c] = i, owner[2 * c + 1] = begin;
#pragma omp parallel for schedule(dynamic) num_threads((int)threads) if (chunks > 1 && threads > 1)
  for (int64_t c = 0; c < chunks; c++) {
    const job *own = j + owner[2 * c];
    int64_t begin = owner[2 * c + 1], left = own->count - begin;
    function(own, begin, begin + (left < CHUNK ? left : CHUNK), parts + c * sums);
  }
  (void)threads;
  memset(out, 0, (size_t)(jobs * sums) * sizeof *out);
  int plain = extremes ? sums - 2 : sums;
  if (extremes)
    for (int64_t i = 0; i < jobs; i++) out[i * sums + plain] = INFINITY, out[i * sums + plain + 1] = -INFINITY;
  for (int64_t c = 0; c < chunks; c++) {
    double *to = out + owner[2 * c] * sums, *from = parts + c * sums;
    for (int k = 0; k < plain; k++) to[k] += from[k];
    if (extremes && from[plain] < to[plain]) to[plain] = from[plain];
    if (extremes && from[plain + 1] > to[plain + 1]) to[plain + 1] = from[plain + 1];
  }
  free(parts);
  free(owner);
  return 0;
}

/* `jobs` have pivot and whether third and fourth powers are wanted; `out` is [jobs, 10], see kernels.h. */
EXPORT int64_t hf_gg_ggd_moments(int64_t isa, int64_t threads, int64_t jobs, const job *j, double *out) {
  return run(CHOOSE(isa, moments), threads, jobs, j, 10, 1, out);
}

/* `jobs` have ν, α, μ and whether the score is wanted; `out` is [jobs, 7], see kernels.h. */
EXPORT int64_t hf_gg_ggd_powers(int64_t isa, int64_t threads, int64_t jobs, const job *j, double *out) {
  return run(CHOOSE(isa, powers), threads, jobs, j, 7, 0, out);
}

/* One job of center, half width and two shapes. `near` gets the first `capacity` of the values that are near, in no
   particular order; `found` counts all of them unless the capacity is 0. `out` is [2, 9] and the sum of the near ones,
   see kernels.h. */
EXPORT int64_t hf_gg_ggd_near(int64_t isa, int64_t threads, job *j, double *near, int64_t capacity, int64_t *found,
                              double *out) {
  *found = 0;
  j->near = near, j->capacity = capacity, j->found = found;
  return run(CHOOSE(isa, near), threads, 1, j, 2 * ORDERS + 1, 0, out);
}
