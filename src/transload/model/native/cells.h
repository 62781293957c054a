/* KV cells on their way between two pools: copied and summed in one pass, or summed where they lie.

Owns XXH3-64 of a sequence of cells whose length is a multiple of 64 bytes (the algorithm is Yann Collet's, from its
specification; the constants are its). A test compares it with the xxhash package. Never allocates, never looks at what
may be touched: its callers have.

Stores go past the caches: the copy is read next by another core, and a store that first fetches the line it is about to
overwrite costs a third of the memory's bandwidth. */

#ifndef TRANSLOAD_CELLS_H
#define TRANSLOAD_CELLS_H

#include "vector.h"
#define STRIPE 64
#define STRIPES_A_BLOCK 16
#define PREFETCH_AHEAD 1024

typedef uint64_t u64_any __attribute__((may_alias, aligned(1)));

struct digest {
    uint64_t lanes[8];
    int64_t num_stripes, total_stripes;
};

static const uint8_t SECRET[192] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, 0xe9,
    0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78,
    0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6,
    0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f,
    0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31,
    0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff,
    0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f,
    0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};
#define PRIME32_1 0x9E3779B1u
#define PRIME32_2 0x85EBCA77u
#define PRIME32_3 0xC2B2AE3Du
#define PRIME64_1 0x9E3779B185EBCA87ull
#define PRIME64_2 0xC2B2AE3D27D4EB4Full
#define PRIME64_3 0x165667B19E3779F9ull
#define PRIME64_4 0x85EBCA77C2B2AE63ull
#define PRIME64_5 0x27D4EB2F165667C5ull

/* The eight sums, as the machine holds them. */
#if defined(__AVX2__)
typedef struct { __m256i half[2]; } sums8;
#else
typedef struct { uint64_t lane[8]; } sums8;
#endif

INLINE sums8 add_stripe(sums8 sums, const uint8_t *data, const uint8_t *secret) {
#if defined(__AVX2__)
    for (int side = 0; side < 2; side++) {
        __m256i value = _mm256_loadu_si256((const __m256i *)data + side);
        __m256i keyed = _mm256_xor_si256(value, _mm256_loadu_si256((const __m256i *)secret + side));
        __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
        __m256i swapped = _mm256_shuffle_epi32(value, 0x4e);
        sums.half[side] = _mm256_add_epi64(product, _mm256_add_epi64(sums.half[side], swapped));
    }
#else
    for (int lane = 0; lane < 8; lane++) {
        uint64_t value = ((const u64_any *)data)[lane], keyed = value ^ ((const u64_any *)secret)[lane];
        sums.lane[lane ^ 1] += value;
        sums.lane[lane] += (keyed & 0xffffffffu) * (keyed >> 32);
    }
#endif
    return sums;
}

INLINE sums8 scramble(sums8 sums) {
    uint64_t lanes[8];
    memcpy(lanes, &sums, sizeof lanes);
    for (int lane = 0; lane < 8; lane++)
        lanes[lane] = (lanes[lane] ^ (lanes[lane] >> 47) ^ ((const u64_any *)(SECRET + sizeof SECRET - STRIPE))[lane]) *
                      PRIME32_1;
    memcpy(&sums, lanes, sizeof lanes);
    return sums;
}

/* How a cell is written beside being summed. */
enum { NOT_AT_ALL, PAST_CACHES, INTO_CACHES };

INLINE void write_stripe(uint8_t *to, const uint8_t *from, int writes) {
#if defined(__AVX2__)
    __m256i low = _mm256_loadu_si256((const __m256i *)from), high = _mm256_loadu_si256((const __m256i *)from + 1);
    if (writes == PAST_CACHES) {
        _mm256_stream_si256((__m256i *)to, low);
        _mm256_stream_si256((__m256i *)to + 1, high);
    } else {
        _mm256_storeu_si256((__m256i *)to, low);
        _mm256_storeu_si256((__m256i *)to + 1, high);
    }
#else
    memcpy(to, from, STRIPE);
#endif
}

void transload_digest_begin(struct digest *digest, int64_t num_bytes) {
    static const uint64_t start[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                      PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
    memcpy(digest->lanes, start, sizeof start);
    digest->num_stripes = 0;
    digest->total_stripes = num_bytes / STRIPE;
}

INLINE void take_cells(struct digest *digest, const uint8_t *source, const int64_t *rows, uint8_t *target,
                       const int64_t *target_rows, int64_t num_rows, int64_t cell_bytes, int writes) {
    sums8 sums;
    memcpy(&sums, digest->lanes, sizeof sums);
    int64_t done = digest->num_stripes, last = digest->total_stripes - 1;
    for (int64_t place = 0; place < num_rows; place++) {
        const uint8_t *from = source + rows[place] * cell_bytes;
        const uint8_t *next = place + 1 < num_rows ? source + rows[place + 1] * cell_bytes : from;
        uint8_t *to = writes ? target + target_rows[place] * cell_bytes : 0;
        for (int64_t at = 0; at < cell_bytes; at += STRIPE, done++) {
            int64_t ahead = at + PREFETCH_AHEAD;
            __builtin_prefetch(ahead < cell_bytes ? from + ahead : next + (ahead - cell_bytes));
            if (writes) write_stripe(to + at, from + at, writes);
            if (__builtin_expect(done == last, 0)) {
                sums = add_stripe(sums, from + at, SECRET + sizeof SECRET - STRIPE - 7);
                continue;
            }
            int64_t in_block = done & (STRIPES_A_BLOCK - 1);
            sums = add_stripe(sums, from + at, SECRET + 8 * in_block);
            if (in_block == STRIPES_A_BLOCK - 1) sums = scramble(sums);
        }
    }
    digest->num_stripes = done;
    memcpy(digest->lanes, &sums, sizeof sums);
}

void transload_sum_cells(struct digest *digest, const uint8_t *source, const int64_t *rows, int64_t num_rows,
                         int64_t cell_bytes) {
    take_cells(digest, source, rows, 0, 0, num_rows, cell_bytes, NOT_AT_ALL);
}

/* `stays`: the copy is used next on this core. */
void transload_copy_cells(struct digest *digest, const uint8_t *source, const int64_t *rows, uint8_t *target,
                          const int64_t *target_rows, int64_t num_rows, int64_t cell_bytes, int64_t stays) {
    if (stays || (uintptr_t)target % STRIPE) {
        take_cells(digest, source, rows, target, target_rows, num_rows, cell_bytes, INTO_CACHES);
        return;
    }
    take_cells(digest, source, rows, target, target_rows, num_rows, cell_bytes, PAST_CACHES);
#if defined(__AVX2__)
    _mm_sfence(); /* whoever hears of the copy next finds it */
#endif
}

static uint64_t folded(uint64_t a, uint64_t b) {
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

uint64_t transload_digest_end(const struct digest *digest) {
    uint64_t result = (uint64_t)digest->total_stripes * STRIPE * PRIME64_1;
    const uint8_t *secret = SECRET + 11;
    for (int pair = 0; pair < 4; pair++, secret += 16)
        result += folded(digest->lanes[2 * pair] ^ *(const u64_any *)secret,
                         digest->lanes[2 * pair + 1] ^ *(const u64_any *)(secret + 8));
    result ^= result >> 37;
    result *= 0x165667919E3779F9ull;
    return result ^ (result >> 32);
}

#endif
