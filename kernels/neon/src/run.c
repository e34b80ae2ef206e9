// Kernels one after the other, each over as many threads as its work divides into. A step is four int64: the kernel's address, the address of
// its args, how many parts there are, and how many parts at least a thread is worth (kernels/numba/steps.py has the same runner).
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#ifdef OLD_GLIBC  // the name these had before glibc 2.34, so that older systems load what newer ones link
__asm__(".symver pthread_create,pthread_create@GLIBC_2.17");
__asm__(".symver pthread_detach,pthread_detach@GLIBC_2.17");
#endif

typedef void kernel(const int64_t *args, int64_t first, int64_t last);

enum { MOST = 64, SPINS = 4000 };  // threads; looks at the next work before a thread sleeps (some tens of microseconds)

static struct {
  atomic_flag owned;  // by the caller whose steps run now
  pthread_mutex_t sleep;
  pthread_cond_t wake;
  pid_t process;
  int workers;  // threads beside the caller's
  const int64_t *step;
  int64_t shares;
  _Atomic uint64_t round;  // counts the shared steps
  _Atomic int64_t left;    // workers that have not passed this step
  _Atomic int sleepers;
} pool = {.owned = ATOMIC_FLAG_INIT, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void pause_a_little(void) {
#ifdef __aarch64__
  __asm__ volatile("yield" ::: "memory");
#endif
}

static void share(const int64_t *step, int64_t i, int64_t of) {
  ((kernel *)step[0])((const int64_t *)step[1], step[2] * i / of, step[2] * (i + 1) / of);
}

static uint64_t next_round(uint64_t seen) {
  uint64_t now;
  for (int spins = 0; (now = atomic_load_explicit(&pool.round, memory_order_acquire)) == seen; spins++) {
    if (spins < SPINS) {
      pause_a_little();
      continue;
    }
    pthread_mutex_lock(&pool.sleep);
    atomic_fetch_add(&pool.sleepers, 1);
    while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.sleep);
  }
  return now;
}

static void *work(void *started) {
  const int64_t me = ((int64_t *)started)[0];
  uint64_t seen = (uint64_t)((int64_t *)started)[1];
  for (;;) {
    seen = next_round(seen);
    if (me < pool.shares) share(pool.step, me, pool.shares);
    atomic_fetch_sub_explicit(&pool.left, 1, memory_order_release);
  }
  return 0;
}

// At least `wanted` workers where the system grants them; the number there is.
static int workers(int wanted) {
  static int64_t starts[MOST][2];
  if (pool.process != getpid()) {  // the first call, or a forked child, which has none of its parent's threads
    pool.process = getpid();
    pool.workers = 0;
    pool.sleep = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    atomic_store(&pool.sleepers, 0);
  }
  while (pool.workers < wanted && pool.workers < MOST - 1) {
    pthread_t thread;
    int64_t *start = starts[pool.workers];
    start[0] = pool.workers + 1;
    start[1] = (int64_t)atomic_load(&pool.round);
    if (pthread_create(&thread, 0, work, start)) break;
    pthread_detach(thread);
    pool.workers++;
  }
  return pool.workers;
}

static void run_shared(const int64_t *step, int64_t shares) {
  pool.step = step;
  pool.shares = shares;
  atomic_store_explicit(&pool.left, pool.workers, memory_order_relaxed);
  atomic_fetch_add(&pool.round, 1);
  if (atomic_load(&pool.sleepers)) {
    pthread_mutex_lock(&pool.sleep);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.sleep);
  }
  share(step, 0, shares);
  for (int spins = 0; atomic_load_explicit(&pool.left, memory_order_acquire) > 0; spins++) {
    if (spins < SPINS) pause_a_little();
    else sched_yield();
  }
}

// Runs n steps in order on up to `threads` threads; alone where another caller has the pool.
void edge_run(const int64_t *steps, int64_t n, int threads) {
  int owned = threads > 1 && !atomic_flag_test_and_set(&pool.owned);
  int64_t most = owned ? workers((threads > MOST ? MOST : threads) - 1) + 1 : 1;
  if (most > threads) most = threads;
  for (int64_t i = 0; i < n; i++) {
    const int64_t *step = steps + 4 * i;
    int64_t shares = step[2] / (step[3] > 1 ? step[3] : 1);
    if (shares > most) shares = most;
    if (shares > 1) run_shared(step, shares);
    else ((kernel *)step[0])((const int64_t *)step[1], 0, step[2]);
  }
  if (owned) atomic_flag_clear(&pool.owned);
}
