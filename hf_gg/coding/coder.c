/* Entropy coding of bytes. Python checks headers and tables; the streams behind them are read without trust here. */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && !defined(HF_GG_PORTABLE)
#define HF_GG_X86 1
#include <immintrin.h>
#endif

#define EXPORT __attribute__((visibility("default")))

enum { LOWEST = 1 << 16, MOST_LANES = 32, MOST_ORDER = 8, MOST_CODE = 17 };
static const int64_t WRONG_FREQUENCY = (int64_t)1 << 40;
static const uint32_t FNV_OFFSET = 2166136261u, FNV_PRIME = 16777619u;

/* Symbols of a chunk: the last one may be shorter. Every function works on chunks [begin, end). */
static int64_t chunk_size(int64_t count, int64_t chunk, int64_t index) {
  int64_t left = count - index * chunk;
  return left < chunk ? left : chunk;
}

static uint32_t load16(const uint8_t *p) { return (uint32_t)p[0] | (uint32_t)p[1] << 8; }

/* --- counting and hashing --- */

EXPORT void hf_gg_coder_count(const uint8_t *symbols, int64_t count, int64_t *counts) {
  uint32_t part[4][256];
  int64_t i = 0;
  memset(counts, 0, 256 * sizeof *counts);
  while (i < count) { /* four tables, because equal neighbours would wait for each other */
    int64_t stop = count - i < 1 << 30 ? count : i + (1 << 30);
    memset(part, 0, sizeof part);
    for (; i + 4 <= stop; i += 4)
      for (int j = 0; j < 4; j++) part[j][symbols[i + j]]++;
    for (; i < stop; i++) part[0][symbols[i]]++;
    for (int s = 0; s < 256; s++) counts[s] += (int64_t)part[0][s] + part[1][s] + part[2][s] + part[3][s];
  }
}

static inline __attribute__((always_inline)) void hash_rows(const uint8_t *symbols, int64_t rows, uint32_t *hashes) {
  uint32_t h[MOST_LANES];
  memcpy(h, hashes, sizeof h);
  for (int64_t row = 0; row < rows; row++)
    for (int lane = 0; lane < MOST_LANES; lane++) h[lane] = (h[lane] ^ symbols[row * MOST_LANES + lane]) * FNV_PRIME;
  memcpy(hashes, h, sizeof h);
}

#ifdef HF_GG_X86
__attribute__((target("avx2"))) static void hash_rows_avx2(const uint8_t *symbols, int64_t rows, uint32_t *hashes) {
  hash_rows(symbols, rows, hashes);
}
#endif

static void hash_chunk(int64_t isa, const uint8_t *symbols, int64_t count, int64_t lanes, uint32_t *hashes) {
  int64_t rows = lanes == MOST_LANES ? count / MOST_LANES : 0;
  for (int64_t lane = 0; lane < lanes; lane++) hashes[lane] = FNV_OFFSET;
#ifdef HF_GG_X86
  if (isa > 0 && rows > 0)
    hash_rows_avx2(symbols, rows, hashes);
  else
#endif
      if (rows > 0)
    hash_rows(symbols, rows, hashes);
  (void)isa;
  for (int64_t i = rows * MOST_LANES; i < count; i++) {
    uint32_t *hash = hashes + (i & (lanes - 1));
    *hash = (*hash ^ symbols[i]) * FNV_PRIME;
  }
}

/* FNV-1a of each lane of each chunk. */
EXPORT void hf_gg_coder_hash(int64_t isa, const uint8_t *symbols, int64_t count, int64_t chunk, int64_t lanes,
                             int64_t begin, int64_t end, uint32_t *hashes) {
  for (int64_t c = begin; c < end; c++)
    hash_chunk(isa, symbols + c * chunk, chunk_size(count, chunk, c), lanes, hashes + c * lanes);
}

/* --- rANS --- */

/* `table`: of each symbol, frequency | start << 16. `slots`: the symbol of each of the 2^bits slots, 3 bytes more. */
typedef struct {
  const uint8_t *slots;
  const uint32_t *table;
  int bits;
} rans_model;

/* A chunk's lanes: states, and the words that are still to be read. */
typedef struct {
  uint32_t state[MOST_LANES];
  const uint8_t *at, *end;
} rans_lanes;

#ifdef HF_GG_X86
/* Of each mask of eight lanes: which of the next words each lane takes. */
static uint8_t word_of_lane[256][8];

__attribute__((constructor)) static void fill_word_of_lane(void) {
  for (int mask = 0; mask < 256; mask++)
    for (int lane = 0, next = 0; lane < 8; lane++) {
      word_of_lane[mask][lane] = (uint8_t)(next & 7);
      next += mask >> lane & 1;
    }
}

/* The table entries of the symbols in eight slots, which are written to `out`. Loads one by one: on many processors
   they take fewer steps than a gather. */
__attribute__((target("avx2"))) static inline __m256i look_up(const rans_model *m, __m256i slot, uint8_t *out) {
  uint32_t slots[8], entry[8];
  _mm256_storeu_si256((__m256i *)slots, slot);
  for (int lane = 0; lane < 8; lane++) {
    out[lane] = m->slots[slots[lane]];
    entry[lane] = m->table[out[lane]];
  }
  __m128i low = _mm_setr_epi32((int)entry[0], (int)entry[1], (int)entry[2], (int)entry[3]);
  __m128i high = _mm_setr_epi32((int)entry[4], (int)entry[5], (int)entry[6], (int)entry[7]);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* Whole rows of 32 lanes while a row's 64 bytes are certainly left. Returns the number of rows. */
__attribute__((target("avx2,popcnt"))) static int64_t rows_avx2(const rans_model *model, rans_lanes *r, uint8_t *out,
                                                                int64_t rows) {
  const rans_model m = *model;
  const __m256i slot_mask = _mm256_set1_epi32((1 << m.bits) - 1), low16 = _mm256_set1_epi32(0xffff);
  const __m128i shift = _mm_cvtsi32_si128(m.bits);
  const uint8_t *at = r->at, *end = r->end;
  __m256i x[4];
  int64_t row = 0;
  for (int g = 0; g < 4; g++) x[g] = _mm256_loadu_si256((const __m256i *)(r->state + 8 * g));
  for (; row < rows && end - at >= 64; row++) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; g++) {
      __m256i slot = _mm256_and_si256(x[g], slot_mask);
      __m256i entry = look_up(&m, slot, out + 32 * row + 8 * g);
      __m256i product = _mm256_mullo_epi32(_mm256_and_si256(entry, low16), _mm256_srl_epi32(x[g], shift));
      __m256i next = _mm256_add_epi32(product, _mm256_sub_epi32(slot, _mm256_srli_epi32(entry, 16)));
      __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 16), _mm256_setzero_si256());
      int mask = _mm256_movemask_ps(_mm256_castsi256_ps(low));
      __m256i pick = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)word_of_lane[mask]));
      __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at));
      words = _mm256_or_si256(_mm256_slli_epi32(next, 16), _mm256_permutevar8x32_epi32(words, pick));
      x[g] = _mm256_blendv_epi8(next, words, low);
      at += 2 * _mm_popcnt_u32((unsigned)mask);
    }
  }
  for (int g = 0; g < 4; g++) _mm256_storeu_si256((__m256i *)(r->state + 8 * g), x[g]);
  r->at = at;
  return row;
}
#endif

/* Whole rows while a row's words are certainly left, without a branch that depends on data. */
static int64_t rows_portable(const rans_model *model, rans_lanes *r, uint8_t *out, int64_t rows, int64_t lanes) {
  const rans_model m = *model;
  const uint8_t *at = r->at, *end = r->end;
  uint32_t mask = (1u << m.bits) - 1;
  int64_t row = 0;
  for (; row < rows && end - at >= 2 * lanes; row++, out += lanes)
    for (int64_t lane = 0; lane < lanes; lane++) {
      uint32_t x = r->state[lane], slot = x & mask, symbol = m.slots[slot], entry = m.table[symbol];
      x = (entry & 0xffff) * (x >> m.bits) + slot - (entry >> 16);
      uint32_t low = x < LOWEST, more = x << 16 | load16(at);
      r->state[lane] = x ^ ((x ^ more) & -low); /* compilers make a branch of low ? more : x */
      at += 2 * low;
      out[lane] = (uint8_t)symbol;
    }
  r->at = at;
  return row;
}

/* One symbol of each of the first `width` lanes. Returns 1 if the words are used up. */
static inline int row_scalar(const rans_model *m, rans_lanes *r, uint8_t *out, int64_t width) {
  uint32_t mask = (1u << m->bits) - 1;
  for (int64_t lane = 0; lane < width; lane++) {
    uint32_t x = r->state[lane], slot = x & mask, symbol = m->slots[slot], entry = m->table[symbol];
    x = (entry & 0xffff) * (x >> m->bits) + slot - (entry >> 16);
    if (x < LOWEST) {
      if (r->end - r->at < 2) return 1;
      x = x << 16 | load16(r->at);
      r->at += 2;
    }
    r->state[lane] = x;
    out[lane] = (uint8_t)symbol;
  }
  return 0;
}

/* Whether a chunk's states and words end where they began in the encoder. */
static int decode_chunk(const rans_model *m, rans_lanes *r, uint8_t *out, int64_t count, int64_t lanes, int64_t isa) {
  int64_t row = 0, rows = count / lanes;
  for (int64_t lane = 0; lane < lanes; lane++)
    if (r->state[lane] < LOWEST) return 0;
#ifdef HF_GG_X86
  if (isa > 0 && lanes == MOST_LANES) row = rows_avx2(m, r, out, rows);
#endif
  (void)isa;
  row += rows_portable(m, r, out + row * lanes, rows - row, lanes);
  for (; row < rows; row++)
    if (row_scalar(m, r, out + row * lanes, lanes)) return 0;
  if (row_scalar(m, r, out + row * lanes, count - row * lanes)) return 0;
  for (int64_t lane = 0; lane < lanes; lane++)
    if (r->state[lane] != LOWEST) return 0;
  return r->at == r->end;
}

/* The best instruction set here: 1 for AVX2, or 0. */
EXPORT int64_t hf_gg_coder_isa(void) {
#ifdef HF_GG_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt");
#else
  return 0;
#endif
}

/* `states` are those of all chunks, little-endian and not aligned; `ends` are the ends of the chunks' words in bytes.
   Returns the first damaged chunk, or -1. */
/* A stored table of frequencies, as models.read_table reads it. 0, or what is wrong: 1 it is cut short, 2 it is longer
   than its symbols, WRONG_FREQUENCY + n a frequency of n bits. */
EXPORT int64_t hf_gg_rans_read_table(const uint8_t *data, int64_t size, int64_t bits, int64_t *frequencies) {
  int64_t end = 8 * size, at = 8, before = bits - 2;
  memset(frequencies, 0, 256 * sizeof *frequencies);
  if (size < 1) return 1;
#define NEXT (at < end ? data[at >> 3] >> (7 - (at & 7)) & 1 : 0)
  for (int position = 0; position <= data[0]; position++) {
    int used = NEXT;
    if (at++ >= end) return 1;
    if (!used) continue;
    int64_t step = 0;
    while (NEXT) step++, at++;
    at++; /* the zero behind the ones */
    before += step & 1 ? -(step + 1 >> 1) : step >> 1;
    if (before < 0 || before >= bits) return WRONG_FREQUENCY + before + 1;
    if (end - at < before) return 1;
    int64_t value = 1;
    for (int64_t i = 0; i < before; i++, at++) value = value << 1 | NEXT;
    frequencies[position >> 1 | (position & 1) << 7] = value;
  }
  if (end - at >= 8) return 2;
  for (; at < end; at++)
    if (NEXT) return 2;
#undef NEXT
  return 0;
}

/* The symbol of each slot, and of each symbol frequency | start << 16; frequencies have the sum 2^bits. */
EXPORT void hf_gg_rans_tables(const int64_t *frequencies, uint8_t *slots, uint32_t *table) {
  uint32_t start = 0;
  for (int symbol = 0; symbol < 256; symbol++) {
    uint32_t frequency = (uint32_t)frequencies[symbol];
    table[symbol] = frequency ? frequency | start << 16 : 0;
    memset(slots + start, symbol, frequency);
    start += frequency;
  }
}

EXPORT int64_t hf_gg_rans_decode(int64_t isa, const uint8_t *slots, const uint32_t *table, int64_t bits,
                                 const uint8_t *states, const uint8_t *words, const int64_t *ends, int64_t count,
                                 int64_t chunk, int64_t lanes, int64_t begin, int64_t end, uint8_t *out,
                                 uint32_t *hashes) {
  rans_model m = {slots, table, (int)bits};
  rans_lanes r;
  for (int64_t c = begin; c < end; c++) {
    const uint8_t *state = states + 4 * lanes * c;
    for (int64_t lane = 0; lane < lanes; lane++, state += 4) r.state[lane] = load16(state) | load16(state + 2) << 16;
    r.at = words + (c ? ends[c - 1] : 0);
    r.end = words + ends[c];
    int64_t size = chunk_size(count, chunk, c);
    if (!decode_chunk(&m, &r, out + c * chunk, size, lanes, isa)) return c;
    hash_chunk(isa, out + c * chunk, size, lanes, hashes + c * lanes);
  }
  return -1;
}

/* Every symbol must have a frequency. A chunk's words, at most one a symbol, end where its part of `words` does. */
EXPORT void hf_gg_rans_encode(const uint32_t *table, int64_t bits, const uint8_t *symbols, int64_t count, int64_t chunk,
                              int64_t lanes, int64_t begin, int64_t end, uint32_t *states, uint16_t *words,
                              int64_t *lengths) {
  for (int64_t c = begin; c < end; c++) {
    uint32_t *state = states + c * lanes;
    uint16_t *last = words + (c + 1) * chunk, *at = last;
    for (int64_t lane = 0; lane < lanes; lane++) state[lane] = LOWEST;
    for (int64_t i = chunk_size(count, chunk, c) - 1; i >= 0; i--) {
      uint32_t entry = table[symbols[c * chunk + i]], frequency = entry & 0xffff, x = state[i & (lanes - 1)];
      int64_t full = x >= frequency << (32 - bits);
      at[-1] = (uint16_t)x; /* counts only if full; no branch that depends on data */
      at -= full;
      x >>= 16 * full;
      state[i & (lanes - 1)] = (x / frequency << bits) + x % frequency + (entry >> 16);
    }
    lengths[c] = last - at;
  }
}

/* --- exp-Golomb --- */

static uint64_t load_big_endian(const uint8_t *p) {
  uint64_t value;
  memcpy(&value, p, sizeof value);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

/* `book`: of each rank below 512 the symbol, or 256 if there is none. Returns whether the chunk is sound. */
static int golomb_chunk(const uint16_t *book, int order, const uint8_t *at, const uint8_t *end, uint8_t *out,
                        int64_t count) {
  uint64_t position = 0, total = (uint64_t)(end - at) * 8;
  uint32_t bad = 0, most = (uint32_t)(MOST_ORDER - order);
  int64_t i = 0;
  for (; i + 3 <= count && position + 64 <= total; i += 3) { /* a window holds three codes, at least */
    uint64_t window = load_big_endian(at + (position >> 3)) << (position & 7);
#pragma GCC unroll 3
    for (int j = 0; j < 3; j++) {
      uint32_t zeros = (uint32_t)__builtin_clzll(window | 1);
      if (zeros > most) return 0;
      uint32_t symbol = book[(window << zeros >> (63 - zeros - (uint32_t)order)) - (1u << order)];
      uint32_t length = 2 * zeros + (uint32_t)order + 1;
      bad |= symbol;
      out[i + j] = (uint8_t)symbol;
      window <<= length;
      position += length;
    }
  }
  for (; i < count; i++) {
    uint8_t rest[8] = {0};
    if (position >= total) return 0;
    int64_t left = (int64_t)(total - (position & ~(uint64_t)7)) / 8;
    memcpy(rest, at + (position >> 3), (size_t)(left < 8 ? left : 8));
    uint64_t window = load_big_endian(rest) << (position & 7);
    uint32_t zeros = (uint32_t)__builtin_clzll(window | 1);
    if (zeros > most) return 0;
    uint32_t symbol = book[(window << zeros >> (63 - zeros - (uint32_t)order)) - (1u << order)];
    bad |= symbol;
    out[i] = (uint8_t)symbol;
    position += 2 * zeros + (uint32_t)order + 1;
  }
  if (bad > 255 || position > total || total - position >= 16) return 0;
  for (; position < total; position++)
    if (at[position >> 3] >> (7 - (position & 7)) & 1) return 0;
  return 1;
}

/* Arguments as for rANS. Returns the first damaged chunk, or -1. */
EXPORT int64_t hf_gg_golomb_decode(int64_t isa, const uint16_t *book, int64_t order, const uint8_t *words,
                                   const int64_t *ends, int64_t count, int64_t chunk, int64_t lanes, int64_t begin,
                                   int64_t end, uint8_t *out, uint32_t *hashes) {
  for (int64_t c = begin; c < end; c++) {
    int64_t size = chunk_size(count, chunk, c);
    if (!golomb_chunk(book, (int)order, words + (c ? ends[c - 1] : 0), words + ends[c], out + c * chunk, size))
      return c;
    hash_chunk(isa, out + c * chunk, size, lanes, hashes + c * lanes);
  }
  return -1;
}

/* `codes`: of each symbol, code | length << 16. Chunk c's stream begins at starts[c] bytes, inside zeros. */
EXPORT void hf_gg_golomb_encode(const uint32_t *codes, const uint8_t *symbols, int64_t count, int64_t chunk,
                                int64_t begin, int64_t end, const int64_t *starts, uint8_t *out) {
  for (int64_t c = begin; c < end; c++) {
    uint8_t *at = out + starts[c];
    uint64_t window = 0;
    uint32_t bits = 0;
    for (int64_t i = 0, size = chunk_size(count, chunk, c); i < size; i++) {
      uint32_t code = codes[symbols[c * chunk + i]];
      window = window << (code >> 16) | (code & 0xffff);
      bits += code >> 16;
      for (; bits >= 8; bits -= 8) *at++ = (uint8_t)(window >> (bits - 8));
    }
    if (bits) *at = (uint8_t)(window << (8 - bits));
  }
}

/* Bits of each chunk's stream. */
EXPORT void hf_gg_golomb_measure(const uint32_t *codes, const uint8_t *symbols, int64_t count, int64_t chunk,
                                 int64_t begin, int64_t end, int64_t *lengths) {
  for (int64_t c = begin; c < end; c++) {
    int64_t bits = 0;
    for (int64_t i = 0, size = chunk_size(count, chunk, c); i < size; i++) bits += codes[symbols[c * chunk + i]] >> 16;
    lengths[c] = bits;
  }
}
