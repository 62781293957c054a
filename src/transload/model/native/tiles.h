/* Matrix multiplication over weights packed once: rows x [T, K] times W^T, W [N, K].

Owns the packed layout and the tiles. Weights lie in panels of PANEL_OUTPUTS outputs, a panel as K consecutive groups of
PANEL_VECTORS vectors (bfloat16: K / 2 groups, each lane a pair of consecutive inputs). An output is one sequential sum
over the inputs whatever shares its tile, so a row's bits never depend on how many rows there are.

`split` > 0: the first half of a panel's vectors are outputs of [0, split), the second half the same outputs of
[split, 2 split): a gate and its up projection then meet in one tile.

Weights in groups of their own scales take the same ways, see groups.h: their rows are rounded to eight bits first. */

#ifndef TRANSLOAD_TILES_H
#define TRANSLOAD_TILES_H

#include "groups.h"

enum { KIND_FLOAT32 = 0, KIND_BFLOAT16 = 1, KIND_FOUR_BITS = 2, KIND_EIGHT_BITS = 3 };

struct linear {
    int64_t num_outputs, num_inputs, kind, split;
    void *weight;
    float *bias; /* or NULL */
};

INLINE int64_t element_bytes(int64_t kind) { return kind == KIND_FLOAT32 || !PAIRED ? 4 : 2; }
INLINE int is_grouped(int64_t kind) { return kind >= KIND_FOUR_BITS; }
INLINE int64_t panel_bytes(int64_t kind, int64_t num_inputs) {
    if (is_grouped(kind)) return group_panel_bytes(kind == KIND_FOUR_BITS, num_inputs);
    return num_inputs * PANEL_OUTPUTS * (kind == KIND_FLOAT32 ? 4 : 2);
}
INLINE int64_t num_panels(const struct linear *linear) {
    return (linear->num_outputs + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
}

/* The first output of a vector of a panel. */
INLINE int64_t first_output(int64_t split, int64_t panel, int vector) {
    const int half = PANEL_VECTORS / 2;
    if (split == 0) return (panel * PANEL_VECTORS + vector) * LANES;
    return vector < half ? (panel * half + vector) * LANES : split + (panel * half + vector - half) * LANES;
}

/* Activations are stored as their kind's tiles read them; of grouped weights as of bfloat16. */
INLINE void store_activation(int64_t kind, void *row, int64_t column, vf value) {
    if (kind == KIND_FLOAT32 || !PAIRED)
        store((float *)row + column, value);
    else
        store_bf16((uint16_t *)row + column, value);
}

INLINE vf multiply_pairs(vf sum, vu weights, uint32_t pair) {
    vu pairs = pair - (vu){0};
#if defined(__AVX512BF16__) && PAIRED
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)weights);
#else
    sum += high_halves(pairs) * high_halves(weights);
    return sum + low_halves(pairs) * low_halves(weights);
#endif
}

/* Weights are read once a step, from memory: a tile asks for what the next one will read. */
INLINE void ask_for_next(const void *weight, int64_t ahead, int num_bytes) {
#pragma GCC unroll 4
    for (int offset = 0; offset < num_bytes; offset += 64)
        __builtin_prefetch((const char *)weight + ahead + offset, 0, 2);
}

/* One tile: `num_rows` rows against `panels` neighbouring panels; sums in out[(row * panels + panel) * PANEL_VECTORS]. */
INLINE void tile(int kind, int num_rows, int panels, const void *x, int64_t row_bytes, const void *weight,
                 int64_t num_inputs, vf *out) {
    const int width = PANEL_VECTORS;
    vf sum[8 * PANEL_VECTORS];
    const int64_t stride = panel_bytes(kind, num_inputs);
#pragma GCC unroll 32
    for (int i = 0; i < num_rows * panels * width; i++) sum[i] = (vf){0};
    if (kind == KIND_FLOAT32) {
        for (int64_t k = 0; k < num_inputs; k++)
#pragma GCC unroll 4
            for (int panel = 0; panel < panels; panel++) {
                const vf *w = (const vf *)((const char *)weight + panel * stride) + k * width;
                ask_for_next(w, panels * stride, width * VECTOR_BYTES);
#pragma GCC unroll 8
                for (int row = 0; row < num_rows; row++) {
                    vf a = all(*((const float *)((const char *)x + row * row_bytes) + k));
#pragma GCC unroll 4
                    for (int v = 0; v < width; v++) sum[(row * panels + panel) * width + v] += a * w[v];
                }
            }
    } else if (PAIRED) {
        for (int64_t k = 0; k < num_inputs / 2; k++)
#pragma GCC unroll 4
            for (int panel = 0; panel < panels; panel++) {
                const vu *w = (const vu *)((const char *)weight + panel * stride) + k * width;
                ask_for_next(w, panels * stride, width * VECTOR_BYTES);
#pragma GCC unroll 8
                for (int row = 0; row < num_rows; row++) {
                    uint32_t pair;
                    memcpy(&pair, (const char *)x + row * row_bytes + 4 * k, 4);
#pragma GCC unroll 4
                    for (int v = 0; v < width; v++) {
                        vf *s = &sum[(row * panels + panel) * width + v];
                        *s = multiply_pairs(*s, w[v], pair);
                    }
                }
            }
    } else {
        for (int64_t k = 0; k < num_inputs / 2; k++)
#pragma GCC unroll 4
            for (int panel = 0; panel < panels; panel++) {
                const vu *w = (const vu *)((const char *)weight + panel * stride) + k * width;
                ask_for_next(w, panels * stride, width * VECTOR_BYTES);
                vf wide[PANEL_VECTORS];
#pragma GCC unroll 4
                for (int v = 0; v < width; v++) wide[v] = low_halves(w[v]);
#pragma GCC unroll 8
                for (int row = 0; row < num_rows; row++) {
                    vf a = all(*((const float *)((const char *)x + row * row_bytes) + 2 * k));
#pragma GCC unroll 4
                    for (int v = 0; v < width; v++) sum[(row * panels + panel) * width + v] += a * wide[v];
                }
#pragma GCC unroll 4
                for (int v = 0; v < width; v++) wide[v] = high_halves(w[v]);
#pragma GCC unroll 8
                for (int row = 0; row < num_rows; row++) {
                    vf a = all(*((const float *)((const char *)x + row * row_bytes) + 2 * k + 1));
#pragma GCC unroll 4
                    for (int v = 0; v < width; v++) sum[(row * panels + panel) * width + v] += a * wide[v];
                }
            }
    }
#pragma GCC unroll 32
    for (int i = 0; i < num_rows * panels * width; i++) out[i] = sum[i];
}

#define SINGLE_ROW_PANELS (8 / PANEL_VECTORS)

typedef void tile_function(const void *, int64_t, const void *, int64_t, vf *);
#define TILE(name, kind, rows, panels)                                                                          \
    static __attribute__((noinline)) void name(const void *x, int64_t row_bytes, const void *weight,            \
                                               int64_t num_inputs, vf *out) {                                   \
        tile(kind, rows, panels, x, row_bytes, weight, num_inputs, out);                                        \
    }
#define TILES(suffix, kind)                                                                                     \
    TILE(tile_1_##suffix, kind, 1, 1) TILE(tile_2_##suffix, kind, 2, 1) TILE(tile_3_##suffix, kind, 3, 1)       \
    TILE(tile_4_##suffix, kind, 4, 1) TILE(tile_5_##suffix, kind, 5, 1) TILE(tile_6_##suffix, kind, 6, 1)       \
    TILE(wide_1_##suffix, kind, 1, SINGLE_ROW_PANELS) TILE(wide_2_##suffix, kind, 2, 2)                         \
    TILE(wide_3_##suffix, kind, 3, 2)
TILES(f32, KIND_FLOAT32)
TILES(bf16, KIND_BFLOAT16)
static tile_function *const TILE_OF[2][TILE_ROWS + 1] = {
    {0, tile_1_f32, tile_2_f32, tile_3_f32, tile_4_f32, tile_5_f32, tile_6_f32},
    {0, tile_1_bf16, tile_2_bf16, tile_3_bf16, tile_4_bf16, tile_5_bf16, tile_6_bf16},
};
/* With few rows a panel alone has too few independent sums to keep the multipliers busy. */
static tile_function *const WIDE_TILE_OF[2][4] = {
    {0, wide_1_f32, wide_2_f32, wide_3_f32},
    {0, wide_1_bf16, wide_2_bf16, wide_3_bf16},
};
INLINE int panels_together(int64_t num_rows) {
    if (num_rows == 1) return SINGLE_ROW_PANELS;
    return num_rows <= 3 && PANEL_VECTORS == 2 ? 2 : 1;
}

/* What becomes of the sums. */
enum { SINK_FLOAT32, SINK_ADD, SINK_SILU, SINK_BFLOAT16 };
struct sink {
    int mode;
    int kind; /* of the activations that SINK_SILU stores */
    int64_t row_bytes;
    void *rows; /* row 0 of what the tiles start at */
};

static void sink_panel(const struct linear *linear, const struct sink *sink, int64_t panel, int64_t row,
                       const vf *sums) {
    char *to = (char *)sink->rows + row * sink->row_bytes;
    if (sink->mode == SINK_SILU) {
        const int half = PANEL_VECTORS / 2;
        for (int v = 0; v < half; v++) {
            int64_t column = first_output(linear->split, panel, v);
            if (column >= linear->split) return;
            vf gate = sums[v], up = sums[v + half];
            if (linear->bias) {
                gate += load(linear->bias + column);
                up += load(linear->bias + linear->split + column);
            }
            store_activation(sink->kind, to, column, silu(gate) * up);
        }
        return;
    }
    for (int v = 0; v < PANEL_VECTORS; v++) {
        int64_t column = first_output(linear->split, panel, v);
        if (column >= linear->num_outputs || (v < PANEL_VECTORS / 2 && linear->split && column >= linear->split))
            continue;
        vf value = sums[v];
        if (linear->bias) value += load(linear->bias + column);
        if (sink->mode == SINK_BFLOAT16)
            store_bf16((uint16_t *)to + column, value);
        else if (sink->mode == SINK_ADD)
            store((float *)to + column, load((float *)to + column) + value);
        else
            store((float *)to + column, value);
    }
}

#define ROUNDED_ROWS 96 /* at once: they stay in the second-level cache */
INLINE int64_t room_bytes(int64_t num_inputs) { return ROUNDED_ROWS * rounded_row_bytes(num_inputs); }

static void multiply_groups(const struct linear *linear, const char *x, int64_t row_bytes, int64_t num_rows,
                            int64_t low, int64_t high, const struct sink *sink, char *room) {
    vf sums[GROUP_TILE_ROWS * PANEL_VECTORS];
    const int64_t k = linear->num_inputs, stride = panel_bytes(linear->kind, k), rounded = rounded_row_bytes(k);
    for (int64_t first = 0; first < num_rows; first += ROUNDED_ROWS) {
        const int64_t count = num_rows - first < ROUNDED_ROWS ? num_rows - first : ROUNDED_ROWS;
        for (int64_t row = 0; row < count; row++)
            round_row(element_bytes(linear->kind) == 2, x + (first + row) * row_bytes, k, room + row * rounded);
        for (int64_t panel = low; panel < high; panel++) {
            const char *weight = (const char *)linear->weight + panel * stride;
            for (int64_t row = 0, rows; row < count; row += rows) {
                rows = count - row < GROUP_TILE_ROWS ? count - row : GROUP_TILE_ROWS;
                GROUP_TILE_OF[linear->kind == KIND_FOUR_BITS][rows](room + row * rounded, rounded, weight, k, sums);
                for (int64_t i = 0; i < rows; i++)
                    sink_panel(linear, sink, panel, first + row + i, sums + i * PANEL_VECTORS);
            }
        }
    }
}

/* Rows [num_rows, K] of activations through panels [low, high). `room`: room_bytes of scratch where the weights are
   grouped. */
static void multiply(const struct linear *linear, const void *x, int64_t row_bytes, int64_t num_rows, int64_t low,
                     int64_t high, const struct sink *sink, char *room) {
    vf sums[8 * PANEL_VECTORS];
    if (is_grouped(linear->kind)) return multiply_groups(linear, x, row_bytes, num_rows, low, high, sink, room);
    const int64_t stride = panel_bytes(linear->kind, linear->num_inputs);
    const int64_t tiles = (num_rows + TILE_ROWS - 1) / TILE_ROWS, base = num_rows / tiles, more = num_rows % tiles;
    int64_t panel = low;
    const int together = panels_together(num_rows);
    for (; together > 1 && panel + together <= high; panel += together) {
        const char *weight = (const char *)linear->weight + panel * stride;
        WIDE_TILE_OF[linear->kind][num_rows](x, row_bytes, weight, linear->num_inputs, sums);
        for (int64_t row = 0; row < num_rows; row++)
            for (int i = 0; i < together; i++)
                sink_panel(linear, sink, panel + i, row, sums + (row * together + i) * PANEL_VECTORS);
    }
    for (; panel < high; panel++) {
        const char *weight = (const char *)linear->weight + panel * stride;
        for (int64_t t = 0, row = 0; t < tiles; t++) {
            const int64_t rows = base + (t < more);
            TILE_OF[linear->kind][rows]((const char *)x + row * row_bytes, row_bytes, weight, linear->num_inputs, sums);
            for (int64_t i = 0; i < rows; i++) sink_panel(linear, sink, panel, row + i, sums + i * PANEL_VECTORS);
            row += rows;
        }
    }
}

static void pack_groups(const struct linear *linear, const char *rows) {
    const int four_bits = linear->kind == KIND_FOUR_BITS;
    const int64_t k = linear->num_inputs, stride = panel_bytes(linear->kind, k);
    const int64_t row_bytes = k / GROUP_INPUTS * (four_bits ? BYTES_OF_Q4_1 : BYTES_OF_Q8_0);
    for (int64_t panel = 0; panel < num_panels(linear); panel++)
        for (int v = 0; v < PANEL_VECTORS; v++) {
            const int64_t first = first_output(linear->split, panel, v);
            const int second_half = linear->split && v >= PANEL_VECTORS / 2;
            const int64_t end = linear->split && !second_half ? linear->split : linear->num_outputs;
            for (int lane = 0; lane < LANES && first + lane < end; lane++)
                pack_group_row(four_bits, rows + (first + lane) * row_bytes, k, v, lane,
                               (char *)linear->weight + panel * stride);
        }
}

#define PACK_INPUTS 32 /* of a row at once: a panel's part then stays in the first-level cache while it fills */

/* Fill `linear->weight`, which is zero, from rows [N, K] of the same kind; grouped ones as GGUF files store them. */
static void pack(const struct linear *linear, const void *rows) {
    if (is_grouped(linear->kind)) return pack_groups(linear, rows);
    const int64_t n = linear->num_outputs, k = linear->num_inputs, words = linear->kind == KIND_FLOAT32 ? k : k / 2;
    for (int64_t panel = 0; panel < num_panels(linear); panel++) {
        uint32_t *to = (uint32_t *)((char *)linear->weight + panel * panel_bytes(linear->kind, k));
        for (int64_t low = 0; low < words; low += PACK_INPUTS) {
            const int64_t high = low + PACK_INPUTS < words ? low + PACK_INPUTS : words;
            for (int place = 0; place < PANEL_OUTPUTS; place++) {
                const int v = place / LANES;
                const int64_t output = first_output(linear->split, panel, v) + place % LANES;
                if (output >= n || (linear->split && v < PANEL_VECTORS / 2 && output >= linear->split)) continue;
                const char *from = (const char *)rows + output * words * 4; /* numbers, or pairs of them */
                for (int64_t i = low; i < high; i++) memcpy(&to[i * PANEL_OUTPUTS + place], from + 4 * i, 4);
            }
        }
    }
}

#endif
