/* A few threads that run one function together, many times a millisecond.

Owns starting, waking and joining them. A waiter spins for some microseconds, then sleeps in the kernel, so that an idle
worker costs nothing. The caller is thread 0. */

#ifndef TRANSLOAD_POOL_H
#define TRANSLOAD_POOL_H

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#define SPINS 4000
#define MAX_THREADS 64

typedef void work_function(void *context, int thread);

struct pool {
    int num_threads; /* the caller included */
    pthread_t threads[MAX_THREADS];
    work_function *work;
    void *context;
    _Atomic uint64_t round; /* counted up to start the work */
    _Atomic int running;    /* helpers that have not finished this round */
    _Atomic int sleepers;
    _Atomic int64_t next_item; /* of `take` */
    int stopping;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
};

struct helper {
    struct pool *pool;
    int thread;
};

INLINE void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void await_round(struct pool *pool, uint64_t seen) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&pool->round, memory_order_acquire) != seen) return;
        relax();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->round) == seen) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *help(void *argument) {
    struct helper helper = *(struct helper *)argument;
    free(argument);
    struct pool *pool = helper.pool;
    for (uint64_t seen = 0;; seen++) {
        await_round(pool, seen);
        if (pool->stopping) return NULL;
        pool->work(pool->context, helper.thread);
        atomic_fetch_sub_explicit(&pool->running, 1, memory_order_release);
    }
}

static void start_round(struct pool *pool) {
    atomic_fetch_add(&pool->round, 1);
    if (atomic_load(&pool->sleepers)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void run_together(struct pool *pool, work_function *work, void *context) {
    atomic_store_explicit(&pool->next_item, 0, memory_order_relaxed);
    if (pool->num_threads == 1) {
        work(context, 0);
        return;
    }
    pool->work = work;
    pool->context = context;
    atomic_store_explicit(&pool->running, pool->num_threads - 1, memory_order_relaxed);
    start_round(pool);
    work(context, 0);
    for (int i = 0; atomic_load_explicit(&pool->running, memory_order_acquire) > 0; i++) {
        if (i < SPINS)
            relax();
        else
            sched_yield();
    }
}

/* The next item of this round that nobody has taken. */
INLINE int64_t take(struct pool *pool) { return atomic_fetch_add_explicit(&pool->next_item, 1, memory_order_relaxed); }

static void pool_close(struct pool *pool) {
    pool->stopping = 1;
    start_round(pool);
    for (int i = 1; i < pool->num_threads; i++) pthread_join(pool->threads[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    free(pool);
}

static struct pool *pool_open(int num_threads) {
    struct pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->num_threads = 1;
    for (int i = 1; i < num_threads && i < MAX_THREADS; i++) {
        struct helper *helper = malloc(sizeof *helper);
        if (!helper) break;
        *helper = (struct helper){pool, i};
        if (pthread_create(&pool->threads[i], NULL, help, helper)) {
            free(helper);
            break; /* fewer threads do the same work */
        }
        pool->num_threads++;
    }
    return pool;
}

#endif
