// Runs cases from a file: kernels on buffers that end where a page ends that must not be touched.
// harness <cases> <answers>; all numbers are int64.
//   number of cases, then each: buffers, tables, steps, threads
//     buffers: size, bytes (padded to 8)
//     tables:  size, then pairs (buffer or -1, offset or value)
//     steps:   name's place in NAMES, table, count, least; threads 0: each kernel called directly, count as first (high half) and last (low half)
// Answers: every buffer's bytes in the same order.
#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef void kernel(const int64_t *args, int64_t first, int64_t last);
#define NAME(f) extern kernel f;
#include NAMES_FILE
#undef NAME
#define NAME(f) f,
static kernel *const NAMES[] = {
#include NAMES_FILE
};
void edge_run(const int64_t *steps, int64_t n, int threads);

static FILE *in;
static volatile int64_t current = -1;

static void failed(int signal) {
  char text[64];
  int n = snprintf(text, sizeof text, "signal %d in case %d\n", signal, (int)current);
  _exit(write(2, text, (size_t)n) == n ? 100 : 101);
}

static int64_t number(void) {
  int64_t v;
  if (fread(&v, 8, 1, in) != 1) exit(3);
  return v;
}

typedef struct { char *pages, *bytes; int64_t size, room; } buffer;

static buffer taken(void) {  // between two pages that may not be touched, its end at the second one
  int64_t size = number(), page = sysconf(_SC_PAGESIZE), room = (size + page - 1) / page * page + 2 * page;
  char *pages = mmap(0, (size_t)room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) exit(4);
  if (room > 2 * page && mprotect(pages + page, (size_t)(room - 2 * page), PROT_READ | PROT_WRITE)) exit(5);
  buffer b = {pages, pages + room - page - size, size, room};
  char rest[8];
  if (fread(b.bytes, 1, (size_t)size, in) != (size_t)size) exit(6);
  if (size % 8 && fread(rest, 1, (size_t)(8 - size % 8), in) == 0) exit(7);
  return b;
}

int main(int argc, char **argv) {
  if (argc != 3 || !(in = fopen(argv[1], "rb"))) return 2;
  FILE *out = fopen(argv[2], "wb");
  for (int s = 1; s < 32; s++) if (s == SIGILL || s == SIGSEGV || s == SIGBUS || s == SIGFPE) signal(s, failed);
  int64_t cases = number();
  for (current = 0; current < cases; current++) {
    int64_t buffers = number(), tables = number(), steps = number(), threads = number();
    buffer *b = calloc((size_t)buffers, sizeof(buffer));
    int64_t **t = calloc((size_t)tables, sizeof(int64_t *)), *s = calloc((size_t)steps, 32);
    for (int64_t i = 0; i < buffers; i++) b[i] = taken();
    for (int64_t i = 0; i < tables; i++) {
      int64_t size = number();
      t[i] = calloc((size_t)size, 8);
      for (int64_t k = 0; k < size; k++) {
        int64_t which = number(), value = number();
        t[i][k] = which < 0 ? value : (int64_t)b[which].bytes + value;
      }
    }
    for (int64_t i = 0; i < 4 * steps; i++) s[i] = number();
    for (int64_t i = 0; i < steps; i++) {
      kernel *run = NAMES[s[4 * i]];
      const int64_t *args = t[s[4 * i + 1]], count = s[4 * i + 2];
      if (!threads) run(args, count >> 32, count & 0xffffffff);
      s[4 * i] = (int64_t)run;
      s[4 * i + 1] = (int64_t)args;
    }
    if (threads) edge_run(s, steps, (int)threads);
    for (int64_t i = 0; i < buffers; i++) {
      fwrite(b[i].bytes, 1, (size_t)b[i].size, out);
      munmap(b[i].pages, (size_t)b[i].room);
    }
    for (int64_t i = 0; i < tables; i++) free(t[i]);
    free(b), free(t), free(s);
  }
  return fclose(out) ? 8 : 0;
}
