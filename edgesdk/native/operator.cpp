// edgesdk::linear for ExecuTorch: x [..., cols] float32, weights as one tensor of bytes -> [..., rows] float32, inputs rounded to 8 bits.
// Compiled against the headers of the very version that runs it, without a C++ standard library. edgesdk/native/operator.py writes the bytes.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <executorch/runtime/core/function_ref.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>

using executorch::runtime::ArrayRef;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::FunctionRef;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;
using executorch::runtime::etensor::ScalarType;
using executorch::runtime::etensor::Tensor;
using executorch::runtime::etensor::TensorImpl;

namespace executorch {
namespace runtime {
namespace internal {
Error resize_tensor_impl(TensorImpl *impl, ArrayRef<int32_t> sizes);
}
__attribute__((visibility("hidden"))) void runtime_abort() { abort(); }  // what the headers' checks call; ExecuTorch does not export its own
}  // namespace runtime
namespace extension {
__attribute__((weak)) bool parallel_for(const int64_t begin, const int64_t end, const int64_t grain, runtime::FunctionRef<void(int64_t, int64_t)> f);
}
}  // namespace executorch

#define GLUE(prefix, name) prefix##_##name
#define GLUED_TO(prefix, name) GLUE(prefix, name)
#define GLUED(name) GLUED_TO(EDGE_PREFIX, name)  // what a kernel of this target is called
typedef void Kernel(const int64_t *args, int64_t first, int64_t last);
extern "C" {
#define FORM(name) Kernel GLUED(gemv_##name), GLUED(gemm_##name);
EDGE_FORMS
#undef FORM
Kernel GLUED(round);
}

namespace {

struct Form {
  const char *name;
  Kernel *gemv, *gemm;
};
struct Table {
  const char *target;
  Kernel *round;
  int64_t count;
  const Form *forms;
  Table *next;
};
#define FORM(name) {#name, GLUED(gemv_##name), GLUED(gemm_##name)},
const Form forms[] = {EDGE_FORMS};
#undef FORM
Table own = {EDGE_TARGET, GLUED(round), sizeof(forms) / sizeof(forms[0]), forms, nullptr};

// What the bytes begin with. `args`: those of a product in their order, addresses as offsets into the bytes (0 for none).
struct Head {
  int64_t layout, rows, cols, blocks, padded, panels, together, panel_bytes, shift;
  char target[32], form[32];
  int64_t args[EDGE_LINEAR_ARGS], kinds[EDGE_LINEAR_ARGS];  // kinds: 0 a number, 1 an offset
};

constexpr int64_t BLOCK = 32, THREAD_BYTES = 1 << 17;

struct Room {
  int64_t size;
  uint8_t *bytes;
};

// At least `wanted` bytes that are this thread's until its next call; null where there are none.
uint8_t *room_of(int64_t wanted) {
  static pthread_key_t key;
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, [] {
    pthread_key_create(&key, [](void *p) {
      free(static_cast<Room *>(p)->bytes);
      free(p);
    });
  });
  Room *room = static_cast<Room *>(pthread_getspecific(key));
  if (!room) {
    room = static_cast<Room *>(calloc(1, sizeof(Room)));
    if (!room) return nullptr;
    pthread_setspecific(key, room);
  }
  if (wanted > room->size) {
    free(room->bytes);
    room->bytes = static_cast<uint8_t *>(aligned_alloc(64, wanted));
    room->size = room->bytes ? wanted : 0;
  }
  return room->bytes;
}

int64_t up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

void run(Kernel *kernel, const int64_t *args, int64_t parts, int64_t least) {
  const int64_t grain = least > 1 ? least : 1;
  if (parts < 2 * grain || !executorch::extension::parallel_for) return kernel(args, 0, parts);
  auto share = [&](int64_t first, int64_t last) { kernel(args, first, last); };
  executorch::extension::parallel_for(0, parts, grain, FunctionRef<void(int64_t, int64_t)>(share));
}

const Form *find(const Head *head, const Table **table) {
  for (const Table *t = &own; t; t = t->next) {
    if (strcmp(t->target, head->target)) continue;
    for (int64_t i = 0; i < t->count; i++)
      if (!strcmp(t->forms[i].name, head->form)) {
        *table = t;
        return &t->forms[i];
      }
  }
  return nullptr;
}

Error product(const Tensor &x, const Tensor &packed, Tensor &out) {
  const uint8_t *base = static_cast<const uint8_t *>(packed.const_data_ptr());
  const Head *head = reinterpret_cast<const Head *>(base);
  const ssize_t last = x.dim() - 1;
  if (packed.numel() < static_cast<ssize_t>(sizeof(Head)) || head->layout != EDGE_LAYOUT) return Error::InvalidProgram;
  if (last < 0 || x.size(last) != head->cols || x.scalar_type() != ScalarType::Float || out.scalar_type() != ScalarType::Float)
    return Error::InvalidArgument;
  const Table *table = nullptr;
  const Form *form = find(head, &table);
  if (!form) return Error::OperatorMissing;
  int32_t sizes[16];
  if (last > 15) return Error::InvalidArgument;
  for (ssize_t i = 0; i < last; i++) sizes[i] = static_cast<int32_t>(x.size(i));
  sizes[last] = static_cast<int32_t>(head->rows);
  const Error resized = executorch::runtime::internal::resize_tensor_impl(
      out.unsafeGetTensorImpl(), ArrayRef<int32_t>(sizes, static_cast<size_t>(last + 1)));
  if (resized != Error::Ok) return resized;

  const int64_t m = x.numel() / head->cols, wide = head->blocks * BLOCK;
  if (m == 0) return Error::Ok;
  const bool narrow = head->cols != wide, ragged = head->rows != head->padded;
  const int64_t for_x = narrow ? up(4 * m * wide) : 0, for_out = ragged ? up(4 * m * head->padded) : 0;
  const int64_t for_q = up(m * wide), for_sums = up(4 * m * head->blocks), for_row = up(4 * m);
  uint8_t *room = room_of(for_x + for_out + for_q + for_sums + 2 * for_row);
  if (!room) return Error::MemoryAllocationFailed;
  const float *in = static_cast<const float *>(x.const_data_ptr());
  float *to = static_cast<float *>(out.mutable_data_ptr()), *result = to;
  if (narrow) {
    float *copy = reinterpret_cast<float *>(room);
    for (int64_t i = 0; i < m; i++) {
      memcpy(copy + i * wide, in + i * head->cols, 4 * head->cols);
      memset(copy + i * wide + head->cols, 0, 4 * (wide - head->cols));
    }
    in = copy;
    room += for_x;
  }
  if (ragged) {
    result = reinterpret_cast<float *>(room);
    room += for_out;
  }
  uint8_t *q = room, *sums = q + for_q, *scale = sums + for_sums, *zero = scale + for_row;

  int64_t given[EDGE_ROUND_ARGS] = {};
  const auto at = [](const void *p) { return reinterpret_cast<int64_t>(p); };
  given[EDGE_AT_ROUND_x] = at(in);
  given[EDGE_AT_ROUND_blocks] = head->blocks;
  given[EDGE_AT_ROUND_stride] = 4 * wide;
  given[EDGE_AT_ROUND_m] = m;
  given[EDGE_AT_ROUND_shift] = head->shift;
  given[EDGE_AT_ROUND_q] = at(q);
  given[EDGE_AT_ROUND_q_sums] = at(sums);
  given[EDGE_AT_ROUND_q_scale] = at(scale);
  given[EDGE_AT_ROUND_q_zero] = at(zero);
  given[EDGE_AT_ROUND_out] = at(in);
  given[EDGE_AT_ROUND_cols] = head->cols;
  run(table->round, given, m, THREAD_BYTES / (8 * head->cols));

  int64_t args[EDGE_LINEAR_ARGS];
  for (int i = 0; i < EDGE_LINEAR_ARGS; i++) args[i] = head->kinds[i] && head->args[i] ? at(base + head->args[i]) : head->args[i];
  args[EDGE_AT_LINEAR_q] = at(q);
  args[EDGE_AT_LINEAR_q_sums] = at(sums);
  args[EDGE_AT_LINEAR_q_scale] = at(scale);
  args[EDGE_AT_LINEAR_q_zero] = at(zero);
  args[EDGE_AT_LINEAR_m] = m;
  args[EDGE_AT_LINEAR_out] = at(result);
  args[EDGE_AT_LINEAR_stride] = 4 * head->padded;
  if (m == 1) {
    run(form->gemv, args, head->panels, THREAD_BYTES / head->panel_bytes);
  } else {
    const int64_t rows = m < 16 ? m : 16;
    run(form->gemm, args, head->panels / head->together, THREAD_BYTES / (head->panel_bytes * head->together * rows));
  }
  if (ragged)
    for (int64_t i = 0; i < m; i++) memcpy(to + i * head->rows, result + i * head->padded, 4 * head->rows);
  return Error::Ok;
}

// linear.out(Tensor x, Tensor packed, int rows, *, Tensor(a!) out) -> Tensor(a!)
void linear_out(KernelRuntimeContext &context, Span<EValue *> stack) {
  const Error error = product(stack[0]->toTensor(), stack[1]->toTensor(), stack[3]->toTensor());
  if (error != Error::Ok) context.fail(error);
}

}  // namespace

// What the loader reads before it opens the library: the version of ExecuTorch, the target, the CPU's features that it needs.
extern "C" __attribute__((used, retain, visibility("default"))) const char edge_operators_made_for[] =
    "EDGE-OPERATORS|" EDGE_VERSION "|" EDGE_TARGET "|" EDGE_FEATURES "|";

#define VISIBLE extern "C" __attribute__((visibility("default")))

// The kernels of this library; of one that registered nothing, for the library that did.
VISIBLE void *edge_operators_table() { return &own; }

// Makes edgesdk::linear known to ExecuTorch, once in a process: 1. Where another library did so already: 0.
VISIBLE int edge_operators_register() {
  static const executorch::runtime::Kernel kernel("edgesdk::linear.out", linear_out);
  for (const executorch::runtime::Kernel &known : executorch::runtime::get_registered_kernels())
    if (known.name_ && !strcmp(known.name_, kernel.name_)) return 0;
  return executorch::runtime::register_kernels({&kernel, 1}) == Error::Ok;
}

// Lets the operator of this library use another one's kernels, too.
VISIBLE void edge_operators_add(void *other) {
  Table *table = static_cast<Table *>(other);
  for (const Table *t = &own; t; t = t->next)
    if (t == table) return;
  table->next = own.next;
  own.next = table;
}
