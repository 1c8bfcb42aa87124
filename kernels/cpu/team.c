/* Threads that run a job together: the caller and helpers that wait for the next one.

   The helpers are those of an OpenMP that the caller names, as torch has them: helpers of two kinds, each
   awake for a while after its work, would stand in each other's way. Else they are our own: callers in
   several threads have a team each; a team is kept for the next caller. A child of a fork has no threads
   but one, so it begins with no teams, and without the pool of OpenMP, which would wait for what is gone. */
#include "team.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#define SPINS 4000 /* tens of microseconds: longer than threads that have a core each wait for one another */

/* A number that threads wait for to change: for a while awake, then asleep. */
typedef struct {
    _Alignas(64) atomic_uint value;
    atomic_int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
} qt_signal;

struct qt_team {
    qt_signal start, gate;
    _Alignas(64) atomic_int arrived; /* at the gate */
    _Atomic int64_t threads;         /* the caller and the helpers */
    qt_job job;
    void *argument;
    qt_team *next;
};

typedef struct {
    qt_team *team;
    int64_t thread;
} qt_helper;

static pthread_mutex_t free_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static qt_team *free_teams;
static _Atomic qt_parallel parallel; /* NULL: helpers are our own */
static qt_number number_of_thread, number_of_threads;

static void pause_for_a_moment(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void signal_make(qt_signal *s) {
    atomic_init(&s->value, 0);
    atomic_init(&s->sleepers, 0);
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
}

static void signal_await(qt_signal *s, unsigned seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (atomic_load_explicit(&s->value, memory_order_acquire) != seen) return;
        pause_for_a_moment();
    }
    pthread_mutex_lock(&s->mutex);
    atomic_fetch_add(&s->sleepers, 1); /* before it looks: who changes the value looks afterwards */
    while (atomic_load(&s->value) == seen) pthread_cond_wait(&s->changed, &s->mutex);
    atomic_fetch_sub(&s->sleepers, 1);
    pthread_mutex_unlock(&s->mutex);
}

static void signal_change(qt_signal *s) {
    atomic_fetch_add(&s->value, 1);
    if (atomic_load(&s->sleepers) == 0) return;
    pthread_mutex_lock(&s->mutex);
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
}

void qt_team_wait(qt_team *team) {
    if (team->threads == 1) return;
    unsigned seen = atomic_load(&team->gate.value);
    if (atomic_fetch_add(&team->arrived, 1) + 1 < team->threads) {
        signal_await(&team->gate, seen);
        return;
    }
    atomic_store(&team->arrived, 0);
    signal_change(&team->gate);
}

static void *help(void *argument) {
    qt_helper self = *(qt_helper *)argument;
    qt_team *team = self.team;
    free(argument);
    for (unsigned seen = 0;; seen++) {
        signal_await(&team->start, seen);
        team->job(team->argument, team, self.thread, team->threads);
        qt_team_wait(team);
    }
    return NULL;
}

static void lock_teams(void) { pthread_mutex_lock(&free_lock); }
static void unlock_teams(void) { pthread_mutex_unlock(&free_lock); }

static void forget_teams(void) {
    pthread_mutex_init(&free_lock, NULL);
    free_teams = NULL;
    parallel = NULL;
}

static void follow_forks(void) { pthread_atfork(lock_teams, unlock_teams, forget_teams); }

static int add_helper(qt_team *team) {
    qt_helper *helper = malloc(sizeof *helper);
    pthread_t thread;
    if (!helper) return 0;
    *helper = (qt_helper){team, team->threads};
    if (pthread_create(&thread, NULL, help, helper) != 0) {
        free(helper);
        return 0;
    }
    pthread_detach(thread);
    team->threads++;
    return 1;
}

/* A team of that many threads that nobody has, else a new one; NULL if there is no memory. */
static qt_team *take_team(int64_t threads) {
    lock_teams();
    qt_team **place = &free_teams, *team;
    while (*place && (*place)->threads != threads) place = &(*place)->next;
    team = *place;
    if (team) *place = team->next;
    unlock_teams();
    if (team) return team;
    team = aligned_alloc(64, (sizeof(qt_team) + 63) / 64 * 64);
    if (!team) return NULL;
    signal_make(&team->start), signal_make(&team->gate);
    atomic_init(&team->arrived, 0);
    team->threads = 1;
    while (team->threads < threads && add_helper(team)) {
    }
    return team; /* of fewer threads where the system has no more */
}

void qt_team_borrow(qt_parallel run, qt_number thread, qt_number threads) {
    pthread_once(&once, follow_forks);
    number_of_thread = thread, number_of_threads = threads;
    parallel = run;
}

/* What each thread of a pool runs: they may be fewer than were asked for. */
static void take_part(void *argument) {
    qt_team *team = argument;
    int64_t threads = number_of_threads();
    atomic_store(&team->threads, threads);
    team->job(team->argument, team, number_of_thread(), threads);
}

void qt_team_run(int64_t threads, qt_job job, void *argument) {
    qt_team alone = {.threads = 1}, *team = NULL;
    pthread_once(&once, follow_forks);
    qt_parallel run = threads > 1 ? parallel : NULL;
    if (run) {
        signal_make(&alone.gate);
        alone.job = job, alone.argument = argument;
        run(take_part, &alone, (unsigned)threads, 0);
        return;
    }
    if (threads > 1) team = take_team(threads);
    if (!team) {
        job(argument, &alone, 0, 1);
        return;
    }
    team->job = job, team->argument = argument;
    signal_change(&team->start);
    job(argument, team, 0, team->threads);
    qt_team_wait(team);
    lock_teams();
    team->next = free_teams, free_teams = team;
    unlock_teams();
}
