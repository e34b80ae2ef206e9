// A plugin of qemu-user (TCG plugins, version 1; declared here, as Debian ships no header): how often each instruction ran.
// At the end it prints "<address> <times>" a line. qemu-aarch64 -plugin libcount.so -d plugin -D <file> <program>, of the dynamic qemu-user.
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

typedef uint64_t qemu_plugin_id_t;
typedef struct {
  const char *target_arch;
  struct { int min, cur; } version;
  bool system_emulation;
  union { struct { int smp_vcpus, max_vcpus; } system; };
} qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, translated *call);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t i);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *insn);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *insn, int add_u64, void *counter, uint64_t by);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*call)(qemu_plugin_id_t id, void *data), void *data);
void qemu_plugin_outs(const char *text);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum { ROOM = 1 << 18 };
static struct { uint64_t address, times; } places[ROOM];

static uint64_t *counter_of(uint64_t address) {
  uint64_t i = address / 4 * 0x9E3779B97F4A7C15u >> 46;
  while (places[i % ROOM].address && places[i % ROOM].address != address) i++;
  places[i % ROOM].address = address;
  return &places[i % ROOM].times;
}

static void count(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
  (void)id;
  for (size_t i = 0, n = qemu_plugin_tb_n_insns(tb); i < n; i++) {
    struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
    qemu_plugin_register_vcpu_insn_exec_inline(insn, 0, counter_of(qemu_plugin_insn_vaddr(insn)), 1);
  }
}

static void report(qemu_plugin_id_t id, void *data) {
  (void)id, (void)data;
  char line[64];
  for (int i = 0; i < ROOM; i++)
    if (places[i].times) {
      snprintf(line, sizeof line, "%llx %llu\n", (unsigned long long)places[i].address, (unsigned long long)places[i].times);
      qemu_plugin_outs(line);
    }
}

__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, count);
  qemu_plugin_register_atexit_cb(id, report, 0);
  return 0;
}
