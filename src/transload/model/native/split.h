/* A step cut at its feed-forwards: attention layer by layer for one worker, feed-forwards alone for another.

Part of llama.c: the same functions in the same order, so that in float32 a step that is cut has the bits of one that is
not. Rows cross in the weights' kind; the residual stays in float32 where it is. A step's micro-batches are lanes: each
has a runner of its own, which shares the threads of the first. */

#ifndef TRANSLOAD_SPLIT_H
#define TRANSLOAD_SPLIT_H

/* Rows of `kind` from float32, and back. */
static void store_rows(int64_t kind, const float *from, int64_t count, void *to) {
    if (kind == KIND_FLOAT32)
        memcpy(to, from, count * 4);
    else
        for (int64_t i = 0; i < count; i += LANES) store_bf16((uint16_t *)to + i, load(from + i));
}
static void add_rows(int64_t kind, const void *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += LANES)
        store(to + i, load(to + i) + load_cached((int)kind, from, i));
}

/* --- Attention ----------------------------------------------------------------------------------------------------- */

/* A runner for another micro-batch of the same steps; it uses the threads of `first`, which must outlive it. */
struct runner *transload_open_lane(struct runner *first) {
    struct runner *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->model = first->model;
    r->pool = first->pool;
    if (first->room && !(r->room = allocate(room_of(r->model) * r->pool->num_threads))) return free(r), NULL;
    return r;
}
void transload_close_lane(struct runner *r) { free_scratch(r); }

/* Many rows: a thread takes some through the output projection and the norm. */
static void rows_to_norm(void *context, int thread) {
    struct runner *r = context;
    const int64_t at_once = rows_at_once(r, r->num_rows);
    for (int64_t low; (low = take(r->pool) * at_once) < r->num_rows;) {
        const struct part rows = {low, low + at_once < r->num_rows ? low + at_once : r->num_rows};
        output_of(r, thread, rows, (struct part){0, num_panels(&r->layer->output)});
        norm_rows(r, rows);
    }
}

/* Add what the feed-forward before gave, rows of `ffn_kind`. */
void transload_take_ffn(struct runner *r, const void *ffn, int64_t ffn_kind) {
    add_rows(ffn_kind, ffn, r->num_rows * r->model->hidden_size, r->residual);
}

/* Layer `number` of a step up to its feed-forward; 0 begins the step, others follow in order. `ffn`: what the one before
   gave, or NULL. Fills `normed` [rows, E], of the weights' kind; returns how many rows there are from here on, -1 if
   memory is short. */
int64_t transload_attend(struct runner *r, const struct step *s, int64_t number, const void *ffn, int64_t ffn_kind,
                         void *normed) {
    const struct model *m = r->model;
    r->step = s;
    r->failed = 0;
    if (number == 0 && !begin_step(r, s)) return -1;
    if (ffn) transload_take_ffn(r, ffn, ffn_kind);
    attend_layer(r, number);
    if (r->failed) return -1;
    if (r->num_rows == 0) return 0;
    r->norm = r->layer->ffn_norm;
    if (r->num_rows <= FEW_ROWS) {
        run_together(r->pool, share_output, r);
        norm_rows(r, (struct part){0, r->num_rows});
    } else {
        run_together(r->pool, rows_to_norm, r);
    }
    if (m->kind != KIND_FLOAT32 && PAIRED)
        memcpy(normed, r->activation, r->num_rows * m->hidden_size * 2);
    else
        store_rows(m->kind, (const float *)r->activation, r->num_rows * m->hidden_size, normed);
    return r->num_rows;
}

/* The residual of the rows that are left, float32 [rows, E]. */
void transload_residual(const struct runner *r, float *to) {
    memcpy(to, r->residual, r->num_rows * r->model->hidden_size * 4);
}

/* Logits [num_rows, vocab_size] of residuals [num_rows, E] that lanes have given. Returns 0, or 1 if memory is short. */
int transload_head(struct runner *r, const float *residual, int64_t num_rows, float *logits) {
    if (!reserve_rows(r, num_rows)) return 1;
    memcpy(r->residual, residual, num_rows * r->model->hidden_size * 4);
    r->num_rows = num_rows;
    transload_logits(r, logits);
    return 0;
}

/* --- Feed-forwards ------------------------------------------------------------------------------------------------- */

/* Rows of one caller: [num_rows, E] of the weights' kind, and where as many go. */
struct caller_rows {
    const void *rows;
    int64_t num_rows;
    void *out;
};

static void plain_down_of(struct runner *r, int thread, struct part rows, struct part panels) {
    const struct model *m = r->model;
    const int64_t bytes = m->intermediate_size * element_bytes(m->kind);
    const struct sink sink = {SINK_FLOAT32, 0, m->hidden_size * 4, r->residual + rows.low * m->hidden_size};
    multiply(&r->layer->down, r->inner + rows.low * bytes, bytes, rows.high - rows.low, panels.low, panels.high, &sink,
             room_for(r, thread));
}
static void share_plain_down(void *context, int thread) {
    struct runner *r = context;
    share_outputs(r, thread, plain_down_of, &r->layer->down);
}
static void rows_through_plain_ffn(void *context, int thread) {
    struct runner *r = context;
    const int64_t at_once = rows_at_once(r, r->num_rows);
    for (int64_t low; (low = take(r->pool) * at_once) < r->num_rows;) {
        const struct part rows = {low, low + at_once < r->num_rows ? low + at_once : r->num_rows};
        inner_of(r, thread, rows, (struct part){0, num_panels(&r->layer->gate_up)});
        plain_down_of(r, thread, rows, (struct part){0, num_panels(&r->layer->down)});
    }
}

/* One feed-forward for the rows of all callers together. Of `layer` only gate_up and down are used; of the model only
   the two widths and the kind; a layer may be narrower inside than the model says. Returns 0, or 1 if memory is short. */
int transload_feed_forward(struct runner *r, const struct layer *layer, const struct caller_rows *callers,
                           int64_t num_callers) {
    const int64_t hidden = r->model->hidden_size, kind = r->model->kind, row_bytes = hidden * element_bytes(kind);
    int64_t rows = 0;
    for (int64_t i = 0; i < num_callers; i++) rows += callers[i].num_rows;
    if (rows == 0) return 0;
    if (!reserve_rows(r, rows)) return 1;
    char *activation = r->activation;
    for (int64_t i = 0; i < num_callers; activation += callers[i].num_rows * row_bytes, i++) {
        const int64_t count = callers[i].num_rows * hidden;
        if (kind == KIND_FLOAT32 || PAIRED)
            memcpy(activation, callers[i].rows, count * element_bytes(kind));
        else
            for (int64_t at = 0; at < count; at += LANES)
                store((float *)activation + at, load_bf16((const uint16_t *)callers[i].rows + at));
    }
    r->layer = layer;
    r->num_rows = rows;
    if (rows <= FEW_ROWS) {
        run_together(r->pool, share_inner, r);
        run_together(r->pool, share_plain_down, r);
    } else {
        run_together(r->pool, rows_through_plain_ffn, r);
    }
    const float *result = r->residual;
    for (int64_t i = 0; i < num_callers; result += callers[i].num_rows * hidden, i++)
        store_rows(kind, result, callers[i].num_rows * hidden, callers[i].out);
    return 0;
}

#endif
