/* Vectors of floats as wide as the machine's, and the few functions of them that a transformer needs.

Owns every use of an instruction set. Everything else is written in terms of `vf`, so that one source serves AVX-512,
AVX2, SSE2 and NEON. Never allocates.

PAIRED: activations meet bfloat16 weights as pairs of bfloat16 in one instruction (AVX-512 BF16). Otherwise they stay
float32, and weights are widened in registers. TRANSLOAD_TEST_PAIRED emulates the instruction, to test the first way on
a machine without it. */

#ifndef TRANSLOAD_VECTOR_H
#define TRANSLOAD_VECTOR_H

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define VECTOR_BYTES 64
#define PANEL_VECTORS 4
#define INSTRUCTION_SET "AVX-512"
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTOR_BYTES 32
#define PANEL_VECTORS 2
#define INSTRUCTION_SET "AVX2"
#else
#define VECTOR_BYTES 16
#define PANEL_VECTORS 2
#define INSTRUCTION_SET "128-bit vectors"
#endif
#define LANES (VECTOR_BYTES / 4)
#define PANEL_OUTPUTS (PANEL_VECTORS * LANES)
#define TILE_ROWS 6

#if defined(__AVX512BF16__) && VECTOR_BYTES == 64
#define PAIRED 1
#elif defined(TRANSLOAD_TEST_PAIRED)
#define PAIRED 1
#else
#define PAIRED 0
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint32_t vu __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint16_t vh __attribute__((vector_size(VECTOR_BYTES / 2), may_alias));
typedef int16_t vs __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef uint16_t vus __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef int8_t vb __attribute__((vector_size(VECTOR_BYTES), may_alias));
typedef float vf_any __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
typedef uint32_t vu_any __attribute__((vector_size(VECTOR_BYTES), may_alias, aligned(4)));
typedef uint16_t vh_any __attribute__((vector_size(VECTOR_BYTES / 2), may_alias, aligned(2)));

INLINE vf load(const float *from) { return *(const vf_any *)from; }
INLINE void store(float *to, vf value) { *(vf_any *)to = value; }
INLINE vf all(float value) { return value - (vf){0}; }
INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf larger(vf a, vf b) { return choose(a > b, a, b); }

INLINE vf low_halves(vu pairs) { return (vf)(pairs << 16); }
INLINE vf high_halves(vu pairs) { return (vf)(pairs & 0xffff0000u); }
INLINE vf load_bf16(const uint16_t *from) {
#if VECTOR_BYTES == 64
    return (vf)((vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u *)from)) << 16);
#elif VECTOR_BYTES == 32
    return (vf)((vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u *)from)) << 16);
#else
    return (vf)(__builtin_convertvector(*(const vh_any *)from, vu) << 16);
#endif
}

/* To nearest, ties to even, as torch rounds. A NaN that arithmetic makes stays one. */
INLINE vu rounded(vf value) {
    vu bits = (vu)value;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
INLINE void store_bf16(uint16_t *to, vf value) {
#if VECTOR_BYTES == 64
    _mm256_storeu_si256((__m256i_u *)to, _mm512_cvtepi32_epi16((__m512i)rounded(value)));
    return;
#endif
    *(vh_any *)to = __builtin_convertvector(rounded(value), vh);
}

/* Sixteen-bit floats, exactly. */
INLINE float half_to_float(uint16_t half) {
    uint32_t bits = (uint32_t)(half & 0x7fff) << 13;
    const uint32_t scale_bits = 0x77800000; /* 2^112: shifts the exponent's bias, and normalises what is not normal */
    float value, scale;
    memcpy(&value, &bits, 4);
    memcpy(&scale, &scale_bits, 4);
    value *= scale;
    memcpy(&bits, &value, 4);
    if ((half & 0x7c00) == 0x7c00) bits = 0x7f800000 | (half & 0x3ff) << 13;
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE vf load_halves(const uint16_t *from) {
#if VECTOR_BYTES == 64
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)from));
#elif VECTOR_BYTES == 32 && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)from));
#else
    vf value;
    for (int lane = 0; lane < LANES; lane++) value[lane] = half_to_float(from[lane]);
    return value;
#endif
}

/* Bytes. Each lane of 16 bits: two unsigned bytes times two signed ones, added up; the sum has to fit. */
INLINE vs multiply_bytes(vb unsigned_bytes, vb signed_bytes) {
#if VECTOR_BYTES == 64
    return (vs)_mm512_maddubs_epi16((__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif VECTOR_BYTES == 32
    return (vs)_mm256_maddubs_epi16((__m256i)unsigned_bytes, (__m256i)signed_bytes);
#else
    const vs left = (vs)unsigned_bytes, right = (vs)signed_bytes;
    return (left & 0xff) * (right << 8 >> 8) + (vs)((vus)left >> 8) * (right >> 8);
#endif
}
/* Each lane of 32 bits: its two halves added up. */
INLINE vi add_halves(vs values) {
#if VECTOR_BYTES == 64
    return (vi)_mm512_madd_epi16((__m512i)values, _mm512_set1_epi16(1));
#elif VECTOR_BYTES == 32
    return (vi)_mm256_madd_epi16((__m256i)values, _mm256_set1_epi16(1));
#else
    return ((vi)values << 16 >> 16) + ((vi)values >> 16);
#endif
}
INLINE vb magnitude(vb value) {
#if VECTOR_BYTES == 64
    return (vb)_mm512_abs_epi8((__m512i)value);
#elif VECTOR_BYTES == 32
    return (vb)_mm256_abs_epi8((__m256i)value);
#else
    const vb negative = value < 0;
    return (value ^ negative) - negative;
#endif
}
/* `value` negated where `other` is negative; whatever where it is zero. */
INLINE vb signed_like(vb value, vb other) {
#if VECTOR_BYTES == 64
    const __m512i v = (__m512i)value;
    return (vb)_mm512_mask_sub_epi8(v, _mm512_movepi8_mask((__m512i)other), _mm512_setzero_si512(), v);
#elif VECTOR_BYTES == 32
    return (vb)_mm256_sign_epi8((__m256i)value, (__m256i)other);
#else
    const vb negative = other < 0;
    return (value ^ negative) - negative;
#endif
}
INLINE vb all_four_bytes(const void *from) {
    int32_t four;
    memcpy(&four, from, 4);
    return (vb)(four - (vi){0});
}

INLINE int32_t largest_int(vi value) {
#if VECTOR_BYTES == 32
    __m128i part = _mm_max_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
    part = _mm_max_epi32(part, _mm_shuffle_epi32(part, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(part, _mm_shuffle_epi32(part, 0xb1)));
#else
    int32_t best = value[0];
    for (int lane = 1; lane < LANES; lane++) best = value[lane] > best ? value[lane] : best;
    return best;
#endif
}
INLINE int32_t sum_ints(vi value) {
#if VECTOR_BYTES == 32
    __m128i part = _mm_add_epi32(_mm256_castsi256_si128((__m256i)value), _mm256_extracti128_si256((__m256i)value, 1));
    part = _mm_add_epi32(part, _mm_shuffle_epi32(part, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(part, _mm_shuffle_epi32(part, 0xb1)));
#else
    int32_t sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
#endif
}

INLINE float sum_lanes(vf value) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += value[lane];
    return sum;
}
INLINE float largest_lane(vf value) {
    float best = value[0];
    for (int lane = 1; lane < LANES; lane++) best = value[lane] > best ? value[lane] : best;
    return best;
}

/* Neighbouring lanes of a, then of b, added up. */
INLINE vf add_neighbours(vf a, vf b) {
#if LANES == 16
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif LANES == 8
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

/* Lane i of the result is the sum of all lanes of parts[i]; `parts` is used up. */
INLINE vf sums_of(vf parts[LANES]) {
#if VECTOR_BYTES == 32
    __m256 four[2];
    for (int i = 0; i < 2; i++)
        four[i] = _mm256_hadd_ps(_mm256_hadd_ps((__m256)parts[4 * i], (__m256)parts[4 * i + 1]),
                                 _mm256_hadd_ps((__m256)parts[4 * i + 2], (__m256)parts[4 * i + 3]));
    return (vf)_mm256_add_ps(_mm256_permute2f128_ps(four[0], four[1], 0x20),
                             _mm256_permute2f128_ps(four[0], four[1], 0x31));
#endif
#pragma GCC unroll 4
    for (int width = LANES / 2; width > 0; width /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < width; i++) parts[i] = add_neighbours(parts[2 * i], parts[2 * i + 1]);
    return parts[0];
}

/* 2^x for x <= 127, zero below 2^-126; NaN stays NaN. Relative error 2e-7: the minimax polynomial of degree 6 on
   [-0.5, 0.5]. */
INLINE vf power_of_two(vf x) {
    const vf magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    vi tiny = x < -126.0f;
    vf clamped = choose(tiny, all(-126.0f), x);
    vf shifted = clamped + magic;
    vf fraction = clamped - (shifted - magic);
    vf p = all(1.535336188319500e-4f);
    p = p * fraction + 1.339887440266574e-3f;
    p = p * fraction + 9.618437357674640e-3f;
    p = p * fraction + 5.550332471162809e-2f;
    p = p * fraction + 2.402264791363012e-1f;
    p = p * fraction + 6.931472028550421e-1f;
    p = p * fraction + 1.0f;
    vf scaled = (vf)((vi)p + ((vi)shifted << 23));
    return (vf)(~tiny & (vi)scaled);
}

#define LOG2_E 1.44269504088896341f

/* x / (1 + e^-x) */
INLINE vf silu(vf x) {
    vf exponent = x * -LOG2_E;
    exponent = choose(exponent > 126.0f, all(126.0f), exponent);
    return x / (1.0f + power_of_two(exponent));
}

#endif
