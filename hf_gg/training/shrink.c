/* The penalty's step on float32 weights in one pass: |w| falls by 2^(power * log2(|w| * inverse + eps) + offset).

   Logarithm and exponential are polynomials, to 2e-6 of the step, without branches, so that compilers vectorize. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(HF_GG_PORTABLE)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define EXPORT __attribute__((visibility("default")))

/* weights of one piece of work: they fit in a core's cache beside others */
#define PIECE 16384

static inline float as_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t as_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* log2 of a number >= 0; of zero about -127 */
static inline float log2_of(float a)
{
    int32_t bits = (int32_t)as_bits(a);
    int32_t whole = (bits - 0x3f3504f3) >> 23; /* the mantissa is brought to [1/sqrt 2, sqrt 2) */
    float f = as_float((uint32_t)bits - ((uint32_t)whole << 23)) - 1.0f;
    float p = 0.172128721f;
    p = p * f - 0.26950629f;
    p = p * f + 0.295633607f;
    p = p * f - 0.359350651f;
    p = p * f + 0.480629146f;
    p = p * f - 0.72136404f;
    p = p * f + 1.44269643f;
    return (float)whole + f * p;
}

/* 2^t, with t brought to [-126, 127] */
static inline float exp2_of(float t)
{
    t = t < -126.0f ? -126.0f : t;
    t = t > 127.0f ? 127.0f : t;
    float rounded = t + 12582912.0f; /* 1.5 * 2^23: the sum is a whole number */
    uint32_t whole = as_bits(rounded) - 0x4b400000u;
    float f = t - (rounded - 12582912.0f);
    float p = 0.00134004322f;
    p = p * f + 0.0096760371f;
    p = p * f + 0.0555032721f;
    p = p * f + 0.240221074f;
    p = p * f + 0.693147207f;
    p = p * f + 1.00000008f;
    return as_float(as_bits(p) + (whole << 23));
}

/* Returns whether a weight is NaN or infinite. */
static inline __attribute__((always_inline)) uint32_t shrink(float *w, int64_t n, const float *numbers, int stop)
{
    float inverse = numbers[0], eps = numbers[1], power = numbers[2], offset = numbers[3];
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t sign = as_bits(w[i]) & 0x80000000u;
        float m = as_float(as_bits(w[i]) & 0x7fffffffu);
        float left = m - exp2_of(power * log2_of(m * inverse + eps) + offset);
        int zero = stop ? left <= 0.0f : (m == 0.0f) | (left == 0.0f); /* NaN is not, and no zero has a sign */
        uint32_t bits = zero ? 0u : as_bits(left) ^ sign;
        w[i] = as_float(bits);
        bad |= (bits & 0x7fffffffu) >= 0x7f800000u;
    }
    return bad;
}

CLONES static uint32_t shrink_and_stop(float *w, int64_t n, const float *numbers)
{
    return shrink(w, n, numbers, 1);
}

CLONES static uint32_t shrink_across(float *w, int64_t n, const float *numbers)
{
    return shrink(w, n, numbers, 0);
}

/* numbers: inverse, eps, power, offset. The result is 0 if all weights are finite. */
EXPORT int64_t hf_gg_shrink(float *w, int64_t n, const float *numbers, int64_t stop, int64_t threads)
{
    int64_t pieces = (n + PIECE - 1) / PIECE;
    uint32_t bad = 0;
    if (threads > pieces)
        threads = pieces > 0 ? pieces : 1;
#pragma omp parallel for num_threads((int)threads) schedule(static) reduction(| : bad) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t begin = piece * PIECE;
        int64_t size = n - begin < PIECE ? n - begin : PIECE;
        bad |= stop ? shrink_and_stop(w + begin, size, numbers) : shrink_across(w + begin, size, numbers);
    }
    return bad;
}
