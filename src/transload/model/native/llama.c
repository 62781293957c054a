/* A Llama model's step on the CPU: from token ids and a paged cache to the residual after its layers, and to logits.

Owns the order of a step and how its work is divided among threads. Called by model/native through ctypes; the structs
here are mirrored there. Keeps no state between calls but its scratch memory. Every entry point is called by one thread
at a time. */

#define _GNU_SOURCE
#include <sys/mman.h>

#include "attention.h"
#include "cells.h"
#include "pool.h"
#include "stored.h"

#define FEW_ROWS 32 /* up to here threads share a layer's outputs, above its rows */
#define ROWS_TOGETHER 96

struct layer {
    const float *input_norm, *query_norm, *key_norm, *ffn_norm; /* the middle two may be NULL */
    struct linear qkv, output, gate_up, down;
    int64_t window; /* 0: none */
};

struct model {
    int64_t hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim, vocab_size;
    int64_t kind; /* of weights and cache */
    double norm_eps;
    const float *final_norm;
    const void *embedding; /* [vocab_size, hidden_size] of `kind`, or NULL: the head's packed rows */
    struct linear head;
    const struct layer *layers;
};

/* Rows of a step. Those `kept` are the ones that the last layer's output is needed of. */
struct step {
    int64_t num_rows, num_spans, num_kept;
    const int64_t *token_ids;         /* [num_rows] */
    const float *cosines, *sines;     /* [num_rows, head_dim / 2] */
    const int64_t *positions;         /* [num_rows] */
    const int64_t *row_blocks;        /* [num_rows]: the block that the row's keys go to */
    const struct span *spans;         /* in row order */
    const int64_t *blocks;            /* of all spans */
    const int64_t *kept;              /* [num_kept] rows */
    const struct span *kept_spans;    /* [num_kept], of one row each; first_row counts kept rows */
    struct cache cache;
};

struct runner {
    const struct model *model;
    struct pool *pool;
    int64_t capacity_rows, capacity_packed, capacity_scratch; /* of what is allocated below */
    float *residual, *qkv; /* [rows, E], [rows, (H + 2 K) D] */
    char *activation, *mixed, *inner; /* [rows, E], [rows, H D], [rows, I] as activations */
    char *packed;
    char *scratch; /* capacity_scratch a thread */
    char *room;    /* room_of a thread, where weights are grouped */
    int64_t num_rows; /* in `residual`; the kept ones after the last layer */
    int failed;
    /* of the part that runs now */
    const struct step *step;
    const struct layer *layer;
    int64_t layer_number;
    const float *norm;
    float *logits;
    int64_t *tokens;
};

/* --- Memory -------------------------------------------------------------------------------------------------------- */

static void *allocate(int64_t num_bytes) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, num_bytes ? num_bytes : 64) ? NULL : memory;
}

/* Zeroed memory for weights, in large pages where there are any. NULL if there is not enough. */
void *transload_allocate(int64_t num_bytes) {
    void *memory = mmap(NULL, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return NULL;
#ifdef MADV_HUGEPAGE
    madvise(memory, num_bytes, MADV_HUGEPAGE);
#endif
    return memory;
}
void transload_free(void *memory, int64_t num_bytes) { munmap(memory, num_bytes); }

static int reserve(char **memory, int64_t *capacity, int64_t wanted) {
    if (*capacity >= wanted) return 1;
    free(*memory);
    *memory = allocate(wanted + wanted / 4);
    *capacity = *memory ? wanted + wanted / 4 : 0;
    return *memory != NULL;
}

static int reserve_rows(struct runner *r, int64_t rows) {
    const struct model *m = r->model;
    if (rows <= r->capacity_rows) return 1;
    free(r->residual), free(r->qkv), free(r->activation), free(r->mixed), free(r->inner);
    rows = rows < 64 ? 64 : rows;
    r->residual = allocate(rows * m->hidden_size * 4);
    r->qkv = allocate(rows * (m->num_heads + 2 * m->num_kv_heads) * m->head_dim * 4);
    r->activation = allocate(rows * m->hidden_size * 4);
    r->mixed = allocate(rows * m->num_heads * m->head_dim * 4);
    r->inner = allocate(rows * m->intermediate_size * 4);
    const int whole = r->residual && r->qkv && r->activation && r->mixed && r->inner;
    r->capacity_rows = whole ? rows : 0;
    return whole;
}

/* Room for a thread's rounded rows: of the widest layer. */
static int64_t room_of(const struct model *m) {
    const int64_t mixed = m->num_heads * m->head_dim;
    const int64_t inner = m->intermediate_size > mixed ? m->intermediate_size : mixed;
    return (room_bytes(inner > m->hidden_size ? inner : m->hidden_size) + 63) / 64 * 64;
}
static int has_groups(const struct model *m) {
    int found = is_grouped(m->head.kind);
    for (int64_t i = 0; i < m->num_layers; i++) {
        const struct layer *layer = &m->layers[i];
        found |= is_grouped(layer->qkv.kind) | is_grouped(layer->output.kind);
        found |= is_grouped(layer->gate_up.kind) | is_grouped(layer->down.kind);
    }
    return found;
}
static char *room_for(const struct runner *r, int thread) { return r->room ? r->room + thread * room_of(r->model) : NULL; }

/* --- Small parts --------------------------------------------------------------------------------------------------- */

static void rms_norm(const float *x, const float *weight, int64_t size, double eps, int64_t kind, void *out) {
    vf sum = {0};
    for (int64_t i = 0; i < size; i += LANES) sum += load(x + i) * load(x + i);
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(sum) / size + (float)eps);
    for (int64_t i = 0; i < size; i += LANES) store_activation(kind, out, i, load(x + i) * scale * load(weight + i));
}

/* A row of packed weights that do not split, as it was. */
static void unpack_row(const struct linear *linear, int64_t number, float *to) {
    const int64_t size = linear->num_inputs;
    const char *panel = (const char *)linear->weight + number / PANEL_OUTPUTS * panel_bytes(linear->kind, size);
    const int64_t place = number % PANEL_OUTPUTS;
    if (is_grouped(linear->kind)) {
        unpack_group_row(linear->kind == KIND_FOUR_BITS, panel, size, (int)(place / LANES), (int)(place % LANES), to);
        return;
    }
    if (linear->kind == KIND_FLOAT32) {
        for (int64_t i = 0; i < size; i++) to[i] = ((const float *)panel)[i * PANEL_OUTPUTS + place];
        return;
    }
    for (int64_t i = 0; i < size / 2; i++) {
        const uint32_t pair = ((const uint32_t *)panel)[i * PANEL_OUTPUTS + place];
        const uint32_t low = pair << 16, high = pair & 0xffff0000u;
        memcpy(to + 2 * i, &low, 4);
        memcpy(to + 2 * i + 1, &high, 4);
    }
}

static void embed(const struct model *m, int64_t token, float *to) {
    const int64_t size = m->hidden_size;
    if (!m->embedding) {
        unpack_row(&m->head, token, to);
        return;
    }
    for (int64_t i = 0; i < size; i += LANES)
        store(to + i, load_cached(m->kind, (const char *)m->embedding + token * size * (m->kind ? 2 : 4), i));
}

/* Norm, rotate and scale one head in place. */
static void turn_head(float *head, const float *norm, double eps, int64_t dim, const float *cosine, const float *sine,
                      float scale) {
    const int64_t half = dim / 2;
    if (norm) {
        float sum = 0;
        for (int64_t i = 0; i < dim; i++) sum += head[i] * head[i];
        const float length = 1.0f / __builtin_sqrtf(sum / dim + (float)eps);
        for (int64_t i = 0; i < dim; i++) head[i] = head[i] * length * norm[i];
    }
    for (int64_t i = 0; i < half; i++) {
        const float low = head[i], high = head[half + i];
        head[i] = (low * cosine[i] - high * sine[i]) * scale;
        head[half + i] = (high * cosine[i] + low * sine[i]) * scale;
    }
}

/* A row's queries turned and scaled in place; its keys and values into the cache. */
static void place_row(const struct runner *r, int64_t row) {
    const struct model *m = r->model;
    const struct step *s = r->step;
    const int64_t dim = m->head_dim, width = (m->num_heads + 2 * m->num_kv_heads) * dim;
    float *qkv = r->qkv + row * width;
    const float *cosine = s->cosines + row * (dim / 2), *sine = s->sines + row * (dim / 2);
    const float scale = LOG2_E / __builtin_sqrtf((float)dim);
    for (int64_t head = 0; head < m->num_heads; head++)
        turn_head(qkv + head * dim, r->layer->query_norm, m->norm_eps, dim, cosine, sine, scale);
    const int64_t offset = s->positions[row] % s->cache.block_size * dim * cache_element_bytes(&s->cache);
    for (int64_t head = 0; head < m->num_kv_heads; head++) {
        float *key = qkv + (m->num_heads + head) * dim, *value = key + m->num_kv_heads * dim;
        turn_head(key, r->layer->key_norm, m->norm_eps, dim, cosine, sine, 1.0f);
        char *key_row = piece(&s->cache, s->row_blocks[row], r->layer_number, 0, head) + offset;
        char *value_row = piece(&s->cache, s->row_blocks[row], r->layer_number, 1, head) + offset;
        for (int64_t i = 0; i < dim; i += LANES) {
            store_cached(&s->cache, key_row, i, load(key + i));
            store_cached(&s->cache, value_row, i, load(value + i));
        }
    }
}

/* --- Division of work ---------------------------------------------------------------------------------------------- */

struct part {
    int64_t low, high;
};
static struct part share_of(int64_t count, int64_t thread, int64_t num_threads) {
    return (struct part){count * thread / num_threads, count * (thread + 1) / num_threads};
}

/* How many rows a thread takes at once: all get about as many. */
static int64_t rows_at_once(const struct runner *r, int64_t rows) {
    const int64_t threads = r->pool->num_threads;
    const int64_t rounds = (rows + threads * ROWS_TOGETHER - 1) / (threads * ROWS_TOGETHER);
    const int64_t even = (rows + rounds * threads - 1) / (rounds * threads);
    return (even + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
}

static void norm_rows(struct runner *r, struct part rows) {
    const struct model *m = r->model;
    const int64_t bytes = m->hidden_size * element_bytes(m->kind);
    for (int64_t row = rows.low; row < rows.high; row++)
        rms_norm(r->residual + row * m->hidden_size, r->norm, m->hidden_size, m->norm_eps, m->kind,
                 r->activation + row * bytes);
}

static void qkv_of(struct runner *r, int thread, struct part rows, struct part panels) {
    const struct model *m = r->model;
    const int64_t width = r->layer->qkv.num_outputs, bytes = m->hidden_size * element_bytes(m->kind);
    const struct sink sink = {SINK_FLOAT32, 0, width * 4, r->qkv + rows.low * width};
    multiply(&r->layer->qkv, r->activation + rows.low * bytes, bytes, rows.high - rows.low, panels.low, panels.high,
             &sink, room_for(r, thread));
}
static void output_of(struct runner *r, int thread, struct part rows, struct part panels) {
    const struct model *m = r->model;
    const int64_t bytes = m->num_heads * m->head_dim * element_bytes(m->kind);
    const struct sink sink = {SINK_ADD, 0, m->hidden_size * 4, r->residual + rows.low * m->hidden_size};
    multiply(&r->layer->output, r->mixed + rows.low * bytes, bytes, rows.high - rows.low, panels.low, panels.high,
             &sink, room_for(r, thread));
}
static void inner_of(struct runner *r, int thread, struct part rows, struct part panels) {
    const struct model *m = r->model;
    const int64_t bytes = m->hidden_size * element_bytes(m->kind);
    const int64_t inner_bytes = m->intermediate_size * element_bytes(m->kind);
    const struct sink sink = {SINK_SILU, (int)m->kind, inner_bytes, r->inner + rows.low * inner_bytes};
    multiply(&r->layer->gate_up, r->activation + rows.low * bytes, bytes, rows.high - rows.low, panels.low,
             panels.high, &sink, room_for(r, thread));
}
static void down_of(struct runner *r, int thread, struct part rows, struct part panels) {
    const struct model *m = r->model;
    const int64_t bytes = m->intermediate_size * element_bytes(m->kind);
    const struct sink sink = {SINK_ADD, 0, m->hidden_size * 4, r->residual + rows.low * m->hidden_size};
    multiply(&r->layer->down, r->inner + rows.low * bytes, bytes, rows.high - rows.low, panels.low, panels.high, &sink,
             room_for(r, thread));
}

typedef void some_outputs(struct runner *, int thread, struct part rows, struct part panels);
static void share_outputs(struct runner *r, int thread, some_outputs *compute, const struct linear *linear) {
    compute(r, thread, (struct part){0, r->num_rows}, share_of(num_panels(linear), thread, r->pool->num_threads));
}
static void share_qkv(void *context, int thread) {
    struct runner *r = context;
    share_outputs(r, thread, qkv_of, &r->layer->qkv);
}
static void share_output(void *context, int thread) {
    struct runner *r = context;
    share_outputs(r, thread, output_of, &r->layer->output);
}
static void share_inner(void *context, int thread) {
    struct runner *r = context;
    share_outputs(r, thread, inner_of, &r->layer->gate_up);
}
static void share_down(void *context, int thread) {
    struct runner *r = context;
    share_outputs(r, thread, down_of, &r->layer->down);
}

/* Many rows: a thread takes some through several parts, while they are in its cache. */
static void rows_to_qkv(void *context, int thread) {
    struct runner *r = context;
    const int64_t at_once = rows_at_once(r, r->num_rows);
    for (int64_t low; (low = take(r->pool) * at_once) < r->num_rows;) {
        const struct part rows = {low, low + at_once < r->num_rows ? low + at_once : r->num_rows};
        norm_rows(r, rows);
        qkv_of(r, thread, rows, (struct part){0, num_panels(&r->layer->qkv)});
        for (int64_t row = rows.low; row < rows.high; row++) place_row(r, row);
    }
}
static void rows_through_ffn(void *context, int thread) {
    struct runner *r = context;
    const int64_t at_once = rows_at_once(r, r->num_rows);
    for (int64_t low; (low = take(r->pool) * at_once) < r->num_rows;) {
        const struct part rows = {low, low + at_once < r->num_rows ? low + at_once : r->num_rows};
        output_of(r, thread, rows, (struct part){0, num_panels(&r->layer->output)});
        norm_rows(r, rows);
        inner_of(r, thread, rows, (struct part){0, num_panels(&r->layer->gate_up)});
        down_of(r, thread, rows, (struct part){0, num_panels(&r->layer->down)});
    }
}

/* --- Attention ----------------------------------------------------------------------------------------------------- */

static int64_t chunks_of(const struct span *span, int64_t window) {
    return (span->start + span->num_rows - 1) / CHUNK_KEYS - first_key(span->start, window) / CHUNK_KEYS + 1;
}

static void pack_keys(void *context, int thread) {
    (void)thread;
    struct runner *r = context;
    const struct step *s = r->step;
    const struct cache *cache = &s->cache;
    int64_t item = take(r->pool), passed = 0;
    for (int64_t i = 0; i < s->num_spans; i++) {
        const struct span *span = &s->spans[i];
        if (span->num_rows == 1) continue;
        const int64_t chunks = chunks_of(span, r->layer->window), first = first_key(span->start, r->layer->window);
        for (; item < passed + chunks * cache->num_kv_heads; item = take(r->pool)) {
            const int64_t head = (item - passed) / chunks, chunk = (item - passed) % chunks;
            char *to = r->packed + (span->packed * cache->num_kv_heads + item - passed) * 2 * packed_bytes(cache);
            (void)chunk;
            pack_chunk(cache, s->blocks + span->first_block, r->layer_number, head,
                       (first / CHUNK_KEYS + chunk) * CHUNK_KEYS, span->start + span->num_rows, to,
                       to + packed_bytes(cache));
        }
        passed += chunks * cache->num_kv_heads;
    }
}

/* One row against the keys of [low_head, high_head): all heads over some of the keys, then over the next. */
static void attend_alone(struct runner *r, const struct span *span, int64_t low_head, int64_t high_head, char *scratch) {
    const struct model *m = r->model;
    const struct step *s = r->step;
    const int64_t group = m->num_heads / m->num_kv_heads, dim = m->head_dim, position = span->start;
    const int64_t width = (m->num_heads + 2 * m->num_kv_heads) * dim, row_bytes = m->num_heads * dim * element_bytes(m->kind);
    const int64_t first = low_head * group, num_heads = (high_head - low_head) * group;
    float *sums = (float *)scratch, *best = sums + num_heads * dim, *total = best + num_heads, *scores = total + num_heads;
    memset(sums, 0, num_heads * dim * 4);
    for (int64_t head = 0; head < num_heads; head++) best[head] = NO_SCORE, total[head] = 0;
    struct lone_query q = {&s->cache, s->blocks + span->first_block, r->layer_number};
    for (q.low = first_key(position, r->layer->window); q.low <= position; q.low = q.high) {
        q.high = (q.low / LONE_KEYS + 1) * LONE_KEYS <= position ? (q.low / LONE_KEYS + 1) * LONE_KEYS : position + 1;
        for (int mixes = 0; mixes < 2; mixes++)
            for (int64_t head = 0, heads; head < num_heads; head += heads) {
                const int64_t left = group - head % group;
                heads = left < 4 ? left : 4;
                q.kv_head = low_head + head / group;
                q.queries = r->qkv + span->first_row * width + (first + head) * dim;
                q.sums = sums + head * dim, q.best = best + head, q.total = total + head;
                q.scores = scores + head * LONE_KEYS;
                (mixes ? MIX_OF : SCORES_OF)[m->kind][heads](&q);
            }
    }
    char *to = r->mixed + span->first_row * row_bytes;
    for (int64_t head = 0; head < num_heads; head++)
        for (int64_t column = 0; column < dim; column += LANES)
            store_activation(m->kind, to, (first + head) * dim + column,
                             load(sums + head * dim + column) * (1.0f / total[head]));
}

static void attend_together(struct runner *r, const struct span *span, int64_t kv_head, int64_t low, int64_t high,
                            char *scratch) {
    const struct model *m = r->model;
    const struct cache *cache = &r->step->cache;
    const int64_t group = m->num_heads / m->num_kv_heads, dim = m->head_dim, element = element_bytes(m->kind);
    const int64_t width = (m->num_heads + 2 * m->num_kv_heads) * dim, row_bytes = m->num_heads * dim * element;
    const int64_t chunks = chunks_of(span, r->layer->window);
    const char *keys = r->packed + (span->packed * cache->num_kv_heads + kv_head * chunks) * 2 * packed_bytes(cache);
    const struct query_tile tile = {
        cache, group, span->start + low, high - low, r->layer->window,
        r->qkv + (span->first_row + low) * width + kv_head * group * dim, width, keys, keys + packed_bytes(cache),
        first_key(span->start, r->layer->window) / CHUNK_KEYS, scratch};
    attend_tile(&tile, r->mixed + (span->first_row + low) * row_bytes + kv_head * group * dim * element, row_bytes,
                m->kind);
}

static void attend_spans(struct runner *r, int thread, const struct span *spans, int64_t num_spans) {
    const struct model *m = r->model;
    char *scratch = r->scratch + thread * r->capacity_scratch;
    const int64_t group = m->num_heads / m->num_kv_heads, positions = QUERY_ROWS / group > 0 ? QUERY_ROWS / group : 1;
    /* a row's heads together, so that its blocks are read once, unless that leaves threads without work */
    const int64_t lone_items = num_spans < 2 * r->pool->num_threads && r->pool->num_threads > 1 ? m->num_kv_heads : 1;
    int64_t item = take(r->pool), passed = 0;
    for (int64_t i = 0; i < num_spans; i++) {
        const struct span *span = &spans[i];
        const int64_t tiles = (span->num_rows + positions - 1) / positions;
        const int64_t items = span->num_rows == 1 ? lone_items : tiles * m->num_kv_heads;
        for (; item < passed + items; item = take(r->pool)) {
            const int64_t place = item - passed;
            if (span->num_rows == 1) {
                const int64_t heads = m->num_kv_heads / lone_items;
                attend_alone(r, span, place * heads, (place + 1) * heads, scratch);
                continue;
            }
            /* the last tiles see the most keys: they go first, so that threads end together */
            const int64_t low = (tiles - 1 - place / m->num_kv_heads) * positions;
            attend_together(r, span, place % m->num_kv_heads, low,
                            low + positions < span->num_rows ? low + positions : span->num_rows, scratch);
        }
        passed += items;
    }
}
static void attend_all(void *context, int thread) {
    struct runner *r = context;
    attend_spans(r, thread, r->step->spans, r->step->num_spans);
}
static void attend_kept(void *context, int thread) {
    struct runner *r = context;
    attend_spans(r, thread, r->step->kept_spans, r->step->num_kept);
}

/* Room for the packed keys of a step, and for the scores and sums of a row. */
static int reserve_attention(struct runner *r, const struct step *s, struct span *spans) {
    int64_t chunks = 0;
    for (int64_t i = 0; i < s->num_spans; i++) {
        const int64_t end = spans[i].start + spans[i].num_rows;
        if (spans[i].num_rows == 1) continue;
        spans[i].packed = chunks;
        chunks += (end - 1) / CHUNK_KEYS + 1;
    }
    const int64_t alone = r->model->num_heads * (r->model->head_dim + 2 + LONE_KEYS) * 4;
    const int64_t together = tile_scratch_bytes(&s->cache), wanted = (alone > together ? alone : together) + 63;
    if (r->capacity_scratch < wanted) {
        free(r->scratch);
        r->capacity_scratch = (wanted + wanted / 4) / 64 * 64 + 64;
        if (!(r->scratch = allocate(r->capacity_scratch * r->pool->num_threads))) return r->capacity_scratch = 0, 0;
    }
    return reserve(&r->packed, &r->capacity_packed, chunks * s->cache.num_kv_heads * 2 * packed_bytes(&s->cache));
}

/* --- Layers -------------------------------------------------------------------------------------------------------- */

/* From here on only kept rows count, in the order of `kept`. */
static void keep_rows(struct runner *r) {
    const struct step *s = r->step;
    const struct model *m = r->model;
    const int64_t width = (m->num_heads + 2 * m->num_kv_heads) * m->head_dim, hidden = m->hidden_size;
    float *copy = allocate(s->num_kept * (hidden + width) * 4);
    if (!copy) {
        r->failed = 1;
        return;
    }
    float *qkv = copy + s->num_kept * hidden;
    for (int64_t i = 0; i < s->num_kept; i++) {
        memcpy(copy + i * hidden, r->residual + s->kept[i] * hidden, hidden * 4);
        memcpy(qkv + i * width, r->qkv + s->kept[i] * width, width * 4);
    }
    memcpy(r->residual, copy, s->num_kept * hidden * 4);
    memcpy(r->qkv, qkv, s->num_kept * width * 4);
    free(copy);
    r->num_rows = s->num_kept;
}

/* Zero what a request's last block held before, if this step is the first to write into it: see model/kv_cache.py. */
static void clear_block_ends(const struct runner *r) {
    const struct step *s = r->step;
    const struct cache *cache = &s->cache;
    const int64_t row_bytes = cache->head_dim * cache_element_bytes(cache);
    for (int64_t i = 0; i < s->num_spans; i++) {
        const struct span *span = &s->spans[i];
        const int64_t end = span->start + span->num_rows, used = end % cache->block_size;
        if (used == 0 || end - used < span->start) continue;
        const int64_t block = s->row_blocks[span->first_row + span->num_rows - 1];
        for (int part = 0; part < 2; part++)
            for (int64_t head = 0; head < cache->num_kv_heads; head++)
                memset(piece(cache, block, r->layer_number, part, head) + used * row_bytes, 0,
                       (cache->block_size - used) * row_bytes);
    }
}

/* A layer up to its output projection: what its heads have mixed, of the rows that count from here on. */
static void attend_layer(struct runner *r, int64_t number) {
    const struct step *s = r->step;
    struct pool *pool = r->pool;
    r->layer = &r->model->layers[number];
    r->layer_number = number;
    r->norm = r->layer->input_norm;
    if (r->num_rows <= FEW_ROWS) {
        norm_rows(r, (struct part){0, r->num_rows});
        run_together(pool, share_qkv, r);
        for (int64_t row = 0; row < r->num_rows; row++) place_row(r, row);
    } else {
        run_together(pool, rows_to_qkv, r);
    }
    clear_block_ends(r);
    const int last = number == r->model->num_layers - 1, fewer = last && s->num_kept < s->num_rows;
    if (fewer) {
        keep_rows(r);
        if (r->failed || r->num_rows == 0) return;
    }
    if (last) {
        run_together(pool, attend_kept, r);
    } else {
        for (int64_t i = 0; i < s->num_spans; i++)
            if (s->spans[i].num_rows > 1) {
                run_together(pool, pack_keys, r);
                break;
            }
        run_together(pool, attend_all, r);
    }
}

static void run_layer(struct runner *r, int64_t number) {
    struct pool *pool = r->pool;
    attend_layer(r, number);
    if (r->failed || r->num_rows == 0) return;
    r->norm = r->layer->ffn_norm;
    if (r->num_rows <= FEW_ROWS) {
        run_together(pool, share_output, r);
        norm_rows(r, (struct part){0, r->num_rows});
        run_together(pool, share_inner, r);
        run_together(pool, share_down, r);
    } else {
        run_together(pool, rows_through_ffn, r);
    }
}

/* Rows of a step as they enter the first layer. 0 if memory is short. */
static int begin_step(struct runner *r, const struct step *s) {
    if (!reserve_rows(r, s->num_rows) || !reserve_attention(r, s, (struct span *)s->spans)) return 0;
    r->num_rows = s->num_rows;
    for (int64_t row = 0; row < s->num_rows; row++)
        embed(r->model, s->token_ids[row], r->residual + row * r->model->hidden_size);
    return 1;
}

/* Layers [low, high) of a step, in order; 0 starts it. Returns 0, or 1 if memory is short. */
int transload_run_layers(struct runner *r, const struct step *s, int64_t low, int64_t high) {
    r->step = s;
    r->failed = 0;
    if (low == 0 && !begin_step(r, s)) return 1;
    for (int64_t number = low; number < high && !r->failed; number++) run_layer(r, number);
    return r->failed;
}

static void share_head(void *context, int thread) {
    struct runner *r = context;
    const struct model *m = r->model;
    const struct sink sink = {SINK_FLOAT32, 0, m->vocab_size * 4, r->logits};
    const struct part panels = share_of(num_panels(&m->head), thread, r->pool->num_threads);
    multiply(&m->head, r->activation, m->hidden_size * element_bytes(m->kind), r->num_rows, panels.low, panels.high,
             &sink, room_for(r, thread));
}

/* Logits [num_kept, vocab_size] of the kept rows, in their order. */
void transload_logits(struct runner *r, float *logits) {
    r->logits = logits;
    r->norm = r->model->final_norm;
    norm_rows(r, (struct part){0, r->num_rows});
    run_together(r->pool, share_head, r);
}

/* The lowest place among the largest of each row; a NaN counts as largest. */
static int64_t first_largest(const float *row, int64_t size) {
    vf best = all(-__builtin_inff());
    vi unordered = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vf value = load(row + i);
        best = larger(value, best);
        unordered |= value != value;
    }
    for (int lane = 0; lane < LANES; lane++)
        if (unordered[lane])
            for (int64_t at = 0; at < size; at++)
                if (row[at] != row[at]) return at;
    float top = largest_lane(best);
    for (int64_t rest = i; rest < size; rest++) {
        if (row[rest] != row[rest]) return rest;
        if (row[rest] > top) top = row[rest];
    }
    for (int64_t at = 0; at < size; at++)
        if (row[at] == top) return at;
    return 0;
}
void transload_first_largest(const float *rows, int64_t num_rows, int64_t size, int64_t *out) {
    for (int64_t row = 0; row < num_rows; row++) out[row] = first_largest(rows + row * size, size);
}

/* --- Life ---------------------------------------------------------------------------------------------------------- */

struct runner *transload_open(const struct model *model, int64_t num_threads) {
    struct runner *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->model = model;
    r->pool = pool_open((int)num_threads);
    if (!r->pool) return free(r), NULL;
    if (has_groups(model) && !(r->room = allocate(room_of(model) * r->pool->num_threads))) {
        pool_close(r->pool);
        free(r);
        return NULL;
    }
    return r;
}
static void free_scratch(struct runner *r) {
    free(r->residual), free(r->qkv), free(r->activation), free(r->mixed), free(r->inner);
    free(r->packed), free(r->scratch), free(r->room), free(r);
}
void transload_close(struct runner *r) {
    pool_close(r->pool);
    free_scratch(r);
}

/* --- One layer by itself ------------------------------------------------------------------------------------------- */

int64_t transload_packed_bytes(const struct linear *linear) {
    return num_panels(linear) * panel_bytes(linear->kind, linear->num_inputs);
}
void transload_pack(const struct linear *linear, const void *rows) { pack(linear, rows); }
/* Rows of the weights by number, float32 [count, K]. */
void transload_unpack_rows(const struct linear *linear, const int64_t *numbers, int64_t count, float *out) {
    for (int64_t i = 0; i < count; i++) unpack_row(linear, numbers[i], out + i * linear->num_inputs);
}
void transload_read_stored(int64_t four_bits, const void *from, int64_t num_blocks, int64_t kind, void *to) {
    read_stored((int)four_bits, from, num_blocks, kind, to);
}
int64_t transload_lanes(void) { return LANES; }
const char *transload_instruction_set(void) { return PAIRED ? INSTRUCTION_SET " with bfloat16 pairs" : INSTRUCTION_SET; }

struct product {
    const struct linear *linear;
    const void *x;
    void *out;
    int64_t num_rows;
    struct pool *pool;
};
static void multiply_rows(void *context, int thread) {
    const struct product *p = context;
    const struct linear *linear = p->linear;
    const int64_t k = linear->num_inputs, element = element_bytes(linear->kind);
    const struct part panels = share_of(num_panels(linear), thread, p->pool ? p->pool->num_threads : 1);
    const int narrow = linear->kind != KIND_FLOAT32;
    char *widened = narrow && !PAIRED ? allocate(ROWS_TOGETHER * k * 4) : NULL;
    char *room = is_grouped(linear->kind) ? allocate(room_bytes(k)) : NULL;
    for (int64_t low = 0; low < p->num_rows; low += ROWS_TOGETHER) {
        const int64_t rows = p->num_rows - low < ROWS_TOGETHER ? p->num_rows - low : ROWS_TOGETHER;
        const char *x = (const char *)p->x + low * k * (narrow ? 2 : 4);
        if (widened) {
            for (int64_t i = 0; i < rows * k; i += LANES)
                store((float *)widened + i, load_bf16((const uint16_t *)x + i));
            x = widened;
        }
        const int64_t out_bytes = linear->num_outputs * (narrow ? 2 : 4);
        const struct sink sink = {narrow ? SINK_BFLOAT16 : SINK_FLOAT32, 0, out_bytes, (char *)p->out + low * out_bytes};
        multiply(linear, x, k * element, rows, panels.low, panels.high, &sink, room);
    }
    free(widened), free(room);
}

/* Rows of the weights' kind to rows of the same kind; of grouped weights bfloat16 to bfloat16. */
void transload_multiply(const struct linear *linear, const void *x, int64_t num_rows, void *out, struct runner *r) {
    struct product product = {linear, x, out, num_rows, r ? r->pool : NULL};
    if (r)
        run_together(r->pool, multiply_rows, &product);
    else
        multiply_rows(&product, 0);
}

#include "split.h"

#include "ring.h"

/* Of the structs that Python describes as well, see structs.py. 0 for another. */
int64_t transload_size_of(const char *name) {
#define SIZE_OF(struct_name) if (!strcmp(name, #struct_name)) return sizeof(struct struct_name)
    SIZE_OF(linear);
    SIZE_OF(layer);
    SIZE_OF(model);
    SIZE_OF(step);
    SIZE_OF(caller_rows);
    SIZE_OF(ring);
    SIZE_OF(method);
    SIZE_OF(python);
    return 0;
}
