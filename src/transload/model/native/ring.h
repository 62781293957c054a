/* Both ends of the memory that feed-forward calls cross in: see transfer/ffn_ring.py, which lays it out.

Owns the order of accesses: an entry is in place before the number that announces it (release, acquire), and whoever says
that it sleeps looks once more before it does (a full fence on both sides). What the peer may have written is read once
and checked before it is used. Everything here returns at once, but for the wait, which spins and has a limit. */

#ifndef TRANSLOAD_RING_H
#define TRANSLOAD_RING_H

#include <time.h>

#define MOST_SLOTS 64
#define LOOKS 32 /* between two looks at the clock */

struct ring {
    _Atomic uint64_t *words; /* the control page */
    int64_t num_slots;
    int64_t posted_at, news_at, dozes_at, peer_dozes_at; /* in words */
    int64_t out_entries, in_entries;
    char *out_headers, *out_rows; /* of slot 0 */
    int64_t slot_bytes, most_header_bytes, most_row_bytes;
    uint64_t num_posted, num_seen;
    uint64_t found[3 * MOST_SLOTS]; /* slot, header bytes, row bytes of what `poll` has found */
    uint64_t num_found;             /* by a wait, and not looked at yet */
};

INLINE uint64_t news_of(const struct ring *ring) {
    return atomic_load_explicit(&ring->words[ring->news_at], memory_order_acquire) - ring->num_seen;
}

/* Announce what is in a slot. `rows`: to be put there first, NULL if they are there. 1 if the peer wants to be woken. */
int transload_ring_post(struct ring *ring, int64_t slot, const void *header, int64_t header_bytes, const void *rows,
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

/* How many entries have come, now in `found`. -1: more than there can be, their number in found[0]. -2: the first three of
   `found` are an entry that cannot be. */
int64_t transload_ring_poll(struct ring *ring) {
    const uint64_t news = news_of(ring);
    if (news > (uint64_t)ring->num_slots) return ring->found[0] = news, -1;
    for (uint64_t i = 0; i < news; i++) {
        _Atomic uint64_t *entry = ring->words + ring->in_entries + 4 * ((ring->num_seen + i) % ring->num_slots);
        uint64_t said[3];
        for (int part = 0; part < 3; part++) said[part] = atomic_load_explicit(&entry[part], memory_order_relaxed);
        const int possible = said[0] < (uint64_t)ring->num_slots && said[1] > 0 &&
                             said[1] <= (uint64_t)ring->most_header_bytes && said[2] <= (uint64_t)ring->most_row_bytes;
        memcpy(ring->found + (possible ? 3 * i : 0), said, sizeof said);
        if (!possible) return -2;
    }
    ring->num_seen += news;
    return (int64_t)news;
}

/* Ask to be woken from now on. 0: there is news already. */
int transload_ring_doze(struct ring *ring) {
    atomic_store_explicit(&ring->words[ring->dozes_at], 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    return news_of(ring) == 0;
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Look again and again until one of the rings has news, or so many nanoseconds have passed. How long that took, at least 1;
   0 if there are none. What has come is polled already, unless it cannot be: the next poll says so. */
int64_t transload_ring_await(struct ring *const *rings, int64_t num_rings, int64_t limit) {
    const int64_t began = nanoseconds();
    int64_t now = began;
    do {
        for (int look = 0; look < LOOKS; look++) {
            for (int64_t i = 0; i < num_rings; i++) {
                if (news_of(rings[i]) == 0) continue;
                const int64_t found = transload_ring_poll(rings[i]);
                rings[i]->num_found = found > 0 ? found : 0;
                now = nanoseconds();
                return now > began ? now - began : 1;
            }
            relax();
        }
        now = nanoseconds();
    } while (now < began + limit);
    return 0;
}

#endif
