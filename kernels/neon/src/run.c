// Kernels one after the other, each over as many threads as its work divides into. A step is four int64: the kernel's address, the address of
// its args, how many parts there are, and how many parts at least a thread is worth. kernels/numba/steps.py is the same runner, and says how
// threads divide a step.
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

enum { MOST = 64, SPINS = 4000, CHUNKS = 8 };  // threads; looks at the next step before a thread sleeps; chunks of a step for each thread

typedef struct {
  _Alignas(64) _Atomic uint64_t value;
} Line;

static struct {
  atomic_flag owned;  // by the caller whose steps run now
  pthread_mutex_t sleep;
  pthread_cond_t wake;
  pid_t process;
  int64_t workers;  // threads beside the caller's
  _Atomic int64_t sleepers, use, each, count;  // asleep; the step's threads, chunks of each, parts
  _Atomic(kernel *) call;
  _Atomic(const int64_t *) args;
  Line round, left;     // steps begun; chunks not done
  Line tickets[MOST];  // a thread's: the low half of the round, then how many of its chunks nobody has taken (32 bits each)
} pool = {.owned = ATOMIC_FLAG_INIT, .sleep = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void pause_a_little(void) {
#ifdef __aarch64__
  __asm__ volatile("yield" ::: "memory");
#endif
}

// Chunks of the step that runs now, of thread `me` and then of those behind it, until none is left.
static void take(int64_t me) {
  const int64_t use = pool.use;
  if (me >= use) return;
  for (int64_t k = 0; k < use; k++) {
    const int64_t owner = (me + k) % use;
    _Atomic uint64_t *place = &pool.tickets[owner].value;
    for (uint64_t ticket; (uint32_t)(ticket = *place) != 0;) {
      if (!atomic_compare_exchange_strong(place, &ticket, ticket - 1)) continue;
      const int64_t each = pool.each, chunks = pool.use * each, count = pool.count;  // until this chunk is done the step stays
      const int64_t chunk = (owner + 1) * each - (uint32_t)ticket;
      pool.call(pool.args, count * chunk / chunks, count * (chunk + 1) / chunks);
      atomic_fetch_sub(&pool.left.value, 1);
    }
  }
}

static uint64_t next_round(uint64_t seen) {
  for (int spins = 0; pool.round.value == seen; spins++) {
    if (spins < SPINS) {
      pause_a_little();
      continue;
    }
    pthread_mutex_lock(&pool.sleep);
    pool.sleepers++;
    while (pool.round.value == seen) pthread_cond_wait(&pool.wake, &pool.sleep);
    pool.sleepers--;
    pthread_mutex_unlock(&pool.sleep);
  }
  return pool.round.value;
}

static void *work(void *me) {
  for (uint64_t seen = 0;;) {
    seen = next_round(seen);
    take((int64_t)(intptr_t)me);
  }
  return 0;
}

// At least `wanted` workers where the system grants them; chunks of those that are missing are done by the others.
static void grow(int64_t wanted) {
  if (pool.process != getpid()) {  // the first call, or a forked child, which has none of its parent's threads
    pool.process = getpid();
    pool.workers = 0;
    pool.sleep = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    pool.wake = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
    pool.sleepers = 0;
  }
  while (pool.workers < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, 0, work, (void *)(intptr_t)(pool.workers + 1))) break;
    pthread_detach(thread);
    pool.workers++;
  }
}

// A new round, for which those asleep wake up.
static void begin(void) {
  pool.round.value++;
  if (pool.sleepers) {
    pthread_mutex_lock(&pool.sleep);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.sleep);
  }
}

static void run_shared(const int64_t *step, int64_t use) {
  const int64_t worth = step[3] >= 8 ? step[3] / 4 : 1, most = step[2] / (worth * use), each = most > CHUNKS ? CHUNKS : most > 1 ? most : 1;
  pool.call = (kernel *)step[0];
  pool.args = (const int64_t *)step[1];
  pool.count = step[2];
  pool.each = each;
  pool.use = use;
  pool.left.value = (uint64_t)(each * use);
  const uint64_t mark = (pool.round.value + 1) << 32;
  for (int64_t t = 0; t < use; t++) pool.tickets[t].value = mark | (uint64_t)each;
  begin();
  take(0);
  for (int spins = 0; pool.left.value > 0; spins++) {
    if (spins < SPINS) pause_a_little();
    else sched_yield();
  }
}

// Runs n steps in order on up to `threads` threads; alone where another caller has the pool.
void edge_run(const int64_t *steps, int64_t n, int threads) {
  const int owned = threads > 1 && !atomic_flag_test_and_set(&pool.owned);
  const int64_t most = !owned ? 1 : threads > MOST ? MOST : threads;
  if (owned) {
    grow(most - 1);
    begin();
  }
  for (int64_t i = 0; i < n; i++) {
    const int64_t *step = steps + 4 * i;
    int64_t use = step[2] / (step[3] > 1 ? step[3] : 1);
    if (use > most) use = most;
    if (use > 1) run_shared(step, use);
    else ((kernel *)step[0])((const int64_t *)step[1], 0, step[2]);
  }
  if (owned) atomic_flag_clear(&pool.owned);
}
