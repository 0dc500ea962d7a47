/* The sums of one chunk, for one instruction set: kernels.c includes this once for each, with TARGET and NAME set.
   Everything is float64, four values at once by the vector extensions of GCC and Clang. */

/* --- loading --- */

/* Without branches, so that a loop over it is vectorized. */
TARGET INLINE double NAME(half)(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
  float small = (float)(int32_t)rest * 0x1p-24f; /* zero and subnormal */
  uint32_t exact = (rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u), other;
  memcpy(&other, &small, 4);
  uint32_t mask = rest < 0x400u ? 0xffffffffu : 0u, bits = (other & mask) | (exact & ~mask) | sign;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* `count` ≤ BLOCK values from `begin` as float64. */
TARGET static void NAME(load)(const void *x, int64_t dtype, int64_t begin, int64_t count, double *out) {
  if (dtype == FLOAT64)
    memcpy(out, (const double *)x + begin, (size_t)count * sizeof *out);
  else if (dtype == FLOAT32) {
    const float *from = (const float *)x + begin;
    for (int64_t i = 0; i < count; i++) out[i] = from[i];
  } else if (dtype == BFLOAT16) {
    const uint16_t *from = (const uint16_t *)x + begin;
    for (int64_t i = 0; i < count; i++) {
      uint32_t bits = (uint32_t)from[i] << 16;
      float f;
      memcpy(&f, &bits, 4);
      out[i] = f;
    }
  } else {
    const uint16_t *from = (const uint16_t *)x + begin;
    for (int64_t i = 0; i < count; i++) out[i] = NAME(half)(from[i]);
  }
}

/* --- vectors of four --- */

TARGET INLINE vec NAME(get)(const double *p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}

TARGET INLINE vec NAME(pick)(lanes mask, vec yes, vec no) {
  return (vec)((mask & (lanes)yes) | (~mask & (lanes)no));
}

TARGET INLINE vec NAME(magnitude)(vec v) { return (vec)((lanes)v & 0x7fffffffffffffff); }

TARGET INLINE double NAME(total)(vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }

/* ln of positive normal numbers: exponent, and 2 artanh(s) of a mantissa in √½ … √2; within 1e-13 relative or absolute.
   Two vectors side by side, because each step waits for the one before it. */
TARGET INLINE void NAME(logarithm)(const vec x[2], vec out[2]) {
  const bits root = (bits){0} + 0x3fe6a09e667f3bcdu, one = (bits){0} + 0x3ff0000000000000u;
  bits moved[2];
  vec e[2], s[2], z[2], p[2];
  PAIR moved[u] = (bits)x[u] + (one - root);
  PAIR e[u] = (vec)(moved[u] >> 52 | 0x4330000000000000u) - (0x1p52 + 1023.0);
  PAIR s[u] = (vec)((moved[u] & 0x000fffffffffffffu) + root);
  PAIR s[u] = (s[u] - 1.0) / (s[u] + 1.0);
  PAIR z[u] = s[u] * s[u];
  PAIR p[u] = z[u] * (1.0 / 15.0) + 1.0 / 13.0;
#pragma GCC unroll 8
  for (int k = 11; k >= 3; k -= 2) PAIR p[u] = p[u] * z[u] + 1.0 / k;
  PAIR p[u] = p[u] * z[u];
  PAIR s[u] += s[u];
  PAIR s[u] += s[u] * p[u];
  PAIR out[u] = e[u] * 0x1.62e42fefa39efp-1 + s[u];
}

/* exp, of arguments that are brought into -708 … 709; within 1e-12 relative. */
TARGET INLINE void NAME(exponential)(const vec x[2], vec out[2]) {
  static const double factor[] = {1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0,
                                  1.0 / 24.0,     1.0 / 6.0,     0.5,          1.0,         1.0};
  const vec low = (vec){0} - 708.0, high = (vec){0} + 709.0;
  vec y[2], t[2], p[2];
  PAIR y[u] = NAME(pick)(x[u] < low, low, x[u]);
  PAIR y[u] = NAME(pick)(y[u] > high, high, y[u]);
  PAIR t[u] = y[u] * 0x1.71547652b82fep+0 + 0x1.8p52;
  PAIR y[u] -= (t[u] - 0x1.8p52) * 0x1.62e42fefa38p-1;
  PAIR y[u] -= (t[u] - 0x1.8p52) * 0x1.ef35793c7673p-45;
  PAIR p[u] = y[u] * (1.0 / 3628800.0) + factor[0];
#pragma GCC unroll 16
  for (int k = 1; k < 10; k++) PAIR p[u] = p[u] * y[u] + factor[k];
  PAIR out[u] = (vec)((bits)p[u] + ((bits)t[u] << 52));
}

/* --- moments --- */

TARGET INLINE void NAME(add_moments)(const double *w, int64_t groups, double pivot, int higher, vec *sums,
                                     lanes *signs) {
  vec first = sums[0], absolute = sums[1], second = sums[2], third = sums[3], fourth = sums[4];
  vec low = sums[5], high = sums[6];
  lanes sign = *signs;
  for (int64_t i = 0; i < groups; i++) {
    vec v = NAME(get)(w + 4 * i), d = v - pivot, square = d * d;
    low = NAME(pick)(v < low, v, low);
    high = NAME(pick)(v > high, v, high);
    sign += (d < 0.0) - (d > 0.0);
    first += d;
    absolute += NAME(magnitude)(d);
    second += square;
    if (higher) {
      third += square * d;
      fourth += square * square;
    }
  }
  sums[0] = first, sums[1] = absolute, sums[2] = second, sums[3] = third, sums[4] = fourth;
  sums[5] = low, sums[6] = high;
  *signs = sign;
}

/* Of values [begin, end): count, not finite, Σd, Σsign d, Σ|d|, Σd², Σd³, Σd⁴, smallest, largest; d = w - pivot. */
TARGET static void NAME(moments)(const job *j, int64_t begin, int64_t end, double *out) {
  const double pivot = j->parameters[0];
  const int higher = j->parameters[1] != 0;
  double w[BLOCK];
  vec sums[7] = {{0}};
  lanes signs = {0};
  sums[5] += INFINITY;
  sums[6] -= INFINITY;
  double tail[10] = {0};
  tail[8] = INFINITY, tail[9] = -INFINITY;
  for (int64_t at = begin; at < end; at += BLOCK) {
    int64_t count = end - at < BLOCK ? end - at : BLOCK, groups = count / 4;
    NAME(load)(j->x, j->dtype, at, count, w);
    if (higher)
      NAME(add_moments)(w, groups, pivot, 1, sums, &signs);
    else
      NAME(add_moments)(w, groups, pivot, 0, sums, &signs);
    add_one_by_one(w + 4 * groups, count - 4 * groups, pivot, tail);
  }
  double second = NAME(total)(sums[2]);
  if (!(second + tail[5] < INFINITY)) { /* some are NaN or infinite, or squares overflow */
    memset(out, 0, 10 * sizeof *out);
    out[8] = INFINITY, out[9] = -INFINITY;
    for (int64_t at = begin; at < end; at += BLOCK) {
      int64_t count = end - at < BLOCK ? end - at : BLOCK;
      NAME(load)(j->x, j->dtype, at, count, w);
      add_one_by_one(w, count, pivot, out);
    }
    return;
  }
  out[0] = (double)(end - begin) - tail[1];
  out[1] = tail[1];
  out[2] = NAME(total)(sums[0]) + tail[2];
  out[3] = (double)(signs[0] + signs[1] + signs[2] + signs[3]) + tail[3];
  out[4] = NAME(total)(sums[1]) + tail[4];
  out[5] = second + tail[5];
  out[6] = higher ? NAME(total)(sums[3]) + tail[6] : 0.0;
  out[7] = higher ? NAME(total)(sums[4]) + tail[7] : 0.0;
  out[8] = tail[8], out[9] = tail[9];
  for (int lane = 0; lane < 4; lane++) {
    if (sums[5][lane] < out[8]) out[8] = sums[5][lane];
    if (sums[6][lane] > out[9]) out[9] = sums[6][lane];
  }
}

/* --- likelihood --- */

/* Fill the last pair of vectors up with `value`; the pairs. */
TARGET INLINE int64_t NAME(pad)(double *w, int64_t count, double value) {
  int64_t pairs = (count + 7) / 8;
  for (int64_t i = count; i < 8 * pairs; i++) w[i] = value;
  return pairs;
}

TARGET INLINE void NAME(add_powers)(const double *w, int64_t pairs, double nu, double inverse, double mu, int score,
                                    vec *sums) {
  vec total[7];
  const vec tiny = (vec){0} + 0x1p-1022;
  memcpy(total, sums, sizeof total);
  for (int64_t i = 0; i < pairs; i++) {
    vec d[2], z[2], l[2], p[2];
    lanes some[2];
    PAIR d[u] = NAME(get)(w + 8 * i + 4 * u) - mu;
    PAIR z[u] = NAME(magnitude)(d[u] * inverse);
    PAIR some[u] = z[u] >= tiny;
    PAIR z[u] = NAME(pick)(some[u], z[u], tiny);
    NAME(logarithm)(z, l);
    PAIR p[u] = l[u] * nu;
    NAME(exponential)(p, p);
    PAIR p[u] = (vec)(some[u] & (lanes)p[u]);
    if (score) {
      PAIR z[u] = p[u] / z[u];
      PAIR z[u] = (vec)((bits)z[u] | ((bits)d[u] & 0x8000000000000000u));
      PAIR total[5] += z[u];
      PAIR total[6] += z[u] * l[u];
    }
    PAIR total[0] += p[u];
#pragma GCC unroll 4
    for (int k = 1; k <= 4; k++) {
      PAIR p[u] *= l[u];
      PAIR total[k] += p[u];
    }
  }
  memcpy(sums, total, sizeof total);
}

/* Of values [begin, end): Σz^ν lnᵏz for k = 0 … 4, z = |w - μ| / α, and if they are asked for Σ sign(w - μ) z^(ν-1) lnᵏz
   for k = 0, 1. */
TARGET static void NAME(powers)(const job *j, int64_t begin, int64_t end, double *out) {
  const double nu = j->parameters[0], inverse = 1.0 / j->parameters[1], mu = j->parameters[2];
  double w[BLOCK];
  vec sums[7] = {{0}};
  for (int64_t at = begin; at < end; at += BLOCK) {
    int64_t count = end - at < BLOCK ? end - at : BLOCK;
    NAME(load)(j->x, j->dtype, at, count, w);
    int64_t pairs = NAME(pad)(w, count, mu); /* adds nothing */
    if (j->parameters[3] != 0)
      NAME(add_powers)(w, pairs, nu, inverse, mu, 1, sums);
    else
      NAME(add_powers)(w, pairs, nu, inverse, mu, 0, sums);
  }
  for (int k = 0; k < 7; k++) out[k] = NAME(total)(sums[k]);
}

/* --- location --- */

/* Of values [begin, end), with z = (w - center) / half: those with |z| ≤ FAR are written down, and Σ(|z| - 1)^ν of those
   with |z| > 1 among them is summed for the first of two shapes ν; from the others, for both, Σ|z|^ν z^-k, k = 0 … 8 and 0 … 4. */
TARGET static void NAME(near)(const job *j, int64_t begin, int64_t end, double *out) {
  const double center = j->parameters[0], inverse = 1.0 / j->parameters[1];
  const double nu[2] = {j->parameters[2], j->parameters[3]};
  double w[BLOCK], found[BLOCK];
  vec sums[2][ORDERS] = {{{0}}}, gaps = {0};
  const vec far = (vec){0} + FAR, tiny = (vec){0} + 0x1p-1022;
  for (int64_t at = begin; at < end; at += BLOCK) {
    int64_t count = end - at < BLOCK ? end - at : BLOCK, close = 0;
    NAME(load)(j->x, j->dtype, at, count, w);
    int64_t pairs = NAME(pad)(w, count, INFINITY);
    for (int64_t i = 0; i < pairs; i++) {
      vec z[2], size[2], l[2], p[2], x[2];
      lanes outside[2], beside[2];
      PAIR z[u] = (NAME(get)(w + 8 * i + 4 * u) - center) * inverse;
      PAIR size[u] = NAME(magnitude)(z[u]);
      PAIR outside[u] = (size[u] > far) & (size[u] < (vec){0} + 0x1p1000);
      if (j->capacity)
        PAIR for (int lane = 0; lane < 4; lane++) if (size[u][lane] <= FAR) found[close++] = z[u][lane];
      PAIR beside[u] = (size[u] <= far) & (size[u] - 1.0 >= tiny);
      PAIR z[u] = NAME(pick)(outside[u], z[u], far);
      PAIR size[u] = NAME(pick)(outside[u], size[u], NAME(pick)(beside[u], size[u] - 1.0, tiny));
      NAME(logarithm)(size, l);
      PAIR z[u] = 1.0 / z[u];
#pragma GCC unroll 2
      for (int which = 0; which < 2; which++) {
        PAIR x[u] = l[u] * nu[which];
        NAME(exponential)(x, p);
        if (which == 0) PAIR gaps += (vec)(beside[u] & (lanes)p[u]);
        PAIR p[u] = (vec)(outside[u] & (lanes)p[u]);
#pragma GCC unroll 9
        for (int k = 0; k < (which ? FEWER_ORDERS : ORDERS); k++) {
          sums[which][k] += p[0] + p[1];
          PAIR p[u] *= z[u];
        }
      }
    }
    if (close) {
      int64_t to;
#pragma omp atomic capture
      {
        to = *j->found;
        *j->found += close;
      }
      for (int64_t i = 0; i < close; i++)
        if (to + i < j->capacity) j->near[to + i] = found[i];
    }
  }
  for (int which = 0; which < 2; which++)
    for (int k = 0; k < ORDERS; k++) out[which * ORDERS + k] = NAME(total)(sums[which][k]);
  out[2 * ORDERS] = NAME(total)(gaps);
}
