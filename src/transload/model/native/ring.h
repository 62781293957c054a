/* Both ends of the memory that feed-forward calls cross in: see transfer/ffn_ring.py, which lays it out.

Owns the order of accesses: an entry is in place before the number that announces it (release, acquire), and whoever says
that it sleeps looks once more before it does (a full fence on both sides). What the peer may have written is read once
and checked before it is used. Everything here returns at once, but for the wait, which spins and has a limit. */

#ifndef TRANSLOAD_RING_H
#define TRANSLOAD_RING_H

#include <time.h>

#include "python.h"

#define MOST_SLOTS 64
#define LOOKS 32                /* between two looks at the clock */
#define MANY_BYTES (256 << 10)  /* other threads may run while so many are copied */
#define TOO_MANY -1
#define IMPOSSIBLE -2

struct ring {
    _Atomic uint64_t *words; /* the control page */
    int64_t num_slots;
    int64_t posted_at, news_at, dozes_at, peer_dozes_at; /* in words */
    int64_t out_entries, in_entries;
    char *out_headers, *out_rows; /* of slot 0 */
    const char *in_headers;
    int64_t slot_bytes, most_header_bytes;
    int64_t most_sent_bytes, most_row_bytes; /* of rows, there and back */
    uint64_t num_posted, num_seen;
    uint64_t found[3 * MOST_SLOTS]; /* slot, header bytes, row bytes of what `poll` has found */
    int64_t num_found;              /* by a wait, and not taken yet */
    int64_t problem;                /* with what has come, see `poll` */
};

INLINE uint64_t news_of(const struct ring *ring) {
    return atomic_load_explicit(&ring->words[ring->news_at], memory_order_acquire) - ring->num_seen;
}
INLINE int has_news(const struct ring *ring) { return ring->num_found || news_of(ring); }

/* Announce what is in a slot. `rows`: to be put there first, NULL if they are there. 1 if the peer wants to be woken. */
static int ring_post(struct ring *ring, int64_t slot, const void *header, int64_t header_bytes, const void *rows,
                     int64_t row_bytes) {
    if (rows) memcpy(ring->out_rows + slot * ring->slot_bytes, rows, row_bytes);
    memcpy(ring->out_headers + slot * ring->slot_bytes, header, header_bytes);
    _Atomic uint64_t *entry = ring->words + ring->out_entries + 4 * (ring->num_posted % ring->num_slots);
    atomic_store_explicit(&entry[0], slot, memory_order_relaxed);
    atomic_store_explicit(&entry[1], header_bytes, memory_order_relaxed);
    atomic_store_explicit(&entry[2], row_bytes, memory_order_relaxed);
    atomic_store_explicit(&ring->words[ring->posted_at], ++ring->num_posted, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    return atomic_load_explicit(&ring->words[ring->peer_dozes_at], memory_order_relaxed) != 0;
}

/* How many entries have come, now in `found`. TOO_MANY: more than there can be, their number in found[0]. IMPOSSIBLE: the
   first three of `found` are an entry that cannot be. */
static int64_t ring_poll(struct ring *ring) {
    const uint64_t news = news_of(ring);
    if (news > (uint64_t)ring->num_slots) return ring->found[0] = news, TOO_MANY;
    for (uint64_t i = 0; i < news; i++) {
        _Atomic uint64_t *entry = ring->words + ring->in_entries + 4 * ((ring->num_seen + i) % ring->num_slots);
        uint64_t said[3];
        for (int part = 0; part < 3; part++) said[part] = atomic_load_explicit(&entry[part], memory_order_relaxed);
        const int possible = said[0] < (uint64_t)ring->num_slots && said[1] > 0 &&
                             said[1] <= (uint64_t)ring->most_header_bytes && said[2] <= (uint64_t)ring->most_row_bytes;
        memcpy(ring->found + (possible ? 3 * i : 0), said, sizeof said);
        if (!possible) return IMPOSSIBLE;
    }
    ring->num_seen += news;
    return (int64_t)news;
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Look again and again until one of the rings has news, or so many nanoseconds have passed. How long that took, at least 1;
   0 if there are none. What has come is polled already, unless it cannot be: whoever takes it is told. */
static int64_t ring_await(struct ring *const *rings, int64_t num_rings, int64_t limit) {
    const int64_t began = nanoseconds();
    int64_t now = began;
    do {
        for (int look = 0; look < LOOKS; look++) {
            for (int64_t i = 0; i < num_rings; i++) {
                if (!has_news(rings[i])) continue;
                if (!rings[i]->num_found) {
                    const int64_t found = ring_poll(rings[i]);
                    rings[i]->num_found = found > 0 ? found : 0;
                }
                now = nanoseconds();
                return now > began ? now - began : 1;
            }
            relax();
        }
        now = nanoseconds();
    } while (now < began + limit);
    return 0;
}

/* --- As Python calls them: `self` is the ring's address. ------------------------------------------------------------ */

/* post(slot, header, row bytes, address of the rows or 0): whether the peer wants to be woken. */
static object *python_post(object *self, object *const *arguments, intptr_t count) {
    struct ring *ring = python.as_address(self);
    char *header;
    intptr_t header_bytes;
    if (count != 4 || python.as_bytes(arguments[1], &header, &header_bytes)) return wrong("post(slot, header, n, rows)");
    const int64_t slot = python.as_integer(arguments[0]), row_bytes = python.as_integer(arguments[2]);
    const void *rows = python.as_address(arguments[3]);
    if (python.error()) return NULL;
    if (slot < 0 || slot >= ring->num_slots) return wrong("a slot that the ring has not");
    if (header_bytes < 1 || header_bytes > ring->most_header_bytes) return wrong("a header that no slot has room for");
    if (row_bytes < 0 || row_bytes > ring->most_sent_bytes) return wrong("rows that no slot has room for");
    void *unlocked = rows && row_bytes > MANY_BYTES ? python.unlock() : NULL;
    const int dozes = ring_post(ring, slot, header, header_bytes, rows, row_bytes);
    if (unlocked) python.lock(unlocked);
    return python.boolean(dozes);
}

/* take(): a tuple of (slot, header, row bytes) of what has come; False if that cannot be, and `problem` says how. Headers
   are copied before anybody looks at them: the peer can write there still. */
static object *python_take(object *self, object *nothing) {
    struct ring *ring = python.as_address(self);
    const int64_t count = ring->num_found ? ring->num_found : ring_poll(ring);
    ring->num_found = 0;
    if (count < 0) return ring->problem = count, python.boolean(0);
    object *entries = python.tuple(count);
    for (int64_t i = 0; entries && i < count; i++) {
        const uint64_t *found = ring->found + 3 * i;
        object *entry = python.tuple(3);
        if (entry) {
            python.set_item(entry, 0, python.integer(found[0]));
            python.set_item(entry, 1, python.bytes(ring->in_headers + found[0] * ring->slot_bytes, found[1]));
            python.set_item(entry, 2, python.integer(found[2]));
        }
        python.set_item(entries, i, entry);
    }
    if (!entries || !count || !python.error()) return entries;
    python.drop(entries);
    return NULL;
}

/* has_news() */
static object *python_has_news(object *self, object *nothing) {
    return python.boolean(has_news(python.as_address(self)));
}

/* doze(): ask to be woken from now on. False: there is news already. */
static object *python_doze(object *self, object *nothing) {
    struct ring *ring = python.as_address(self);
    atomic_store_explicit(&ring->words[ring->dozes_at], 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return python.boolean(!has_news(ring));
}

/* await_news(address of the rings' addresses, how many, seconds): see ring_await; in seconds. Other threads run. */
static object *python_await_news(object *self, object *const *arguments, intptr_t count) {
    if (count != 3) return wrong("await_news(rings, how many, seconds)");
    struct ring *const *rings = python.as_address(arguments[0]);
    const int64_t num_rings = python.as_integer(arguments[1]);
    const double seconds = python.as_number(arguments[2]);
    if (python.error()) return NULL;
    void *unlocked = python.unlock();
    const int64_t took = ring_await(rings, num_rings, (int64_t)(1e9 * seconds));
    python.lock(unlocked);
    return python.number(1e-9 * took);
}

static struct method ring_methods[] = {
    {"post", (void *)python_post, ARGUMENTS, NULL},
    {"take", (void *)python_take, NO_ARGUMENTS, NULL},
    {"has_news", (void *)python_has_news, NO_ARGUMENTS, NULL},
    {"doze", (void *)python_doze, NO_ARGUMENTS, NULL},
    {"await_news", (void *)python_await_news, ARGUMENTS, NULL},
};

/* NULL if there is none of that name. */
struct method *transload_ring_method(const char *name) {
    for (size_t i = 0; i < sizeof ring_methods / sizeof *ring_methods; i++)
        if (!strcmp(ring_methods[i].name, name)) return &ring_methods[i];
    return NULL;
}

#endif
