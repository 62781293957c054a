/* Attention of a step's queries over the paged cache.

Owns how queries meet keys: a row alone reads its blocks in place; several rows of one request share keys that are laid
out as a matrix multiplication's weights first, and go over them in chunks with a running maximum. Never writes the
cache. See model/kv_cache.py for its layout. */

#ifndef TRANSLOAD_ATTENTION_H
#define TRANSLOAD_ATTENTION_H

#include "tiles.h"

#define CHUNK_KEYS 64
#define QUERY_ROWS 96 /* rows x heads of a tile: its queries, scores and sums stay in the second-level cache */
#define HIDDEN (-1e30f)
#define NO_SCORE (-1e20f) /* above it and below every score: what there is before the first key */

struct cache {
    char *base;
    int64_t kind; /* KIND_FLOAT32 or KIND_BFLOAT16 */
    int64_t num_layers, num_kv_heads, block_size, head_dim;
};

/* Consecutive positions of one request, in consecutive rows. */
struct span {
    int64_t first_row, num_rows, start;
    int64_t first_block; /* place in the step's list of blocks */
    int64_t packed;      /* of several rows: where its keys lie in the scratch, in chunks */
};

INLINE int64_t cache_element_bytes(const struct cache *cache) { return cache->kind == KIND_FLOAT32 ? 4 : 2; }

/* Keys (part 0) or values (part 1) of a block: [block_size, head_dim]. */
INLINE char *piece(const struct cache *cache, int64_t block, int64_t layer, int part, int64_t head) {
    int64_t number = ((block * cache->num_layers + layer) * 2 + part) * cache->num_kv_heads + head;
    return cache->base + number * cache->block_size * cache->head_dim * cache_element_bytes(cache);
}

INLINE vf load_cached(int kind, const char *row, int64_t column) {
    return kind == KIND_FLOAT32 ? load((const float *)row + column) : load_bf16((const uint16_t *)row + column);
}
INLINE void store_cached(const struct cache *cache, char *row, int64_t column, vf value) {
    if (cache->kind == KIND_FLOAT32)
        store((float *)row + column, value);
    else
        store_bf16((uint16_t *)row + column, value);
}

/* The first position that a query sees; a window counts the query's own. */
INLINE int64_t first_key(int64_t position, int64_t window) {
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}

/* --- One row ------------------------------------------------------------------------------------------------------- */

/* Keys that all heads go over before the next ones: first the keys, then the values. What lies together in a block is
   read in one go: memory, and above all its pages, are slow where a little is read here and a little there. */
#define LONE_KEYS 32

/* Some keys of a row, for heads that share them. */
struct lone_query {
    const struct cache *cache;
    const int64_t *blocks;
    int64_t layer, kv_head;
    int64_t low, high;    /* positions */
    const float *queries; /* [heads, head_dim], scaled by log2 e / sqrt(head_dim) */
    float *sums;          /* like queries: weighted values of the keys so far */
    float *best, *total;  /* of each head: the highest score, and the sum of the weights, of the keys so far */
    float *scores;        /* [heads, LONE_KEYS], then the weights */
};

/* Rows of keys or values in the order of positions, without a division a row. */
struct walk {
    const struct lone_query *query;
    int part;
    int64_t row_bytes, block, offset; /* of the next row */
    const char *rows;                 /* of the block */
};

INLINE struct walk walk_from_low(const struct lone_query *q, int part, int64_t row_bytes) {
    const int64_t block = q->low / q->cache->block_size, offset = q->low % q->cache->block_size;
    return (struct walk){q, part, row_bytes, block, offset, piece(q->cache, q->blocks[block], q->layer, part, q->kv_head)};
}
INLINE const char *next_row(struct walk *walk) {
    const struct lone_query *q = walk->query;
    if (__builtin_expect(walk->offset == q->cache->block_size, 0)) {
        walk->offset = 0;
        walk->rows = piece(q->cache, q->blocks[++walk->block], q->layer, walk->part, q->kv_head);
    }
    return walk->rows + walk->offset++ * walk->row_bytes;
}

INLINE void lone_scores(const struct lone_query *q, int kind, int heads) {
    const int64_t dim = q->cache->head_dim, low = q->low, high = q->high;
    struct walk keys = walk_from_low(q, 0, dim * (kind == KIND_FLOAT32 ? 4 : 2));
    for (int64_t key = low; key < high; key += LANES) {
        vf parts[4][LANES];
        const int together = heads < 4 ? 4 : 2; /* keys: enough independent sums to keep the multipliers busy */
        const char *rows[4];
        rows[0] = NULL;
        for (int lane = 0; lane < LANES; lane += together) {
#pragma GCC unroll 4
            for (int i = 0; i < together; i++)
                rows[i] = key + lane + i < high ? next_row(&keys) : rows[i ? i - 1 : 0]; /* past the last: any */
            if (key + lane >= high) {
                for (int head = 0; head < heads; head++)
                    for (int i = 0; i < together; i++) parts[head][lane + i] = (vf){0};
                continue;
            }
            vf sum[4 * 4];
#pragma GCC unroll 16
            for (int i = 0; i < heads * together; i++) sum[i] = (vf){0};
            for (int64_t column = 0; column < dim; column += LANES) {
                vf query[4];
#pragma GCC unroll 4
                for (int head = 0; head < heads; head++) query[head] = load(q->queries + head * dim + column);
#pragma GCC unroll 4
                for (int i = 0; i < together; i++) {
                    const vf value = load_cached(kind, rows[i], column);
#pragma GCC unroll 4
                    for (int head = 0; head < heads; head++) sum[head * together + i] += query[head] * value;
                }
            }
#pragma GCC unroll 4
            for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
                for (int i = 0; i < together; i++) parts[head][lane + i] = sum[head * together + i];
        }
        for (int head = 0; head < heads; head++) store(q->scores + head * LONE_KEYS + key - low, sums_of(parts[head]));
    }
}

/* Scores of one head to weights in place; rescales what earlier keys have summed. Places past the last key get weight
   zero. */
INLINE void lone_softmax(const struct lone_query *q, int head) {
    const int64_t dim = q->cache->head_dim, num_keys = q->high - q->low;
    float *scores = q->scores + head * LONE_KEYS, *sums = q->sums + head * dim;
    vf best = all(q->best[head]);
    for (int64_t key = num_keys; key % LANES; key++) scores[key] = HIDDEN;
    for (int64_t key = 0; key < num_keys; key += LANES) best = larger(load(scores + key), best);
    const float now = largest_lane(best);
    if (now != q->best[head]) {
        const vf shrink = power_of_two(all(q->best[head] - now));
        q->best[head] = now;
        q->total[head] *= shrink[0];
        for (int64_t column = 0; column < dim; column += LANES) store(sums + column, load(sums + column) * shrink);
    }
    vf sum = {0};
    for (int64_t key = 0; key < num_keys; key += LANES) {
        vf weight = power_of_two(load(scores + key) - now);
        store(scores + key, weight);
        sum += weight;
    }
    q->total[head] += sum_lanes(sum);
}

/* `vectors` columns of all heads from `column` on. */
INLINE void lone_mix_columns(const struct lone_query *q, int kind, int heads, int vectors, int64_t column) {
    const int64_t dim = q->cache->head_dim, num_keys = q->high - q->low;
    struct walk values = walk_from_low(q, 1, dim * (kind == KIND_FLOAT32 ? 4 : 2));
    vf sum[4 * 4];
#pragma GCC unroll 4
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[head * vectors + v] = load(q->sums + head * dim + column + v * LANES);
    for (int64_t key = 0; key < num_keys; key++) {
        const char *row = next_row(&values);
        vf weight[4];
#pragma GCC unroll 4
        for (int head = 0; head < heads; head++) weight[head] = all(q->scores[head * LONE_KEYS + key]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const vf value = load_cached(kind, row, column + v * LANES);
#pragma GCC unroll 4
            for (int head = 0; head < heads; head++) sum[head * vectors + v] += weight[head] * value;
        }
    }
#pragma GCC unroll 4
    for (int head = 0; head < heads; head++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(q->sums + head * dim + column + v * LANES, sum[head * vectors + v]);
}

INLINE void lone_mix(const struct lone_query *q, int kind, int heads) {
    const int64_t dim = q->cache->head_dim;
    int64_t column = 0;
    for (int head = 0; head < heads; head++) lone_softmax(q, head);
    if (heads < 4)
        for (; column + 4 * LANES <= dim; column += 4 * LANES) lone_mix_columns(q, kind, heads, 4, column);
    for (; column + 2 * LANES <= dim; column += 2 * LANES) lone_mix_columns(q, kind, heads, 2, column);
    for (; column < dim; column += LANES) lone_mix_columns(q, kind, heads, 1, column);
}

#define LONE(what, kind_name, kind, heads)                                                                           \
    static __attribute__((noinline)) void lone_##what##_##kind_name##_##heads(const struct lone_query *q) {          \
        lone_##what(q, kind, heads);                                                                                 \
    }
#define LONES(what, kind_name, kind)                                                                                 \
    LONE(what, kind_name, kind, 1)                                                                                   \
    LONE(what, kind_name, kind, 2)                                                                                   \
    LONE(what, kind_name, kind, 3)                                                                                   \
    LONE(what, kind_name, kind, 4)
#define LONE_TABLE(what)                                                                                             \
    {                                                                                                                \
        {0, lone_##what##_f32_1, lone_##what##_f32_2, lone_##what##_f32_3, lone_##what##_f32_4},                     \
        {0, lone_##what##_bf16_1, lone_##what##_bf16_2, lone_##what##_bf16_3, lone_##what##_bf16_4},                 \
    }
LONES(scores, f32, KIND_FLOAT32)
LONES(scores, bf16, KIND_BFLOAT16)
LONES(mix, f32, KIND_FLOAT32)
LONES(mix, bf16, KIND_BFLOAT16)
static void (*const SCORES_OF[2][5])(const struct lone_query *) = LONE_TABLE(scores);
static void (*const MIX_OF[2][5])(const struct lone_query *) = LONE_TABLE(mix);

/* --- Several rows of one request ----------------------------------------------------------------------------------- */

/* How keys are laid out: as pairs where the machine multiplies pairs, else widened once. */
INLINE int64_t packed_kind(const struct cache *cache) {
    return PAIRED && cache->kind == KIND_BFLOAT16 ? KIND_BFLOAT16 : KIND_FLOAT32;
}
INLINE int64_t packed_bytes(const struct cache *cache) { /* of a chunk's keys; its values take as much */
    int64_t columns = (cache->head_dim + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS * PANEL_OUTPUTS;
    return CHUNK_KEYS * columns * (packed_kind(cache) == KIND_FLOAT32 ? 4 : 2);
}

INLINE float cached_element(const struct cache *cache, const char *row, int64_t column) {
    if (cache->kind == KIND_FLOAT32) return ((const float *)row)[column];
    uint32_t bits = (uint32_t)((const uint16_t *)row)[column] << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Lay out the keys and values of positions [first, first + CHUNK_KEYS), the last of them at `end` - 1. Absent ones are
   zero: their weights are zero too. */
static void pack_chunk(const struct cache *cache, const int64_t *blocks, int64_t layer, int64_t head, int64_t first,
                       int64_t end, char *keys, char *values) {
    const int64_t dim = cache->head_dim, size = cache->block_size, row_bytes = dim * cache_element_bytes(cache);
    const int paired = packed_kind(cache) == KIND_BFLOAT16;
    memset(keys, 0, packed_bytes(cache));
    memset(values, 0, packed_bytes(cache));
    for (int64_t i = 0; i < CHUNK_KEYS && first + i < end; i++) {
        const int64_t at = first + i;
        const char *key = piece(cache, blocks[at / size], layer, 0, head) + at % size * row_bytes;
        const char *value = piece(cache, blocks[at / size], layer, 1, head) + at % size * row_bytes;
        const int64_t panel = i / PANEL_OUTPUTS, place = i % PANEL_OUTPUTS;
        if (paired) {
            uint32_t *to = (uint32_t *)keys + panel * dim / 2 * PANEL_OUTPUTS + place;
            for (int64_t d = 0; d < dim / 2; d++) memcpy(&to[d * PANEL_OUTPUTS], key + 4 * d, 4);
            for (int64_t d = 0; d < dim; d++) {
                uint16_t *pair = (uint16_t *)((uint32_t *)values + d / PANEL_OUTPUTS * CHUNK_KEYS / 2 * PANEL_OUTPUTS +
                                              i / 2 * PANEL_OUTPUTS + d % PANEL_OUTPUTS);
                pair[i % 2] = ((const uint16_t *)value)[d];
            }
        } else {
            float *to = (float *)keys + panel * dim * PANEL_OUTPUTS + place;
            for (int64_t d = 0; d < dim; d++) to[d * PANEL_OUTPUTS] = cached_element(cache, key, d);
            for (int64_t d = 0; d < dim; d++) {
                float *row = (float *)values + d / PANEL_OUTPUTS * CHUNK_KEYS * PANEL_OUTPUTS + i * PANEL_OUTPUTS;
                row[d % PANEL_OUTPUTS] = cached_element(cache, value, d);
            }
        }
    }
}

struct query_tile {
    const struct cache *cache;
    int64_t num_heads;            /* that share the keys */
    int64_t first, num_positions; /* of the queries */
    int64_t window;
    const float *queries; /* row r, head g at r * row_stride + g * head_dim, scaled */
    int64_t row_stride;
    const char *keys, *values; /* packed chunks from position 0 on */
    int64_t first_chunk;       /* that is packed */
    char *scratch;             /* tile_scratch_bytes */
};

INLINE int64_t tile_scratch_bytes(const struct cache *cache) {
    return QUERY_ROWS * (4 * CHUNK_KEYS * 2 + 4 * cache->head_dim * 2 + 8) + 64;
}

/* Weights of one chunk from its scores, in place as activations; rescales what earlier chunks have summed. */
static void tile_softmax(const struct query_tile *q, int64_t kind, int64_t chunk, float *scores, char *weights,
                         float *sums, float *best, float *total) {
    const int64_t dim = q->cache->head_dim;
    for (int64_t row = 0; row < q->num_positions * q->num_heads; row++) {
        const int64_t position = q->first + row / q->num_heads;
        const int64_t low = first_key(position, q->window) - chunk * CHUNK_KEYS, high = position + 1 - chunk * CHUNK_KEYS;
        float *score = scores + row * CHUNK_KEYS;
        for (int64_t key = high < 0 ? 0 : high; key < CHUNK_KEYS; key++) score[key] = HIDDEN;
        for (int64_t key = 0; key < low && key < CHUNK_KEYS; key++) score[key] = HIDDEN;
        vf top = all(best[row]);
        for (int i = 0; i < CHUNK_KEYS; i += LANES) top = larger(load(score + i), top);
        const float now = largest_lane(top);
        if (now != best[row]) {
            const vf shrink = power_of_two(all(best[row] - now));
            best[row] = now;
            total[row] *= shrink[0];
            for (int64_t column = 0; column < dim; column += LANES)
                store(sums + row * dim + column, load(sums + row * dim + column) * shrink);
        }
        vf sum = {0};
        for (int i = 0; i < CHUNK_KEYS; i += LANES) {
            vf weight = power_of_two(load(score + i) - now);
            sum += weight;
            store_activation(kind, weights + row * CHUNK_KEYS * element_bytes(kind), i, weight);
        }
        total[row] += sum_lanes(sum);
    }
}

/* Attention output of a tile as activations of `kind`: row r, head g at r * out_bytes + g * head_dim elements. */
static void attend_tile(const struct query_tile *q, char *out, int64_t out_bytes, int64_t out_kind) {
    const struct cache *cache = q->cache;
    const int64_t dim = cache->head_dim, num_rows = q->num_positions * q->num_heads, kind = packed_kind(cache);
    const int64_t element = element_bytes(kind);
    float *scores = (float *)q->scratch, *sums = scores + QUERY_ROWS * CHUNK_KEYS;
    float *best = sums + QUERY_ROWS * dim, *total = best + QUERY_ROWS;
    char *weights = (char *)(total + QUERY_ROWS), *queries = weights + QUERY_ROWS * CHUNK_KEYS * 4;
    for (int64_t row = 0; row < num_rows; row++) {
        const float *from = q->queries + row / q->num_heads * q->row_stride + row % q->num_heads * dim;
        for (int64_t column = 0; column < dim; column += LANES)
            store_activation(kind, queries + row * dim * element, column, load(from + column));
        best[row] = NO_SCORE;
        total[row] = 0;
    }
    memset(sums, 0, num_rows * dim * 4);
    const struct linear against_keys = {CHUNK_KEYS, dim, kind, 0, NULL, NULL};
    const struct linear against_values = {dim, CHUNK_KEYS, kind, 0, NULL, NULL};
    const struct sink to_scores = {SINK_FLOAT32, 0, CHUNK_KEYS * 4, scores}, to_sums = {SINK_ADD, 0, dim * 4, sums};
    const int64_t last = (q->first + q->num_positions - 1) / CHUNK_KEYS;
    for (int64_t chunk = first_key(q->first, q->window) / CHUNK_KEYS; chunk <= last; chunk++) {
        struct linear keys = against_keys, values = against_values;
        keys.weight = (char *)q->keys + (chunk - q->first_chunk) * 2 * packed_bytes(cache);
        values.weight = (char *)q->values + (chunk - q->first_chunk) * 2 * packed_bytes(cache);
        multiply(&keys, queries, dim * element, num_rows, 0, num_panels(&keys), &to_scores, NULL);
        tile_softmax(q, kind, chunk, scores, weights, sums, best, total);
        multiply(&values, weights, CHUNK_KEYS * element, num_rows, 0, num_panels(&values), &to_sums, NULL);
    }
    for (int64_t row = 0; row < num_rows; row++) {
        char *to = out + row / q->num_heads * out_bytes + row % q->num_heads * dim * element_bytes(out_kind);
        for (int64_t column = 0; column < dim; column += LANES)
            store_activation(out_kind, to, column, load(sums + row * dim + column) / total[row]);
    }
}

#endif
