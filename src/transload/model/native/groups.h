/* Weights in groups of 32 with a scale of their own, as GGUF files store them (Q4_1, Q8_0), against rows of activations
rounded to eight bits in groups of 32 alike.

Owns the layout of a panel of such weights and of a rounded row, and the tiles over them. Sums inside a group are of
integers and exact; groups are added up in order, so a row's bits never depend on how many rows there are.

A panel: for each group and vector of outputs the scales (Q4_1: then the minima) as 16-bit floats, LANES each; then, in
the same order, the numbers: a lane holds four neighbouring inputs of its output. Of Q4_1 a byte holds input i low and
input 16 + i high, as the file does.

A rounded row: K signed bytes, then a float scale a group, then a float a group that the minimum is multiplied with:
the sum of the rounded numbers. What is not finite makes its group's scale NaN or infinite, and with it every output. */

#ifndef TRANSLOAD_GROUPS_H
#define TRANSLOAD_GROUPS_H

#include "vector.h"

#define GROUP_INPUTS 32
#define GROUP_TILE_ROWS 4
#define BYTES_OF_Q4_1 20
#define BYTES_OF_Q8_0 34

INLINE int64_t rounded_row_bytes(int64_t num_inputs) { return num_inputs + num_inputs / GROUP_INPUTS * 8; }
INLINE int64_t group_factor_bytes(int four_bits) { return PANEL_VECTORS * LANES * (four_bits ? 4 : 2); }
INLINE int64_t group_number_bytes(int four_bits) { return PANEL_VECTORS * VECTOR_BYTES * (four_bits ? 4 : 8); }
INLINE int64_t group_panel_bytes(int four_bits, int64_t num_inputs) {
    return num_inputs / GROUP_INPUTS * (group_factor_bytes(four_bits) + group_number_bytes(four_bits));
}

/* --- Activations --------------------------------------------------------------------------------------------------- */

#define GROUP_VECTORS (GROUP_INPUTS / LANES)

INLINE void store_group(const vi numbers[GROUP_VECTORS], int8_t *to) {
#if VECTOR_BYTES == 32
    const __m256i low = _mm256_packs_epi32((__m256i)numbers[0], (__m256i)numbers[1]);
    const __m256i high = _mm256_packs_epi32((__m256i)numbers[2], (__m256i)numbers[3]);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256((__m256i_u *)to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
#else
    for (int i = 0; i < GROUP_INPUTS; i++) to[i] = (int8_t)numbers[i / LANES][i % LANES];
#endif
}

/* Round a row of activations: floats, or bfloat16 where `narrow`. */
static void round_row(int narrow, const void *x, int64_t num_inputs, char *to) {
    const int64_t groups = num_inputs / GROUP_INPUTS;
    float *scales = (float *)(to + num_inputs), *sums = scales + groups;
    const vf magic = all(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    for (int64_t group = 0; group < groups; group++) {
        vf values[GROUP_VECTORS];
        vi numbers[GROUP_VECTORS], bits = {0}, sum = {0};
#pragma GCC unroll 8
        for (int i = 0; i < GROUP_VECTORS; i++) {
            const int64_t column = group * GROUP_INPUTS + i * LANES;
            values[i] = narrow ? load_bf16((const uint16_t *)x + column) : load((const float *)x + column);
            const vi absolute = (vi)values[i] & 0x7fffffff; /* as integers they order as floats do, NaN last */
            bits = (vi)choose(absolute > bits, (vf)absolute, (vf)bits);
        }
        const int32_t top = largest_int(bits);
        float largest;
        memcpy(&largest, &top, 4);
        const float inverse = largest > 1e-30f ? 127.0f / largest : 0.0f;
#pragma GCC unroll 8
        for (int i = 0; i < GROUP_VECTORS; i++) {
            numbers[i] = (vi)(values[i] * inverse + magic) - (vi)magic;
            sum += numbers[i];
        }
        store_group(numbers, (int8_t *)to + group * GROUP_INPUTS);
        scales[group] = largest * (1.0f / 127.0f);
        sums[group] = scales[group] * (float)sum_ints(sum);
    }
}

/* --- Tiles --------------------------------------------------------------------------------------------------------- */

INLINE void ask_ahead(const void *from, int64_t ahead, int64_t num_bytes) {
    for (int64_t offset = 0; offset < num_bytes; offset += 64) __builtin_prefetch((const char *)from + ahead + offset, 0, 2);
}

/* Integer sums of one group: `dots` [rows, PANEL_VECTORS]. Fifteen times 127 sixteen times over fits 16 bits. */
INLINE void dots_of_four_bits(int num_rows, const char *x, int64_t row_bytes, const vb *weight, vi *dots) {
    vs sum[GROUP_TILE_ROWS * PANEL_VECTORS];
#pragma GCC unroll 8
    for (int step = 0; step < 8; step++) { /* four inputs each; the low halves of all bytes first */
        vb numbers[PANEL_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++) {
            const vus bytes = (vus)weight[v * 4 + step % 4];
            numbers[v] = (vb)((step < 4 ? bytes : bytes >> 4) & 0x0f0f);
        }
#pragma GCC unroll 4
        for (int row = 0; row < num_rows; row++) {
            const vb four = all_four_bytes(x + row * row_bytes + step * 4);
#pragma GCC unroll 4
            for (int v = 0; v < PANEL_VECTORS; v++) {
                const vs product = multiply_bytes(numbers[v], four);
                if (step == 0)
                    sum[row * PANEL_VECTORS + v] = product;
                else
                    sum[row * PANEL_VECTORS + v] += product;
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < num_rows * PANEL_VECTORS; i++) dots[i] = add_halves(sum[i]);
}

INLINE void dots_of_eight_bits(int num_rows, const char *x, int64_t row_bytes, const vb *weight, vi *dots) {
#pragma GCC unroll 16
    for (int i = 0; i < num_rows * PANEL_VECTORS; i++) dots[i] = (vi){0};
    for (int step = 0; step < 8; step++) {
        vb numbers[PANEL_VECTORS], magnitudes[PANEL_VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++) {
            numbers[v] = weight[v * 8 + step];
            magnitudes[v] = magnitude(numbers[v]);
        }
#pragma GCC unroll 4
        for (int row = 0; row < num_rows; row++) {
            const vb four = all_four_bytes(x + row * row_bytes + step * 4);
#pragma GCC unroll 4
            for (int v = 0; v < PANEL_VECTORS; v++)
                dots[row * PANEL_VECTORS + v] += add_halves(multiply_bytes(magnitudes[v], signed_like(four, numbers[v])));
        }
    }
}

/* One tile: rounded rows against a panel; sums in out[row * PANEL_VECTORS + vector]. */
INLINE void group_tile(int four_bits, int num_rows, const char *x, int64_t row_bytes, const char *panel,
                       int64_t num_inputs, vf *out) {
    const int64_t groups = num_inputs / GROUP_INPUTS, stride = group_panel_bytes(four_bits, num_inputs);
    const int64_t factor_bytes = group_factor_bytes(four_bits), number_bytes = group_number_bytes(four_bits);
    const char *numbers = panel + groups * factor_bytes;
    vf sum[GROUP_TILE_ROWS * PANEL_VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < num_rows * PANEL_VECTORS; i++) sum[i] = (vf){0};
    for (int64_t group = 0; group < groups; group++) {
        const vb *weight = (const vb *)(numbers + group * number_bytes);
        vi dots[GROUP_TILE_ROWS * PANEL_VECTORS];
        ask_ahead(weight, stride, number_bytes);
        ask_ahead(panel + group * factor_bytes, stride, factor_bytes);
        if (four_bits)
            dots_of_four_bits(num_rows, x + group * GROUP_INPUTS, row_bytes, weight, dots);
        else
            dots_of_eight_bits(num_rows, x + group * GROUP_INPUTS, row_bytes, weight, dots);
        const uint16_t *factors = (const uint16_t *)(panel + group * factor_bytes);
#pragma GCC unroll 4
        for (int v = 0; v < PANEL_VECTORS; v++) {
            const vf scale = load_halves(factors + v * LANES);
            const vf minimum = four_bits ? load_halves(factors + (PANEL_VECTORS + v) * LANES) : (vf){0};
#pragma GCC unroll 4
            for (int row = 0; row < num_rows; row++) {
                const float *of_row = (const float *)(x + row * row_bytes + num_inputs) + group;
                vf *to = &sum[row * PANEL_VECTORS + v];
                *to += __builtin_convertvector(dots[row * PANEL_VECTORS + v], vf) * scale * of_row[0];
                if (four_bits) *to += minimum * of_row[groups];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < num_rows * PANEL_VECTORS; i++) out[i] = sum[i];
}

typedef void group_tile_function(const char *, int64_t, const char *, int64_t, vf *);
#define GROUP_TILE(name, four_bits, rows)                                                                       \
    static __attribute__((noinline)) void name(const char *x, int64_t row_bytes, const char *panel,             \
                                               int64_t num_inputs, vf *out) {                                   \
        group_tile(four_bits, rows, x, row_bytes, panel, num_inputs, out);                                      \
    }
GROUP_TILE(four_bits_1, 1, 1) GROUP_TILE(four_bits_2, 1, 2) GROUP_TILE(four_bits_3, 1, 3) GROUP_TILE(four_bits_4, 1, 4)
GROUP_TILE(eight_bits_1, 0, 1) GROUP_TILE(eight_bits_2, 0, 2) GROUP_TILE(eight_bits_3, 0, 3)
GROUP_TILE(eight_bits_4, 0, 4)
static group_tile_function *const GROUP_TILE_OF[2][GROUP_TILE_ROWS + 1] = {
    {0, eight_bits_1, eight_bits_2, eight_bits_3, eight_bits_4},
    {0, four_bits_1, four_bits_2, four_bits_3, four_bits_4},
};

/* --- Weights ------------------------------------------------------------------------------------------------------- */

/* Put one output's row of stored blocks into its place in a panel. */
static void pack_group_row(int four_bits, const char *stored, int64_t num_inputs, int vector, int lane, char *panel) {
    const int64_t groups = num_inputs / GROUP_INPUTS;
    const int64_t block_bytes = four_bits ? BYTES_OF_Q4_1 : BYTES_OF_Q8_0, factors = four_bits ? 2 : 1;
    char *numbers = panel + groups * group_factor_bytes(four_bits);
    for (int64_t group = 0; group < groups; group++, stored += block_bytes) {
        char *to_factors = panel + group * group_factor_bytes(four_bits);
        for (int64_t i = 0; i < factors; i++)
            memcpy(to_factors + ((i * PANEL_VECTORS + vector) * LANES + lane) * 2, stored + 2 * i, 2);
        char *to = numbers + group * group_number_bytes(four_bits) + vector * (four_bits ? 4 : 8) * VECTOR_BYTES;
        for (int step = 0; step < (four_bits ? 4 : 8); step++)
            memcpy(to + step * VECTOR_BYTES + lane * 4, stored + 2 * factors + 4 * step, 4);
    }
}

/* The numbers of one output. */
static void unpack_group_row(int four_bits, const char *panel, int64_t num_inputs, int vector, int lane, float *to) {
    const int64_t groups = num_inputs / GROUP_INPUTS;
    const char *numbers = panel + groups * group_factor_bytes(four_bits);
    for (int64_t group = 0; group < groups; group++, to += GROUP_INPUTS) {
        const uint16_t *factors = (const uint16_t *)(panel + group * group_factor_bytes(four_bits));
        const float scale = half_to_float(factors[vector * LANES + lane]);
        const float minimum = four_bits ? half_to_float(factors[(PANEL_VECTORS + vector) * LANES + lane]) : 0.0f;
        const char *from =
            numbers + group * group_number_bytes(four_bits) + vector * (four_bits ? 4 : 8) * VECTOR_BYTES + lane * 4;
        for (int i = 0; i < GROUP_INPUTS; i++) {
            const char byte = from[i % (four_bits ? 16 : 32) / 4 * VECTOR_BYTES + i % 4];
            if (four_bits)
                to[i] = scale * (i < 16 ? byte & 15 : (unsigned char)byte >> 4) + minimum;
            else
                to[i] = scale * (signed char)byte;
        }
    }
}

#endif
