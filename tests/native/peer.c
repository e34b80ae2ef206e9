// Calls functions of other libraries beside our kernels, so that their instructions are counted in the same way.
//   peer_image: args[0] the path of a shared library: its segments are mapped at IMAGE, without relocations (leaf functions need none).
//   peer_call:  args[0] the function's address, args[1 ...] twelve of its args, all 64 bits wide.
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define IMAGE 0x6000000000ull

void peer_image(const int64_t *args, int64_t first, int64_t last) {
  (void)first, (void)last;
  int file = open((const char *)args[0], O_RDONLY);
  Elf64_Ehdr head;
  if (file < 0 || pread(file, &head, sizeof head, 0) != sizeof head) exit(20);
  for (int i = 0; i < head.e_phnum; i++) {
    Elf64_Phdr p;
    if (pread(file, &p, sizeof p, (off_t)(head.e_phoff + (uint64_t)i * sizeof p)) != sizeof p) exit(21);
    if (p.p_type != PT_LOAD) continue;
    uint64_t start = p.p_vaddr & ~0xfffull, size = (p.p_vaddr + p.p_memsz - start + 0xfff) & ~0xfffull;
    void *at = mmap((void *)(IMAGE + start), size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (at == MAP_FAILED || pread(file, (void *)(IMAGE + p.p_vaddr), p.p_filesz, (off_t)p.p_offset) != (ssize_t)p.p_filesz) exit(22);
    if (mprotect(at, size, PROT_READ | (p.p_flags & PF_X ? PROT_EXEC : PROT_WRITE))) exit(23);
    if (p.p_flags & PF_X) __builtin___clear_cache(at, (char *)at + size);
  }
  close(file);
}

void peer_call(const int64_t *args, int64_t first, int64_t last) {
  (void)first, (void)last;
  const int64_t *a = args + 1;
  ((void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t))args[0])(
      a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
}
