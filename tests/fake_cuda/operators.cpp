// Tells the model which tensors every operator reads and writes, as PyTorch's own CUDA sanitizer does.

#include <ATen/ATen.h>
#include <ATen/core/function_schema.h>
#include <ATen/core/jit_type.h>
#include <ATen/record_function.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>

#include <algorithm>

namespace {

using Touch = void (*)(void*, const void*, size_t, bool, const char*);

Touch touch() {
  static auto found = reinterpret_cast<Touch>(dlsym(RTLD_DEFAULT, "fake_cuda_touch"));
  return found;
}

void* current_stream(const at::Tensor& tensor) {
  c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  return guard.getStream(tensor.device()).native_handle();
}

void tell(const at::Tensor& tensor, bool write, const char* name) {
  if (!tensor.defined() || !tensor.is_cuda() || !tensor.has_storage() || tensor.numel() == 0) return;
  size_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += static_cast<size_t>((tensor.size(dim) - 1) * tensor.stride(dim));
  }
  touch()(current_stream(tensor), tensor.const_data_ptr(), (last + 1) * tensor.itemsize(), write, name);
}

void tell(const c10::IValue& value, bool write, const char* name) {
  if (value.isTensor()) {
    tell(value.toTensor(), write, name);
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) tell(tensor, write, name);
  }
}

// Operators that look at a tensor's shape or place alone, or hand out room that nobody has written.
bool moves_nothing(const c10::FunctionSchema& schema) {
  const std::string& name = schema.name();
  for (const char* start : {"aten::empty", "aten::new_empty", "aten::resize", "aten::set_", "aten::_reshape_alias"}) {
    if (name.rfind(start, 0) == 0) return true;
  }
  if (schema.returns().empty()) return false;
  for (const auto& result : schema.returns()) {
    if (result.alias_info() == nullptr || result.alias_info()->isWrite()) return false;
  }
  return true;
}

// Constants are written in truth: the contract of the collectives begins with them.
void fill(const at::Tensor& tensor, double value) {
  static auto captures = reinterpret_cast<bool (*)(void*)>(dlsym(RTLD_DEFAULT, "fake_cuda_captures"));
  if (!tensor.defined() || !tensor.is_cuda() || !tensor.is_contiguous() || tensor.numel() == 0) return;
  if (tensor.scalar_type() != at::kFloat || captures(current_stream(tensor))) return;
  auto* values = static_cast<float*>(tensor.mutable_data_ptr());
  std::fill(values, values + tensor.numel(), static_cast<float>(value));
}

struct Seen final : at::ObserverContext {};

std::unique_ptr<at::ObserverContext> begins(const at::RecordFunction& function) {
  auto schema = function.operator_schema();
  if (!schema.has_value() || moves_nothing(*schema)) return nullptr;
  const auto inputs = function.inputs();
  for (size_t i = 0; i < inputs.size() && i < schema->arguments().size(); ++i) {
    const auto* alias = schema->arguments()[i].alias_info();
    tell(inputs[i], alias != nullptr && alias->isWrite(), function.name());
  }
  const bool zero = schema->name() == "aten::zero_";
  if (zero || (schema->name() == "aten::fill_" && inputs.size() > 1 && inputs[1].isScalar())) {
    if (inputs[0].isTensor()) fill(inputs[0].toTensor(), zero ? 0.0 : inputs[1].toScalar().toDouble());
  }
  return std::make_unique<Seen>();
}

void ends(const at::RecordFunction& function, at::ObserverContext* seen) {
  if (seen == nullptr) return;
  for (const auto& output : function.outputs()) tell(output, true, function.name());
}

const auto handle = at::addGlobalCallback(at::RecordFunctionCallback(begins, ends)
                                              .needsInputs(true)
                                              .needsOutputs(true)
                                              .scopes({at::RecordScope::FUNCTION}));

}  // namespace
