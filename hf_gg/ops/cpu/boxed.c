/* A linear layer of few rows as a kernel of PyTorch's dispatcher: no Python between the call of the operator and the sums.

   Only the C interface is used that PyTorch keeps stable (torch/csrc/stable/c/shim.h): its functions are handed in as
   pointers, so that neither PyTorch's headers nor a C++ compiler are needed. What this kernel does not take it leaves
   to Python, which also says what is wrong with it. */
#include "rf8.h"

#include <stdbool.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint64_t value; /* one argument or result: a number, a tensor's handle, or a pointer to one for an optional */
typedef void *handle;
typedef void (*kernel)(value *stack, uint64_t arguments, uint64_t results);

/* In the order of FUNCTIONS in boxed.py. Each returns 0, or an error. */
typedef struct {
  int32_t (*library_init_impl)(const char *ns, const char *key, const char *file, uint32_t line, handle *out);
  int32_t (*library_impl)(handle library, const char *name, kernel function, uint64_t version);
  int32_t (*get_dim)(handle tensor, int64_t *out);
  int32_t (*get_sizes)(handle tensor, int64_t **out);
  int32_t (*get_strides)(handle tensor, int64_t **out);
  int32_t (*get_dtype)(handle tensor, int32_t *out);
  int32_t (*get_device_type)(handle tensor, int32_t *out);
  int32_t (*get_data_ptr)(handle tensor, void **out);
  int32_t (*empty_strided)(int64_t dim, const int64_t *sizes, const int64_t *strides, int32_t dtype, int32_t device,
                           int32_t index, handle *out);
  int32_t (*delete_tensor)(handle tensor);
  int32_t (*new_value)(value **out);
  int32_t (*delete_value)(value *pointer);
  int32_t (*get_num_threads)(uint32_t *out);
} interface;

int64_t hf_gg_rf8_linear(const void *format, int64_t isa, int64_t threads, const void *x, int64_t x_row,
                         int64_t x_dtype, const uint8_t *codes, int64_t code_row, const float *scale,
                         int64_t scale_row, const void *bias, int64_t bias_dtype, void *y, int64_t y_row, int64_t m,
                         int64_t n, int64_t k);

#define MOST_FORMATS 16
#define MOST_DIM 8

static interface torch;
static struct {
  int64_t isa, most_rows, count;
  int32_t u8, f32, bf16, f16;
  const void *formats[MOST_FORMATS];
} state;

typedef struct {
  int64_t dim, *sizes, *strides;
  int32_t dtype;
  void *data;
} view;

/* Whether it is a dense tensor in main memory. */
static bool look(handle tensor, view *v) {
  int32_t device;
  if (torch.get_device_type(tensor, &device) || device != 0 || torch.get_dim(tensor, &v->dim) ||
      torch.get_sizes(tensor, &v->sizes) || torch.get_strides(tensor, &v->strides) ||
      torch.get_dtype(tensor, &v->dtype) || torch.get_data_ptr(tensor, &v->data))
    return false;
  int64_t step = 1;
  for (int64_t i = v->dim - 1; i >= 0; i--) {
    if (v->sizes[i] != 1 && v->strides[i] != step) return false;
    step *= v->sizes[i];
  }
  return true;
}

static int64_t own_dtype(int32_t dtype) {
  return dtype == state.f32 ? DTYPE_F32 : dtype == state.bf16 ? DTYPE_BF16 : dtype == state.f16 ? DTYPE_F16 : DTYPE_NONE;
}

/* The result, or NULL: not a case for this kernel. */
static handle run(handle tx, handle tcodes, handle tscale, handle tbias, int64_t format) {
  view x, codes, scale, bias = {.data = NULL}, out;
  if (format < 0 || format >= state.count || !look(tx, &x) || !look(tcodes, &codes) || !look(tscale, &scale) ||
      (tbias && !look(tbias, &bias)))
    return NULL;
  if (codes.dtype != state.u8 || codes.dim != 2 || scale.dtype != state.f32 || scale.dim != 2) return NULL;
  int64_t n = codes.sizes[0], k = codes.sizes[1], m = 1, strides[MOST_DIM];
  if (x.dim < 1 || x.dim > MOST_DIM || x.sizes[x.dim - 1] != k || !own_dtype(x.dtype) || n == 0 || k == 0) return NULL;
  if (scale.sizes[1] != 1 || (scale.sizes[0] != n && scale.sizes[0] != 1)) return NULL;
  if (tbias && (bias.dim != 1 || bias.sizes[0] != n || !own_dtype(bias.dtype))) return NULL;
  for (int64_t i = 0; i + 1 < x.dim; i++) m *= x.sizes[i];
  if (m < 1 || m > state.most_rows) return NULL;
  int64_t sizes[MOST_DIM], step = 1;
  memcpy(sizes, x.sizes, (size_t)x.dim * sizeof *sizes);
  sizes[x.dim - 1] = n;
  for (int64_t i = x.dim - 1; i >= 0; i--) strides[i] = step, step *= sizes[i];
  handle y = NULL;
  uint32_t threads = 1;
  if (torch.get_num_threads(&threads) || torch.empty_strided(x.dim, sizes, strides, x.dtype, 0, 0, &y)) return NULL;
  if (!look(y, &out) ||
      hf_gg_rf8_linear(state.formats[format], state.isa, threads, x.data, k, own_dtype(x.dtype), codes.data, k,
                       scale.data, scale.sizes[0] > 1, bias.data, tbias ? own_dtype(bias.dtype) : DTYPE_NONE, out.data,
                       n, m, n, k)) {
    torch.delete_tensor(y);
    return NULL;
  }
  return y;
}

/* few_rows(Tensor x, Tensor codes, Tensor scale, Tensor? bias, int format) -> Tensor?; the arguments are ours to free. */
static void few_rows(value *stack, uint64_t arguments, uint64_t results) {
  (void)arguments, (void)results;
  handle x = (handle)(uintptr_t)stack[0], codes = (handle)(uintptr_t)stack[1], scale = (handle)(uintptr_t)stack[2];
  value *optional = (value *)(uintptr_t)stack[3], *result = NULL;
  handle bias = optional ? (handle)(uintptr_t)*optional : NULL, y = run(x, codes, scale, bias, (int64_t)stack[4]);
  torch.delete_tensor(x);
  torch.delete_tensor(codes);
  torch.delete_tensor(scale);
  if (optional) {
    torch.delete_tensor(bias);
    torch.delete_value(optional);
  }
  if (y) {
    if (torch.new_value(&result)) {
      torch.delete_tensor(y);
      result = NULL;
    } else {
      *result = (value)(uintptr_t)y;
    }
  }
  stack[0] = (value)(uintptr_t)result;
}

/* Registers the kernel for tensors in main memory. `functions` as in `interface`; `dtypes`: PyTorch's numbers of uint8,
   float32, bfloat16, float16. Returns 0, or an error of PyTorch. */
EXPORT int64_t hf_gg_rf8_register(void *const *functions, const int64_t *dtypes, int64_t isa, int64_t most_rows,
                                  int64_t version) {
  static handle library; /* kept: the registration goes with it */
  memcpy(&torch, functions, sizeof torch);
  state.isa = isa, state.most_rows = most_rows;
  state.u8 = (int32_t)dtypes[0], state.f32 = (int32_t)dtypes[1];
  state.bf16 = (int32_t)dtypes[2], state.f16 = (int32_t)dtypes[3];
  if (library) return 0;
  int32_t error = torch.library_init_impl("hf_gg", "CPU", "boxed.c", 1, &library);
  return error ? error : torch.library_impl(library, "few_rows", few_rows, (uint64_t)version);
}

/* The number by which `few_rows` knows a format, -1 if there are too many. The tables must live on. */
EXPORT int64_t hf_gg_rf8_register_format(const void *format) {
  if (state.count >= MOST_FORMATS) return -1;
  state.formats[state.count] = format;
  return state.count++;
}
